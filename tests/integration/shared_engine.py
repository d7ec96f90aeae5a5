"""Answers of one engine to a list of checkpoints, one after another. Usage: JOB.json; writes its "out" file."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from flashrl_cli.evals.engine import Generator
from flashrl_cli.evals.job import EngineSettings, Job, Sampling
from flashrl_cli.weights import Weights

WAYS = {"greedy": Sampling(max_tokens=16), "sampled": Sampling(max_tokens=16, temperature=1.0, n=2, seed=5)}


class Tokens(Generator):
    """Answers as token ids."""

    def _responses(self, number: int, output: Any) -> Any:
        return number, [list(map(int, sample.token_ids)) for sample in output.outputs]


def answered(engine: Tokens, prompts: list[Any]) -> dict[str, list[list[list[int]]]]:
    """Token ids of each prompt's samples, greedy and sampled."""
    found = {}
    for way, sampling in WAYS.items():
        engine._job = dataclasses.replace(engine._job, sampling=sampling)
        rows: dict[int, Any] = dict(engine.answer(dict(enumerate(prompts))))  # type: ignore[arg-type]
        found[way] = [rows[number] for number in sorted(rows)]
    return found


def run(job: dict[str, Any]) -> list[Any]:
    """What each of `order` gave: answers, or why it was refused."""
    weights = {name: Weights.of(source) for name, source in job["checkpoints"].items()}
    settings = EngineSettings(rollout=job["rollout"], max_model_len=128)
    order = job["order"]
    engine = Tokens(
        Job(
            start=weights[order[0]].hf,
            quantized=None,
            work=Path(),
            data_sets=1,
            sampling=WAYS["greedy"],
            engine=settings,
        ),
        job["prompts"],
    )
    found: list[Any] = []
    for name in order:
        if name in job["torn"]:
            # an evaluation would end the engine here; this one goes on, and a complete refit must repair it
            with mock.patch("flashrl_cli.weights.account"):  # which refuses it before the engine is touched
                refused = engine._llm.collective_rpc("load_from_disk", args=(weights[name].plain(),))[0]
            engine._loaded = None
            found.append(refused)
        else:
            engine.load(weights[name])
            found.append(answered(engine, job["prompts"]))
    return found


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(asked["out"]).write_text(json.dumps(run(asked)), encoding="utf-8")
