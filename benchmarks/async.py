"""Asynchronous beside synchronous training on the same devices: step times, who waits for whom, KL by staleness.

    python -m benchmarks.async [--preset tiny] [--modes sync,colocate_async,separate_async] [--rollouts bf16,int8]
        [--lengths short,tailed] [--steps 14] [--set KEY=VALUE] [--of MODE:KEY=VALUE] [--tail KEY=VALUE]
        [--budget SECONDS] [--out benchmarks/results/async.json]
    python -m benchmarks.async --draw docs/async.png [--out benchmarks/results/async.json]

Each case is a run of `flashrl train` with a mode, a precision and a length of responses: `short` is the preset's own,
`tailed` takes the options of `--tail`, by default a higher limit; for the tiny preset give it the policy that
`benchmarks.tailed_policy` writes, too (`--tail model.path=FOLDER --tail data.max_response_length=512`). `--of` gives
options to one mode only, such as how many GPUs each side gets. A case is written to FILE as soon as it is known, and is
not run again.

Seconds are on one clock, from the end of the first step on, and the first steps do not count (`SETTLING`), in which the
asynchronous modes start with what they generated ahead. Beside verl's timings of the trainer, the devices are watched
from outside: the processor time of the trainer's and of the engine's processes on a CPU, each GPU's utilization by
nvidia-smi on GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import psutil
from benchmarks import step

from flashrl_cli import files
from flashrl_cli.machine import gpus
from flashrl_cli.paths import AttemptPaths
from flashrl_cli.runs.metrics import MetricsTail
from flashrl_cli.verl.metrics import AT, FRESH

if TYPE_CHECKING:
    from flashrl_cli.verl.metrics import StepMetrics

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "async.json"
MODES = ("sync", "colocate_async", "separate_async")
TAIL = ("data.max_response_length=512",)
SETTLING = 3
"""Steps that do not count, in which the prefetched batches are used up and processes warm up."""
EVERY_S = 0.1
"""Seconds between two looks at the devices."""
DRAWN = 200
"""Looks at each device that the document keeps."""
TITLES = {"trainer": ("ray::WorkerDict",), "engine": ("VLLM::Worker", "VLLM::EngineCore")}
"""Titles of the processes that do each side's arithmetic."""
PHASES = ("generate", "log-probs", "reference", "advantage", "actor", "refit")
"""Phases of a step in the order in which verl goes through them (verl/trainer/ppo/v1/trainer_base.py:505)."""
KEPT = ("reward", "response_length", "longest_response", "kl", "kl_k3", "tokens", "effective", "truncated", "staleness",
        "step_s")  # fmt: skip
"""Metrics of a step that the document keeps, of each staleness, too (flashrl_cli.verl.metrics)."""
Result = dict[str, Any]


# What a run says.


def reading(metrics: StepMetrics) -> Result:
    """The part of a step's metrics that the document keeps."""
    found = {
        name: float(f"{value:.6g}")
        for name, value in metrics.values.items()
        if value is not None and name.partition(AT)[0] in KEPT
    }
    return {"step": metrics.step, **found, "seconds": {name: round(s, 3) for name, s in metrics.seconds.items()}}


def summary(steps: Sequence[Mapping[str, Any]], busy: Mapping[str, Sequence[Sequence[float]]]) -> Result:
    """What the steps after the first `SETTLING` show.

    `waiting` is the share of the trainer's time in which it waits for responses, `busy` the mean utilization of each
    device (1 for a whole GPU or one core), `tokens_per_s` is of all devices together.
    """
    counted = steps[SETTLING:]
    begun, ended = steps[SETTLING - 1]["at"], steps[-1]["at"]
    wall = ended - begun
    return {
        "steps": len(counted),
        "step_s": round(wall / len(counted), 3),
        "median_step_s": round(median(one["step_s"] for one in counted), 3),
        "waiting": round(sum(one["seconds"].get("generate", 0.0) for one in counted) / wall, 4),
        "seconds": {
            phase: round(fmean(one["seconds"][phase] for one in counted), 3)
            for phase in PHASES
            if all(phase in one["seconds"] for one in counted)
        },
        "tokens_per_s": round(sum(one["tokens"] for one in counted) / wall, 1),
        "response_length": round(fmean(one["response_length"] for one in counted), 1),
        "longest_response": max(one["longest_response"] for one in counted),
        "kl_k3": fmean(one["kl_k3"] for one in counted),
        "by_staleness": by_staleness(counted),
        "reward": fmean(one["reward"] for one in counted[-5:]),
        "busy": {
            device: round(fmean(shares), 3)
            for device, watched in busy.items()
            if (shares := [share for at, share in watched if begun <= at <= ended])
        },
    }


