"""A run's own reward function: tried on its rows before the start, kept with the attempt, and named when it fails."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.config.resolve import Options
from flashrl_cli.data.prepare import prepare_dataset, requests
from flashrl_cli.errors import InputError, Location
from flashrl_cli.plugins import reward
from flashrl_cli.plugins.reward import Report
from flashrl_cli.render.output import Output
from flashrl_cli.reward_function import Source
from flashrl_cli.train import preflight, rewards, supervise
from flashrl_cli.train.executors import ray_job
from flashrl_cli.train.launch import changes, next_plan, read
from flashrl_cli.train.plan import LaunchPlan, plan_document, plan_script
from flashrl_cli.train.rewards import RewardFailed
from flashrl_cli.train.supervise import Watch
from tests import sample_rows
from tests.sample_rows import row
from tests.specs import load_spec
from tests.unit.train.builders import planned

GOOD = "def score(solution_str, ground_truth):\n    return ground_truth in solution_str\n"


def report(**changes: Any) -> Report:
    call = {"data_source": "openai/gsm8k", "solution_str": "odd\nanswer", "ground_truth": "72", "extra_info": {}}
    made = Report(what="raises KeyError: 'x'", line=4, trace=("Traceback:", "KeyError: 'x'"), file="/r.py", call=call)
    return dataclasses.replace(made, **changes)


@pytest.fixture
def plan(tmp_path: Path) -> Callable[[str], LaunchPlan]:
    """`plan(source)`: a run of three rows of GSM8K with this reward function."""
    data = sample_rows.write(tmp_path / "d.parquet", [row(1), row(2), row(3)])

    def build(source: str = GOOD, *sets: str) -> LaunchPlan:
        file = tmp_path / "reward.py"
        file.write_text(source)
        made = planned(
            "tiny", f"data.train={data}", f"data.val={data}", f"reward.function={file}:score", *sets, root=tmp_path
        )
        return dataclasses.replace(made, reward=Source(source))

    return build


@pytest.mark.processes
def test_a_good_function_is_called_on_rows_and_passes(plan: Callable[..., LaunchPlan], tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    source = f"def score(solution_str, ground_truth):\n    open({str(seen)!r}, 'a').write(repr(solution_str) + '\\n')\n"
    made = plan(f"{source}    return 0.5\n")
    preflight.check_rows(made)
    truth = sample_rows.row(1)["reward_model"]["ground_truth"]
    assert seen.read_text().splitlines()[:3] == [repr(truth), "''", "'I do not know.'"]


@pytest.mark.processes
def test_a_bad_function_ends_the_start_with_file_and_row(plan: Callable[..., LaunchPlan], tmp_path: Path) -> None:
    made = plan("def score(solution_str):\n    return float(solution_str)\n")
    with pytest.raises(InputError, match="cannot be trained with this reward; nothing was started") as caught:
        preflight.check_rows(made)
    (problem,) = [one for one in caught.value.problems if "'I do not know.'" in one.message]
    assert problem.where == Location(str(tmp_path / "reward.py"), 2)
    assert f"for {tmp_path / 'd.parquet'}:row 1 and the response 'I do not know.'" in problem.message


def test_rows_may_have_any_data_source(tmp_path: Path) -> None:
    data = sample_rows.write(tmp_path / "d.parquet", [row(1) | {"data_source": "mine"}])
    spec = load_spec("tiny", sets=[f"data.train={data}", f"data.val={data}", "reward.function=r.py:score"]).spec
    assert preflight.row_problems(spec) == []


@pytest.mark.parametrize(
    ("function", "message"), [("missing.py:score", "there is no file"), ("there.py:other", "no function other in it")]
)
def test_a_file_without_the_function_is_a_problem_of_the_preset(
    function: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.py").write_text(GOOD)
    source, problems = rewards.source_of(load_spec("tiny", sets=[f"reward.function={function}"]))
    assert source is None
    assert message in problems[0].message


def test_verl_gets_flashrls_module_and_the_workers_the_users(plan: Callable[..., LaunchPlan], tmp_path: Path) -> None:
    made = plan(GOOD, "reward.arguments.weight=2")
    words = [str(override) for override in made.overrides]
    assert "reward.custom_reward_function.path='pkg://flashrl_cli.plugins.reward'" in words
    assert "reward.custom_reward_function.name=compute_score" in words
    shipped = json.loads(made.env["FLASHRL_REWARD"])
    assert shipped["file"] == f"{tmp_path}/reward.py"
    assert shipped["copy"] == str(made.attempt_paths.reward)
    assert shipped["arguments"] == {"weight": 2}
    assert plan_document(made)["reward"] == {
        "function": f"{tmp_path}/reward.py:score",
        "sha256": Source(GOOD).sha256,
    }
    assert f"\ncp {tmp_path}/reward.py {made.attempt_paths.reward}\n" in plan_script(made)


def test_another_file_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashrl_cli.config.resolve import Options

    monkeypatch.setenv("FLASHRL_RUNS", str(tmp_path / "runs"))
    file = tmp_path / "reward.py"
    file.write_text(GOOD)
    options = Options(sets=(f"reward.function={file}:score",))
    first = next_plan(read("tiny", options), "r", resume="auto")
    first.attempt_paths.root.mkdir(parents=True)
    first.attempt_paths.plan.write_text(json.dumps(plan_document(first)))
    assert changes(next_plan(read("tiny", options), "r", resume="auto")) == []
    file.write_text(GOOD + "\n# changed\n")
    with pytest.raises(InputError, match="another configuration") as caught:
        next_plan(read("tiny", options), "r", resume="auto")
    (problem,) = caught.value.problems
    assert problem.where == "reward.function"
    assert problem.message.count("with SHA-256") == 2


def test_without_a_shared_folder_the_file_goes_with_the_job(plan: Callable[..., LaunchPlan]) -> None:
    made = plan()
    sent = [
        json.loads(ray_job.job_request(made, "http://h:1", shared=shared).runtime_env["env_vars"]["FLASHRL_REWARD"])
        for shared in (True, False)
    ]
    assert "source" not in sent[0]
    assert sent[1] == sent[0] | {"source": GOOD}


def test_a_report_in_the_log_of_a_job_becomes_the_attempts(plan: Callable[..., LaunchPlan]) -> None:
    made = plan()
    made.attempt_paths.root.mkdir(parents=True)
    line = reward.MARK + json.dumps(dataclasses.asdict(report()))
    made.attempt_paths.log.write_text(f"(RewardLoopWorker pid=3, ip=10.0.0.2) {line}\n")
    ray_job.LogExtraction(made.attempt_paths).poll()
    assert reward.read(made.attempt_paths.root) == report()


class Still:
    def tend(self) -> None:
        """Nothing to do."""


def test_a_failure_ends_the_run_with_row_and_the_users_traceback(
    plan: Callable[..., LaunchPlan], seen: Any, tmp_path: Path
) -> None:
    made = plan()
    made.attempt_paths.plugins.mkdir(parents=True)
    made.attempt_paths.log.write_text("")
    third = sample_rows.row(3)
    call = {
        "data_source": third["data_source"],
        "solution_str": "odd\nanswer",
        "ground_truth": third["reward_model"]["ground_truth"],
        "extra_info": third["extra_info"] | {"num_turns": 2, "global_steps": 1},
    }
    watch = Watch(made, seen, Still(), None)  # type: ignore[arg-type]
    watch.look()
    reward.write(made.attempt_paths.root, report(call=call))
    with pytest.raises(RewardFailed) as caught:
        watch.look()
    assert caught.value.message.splitlines() == [
        f"the reward function raises KeyError: 'x' (/r.py:4), for {tmp_path}/d.parquet:row 3",
        r"  response: 'odd\nanswer'",
        f"  ground truth: {third['reward_model']['ground_truth']!r}",
        "  | Traceback:",
        "  | KeyError: 'x'",
        f"log: {made.attempt_paths.log}",
    ]
    assert "--resume auto --force --name r" in str(caught.value.hint)


def test_a_call_that_lets_no_thread_run_is_found_in_what_faulthandler_writes(
    plan: Callable[..., LaunchPlan], seen: Any, tmp_path: Path
) -> None:
    """The log is that of a run whose regular expression did not end, without the stacks of other threads."""
    made = plan(GOOD, "reward.timeout_s=5")
    made.attempt_paths.plugins.mkdir(parents=True)
    worker = "\x1b[36m(RewardLoopWorker pid=11977)\x1b[0m "
    lines = [
        f'  File "{tmp_path}/reward.py", line 1 in score',
        "Timeout (0:00:10)!",
        "Thread 0x00007fc89effd6c0 (most recent call first):",
        '  File "/usr/lib/python3.11/re/__init__.py", line 166 in match',
        f'  File "{tmp_path}/reward.py", line 2 in score',
        '  File "/venv/lib/python3.11/site-packages/flashrl_cli/reward_function.py", line 253 in _call',
    ]
    made.attempt_paths.log.write_text("".join(f"{worker}{line}\n" for line in lines))
    with pytest.raises(RewardFailed) as caught:
        Watch(made, seen, Still(), None).look()  # type: ignore[arg-type]
    what = "hangs: a call takes longer than 5 s, in C code such as that of regular expressions"
    assert caught.value.message.splitlines() == [
        f"the reward function {what} ({tmp_path}/reward.py:2)",
        f"log: {made.attempt_paths.log}",
    ]


def test_a_row_that_no_file_has_is_named_by_its_data_source(plan: Callable[..., LaunchPlan]) -> None:
    call = {**report().call, "extra_info": {"index": 99}, "ground_truth": "no such"}
    error = rewards.failed(plan(), report(call=call))
    assert error.message.splitlines()[0].endswith("(/r.py:4), for a row of 'openai/gsm8k'")


def test_supervise_keeps_a_copy_of_the_file(
    plan: Callable[..., LaunchPlan], seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan()

    class Ended(Still):
        def poll(self) -> int:
            return 1

        def kill(self, **_: float) -> None:
            """Already ended."""

    made.attempt_paths.root.mkdir(parents=True)
    made.attempt_paths.log.write_text("")
    reward.write(made.attempt_paths.root, report())
    with pytest.raises(RewardFailed):
        supervise.supervise(made, seen, [], start=lambda _: Ended())  # type: ignore[arg-type, return-value]
    assert made.attempt_paths.reward.read_text() == GOOD


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`prepared(name, function)`: a data set of the user's own, prepared for a function of mine.py."""
    monkeypatch.setenv("FLASHRL_DATA", str(tmp_path / "data"))
    (tmp_path / "mine.py").write_text(f"{GOOD}{GOOD.replace('score', 'other')}")
    (tmp_path / "q.jsonl").write_text("".join(f'{{"prompt": "q {n}", "answer": "{n}"}}\n' for n in range(4)))

    def make(name: str, function: str = "score") -> None:
        words = {"reward": f"{tmp_path}/mine.py:{function}", "split": 0.5}
        (request,) = requests([name], source=str(tmp_path / "q.jsonl"), words=words)
        prepare_dataset(request, Output(json_mode=True))

    return make


