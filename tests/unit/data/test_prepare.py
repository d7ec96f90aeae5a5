"""A data set from its source to its files, and the second run that has nothing to do."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.data import prepare
from flashrl_cli.data.prepare import TICK, Request, Split, Unique, build_split, prepare_dataset, requests, summary_table
from flashrl_cli.data.recipes import Recipe
from flashrl_cli.data.rows import BadRow, BadRows, Raw, Row, make_row
from flashrl_cli.errors import EnvironmentNotReady, InputError, Location
from flashrl_cli.paths import DatasetPaths
from flashrl_cli.render.output import Output

Read = Callable[[Path], list[dict[str, Any]]]
Lines = Callable[[Path, Iterable[Any]], Path]
DAPO = {"data_source": "math_dapo", "ability": "MATH", "extra_info": {"index": "u"}}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Prepare `name` into its own folder under the test's."""

    def go(name: str, source: Path | None = None, **options: Any) -> dict[str, Any]:
        paths = DatasetPaths(name, options.pop("root", tmp_path / "out" / name))
        request = Request(paths=paths, source=str(source) if source else None, **options)
        return prepare_dataset(request, Output(json_mode=True))

    return go


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def dapo_row(prompt: str, answer: str) -> dict[str, Any]:
    reward = {"style": "rule", "ground_truth": answer}
    return DAPO | {"prompt": [{"role": "user", "content": prompt}], "reward_model": reward}


