"""Log-probs and entropy in chunks: equal to float64, bounded in memory and in calls, and what verl's engine calls.

Run as a script, in an environment in which verl loads flashrl's plugin: a real FSDP engine with the policy FOLDER, its
log-probs, entropies and gradients of a few sequences written to OUT, packed and padded.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flashrl_cli import contract
from flashrl_cli.verl.environment import CPU

if TYPE_CHECKING:
    import torch

    from tests.integration.conftest import Workshop

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing verl warns of much that is not ours."""
VOCABULARIES = (259, 49152, 151936)
BOUND = 1 << 20
"""Bytes of a chunk here, so that few tokens of a large vocabulary are several chunks."""
CLOSE = 1e-5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "LOG_PROBS_CHUNK_CPU", BOUND)


def drawn(vocabulary: int, shape: tuple[int, ...] = (11,), dtype: str = "float32") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [*shape, vocabulary] as wide as a language model's, and labels."""
    import torch

    make = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(*shape, vocabulary, generator=make)
    return logits.to(getattr(torch, dtype)), torch.randint(vocabulary, shape, generator=make)


def exactly(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies in float64, by PyTorch's own distribution."""
    import torch

    distribution = torch.distributions.Categorical(logits=logits.double())
    return distribution.log_prob(labels), distribution.entropy()


def gradient_of(
    function: Callable[..., torch.Tensor], logits: torch.Tensor, weights: torch.Tensor, *args: Any
) -> torch.Tensor:
    import torch

    leaf = logits.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf, *args).mul(weights).sum(), leaf)
    return found


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("shape", [(11,), (3, 7)])
def test_float32_is_the_reference(vocabulary: int, shape: tuple[int, ...]) -> None:
    import torch

    from flashrl_cli.plugins import log_probs

    logits, labels = drawn(vocabulary, shape)
    assert len(list(log_probs.chunks(logits.view(-1, vocabulary)))) > 1 or vocabulary == 259
    right = exactly(logits, labels)
    found = log_probs.log_probs(logits, labels), log_probs.entropy(logits)
    for one, other in zip(found, right, strict=True):
        assert (one.dtype, one.shape) == (torch.float32, shape)
        assert (one - other).abs().max() < CLOSE
    weights = torch.randn(shape)
    pairs: tuple[tuple[Any, Any, tuple[Any, ...]], ...] = (
        (log_probs.log_probs, lambda *given: exactly(*given)[0], (labels,)),
        (log_probs.entropy, lambda given: exactly(given, labels)[1], ()),
    )
    for ours, theirs, args in pairs:
        one, other = (gradient_of(function, logits, weights, *args) for function in (ours, theirs))
        assert one.dtype == torch.float32
        assert (one - other).abs().max() < CLOSE


def test_gradients_are_those_of_finite_differences() -> None:
    import torch

    from flashrl_cli.plugins import log_probs

    logits, labels = drawn(13, (2, 5), "float64")
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda given: log_probs.log_probs(given, labels), logits)
    assert torch.autograd.gradcheck(log_probs.entropy, logits)
    assert torch.autograd.gradcheck(lambda given: log_probs.entropy(given, 3), logits)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_bf16_logits_lose_nothing_further(vocabulary: int) -> None:
    """verl's loop rounds each log-prob to bf16 again; ours is as exact as of float32 logits."""
    import torch
    from verl.utils.torch_functional import logprobs_from_logits_v2

    from flashrl_cli.plugins import log_probs

    logits, labels = drawn(vocabulary, dtype="bfloat16")
    right, entropies = exactly(logits, labels)
    error = (log_probs.log_probs(logits, labels) - right).abs().max()
    assert error < CLOSE
    assert (logprobs_from_logits_v2(logits, labels) - right).abs().max() > 1000 * error
    assert (log_probs.entropy(logits) - entropies).abs().max() < CLOSE
    weights = torch.randn(len(labels))
    found = gradient_of(log_probs.log_probs, logits, weights, labels)
    exact = gradient_of(lambda given: exactly(given, labels)[0], logits.double(), weights)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 3), (1, 1)])
def test_few_tokens_or_none(shape: tuple[int, ...]) -> None:
    import torch

    from flashrl_cli.plugins import log_probs

    logits, labels = drawn(49152, shape)
    found = log_probs.log_probs(logits, labels), log_probs.entropy(logits)
    assert [one.shape for one in found] == [shape, shape]
    if labels.numel():
        for one, other in zip(found, exactly(logits, labels), strict=True):
            assert (one - other).abs().max() < CLOSE
    ones = torch.ones(shape)
    assert gradient_of(log_probs.log_probs, logits, ones, labels).shape == logits.shape
    assert gradient_of(log_probs.entropy, logits, ones).shape == logits.shape


