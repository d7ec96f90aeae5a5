"""Data sets of the user's own: recipes from options, files and manifests, and what becomes of the rows."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flashrl_cli.data import own
from flashrl_cli.data.prepare import init_recipe, prepare_dataset, requests
from flashrl_cli.data.rows import BadRows, Needs, judge
from flashrl_cli.errors import EnvironmentNotReady, InputError, Location
from flashrl_cli.evals import grade
from flashrl_cli.evals.questions import Question
from flashrl_cli.paths import DatasetPaths
from flashrl_cli.plugins import scorers
from flashrl_cli.render.output import Output

pytestmark = pytest.mark.filterwarnings("ignore")
Lines = Callable[[Path, Iterable[Any]], Path]
Read = Callable[[Path], list[dict[str, Any]]]
MAP = "prompt=question,answer=solution"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHRL_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


def prepare(name: str, source: Path | str | None = None, *, recipe: str | None = None, **words: Any) -> dict[str, Any]:
    options = {key: words.pop(key) for key in ("limit", "seed", "dedupe") if key in words}
    given = str(source) if source else None
    (request,) = requests([name], source=given, recipe=recipe, words=words, **options)
    return prepare_dataset(request, Output(json_mode=True))


def rows_of(name: str, parquet: Read) -> list[dict[str, Any]]:
    files = [path for path in (DatasetPaths.named(name).split(split) for split in ("train", "test")) if path.exists()]
    return [row for path in files for row in parquet(path)]


def refused(*args: Any, **words: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        prepare(*args, **words)
    return caught.value


def problems_in(error: InputError) -> list[tuple[str, str]]:
    return [(str(problem.where), problem.message) for problem in error.problems]


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """A CSV file as a spreadsheet saves it: a line break in a cell, a quote, and an empty line."""
    path = tmp_path / "sums.csv"
    lines = ["question,solution,level"]
    lines += [f'"What is {n} plus {n}?","Add ""them"".\nThe answer is {2 * n:,}.",1' for n in range(500, 540)]
    path.write_text("\ufeff" + "\n".join([*lines, "", ""]), encoding="utf-8")
    return path


def test_a_csv_of_questions_and_answers(sums: Path, parquet: Read, tmp_path: Path) -> None:
    made = prepare(
        "sums", sums, map=MAP, answer_regex=r"answer is (.+)\.", reward="gsm8k", prompt_template="Q: {prompt}"
    )
    assert {split: entry["rows"] for split, entry in made["splits"].items()} == {"train": 38, "test": 2}
    rows = {row["prompt"][0]["content"]: row for row in rows_of("sums", parquet)}
    assert rows["Q: What is 504 plus 504?"] == {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "Q: What is 504 plus 504?"}],
        "ability": "own",
        "reward_model": {"style": "rule", "ground_truth": "1008"},
        "extra_info": {"index": 4, "solution": 'Add "them".\nThe answer is 1,008.', "split": "train"},
    }
    assert {row["extra_info"]["index"] for row in rows.values()} == set(range(40))
    assert made["recipe"] == {
        "schema_version": 1,
        "source": str(sums),
        "map": {"prompt": "question", "answer": "solution"},
        "prompt_template": "Q: {prompt}",
        "system": None,
        "answer_regex": r"answer is (.+)\.",
        "reward": "gsm8k",
        "split": 0.95,
    }


@pytest.mark.parametrize(
    ("reward", "source", "prompt"),
    [
        ("gsm8k", "openai/gsm8k", '2 + 2? Let\'s think step by step and output the final answer after "####".'),
        (
            "math",
            "DigitalLearningGmbH/MATH-lighteval",
            "2 + 2? Let's think step by step and output the final answer within \\boxed{}.",
        ),
        ("exact", "flashrl/exact", "2 + 2?"),
    ],
)
def test_a_reward_brings_the_words_that_its_answers_need(
    reward: str, source: str, prompt: str, lines: Lines, tmp_path: Path, parquet: Read
) -> None:
    prepare("mine", lines(tmp_path / "q.jsonl", [{"prompt": "2 + 2?", "answer": 4.0}]), reward=reward, split=1)
    [row] = rows_of("mine", parquet)
    assert (row["data_source"], row["prompt"][0]["content"]) == (source, prompt)
    assert row["reward_model"]["ground_truth"] == "4"


@pytest.mark.parametrize(
    ("reward", "written", "truth"),
    [
        ("gsm8k", "Add.\n#### 1,234", "1234"),
        ("math", r"So $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        ("dapo", "073", "73"),
        ("exact", " Paris ", "Paris"),
    ],
)
def test_the_answer_of_a_published_form_is_found_without_a_regex(
    reward: str, written: str, truth: str, lines: Lines, tmp_path: Path, parquet: Read
) -> None:
    prepare("mine", lines(tmp_path / "q.jsonl", [{"prompt": "q", "answer": written}]), reward=reward, split=1)
    [row] = rows_of("mine", parquet)
    assert row["reward_model"]["ground_truth"] == truth
    assert row["extra_info"]["solution" if reward == "dapo" else "answer"] == written


def test_the_regex_takes_the_last_match_and_the_group_named_answer(lines: Lines, tmp_path: Path, parquet: Read) -> None:
    source = lines(tmp_path / "q.jsonl", [{"prompt": "q", "answer": "is 3, no: is 5"}])
    prepare("mine", source, reward="gsm8k", split=1, answer_regex=r"(is) (?P<answer>\d+)")
    assert rows_of("mine", parquet)[0]["reward_model"]["ground_truth"] == "5"


def test_a_template_has_columns_and_braces_and_a_system_message(lines: Lines, tmp_path: Path, parquet: Read) -> None:
    (tmp_path / "words.txt").write_text("{topic}: {prompt} Answer in \\boxed{}, as {{x}}.\n")
    source = lines(tmp_path / "q.jsonl", [{"q": "1?", "a": "1", "topic": "sums"}])
    prepare("mine", source, map="prompt=q,answer=a", prompt_template="words.txt", system="Be brief.", split=1)
    assert rows_of("mine", parquet)[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "sums: 1? Answer in \\boxed{}, as {x}."},
    ]


def test_a_chat_keeps_its_turns_and_columns_may_be_nested(lines: Lines, tmp_path: Path, parquet: Read) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "q"},
    ]
    source = lines(tmp_path / "q.jsonl", [{"prompt": turns, "reward_model": {"ground_truth": "5"}}])
    prepare("mine", source, map="answer=reward_model.ground_truth", reward="exact", system="S", split=1)
    [row] = rows_of("mine", parquet)
    assert [turn["content"] for turn in row["prompt"]] == ["S", "Hi", "Hi.", "q"]
    assert row["reward_model"]["ground_truth"] == "5"


def test_a_chat_that_ends_with_the_answer_asks_nothing(lines: Lines, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "5"}]
    source = lines(tmp_path / "q.jsonl", [{"prompt": turns, "answer": "5"}])
    assert problems_in(refused("mine", source)) == [
        (f"{source}:1", "the last message of 'prompt' is of role assistant: nothing is asked")
    ]


def test_a_function_of_the_users_gets_the_other_columns(lines: Lines, tmp_path: Path, parquet: Read) -> None:
    (tmp_path / "mine.py").write_text("def score(solution_str, ground_truth): return 1.0\n")
    source = lines(tmp_path / "q.jsonl", [{"prompt": "q", "rubric": {"points": 3}, "empty": {}}])
    made = prepare("mine", source, reward="mine.py:score", split=1)
    [row] = rows_of("mine", parquet)
    assert row["data_source"] == "mine"
    assert row["extra_info"] == {"index": 0, "rubric": {"points": 3}, "empty": None, "split": "train"}
    assert row["reward_model"]["ground_truth"] == ""
    assert made["recipe"]["reward"] == f"{tmp_path}/mine.py:score"
    prepare("mine", lines(tmp_path / "q.jsonl", [{"prompt": "q", "answer": 0.5}]), reward="mine.py:score", split=1)
    assert rows_of("mine", parquet)[0]["reward_model"]["ground_truth"] == "0.5"
    error = refused("mine", source, reward="mine.py:score", map="prompt=prompt,answer=gone")
    assert problems_in(error) == [("--map", "no column 'gone' for answer")]


def test_a_folder_with_both_splits_is_taken_as_it_is(lines: Lines, tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        lines(tmp_path / f"raw/{split}.jsonl", [{"prompt": f"{split} {n}", "answer": "1"} for n in range(count)])
    made = prepare("mine", tmp_path / "raw")
    assert {split: entry["rows"] for split, entry in made["splits"].items()} == {"train": 3, "test": 2}


def test_the_held_out_rows_stay_out_when_rows_are_added(lines: Lines, tmp_path: Path, parquet: Read) -> None:
    def held(count: int) -> set[str]:
        source = lines(tmp_path / "q.jsonl", [{"prompt": f"q {n}", "answer": "1"} for n in range(count)])
        prepare("mine", source, split=0.8, reward="exact")
        assert len(rows_of("mine", parquet)) == count
        return {row["prompt"][0]["content"] for row in parquet(DatasetPaths.named("mine").split("test"))}

    before, after = held(100), held(110)
    assert (len(before), len(after)) == (20, 22)
    # ten rows more move the boundary by at most ten places of the order by hash
    assert len(before & after) >= 10


def test_another_seed_holds_out_other_rows(lines: Lines, tmp_path: Path, parquet: Read) -> None:
    source = lines(tmp_path / "q.jsonl", [{"prompt": f"q {n}", "answer": "1"} for n in range(200)])
    held = []
    for seed in (0, 1):
        prepare("mine", source, split=0.5, seed=seed)
        held.append({row["extra_info"]["index"] for row in parquet(DatasetPaths.named("mine").split("test"))})
    assert held[0] != held[1]


def test_again_with_nothing_else_it_is_up_to_date(sums: Path) -> None:
    words = {"map": MAP, "answer_regex": r"is ([\d,]+)\.", "reward": "gsm8k"}
    first = prepare("sums", sums, **words)
    assert prepare("sums", sums, **words) == first | {"status": "up to date"}
    assert prepare("sums") == first | {"status": "up to date"}, "the manifest keeps the recipe"
    assert prepare("sums", sums, **words, system="S")["status"] == "prepared"
    assert prepare("sums")["recipe"]["system"] == "S"
    sums.write_bytes(sums.read_bytes().replace(b"500", b"600"))
    assert prepare("sums")["status"] == "prepared"


def test_duplicates_and_rows_of_test_that_are_trained_on_are_reported(
    lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, questions in (("train", ["a", "a", "b"]), ("test", [" A", "c"])):
        lines(tmp_path / f"raw/{split}.jsonl", [{"prompt": q, "answer": "1"} for q in questions])
    made = prepare("mine", tmp_path / "raw", prompt_template="{prompt}", reward="exact")
    assert (made["splits"]["train"]["rows"], made["splits"]["train"]["duplicates"]) == (2, 1)
    assert made["splits"]["test"]["also_in_train"] == 1
    assert "mine: the prompts of 1 of 2 rows of test are also in train" in capsys.readouterr().err


def test_a_recipe_file_with_paths_beside_it_and_options_before_it(lines: Lines, tmp_path: Path, parquet: Read) -> None:
    lines(tmp_path / "there/q.jsonl", [{"q": "1?", "a": "1"}, {"q": "2?", "a": "2"}])
    (tmp_path / "there/mine.yaml").write_text(
        "schema_version: 1\nsource: q.jsonl\nmap: {prompt: q, answer: a}\nreward: gsm8k\nsystem: null\n"
    )
    made = prepare("mine", recipe="there/mine.yaml", reward="exact")
    assert made["recipe"]["source"] == str(tmp_path / "there/q.jsonl")
    assert made["recipe"]["reward"] == "exact"
    assert requests([], recipe="there/mine.yaml")[0].paths.name == "mine"


def test_all_that_is_wrong_with_a_recipe_is_told_with_its_lines(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "source: q.jsonl\nmap: {prompt: q, answr: a}\nrewrd: math\nprompt_template: hello\nanswer_regex: '(['\n"
        "split: 0\n"
    )
    assert problems_in(refused("mine", recipe="mine.yaml")) == [("mine.yaml:3", "no key 'rewrd' in a recipe")]
    (tmp_path / "mine.yaml").write_text((tmp_path / "mine.yaml").read_text().replace("rewrd: math", "reward: maths"))
    assert [
        (where, message.partition(":")[0]) for where, message in problems_in(refused("mine", recipe="mine.yaml"))
    ] == [
        ("mine.yaml:3", "no reward 'maths'"),
        ("mine.yaml:2", "a map has prompt and answer, not 'answr'"),
        ("mine.yaml:4", "the template 'hello' names no column, so all prompts would be equal"),
        ("mine.yaml:5", "'([' is no regular expression"),
        ("mine.yaml:6", "0 is no share of the rows"),
    ]


@pytest.mark.parametrize("version", ["2", "'1'", "0"])
def test_a_recipe_of_another_version_is_refused(version: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"source: q.jsonl\nschema_version: {version}\nnew: 1\n")
    [(where, message)] = problems_in(refused("mine", recipe="mine.yaml"))
    assert (where, message.partition(":")[0]) == ("mine.yaml:2", f"schema_version {version}")


def test_a_manifest_with_a_recipe_of_another_version_is_refused(sums: Path) -> None:
    prepare("sums", sums, map=MAP)
    manifest = DatasetPaths.named("sums").manifest
    data = json.loads(manifest.read_text())
    data["recipe"]["schema_version"] = 9
    manifest.write_text(json.dumps(data))
    assert "this flashrl reads recipes of version 1" in problems_in(refused("sums"))[0][1]


@pytest.mark.parametrize(
    ("words", "where", "message", "hint"),
    [
        ({"map": "prompt=qestion,answer=solution"}, "--map", "no column 'qestion' for prompt", "--map prompt=question"),
        ({"map": "prompt=question"}, "--map", "no column 'answer' for answer", "--map answer=solution"),
        (
            {"map": MAP, "prompt_template": "{promt}{prompt}"},
            "--prompt-template",
            "the template's {promt} is no column",
            "did you mean {prompt}?",
        ),
    ],
)
def test_columns_that_are_not_there(words: dict[str, str], where: str, message: str, hint: str, sums: Path) -> None:
    error = refused("sums", sums, **words)
    assert (problems_in(error), error.problems[0].hint) == ([(where, message)], hint)
    assert error.hint == "it has: question, solution, level"
    assert not DatasetPaths.named("sums").root.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"map": "question"}, "'question' is no map"),
        ({"answer_regex": "abc"}, "'abc' has no group"),
        ({"reward": "exakt"}, "no reward 'exakt'"),
        ({"reward": "nowhere.py:f"}, "there is no file"),
        ({"reward": "mine.py:f"}, "there is no function f in it"),
        ({"system": " "}, "should be text, not empty"),
        ({"split": 1.5}, "1.5 is no share of the rows"),
        ({"prompt_template": "{}"}, "the template '{}' names no column"),
    ],
)
def test_values_that_are_wrong(words: dict[str, Any], message: str, sums: Path) -> None:
    (sums.parent / "mine.py").write_text("def score(solution_str): return 1.0\n")
    [(where, what)] = problems_in(refused("sums", sums, **words))
    assert where == own.OPTIONS[next(iter(words))]
    assert what.startswith(message)


def test_rows_that_a_regex_does_not_match_are_told(lines: Lines, tmp_path: Path) -> None:
    source = lines(tmp_path / "q.jsonl", [{"prompt": "p", "answer": f"is {n}" if n else "none"} for n in range(3)])
    [(where, message)] = problems_in(refused("mine", source, answer_regex="is (.+)"))
    assert (where, message) == (f"{source}:1", "'answer' has no match of the regex 'is (.+)': 'none'")
    assert not DatasetPaths.named("mine").root.exists()


def test_a_regex_that_matches_no_row_is_told_with_the_rows(sums: Path) -> None:
    error = refused("sums", sums, map=MAP, answer_regex="result: (.+)")
    assert error.message == "sums: 40 rows cannot be used; nothing was written"
    assert problems_in(error)[0][1].startswith("'solution' has no match of the regex 'result: (.+)'; 40 rows: 2 (")


def test_a_truth_that_the_reward_does_not_pay_is_refused(lines: Lines, tmp_path: Path) -> None:
    source = lines(tmp_path / "q.jsonl", [{"prompt": "p", "answer": "x" * 400}])
    [(where, message)] = problems_in(refused("mine", source, reward="dapo"))
    assert where == f"{source}:1"
    assert message.startswith("reward_model.ground_truth is longer than the 300 characters")


def test_one_row_cannot_be_divided(lines: Lines, tmp_path: Path) -> None:
    error = refused("mine", lines(tmp_path / "q.jsonl", [{"prompt": "p", "answer": "1"}]))
    assert error.message.endswith("has no rows for test; nothing was written")
    assert error.hint == "--split 1 makes no test split"
    assert not DatasetPaths.named("mine").root.exists()


@pytest.mark.parametrize("name", ["show", "a/b", ".hidden", "x.csv", "math_dapo", "aime-mine", ""])
def test_names_that_mean_something_else(name: str, sums: Path) -> None:
    assert refused(name, sums, map=MAP).problems


def test_a_recipe_is_for_data_of_ones_own(sums: Path) -> None:
    assert problems_in(refused("gsm8k", sums, map=MAP)) == [("--map", "gsm8k has its own recipe")]
    with pytest.raises(InputError) as caught:
        requests(["a", "b"], source=str(sums), words={"map": MAP})
    assert ("--map", "goes with one data set, not 2") in problems_in(caught.value)


@pytest.mark.parametrize(
    ("answers", "reward"),
    [(["1,000", "#### 3"], "gsm8k"), (["Paris", "Rome"], "exact"), ([r"\frac12", "x + 1"], "math")],
)
def test_init_looks_at_the_source(answers: list[str], reward: str, lines: Lines, tmp_path: Path) -> None:
    source = lines(tmp_path / "q.jsonl", [{"id": 7, "question": f"{n}?", "solution": a} for n, a in enumerate(answers)])
    init_recipe(tmp_path / "mine.yaml", source=str(source), words={})
    assert "#   question: '0?'" in (tmp_path / "mine.yaml").read_text()
    made = prepare("mine", recipe="mine.yaml")["recipe"]
    assert (made["map"], made["reward"]) == ({"prompt": "question", "answer": "solution"}, reward)
    with pytest.raises(InputError, match="exists already"):
        init_recipe(tmp_path / "mine.yaml", source=str(source), words={})


def test_init_has_nothing_to_look_at_in_generated_tasks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no columns to look at"):
        init_recipe(tmp_path / "mine.yaml", source="rg:chain_sum", words={})


def test_init_keeps_what_is_given_and_writes_what_is_read_back(sums: Path, tmp_path: Path) -> None:
    words = {"map": MAP, "system": 'Say:\n"yes" #1', "answer_regex": r"is (\S+)\.", "reward": "gsm8k", "split": 0.5}
    written = init_recipe(tmp_path / "mine.yaml", source=str(sums), words=words)
    assert prepare("mine", recipe="mine.yaml")["recipe"] == written
    assert written["system"] == words["system"]


class Doubles:
    """A task as reasoning-gym makes them: doubles of numbers, with a tuple and a type of another library's."""

    def __init__(self, size: int, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self.seed * 1000 + index
        metadata = {"pair": (number, number), "half": Fraction(1, 2)}
        return {"question": f"Double {number}", "answer": str(2 * number), "metadata": metadata}


def score_double(answer: str | None, entry: dict[str, Any]) -> float:
    if answer == "bad":
        raise ValueError(answer)
    assert entry["metadata"]["pair"] == (entry["metadata"]["pair"][0],) * 2
    return 1.0 if answer == entry["answer"] else 0.25


@pytest.fixture
def gym(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """reasoning-gym with two tasks, of which the second does not pay for its own answers."""
    scorers._gym_scorer.cache_clear()
    package, factory, utils = (ModuleType(f"reasoning_gym{name}") for name in ("", ".factory", ".utils"))
    vars(package).update(
        create_dataset=lambda task, size, seed: Doubles(size, seed),
        get_score_answer_fn=lambda task: score_double if task == "doubles" else lambda answer, entry: 0.5,
        __spec__=ModuleSpec("reasoning_gym", None),
    )
    vars(factory).update(DATASETS={"doubles": 1, "unfair": 1, "composite": 1})
    vars(utils).update(extract_answer=lambda text: text.partition("<answer>")[2].partition("</answer>")[0] or None)
    for module in (package, factory, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"reasoning-gym": "0.1", "verl": "0.9.1"}[name])
    yield
    scorers._gym_scorer.cache_clear()


def generate(task: str, *, rows: int | None = None, seed: int | None = None, **words: Any) -> dict[str, Any]:
    (request,) = requests([task], seed=seed, words={"rows": rows, **words})
    return prepare_dataset(request, Output(json_mode=True))


def test_generated_tasks_are_rows_with_their_entries(gym: None, parquet: Read) -> None:
    made = generate("rg:doubles", rows=20, seed=1)
    assert {split: entry["rows"] for split, entry in made["splits"].items()} == {"train": 19, "test": 1}
    assert made["source"] == {
        "kind": "reasoning-gym", "tasks": ["doubles"], "rows": 20, "seed": 1, "version": "0.1",
    }  # fmt: skip
    row = next(row for row in rows_of("rg-doubles", parquet) if row["extra_info"]["index"] == 3)
    assert row["data_source"] == "reasoning_gym/doubles"
    assert row["prompt"][0]["content"].startswith("Double 1003\n\nThink step by step")
    assert row["reward_model"]["ground_truth"] == "2006"
    entry = row["extra_info"]["entry"]
    assert ast.literal_eval(entry)["metadata"] == {"pair": (1003, 1003), "half": "1/2"}
    for response, points in (("<answer>2006</answer>", 1.0), ("2006", 0.25), ("<answer>bad</answer>", 0.0)):
        found = scorers.compute_score(row["data_source"], response, "2006", row["extra_info"])
        assert found == {"score": points, "acc": float(points == 1)}
        question = Question([], row["data_source"], "2006", row["extra_info"])
        [graded] = grade.grade_all([(question, response)])
        assert (graded.score, graded.correct, graded.problem) == (points, points == 1, None)


def test_generated_tasks_are_up_to_date_until_something_else_is_asked_for(gym: None) -> None:
    made = generate("rg:doubles", rows=20, seed=1)
    assert generate("rg:doubles", rows=20, seed=1) == made | {"status": "up to date"}
    assert generate("rg:doubles", rows=20, seed=2)["status"] == "prepared"
    assert generate("rg:doubles", rows=30, seed=2)["source"]["rows"] == 30
    assert prepare("sums", "rg:doubles", system="S")["recipe"] | {"prompt_template": ""} == {
        "schema_version": 1,
        "source": "rg:doubles",
        "map": {"prompt": "question", "answer": "answer"},
        "prompt_template": "",
        "system": "S",
        "answer_regex": None,
        "reward": "reasoning-gym",
        "split": 0.95,
        "rows": 1000,
    }
    assert prepare("sums")["status"] == "up to date", "the manifest keeps the recipe"


def test_a_generator_that_does_not_pay_for_its_own_answers_is_refused(gym: None) -> None:
    with pytest.raises(InputError) as caught:
        generate("rg:doubles,unfair", rows=10)
    [(where, message)] = problems_in(caught.value)
    assert where == "rg:unfair:row 1"
    assert message.startswith("the answer, written as a right one, is not paid in full; 5 rows: 1 ('0'), 2 ('2'), ")
    assert not DatasetPaths.named("rg-doubles-unfair").root.exists()


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("rg:doublets", {}, "reasoning-gym has no task 'doublets'"),
        ("rg:composite", {}, "reasoning-gym has no task 'composite'"),
        ("rg:doubles", {"reward": "math"}, "generated tasks have columns and a scorer of their own"),
        ("rg:doubles", {"map": MAP}, "generated tasks have columns and a scorer of their own"),
    ],
)
def test_what_is_wrong_with_generated_tasks(task: str, words: dict[str, Any], message: str, gym: None) -> None:
    with pytest.raises(InputError) as caught:
        generate(task, **words)
    assert message in [what for _, what in problems_in(caught.value)]


def test_rows_are_generated_of_tasks_alone(sums: Path, gym: None) -> None:
    assert problems_in(refused("sums", sums, map=MAP, rows=5)) == [
        ("--rows", "only tasks of reasoning-gym are generated")
    ]
    with pytest.raises(InputError, match="one data set"):
        requests(["rg:doubles", "gsm8k"])


def test_without_reasoning_gym_nothing_is_generated_nor_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentNotReady, match="reasoning-gym is not installed"):
        generate("rg:doubles")
    row = {
        "data_source": "reasoning_gym/doubles",
        "prompt": [{"role": "user", "content": "?"}],
        "reward_model": {"ground_truth": ""},
        "extra_info": {"entry": "{}"},
    }
    with pytest.raises(EnvironmentNotReady, match=r"reasoning-gym is not installed"):
        judge([(Location("f", 1), row)], Needs(), BadRows())
    bad = BadRows()
    judge([(Location("f", 1), row | {"extra_info": None})], Needs(), bad)
    assert [problem.message for problem in bad.problems()] == ["extra_info has no entry of reasoning-gym"]
