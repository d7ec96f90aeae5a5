"""Weights, rejection, advantages and losses by the formulas of docs/correction.md, apart from verl's code, in float64.

Tensors are [responses, longest] unless said otherwise; `mask` is 1 for a response's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from flashrl_cli.config.spec import CorrectionSpec, RejectSpec

CLIP = {
    "ppo": (0.2, 0.2), "gspo": (3e-4, 4e-4), "cispo": (10.0, 0.2), "dppo-tv": (0.15, 0.15), "dppo-kl": (0.05, 0.05),
    "clip-cov": (0.2, 0.2), "gmpo": (0.4, 0.4),
}  # fmt: skip
"""Bounds that the documentation gives for each loss; 3 is PPO's dual clip and 20 DPPO's cap."""
COVARIANCES = ("clip_cov_ratio=1.0", "clip_cov_lb=0.05", "clip_cov_ub=5.0", "kl_cov_ratio=0.2", "dro_beta=0.3")
"""Values of verl's `policy_loss` under which the losses by covariance choose several tokens, and none by chance."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step knows before its correction: log-probs of trainer and rollout, rewards, and values of a critic.

    `rewards` are those of tokens, which are 0 but for the last one of a response. Responses to the same prompt are
    neighbours; `groups` has their number for each prompt.
    """

    mask: torch.Tensor
    old: torch.Tensor
    rollout: torch.Tensor
    rewards: torch.Tensor
    values: torch.Tensor
    groups: tuple[int, ...]

    @property
    def log_w(self) -> torch.Tensor:
        """Logarithms of the importance weights."""
        return (self.old.double() - self.rollout.double()) * self.mask

    @property
    def scores(self) -> torch.Tensor:
        """Rewards of responses [responses]."""
        return self.rewards.sum(-1).double()


def weights(correction: CorrectionSpec, batch: Batch) -> torch.Tensor | None:
    """Weights of tokens; None without."""
    import torch

    mask, w = batch.mask, batch.log_w.exp()
    cap, lower = correction.cap or math.inf, correction.lower or 0.0
    if correction.kind == "none":
        return None
    if correction.kind == "tis":
        return w.clamp(max=cap) * mask
    if correction.kind == "icepop":
        return torch.where((w >= lower) & (w <= cap), w, 0.0) * mask
    return batch.log_w.sum(-1, keepdim=True).exp().clamp(max=cap) * mask


def estimates(by: str, estimator: str, batch: Batch) -> torch.Tensor:
    """What rejection judges, of tokens or of responses [responses, 1]: weights for k1, nats for k2 and k3."""
    mask, log_w = batch.mask, batch.log_w
    of_token = {"k1": log_w, "k2": log_w**2 / 2, "k3": log_w.exp() - 1 - log_w}[estimator] * mask
    statistic = {
        "token": of_token,
        "seq-sum": of_token.sum(-1, keepdim=True),
        "seq-mean": of_token.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True),
        "seq-max": of_token.masked_fill(mask == 0, -math.inf).amax(-1, keepdim=True),
    }[by]
    return statistic.exp() if estimator == "k1" else statistic


def kept(reject: RejectSpec | None, batch: Batch) -> torch.Tensor:
    """The mask of what rejection keeps."""
    import torch

    if reject is None:
        return batch.mask
    found = estimates(reject.by, reject.estimator, batch)
    inside = found <= reject.upper
    if reject.estimator == "k1":
        inside &= found >= (reject.lower or 0)
    return torch.where(inside, batch.mask, 0.0)


def by_group(batch: Batch, value: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A value of each response from the scores of its group, for all of its tokens."""
    import torch

    return torch.cat([value(group) for group in batch.scores.split(batch.groups)])[:, None] * batch.mask