def test_logits_that_are_not_dense_keep_their_values() -> None:
    import torch

    from flashrl_cli.plugins import log_probs

    whole, labels = drawn(259, (4, 9))
    ways: tuple[Any, ...] = (lambda z: z[:, :-1], lambda z: z.transpose(0, 1), lambda z: z[:1].expand(4, 9, 259))
    for cut in ways:
        leaf = whole.clone().requires_grad_()
        logits = cut(leaf * 1)
        assert not logits.is_contiguous()
        wanted = labels[:, :-1] if logits.shape[1] == 8 else labels.view(logits.shape[:-1])
        before = logits.detach().clone()
        found = log_probs.log_probs(logits, wanted)
        assert (found - exactly(logits, wanted)[0]).abs().max() < CLOSE
        (one,) = torch.autograd.grad(found.sum(), leaf)
        assert torch.equal(logits, before)
        (other,) = torch.autograd.grad(exactly(cut(leaf * 1), wanted)[0].sum(), leaf)
        assert (one - other).abs().max() < CLOSE


def test_labels_of_another_shape_are_refused() -> None:
    from flashrl_cli.plugins import log_probs

    logits, labels = drawn(259, (4, 9))
    with pytest.raises(ValueError, match=r"labels \[9, 4\] do not fit logits \[4, 9, 259\]"):
        log_probs.log_probs(logits, labels.view(9, 4))


def test_the_gradient_takes_the_memory_of_logits_only_where_it_may() -> None:
    import torch

    from flashrl_cli.plugins import log_probs

    leaf, labels = drawn(259)
    leaf.requires_grad_()
    (exact,) = torch.autograd.grad(exactly(leaf, labels)[0].sum(), leaf)

    def gradient(logits: torch.Tensor, **settings: bool) -> torch.Tensor:
        (found,) = torch.autograd.grad(log_probs.log_probs(logits, labels, **settings).sum(), logits)
        assert (found - exact).abs().max() < CLOSE
        return found

    logits = leaf * 1
    assert gradient(logits).data_ptr() == logits.data_ptr()
    kept = leaf * 1
    assert gradient(kept, inplace_backward=False).data_ptr() != kept.data_ptr()
    assert torch.equal(kept, leaf)
    before = leaf.detach().clone()
    gradient(leaf)
    assert torch.equal(leaf, before), "a parameter is never overwritten"
    # what needs the logits afterwards fails instead of computing with their gradient
    shared = leaf * 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (log_probs.entropy(shared).sum() + log_probs.log_probs(shared, labels).sum()).backward()


def test_an_entropy_bonus_and_log_probs_of_the_same_logits() -> None:
    """As in verl's loss: with an entropy the engine forbids writing over the logits."""
    import torch

    from flashrl_cli.plugins import log_probs

    leaf, labels = drawn(49152)
    leaf.requires_grad_()
    right = exactly(leaf, labels)
    (exact,) = torch.autograd.grad(right[0].mean() + 0.3 * right[1].mean(), leaf)
    ways: tuple[Any, ...] = (log_probs.entropy, lambda z: torch.utils.checkpoint.checkpoint(log_probs.entropy, z))
    for entropy in ways:
        leaf.grad = None
        logits = leaf * 1
        entropies = entropy(logits)
        loss = log_probs.log_probs(logits, labels, inplace_backward=False).mean() + 0.3 * entropies.mean()
        loss.backward()
        assert (leaf.grad - exact).abs().max() < CLOSE


def test_nothing_is_kept_without_gradients() -> None:
    import torch

    from flashrl_cli.plugins import log_probs

    logits, labels = drawn(259)
    held = weakref.ref(logits)
    with torch.no_grad():
        results = log_probs.log_probs(logits.requires_grad_(), labels), log_probs.entropy(logits)
    assert not any(one.requires_grad for one in results)
    del logits
    gc.collect()
    assert held() is None


