"""The plan: complete, pure, printable, and a script that a shell reads back word for word."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from flashrl_cli.config.layers import leaves
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.train.plan import LaunchPlan, default_name, plan_document, plan_script
from tests.specs import load_spec
from tests.unit.train.builders import plan_of


def plan(preset: str = "tiny", root: Path = Path("/w"), name: str = "r", tis: str | None = None) -> LaunchPlan:
    return plan_of(load_spec(preset, tis=tis), root, name=name, attempt=2, python="/venv/bin/python")


def test_argv_is_verls_entry_point_with_the_overrides_and_hydras_settings() -> None:
    found = plan()
    assert found.argv[:3] == ("/venv/bin/python", "-m", "verl.trainer.main_ppo")
    assert found.argv[3:-2] == tuple(str(override) for override in found.overrides)
    assert found.argv[-2:] == ("hydra.run.dir=/w/runs/r/attempt_2/hydra", "hydra.output_subdir=null")


def test_the_script_says_over_which_tokens_log_probs_are() -> None:
    kept = load_spec("tiny", tis="2", sets=["rollout.top_k=20", "correction.support=kept"])
    text = plan_script(plan_of(kept, Path("/w"), name="r", attempt=1, python="/venv/bin/python"))
    assert "int8 rollouts, truncated importance sampling at 2, over the tokens that were kept\n" in text


def test_places() -> None:
    found = plan("dapo-32b")
    assert found.cwd == Path("/w/runs/r/attempt_2")
    assert "trainer.default_local_dir=/w/checkpoints/DAPO/r" in found.argv
    assert "trainer.experiment_name=r" in found.argv
    assert "data.train_files=/w/data/dapo-math-17k/train.parquet" in found.argv
    assert found.env["VERL_FILE_LOGGER_PATH"] == "/w/runs/r/attempt_2/metrics.jsonl"


def test_planning_is_repeatable_and_writes_nothing(tmp_path: Path) -> None:
    assert plan(root=tmp_path) == plan(root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_document_is_plain_data() -> None:
    document = plan_document(plan(tis="2"))
    assert json.loads(json.dumps(document)) == document
    assert document["schema_version"] == 1
    assert (document["preset"], document["name"], document["attempt"]) == ("tiny", "r", 2)
    assert "algorithm.rollout_correction.rollout_is_threshold=2.0" in document["overrides"]
    assert set(document["files"]) == {"run", "attempt", "log", "metrics", "plugins", "plan", "checkpoints"}
    assert not any(override.startswith("hydra.") for override in document["overrides"])
    assert RunSpec.model_validate(document["spec"]) == plan(tis="2").spec
    assert document["origins"]["correction.cap"] == "--tis"
    assert document["origins"].keys() == dict(leaves(document["spec"])).keys()


@pytest.mark.parametrize(
    ("preset", "rollout", "tis", "sets", "name"),
    [
        ("tiny", None, None, (), "tiny-int8-tis2"),
        ("dapo-32b", None, None, (), "dapo-32b-bf16"),
        ("dapo-32b", "fp8-block", "8", (), "dapo-32b-fp8-block-tis8"),
        ("dapo-32b", "int8", "1.5", (), "dapo-32b-int8-tis1.5"),
        ("tiny", "bf16", "off", ("rotation=off",), "tiny-bf16"),
        ("tiny", None, None, ("rotation=off",), "tiny-int8-plain-tis2"),
        ("tiny", None, None, ("rotation=32",), "tiny-int8-rot32-tis2"),
        ("tiny", None, None, ("kv_cache=int8",), "tiny-int8-kvint8-tis2"),
        (
            "tiny", None, None, ("kv_cache=fp8", "lm_head_fp32=true", "profile=/p.safetensors", "mix=0.25"),
            "tiny-int8-kv8-head32-smooth-mix0.25-tis2",
        ),
    ],
)  # fmt: skip
def test_default_names(preset: str, rollout: str | None, tis: str | None, sets: tuple[str, ...], name: str) -> None:
    spec = load_spec(preset, rollout=rollout, tis=tis, sets=[f"rollout.{text}" for text in sets]).spec
    assert default_name(spec.name, spec) == name


@pytest.mark.processes
@pytest.mark.parametrize("weird", ["plain", 'a"=0"', "a'; echo foo", "a b,c=[d]", "a\n0", "$HOME \\", "é→", "`x`!"])
def test_a_shell_reads_the_script_back(weird: str, tmp_path: Path) -> None:
    found = plan(root=tmp_path / weird, name="it's {1}")
    printer = tmp_path / "print.sh"
    printer.write_text('#!/bin/sh\npwd; printf "%s\\0" "$FLASHRL_PLUGIN_DIR" "$@"\n')
    script = plan_script(found, ["fits", weird]).replace("exec /venv/bin/python", f"exec sh {printer}")
    out = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    plugins, *words = out.removeprefix(f"{found.cwd}\n").split("\0")[:-1]
    assert plugins == str(found.attempt_paths.plugins)
    assert words[:2] == list(found.argv[1:3])
    assert sorted(words[2:]) == sorted(found.argv[3:])
    assert found.attempt_paths.plugins.is_dir()


def test_the_script_begins_with_what_it_is_and_orders_the_overrides_by_theme() -> None:
    text = plan_script(plan(), ["memory: fits\n12 GiB of 80"])
    assert text.startswith(
        "#!/bin/sh\n"
        "# flashrl preset tiny, run r, attempt 2\n"
        "# prepared:tiny, grpo, int8 rollouts, truncated importance sampling at 2\n"
        "# rotation of inputs: auto (default)\n"
        "# memory: fits\n"
        "# 12 GiB of 80\n"
    )
    themes = [line for line in text.splitlines() if line.startswith("# ")]
    assert themes.index("# environment") < themes.index("# data") < themes.index("# rollout") < themes.index("# Hydra")
    assert "# checkpoints: /w/checkpoints/tiny/r" in themes
    assert "\"trainer.v1.sampler.custom_sampler.path='pkg://flashrl_cli.plugins.sampler'\"" in text, (
        "quotes stay readable"
    )
