"""`varlen` in Transformers' own models: packed sequences give what each gives alone, and what it cannot do is refused.

The kernel needs CUDA (tests/gpu/test_attention.py); a plain one stands in for it here, so that lengths, shapes and what
the models pass are judged in float32.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flashrl_cli import contract

pytestmark = pytest.mark.filterwarnings("ignore")

if TYPE_CHECKING:
    import torch

    from flashrl_cli.plugins.attention import Packing

LENGTHS = (1, 2, 7, 40, 1, 13)
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
CALLS: list[Packing] = []
"""Packings that the plain kernel was called with."""


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float | None
) -> torch.Tensor:
    """A Kernel: PyTorch's attention for one sequence after the other."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    CALLS.append(packing)
    lengths = packing.ends.diff().tolist()
    assert max(lengths) == packing.longest
    parts = zip(*(part.transpose(0, 1).split(lengths, 1) for part in (query, key, value)), strict=True)
    found = [scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True) for q, k, v in parts]
    return torch.cat(found, 1).transpose(0, 1)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    from flashrl_cli.plugins import attention

    CALLS.clear()
    attention.register(plain)
    yield
    attention.register()


def model(family: str, attention: str, *, auto: str = "AutoModelForCausalLM", **changes: Any) -> Any:
    """A small model with random weights, the same for each attention."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        head_dim=16, vocab_size=97, max_position_embeddings=64, attn_implementation=attention, **changes,
    )  # fmt: skip
    return getattr(transformers, auto).from_config(config).train()


def sequences() -> list[torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(1)
    return [torch.randint(97, (length,), generator=generator) for length in LENGTHS]


def packed(parts: list[torch.Tensor], padding: int = 0) -> dict[str, Any]:
    """Inputs of a model as verl's engine makes them, with its suffix of padding."""
    import torch
    from verl.workers.engine.utils import pad_packed_inputs

    ids, positions = torch.cat(parts)[None], torch.cat([torch.arange(len(part)) for part in parts])[None]
    ids, positions = pad_packed_inputs(ids, positions, padding)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": None, "use_cache": False}


