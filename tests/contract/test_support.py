"""Truncated sampling: what each way to compare log-probs estimates, and log-probs over the kept tokens.

The gradients are enumerated, so that no sampling error hides a bias: all 8^3 sequences of a policy with a table of
logits for every prefix, sampled from other logits (the rollout's arithmetic) with top-k and top-p.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from flashrl_cli.plugins import support  # noqa: E402

TOKENS, LENGTH = 8, 3
PREFIXES = [prefix for length in range(LENGTH) for prefix in itertools.product(range(TOKENS), repeat=length)]
SEQUENCES = list(itertools.product(range(TOKENS), repeat=LENGTH))
ROWS = torch.tensor([[PREFIXES.index(sequence[:at]) for at in range(LENGTH)] for sequence in SEQUENCES])
LABELS = torch.tensor(SEQUENCES)
MISMATCH = 0.05
"""Standard deviation of the difference between the logits of trainer and rollout."""


def drawn(seed: int) -> Any:
    return torch.Generator().manual_seed(seed)


def kept_by(logits: Any, top_k: int, top_p: float) -> Any:
    """The tokens that vLLM keeps of each row, int32 [rows, tokens]; -1 for the others.

    top-p keeps the most probable tokens of the top k until they have the mass (vllm/v1/sample/ops/topk_topp_sampler.py,
    apply_top_k_top_p_pytorch in 0.28).
    """
    order = logits.argsort(-1, descending=True)
    sorted_logits = logits.gather(-1, order)
    sorted_logits[:, top_k:] = -torch.inf
    p = sorted_logits.softmax(-1)
    is_kept = (torch.arange(logits.shape[-1]) < top_k) & (p.cumsum(-1) - p < top_p)
    return torch.where(is_kept, order, -1).int()


def over(logits: Any, kept: Any) -> Any:
    """Log-probs [rows, tokens] over the kept ones, by a mask."""
    mask = torch.full_like(logits, -torch.inf)
    rows, columns = (kept >= 0).nonzero().T
    mask[rows, kept[rows, columns].long()] = 0
    return (logits + mask).log_softmax(-1)


def of_sequences(table: Any) -> Any:
    """The log-probs [sequences, tokens] of every sequence's tokens under log-probs [prefixes, tokens]."""
    return table[ROWS, LABELS]


def gradient(value: Any, logits: Any) -> Any:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def relative_error(found: Any, exact: Any) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.fixture(params=[(8, 0.9), (8, 0.7), (4, 1.0), (5, 0.8)], ids=str)
def errors(request: pytest.FixtureRequest) -> dict[str, tuple[float, float]]:
    """Relative error of the gradient, and mean importance weight of a token, of each way to compare log-probs."""
    trainers = (1.5 * torch.randn(len(PREFIXES), TOKENS, generator=drawn(0), dtype=torch.float64)).requires_grad_()
    engines = trainers.detach() + MISMATCH * torch.randn(trainers.shape, generator=drawn(1), dtype=torch.float64)
    rewards = torch.randn(len(SEQUENCES), generator=drawn(2), dtype=torch.float64)
    kept = kept_by(engines, *request.param)
    sampled = of_sequences(over(engines, kept))
    q = sampled.sum(-1).exp()
    possible = q > 0
    # the value of the truncated policy, and its gradient; what is kept does not change with small changes of logits
    exact = gradient((of_sequences(over(trainers, kept)).sum(-1).exp() * rewards).sum(), trainers)
    columns = kept[ROWS].reshape(-1, TOKENS)
    ours = support.log_probs(trainers[ROWS].reshape(-1, TOKENS), LABELS.reshape(-1), kept=columns).view(ROWS.shape)
    full = of_sequences(trainers.log_softmax(-1))
    ways = {
        "processed": (full, sampled),
        "raw": (full, of_sequences(engines.log_softmax(-1))),
        "kept": (ours, sampled),
    }
    found = {}
    for name, (policy, rollout) in ways.items():
        weights = (policy - rollout).detach().exp()[possible]
        # importance weights of sequences, by which the gradient of every sequence counts as often as under the policy
        terms = (weights.prod(-1) * q[possible] * rewards[possible])[:, None] * policy[possible]
        first = (weights * q[possible, None]).sum(0)[0]
        found[name] = (relative_error(gradient(terms.sum(), trainers), exact), float(first))
    print(request.param, found)
    return found


def test_only_over_the_kept_tokens_is_the_gradient_the_truncated_policys(errors):
    assert errors["kept"][0] < 1e-9
    assert errors["raw"][0] > 0.03
    assert errors["raw"][0] < errors["processed"][0]


def test_the_mean_weight_is_1_over_the_kept_tokens_the_ratio_of_masses_with_raw_and_a_mass_with_processed(errors):
    assert errors["kept"][1] == pytest.approx(1, abs=1e-12)
    assert errors["raw"][1] == pytest.approx(1, abs=0.03)
    assert errors["processed"][1] < 0.97