def whitened(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    inside = values[mask.bool()]
    if len(inside) < 2:
        return values * 0
    return (values - inside.mean()) / (inside.var() + 1e-8).sqrt() * mask


def reward_to_go(batch: Batch) -> torch.Tensor:
    return batch.rewards.double().flip(-1).cumsum(-1).flip(-1) * batch.mask


def best_minus_second(group: torch.Tensor) -> torch.Tensor:
    import torch

    (first, second), (best, _) = group.topk(2)
    return torch.where(torch.arange(len(group)) == best, (first - second) / (group.std() + 1e-6), 0.0)


def weighted_by_length(batch: Batch, mask: torch.Tensor) -> torch.Tensor:
    import torch

    def less_baseline(group: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        # 0 in a group without tokens
        return group - (lengths * group).sum() / lengths.sum().clamp(min=1)

    lengths = mask.sum(-1).double()
    groups = zip(batch.scores.split(batch.groups), lengths.split(batch.groups), strict=True)
    return torch.cat([less_baseline(group, of) for group, of in groups])[:, None] * mask


def by_rewarded(batch: Batch) -> torch.Tensor:
    scores = batch.scores
    scale = scores.numel() / max(1, int(scores.count_nonzero()))
    return by_group(batch, lambda group: scale * (group - group.mean()))


def by_deviation(batch: Batch) -> torch.Tensor:
    return by_group(batch, lambda group: (group - group.mean()) / (group.std() + 1e-6))


def less_the_others(batch: Batch) -> torch.Tensor:
    return by_group(batch, lambda group: (group - group.mean()) * len(group) / (len(group) - 1))


ADVANTAGES: dict[str, Callable[[Batch, torch.Tensor], torch.Tensor]] = {
    "gae": lambda batch, mask: whitened(reward_to_go(batch) - batch.values, mask),
    "reinforce-plus-plus": lambda batch, mask: whitened(reward_to_go(batch), mask),
    "grpo": lambda batch, _: by_deviation(batch),
    "grpo-vectorized": lambda batch, _: by_deviation(batch),
    "rloo": lambda batch, _: less_the_others(batch),
    "rloo-vectorized": lambda batch, _: less_the_others(batch),
    "opo": weighted_by_length,
    "gpg": lambda batch, _: by_rewarded(batch),
    "reinforce-plus-plus-baseline": lambda batch, mask: whitened(
        by_group(batch, lambda group: group - group.mean()), mask
    ),
    "grpo-passk": lambda batch, _: by_group(batch, best_minus_second),
}
"""Advantages of tokens, from a batch and the mask that rejection left."""


def losses(
    loss: str, new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Loss of each token of a pass, or of each response [responses, 1] for GMPO, before weights.

    `new` are the log-probs that have a gradient; `mask` is what rejection left.
    """
    import torch

    old = old.double()
    d, a = new - old, advantages.double()
    r = d.exp()
    low, high = CLIP.get(loss, (0.0, 0.0))
    clipped = torch.maximum(-a * r, -a * r.clamp(1 - low, 1 + high))
    valid = mask.bool()
    match loss:
        case "ppo":
            return torch.where(a < 0, torch.minimum(clipped, -a * 3.0), clipped)
        case "gspo":
            s = (d * mask).sum(-1, keepdim=True).div(mask.sum(-1, keepdim=True).clamp(min=1)).exp().detach()
            s = s * (new - new.detach()).exp()
            return torch.maximum(-a * s, -a * s.clamp(1 - low, 1 + high))
        case "sapo":
            tau = torch.where(a > 0, 1.0, 1.05)
            return -a * 4 / tau * torch.sigmoid(tau * (r - 1))
        case "cispo":
            return -r.clamp(1 - low, 1 + high).detach() * a * new
        case "gpg":
            return -a * new
        case "dppo-tv" | "dppo-kl":
            return -a * r.clamp(max=20).detach() * new * within(loss, new.exp().detach(), old.exp(), a, high)
        case "clip-cov":
            cov = (a - a[valid].mean()) * (new - new[valid].mean()).detach()
            chosen = (cov > 0.05) & (cov < 5) & ~(-a * r.clamp(1 - low, 1 + high) > -a * r)
            return clipped * ~chosen
        case "kl-cov":
            cov = torch.full_like(new, -math.inf)
            cov[valid] = ((a[valid] - a[valid].mean()) * (new[valid] - new[valid].mean())).detach()
            chosen = torch.zeros_like(valid).view(-1)
            chosen[cov.view(-1).topk(max(1, int(0.2 * int(valid.sum())))).indices] = True
            return -a * r + d.abs() * chosen.view_as(valid)
        case "dro":
            return -(new * a - 0.3 / 2 * d**2)
        case _:
            bounded = torch.where(a > 0, torch.minimum(d, d.clamp(-low, high)), torch.maximum(d, d.clamp(-low, high)))
            count = mask.sum(-1, keepdim=True) + 1e-8
            return -(a * mask).sum(-1, keepdim=True) / count * ((bounded * mask).sum(-1, keepdim=True) / count).exp()


def within(loss: str, p: torch.Tensor, q: torch.Tensor, a: torch.Tensor, bound: float) -> torch.Tensor:
    """Tokens of DPPO that are not too far from the old policy, or on the way back to it."""
    import torch

    if loss == "dppo-tv":
        return torch.where(a > 0, p - q <= bound, p - q >= -bound)
    kl = q * (q / p).log() + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    return (kl <= bound) | torch.where(a > 0, p <= q, p >= q)


def mean(
    loss: str,
    values: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    tokens: int,
    responses: int,
) -> torch.Tensor:
    """A pass's part of the loss, from the losses of its tokens or responses.

    `tokens` and `responses` are those of the mini-batch before rejection, by which the sums are divided.
    """
    w = 1.0 if weights is None else weights.double()
    if loss == "gmpo":
        if weights is not None:
            count = mask.sum(-1, keepdim=True) + 1e-8
            w = (((weights.double() + 1e-10).log() * mask).sum(-1, keepdim=True) / count).exp()
        return (values * w).sum() / responses
    if loss in ("gspo", "sapo"):
        return ((values * w * mask).sum(-1) / (mask.sum(-1) + 1e-8)).sum() / responses
    return (values * w * mask).sum() / tokens