def by_staleness(steps: Sequence[Mapping[str, Any]]) -> Result:
    """Share of the tokens and KL (k3) over them, by the staleness that `steps` know of (flashrl_cli.verl.metrics)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for one in steps:
        for name, tokens in one.items():
            metric, at, part = name.partition(AT)
            if at and metric == "tokens":
                found.setdefault(part, []).append((tokens, one[f"kl_k3{AT}{part}"]))
    total = sum(tokens for part, pairs in found.items() if part != FRESH for tokens, _ in pairs)
    result = {}
    for part, pairs in sorted(found.items()):
        tokens = sum(count for count, _ in pairs)
        share = {} if part == FRESH else {"share": round(tokens / total, 4)}
        result[part] = {**share, "kl_k3": sum(count * kl for count, kl in pairs) / tokens}
    return result


# Watching the devices.


def processes_of(root: int) -> Callable[[], dict[str, float]]:
    """A function that returns the processor seconds that each side's processes below `root` have taken so far."""
    known: dict[int, tuple[str, psutil.Process]] = {}
    spent: dict[int, float] = {}

    def now() -> dict[str, float]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(root).children(recursive=True):
                with contextlib.suppress(psutil.Error, IndexError):
                    title = process.cmdline()[0]
                    side = next((side for side, of in TITLES.items() if title.startswith(of)), None)
                    if side:
                        known[process.pid] = (side, process)
        for pid, (_, process) in known.items():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                spent[pid] = times.user + times.system
        return {side: sum(spent.get(pid, 0.0) for pid, (of, _) in known.items() if of == side) for side in TITLES}

    return now


def watch_processes(root: int, busy: dict[str, list[list[float]]], done: threading.Event) -> None:
    """Append [time, cores in use] of each side to `busy` until `done`."""
    now = processes_of(root)
    before, at = now(), time.monotonic()
    while not done.wait(EVERY_S):
        after, later = now(), time.monotonic()
        for side, spent in after.items():
            busy.setdefault(side, []).append([later, (spent - before[side]) / (later - at)])
        before, at = after, later


def watch_gpus(busy: dict[str, list[list[float]]], done: threading.Event) -> None:
    """Append [time, utilization] of each GPU to `busy` until `done`."""
    query = ["nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits"]
    asking = subprocess.Popen([*query, f"-lms={int(1000 * EVERY_S)}"], stdout=subprocess.PIPE, encoding="utf-8")
    try:
        for line in asking.stdout or ():
            if done.is_set():
                break
            index, _, percent = line.partition(",")
            if percent.strip().isdigit():
                busy.setdefault(f"GPU {index.strip()}", []).append([time.monotonic(), int(percent) / 100])
    finally:
        asking.kill()
        asking.wait()


@contextlib.contextmanager
def watched(root: int) -> Iterator[dict[str, list[list[float]]]]:
    """Utilization of the devices while the run of process `root` works."""
    busy: dict[str, list[list[float]]] = {}
    done = threading.Event()
    if gpus.seen():
        watcher = threading.Thread(target=watch_gpus, args=(busy, done), daemon=True)
    else:
        watcher = threading.Thread(target=watch_processes, args=(root, busy, done), daemon=True)
    watcher.start()
    try:
        yield busy
    finally:
        done.set()
        watcher.join(5)


# A run.