def test_a_kept_set_of_the_trainers_own_is_biased():
    """What the trainer itself would keep is another set: where it keeps a token that the rollout excluded, E[w] < 1."""
    trainers = 1.5 * torch.randn(len(PREFIXES), TOKENS, generator=drawn(0), dtype=torch.float64)
    engines = trainers + 4 * MISMATCH * torch.randn(trainers.shape, generator=drawn(1), dtype=torch.float64)
    sampled = over(engines, kept_by(engines, 3, 1.0)).exp()
    own = over(trainers, kept_by(trainers, 3, 1.0)).exp()
    mean_weights = torch.where(sampled > 0, own, 0).sum(-1)
    differs = ((own > 0) & (sampled == 0)).any(-1)
    assert mean_weights[differs].max() < 0.97
    assert torch.allclose(mean_weights[~differs], torch.ones(1, dtype=torch.float64))
    assert 0 < differs.sum() < len(differs)


def drawn_rows(dtype: Any) -> tuple[Any, Any, Any]:
    """Logits, labels and kept tokens: most rows ordinary, one without kept tokens, one whose label was not kept."""
    logits = (4 * torch.randn(9, 50, generator=drawn(3))).to(dtype)
    kept = kept_by(logits.float(), 6, 0.9)[:, :12]
    labels = kept[:, 0].long().clone()
    kept[4] = -1
    labels[5] = next(token for token in range(50) if token not in kept[5])
    return logits, labels, kept


def test_log_probs_and_gradients_equal_those_by_a_mask():
    logits, labels, kept = drawn_rows(torch.float32)
    rows = [row for row in range(9) if row not in (4, 5)]
    weights = torch.randn(9, generator=drawn(4))
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = support.log_probs(ours, labels, kept=kept)
    expected = over(exact[rows], kept[rows]).gather(-1, labels[rows, None])[:, 0]
    assert torch.allclose(found[rows].double(), expected, atol=1e-5)
    assert (found[4], found[5]) == (0, support.EXCLUDED)
    (found * weights).sum().backward()
    (expected * weights[rows].double()).sum().backward()
    assert torch.allclose(ours.grad.double(), exact.grad, atol=1e-5)
    assert not ours.grad[[4, 5]].any()


def test_logits_of_bf16_have_gradients_of_bf16():
    logits, labels, kept = drawn_rows(torch.bfloat16)
    logits.requires_grad_()
    found = support.log_probs(logits, labels, kept=kept)
    found.sum().backward()
    assert (found.dtype, logits.grad.dtype) == (torch.float32, torch.bfloat16)
    assert logits.grad.isfinite().all()


def jagged(rows: list[Any]) -> Any:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def test_kept_tokens_are_where_the_next_token_is_predicted():
    lengths = [(3, 2), (1, 4), (5, 1)]
    kept = [torch.randint(50, (response, 6), generator=drawn(response), dtype=torch.int32) for _, response in lengths]
    sequences = [torch.zeros(prompt + response, dtype=torch.int64) for prompt, response in lengths]
    # verl's synthetic sequence has a row for each of its tokens, which must not reach into its neighbour's
    kept.insert(1, torch.full((4, 6), 7, dtype=torch.int32))
    sequences.insert(1, torch.zeros(4, dtype=torch.int64))
    found = support.in_rows(jagged(kept), jagged(sequences))
    expected = []
    for prompt, response, ids in ((3, 2, kept[0]), (0, 4, None), (1, 4, kept[2]), (5, 1, kept[3])):
        none = torch.full((prompt + response, 6), -1, dtype=torch.int32)
        if ids is None:
            none[:3] = 7
        else:
            none[prompt - 1 : prompt + response - 1] = ids
        expected.append(none)
    assert torch.equal(found, torch.cat(expected))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_of_sequence_parallelism_has_its_rows(ranks):
    """As verl pads and cuts labels (ulysses_pad_and_slice_inputs): equal parts, the padding last."""
    kept = torch.randint(50, (11, 6), generator=drawn(5), dtype=torch.int32)
    rows = -(-len(kept) // ranks)
    parts = torch.cat([support.own_rows(kept, rows, rank) for rank in range(ranks)])
    assert torch.equal(parts[: len(kept)], kept)
    assert (parts[len(kept) :] == -1).all()


def test_kept_tokens_of_another_number_of_rows_are_refused():
    logits, labels, kept = drawn_rows(torch.float32)
    with pytest.raises(ValueError, match="8 rows of kept tokens do not fit 9 rows of logits"):
        support.log_probs(logits, labels, kept=kept[:8])


def test_kept_tokens_are_those_with_a_log_prob():
    import numpy as np

    response = support.KeptTokens(3)
    minus = -np.inf
    # columns beyond those that were asked for belong to another request of the same step
    response.add(np.array([[7, 5, 7, 2, 9]], np.int32), np.array([[-1.0, -0.5, -1.0, minus, minus]], np.float32))
    response.add(np.array([[4, 4, 1, 3]], np.int32), np.array([[0.0, 0.0, minus, minus]], np.float32))
    assert len(response) == 2
    assert [{token: value.logprob for token, value in one.items()} for one in response] == [{7: -1.0}, {4: 0.0}]
    assert response.ids().tolist() == [[5, 7, -1], [4, -1, -1]]
    assert response.ids().dtype == torch.int32
