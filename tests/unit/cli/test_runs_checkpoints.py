"""`flashrl runs checkpoints` and `flashrl runs export`, as people and programs call them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.cli.app import main
from flashrl_cli.runs import store
from flashrl_cli.runs.saved import DOOMED, hide, set_aside
from tests.run_lab import Lab, lab
from tests.saved_files import saved_step

__all__ = ["lab"]

REWARD = "critic/score/mean"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`call(*words)` runs `flashrl runs WORDS` in this process: exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashrl", "runs", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        return (int(caught.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def trained(lab: Lab) -> Lab:
    """Steps 1 to 4; the best is 1, the last is torn."""
    lab.recorded()
    lab.save(1, 2, 3, 4)
    lab.log({step: {REWARD: 1 - step / 10} for step in (1, 2, 3, 4)})
    file = lab.run.checkpoints / "global_step_4" / "actor" / "optim_world_size_2_rank_1.pt"
    file.write_bytes(file.read_bytes()[:-9])
    return lab


def test_the_table(trained: Lab, call: Any) -> None:
    set_aside(saved_step(trained.run.checkpoints, 5), "data.pt: missing")
    code, out, _ = call("checkpoints", "r")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert any(line.startswith("step state size HF weights reward age") for line in lines)
    assert any("best" in line and line.startswith("1 complete") for line in lines)
    assert any("newest" in line and line.startswith("3 complete") for line in lines)
    torn = "4 incomplete: actor/optim_world_size_2_rank_1.pt: truncated or damaged"
    assert any(torn in line and "tracked" in line for line in lines)
    assert any(line.startswith("global_step_5") and line.endswith("data.pt: missing") for line in lines)


def test_the_document(trained: Lab, call: Any) -> None:
    set_aside(saved_step(trained.run.checkpoints, 5), "torn")
    code, out, _ = call("checkpoints", "r", "--json")
    document = json.loads(out)
    assert (code, document["schema_version"], document["score_by"]) == (0, 1, "reward")
    steps = {one["step"]: one for one in document["steps"]}
    assert [step for step, one in steps.items() if one["complete"]] == [1, 2, 3]
    assert (steps[1]["best"], steps[3]["newest"], steps[4]["tracked"]) == (True, True, True)
    assert steps[4]["problems"] == ["actor/optim_world_size_2_rank_1.pt: truncated or damaged"]
    assert steps[2]["score"] == 0.8
    assert Path(steps[2]["path"]).is_dir()
    assert document["set_aside"][0]["reason"] == "torn"


def test_what_an_interrupted_prune_left_is_told(trained: Lab, call: Any) -> None:
    hide(saved_step(trained.run.checkpoints, 5), trained.run.checkpoints / DOOMED)
    assert "an interrupted prune left" in call("checkpoints", "r")[2]
    assert call("checkpoints", "r", "--keep", "last:9", "--yes")[0] == 0
    assert not (trained.run.checkpoints / DOOMED).exists()
    assert "interrupted" not in call("checkpoints", "r")[2]


def test_a_run_without_checkpoints(lab: Lab, call: Any) -> None:
    lab.recorded()
    code, out, err = call("checkpoints", "r")
    assert (code, out) == (0, "")
    assert f"no checkpoints in {lab.run.checkpoints}" in err


def test_the_newest_complete_step_is_what_a_resume_finds(trained: Lab, call: Any) -> None:
    assert call("checkpoints", "r", "--keep", "last:1", "--yes")[0] == 0
    left = [name for name in trained.names() if name.startswith("global")]
    assert left == ["global_step_1", "global_step_3", "global_step_4"], "the best, the newest, and the tracked one"


def test_a_dry_run_deletes_nothing(trained: Lab, call: Any) -> None:
    before = trained.names()
    code, out, err = call("checkpoints", "r", "--keep", "last:1", "--dry-run")
    assert code == 0
    assert "best by reward" in out
    assert "1 go, which frees" in err
    assert trained.names() == before
    document = json.loads(call("checkpoints", "r", "--keep", "last:1", "-n", "--json")[1])
    assert [Path(path).name for path in document["going"]] == ["global_step_2"]
    assert (document["deleted"], trained.names()) == (False, before)


def test_pruning_as_json(trained: Lab, call: Any) -> None:
    code, out, _ = call("checkpoints", "r", "--keep", "last:1", "--yes", "--json")
    document = json.loads(out)
    assert (code, document["deleted"]) == (0, True)
    assert document["bytes"] > 0
    assert {one["step"]: one["stays"] for one in document["steps"]}[2] == []
    again = json.loads(call("checkpoints", "r", "--keep", "last:1", "--yes", "--json")[1])
    assert (again["going"], again["deleted"]) == ([], False)


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_without_consent_nothing_is_deleted(flags: tuple[str, ...], trained: Lab, call: Any) -> None:
    before = trained.names()
    code, _, err = call("checkpoints", "r", "--keep", "last:1", *flags)
    assert code == 2
    assert "--yes deletes" in err
    assert trained.names() == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "gone"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_a_person_is_asked(answer: str, gone: bool, trained: Lab, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, _, err = call("checkpoints", "r", "--keep", "last:1")
    assert (code == 0) is gone
    assert "for good?" in err
    assert ("global_step_2" in trained.names()) is not gone


def test_a_running_run_is_left_alone(trained: Lab, call: Any) -> None:
    trained.recorded(status="running", **store.own_process())
    code, _, err = call("checkpoints", "r", "--keep", "last:1", "--yes")
    assert code == 2
    assert "is running" in err
    assert "flashrl runs stop r" in err
    assert "global_step_2" in trained.names()
    code, _, err = call("checkpoints", "r")
    assert (code, "may be being saved" in err) == (0, True), "looking is allowed"


def test_set_aside_goes_on_request(trained: Lab, call: Any) -> None:
    moved = set_aside(saved_step(trained.run.checkpoints, 5), "torn")
    assert call("checkpoints", "r", "--set-aside", "--yes")[0] == 0
    assert not moved.exists()
    assert "global_step_2" in trained.names()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("checkpoints", "q"), 4, "no run q in"),
        (("checkpoints", "rr"), 4, "did you mean r?"),
        (("checkpoints", "../r"), 2, "not the name of a run"),
        (("checkpoints", ""), 2, "not the name of a run"),
        (("checkpoints", "r", "--keep", "all"), 2, "--keep last:3"),
        (("checkpoints", "r", "--keep", ""), 2, "not understood"),
        (("checkpoints", "r", "--yes"), 2, "belong to --keep"),
        (("checkpoints", "r", "--dry-run"), 2, "belong to --keep"),
        (("export", "r", "best", "out", "--public"), 2, "--public belongs to --push"),
        (("export", "r", "9", "out"), 4, "no weights of step 9"),
        (("export", "r", "last", "out"), 2, "neither a number"),
        (("export", "r", "best", "out", "--push", "a/b/c"), 2, "not the name of a repository"),
    ],
)
def test_bad_input(words: tuple[str, ...], code: int, says: str, trained: Lab, call: Any) -> None:
    found, out, err = call(*words)
    assert (found, out) == (code, "")
    assert says in err
    assert "Traceback" not in err


def test_a_record_that_points_to_a_home_is_refused(trained: Lab, call: Any, tmp_path: Path) -> None:
    data = json.loads(trained.run.record.read_text())
    (tmp_path / "global_step_1").mkdir()
    trained.run.record.write_text(json.dumps(data | {"checkpoints": str(tmp_path)}))
    code, _, err = call("checkpoints", "r", "--keep", "last:1", "--yes")
    assert code == 2
    assert "correct it" in err
    assert (tmp_path / "global_step_1").is_dir()


def test_an_export_refuses_a_full_folder(trained: Lab, call: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    code, _, err = call("export", "r", "best", tmp_path / "out")
    assert code == 2
    assert "exists already" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes"]
