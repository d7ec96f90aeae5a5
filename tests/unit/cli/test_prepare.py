"""`flashrl prepare` as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import files, paths
from flashrl_cli.cli.app import main

PROBE = """
import json, sys, time
from flashrl_cli.cli.app import main
sys.argv = ["flashrl", *sys.argv[1:]]
try:
    main()
finally:
    print(json.dumps({"modules": sorted(sys.modules)}), file=sys.stderr)
"""
HEAVY = {"pyarrow", "datasets", "torch", "transformers", "pandas", "numpy", "verl", "huggingface_hub"}


def flashrl(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["flashrl", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def fresh(*words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run the command in a fresh interpreter; returns what it printed, and its modules."""
    command = [sys.executable, "-c", PROBE, *words]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    return done, json.loads(done.stderr.splitlines()[-1])


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text('{"question": "q?", "answer": "#### 1"}\n')
    return folder


def test_a_person_gets_a_table(raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert flashrl("prepare", "gsm8k", "--source", str(raw), monkeypatch=monkeypatch) == 0
    out, err = capsys.readouterr()
    assert [line.split()[:3] for line in out.splitlines() if "gsm8k" in line] == [
        ["gsm8k", "train", "1"],
        ["gsm8k", "test", "1"],
    ]
    assert "gsm8k: prepared in " in err
    assert flashrl("prepare", "gsm8k", "--source", str(raw), monkeypatch=monkeypatch) == 0
    assert "gsm8k: up to date in " in capsys.readouterr().err


def test_a_program_gets_one_document(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASHRL_DATA", str(tmp_path / "data"))
    assert flashrl("prepare", "arith", "--limit", "2", "--seed", "3", "--json", monkeypatch=monkeypatch) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    (result,) = document["datasets"]
    assert (result["status"], result["dataset"]) == ("prepared", "arith")
    assert result["path"] == str(tmp_path / "data/arith")
    assert result["options"] == {"limit": 2, "seed": 3}
    assert result["splits"]["test"]["rows"] == 2


def test_out_limit_and_no_dedupe_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "aime.json"
    source.write_text(json.dumps([{"problem": "p", "answer": "1"}] * 3))
    words = ["prepare", "aime-2024", "--source", str(source), "--out", str(tmp_path / "o"), "--no-dedupe", "--json"]
    assert flashrl(*words, "--limit", "2", monkeypatch=monkeypatch) == 0
    (result,) = json.loads(capsys.readouterr().out)["datasets"]
    assert result["path"] == str(tmp_path / "o")
    assert result["options"] == {"limit": 2, "dedupe": False}
    assert result["splits"]["test"]["rows"] == 2


def test_bad_rows_end_with_2_and_their_places(
    raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw / "test.jsonl").write_text('{"question": "q?", "answer": "#### 1"}\n{"question": "q?"}\n')
    assert flashrl("prepare", "gsm8k", "--source", str(raw), monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "error: gsm8k: 1 row cannot be used; nothing was written" in err
    assert f"{raw}/test.jsonl:2: no column 'answer' (the row has: question)" in err
    assert "hint: " in err


@pytest.mark.parametrize("words", [["nonsense"], ["gsm8k", "arith", "--out", "x"], ["gsm8k", "--limit", "0"], []])
def test_misuse_ends_with_2(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert flashrl("prepare", *words, monkeypatch=monkeypatch) == 2


@pytest.mark.processes
def test_up_to_date_is_told_in_a_moment_and_without_heavy_imports(raw: Path) -> None:
    words = ["prepare", "gsm8k", "--source", str(raw)]
    first, _ = fresh(*words)
    again, seen = fresh(*words)
    assert (first.returncode, again.returncode) == (0, 0)
    assert "up to date" in again.stderr
    assert not HEAVY & set(seen["modules"])


@pytest.mark.processes
def test_all_of_gsm8k(gsm8k: Path) -> None:
    done, _ = fresh("prepare", "gsm8k", "--source", str(gsm8k), "--json")
    (result,) = json.loads(done.stdout)["datasets"]
    assert {split: entry["rows"] for split, entry in result["splits"].items()} == {"train": 7473, "test": 1319}


@pytest.mark.processes
def test_without_a_network_the_environment_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    done, _ = fresh("prepare", "gsm8k", "--offline")
    assert done.returncode == 3
    assert "error: cannot fetch openai/gsm8k from the hub" in done.stderr
    assert "hint: --source PATH" in done.stderr


def test_a_second_command_waits_for_the_first(
    raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And finds its work done; a set of another name is not waited for."""
    inside, held = threading.Event(), threading.Event()

    def first() -> None:
        with files.alone(paths.data_root() / "gsm8k", lambda: None):
            inside.set()
            held.wait(20)

    def waiting(path: Path, told: Callable[[], None]) -> AbstractContextManager[bool]:
        def tell() -> None:
            told()
            held.set()

        return alone(path, tell)

    alone = files.alone
    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(20)
    monkeypatch.setattr(files, "alone", waiting)
    beside = ("--out", str(raw.parent / "elsewhere"))
    assert flashrl("prepare", "gsm8k", "--source", str(raw), *beside, monkeypatch=monkeypatch) == 0
    assert "waiting" not in capsys.readouterr().err
    assert flashrl("prepare", "gsm8k", "--source", str(raw), monkeypatch=monkeypatch) == 0
    thread.join(20)
    err = capsys.readouterr().err
    assert err.index("another command prepares") < err.index("gsm8k: prepared in")


@pytest.fixture
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CSV file in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHRL_DATA", str(tmp_path / "data"))
    path = tmp_path / "sums.csv"
    path.write_text("q,a\n" + "".join(f"1 + {n}?,so {n + 1}\n" for n in range(20)), encoding="utf-8")
    return path


def test_data_of_ones_own_by_options_and_by_a_file(
    sums: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--map", "prompt=q,answer=a", "--answer-regex", "so (.+)", "--reward", "gsm8k", "--system", "Add."]
    words += ["--prompt-template", "{prompt}", "--split", "0.8"]
    assert flashrl("prepare", "--source", "sums.csv", *words, "--init", "mine.yaml", monkeypatch=monkeypatch) == 0
    assert flashrl("prepare", "mine", "--source", "sums.csv", *words, "--json", monkeypatch=monkeypatch) == 0
    (result,) = json.loads(capsys.readouterr().out)["datasets"]
    assert {split: entry["rows"] for split, entry in result["splits"].items()} == {"train": 16, "test": 4}
    assert flashrl("prepare", "--recipe", "mine.yaml", "--json", monkeypatch=monkeypatch) == 0
    (again,) = json.loads(capsys.readouterr().out)["datasets"]
    assert (again["status"], again["recipe"]) == ("up to date", result["recipe"])


def test_rows_are_shown(sums: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--map", "prompt=q,answer=a", "--reward", "exact"]
    assert flashrl("prepare", "mine", "--source", "sums.csv", *words, monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    assert flashrl("prepare", "show", "mine", "--n", "1", "--split", "test", monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "── test 1, scored as flashrl/exact" in out
    assert "    user: 1 + " in out
    assert flashrl("prepare", "show", "mine", "--json", "--n", "2", monkeypatch=monkeypatch) == 0
    assert len(json.loads(capsys.readouterr().out)["examples"]) == 2
    assert flashrl("prepare", "show", "nothing", monkeypatch=monkeypatch) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mine", "--source", "sums.csv", "--map", "prompt=x"], "no column 'x' for prompt"),
        (["mine", "--recipe", "no.yaml"], "no.yaml: cannot be read: No such file"),
        (["--init", "mine.yaml"], "--init looks at a source"),
        (["gsm8k", "--system", "x"], "--system: gsm8k has its own recipe"),
    ],
)
def test_what_is_wrong_with_data_of_ones_own(
    words: list[str], said: str, sums: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flashrl("prepare", *words, monkeypatch=monkeypatch) == 2
    assert said in capsys.readouterr().err
    assert not (sums.parent / "data").exists()
    assert not (sums.parent / "mine.yaml").exists()
