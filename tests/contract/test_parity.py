"""verl's configuration takes what benchmarks.parity asks for."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from benchmarks import parity

from flashrl_cli.config.resolve import Options
from flashrl_cli.train import launch

RUNS = [
    pytest.param(profile, setting, id=f"{profile} {setting}")
    for profile, settings in (("qwen", ("bf16", "hard-int8-kv8-tis2")), ("smollm2", ("fp8-tis2",)), ("tiny", ("int8",)))
    for setting in settings
]


@pytest.mark.parametrize(("profile", "setting"), RUNS)
def test_no_rule_is_broken(profile: str, setting: str, tmp_path: Path) -> None:
    study = parity.Study(parity.options(["--profile", profile, "--state", str(tmp_path), "--jobs", "3"]))
    study.base_model = study.profile.model
    run = study.by_name[f"{setting}-seed1"]
    command = study.train_command(run, 60)
    sets = [word for before, word in pairwise(command) if before == "--set"]
    options = Options(rollout=run.setting.rollout, tis=run.setting.tis, sets=sets)
    assert launch.check(study.profile.preset, options) == []