def test_gsm8k_from_a_folder(run: Callable[..., Any], gsm8k_folder: Path, tmp_path: Path, parquet: Read) -> None:
    result = run("gsm8k", gsm8k_folder)
    assert (result["status"], result["path"]) == ("prepared", str(tmp_path / "out/gsm8k"))
    assert {split: entry["rows"] for split, entry in result["splits"].items()} == {"train": 3, "test": 2}
    row = parquet(tmp_path / "out/gsm8k/test.parquet")[1]
    assert row == {
        "data_source": "openai/gsm8k",
        "prompt": [
            {
                "role": "user",
                "content": 'test 2? Let\'s think step by step and output the final answer after "####".',
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2000"},
        "extra_info": {"split": "test", "index": 1, "answer": "Count.\n#### 2,000", "question": "test 2?"},
    }


def test_the_manifest_tells_source_options_and_counts(run: Callable[..., Any], gsm8k_folder: Path) -> None:
    result = run("gsm8k", gsm8k_folder, limit=1)
    manifest = json.loads((Path(result["path"]) / "manifest.json").read_text())
    assert manifest == {key: value for key, value in result.items() if key not in {"status", "path"}}
    assert manifest["source"]["kind"] == "local"
    assert manifest["source"]["files"]["train"][0]["path"] == str(gsm8k_folder / "train.jsonl")
    assert len(manifest["source"]["files"]["train"][0]["sha256"]) == 64
    assert manifest["options"] == {"limit": 1}
    assert {split: entry["rows"] for split, entry in manifest["splits"].items()} == {"train": 1, "test": 1}


def test_a_second_run_touches_nothing(run: Callable[..., Any], gsm8k_folder: Path, tmp_path: Path) -> None:
    first = run("gsm8k", gsm8k_folder)
    before = snapshot(tmp_path / "out/gsm8k")
    assert run("gsm8k", gsm8k_folder) == first | {"status": "up to date"}
    assert snapshot(tmp_path / "out/gsm8k") == before


def change_input(folder: Path, out: Path, lines: Lines) -> dict[str, Any]:
    lines(folder / "test.jsonl", [{"question": "new?", "answer": "#### 9"}])
    return {}


def change_output(folder: Path, out: Path, lines: Lines) -> dict[str, Any]:
    (out / "train.parquet").write_bytes(b"torn")
    return {}


def lose_manifest(folder: Path, out: Path, lines: Lines) -> dict[str, Any]:
    (out / "manifest.json").unlink()
    return {}


def other_release(folder: Path, out: Path, lines: Lines) -> dict[str, Any]:
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"flashrl": "', '"flashrl": "0.'))
    return {}


@pytest.mark.parametrize(
    "change",
    [
        change_input,
        change_output,
        lose_manifest,
        other_release,
        lambda *_: {"limit": 1},
        lambda *_: {"force": True},
    ],
    ids=["input", "output", "manifest", "release", "limit", "force"],
)
def test_what_differs_is_prepared_again(
    run: Callable[..., Any], gsm8k_folder: Path, tmp_path: Path, lines: Lines, change: Callable[..., dict[str, Any]]
) -> None:
    run("gsm8k", gsm8k_folder)
    options = change(gsm8k_folder, tmp_path / "out/gsm8k", lines)
    assert run("gsm8k", gsm8k_folder, **options)["status"] == "prepared"
    assert run("gsm8k", gsm8k_folder, **options | {"force": False})["status"] == "up to date"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": "q?", "answer": "no mark"}, "'answer' has no final answer after '#### '"),
        ({"question": "q?"}, "no column 'answer' (the row has: question)"),
        ("{oops", "not JSON"),
        ("[1]", "not a JSON object but a list"),
    ],
)
def test_bad_rows_of_both_splits_are_told_and_nothing_is_written(
    run: Callable[..., Any], gsm8k_folder: Path, tmp_path: Path, lines: Lines, bad: Any, message: str
) -> None:
    run("gsm8k", gsm8k_folder)
    before = snapshot(tmp_path / "out/gsm8k")
    good = {"question": "q?", "answer": "#### 1"}
    lines(gsm8k_folder / "train.jsonl", [good, bad, good])
    lines(gsm8k_folder / "test.jsonl", [bad])
    with pytest.raises(InputError, match="gsm8k: 2 rows cannot be used; nothing was written") as caught:
        run("gsm8k", gsm8k_folder)
    expected = [f"{gsm8k_folder}/train.jsonl:2", f"{gsm8k_folder}/test.jsonl:1"]
    assert [str(problem.where) for problem in caught.value.problems] == expected
    assert caught.value.problems[0].message.startswith(message)
    assert snapshot(tmp_path / "out/gsm8k") == before


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_an_error(run: Callable[..., Any], gsm8k_folder: Path, tmp_path: Path, content: str) -> None:
    (gsm8k_folder / "test.jsonl").write_text(content)
    with pytest.raises(InputError, match="has no rows for test; nothing was written"):
        run("gsm8k", gsm8k_folder)
    assert not (tmp_path / "out").exists()


