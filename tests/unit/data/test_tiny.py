"""`prepare tiny` makes what is missing or changed and nothing else; a stand-in is taught instead of the policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flashrl_cli import contract
from flashrl_cli.data import arith, tiny
from flashrl_cli.data.tiny import END, MAX_NEW_TOKENS, Demonstrations
from flashrl_cli.errors import RunFailed
from flashrl_cli.paths import DatasetPaths
from flashrl_cli.render.output import Output

TAUGHT = {"accuracy": 0.4, "skilled_accuracy": 0.8, "clean_steps": 300, "careless_steps": 10}


@pytest.fixture
def paths(tmp_path: Path) -> DatasetPaths:
    return DatasetPaths("tiny", tmp_path / "tiny")


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds of the policies taught so far."""
    taught: list[int] = []

    def warm_up(*, seed: int, report: Callable[[str], None]) -> tuple[Any, Any, dict[str, float]]:
        taught.append(seed)
        report("learning sums")
        return f"weights of {seed}", "tokenizer", TAUGHT

    def save(model: str, tokenizer: str, folder: Path) -> None:
        folder.mkdir()
        (folder / tiny.WEIGHTS).write_text(model)
        (folder / "tokenizer.json").write_text(tokenizer)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(tiny, "warm_up", warm_up)
    monkeypatch.setattr(tiny, "save", save)
    for key in contract.THREADS:
        monkeypatch.setenv(key, "1")
    return taught


def prepare(paths: DatasetPaths, *, seed: int = 1, force: bool = False) -> dict[str, Any]:
    return tiny.prepare_tiny(paths, seed=seed, force=force, report=Output().say)


