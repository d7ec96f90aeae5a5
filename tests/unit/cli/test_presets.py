"""`flashrl presets`, as people and programs call it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from flashrl_cli import files, paths
from flashrl_cli.cli.app import app
from flashrl_cli.config.presets import names
from flashrl_cli.config.resolve import Options
from flashrl_cli.errors import EnvironmentNotReady, InputError, Problem
from flashrl_cli.train import diff, launch

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def out(*arguments: str) -> str:
    result = RUNNER.invoke(app, ["presets", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def document(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out(*arguments, "--json"))
    assert found["schema_version"] == 1
    return found


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line]


def test_ls():
    lines = out("ls").splitlines()
    assert lines[0].split() == ["name", "model", "algorithm", "rollout", "TIS", "GPUs", "description"]
    (line,) = (line for line in lines if line.startswith("dapo-32b "))
    assert line.split()[:7] == ["dapo-32b", "Qwen/Qwen2.5-32B", "grpo", "bf16", "4", "×", "8"]
    (line,) = (line for line in lines if line.startswith("tiny "))
    assert line.split()[:6] == ["tiny", "prepared:tiny", "grpo", "int8", "2", "CPU"]
    assert {"dapo-32b", "gsm8k-0.5b", "gsm8k-tiny-cpu", "tiny"} <= {one["name"] for one in document("ls")["presets"]}


def test_ls_wraps_descriptions_into_their_column(folder):
    (folder / "presets").mkdir()
    (folder / "presets" / "long.yaml").write_text(f"extends: tiny\ndescription: {'word ' * 100}\n")
    lines = out("ls").splitlines()
    column = lines[0].index("description")
    first = next(number for number, line in enumerate(lines) if line.startswith("long "))
    assert "".join(line[column:] for line in lines[first : first + 6]).count("word") > 80
    assert lines[first + 1][:column].strip() == ""
    assert max(map(len, lines)) <= 160


def test_ls_warns_of_presets_that_do_not_load(folder):
    (folder / "presets").mkdir()
    (folder / "presets" / "broken.yaml").write_text("a: 1\n")
    result = RUNNER.invoke(app, ["presets", "ls"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "flashrl presets check broken" in result.stderr


def test_show_prints_keys_and_values_by_part():
    text = out("show", "dapo-32b", "--tis", "8", "--set", "rollout.n=4")
    assert ["rollout.n", "4"] in rows(text)
    assert ["algorithm.lr", "1e-6"] in rows(text)
    assert ["critic.path", "null"] in rows(text)
    blocks = text.strip().split("\n\n")
    parts = [{line.split()[0].partition(".")[0] for line in block.splitlines()} for block in blocks]
    assert [len(part) for part in parts] == [1] * len(set().union(*parts))
    assert "presets/" not in text


def test_show_origins():
    found = rows(out("show", "tiny", "--origins", "--tis", "8", "--set", "rollout.n=4"))
    assert ["correction.cap", "8.0", "--tis"] in found
    assert ["rollout.n", "4", "--set", "rollout.n"] in found
    assert ["critic.lr", "1e-5", "default"] in found
    assert ["name", "tiny", "presets/tiny.yaml:1"] in found
    (row,) = (row for row in found if row[0] == "rollout.max_model_len")
    assert row[2:] == ["derived:", "data.max_prompt_length", "+", "data.max_response_length"]


def test_show_as_data_always_has_values_and_origins():
    found = document("show", "dapo-32b", "--tis", "8", "--set", "rollout.n=4")
    assert (found["values"]["correction.cap"], found["origins"]["correction.cap"]) == (8.0, "--tis")
    assert (found["values"]["rollout.n"], found["origins"]["rollout.n"]) == (4, "--set rollout.n")
    assert found["values"].keys() == found["origins"].keys()
    assert set(found) == {"schema_version", "preset", "values", "origins"}
    assert set(document("show", "tiny", "--verl")) == {*found, "verl"}


def test_show_verl_is_word_for_word_what_a_dry_run_launches():
    dry = RUNNER.invoke(app, ["train", "--preset", "tiny", "--dry-run", "--json"], catch_exceptions=False)
    overrides = json.loads(dry.stdout)["overrides"]
    assert out("show", "tiny", "--verl").splitlines() == overrides
    launched = document("show", "tiny", "--verl")["verl"]
    assert [one["override"] for one in launched] == overrides
    lines = out("show", "tiny", "--verl", "--origins").splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("trainer.device=")] == ["presets/base/cpu.yaml:5"]


def test_show_refuses_with_all_problems():
    with pytest.raises(InputError) as caught:
        out("show", "tiny", "--set", "a=1", "--rollout", "int3")
    assert len(caught.value.problems) == 2


def test_diff():
    lines = out("diff", "tiny", "tiny", "--rollout", "bf16", "--set", "verl.data.seed=3").splitlines()
    assert lines == [
        "tiny → tiny",
        "",
        "rollout.precision  int8 → bf16  --rollout",
        "",
        "verl.data.seed  – → 3  --set verl.data.seed",
        "",
        "environment",
        'FLASHRL_ROLLOUT  {"bf16_transfer": true} → –',
    ]


def test_diff_of_environments():
    text = out("diff", "tiny", "tiny", "--set", "resources.platform=cuda")
    assert ["VERL_PLATFORM", "cpu", "→", "–"] in rows(text.partition("\nenvironment\n")[2])


def test_diff_of_overrides():
    lines = out("diff", "tiny", "tiny", "--verl", "--set", "trainer.steps=3").splitlines()
    assert lines == ["tiny → tiny", "", "trainer.total_training_steps  15 → 3"]


def test_diff_as_data():
    found = document("diff", "tiny", "tiny", "--set", "trainer.steps=3")
    assert found["values"] == [{"key": "trainer.steps", "a": 15, "b": 3, "origin": "--set trainer.steps"}]
    assert [one["key"] for one in found["overrides"]] == ["trainer.total_training_steps"]
    assert found["environment"] == []


def test_diff_of_nothing():
    assert out("diff", "tiny", "tiny") == "no difference between tiny and tiny\n"


def recorded(run: str, **changes: Any) -> None:
    plan = diff.document_of("tiny", Options()) | changes
    files.write_json(paths.runs_root() / run / "attempt_1" / "plan.json", plan)


def test_diff_with_a_run():
    recorded("demo")
    assert out("diff", "demo", "tiny") == "no difference between demo and tiny\n"
    assert "trainer.steps  15 → 3" in out("diff", "demo", "tiny", "--set", "trainer.steps=3")


def test_diff_says_when_overrides_alone_differ():
    plan = diff.document_of("tiny", Options())
    recorded("demo", overrides=plan["overrides"][1:])
    result = RUNNER.invoke(app, ["presets", "diff", "demo", "tiny"], catch_exceptions=False)
    assert result.stdout.startswith("no difference")
    assert "--verl" in result.stderr


def test_copy_names_the_next_command(folder):
    result = RUNNER.invoke(app, ["presets", "copy", "tiny", "mine"], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (0, "mine.yaml\n")
    assert "flashrl train --preset mine.yaml" in result.stderr
    assert out("diff", "tiny", "mine.yaml") == "no difference between tiny and mine.yaml\n"
    with pytest.raises(InputError, match="exists"):
        out("copy", "tiny", "mine")
    assert out("copy", "tiny", "mine", "--force") == "mine.yaml\n"


def test_schema_is_json():
    assert json.loads(out("schema"))["title"] == "flashrl preset"


@pytest.fixture
def verdicts(monkeypatch):
    """Presets whose name begins with "bad" have a problem, without asking verl."""
    asked: list[tuple[str, Options]] = []

    def check(preset: str, options: Options) -> list[Problem]:
        asked.append((preset, options))
        return [Problem("wrong", "f.yaml:1", "right"), Problem("bare")] if preset.startswith("bad") else []

    monkeypatch.setattr(launch, "check", check)
    return asked


def test_check_asks_for_every_preset_with_the_options(verdicts):
    assert out("check", "--tis", "off") == "".join(f"✓ {name}\n" for name in names())
    assert verdicts == [(name, Options(tis="off")) for name in names()]


def test_check_prints_all_problems_and_refuses(verdicts):
    result = RUNNER.invoke(app, ["presets", "check", "bad", "tiny"])
    assert result.stdout == "✗ bad\n    f.yaml:1: wrong\n      hint: right\n    bare\n✓ tiny\n"
    assert isinstance(result.exception, InputError)
    assert result.exception.message == "1 of 2 presets refused: bad"


def test_check_as_data(verdicts):
    result = RUNNER.invoke(app, ["presets", "check", "bad", "tiny", "--json"])
    bad, good = json.loads(result.stdout)["presets"]
    assert bad["problems"][0] == {"message": "wrong", "where": "f.yaml:1", "hint": "right"}
    assert (bad["ok"], good) == (False, {"preset": "tiny", "ok": True, "problems": []})
    assert isinstance(result.exception, InputError)


def test_check_without_verl_is_no_verdict(monkeypatch):
    monkeypatch.setattr("flashrl_cli.verl.compose.find_spec", lambda name: None)
    with pytest.raises(EnvironmentNotReady):
        RUNNER.invoke(app, ["presets", "check", "tiny"], catch_exceptions=False)
