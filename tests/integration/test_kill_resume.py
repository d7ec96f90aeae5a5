"""A run killed at a random moment: nothing stays behind, and it goes on to its end as if nothing had been.

In mode sync at its start, in mode separate_async while it saves, trains and samples ahead.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import kill_resume

from flashrl_cli.runs import store
from flashrl_cli.runs.metrics import history, holes
from flashrl_cli.runs.saved import saved_steps
from flashrl_cli.verl.checkpoints import Loaded, queue_pickles
from tests.integration.conftest import PATIENCE_S, SMALL, Workshop, events
from tests.integration.test_train import check_evaluation, check_plausible, check_proof

STALENESS = "training/off_policy/trajectory_staleness"
PROMPTS = 16
RESPONSES = PROMPTS * 4
"""Of a step, as SMALL has it."""
STRIKES_WITHIN_S = 50.0
"""The strike of this suite meets the start; benchmarks/kill_resume.py meets steps and saves, too."""


def test_killed_and_resumed_to_its_end(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHRL_DATA", str(workshop.root / "data"))
    for limit in ("DEADLINE_S", "STUCK_S", "LAST_S"):  # how long an end takes is the machine's
        monkeypatch.setattr(kill_resume, limit, PATIENCE_S)
    result = kill_resume.one_run(tmp_path, kills=1, steps=2, seed=11, latest_s=STRIKES_WITHIN_S, more=SMALL)
    assert result["strikes"]
    assert result["problems"] == [], json.dumps(result, indent=2)
    assert not workshop.leftovers()
    check_end(workshop, kill_resume.Shop(tmp_path), result["steps"][-1])


def test_killed_while_it_samples_ahead(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sampled ahead is in the checkpoint: no prompt is lost, and none is trained on twice."""
    monkeypatch.setenv("FLASHRL_DATA", str(workshop.root / "data"))
    for limit in ("DEADLINE_S", "STUCK_S", "LAST_S"):
        monkeypatch.setattr(kill_resume, limit, PATIENCE_S)
    more = (*SMALL, "--set", "algorithm.mini_batch_size=8", *kill_resume.of_mode("separate_async"))
    result = kill_resume.one_run(tmp_path, kills=1, steps=3, seed=5, latest_s=5, from_step=1, more=more, ahead=PROMPTS)
    assert result["strikes"]
    assert result["problems"] == [], json.dumps(result, indent=2)
    assert result["resumed_from"][-1] >= 1
    assert not workshop.leftovers()
    run = kill_resume.Shop(tmp_path).paths
    saved = saved_steps(run.checkpoints, critic=False, loaded=Loaded(queue=True))
    assert [one.step for one in saved if one.complete] == result["steps"]
    assert all(queue_pickles(one.path) for one in saved)
    # the engine's weights have the number of the step that the run went on from, and no response is newer than they
    stale = {one.logged[f"{STALENESS}/{which}"] for one in history(run) for which in ("min", "max")}
    assert stale <= set(range(kill_resume.PREFETCH + 1))


def check_end(workshop: Workshop, shop: kill_resume.Shop, steps: int) -> None:
    """The last attempt did what was left, proven and plausible; every step is there, logged, saved and worth
    evaluating.
    """
    run = shop.paths
    logged = history(run)
    assert [metrics.step for metrics in logged] == list(range(1, steps + 1))
    assert holes(logged) == []
    found = store.load(run.record)
    assert found
    last = found.attempts[-1]
    assert (last.status, last.exit_code, last.last_step, last.total_steps) == ("done", 0, steps, steps)
    assert last.proof[0]["precision"] == "int8"
    assert [one.step for one in saved_steps(run.checkpoints, critic=False) if one.complete] == list(range(1, steps + 1))
    said = shop.said.read_text(encoding="utf-8").splitlines()
    lines = [line for line in said if line.startswith("{") and line.endswith("}")]
    began = max(index for index, line in enumerate(lines) if '"doing": "starting verl"' in line)
    out = "\n".join(lines[began:])
    check_proof(out, run.attempt(last.number).root)
    check_plausible(events(out, "step"), RESPONSES)
    check_evaluation(workshop, run.checkpoints, run.root.parent, steps)
