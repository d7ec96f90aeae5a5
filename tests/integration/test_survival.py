"""A run that is interrupted again and again: whatever the moment, nothing stays behind, and the run can be gone on
with.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import store
from tests.conftest import starting_with
from tests.integration.conftest import PATIENCE_S, SMALL, Workshop

STEPS = 3
TRAIN = ("train", "--preset", "tiny", "--rollout", "int8", "--tis", "2", "--json", "--resume", "auto")
SHORT = (*SMALL, "--set", f"trainer.steps={STEPS}", "--set", "trainer.save_every=1")
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

Moment = Callable[[RunPaths, float], bool]
"""Whether it has come, given the run and the time that the command was started (seconds since the epoch)."""


def after(seconds: float) -> Moment:
    return lambda _, started: time.time() - started > seconds


def phase(name: str) -> Moment:
    """When the attempt that was just started is doing `name`."""

    def reached(run: RunPaths, started: float) -> bool:
        found = store.load(run.record)
        last = found.last if found else None
        return bool(last and last.pid_started >= started - 1 and any(one.name == name for one in last.phases))

    return reached


def saving(number: int) -> Moment:
    """While the checkpoint of a step is being written, or right after."""
    return lambda run, _: (run.checkpoints / f"global_step_{number}" / "actor").exists()


MOMENTS = [(after(0.5), INT, False), (phase("starting the trainer"), HUP, False)]
"""When which signal is sent; and whether the run ignores INT and HUP, and gets those two first: nohup in the background
of a script.
"""
AT_ONCE = [(saving(1), TERM, True)]
"""The same for a run that trains and samples at the same time, in processes of their own."""
SEPARATE = ("--set", "trainer.mode=separate_async")


def interrupted(
    shop: Workshop, name: str, moments: list[tuple[Moment, signal.Signals, bool]], more: tuple[str, ...] = ()
) -> int:
    """Start the run `name` again and again and interrupt it at each moment; how often that was.

    The exit code is the signal's.
    """
    run = RunPaths(name, shop.root / "runs" / name, shop.root / "checkpoints" / "tiny" / name)
    for moment, number, nohup in moments:
        started = time.time()
        with starting_with(signal.SIG_IGN if nohup else signal.SIG_DFL, INT, HUP):
            process = shop.start(*TRAIN, *SHORT, *more, "--name", name)
        while not moment(run, started) and process.poll() is None:
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()
        for one in (HUP, INT, number) if nohup else (number,):  # several are handled in the order of their numbers
            process.send_signal(one)
        _, err = process.communicate(timeout=PATIENCE_S)
        assert err.count("Ctrl-C will not stop it") == nohup
        assert not nohup or "error: stopped by SIGTERM" in err
        # before flashrl installs its handlers, the defaults end it: by the signal, which shells report as 128 + n
        codes = {130 if number == INT else 143, -number}
        if err.rstrip().endswith("KeyboardInterrupt"):  # while it starts, Python itself ends with 1
            codes.add(1)
        assert process.returncode in codes, err
        assert not [left for left in shop.leftovers() if f"/{name}/" in left]
    return len(moments)


def test_interrupted_at_many_moments(workshop: Workshop) -> None:
    assert interrupted(workshop, "asked", MOMENTS) == len(MOMENTS)
    assert interrupted(workshop, "apart", AT_ONCE, SEPARATE) == len(AT_ONCE)
    assert not workshop.leftovers()
    for name in ("asked", "apart"):
        check_interruptions(RunPaths(name, workshop.root / f"runs/{name}", workshop.root / f"checkpoints/tiny/{name}"))


def check_interruptions(run: RunPaths) -> None:
    """Every attempt that began has its entry; the last one was stopped in mid-run."""
    found = store.load(run.record)
    assert found
    assert [attempt.number for attempt in found.attempts] == run.attempts()
    assert {attempt.status for attempt in found.attempts} == {"stopped"}
    assert found.attempts[-1].phases[0].name == "starting verl"
    assert run.root.stat().st_mode & 0o777 == 0o700


def test_a_used_name_is_refused(workshop: Workshop) -> None:
    """After the test above the run `asked` exists."""
    _, err = workshop.run(*TRAIN[:-2], *SHORT, "--name", "asked", code=2)
    assert "--resume auto" in err