def learned(network: Any, outputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of a loss that weights every output differently."""
    import torch

    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
    (outputs * weights).sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_give_what_each_gives_alone(family: str) -> None:
    import torch

    parts = sequences()
    together, alone = model(family, "varlen"), model(family, "sdpa")
    found = together(**packed(parts)).logits[0]
    expected = torch.cat([alone(input_ids=part[None], use_cache=False).logits[0] for part in parts])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients, wanted = learned(together, found), learned(alone, expected)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4, msg=name)


def test_a_critic_and_padding_behind_the_sequences() -> None:
    import torch

    parts = sequences()
    together, alone = (model("qwen2", name, auto="AutoModelForTokenClassification") for name in ("varlen", "sdpa"))
    together, alone = together.eval(), alone.eval()
    found = together(**packed(parts, padding=5)).logits[0, : sum(LENGTHS)]
    expected = torch.cat([alone(input_ids=part[None], use_cache=False).logits[0] for part in parts])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert CALLS[0].ends.diff().tolist() == [*LENGTHS, 5]


def test_lengths_are_computed_once_a_pass_and_recomputation_included(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from flashrl_cli.plugins import attention

    counted: list[torch.Tensor] = []
    compute = attention._packing

    def counting(positions: torch.Tensor) -> Packing:
        counted.append(positions.clone())
        return compute(positions)

    monkeypatch.setattr(attention, "_packing", counting)
    gc.collect()
    before = len(attention._packings)
    parts = sequences()
    together, plainly = model("llama", "varlen"), model("llama", "varlen")
    together.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = packed(parts)
    gradients = learned(together, together(**inputs).logits[0])
    assert (len(CALLS), len(counted)) == (6, 1), "three layers, forward and again in the backward pass"
    assert len({id(packing) for packing in CALLS}) == 1
    wanted = learned(plainly, plainly(**packed(parts[::-1])).logits[0])
    assert (len(CALLS), len(counted)) == (9, 2), "other sequences have lengths of their own"
    assert CALLS[-1].ends.diff().tolist() == list(reversed(LENGTHS))
    plainly.zero_grad()
    wanted = learned(plainly, plainly(**packed(parts)).logits[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
    CALLS.clear()
    del inputs
    gc.collect()
    assert len(attention._packings) == before, "nothing is kept of a pass that is over"


def test_positions_that_change_are_read_again() -> None:
    import torch

    from flashrl_cli.plugins.attention import packing_of

    positions = torch.tensor([[0, 1, 2, 0, 1]])
    assert packing_of(positions).ends.tolist() == [0, 3, 5]
    assert packing_of(positions) is packing_of(positions)
    positions[0, 2] = 0
    assert packing_of(positions).ends.tolist() == [0, 2, 3, 5]
    with torch.inference_mode():
        assert packing_of(torch.tensor([[0, 1, 5, 6, 0]])).ends.tolist() == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("family", "changes", "inputs", "message"),
    [
        ("qwen2", {}, {"input_ids": [[1, 2], [3, 4]]}, "one row of packed sequences without a mask, not 2 padded rows"),
        ("qwen2", {}, {"attention_mask": [[1, 1, 0]]}, "need no attention_mask: remove the padding"),
        ("llama", {"attention_dropout": 0.1}, {}, "no dropout, and the model asks for 0.1"),
        ("mistral", {"sliding_window": 2}, {}, "no sliding window: 2 tokens, and a sequence has 3"),
        ("gemma2", {"attn_logit_softcapping": 50.0}, {}, "no softcap"),
    ],
)
def test_what_it_cannot_do_is_refused(
    family: str, changes: dict[str, Any], inputs: dict[str, Any], message: str
) -> None:
    import torch

    network = model(family, "varlen", **changes)
    given = {"input_ids": [[1, 2, 3]], **inputs}
    with pytest.raises(ValueError, match=message):
        network(**{name: torch.tensor(value) for name, value in given.items()}, use_cache=False)


def test_a_window_that_holds_every_sequence_is_no_window() -> None:
    import torch

    parts = [part[:13] for part in sequences()]
    together, alone = model("mistral", "varlen", sliding_window=13), model("mistral", "sdpa", sliding_window=13)
    found = together(**packed(parts)).logits[0]
    expected = torch.cat([alone(input_ids=part[None], use_cache=False).logits[0] for part in parts])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_under_autocast_it_computes_in_its_dtype() -> None:
    import torch

    with torch.autocast("cpu", torch.bfloat16):
        found = model("llama", "varlen")(**packed(sequences())).logits
    assert found.isfinite().all()
    assert {call.ends.dtype for call in CALLS} == {torch.int32}


def test_torch_s_kernel_refuses_float32() -> None:
    import torch

    from flashrl_cli.plugins.attention import flash, packing_of

    part = torch.zeros(3, 2, 8)
    with pytest.raises(ValueError, match="bfloat16 or float16, not in float32"):
        flash(part, part, part, packing_of(torch.tensor([[0, 1, 0]])), None)


OF_A_WORKER = """
import sys
import verl
assert "transformers.modeling_utils" not in sys.modules, "only a process that trains needs models"
import verl.utils.model
from transformers import AttentionInterface
assert "varlen" not in AttentionInterface._global_mapping
import verl.workers.engine.fsdp
assert "varlen" in AttentionInterface._global_mapping
from verl.workers.config import HFModelConfig
config = HFModelConfig(path=sys.argv[1], override_config={"attn_implementation": "varlen"}).hf_config
config.num_labels = 1
import torch
from verl.utils.model import load_valuehead_model
critic = load_valuehead_model(sys.argv[1], torch.float32, config, False)
print(type(critic).__name__, critic.config._attn_implementation)
from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM.from_pretrained(sys.argv[1], config=config).config._attn_implementation)
"""


def test_a_process_that_trains_knows_it_and_no_other(tmp_path: Path) -> None:
    """As Ray's workers of a run on GPUs import verl; a run with a critic on a CPU is in test_train.py."""
    from flashrl_cli.data import tiny

    tokenizer = tiny.make_tokenizer()
    tiny.save(tiny.make_model(tokenizer), tokenizer, tmp_path)
    env = {contract.ENV_PLUGIN_DIR: str(tmp_path), contract.ENV_PLATFORM: "cuda", "PATH": "/bin"}
    done = subprocess.run(
        [sys.executable, "-c", OF_A_WORKER, str(tmp_path)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-3:] == ["Qwen2ForTokenClassification", "varlen", "varlen"]
