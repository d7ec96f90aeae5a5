"""What was evaluated is kept and found again, by everything that an answer depends on and by nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from flashrl_cli.evals.cache import Cache, Unit, units
from flashrl_cli.evals.job import EngineSettings, Sampling
from flashrl_cli.evals.questions import DataSet, Prompting
from flashrl_cli.evals.results import Grade
from flashrl_cli.machine import software
from flashrl_cli.runs.checkpoints import Checkpoint, Skipped
from tests.unit.evals.lab import ENGINE, PROMPTING, SAMPLING, checkpoint, data, evaluated


def unit(
    one: Checkpoint,
    asked: DataSet,
    *,
    sampling: Sampling = SAMPLING,
    prompting: Prompting = PROMPTING,
    engine: EngineSettings = ENGINE,
) -> Unit:
    (found,) = units([one], [asked], sampling=sampling, prompting=prompting, engine=engine)
    assert isinstance(found, Unit)
    return found


def test_the_key_names_what_an_answer_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = checkpoint(tmp_path, 1)
    first = unit(one, data())
    other = checkpoint(tmp_path, 2, hidden_size=4)
    others = [
        unit(other, data()),
        unit(one, data("products")),
        unit(one, data(questions=2)),
        unit(one, data(), sampling=dataclasses.replace(SAMPLING, seed=1)),
        unit(one, data(), sampling=dataclasses.replace(SAMPLING, temperature=0.6)),
        unit(one, data(), sampling=dataclasses.replace(SAMPLING, top_k=5)),
        unit(one, data(), sampling=dataclasses.replace(SAMPLING, stop=("\n",))),
        unit(one, data(), prompting=Prompting(chat_template="")),
        unit(one, data(), prompting=Prompting(chat_template="{{ messages }}")),
        unit(one, data(), prompting=Prompting(arguments={"enable_thinking": False})),
        unit(one, data(), prompting=Prompting(arguments={"enable_thinking": True})),
        unit(one, data(), engine=EngineSettings(rollout="int8")),
        unit(one, data(), engine=EngineSettings(rollout="int8", rotation=0)),
        unit(one, data(), engine=EngineSettings(rollout="int8", rotation=64)),
        unit(one, data(), engine=EngineSettings(max_model_len=64)),
        unit(one, data(), engine=EngineSettings(rollout="int8", profile=str(one.hf / "config.json"))),
        unit(one, data(), engine=EngineSettings(rollout="int8", profile=str(other.hf / "config.json"))),
    ]
    monkeypatch.setattr(software, "versions_of", lambda _: {"vllm": "9"})
    others.append(unit(one, data()))
    assert len({first.key, *(other.key for other in others)}) == 1 + len(others)


def test_a_copy_elsewhere_and_the_memory_share_change_nothing(tmp_path: Path) -> None:
    one = checkpoint(tmp_path, 1)
    shutil.copytree(one.hf, tmp_path / "copy")
    copy = dataclasses.replace(one, hf=tmp_path / "copy", run="b", step=7)
    engine = EngineSettings(gpu_memory_utilization=0.3, tensor_parallel=2)
    assert unit(copy, data(), engine=engine).key == unit(one, data()).key


def test_what_vanished_or_is_torn_is_skipped_and_the_rest_not(tmp_path: Path) -> None:
    gone, torn, good = (checkpoint(tmp_path, step) for step in (1, 2, 3))
    shutil.rmtree(gone.hf)
    (torn.hf / "model.safetensors").write_bytes(b"x" * 20)
    found = list(units([gone, torn, good], [data()], sampling=SAMPLING, prompting=PROMPTING, engine=ENGINE))
    assert [isinstance(one, Skipped) for one in found] == [True, True, False]


def test_a_finished_unit_comes_back(tmp_path: Path) -> None:
    one = unit(checkpoint(tmp_path, 1), data())
    kept = Cache(tmp_path / "kept")
    assert kept.load(one) is None
    grades = (
        Grade(score=-1.0, correct=False, flexible=True, boxed=None, prediction="½", problem=None),
        Grade(score=1.0, correct=True, flexible=True, boxed=True, prediction="2", problem=None),
        Grade(score=0.0, correct=False, flexible=None, boxed=None, prediction=None, problem="grading took longer"),
    )
    result = dataclasses.replace(evaluated(one.checkpoint, one.data), grades=grades)
    kept.answers(one).parent.mkdir()
    kept.answers(one).write_text("half")
    kept.save(one, result)
    assert kept.load(one) == result
    assert not kept.answers(one).exists()


def test_a_damaged_file_is_no_result(tmp_path: Path) -> None:
    one = unit(checkpoint(tmp_path, 1), data())
    kept = Cache(tmp_path / "kept")
    kept.save(one, evaluated(one.checkpoint, one.data))
    (file,) = (tmp_path / "kept").glob("*.parquet")
    whole = file.read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        assert kept.load(one) is None


@pytest.mark.parametrize("last", [0, 1])
def test_of_several_results_of_a_pruned_checkpoint_the_last_counts(last: int, tmp_path: Path) -> None:
    one, kept = checkpoint(tmp_path, 1), Cache(tmp_path / "kept")
    made = []
    for value in (1, 2):
        (one.hf / "config.json").write_text(json.dumps({"hidden_size": value}))
        made.append(unit(one, data()))
        kept.save(made[-1], evaluated(one, data()))
    os.utime(tmp_path / "kept" / f"{made[1 - last].key}.parquet", (1, 1))
    shutil.rmtree(one.hf)
    assert [found.key for found in kept.pruned([tmp_path], {made[0].asked: data()})] == [made[last].key]


def test_a_unit_has_one_worker(tmp_path: Path) -> None:
    one, other = unit(checkpoint(tmp_path, 1), data()), unit(checkpoint(tmp_path, 2), data())
    first, second = Cache(tmp_path / "kept"), Cache(tmp_path / "kept")
    assert first.claim(one)
    assert not second.claim(one)
    assert second.claim(other)
    first.release(one)
    assert second.claim(one, wait=True)
    second.release_all()
    assert first.claim(one)
    assert first.claim(other)