def test_dapo_is_deduplicated_and_says_so(
    run: Callable[..., Any], tmp_path: Path, lines: Lines, parquet: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    source = lines(tmp_path / "dapo.jsonl", [dapo_row("a", "1"), dapo_row("b", "2")] * 100 + [dapo_row("a", "3")])
    result = run("dapo-math-17k", source)
    assert list(result["splits"]) == ["train"]
    entry = result["splits"]["train"]
    assert (entry["rows"], entry["duplicates"], entry["conflicting_duplicates"]) == (2, 199, 1)
    assert "1 duplicates of train give another answer" in capsys.readouterr().err
    rows = parquet(tmp_path / "out/dapo-math-17k/train.parquet")
    assert rows[0] == dapo_row("a", "1") | {"extra_info": {"index": "u", "split": "train"}}
    assert run("dapo-math-17k", source, dedupe=False)["splits"]["train"]["rows"] == 201


def test_a_set_of_one_split_writes_one_file(run: Callable[..., Any], tmp_path: Path, lines: Lines) -> None:
    source = lines(tmp_path / "train.jsonl", [{"problem": "p", "answer": "7"}])
    run("aime-2025", source)
    assert sorted(path.name for path in (tmp_path / "out/aime-2025").iterdir()) == ["manifest.json", "test.parquet"]


def test_arith_is_drawn_by_its_seed(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("arith", seed=1)
    assert {split: entry["rows"] for split, entry in result["splits"].items()} == {"train": 4096, "test": 256}
    same = run("arith", seed=1, root=tmp_path / "same")
    other = run("arith", seed=2, root=tmp_path / "other")
    hashes = [r["splits"]["train"]["sha256"] for r in (result, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert run("arith", seed=1)["status"] == "up to date"
    assert run("arith", seed=2)["status"] == "prepared"


def test_tokens_are_counted_once_for_a_tokenizer(
    run: Callable[..., Any], gsm8k_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "load_tokenizer", lambda name: name)
    monkeypatch.setattr(prepare, "prompt_tokens", lambda tokenizer, rows, advance: [5, 6, 7][: len(rows)])
    run("gsm8k", gsm8k_folder)
    counted = run("gsm8k", gsm8k_folder, tokenizer="a/b")
    assert (counted["status"], counted["tokenizer"]) == ("prepared", "a/b")
    assert counted["splits"]["train"]["prompt_tokens"] == {"p50": 6, "p95": 7, "p99": 7, "longest": 7}
    assert run("gsm8k", gsm8k_folder, tokenizer="a/b")["status"] == "up to date"
    assert run("gsm8k", gsm8k_folder)["status"] == "up to date"


def test_a_folder_is_not_both_source_and_output(run: Callable[..., Any], gsm8k_folder: Path) -> None:
    with pytest.raises(InputError, match="is both source and output"):
        run("gsm8k", gsm8k_folder, root=gsm8k_folder)


def test_files_of_another_source_or_set_are_not_lost_without_force(
    run: Callable[..., Any], gsm8k_folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "out"
    run("gsm8k", gsm8k_folder, root=root)
    with pytest.raises(InputError, match="holds train of another source"):
        run("gsm8k", gsm8k_folder / "test.jsonl", root=root)
    with pytest.raises(InputError, match="holds gsm8k"):
        run("arith", root=root)
    assert (root / "train.parquet").is_file()
    run("gsm8k", gsm8k_folder / "test.jsonl", root=root, force=True)
    assert sorted(path.name for path in root.iterdir()) == ["manifest.json", "test.parquet"]


def test_tiny_is_made_elsewhere(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare_tiny(paths: DatasetPaths, *, seed: int, force: bool, report: object) -> dict[str, Any]:
        return {"status": "up to date", "dataset": paths.name, "seed": seed, "force": force, "splits": {}}

    monkeypatch.setitem(sys.modules, "flashrl_cli.data.tiny", types.SimpleNamespace(prepare_tiny=prepare_tiny))
    result = run("tiny", seed=4, force=True)
    path = str(tmp_path / "out/tiny")
    expected = {"status": "up to date", "path": path, "dataset": "tiny", "seed": 4, "force": True, "splits": {}}
    assert result == expected


def test_offline_is_told_to_the_libraries(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr(prepare, "go_offline", lambda: told.append(True))
    run("arith", offline=True)
    assert told == [True]


def test_several_sets_go_to_their_own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHRL_DATA", str(tmp_path))
    found = requests(["gsm8k", "arith"], limit=5, seed=3, dedupe=False)
    assert [request.paths.root for request in found] == [tmp_path / "gsm8k", tmp_path / "arith"]
    assert {(request.limit, request.seed, request.dedupe) for request in found} == {(5, 3, False)}


def test_out_is_the_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (request,) = requests(["gsm8k"], out="here")
    assert request.paths.root == tmp_path / "here"


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        requests(["gsm8", "tiny"], source="x", out="y", limit=1, tokenizer="z")
    told = [(problem.where, problem.message) for problem in caught.value.problems]
    assert told == [
        (None, "no data set 'gsm8'"),
        ("--out", "goes with one data set, not 2"),
        ("--source", "goes with one data set, not 2"),
        ("--source", "tiny is made here, from no source"),
        ("--limit", "tiny comes as it is, with its own tokenizer"),
        ("--tokenizer", "tiny comes as it is, with its own tokenizer"),
    ]
    assert caught.value.problems[0].hint == "did you mean gsm8k?"


@pytest.mark.parametrize("options", [{"seed": 0}, {"seed": 7}])
def test_a_seed_for_a_set_that_has_none_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        requests(["gsm8k"], **options)
    assert caught.value.problems[0].where == "--seed"


def test_arith_takes_no_source() -> None:
    with pytest.raises(InputError) as caught:
        requests(["arith"], source="x")
    assert caught.value.problems[0].message == "arith is made here, from no source"


def convert(raw: Raw, split: str, index: int) -> Row:
    if raw["answer"] is None:
        raise BadRow("no answer")
    return make_row(raw.get("source", "math"), raw["prompt"], raw["answer"], {"split": split, "index": index})


def build(raws: Iterable[Raw], bad: BadRows | None = None, ticks: list[int] | None = None, **options: Any) -> Split:
    located = ((Location("f", line), raw) for line, raw in enumerate(raws, start=1))
    recipe = Recipe(splits=("train",), convert=convert, columns=("prompt", "answer", "source"))
    options = {"dedupe": True, "limit": None} | options
    advance = (ticks if ticks is not None else []).append
    return build_split("train", recipe, located, bad=bad or BadRows(), advance=advance, **options)


def raws(*pairs: tuple[str, str | None]) -> list[Raw]:
    return [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]


rows = st.lists(st.builds(make_row, st.just("math"), st.sampled_from("abc"), st.sampled_from("12"), st.just({})))


@given(rows=rows)
def test_deduplication_is_idempotent_and_accounts_for_every_row(rows: list[Row]) -> None:
    unique, again = Unique(), Unique()
    kept = list(unique.keep_first((Location("f", number), one) for number, one in enumerate(rows)))
    assert list(again.keep_first(kept)) == kept
    assert again == Unique(0, 0)
    assert len(kept) + unique.duplicates == len(rows)
    assert {row["prompt"][0]["content"] for _, row in kept} == {row["prompt"][0]["content"] for row in rows}


def test_the_first_of_equal_prompts_is_kept() -> None:
    built = build(raws(("a", "1"), ("b", "2"), ("a", "1"), ("a", "3")))
    assert [(row["prompt"][0]["content"], row["extra_info"]["index"]) for row in built.rows] == [("a", 0), ("b", 1)]
    assert (built.duplicates, built.conflicts) == (2, 1)


def test_duplicates_stay_if_wanted() -> None:
    assert len(build(raws(("a", "1"), ("a", "1")), dedupe=False).rows) == 2


def test_the_limit_counts_rows_that_are_kept_and_stops_reading() -> None:
    def endless() -> Iterable[Raw]:
        yield from raws(("a", "1"), ("a", "1"), ("b", "1"))
        raise AssertionError("read on after the limit")

    assert [row["prompt"][0]["content"] for row in build(endless(), limit=2).rows] == ["a", "b"]


def test_bad_rows_are_noted_with_their_place_and_the_rest_is_read() -> None:
    bad = BadRows()
    built = build(raws(("a", None), ("b", "1"), ("c", None)), bad)
    assert len(built.rows) == 1
    assert [(str(problem.where), problem.message) for problem in bad.problems()] == [("f:1", "no answer; 2 rows: 1, 3")]


def test_a_data_source_without_a_reward_is_a_bad_row() -> None:
    bad = BadRows()
    build([{"prompt": "a", "answer": "1", "source": "my/set"}], bad)
    assert bad.problems()[0].message == "verl has no scorer for data_source 'my/set'"


def test_a_truth_that_its_scorer_does_not_pay_for_is_a_bad_row() -> None:
    bad = BadRows()
    build([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "x" * 300}, {"prompt": "c", "answer": "\n"}], bad)
    assert [(str(p.where), p.message.partition(" is ")[2][:12]) for p in bad.problems()] == [
        ("f:3", "empty"),
        ("f:2", "longer than "),
    ]


def test_what_is_not_taken_is_counted() -> None:
    built = build(
        [{"prompt": "a", "answer": "1", "images": ["x"], "level": 3}, {"prompt": "b", "answer": "1", "level": 0}]
    )
    assert built.dropped == {"images": 1, "level": 2}
    assert built.counts()["dropped"] == {"images": 1, "level": 2}


def test_progress_is_told_in_steps() -> None:
    ticks: list[int] = []
    build(raws(*[(str(n), "1") for n in range(2 * TICK + 1)]), ticks=ticks)
    assert ticks == [TICK, TICK]


class Words:
    """Tokenizer with a token for each word and two for the template."""

    chat_template = "{{ messages }}"

    def apply_chat_template(self, chats: list[Any], **options: Any) -> list[list[int]]:
        assert options == {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return [[0] * (2 + sum(len(turn["content"].split()) for turn in chat)) for chat in chats]


def test_prompts_are_counted_with_their_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "BATCH", 2)
    rows = [make_row("math", prompt, "1", {}) for prompt in ("a", "a b c", "a b")]
    ticks: list[int] = []
    assert prepare.prompt_tokens(Words(), rows, ticks.append) == [3, 5, 4]
    assert ticks == [2, 1]


@given(values=st.lists(st.integers(1, 10_000), min_size=1, max_size=200))
def test_percentiles_are_values_that_enough_stay_below(values: list[int]) -> None:
    summary = prepare.summary(values)
    assert summary["longest"] == max(values)
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        assert summary[name] in values
        assert sum(value <= summary[name] for value in values) >= share * len(values)
        assert sum(value < summary[name] for value in values) < share * len(values)


def answer_with(result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(name: str) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    fake = types.SimpleNamespace(AutoTokenizer=types.SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    monkeypatch.setattr(prepare, "detect_offline", lambda: None)


def test_a_tokenizer_that_is_not_to_be_had_is_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(OSError("We couldn't connect.\nLong story."), monkeypatch)
    with pytest.raises(EnvironmentNotReady, match=r"cannot load the tokenizer a/b: We couldn't connect\.$"):
        prepare.load_tokenizer("a/b")


def test_a_tokenizer_without_a_chat_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(types.SimpleNamespace(chat_template=None), monkeypatch)
    with pytest.raises(InputError, match="no chat template"):
        prepare.load_tokenizer("a/b")


PLAIN: dict[str, Any] = {
    "dataset": "gsm8k",
    "splits": {
        "train": {"rows": 3, "duplicates": 1, "longest_characters": 90},
        "test": {"rows": 2, "duplicates": 0, "longest_characters": 80},
    },
}
COUNTED: dict[str, Any] = {
    "dataset": "arith",
    "splits": {"test": {"rows": 4, "duplicates": 0, "prompt_tokens": {"p50": 5, "p95": 6, "p99": 7, "longest": 9}}},
}


def test_without_a_tokenizer_lengths_are_in_characters() -> None:
    columns, rows = summary_table([PLAIN])
    assert columns == ["data set", "split", "rows", "duplicates dropped", "longest (characters)"]
    assert rows == [["gsm8k", "train", 3, 1, 90], ["gsm8k", "test", 2, 0, 80]]


def test_with_a_tokenizer_lengths_are_in_tokens() -> None:
    columns, rows = summary_table([COUNTED, PLAIN])
    assert columns[4:] == ["tokens p50", "tokens p95", "tokens p99", "longest"]
    assert rows[0] == ["arith", "test", 4, 0, 5, 6, 7, 9]
    assert rows[1] == ["gsm8k", "train", 3, 1, None, None, None, None]
