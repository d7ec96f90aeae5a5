"""What a run reads from this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.train.preflight import local_inputs, vocabulary


def spec(preset: str, *sets: str) -> RunSpec:
    return load_spec(preset, sets=sets).spec


def test_prepared_data_and_model() -> None:
    assert local_inputs(spec("tiny"), Path("/d")) == {
        "data.train": Path("/d/tiny/train.parquet"),
        "data.val": Path("/d/tiny/test.parquet"),
        "model.path": Path("/d/tiny/model"),
    }


def test_hub_ids_are_not_on_this_machine() -> None:
    assert set(local_inputs(spec("dapo-32b"), Path("/d"))) == {"data.train", "data.val"}


def test_paths_stay_paths() -> None:
    found = local_inputs(spec("tiny", "model.path=/m", "data.train=/x/t.parquet"), Path("/d"))
    assert (found["model.path"], found["data.train"]) == (Path("/m"), Path("/x/t.parquet"))


def test_a_profile_is_read_by_its_path() -> None:
    assert local_inputs(spec("tiny", "rollout.profile=/p.safetensors"), Path("/d"))["rollout.profile"] == Path(
        "/p.safetensors"
    )


@pytest.mark.parametrize("critic", ["/critic", "org/critic"])
def test_critic_counts_where_there_is_one(critic: str) -> None:
    sets = [f"critic.path={critic}"]
    assert "critic.path" not in local_inputs(spec("tiny", *sets), Path("/d"))
    with_critic = local_inputs(spec("tiny", *sets, "algorithm.advantage=gae"), Path("/d"))
    assert with_critic.get("critic.path") == (Path(critic) if critic.startswith("/") else None)


@pytest.mark.parametrize(
    ("config", "size"),
    [('{"vocab_size": 259}', 259), ("{}", None), ("{", None), ('{"vocab_size": null}', None), (None, None)],
)
def test_vocabulary(config: str | None, size: int | None, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "tiny/model").mkdir(parents=True)
        (tmp_path / "tiny/model/config.json").write_text(config)
    assert vocabulary(spec("tiny"), tmp_path) == size


def test_vocabulary_of_a_hub_model_is_not_known(tmp_path: Path) -> None:
    assert vocabulary(spec("dapo-32b"), tmp_path) is None
