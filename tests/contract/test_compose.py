"""Our overrides against verl's own configuration tree."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.config.layers import DEFAULT, Origin, leaves
from flashrl_cli.config.spec import FilterGroups, Overlong, RunSpec
from flashrl_cli.errors import EnvironmentNotReady, InputError, Location
from flashrl_cli.train.plan import build_plan
from flashrl_cli.verl import compose
from flashrl_cli.verl.lint import check_overrides
from flashrl_cli.verl.overrides import AUTO, TABLE, Override, Places, overrides
from tests.specs import load_spec

pytestmark = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")

PLACES = Places(name="run", data=Path("/data"), checkpoints=Path("/ckpt/run"))


def test_composed_values_arrive():
    tree = dict(leaves(compose.compose([str(o) for o in overrides(load_spec("dapo-32b", tis="8"), PLACES)])))
    assert tree["algorithm.rollout_correction.rollout_is_threshold"] == 8.0
    assert tree["trainer.logger"] == ["console", "file"]
    assert tree["reward.reward_kwargs.overlong_buffer_cfg.len"] == 4096


def test_our_defaults_are_verls():
    tree = dict(leaves(compose.compose([])))
    parts: dict[str, Any] = {name: info.annotation for name, info in RunSpec.model_fields.items()}
    parts |= {"algorithm.filter_groups": FilterGroups, "reward.overlong": Overlong}
    ours, theirs = {}, {}
    for entry in TABLE:
        part, _, name = entry.field.rpartition(".")
        field = parts[part].model_fields[name]
        if not (field.is_required() or field.default in (None, AUTO) or entry.always or entry.added):
            ours[entry.field], theirs[entry.field] = field.default, tree[entry.key]
    assert ours == theirs
    assert len(ours) >= 20


def test_everything_wrong_is_reported_with_the_nearest_key():
    sets = [
        "verl.actor_rollout_ref.actor.ulysses_sequence_paralel_size=2",
        "verl.+trainer.val_only=false",
        "verl.trainer.nonsense.x=1",
        "verl.actor_rollout_ref.actor.imp_ratio_cap=2",
        "verl.data.train_batch_size=4",
        "verl.++trainer.val_onli=false",
    ]
    resolved = load_spec("dapo-32b", sets=sets)
    with pytest.raises(InputError) as caught:
        check_overrides(resolved, overrides(resolved, PLACES))
    found = {str(p.where): (p.message, p.hint or "") for p in caught.value.problems}
    assert len(caught.value.problems) == len(found) == len(sets)
    typo = found["--set verl.actor_rollout_ref.actor.ulysses_sequence_paralel_size"]
    assert "did you mean actor_rollout_ref.actor.ulysses_sequence_parallel_size" in typo[1]
    assert found["--set verl.+trainer.val_only"] == (
        "verl has a key trainer.val_only",
        "write it without the +",
    )
    assert "verl has no key trainer.nonsense.x" in found["--set verl.trainer.nonsense.x"][0]
    assert "was a fork's key" in found["--set verl.actor_rollout_ref.actor.imp_ratio_cap"][0]
    assert found["--set verl.data.train_batch_size"][1] == "--set data.train_batch_size=…"


def test_a_choice_of_engine_changes_the_tree():
    megatron = Override("model_engine", "megatron", DEFAULT)
    key = Override("actor_rollout_ref.actor.megatron.use_mbridge", True, DEFAULT)
    wrong = Override("actor_rollout_ref.actor.fsdp_config.fsdp_size", 1, Origin("set", Location("--set", key="x")))
    assert compose.attempt([Override("actor_rollout_ref.rollout.name", "vllm", DEFAULT), megatron, key])[1] == []
    tree, found = compose.attempt([megatron, key, wrong])
    assert [p.where for p in found] == [Location("--set", key="x")]
    assert tree is not None


def test_what_hydra_alone_can_judge_is_reported_in_its_words():
    _, (problem,) = compose.attempt([Override("model_engine", "nothing", Origin("set", Location("--set", key="x")))])
    assert "model_engine/nothing" in problem.message
    assert problem.where == Location("--set", key="x")


def test_without_verl(monkeypatch):
    monkeypatch.setattr(compose, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentNotReady, match="verl is not installed"):
        compose.attempt([])


def test_neither_torch_nor_verl_is_imported():
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from flashrl_cli.config.resolve import Options, read_spec\n"
        "from flashrl_cli.train.plan import build_plan\n"
        "from flashrl_cli.verl.lint import check_overrides\n"
        "r = read_spec('dapo-32b', Options(tis='8')); p = Path('/w')\n"
        "plan = build_plan(r, name='x', attempt=1, python='p', runs_root=p, checkpoints_root=p, data_root=p)\n"
        "check_overrides(r, plan.overrides)\n"
        "assert not {'torch', 'verl', 'ray', 'vllm', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hydra_keeps_to_the_attempts_folder(tmp_path):
    """A stand-in with main_ppo's own decorator: the real one imports torch before it fails."""
    program = tmp_path / "app.py"
    program.write_text(
        "import hydra, os\n"
        f"@hydra.main(config_path={str(compose.config_folder())!r}, config_name='ppo_trainer', version_base=None)\n"
        "def main(config):\n"
        "    print(os.getcwd(), config.trainer.experiment_name)\n"
        "main()\n"
    )
    work = tmp_path / "work"
    work.mkdir()
    plan = build_plan(
        load_spec("tiny"),
        name="it's, a=name",
        attempt=1,
        python=sys.executable,
        runs_root=tmp_path / "runs",
        checkpoints_root=tmp_path,
        data_root=tmp_path,
    )
    command = [sys.executable, str(program), *plan.argv[3:]]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == f"{work} it's, a=name\n"
    assert list(work.iterdir()) == []
    assert [path.name for path in (plan.cwd / "hydra").iterdir()] == ["app.log"]