def test_a_data_set_brings_the_reward_that_it_was_prepared_for(prepared: Callable[..., None], tmp_path: Path) -> None:
    prepared("mine")
    sample_rows.write(tmp_path / "data/gsm8k/train.parquet")
    found = rewards.with_reward(load_spec("tiny", sets=["data.train=[gsm8k,mine]", "data.val=mine"]))
    assert found.spec.reward.function == f"{tmp_path}/mine.py:score"
    assert found.spec.reward.sources == ("mine",)
    assert found.origins["reward.function"].reason == "mine was prepared for it"
    assert [row["data_source"] for _, row in rewards._rows(tmp_path / "data/mine/train.parquet", found.spec)] == [
        "mine"
    ] * 2
    assert preflight.row_problems(found.spec) == []
    sample_rows.write(tmp_path / "data/gsm8k/train.parquet", [row(**sample_rows.truth(2))])
    [problem] = preflight.row_problems(found.spec)
    assert "ground_truth is a whole number, not text" in problem.message, "verl's scorers take the other rows"


def test_a_reward_that_the_preset_names_is_kept(prepared: Callable[..., None], tmp_path: Path) -> None:
    prepared("mine")
    for sets in ("reward.function=r.py:f", "verl.reward.custom_reward_function.path=/r.py"):
        named = load_spec("tiny", sets=["data.train=mine", "data.val=mine", sets])
        assert rewards.with_reward(named) is named
    other = load_spec("tiny", sets=["data.train=gsm8k", "data.val=/nothing.parquet"])
    assert rewards.with_reward(other) is other


def test_data_sets_for_several_functions_are_refused(prepared: Callable[..., None], tmp_path: Path) -> None:
    prepared("mine")
    prepared("yours", "other")
    both = rewards.with_reward(load_spec("tiny", sets=["data.train=[mine,yours]", "data.val=mine"]))
    [problem] = both.broken
    assert problem.message == (
        "the data sets were prepared for several reward functions: "
        f"mine for {tmp_path}/mine.py:score, yours for {tmp_path}/mine.py:other"
    )
    with pytest.raises(InputError):
        both.checked()


def test_a_run_of_such_a_data_set_ships_its_function(
    prepared: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared("mine")
    monkeypatch.setenv("FLASHRL_RUNS", str(tmp_path / "runs"))
    resolved = read("tiny", Options(sets=["data.train=mine", "data.val=mine"]))
    made = next_plan(resolved, "r", resume="never")
    assert made.reward is not None
    assert made.reward.text.startswith(GOOD)
    assert json.loads(made.env["FLASHRL_REWARD"])["sources"] == ["mine"]
