"""`flashrl prepare show`: rows as a model sees them, and how long all prompts are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.data import show
from flashrl_cli.data.prepare import prepare_dataset, requests
from flashrl_cli.data.show import Model, look, split_table
from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.render.examples import row_lines
from flashrl_cli.render.output import Output

pytestmark = pytest.mark.filterwarnings("ignore")
Lines = Callable[[Path, Iterable[Any]], Path]
OUTPUT = Output(json_mode=True)


class Words:
    """A tokenizer with a token for each word, and a chat template of one line a turn."""

    def apply_chat_template(self, chat: Any, *, add_generation_prompt: bool, tokenize: bool, **_: Any) -> Any:
        if tokenize:
            return [self.text(turns).split() for turns in chat]
        return self.text(chat)

    def text(self, turns: Any) -> str:
        return "".join(f"<{turn['role']}> {turn['content']}\n" for turn in turns) + "<assistant>"


@pytest.fixture
def mine(lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 prompts to train on, the n-th of n words, and two to test on, one of which is also trained on."""
    monkeypatch.setenv("FLASHRL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(show, "load_tokenizer", lambda name: Words())
    rows = [{"prompt": " ".join(["word"] * n), "answer": str(n)} for n in range(1, 101)]
    lines(tmp_path / "raw/train.jsonl", [*rows, rows[0]])
    lines(tmp_path / "raw/test.jsonl", [rows[6], {"prompt": "new", "answer": "0"}])
    words = {"prompt_template": "{prompt}", "reward": "exact", "system": "Count."}
    (request,) = requests(["mine"], source=str(tmp_path / "raw"), words=words)
    prepare_dataset(request, OUTPUT)


def seen(**options: Any) -> dict[str, Any]:
    model = Model.chosen(options.pop("preset", None), options.pop("tokenizer", None), options.pop("longest", None))
    return look("mine", **{"split": None, "count": 3, "model": model, "output": OUTPUT, **options})


def test_lengths_are_percentiles_of_all_prompts_in_tokens(mine: None) -> None:
    """A prompt of n words has 4 tokens more: three roles and the system's word."""
    found = seen(tokenizer="any", longest=94)
    [train, test] = found["splits"]
    assert train["lengths"] == {"p50": 54, "p95": 99, "p99": 103, "longest": 104}
    assert (train["rows"], train["duplicates"], train["cut"]) == (100, 1, 10)
    assert (test["rows"], test["also_in_train"], test["cut"]) == (2, 1, 0)
    columns, rows = split_table(found)
    assert columns == [
        "split", "rows", "duplicates dropped", "also in train", "tokens p50", "p95", "p99", "longest", "longer than 94",
    ]  # fmt: skip
    assert rows[0] == ["train", 100, 1, 0, 54, 99, 103, 104, 10]


def test_without_a_tokenizer_characters_are_counted(mine: None) -> None:
    found = seen()
    assert found["unit"] == "characters"
    assert found["splits"][0]["lengths"]["longest"] == len("Count.") + 100 * 5 - 1
    assert len(split_table(found)[1][0]) == len(split_table(found)[0]) == 8


def test_rows_are_shown_as_the_model_sees_them(mine: None) -> None:
    [first] = seen(tokenizer="any", count=1)["examples"]
    assert first["text"] == "<system> Count.\n<user> word\n<assistant>"
    assert list(row_lines(first, width=80, full=False)) == [
        "── train 1, scored as flashrl/exact",
        "    <system> Count.",
        "    <user> word",
        "    <assistant>",
        "truth: 1",
    ]


def test_another_split_and_messages_without_a_tokenizer(mine: None) -> None:
    [first, second] = seen(split="test", count=9)["examples"]
    assert (first["split"], first["row"], second["ground_truth"]) == ("test", 1, "0")
    assert "    system: Count." in list(row_lines(first, width=80, full=False))
    assert seen(count=0)["examples"] == []


def test_a_preset_names_model_and_longest_prompt(mine: None, tmp_path: Path) -> None:
    assert Model.chosen("tiny", None, None) == Model(tokenizer=f"{tmp_path}/data/tiny/model", longest=64)
    assert Model.chosen("tiny", "mine", 5) == Model(tokenizer="mine", longest=5)
    with pytest.raises(InputError, match="counts tokens"):
        Model.chosen(None, None, 5)


def test_a_file_of_rows_is_shown_too(mine: None, tmp_path: Path) -> None:
    file = tmp_path / "data/mine/test.parquet"
    found = look(str(file), split=None, count=1, model=Model(), output=OUTPUT)
    assert [split["split"] for split in found["splits"]] == ["test"]
    assert found["recipe"]["reward"] == "exact"


@pytest.mark.parametrize(("name", "split"), [("nothing", None), ("/nothing.parquet", None), ("mine", "dev")])
def test_what_is_not_there(name: str, split: str | None, mine: None) -> None:
    with pytest.raises(NothingMatched):
        look(name, split=split, count=1, model=Model(), output=OUTPUT)


def test_rows_that_are_none_are_told(lines: Lines, tmp_path: Path) -> None:
    file = lines(tmp_path / "rows.jsonl", [{"prompt": "text"}])
    with pytest.raises(InputError) as caught:
        look(str(file), split=None, count=1, model=Model(), output=OUTPUT)
    assert caught.value.problems[0].message.startswith("prompt is text, not a list of messages")
