"""`varlen` on a CUDA GPU: within bf16 rounding of what each sequence gives alone, and whole runs that train with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flashrl_cli.contract import read_handshakes

if TYPE_CHECKING:
    import torch

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
LENGTHS = (1, 2, 7, 1000, 33)
HEADS = [(9, 3), (8, 1), (4, 4)]
"""Query heads and the key-value heads that they share."""
LIMIT = 2.0
"""How many times sdpa's error the error of `varlen` may be: both round to bf16, in different orders."""


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of one sequence in float32, as its formula says it."""
    import torch

    shared = query.shape[1] // key.shape[1]
    query, key, value = query.transpose(0, 1), *(p.transpose(0, 1).repeat_interleave(shared, 0) for p in (key, value))
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ value).transpose(0, 1)


def by_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def one_by_one(attend: Any, *parts: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([attend(*one) for one in zip(*(part.split(LENGTHS) for part in parts), strict=True)])


def positions() -> torch.Tensor:
    import torch

    return torch.cat([torch.arange(length, device="cuda") for length in LENGTHS])[None]


def packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from flashrl_cli.plugins.attention import flash, packing_of

    return flash(query, key, value, packing_of(positions()), None)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("heads", "shared"), HEADS)
def test_the_kernel_is_as_exact_as_sdpa(heads: int, shared: int, size: int) -> None:
    import torch

    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    drawn = [torch.randn(tokens, count, size, device="cuda").bfloat16() for count in (heads, shared, shared)]
    weights = torch.randn(tokens, heads, size, device="cuda").bfloat16()

    def outputs_and_gradients(attend: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        parts = [part.detach().to(dtype, copy=True).requires_grad_() for part in drawn]
        found = attend(*parts)
        (found * weights.to(dtype)).sum().backward()
        return [found.detach().float(), *(part.grad.float() for part in parts)]

    wanted = outputs_and_gradients(lambda *parts: one_by_one(exact, *parts), torch.float32)
    ours = outputs_and_gradients(packed, torch.bfloat16)
    sdpa = outputs_and_gradients(lambda *parts: one_by_one(by_sdpa, *parts), torch.bfloat16)
    for name, right, mine, other in zip(("output", "query", "key", "value"), wanted, ours, sdpa, strict=True):
        error, usual = ((found - right).norm() / right.norm() for found in (mine, other))
        print(f"{heads}/{shared} heads of {size}, {name}: varlen {error:.2e}, sdpa {usual:.2e}")
        assert 0 < error < LIMIT * usual, name
        assert usual < 2**-7, "the comparison is with the same function"


def network(family: str, attention: str) -> Any:
    """A small model with float32 parameters, the same for each attention."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, hidden_size=384, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, vocab_size=512, max_position_embeddings=2048, attn_implementation=attention,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).cuda().train()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_of_packed_sequences_is_as_exact_as_of_single_ones(family: str) -> None:
    """Logits and gradients under autocast with float32 parameters, recomputation included, in two micro-batches."""
    import torch

    from flashrl_cli.plugins import attention

    attention.register()
    parts = torch.randint(512, (sum(LENGTHS),), device="cuda").split(LENGTHS)
    weights = torch.randn(sum(LENGTHS), 512, device="cuda")

    def logits_and_gradients(name: str, *, together: bool, autocast: bool) -> list[torch.Tensor]:
        model = network(family, name)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                if together:
                    found = model(input_ids=torch.cat(parts)[None], position_ids=positions(), use_cache=False).logits[0]
                else:
                    found = torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])
            (found.float() * weights).sum().backward()
        return [found.detach().float(), *(parameter.grad for parameter in model.parameters())]

    wanted = logits_and_gradients("eager", together=False, autocast=False)
    ours = logits_and_gradients("varlen", together=True, autocast=True)
    sdpa = logits_and_gradients("sdpa", together=False, autocast=True)
    errors = []
    for right, mine, other in zip(wanted, ours, sdpa, strict=True):
        errors.append([float((found - right).norm() / right.norm()) for found in (mine, other)])
        assert errors[-1][0] < LIMIT * errors[-1][1] + 1e-3
    print(f"{family}: relative errors of logits and gradients, varlen and sdpa: {errors}")


