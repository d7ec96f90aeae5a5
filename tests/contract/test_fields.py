"""Our reading of verl's dataclasses against verl 0.9.1."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.config.layers import Origin
from flashrl_cli.errors import Location
from flashrl_cli.verl import compose
from flashrl_cli.verl.lint import keys as fields
from flashrl_cli.verl.overrides import Override, Places

pytestmark = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")

A, M, R = "actor_rollout_ref.actor", "actor_rollout_ref.model", "actor_rollout_ref.rollout"
PLACES = Places(name="run", data=Path("/data"), checkpoints=Path("/ckpt/run"))

# What omega_conf_to_dataclass of verl 0.9.1 did with each key, added to the composed tree.
REFUSED = (
    f"{A}.optim.lrr",
    f"{A}.learning_rate",
    f"{A}.policy_loss.dro",
    f"{A}.fsdp_config.mixed_precison.param_dtype",
    f"{A}.fsdp_config.qat.foo",
    f"{A}.checkpoint.content",
    f"{A}.profiler.tool_config.nsys.foo",
    "actor_rollout_ref.ref.model",
    "actor_rollout_ref.ref.fsdp_config.model_type",
    f"{R}.enable_sleep_mod",
    f"{R}.val_kwargs.max_tokens",
    f"{R}.disaggregation.foo",
    f"{M}.overide_config.attn_implementation",
    f"{M}.torch_dtype",
    "critic.ppo_infer_max_tokens_per_gpu",
    "critic.model.fsdp_config.param_offload",
    "reward.reward_model.rollout.foo",
    "skip.rollout_tq.dump",
    "algorithm.rollout_is",
    "distillation.foo",
)
TAKEN_AND_NOT_READ = (
    f"{A}.policy_loss.rollout_correction.los_type",
    f"{A}.qat.foo",
    "algorithm.rollout_correction.rollout_rs_threshold_lower",
)
"""Nodes that stay maps although their fields' types are dataclasses: verl takes any name and reads only those."""
ACCEPTED = (
    f"{A}.ppo_infer_max_token_len_per_gpu",
    f"{A}.policy_loss.rollout_correction.loss_type",
    f"{A}.fsdp_config.mixed_precision.param_dtype",
    f"{A}.fsdp_config.use_dynamic_bsz",
    f"{A}.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap",
    f"{A}.checkpoint.save_lora_only",
    f"{A}.optim.override_optimizer_config.foreach",
    "actor_rollout_ref.ref.optim.lr",
    f"{R}.enable_sleep_mode",
    f"{R}.limit_images",
    f"{R}.engine_kwargs.vllm.quantization",
    f"{R}.agent.agent_loop_manager_class",
    f"{R}.checkpoint_engine.engine_kwargs.nccl.rebuild_group",
    f"{M}.override_config.attn_implementation",
    f"{M}.target_parameters",
    "critic.ppo_infer_max_token_len_per_gpu",
    "critic.model.override_config.attn_implementation",
    "critic.fsdp.mixed_precision.param_dtype",
    "algorithm.gdpo_reward_keys",
)
MAPS = (
    "reward.reward_kwargs.max_resp_len",
    "reward.custom_reward_function.reward_kwargs.alpha",
    "global_profiler.global_tool_config.nsys.worker_nsight_options.gpu-metrics-device",
    "ray_kwargs.ray_init.num_gpus",
    "ray_kwargs.ray_init.runtime_env.env_vars.HF_HOME",
    "data.cache_dir",
    "trainer.wandb_proxy",
    "transfer_queue.backend.foo",
)
"""Never made a dataclass of."""


@cache
def tree() -> compose.Tree:
    return compose.tree([])


def refused(keys: tuple[str, ...]) -> list[str]:
    added = [Override(key, 1, Origin("set", Location(key)), added=True) for key in keys]
    return [str(problem.where) for problem in fields.added_key_problems(added, tree())]


def test_the_verdicts_are_verls():
    assert refused(REFUSED + ACCEPTED + MAPS) == list(REFUSED)


def test_names_that_verl_would_take_and_never_read_are_refused_too():
    assert refused(TAKEN_AND_NOT_READ) == list(TAKEN_AND_NOT_READ)


def test_an_added_key_may_be_a_list():
    added = Override("data.mine", (3, 1), Origin("set", Location("--set", key="x")), added=True)
    assert fields.added_key_problems([added], compose.tree([str(added)])) == []


def test_the_tree_may_hold_the_added_keys():
    wrong = Override(f"{A}.optimm.lr", 1, Origin("set", Location("--set", key="x")), added=True)
    (problem,) = fields.added_key_problems([wrong], compose.tree([str(wrong)]))
    assert problem.message == "verl's FSDPActorConfig has no optimm"
    assert f"did you mean {A}.optim" in (problem.hint or "")


def test_every_class_that_the_tree_names_is_found_and_knows_its_node():
    def walk(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        if "_target_" in node:
            yield prefix[:-1], node
        for name, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")

    nodes = dict(walk(tree().container()))
    classes = {key: fields.find(*node["_target_"].rsplit(".", 1)) for key, node in nodes.items()}
    assert [key for key, found in classes.items() if found is None] == []
    unknown = {key for key, found in classes.items() if found and set(nodes[key]) - set(found.fields)}
    # verl renames the reference policy's log_prob_* before it makes the dataclass (workers/engine_workers.py:545)
    assert unknown == {*fields.MAPS, "actor_rollout_ref.ref"}


def test_neither_verl_nor_torch_is_imported():
    code = (
        "import sys\n"
        "from flashrl_cli.config.layers import DEFAULT\n"
        "from flashrl_cli.verl import compose\nfrom flashrl_cli.verl.lint.keys import added_key_problems\n"
        "from flashrl_cli.verl.overrides import Override\n"
        "tree = compose.tree([])\n"
        f"keys = {[*REFUSED, *ACCEPTED]!r}\n"
        "added_key_problems([Override(key, 1, DEFAULT, added=True) for key in keys], tree)\n"
        "assert not {'torch', 'verl', 'ray', 'vllm', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
