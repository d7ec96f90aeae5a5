"""`flashrl presets`, as people and programs call it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from flashrl_cli.cli.app import app
from flashrl_cli.errors import InputError

RUNNER = CliRunner()


def out(*arguments: str) -> str:
    result = RUNNER.invoke(app, ["presets", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_ls():
    assert "Qwen/Qwen2.5-32B" in out("ls")
    document = json.loads(out("ls", "--json"))
    assert document["schema_version"] == 1
    assert {"dapo-32b", "gsm8k-0.5b", "gsm8k-tiny-cpu", "tiny"} <= {preset["name"] for preset in document["presets"]}


def test_show():
    text = out("show", "dapo-32b", "--tis", "8", "--set", "rollout.n=4")
    assert "--tis" in text
    assert "presets/dapo-32b.yaml:" in text
    document = json.loads(out("show", "dapo-32b", "--tis", "8", "--set", "rollout.n=4", "--json"))
    assert (document["values"]["correction.cap"], document["origins"]["correction.cap"]) == (8.0, "--tis")
    assert (document["values"]["rollout.n"], document["origins"]["rollout.n"]) == (4, "--set rollout.n")
    assert document["values"].keys() == document["origins"].keys()


def test_show_refuses_with_all_problems():
    with pytest.raises(InputError) as caught:
        out("show", "tiny", "--set", "a=1", "--rollout", "int4")
    assert len(caught.value.problems) == 2