def calls(work: Callable[[], object]) -> list[int]:
    """Number of elements of the largest float32 result of each operation in `work`."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[int] = []

    class Count(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            outputs = result if isinstance(result, tuple | list) else [result]
            found.append(
                max((r.numel() for r in outputs if isinstance(r, torch.Tensor) and r.dtype == torch.float32), default=0)
            )
            return result

    with Count():
        work()
    return found


@pytest.mark.parametrize("name", ["log_probs", "entropy"])
def test_memory_and_calls_do_not_grow_with_the_tokens(name: str) -> None:
    """No float32 tensor is larger than a chunk, forward or backward, and the calls are those of the chunks."""
    from flashrl_cli.plugins import log_probs

    def work(tokens: int, vocabulary: int) -> list[int]:
        logits, labels = drawn(vocabulary, (tokens,), "bfloat16")
        logits = logits.requires_grad_() * 1
        given = (labels,) if name == "log_probs" else ()
        return calls(lambda: getattr(log_probs, name)(logits, *given).sum().backward())

    found = work(64, 49152)
    assert max(found) <= BOUND / 4 < 64 * 49152
    chunks = -(-64 // (BOUND // 4 // 49152))
    assert len(found) < 60 * chunks
    assert len(work(1000, 259)) == len(work(500, 259)), "both are one chunk"


@pytest.mark.parametrize("compiled", [False, True])
def test_verl_calls_it(compiled: bool, fresh: Any) -> None:
    """`apply` reaches the module that defines the functions, the engine that imports one by name, and torch.compile."""
    import torch
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from flashrl_cli.plugins import log_probs

    log_probs.apply()
    log_probs.apply()
    logits, labels = drawn(259, (4, 9))
    engine = FSDPEngineWithLMHead.prepare_model_outputs.__globals__
    assert engine["logprobs_from_logits"] is fresh.logprobs_from_logits
    assert "LogProbs" in str(engine["logprobs_from_logits"](logits.requires_grad_(), labels).grad_fn.next_functions)
    for name, settings in {"entropy_from_logits": {}, "entropy_from_logits_with_chunking": {"chunk_size": 2}}.items():
        function = getattr(engine["verl_F"], name)
        found = (torch.compile(function, dynamic=True) if compiled else function)(logits, **settings)
        assert "Entropy" in str(found.grad_fn.next_functions)
        assert (found - exactly(logits, labels)[1]).abs().max() < CLOSE


def test_flash_attention_stays_where_it_is(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With flash-attn verl keeps its own functions for a GPU's tensors, unless it is told to do without."""
    import torch

    from flashrl_cli.plugins import log_probs

    own = fresh.entropy_from_logits
    monkeypatch.setattr(fresh, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    monkeypatch.setattr(
        fresh,
        "logprobs_from_logits_flash_attn",
        lambda logits, labels, **_: torch.full(labels.shape, 7.0),
        raising=True,
    )
    log_probs.apply()
    assert fresh.entropy_from_logits is own
    logits, labels = drawn(259)
    assert (fresh.logprobs_from_logits(logits, labels) < 0).all(), "Triton has no kernels for a CPU"
    monkeypatch.setattr(log_probs, "log_probs", lambda *_: "ours")
    other = logits.to("meta"), labels.to("meta")
    assert fresh.logprobs_from_logits(*other).shape == labels.shape
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
    assert fresh.logprobs_from_logits(*other) == "ours"


def test_another_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashrl_cli.plugins import log_probs

    monkeypatch.setattr(log_probs, "VERL", "0.9.2")
    with pytest.raises(RuntimeError, match=r"verl 0\.9\.2 only"):
        log_probs.apply()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's module of such functions, which a test may have changed; afterwards it is as it was."""
    import verl.utils.torch_functional as verls
    from verl.workers.engine.fsdp import transformer_impl

    for name in ("logprobs_from_logits", "entropy_from_logits", "entropy_from_logits_with_chunking"):
        monkeypatch.setattr(verls, name, getattr(verls, name))
    monkeypatch.setattr(transformer_impl, "logprobs_from_logits", verls.logprobs_from_logits)
    return verls


def test_a_real_engine_s_log_probs(workshop: Workshop, tmp_path: Path) -> None:
    """In a process that verl's plugins prepared: what the model itself says, in calls that do not grow with tokens."""
    from tests.integration.conftest import PATIENCE_S
    from tests.integration.ray_cluster import free_port

    out = tmp_path / "out.json"
    env = {
        **workshop.env,
        **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port("127.0.0.1")),
        contract.ENV_PLUGIN_DIR: str(tmp_path),
        contract.ENV_PLATFORM: "cpu",
        **CPU,
    }
    policy = workshop.root / "data" / "tiny" / "model"
    command = [sys.executable, __file__, str(policy), str(out)]
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    for case, found in json.loads(out.read_text()).items():
        assert found["log_probs"] < CLOSE, case
        assert found["entropy"] < CLOSE, case
        assert found["gradient"] < CLOSE, case
        assert found["calls"] == found["calls of twice as many tokens"], case