def command(given: argparse.Namespace, case: Mapping[str, str], name: str) -> list[str]:
    sets = [
        f"trainer.mode={case['mode']}", f"trainer.steps={given.steps}", "trainer.save_every=-1",
        "trainer.validate_every=-1", "trainer.validate_before=false",
    ]  # fmt: skip
    sets += given.tail if case["lengths"] == "tailed" else []
    sets += given.sets
    sets += [text for mode, _, text in (one.partition(":") for one in given.of) if mode == case["mode"]]
    words = [word for one in sets for word in ("--set", one)]
    line = ["train", "--preset", given.preset, "--rollout", case["rollout"], "--tis", given.tis, "--name", name]
    return [sys.executable, "-m", "flashrl_cli", *line, *words, "--json"]


def measure(given: argparse.Namespace, case: Mapping[str, str], work: Path, limit: float) -> Result:
    """Run one case, ended after `limit` seconds."""
    name = re.sub(r"[^\w.-]+", "-", "-".join(case.values()))
    argv = command(given, case, name)
    folders = {f"FLASHRL_{place}": str(work / place.lower()) for place in ("RUNS", "CHECKPOINTS")}
    attempt = AttemptPaths(work / "runs" / name / "attempt_1")
    shutil.rmtree(attempt.root.parent, ignore_errors=True)
    steps: list[tuple[float, StepMetrics]] = []
    begun = time.monotonic()
    log = work / f"{name}.err"
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            argv,
            env={**os.environ, **folders},
            stdout=subprocess.DEVNULL,
            stderr=errors,
            encoding="utf-8",
            start_new_session=True,
        )
        tail = MetricsTail(attempt.metrics)
        stop = threading.Timer(limit, step.interrupt, [process])
        stop.start()
        try:
            with watched(process.pid) as busy:
                while process.poll() is None:
                    steps += [(time.monotonic(), one) for one in tail.poll() if one.trained]
                    time.sleep(0.02)
        finally:
            stop.cancel()
            step.interrupt(process)
            process.wait()
    steps += [(time.monotonic(), one) for one in tail.poll() if one.trained]
    result: Result = {**case, "command": "flashrl " + " ".join(argv[3:]), "exit": process.returncode}
    if len(steps) <= SETTLING + 1:
        failed = " | ".join(files.last_lines(attempt.log if attempt.log.is_file() else log, 12))[-1500:]
        return {**result, "failed": failed}
    start = steps[0][0]
    kept = [{"at": round(at - start, 3), **reading(metrics)} for at, metrics in steps]
    seen = {
        device: [[round(at - start, 2), round(share, 3)] for at, share in found if at >= start]
        for device, found in busy.items()
    }
    return {
        **result,
        "to_first_step_s": round(start - begun, 1),
        **summary(kept, seen),
        "kept": kept,
        # as much as a picture shows
        "watched": {
            device: [[at, share] for at, share in found if kept[SETTLING - 1]["at"] <= at <= kept[-1]["at"]][:DRAWN]
            for device, found in seen.items()
        },
    }


# The picture.


