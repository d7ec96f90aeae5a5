"""Kill runs at random moments and resume them until they end, to check that nothing is lost or left behind.

    python benchmarks/kill_resume.py [--mode sync] [--kills 20] [--per-run 5] [--steps 6] [--jobs 1] [--latest-s 130]
        [--from-step 0] [--out FILE]

Needs `flashrl prepare tiny`. Each run trains the preset tiny (INT8, TIS), saving every step, and ends at --steps or a
little later. At a random time after the start (or after step --from-step of the attempt) flashrl itself, the guardian,
or any process of the tree gets KILL. Then the following
must hold: the attempt ends by itself within two minutes (or goes on until it needs what was killed, or is struck
again), no process is left, the next attempt resumes from the newest complete step, in the end every step has its
metrics, and no prompt was trained on twice or skipped: an asynchronous mode may lack as many as it samples ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from flashrl_cli import files, paths
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import store
from flashrl_cli.runs.metrics import history
from flashrl_cli.runs.saved import saved_steps

LATEST_S = 130.0
"""A strike comes within this time of a start; on two cores the first step is done after about 95 s."""
DEADLINE_S = 120.0
"""Within this time a struck attempt must have ended, and its processes be gone."""
STUCK_S = 400.0
"""Whatever neither ends nor moves for so long would do so for ever."""
LAST_S = 900.0
"""The attempt that nothing strikes takes less."""
RUN = "killed"
ENDLESS = 1000
"""Steps of a run that only a strike ends; how many they are may change when it goes on."""
DUMPS = "verl.trainer.rollout_data_dir"
QUESTION = re.compile(r"What is \d+ plus \d+\?")
PREFETCH = 1
"""Batches that an asynchronous mode samples ahead."""
BATCH = 32
"""Prompts of a step of the preset tiny."""


def of_mode(mode: str) -> tuple[str, ...]:
    """Options of a run in this mode of the trainer."""
    if mode == "sync":
        return ()
    return ("--set", f"trainer.mode={mode}", "--set", f"trainer.prefetch={PREFETCH}")


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
    """A folder in which one run is started over and over, with the options `more` of `flashrl train`."""

    def __init__(self, root: Path, more: Sequence[str] = ()) -> None:
        self.root = root
        self.more = more
        self.paths = RunPaths(RUN, root / "runs" / RUN, root / "checkpoints" / "tiny" / RUN)
        self.said = root / "said"

    def start(self, steps: int) -> subprocess.Popen[bytes]:
        """Start the run, or go on with it, to the end of `steps`; prompts are taken in the order of the file."""
        command = [sys.executable, "-m", "flashrl_cli", "train", "--preset", "tiny", "--name", RUN, "--resume", "auto"]
        command += ["--json", "--set", f"trainer.steps={steps}", "--set", "trainer.save_every=1", *self.more]
        command += ["--set", "verl.data.shuffle=false", "--set", f"{DUMPS}={self.root / 'dumped'}"]
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

    def wrong_prompts(self, ahead: int) -> list[str]:
        """What is wrong with the prompts that all steps trained on, of which `ahead` may have been sampled in vain."""
        taken: Counter[str] = Counter()
        for step in self.logged():
            dump = self.root / "dumped" / f"{step}.jsonl"
            if not dump.exists():  # verl writes it in a thread, which a strike may have ended
                return []
            found = (QUESTION.search(json.loads(line)["input"]) for line in dump.read_text("utf-8").splitlines())
            taken.update({match[0] for match in found if match})
        offered = questions(taken.total() + ahead)
        missing = len(set(offered) - taken.keys())
        problems = [f"{prompt} {count} times" for prompt, count in taken.items() if count > 1]
        problems += [f"{prompt} out of turn" for prompt in taken.keys() - set(offered)]
        return problems[:5] + [f"{missing} prompts were skipped, {ahead} sampled ahead"] * (missing > ahead)

    def newest(self) -> set[int]:
        """Steps that a resume may go on from: the newest complete one, or the newest that has its metrics, too."""
        complete = [one.step for one in saved_steps(self.paths.checkpoints, critic=False) if one.complete]
        logged = set(self.logged())
        return {max(complete, default=0), max((step for step in complete if step in logged), default=0)}


def questions(count: int) -> list[str]:
    """The first prompts of the tiny data set, of which no two are the same."""
    import pyarrow.parquet as pq

    rows = pq.read_table(paths.data_root() / "tiny" / "train.parquet").column("prompt").to_pylist()
    return [row[0]["content"] for row in rows[:count]]


def choose_victim(flashrl: psutil.Process, dice: random.Random) -> psutil.Process:
    """Flashrl itself every second time, else anything that it started."""
    tree = flashrl.children(recursive=True)
    return flashrl if not tree or dice.random() < 0.5 else dice.choice(tree)


def strikes(shop: Shop, dice: random.Random, latest_s: float, from_step: int) -> Iterator[Strike]:
    """Start the run and kill something after a while, until an attempt has ended of it; yields each strike.

    The while begins once the attempt has logged `from_step` steps.
    """
    before, done = shop.newest(), len(shop.logged())
    child = shop.start(ENDLESS)
    while len(shop.logged()) < done + from_step and child.poll() is None:
        time.sleep(0.2)
    after = dice.uniform(0, latest_s)
    struck = False
    while True:
        ended = _ends_within(child, after)
        if ended and not struck:
            yield _strike(shop, after, "nobody", f"ended by itself with {child.returncode}", 0.0)
            return
        if ended:  # the earlier strike hit what was needed only later, such as a reward worker
            name = "nobody"
        else:
            victim = choose_victim(psutil.Process(child.pid), dice)
            name = _name(victim, child.pid)
            victim.kill()
        since, struck = time.monotonic(), True
        outcome = _outcome(shop, child, since)
        if outcome == "ended" and (resumed := _resumed_from(shop)) is not None and resumed not in before:
            outcome = f"resumed from {resumed} instead of {sorted(before)}"
        yield _strike(shop, after, name, outcome, time.monotonic() - since)
        if outcome != "harmless":
            return
        after = dice.uniform(0, latest_s / 2)


def _ends_within(child: subprocess.Popen[bytes], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.05)
    return child.poll() is not None


def _outcome(shop: Shop, child: subprocess.Popen[bytes], struck: float) -> str:
    """`ended` in time, `harmless` if the attempt moves on, or what stayed behind."""
    moved = _moves(shop)
    while (waited := time.monotonic() - struck) < STUCK_S:
        if child.poll() is not None and not shop.leftovers():
            return "ended" if waited < DEADLINE_S else f"ended after {waited:.0f} s only"
        if child.poll() is None and _moves(shop) > moved + 1:
            return "harmless"
        time.sleep(0.2)
    left = shop.leftovers()
    child.kill()
    return f"left after {STUCK_S:g} s: {left}"


def _moves(shop: Shop) -> int:
    """Phases and steps of the newest attempt so far.

    One more may have been under way when it was struck, two may not.
    """
    found = store.load(shop.paths.record)
    return (len(found.last.phases) + len(shop.logged())) if found and found.last else 0


def _resumed_from(shop: Shop) -> int | None:
    """Where the newest attempt went on; None if it was struck before it had an entry."""
    found = store.load(shop.paths.record)
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
    return "guardian" if "launch.guardian" in words else " ".join(Path(word).name for word in words.split())[:60]


def _strike(shop: Shop, after: float, victim: str, outcome: str, taken: float) -> Strike:
    found = store.load(shop.paths.record)
    last = found.last if found else None
    error = last.error if last else None
    steps = max(shop.logged(), default=0)
    return Strike(
        after_s=round(after, 1), victim=victim, outcome=outcome, ended_after_s=round(taken, 1), steps=steps, error=error
    )


def one_run(
    root: Path,
    *,
    kills: int,
    steps: int,
    seed: int,
    latest_s: float = LATEST_S,
    from_step: int = 0,
    more: Sequence[str] = (),
    ahead: int = 0,
) -> dict[str, Any]:
    """A run that is struck `kills` times and then left in peace until it ends; `problems` is empty if all held.

    It ends at `steps`, or one step after the last one that it has done by then. `ahead` are the prompts that it samples
    ahead.
    """
    shop, dice = Shop(root, more), random.Random(seed)
    struck: list[Strike] = []
    while len(struck) < kills:
        for one in strikes(shop, dice, latest_s, from_step):
            struck.append(one)
            print(json.dumps(asdict(one)), flush=True)
    before = shop.newest()
    asked = max(steps, max(shop.logged(), default=0) + 1)
    code = shop.start(asked).wait(timeout=LAST_S)
    problems = [one.outcome for one in struck if one.outcome not in {"ended", "harmless"}]
    problems += [f"exit {code} at the end"] * (code != 0)
    problems += [f"metrics of steps {shop.logged()}"] * (shop.logged() != list(range(1, asked + 1)))
    problems += [f"left: {shop.leftovers()}"] * bool(shop.leftovers())
    problems += shop.wrong_prompts(ahead)
    if (resumed := _resumed_from(shop)) not in before:
        problems.append(f"resumed from {resumed} instead of {sorted(before)}")
    return {
        "seed": seed,
        "strikes": [asdict(one) for one in struck],
        "resumed_from": [attempt.resumed_from for attempt in store.read_run(shop.paths.root).attempts],
        "steps": shop.logged(),
        "problems": problems,
    }


def main() -> int:
    """Run all strikes, print and store the result; returns 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("sync", "colocate_async", "separate_async"), default="sync")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-run", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--latest-s", type=float, default=LATEST_S, help="a strike comes within this time of a start")
    parser.add_argument("--from-step", type=int, default=0, help="steps that an attempt has done before it is struck")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once: a start keeps one core busy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kill_resume.json"))
    args = parser.parse_args()
    shares = [min(args.per_run, args.kills - first) for first in range(0, args.kills, args.per_run)]

    def in_a_folder(number: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return one_run(
                Path(folder),
                kills=shares[number],
                steps=args.steps,
                seed=args.seed + number,
                latest_s=args.latest_s,
                from_step=args.from_step,
                more=of_mode(args.mode),
                ahead=0 if args.mode == "sync" else PREFETCH * BATCH,
            )

    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(in_a_folder, range(len(shares))))
    strikes = [one for run in runs for one in run["strikes"]]
    held = sum(one["outcome"] in {"ended", "harmless"} for one in strikes)
    result = {
        "mode": args.mode,
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
