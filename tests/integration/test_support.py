"""Log-probs over the kept tokens: verl's own engine computes them for packed and padded rows, and a run with them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Workshop

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing verl warns of much that is not ours."""
VOCABULARY, TEMPERATURE, TOP_K = 50, 0.7, 5
LENGTHS = [(3, 4), (1, 2), (6, 1)]
"""Tokens of prompts and responses."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's engine class with log-probs over the kept tokens; afterwards it is as it was."""
    from verl.workers.engine.fsdp import transformer_impl

    from flashrl_cli.plugins import support

    found = transformer_impl.FSDPEngineWithLMHead
    monkeypatch.setattr(found, "prepare_model_outputs", found.prepare_model_outputs)
    support.normalize_over_kept_tokens()
    return found


def made(packing: bool) -> tuple[Any, list[Any], list[Any]]:
    """A micro-batch, and each sequence's logits [tokens, vocabulary] and kept tokens [tokens of its response, columns].

    Some responses have fewer kept tokens than others.
    """
    import torch
    from verl.utils import tensordict_utils as tu

    from flashrl_cli.plugins.support import FIELD

    make = torch.Generator().manual_seed(0)
    sequences = [torch.randint(VOCABULARY, (prompt + response,), generator=make) for prompt, response in LENGTHS]
    logits = [3 * torch.randn(len(sequence), VOCABULARY, generator=make) for sequence in sequences]
    kept = []
    for sequence, (prompt, response) in zip(sequences, LENGTHS, strict=True):
        ids = torch.full((response, 2 * TOP_K), -1, dtype=torch.int32)
        for row, token in zip(ids, sequence[prompt:].tolist(), strict=True):
            others = [other for other in torch.randperm(VOCABULARY, generator=make).tolist() if other != token]
            row[: TOP_K - token % 3] = torch.tensor([token, *others])[: TOP_K - token % 3]
        kept.append(ids)
    positions = [torch.arange(len(sequence)) for sequence in sequences]
    tensors = {
        name: torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        for name, rows in (("input_ids", sequences), ("position_ids", positions), (FIELD, kept))
    }
    options = {"use_remove_padding": packing, "calculate_entropy": True, "temperature": TEMPERATURE}
    return tu.get_tensordict(tensors, options), logits, kept


def log_probs(engine: Any, batch: Any, logits: list[Any], bucket: int = 1) -> tuple[Any, Any]:
    """What verl's engine makes of a model's logits: log-probs and entropies of all tokens, jagged."""
    import torch
    from verl.utils.torch_functional import entropy_from_logits

    settings = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    made_of = SimpleNamespace(
        pad_to_length=bucket > 1,
        pad_to_length_bucket=bucket,
        use_ulysses_sp=False,
        engine_config=settings,
        compute_entropy_from_logits=entropy_from_logits,
    )
    for name in ("_get_packed_pad_size", "_gather_and_unpad_packed"):
        setattr(made_of, name, getattr(engine, name).__get__(made_of))
    inputs, arguments = engine.prepare_model_inputs(made_of, batch)
    shape = inputs["input_ids"].shape
    if shape[0] == 1:
        rows = torch.cat(logits)
        output = torch.nn.functional.pad(rows, (0, 0, 0, shape[1] - len(rows)))[None]
    else:
        output = torch.nn.utils.rnn.pad_sequence(logits, batch_first=True)
    found = engine.prepare_model_outputs(made_of, SimpleNamespace(logits=output.clone()), arguments, batch, None)
    return found["log_probs"], found["entropy"]


@pytest.mark.parametrize(("packing", "bucket"), [(True, 1), (True, 16), (False, 1)])
def test_verls_engine_normalizes_over_the_kept_tokens(engine: Any, packing: bool, bucket: int) -> None:
    import torch

    batch, logits, kept = made(packing)
    found, entropies = log_probs(engine, batch, logits, bucket)
    parts = zip(found.unbind(), entropies.unbind(), batch["input_ids"].unbind(), logits, kept, LENGTHS, strict=True)
    for row, entropy, sequence, values, ids, (prompt, response) in parts:
        scaled = values.double() / TEMPERATURE
        for at in range(response):
            before, token = scaled[prompt - 1 + at], sequence[prompt + at]
            among = ids[at][ids[at] >= 0].long()
            expected = before[token] - before[among].logsumexp(-1)
            assert row[prompt - 1 + at].item() == pytest.approx(expected.item(), abs=1e-5)
        whole = torch.distributions.Categorical(logits=scaled).entropy()
        assert torch.allclose(entropy.double(), whole, atol=1e-5)