def draw(document: Mapping[str, Any], path: Path, *, rollout: str = "int8", shown: int = 3) -> None:
    """A row of panels for each length of responses, one for each mode: the trainer's phases and the devices' use."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from flashrl_cli.render.figure import CURVES, INK, MUTED, RULE, STYLE

    cases = {(one["mode"], one["lengths"]): one for one in document["cases"] if one["rollout"] == rollout}
    lengths = list(dict.fromkeys(length for _, length in cases))
    modes = [mode for mode in MODES if any(mode == of for of, _ in cases)]
    colours = {"generate": RULE, "log-probs": CURVES[5], "reference": CURVES[3], "advantage": CURVES[4],
               "actor": CURVES[0], "refit": CURVES[1]}  # fmt: skip
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 1.0 + 1.5 * len(modes) * len(lengths)), dpi=150, layout="constrained")
        grid = figure.subplots(len(lengths) * len(modes), 1, squeeze=False)[:, 0].tolist()
        for axes, (length, mode) in zip(grid, product(lengths, modes), strict=True):
            axes.set_yticks([])
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(RULE)
            axes.tick_params(colors=MUTED, length=0)
            one = cases.get((mode, length))
            if one is None or "failed" in one:
                continue
            steps = one["kept"]
            # the longest of all modes decides how many seconds are shown
            span = shown * max(cases[of, length]["step_s"] for of in modes if "step_s" in cases.get((of, length), {}))
            zero = steps[SETTLING]["at"]
            for step in steps[SETTLING + 1 :]:
                start = step["at"] - zero - step["step_s"]
                for phase in PHASES:
                    lasts = step["seconds"].get(phase, 0.0)
                    axes.broken_barh([(start, lasts)], (1.15, 0.8), color=colours[phase], linewidth=0)
                    start += lasts
            for row, (device, found) in enumerate(reversed(one["watched"].items())):
                inside = [(at - zero, share) for at, share in found if 0 <= at - zero <= span]
                most = max((share for _, share in found), default=1.0) or 1.0
                base = -0.55 * row
                axes.fill_between([at for at, _ in inside], base, [base + 0.45 * s / most for _, s in inside],
                                  color=CURVES[2], linewidth=0)  # fmt: skip
                axes.text(-0.005, base + 0.2, f"{device} busy", transform=axes.get_yaxis_transform(), ha="right",
                          va="center", color=MUTED)  # fmt: skip
            axes.text(-0.005, 1.55, "trainer's step", transform=axes.get_yaxis_transform(), ha="right", va="center",
                      color=MUTED)  # fmt: skip
            axes.set(xlim=(0, span), ylim=(-0.55 * len(one["watched"]) + 0.45, 2.1))
            waits = f"{one['step_s']:.2f} s a step, the trainer waits {one['waiting']:.0%}"
            axes.set_title(f"{mode}, {length} responses: {waits}", loc="left", color=INK)
        grid[-1].set_xlabel("seconds", color=MUTED)
        names = {"generate": "waiting for responses", "actor": "policy update", "refit": "weight update"}
        drawn = [phase for phase in PHASES if any(phase in one.get("seconds", {}) for one in cases.values())]
        handles = [mpl.patches.Patch(color=colours[phase], label=names.get(phase, phase)) for phase in drawn]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
        with files.replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--rollouts", default="bf16,int8")
    parser.add_argument("--lengths", default="short,tailed")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--tis", default="2")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="passed on to every run")
    parser.add_argument("--of", action="append", default=[], help="MODE:KEY=VALUE, passed on to the runs of one mode")
    parser.add_argument("--tail", action="append", help="passed on to the runs of tailed responses")
    parser.add_argument("--budget", type=float, default=86400, help="seconds for everything")
    parser.add_argument("--work", type=Path, help="for runs and logs; default: a folder that is removed")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--draw", type=Path, help="draw the picture of the results, and run nothing")
    given = parser.parse_args(arguments)
    if given.draw:
        draw(json.loads(given.out.read_text(encoding="utf-8")), given.draw)
        return
    given.tail = given.tail or list(TAIL)
    end = time.monotonic() + given.budget
    with contextlib.ExitStack() as stack:
        work = given.work.resolve() if given.work else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        asked = (text.split(",") for text in (given.lengths, given.rollouts, given.modes))
        for length, rollout, mode in product(*asked):
            case = {"mode": mode, "rollout": rollout, "lengths": length}
            document = step.begun(given.out) | {"cores": os.cpu_count()}
            others = [one for one in document["cases"] if {key: one[key] for key in case} != case]
            if any("failed" not in one for one in document["cases"] if one not in others):
                continue
            result = measure(given, case, work, end - time.monotonic())
            document["cases"] = [*others, result]
            document["command"] = " ".join(["python", "-m", "benchmarks.async", *sys.argv[1:]])
            files.write_json(given.out, document)
            said = {key: value for key, value in result.items() if key not in ("kept", "watched", "command")}
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