def trained(folder: Path, policy: Path, *options: str) -> tuple[list[str], list[dict[str, Any]], Path]:
    """`gsm8k-0.5b` for two steps on one GPU with the tiny policy and sums: the plan, the steps, the checkpoints."""
    sets = (
        f"model.path={policy}", "data.train=tiny", "data.val=tiny", "resources.gpus_per_node=1", "trainer.steps=2",
        "trainer.save_every=2", "trainer.validate_every=-1", "trainer.validate_before=false",
        "data.train_batch_size=16", "data.max_prompt_length=64", "data.max_response_length=16",
        "algorithm.mini_batch_size=8", "rollout.gpu_memory_utilization=0.2", "rollout.max_num_seqs=64",
        "rollout.enforce_eager=true",
        "verl.actor_rollout_ref.actor.fsdp_config.use_torch_compile=false", "verl.critic.fsdp.use_torch_compile=false",
        "verl.actor_rollout_ref.rollout.agent.num_workers=1", "verl.reward.num_workers=1",
        "verl.transfer_queue.backend.SimpleStorage.num_data_storage_units=1", "verl.data.dataloader_num_workers=0",
        "verl.ray_kwargs.ray_init.num_cpus=32", "verl.+ray_kwargs.ray_init.object_store_memory=2147483648",
        "verl.+ray_kwargs.ray_init.include_dashboard=false", *options,
    )  # fmt: skip
    places = {f"FLASHRL_{name.upper()}": str(folder / name) for name in ("runs", "checkpoints")}
    env = {**os.environ, **places, "FLASHRL_DATA": str(policy.parents[1]), "CI": "1"}
    command = [sys.executable, "-m", "flashrl_cli", "train", "--preset", "gsm8k-0.5b", "--rollout", "int8"]
    command += ["--name", "ppo", "--tis", "2", "--json", *(word for text in sets for word in ("--set", text))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False, cwd=folder)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    events = [json.loads(line) for line in done.stdout.splitlines()]
    plan = json.loads((folder / "runs/ppo/attempt_1/plan.json").read_text())
    return plan["overrides"], [one for one in events if one["event"] == "step"], folder / "checkpoints/GSM8K-PPO/ppo"


@pytest.mark.parametrize(("packing", "attention"), [(True, "varlen"), (False, "sdpa")])
def test_ppo_with_a_critic_trains_on_the_pinned_stack(
    packing: bool, attention: str, policy: Path, tmp_path: Path
) -> None:
    """FlashRL's GSM8K recipe, whose critic verl loads with flash-attn: `auto` is what this stack has."""
    from flashrl_cli.machine.software import has_flash_attention

    if has_flash_attention():
        pytest.skip("flash-attn is installed here, and is the attention")
    overrides, steps, checkpoints = trained(tmp_path, policy, f"model.packing={str(packing).lower()}")
    assert {text for text in overrides if "attn_implementation" in text} == {
        f"+{node}.model.override_config.attn_implementation={attention}" for node in ("actor_rollout_ref", "critic")
    }
    assert len(steps) == 2
    for step in steps:
        assert {"critic", "values", "actor", "refit"} <= step["seconds"].keys()
        assert step["grad_norm"] > 0
        assert abs(step["kl"]) < 0.1, "the rollout samples from what was trained"
    (handshake,) = read_handshakes(tmp_path / "runs/ppo/attempt_1/plugins")
    assert (handshake.precision, handshake.quantized_layers) == ("int8", 8)
    assert (checkpoints / "global_step_2" / "critic").is_dir()
