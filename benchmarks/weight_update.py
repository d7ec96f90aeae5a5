"""Measure verl's complete weight update on GPUs: gathering from FSDP, transfer over CUDA IPC, and the engine's refit.

    PYTHONPATH=.:src:SITE python benchmarks/weight_update.py --out FILE.json [--gpus 2] [--size 7b] [--budget 300]

The trainer is an FSDP2 module in float32 with random weights, one process a GPU, gathered by verl's own
`FSDPEngine.get_per_tensor_param` and sent by verl's own BucketedWeightSender; the engine is vLLM with verl's worker
extension (bf16, fp8-block) or flashrl's (int8, fp8), one a GPU (data parallel, as in a run). Rounds are timed from the
order to the last engine's answer; the first one warms up. `float32` sends what verl sends, `bf16` casts each shard
before it is gathered (plugins/transfer.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from benchmarks.fit_on_gpu import ENVIRONMENT
from benchmarks.fit_points import shape

from flashrl_cli import files
from flashrl_cli.bench.request import config_of
from flashrl_cli.precision import BY_METHOD

VARIANTS = ("int8:bf16", "int8:float32", "fp8:bf16", "bf16:float32", "fp8-block:float32")
ROUNDS = 5
NEEDED_S = 70
"""Seconds that must be left for a variant to be started."""
PARTS = Path(__file__).with_name("weight_update_parts.py")


class Part:
    """A trainer rank or an engine: a process that answers each order, a line on its stdin, by a line of JSON."""

    def __init__(self, kind: str, rank: int, folder: Path, *arguments: str, env: dict[str, str]) -> None:
        self.log = folder / f"{kind}-{rank}.log"
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, str(PARTS), kind, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                encoding="utf-8",
                env={**ENVIRONMENT, **os.environ, **env, "VERL_REPLICA_RANK": str(rank)},
                start_new_session=True,
            )

    def order(self, text: str) -> None:
        stream: IO[str] | None = self.process.stdin
        assert stream
        stream.write(text + "\n")
        stream.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.log.name}: {self.log.read_text(errors='replace')[-9000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def answered(parts: list[Part]) -> dict[str, Any]:
    """The first one's answer, once all have answered."""
    found = [part.answer() for part in parts]
    return found[0]


def environment(rank: int, gpus: int) -> dict[str, str]:
    """Each process sees its own GPU as the first, as verl's workers do."""
    return {
        "CUDA_VISIBLE_DEVICES": str(rank),
        "RANK": str(rank),
        "WORLD_SIZE": str(gpus),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29555",
        "NCCL_SOCKET_IFNAME": "lo",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def measure(variant: str, model: Path, trainers: list[Part], folder: Path) -> dict[str, Any]:
    """Seconds of each round of one variant, and what the engine holds after the last."""
    precision, sent = variant.split(":")
    place = folder / variant.replace(":", "-")
    place.mkdir()
    gpus = range(len(trainers))
    alone = {"MASTER_PORT": "0", "WORLD_SIZE": "1", "RANK": "0"}
    engines: list[Part] = []
    try:
        started = time.perf_counter()
        for rank in gpus:
            env = {**environment(rank, 1), **alone, "FLASHRL_PLUGIN_DIR": str(place / f"rank-{rank}")}
            env |= {"VERL_VLLM_FP8_QUANT_ENABLED": "1"} if precision == "fp8-block" else {}
            engines.append(Part("engine", rank, place, str(model), precision, env=env))
        facts = answered(engines)
        engine_s = time.perf_counter() - started
        rounds = [_round(engines, trainers, sent) for _ in range(ROUNDS + 1)][1:]
        for engine in engines:
            engine.order("holds")
        held = [engine.answer() for engine in engines]
        if precision in BY_METHOD and any(one.get("precision") != precision for one in held):
            raise RuntimeError(f"{precision} was asked for, and the engines hold {held}")
    finally:
        for engine in engines:
            engine.end()
    return {
        "variant": variant,
        "gpus": len(trainers),
        "median_s": round(statistics.median(one["seconds"] for one in rounds), 4),
        "engine_s": round(engine_s, 1),
        "rounds": rounds,
        **facts,
        **held[0],
    }


def _round(engines: list[Part], trainers: list[Part], sent: str) -> dict[str, float]:
    started = time.perf_counter()
    for engine in engines:
        engine.order("receive")
    for trainer in trainers:
        trainer.order(sent)
    sending = [trainer.answer()["seconds"] for trainer in trainers]
    for engine in engines:
        engine.answer()
    return {"seconds": round(time.perf_counter() - started, 4), "sender_s": round(max(sending), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--size", default="7b")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--budget", type=float, default=400, help="seconds (default %(default)s)")
    given = parser.parse_args()
    end = time.monotonic() + given.budget
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), Path(name, "model")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config_of(shape(given.size))))
        trainers = [
            Part("trainer", rank, folder, str(model), env=environment(rank, given.gpus)) for rank in range(given.gpus)
        ]
        try:
            facts = answered(trainers)
            for variant in given.variants.split(","):
                if end - time.monotonic() < NEEDED_S:
                    print(f"{variant}: left out", flush=True)
                    continue
                try:
                    results.append(measure(variant, model, trainers, folder))
                except RuntimeError as error:
                    results.append({"variant": variant, "gpus": given.gpus, "failed": str(error)[-9000:]})
                print(json.dumps(results[-1])[:900], flush=True)
                document = {"schema_version": 1, "command": " ".join(sys.argv), "size": given.size, **facts}
                files.write_json(given.out, {**document, "points": results})
                if "failed" in results[-1]:  # the trainers may wait for an engine that is gone
                    break
        finally:
            for trainer in trainers:
                trainer.end()


if __name__ == "__main__":
    main()