def test_a_batch_without_kept_tokens_is_refused(engine: Any) -> None:
    from flashrl_cli.plugins.support import FIELD

    batch, logits, _ = made(packing=True)
    with pytest.raises(RuntimeError, match="the rollout returned no kept tokens"):
        log_probs(engine, batch.exclude(FIELD), logits)


def test_parts_of_an_interrupted_response_have_their_kept_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's client asks for the rest after two weight updates, of which the second came before any token."""
    import asyncio

    import torch
    from verl.workers.rollout import llm_server
    from verl.workers.rollout.replica import TokenOutput

    from flashrl_cli.plugins import support

    kept = {1: torch.tensor([[3, 4], [5, -1]]), 3: torch.tensor([[6, 7]])}
    asked: list[list[int]] = []

    class Server:
        async def answer(self, prompt_ids: list[int], **_: Any) -> Any:
            asked.append(prompt_ids)
            turn = len(asked)
            tokens = {1: [11, 12], 2: [], 3: [13]}[turn]
            extra = {"global_steps": turn, **({support.FIELD: kept[turn]} if tokens else {})}
            reason = "completed" if turn == 3 else "aborted"
            return TokenOutput(token_ids=tokens, log_probs=[-0.5] * len(tokens), stop_reason=reason, extra_fields=extra)

        @property
        def generate(self) -> Any:
            return SimpleNamespace(remote=self.answer)

    class Client(llm_server.FullyAsyncLLMServerClient):  # type: ignore[misc]
        def __init__(self) -> None:
            rollout = SimpleNamespace(name="vllm", response_length=8, full_determinism=False)
            self.config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout))

        async def _acquire_server(self, *_: Any, **__: Any) -> Any:
            return "one", Server()

        def _release_server(self, *_: Any, **__: Any) -> None:
            pass

        def _vllm_request_id(self, request_id: str) -> str:
            return request_id

    for name in ("LLMServerClient", "FullyAsyncLLMServerClient"):
        monkeypatch.setattr(getattr(llm_server, name), "generate", vars(getattr(llm_server, name))["generate"])
    monkeypatch.setattr(asyncio, "sleep", lambda *_: _done())
    for _ in range(2):
        support.join_kept_tokens()
    output = asyncio.run(Client().generate("r", prompt_ids=[1], sampling_params={}))
    assert asked == [[1], [1, 11, 12], [1, 11, 12]]
    assert output.token_ids == [11, 12, 13]
    assert output.extra_fields[support.FIELD].tolist() == [[3, 4], [5, -1], [6, 7]]


async def _done() -> None:
    """Takes no time, unlike the pause of verl's client before it goes on."""


def test_a_run_compares_log_probs_over_the_kept_tokens(workshop: Workshop) -> None:
    """With the trainer's log-probs over all tokens, the weights' mean would be some .9, and the KL some .1."""
    truncated = ("rollout.temperature=1.3", "rollout.top_p=0.7", "rollout.top_k=20", "correction.support=kept")
    sets = [word for text in (*truncated, "trainer.steps=2") for word in ("--set", text)]
    _, err = workshop.run("train", "--preset", "tiny", "--rollout", "int8", "--tis", "2", *sets, "--name", "kept")
    assert "the trainer normalizes log-probs over the tokens that the rollout kept" in err
    lines = (workshop.root / "runs/kept/attempt_1/metrics.jsonl").read_text().splitlines()
    steps = [line["data"] for line in map(json.loads, lines) if "rollout_corr/kl" in line["data"]]
    assert len(steps) == 2
    for step in steps:
        assert abs(step["rollout_corr/kl"]) < 0.02
        assert abs(step["rollout_corr/rollout_is_mean"] - 1) < 0.02
