"""Runs killed with KILL at random moments, then resumed until they end: does anything get lost, or stay behind?

    python benchmarks/kill_resume.py [--kills 20] [--per-run 5] [--steps 6] [--jobs 1] [--latest-s 130] [--out FILE]

Needs `flashrl prepare tiny`. Each run trains the preset tiny (INT8, TIS) to --steps, saving every step. An attempt is struck at a
random time: flashrl itself, the guardian, or any process of the tree gets KILL. What then must hold: the attempt ends by
itself within two minutes (or is not touched by it and goes on), no process is left, the next attempt resumes from the newest
complete step, and in the end every step has its metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from flashrl_cli import files
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import record
from flashrl_cli.runs.history import history, holes
from flashrl_cli.runs.saved import saved_steps

LATEST_S = 130.0
"""A strike comes within this time of a start; on two cores the first step is done after about 95 s."""
DEADLINE_S = 120.0
"""Within this time a struck attempt must have ended, and its processes be gone."""
STUCK_S = 400.0
"""Whatever neither ends nor moves for so long would do so for ever."""
RUN = "killed"


@dataclass(frozen=True, kw_only=True)
class Strike:
    """One KILL and what came of it. `outcome`: `ended`, `harmless` (the attempt went on), or what went wrong."""

    after_s: float
    victim: str
    outcome: str
    ended_after_s: float | None
    steps: int
    error: str | None


class Shop:
    """A folder in which one run is started over and over."""

    def __init__(self, root: Path, steps: int) -> None:
        self.root, self.steps = root, steps
        self.paths = RunPaths(RUN, root / "runs" / RUN, root / "checkpoints" / "tiny" / RUN)
        self.said = root / "said"

    def start(self) -> subprocess.Popen[bytes]:
        """Start or resume the run."""
        command = [sys.executable, "-m", "flashrl_cli", "train", "--preset", "tiny", "--name", RUN, "--resume", "auto"]
        command += ["--json", "--set", f"trainer.steps={self.steps}", "--set", "trainer.save_every=1"]
        places = {f"FLASHRL_{name.upper()}": str(self.root / name) for name in ("runs", "checkpoints")}
        with self.said.open("ab") as said:
            return subprocess.Popen(command, env={**os.environ, **places}, cwd=self.root, stdout=said, stderr=said)

    def leftovers(self) -> list[str]:
        """Processes of the run that still are there, by working folder or command line."""
        found = []
        for process in psutil.process_iter(["cwd", "cmdline", "status"]):
            info = process.info
            words = f"{info['cwd']} {' '.join(info['cmdline'] or ())}"
            if str(self.root) in words and info["status"] != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {words[:120]}")
        return found

    def logged(self) -> list[int]:
        """Training steps with metrics, over all attempts."""
        return [metrics.step for metrics in history(self.paths) if metrics.trained]

    def newest(self) -> set[int]:
        """Steps that a resume may go on from: the newest complete one, or the newest that has its metrics, too."""
        complete = [one.step for one in saved_steps(self.paths.checkpoints, critic=False) if one.complete]
        logged = set(self.logged())
        return {max(complete, default=0), max((step for step in complete if step in logged), default=0)}


def choose_victim(flashrl: psutil.Process, dice: random.Random) -> psutil.Process:
    """Flashrl itself every second time, else anything that it started."""
    tree = flashrl.children(recursive=True)
    return flashrl if not tree or dice.random() < 0.5 else dice.choice(tree)


def strike(shop: Shop, dice: random.Random, latest_s: float) -> Strike:
    """Start the run, kill something after a while, and see what comes of it."""
    before = shop.newest()
    child = shop.start()
    after = dice.uniform(0, latest_s)
    deadline = time.monotonic() + after
    while time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.05)
    if child.poll() is not None:
        return (
            _told(shop, after, "nobody", "ended", 0.0)
            if child.returncode == 0
            else _told(shop, after, "nobody", f"ended by itself with {child.returncode}", 0.0)
        )
    victim = choose_victim(psutil.Process(child.pid), dice)
    name = _name(victim, child.pid)
    victim.kill()
    struck = time.monotonic()
    outcome = _outcome(shop, child, struck)
    taken = time.monotonic() - struck
    if outcome == "ended" and (resumed := _resumed_from(shop)) is not None and resumed not in before:
        outcome = f"resumed from {resumed} instead of {sorted(before)}"
    return _told(shop, after, name, outcome, taken)


def _outcome(shop: Shop, child: subprocess.Popen[bytes], struck: float) -> str:
    """`ended` in time, `harmless` if the attempt moved on and came to its end, or what stayed behind."""
    moved = _moves(shop)
    while (waited := time.monotonic() - struck) < STUCK_S:
        if child.poll() is not None and not shop.leftovers():
            return "ended" if waited < DEADLINE_S else f"ended after {waited:.0f} s only"
        if child.poll() is None and _moves(shop) > moved + 1:
            return _until_the_end(shop, child)
        time.sleep(0.2)
    left = shop.leftovers()
    child.kill()
    return f"left after {STUCK_S:g} s: {left}"


def _moves(shop: Shop) -> int:
    """Phases and steps of the newest attempt so far. One more may have been under way when it was struck, two may not."""
    found = record.load(shop.paths.record)
    return (len(found.last.phases) + len(shop.logged())) if found and found.last else 0


def _until_the_end(shop: Shop, child: subprocess.Popen[bytes]) -> str:
    """The victim was nobody that the run needs."""
    code = child.wait(timeout=600)
    left = shop.leftovers()
    return f"left after the end: {left}" if left else ("harmless" if code == 0 else f"ended late with {code}")


def _resumed_from(shop: Shop) -> int | None:
    """Where the newest attempt went on; None if it was struck before it had an entry."""
    found = record.load(shop.paths.record)
    if found is None or found.last is None or found.last.number != max(shop.paths.attempts(), default=0):
        return None
    return found.last.resumed_from or 0


def _name(victim: psutil.Process, flashrl: int) -> str:
    if victim.pid == flashrl:
        return "flashrl"
    try:
        words = " ".join(victim.cmdline())
    except psutil.Error:
        return "?"
    return "guardian" if "launch.guardian" in words else words[:60]


def _told(shop: Shop, after: float, victim: str, outcome: str, taken: float) -> Strike:
    found = record.load(shop.paths.record)
    last = found.last if found else None
    error = last.error if last else None
    steps = max(shop.logged(), default=0)
    return Strike(
        after_s=round(after, 1), victim=victim, outcome=outcome, ended_after_s=round(taken, 1), steps=steps, error=error
    )


def one_run(root: Path, *, kills: int, steps: int, seed: int, latest_s: float = LATEST_S) -> dict[str, Any]:
    """A run that is struck `kills` times and then left in peace; `problems` is empty if all held."""
    shop, dice = Shop(root, steps), random.Random(seed)
    strikes = []
    for _ in range(kills):
        strikes.append(strike(shop, dice, latest_s))
        print(json.dumps(asdict(strikes[-1])), flush=True)
    before = shop.newest()
    code = shop.start().wait(timeout=900)
    problems = [one.outcome for one in strikes if one.outcome not in {"ended", "harmless"}]
    problems += [f"exit {code} at the end"] * (code != 0)
    problems += [f"metrics of steps {shop.logged()}"] * (shop.logged() != list(range(1, steps + 1)))
    problems += [f"holes {holes(history(shop.paths))}"] * bool(holes(history(shop.paths)))
    problems += [f"left: {shop.leftovers()}"] * bool(shop.leftovers())
    resumed = _resumed_from(shop)
    if max(before) < steps and resumed not in before:
        problems.append(f"resumed from {resumed} instead of {sorted(before)}")
    return {"seed": seed, "strikes": [asdict(one) for one in strikes], "steps": shop.logged(), "problems": problems}


def main() -> int:
    """Strike, tell, and keep the result; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-run", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--latest-s", type=float, default=LATEST_S, help="a strike comes within this time of a start")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once: a start keeps one core busy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kill_resume.json"))
    args = parser.parse_args()
    shares = [min(args.per_run, args.kills - first) for first in range(0, args.kills, args.per_run)]

    def in_a_folder(number: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return one_run(
                Path(folder), kills=shares[number], steps=args.steps, seed=args.seed + number, latest_s=args.latest_s
            )

    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(in_a_folder, range(len(shares))))
    strikes = [one for run in runs for one in run["strikes"]]
    held = sum(one["outcome"] in {"ended", "harmless"} for one in strikes)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "kills": len(strikes),
        "held": held,
        "slowest_end_s": max(one["ended_after_s"] for one in strikes if one["outcome"] == "ended"),
        "runs": runs,
    }
    files.write_json(args.out, result)
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))
    return int(any(run["problems"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
