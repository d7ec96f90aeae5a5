"""The plan as a script that a shell reads back word for word."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flashrl_cli.config.resolve import load_spec
from flashrl_cli.train.plan import LaunchPlan, build_plan, plan_script


def plan(root: Path = Path("/w"), name: str = "r") -> LaunchPlan:
    return build_plan(
        load_spec("tiny"),
        name=name,
        attempt=2,
        python="/venv/bin/python",
        runs_root=root / "runs",
        checkpoints_root=root / "checkpoints",
        data_root=root / "data",
    )


@pytest.mark.processes
@pytest.mark.parametrize("weird", ["plain", 'a"=0"', "a'; echo foo", "a b,c=[d]", "a\n0", "$HOME \\", "é→", "`x`!"])
def test_a_shell_reads_the_script_back(weird, tmp_path):
    root = tmp_path / weird
    found = plan(root=root, name="it's {1}")
    printer = tmp_path / "print.sh"
    printer.write_text('#!/bin/sh\npwd; printf "%s\\0" "$FLASHRL_PLUGIN_DIR" "$@"\n')
    script = plan_script(found, ["fits", weird]).replace("exec /venv/bin/python", f"exec sh {printer}")
    out = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    plugins, *words = out.removeprefix(f"{found.cwd}\n").split("\0")[:-1]
    assert plugins == str(found.attempt_paths.plugins)
    assert words[:2] == list(found.argv[1:3])
    assert sorted(words[2:]) == sorted(found.argv[3:])
    assert found.attempt_paths.plugins.is_dir()


def test_it_says_what_it_is_by_theme():
    text = plan_script(plan(), ["memory: fits\n12 GiB of 80"])
    assert text.startswith(
        "#!/bin/sh\n"
        "# flashrl preset tiny, run r, attempt 2\n"
        "# prepared:tiny, grpo, int8 rollouts, truncated importance sampling at 2\n"
        "# memory: fits\n"
        "# 12 GiB of 80\n"
    )
    themes = [line for line in text.splitlines() if line.startswith("# ")]
    assert themes.index("# environment") < themes.index("# data") < themes.index("# rollout") < themes.index("# Hydra")
    assert "# checkpoints: /w/checkpoints/tiny/r" in themes


def test_quotes_of_hydra_stay_readable():
    assert "\"trainer.v1.sampler.custom_sampler.path='pkg://flashrl_cli.plugins.sampler'\"" in plan_script(plan())