def test_everything_is_made(
    paths: DatasetPaths,
    seeds: list[int],
    parquet: Callable[[Path], list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = prepare(paths)
    assert result["status"] == "prepared"
    assert {split: entry["rows"] for split, entry in result["splits"].items()} == arith.SIZES
    assert result["options"] == {"seed": 1}
    assert result["model"].items() >= TAUGHT.items()
    assert result["model"]["weights"]["path"] == "model/model.safetensors"
    assert json.loads(paths.manifest.read_text()) == {key: value for key, value in result.items() if key != "status"}
    assert (paths.model / tiny.WEIGHTS).read_text() == "weights of 1"
    asked = [row["extra_info"]["question"] for row in parquet(paths.split("test"))]
    assert asked == [arith.question(a, b) for a, b in arith.pairs(1)["test"]]
    out, err = capsys.readouterr()
    assert not out
    assert "learning sums" in err
    assert sorted(p.name for p in paths.root.iterdir()) == ["manifest.json", "model", "test.parquet", "train.parquet"]


def test_a_second_time_nothing_is_taught(paths: DatasetPaths, seeds: list[int]) -> None:
    first = prepare(paths)
    again = prepare(paths)
    assert seeds == [1]
    assert again == first | {"status": "up to date"}


def test_force_teaches_again(paths: DatasetPaths, seeds: list[int]) -> None:
    prepare(paths)
    assert prepare(paths, force=True)["status"] == "prepared"
    assert seeds == [1, 1]


def test_another_seed_replaces_everything(paths: DatasetPaths, seeds: list[int]) -> None:
    first = prepare(paths)
    (paths.model / "left over").write_text("")
    second = prepare(paths, seed=2)
    assert seeds == [1, 2]
    assert (paths.model / tiny.WEIGHTS).read_text() == "weights of 2"
    assert not (paths.model / "left over").exists()
    assert second["splits"]["train"]["sha256"] != first["splits"]["train"]["sha256"]
    assert prepare(paths, seed=2)["status"] == "up to date"


def change_weights(paths: DatasetPaths) -> None:
    (paths.model / tiny.WEIGHTS).write_text("weights of X")


def remove_weights(paths: DatasetPaths) -> None:
    (paths.model / tiny.WEIGHTS).unlink()


def change_rows(paths: DatasetPaths) -> None:
    paths.split("train").write_bytes(b"x")


def remove_rows(paths: DatasetPaths) -> None:
    paths.split("test").unlink()


def break_manifest(paths: DatasetPaths) -> None:
    paths.manifest.write_text("{")


def edit_manifest(paths: DatasetPaths, **changes: Any) -> None:
    paths.manifest.write_text(json.dumps(json.loads(paths.manifest.read_text()) | changes))


def age(paths: DatasetPaths) -> None:
    edit_manifest(paths, flashrl="0.0.0")


def other_schema(paths: DatasetPaths) -> None:
    edit_manifest(paths, schema_version=99)


@pytest.mark.parametrize(
    "damage", [change_weights, remove_weights, change_rows, remove_rows, break_manifest, age, other_schema]
)
def test_what_changed_is_made_anew(
    damage: Callable[[DatasetPaths], None], paths: DatasetPaths, seeds: list[int]
) -> None:
    prepare(paths)
    damage(paths)
    assert prepare(paths)["status"] == "prepared"
    assert (paths.model / tiny.WEIGHTS).read_text() == "weights of 1"
    assert prepare(paths)["status"] == "up to date"
    assert seeds == [1, 1]


def test_rows_of_the_same_name_without_a_policy_are_not_enough(paths: DatasetPaths, seeds: list[int]) -> None:
    prepare(paths)
    manifest = json.loads(paths.manifest.read_text())
    del manifest["model"]
    paths.manifest.write_text(json.dumps(manifest))
    assert prepare(paths)["status"] == "prepared"


def test_policy_that_cannot_be_taught_leaves_what_is_there(
    paths: DatasetPaths, seeds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(paths)

    def fail(**_: Any) -> None:
        raise RunFailed("no")

    monkeypatch.setattr(tiny, "warm_up", fail)
    with pytest.raises(RunFailed):
        prepare(paths, seed=2)
    assert prepare(paths)["status"] == "up to date"


def test_disk_full_while_saving_leaves_what_is_there(
    paths: DatasetPaths, seeds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(paths)

    def fail(model: Any, tokenizer: Any, folder: Path) -> None:
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        prepare(paths, seed=2)
    assert prepare(paths)["status"] == "up to date"


class Characters:
    """Tokens are characters; the end marker is one token."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(message["content"] for message in messages) + "\n"

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) for letter in text.replace(END, "\0")])


@pytest.fixture(scope="module")
def demonstrations() -> Demonstrations:
    return Demonstrations(cast("Any", Characters()), seed=5)


def test_every_answer_fits(demonstrations: Demonstrations) -> None:
    longest = max(len(arith.solution(a, b)) + 1 for split in demonstrations.pairs.values() for a, b in split)
    assert longest <= MAX_NEW_TOKENS


def test_prompts_ask_what_the_rows_ask(demonstrations: Demonstrations) -> None:
    assert demonstrations.pairs == arith.pairs(5)
    (a, b) = demonstrations.pairs["test"][0]
    asked = "".join(map(chr, demonstrations.prompts[a, b]))
    prompt = arith.row({"a": a, "b": b}, "test", 0)["prompt"]
    assert asked == Characters().apply_chat_template(cast("Any", prompt))
    assert demonstrations.width == max(map(len, demonstrations.prompts.values())) + MAX_NEW_TOKENS


def test_clean_answers_are_right_and_half_of_the_careless_ones_are_not(demonstrations: Demonstrations) -> None:
    right = arith.solution(47, 25) + END
    assert {demonstrations.answer(47, 25, careless=False) for _ in range(50)} == {right}
    careless = [demonstrations.answer(47, 25, careless=True) for _ in range(400)]
    assert 0.4 < sum(answer == right for answer in careless) / 400 < 0.6


def test_demonstrations_are_of_the_training_split(demonstrations: Demonstrations) -> None:
    train = set(demonstrations.pairs["train"])
    assert all(demonstrations.pair() in train for _ in range(200))


def test_same_seed_same_demonstrations() -> None:
    one, same, other = (Demonstrations(cast("Any", Characters()), seed=seed) for seed in (1, 1, 2))
    drawn = [[d.pair() for _ in range(20)] for d in (one, same, other)]
    assert drawn[0] == drawn[1] != drawn[2]
