"""A reward function in a process of its own: what it returns comes back, and nothing that it does ends the caller."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.errors import Location
from flashrl_cli.reward_function import Call, Failure, Score
from flashrl_cli.worker.scoring import Scorer, trial

pytestmark = pytest.mark.processes

FILE = "/users/reward.py"
CALL = Call("mydata", "the answer is 5", "5", {"index": 3})
ROW = Location("train.parquet", 3, unit="row")


def scorer(source: str, limit_s: float = 30) -> Scorer:
    return Scorer(source, FILE, "score", limit_s=limit_s)


def test_scores_and_continues_after_an_exception() -> None:
    with scorer("def score(solution_str):\n    return {'score': 1 / len(solution_str), 'seen': 'x'}") as one:
        assert one.score(CALL._replace(solution_str="ab")) == Score(0.5, {"seen": "x"})
        failed = one.score(CALL._replace(solution_str=""))
        assert isinstance(failed, Failure)
        assert (failed.what, failed.line) == ("raises ZeroDivisionError: division by zero", 2)
        assert one.score(CALL._replace(solution_str="abcd")) == Score(0.25, {"seen": "x"})
        assert not one.died


def test_numbers_of_numpy_arrive_as_numbers() -> None:
    source = "import numpy as np\ndef score(solution_str):\n    return {'score': np.float32(0.5), 'n': np.int64(2)}"
    with scorer(source) as one:
        assert one.score(CALL) == Score(0.5, {"n": 2})


@pytest.mark.parametrize(
    ("source", "what", "line"),
    [
        ("def score(solution_str):\n    while True:\n        pass", "hangs: a call takes longer than 1 s", None),
        # C code that no signal handler interrupts
        ("import re\ndef score(solution_str):\n    return re.match('(a+)+$', 'a' * 50 + 'b')",
         "hangs: a call takes longer than 1 s", 3),
        ("import os\ndef score(solution_str):\n    os._exit(3)", "ends its process with code 3", None),
        ("import os\ndef score(solution_str):\n    os.kill(os.getpid(), 9)", "ends its process with SIGKILL", None),
    ],
)  # fmt: skip
def test_a_call_that_hangs_or_dies_is_a_failure_and_the_next_gets_a_new_process(
    source: str, what: str, line: int | None
) -> None:
    with scorer(f"{source}\n", limit_s=1) as one:
        for _ in range(2):
            found = one.score(CALL)
            assert isinstance(found, Failure)
            assert found.what == what
            assert line is None or found.line == line
        assert one.died


@pytest.mark.parametrize(
    ("source", "what", "line"),
    [
        ("print('loading')\ndef score(solution_str): return 1", "prints 'loading', which a run would log", 1),
        ("def score(solution_str):\n    print(solution_str)\n    return 1", "prints 'the answer is 5', which", 2),
        ("import os\nos.fork()\ndef score(solution_str): return 1", "forks its process while it is loaded, which", 2),
        ("import multiprocessing as m\nm.Process(target=str).start()\ndef score(solution_str): return 1",
         "forks its process while it is loaded, which", 2),
        ("import os\ndef score(solution_str):\n    os.fork()\n    return 1", "forks its process, which", 3),
    ],
)  # fmt: skip
def test_a_file_that_prints_or_forks_is_a_failure(source: str, what: str, line: int) -> None:
    with scorer(source) as one:
        (problem,) = trial(one, [(ROW, CALL)])
    assert problem.message.startswith(f"the reward function {what}")
    assert problem.where == Location(FILE, line)


def test_a_library_may_print_and_a_function_may_start_processes() -> None:
    source = """
import multiprocessing, os, warnings
os.write(1, b"C code prints\\n")
def work(queue): queue.put(0.25)
def score(solution_str):
    warnings.showwarning("old", UserWarning, "x.py", 1)
    queue = multiprocessing.Queue()
    child = multiprocessing.Process(target=work, args=(queue,))
    child.start()
    result = queue.get()
    child.join()
    return result
"""
    with scorer(source) as one:
        assert one.score(CALL) == Score(0.25, {})


def test_neither_the_working_folder_nor_that_of_the_file_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("")
    with Scorer("import beside", str(tmp_path / "reward.py"), "score") as one:
        failure = one.load()
    assert failure is not None
    assert "No module named 'beside' (of the run's files only this one is there)" in failure.what


def test_a_trial_reports_each_fault_once_with_its_row_and_the_traceback() -> None:
    source = "def score(solution_str, ground_truth):\n    return 1 / (len(solution_str) - 2)"
    rows = [(Location("d.parquet", n, unit="row"), CALL._replace(solution_str="x" * n)) for n in (1, 2, 3, 2)]
    with scorer(source) as one:
        (problem,) = trial(one, rows)
    assert problem.where == Location(FILE, 2)
    first, *trace = problem.message.splitlines()
    assert first == (
        "the reward function raises ZeroDivisionError: division by zero, for d.parquet:row 2 and the response 'xx'"
    )
    assert trace[1] == f'      File "{FILE}", line 2, in score'


def test_a_trial_of_a_function_that_scores_finds_nothing() -> None:
    with scorer("def score(solution_str): return 0.3") as one:
        assert trial(one, [(ROW, CALL)]) == []