def engine_of(policy: Path, *, packed: bool) -> Any:
    """verl's own FSDP engine of one process, in float32."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    model = HFModelConfig(
        path=str(policy),
        load_tokenizer=False,
        use_remove_padding=packed,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )
    precision = {"param_dtype": "fp32", "reduce_dtype": "fp32"}
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=model,
        engine_config=FSDPEngineConfig(use_torch_compile=packed, strategy="fsdp2", mixed_precision=precision),
        optimizer_config=FSDPOptimizerConfig(lr=1e-6, total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def batch_of(sequences: list[torch.Tensor], temperature: float, *, packed: bool) -> Any:
    """Sequences of tokens as the engine takes them, in two micro-batches."""
    import torch
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    data = TensorDict(
        {
            "input_ids": nested(sequences),
            "position_ids": nested([torch.arange(len(one)) for one in sequences]),
            "loss_mask": nested([torch.ones(len(one), dtype=torch.long) for one in sequences]),
        },
        batch_size=[len(sequences)],
    )
    tensordict_utils.assign_non_tensor(
        data,
        temperature=temperature,
        calculate_entropy=True,
        use_remove_padding=packed,
        use_fused_kernels=False,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=len(sequences) // 2,
        pad_token_id=0,
    )
    return data


def objective(found: dict[str, Any]) -> torch.Tensor:
    """Something that needs both gradients."""
    import torch

    total: torch.Tensor = found["log_probs"].mul(torch.arange(len(found["log_probs"]))).sum() + found["entropy"].sum()
    return total


def of_the_engine(model_output: dict[str, Any], **_: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The objective of each sequence but its last token, whose label is another sequence's."""
    rows = zip(*(model_output[name].unbind() for name in ("log_probs", "entropy")), strict=True)
    total = sum(objective({"log_probs": one[:-1], "entropy": other[:-1]}) for one, other in rows)
    return total, {}


def compared(policy: Path, *, packed: bool, temperature: float) -> dict[str, float]:
    """Largest differences between the engine's results and those of the model alone, and the engine's calls."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    make = torch.Generator().manual_seed(0)
    sequences = [torch.randint(256, (length,), generator=make) for length in (5, 17, 9, 12)]
    right = []
    for sequence in sequences:
        logits = model(sequence[None]).logits[0, :-1] / temperature
        right.append(dict(zip(("log_probs", "entropy"), exactly(logits, sequence[1:]), strict=True)))
        objective(right[-1]).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}

    engine = engine_of(policy, packed=packed)
    data = batch_of(sequences, temperature, packed=packed)
    with engine.eval_mode():
        found = engine.infer_batch(data.clone(), loss_function=None)["model_output"]
    result = {
        name: max(
            (one[:-1] - other[name]).abs().max().item() for one, other in zip(found[name].unbind(), right, strict=True)
        )
        for name in ("log_probs", "entropy")
    }
    twice = batch_of([torch.cat([one, one]) for one in sequences], temperature, packed=packed)
    with engine.eval_mode():
        result["calls"] = len(calls(lambda: engine.infer_batch(data.clone(), loss_function=None)))
        result["calls of twice as many tokens"] = len(
            calls(lambda: engine.infer_batch(twice.clone(), loss_function=None))
        )
    with engine.train_mode():
        engine.forward_backward_batch(data.clone(), of_the_engine)
        ours = {name: weight.grad.full_tensor() for name, weight in engine.module.named_parameters()}
    scale = max(one.abs().max() for one in gradients.values())
    result["gradient"] = max((ours[name] - one).abs().max() / scale for name, one in gradients.items()).item()
    return result


if __name__ == "__main__":
    import torch.distributed
    import verl  # noqa: F401  (loads flashrl's plugin)

    torch.distributed.init_process_group("gloo")
    cases = {
        f"packed={packed}, temperature {temperature}": compared(
            Path(sys.argv[1]), packed=packed, temperature=temperature
        )
        for packed, temperature in ((False, 1.0), (False, 0.7), (True, 1.0))
    }
    Path(sys.argv[2]).write_text(json.dumps(cases), encoding="utf-8")
