"""What verl's rollout correction lacks or cannot compute: metrics, advantages of what rejection leaves, GMPO's scale.

Processes that neither correct nor train never import verl's modules of these, and are left as they are.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import TYPE_CHECKING, Any

from flashrl_cli.contract import PATCHED, VERL, before_import, replace_in_verl
from flashrl_cli.plugins import staleness

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

RATIO_MAX = "ratio_max"
"""The largest importance weight of a token before any cap, in the metrics of verl's correction."""
_TRAINER = "verl.trainer.ppo.v1"
_LOSSES = "verl.workers.utils.losses"


def apply() -> None:
    """Prepare this process when it imports verl's trainer or its losses, or at once if it has."""
    before_import(_TRAINER, prepare_trainer)
    before_import(_LOSSES, average_gmpo_over_mini_batch)


def prepare_trainer() -> None:
    """Change the metrics of the correction, and the advantages."""
    report_weights_that_are_all_zero()
    report_largest_ratio()
    staleness.report()
    whiten_what_is_left()
    compare_no_empty_responses()
    count_only_responses()


def _require_verl() -> None:
    if importlib.metadata.version("verl") != VERL:
        raise RuntimeError(f"flashrl changes the correction of verl {VERL} only")


def report_weights_that_are_all_zero() -> None:
    """Report an effective sample size of 0 for a batch whose weights IcePop all set to 0 (idempotent).

    verl divides by the mean square of such weights, and the run ends with a ZeroDivisionError
    (verl/trainer/ppo/rollout_corr_helper.py:758 in 0.9.1, https://github.com/verl-project/verl/pull/7559). Everything
    else that it reports of the applied weights is 0 as well, and what it reports of the raw ones is its own. Raises
    RuntimeError for a verl other than 0.9.1.
    """
    _require_verl()
    import verl.trainer.ppo.rollout_corr_helper as verls

    original = verls.compute_is_metrics
    if getattr(original, PATCHED, False):
        return

    @functools.wraps(original)
    def compute_is_metrics(rollout_is_weights: torch.Tensor, **more: Any) -> dict[str, float]:
        if rollout_is_weights.any():
            found: dict[str, float] = original(rollout_is_weights=rollout_is_weights, **more)
            return found
        found = original(rollout_is_weights=more["response_mask"].to(rollout_is_weights.dtype), **more)
        kept: tuple[str, ...] = ("_fraction_high", "_fraction_low")
        if more["rollout_is"] == "sequence":
            kept += ("rollout_is_max", "rollout_is_min")  # of weights before the cap
        zeros = {name: 0.0 for name in found if not name.endswith(kept)}
        return found | zeros | {"rollout_is_seq_max_deviation": 1.0}

    setattr(compute_is_metrics, PATCHED, True)
    verls.compute_is_metrics = compute_is_metrics


def report_largest_ratio() -> None:
    """Report the largest p_train / p_rollout of a step's tokens, before any cap and with or without one (idempotent).

    verl reports the largest weight of tokens after the cap (verl/trainer/ppo/rollout_corr_helper.py:737 in 0.9.1; no
    upstream issue asks for the other). As verl's weights, the ratio is at most exp(20). Raises RuntimeError for a verl
    other than 0.9.1.
    """
    _require_verl()
    import verl.trainer.ppo.rollout_corr_helper as verls

    original = verls.compute_offpolicy_metrics
    if getattr(original, PATCHED, False):
        return

    @functools.wraps(original)
    def compute_offpolicy_metrics(
        old_log_prob: torch.Tensor, rollout_log_prob: torch.Tensor | None, response_mask: torch.Tensor
    ) -> dict[str, Any]:
        found: dict[str, Any] = original(old_log_prob, rollout_log_prob, response_mask)
        if rollout_log_prob is not None:
            log_ratios = (old_log_prob - rollout_log_prob)[response_mask.bool()]
            found[RATIO_MAX] = log_ratios.max().clamp(max=verls.SAFETY_BOUND).exp().item()
        return found

    setattr(compute_offpolicy_metrics, PATCHED, True)
    verls.compute_offpolicy_metrics = compute_offpolicy_metrics


def whiten_what_is_left() -> None:
    """Whiten the values of a batch of which rejection left one token or none to 0 (idempotent).

    verl ends the run with a ValueError, because it divides by the number of tokens less 1
    (verl/utils/torch_functional.py:319 in 0.9.1, of the advantages `gae`, `reinforce_plus_plus` and
    `reinforce_plus_plus_baseline`; no upstream issue). Others go on, with a gradient of 0, and the run's watch reports
    the rejection. Raises RuntimeError for a verl other than 0.9.1.
    """
    _require_verl()
    import verl.utils.torch_functional as verls

    original = verls.masked_whiten
    if getattr(original, PATCHED, False):
        return

    @functools.wraps(original)
    def masked_whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
        if mask.sum() > 1:
            found: torch.Tensor = original(values, mask, shift_mean)
            return found
        return values * 0.0

    replace_in_verl(verls, masked_whiten)


def compare_no_empty_responses() -> None:
    """Let OPO's advantages be 0 in a group whose responses have no tokens to be trained on (idempotent).

    verl's baseline of such a group is 0 / 0 (verl/trainer/ppo/core_algos.py:713 in 0.9.1, no upstream issue). A NaN in
    the advantages remains one behind any mask, and an engine makes no update with a gradient of NaN: none of the
    mini-batch with the rows by which verl's trainer fills a batch up after failed rollouts
    (verl/trainer/ppo/padding_utils.py:179), nor of one with a rejected group. Raises RuntimeError for a verl other than
    0.9.1.
    """
    _require_verl()
    import verl.trainer.ppo.core_algos as verls

    original = verls.ADV_ESTIMATOR_REGISTRY["opo"]
    if getattr(original, PATCHED, False):
        return

    @functools.wraps(original)
    def compute_opo_outcome_advantage(
        token_level_rewards: torch.Tensor, response_mask: torch.Tensor, *more: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found, _ = original(token_level_rewards, response_mask, *more, **options)
        found = found.masked_fill(response_mask == 0, 0.0)
        return found, found

    setattr(compute_opo_outcome_advantage, PATCHED, True)
    verls.ADV_ESTIMATOR_REGISTRY["opo"] = compute_opo_outcome_advantage
    verls.compute_opo_outcome_advantage = compute_opo_outcome_advantage


def count_only_responses() -> None:
    """Scale GPG's advantages by the number of responses, without the rows by which verl fills a batch up (idempotent).

    GPG multiplies by the rows of a batch over those with a reward (verl/trainer/ppo/core_algos.py:811 in 0.9.1, no
    upstream issue), and a row without a reward makes all others' advantages larger. Such rows have a prompt of their
    own, whose name no response's has (verl/trainer/ppo/padding_utils.py:179). Raises RuntimeError for a verl other than
    0.9.1.
    """
    _require_verl()
    import verl.trainer.ppo.core_algos as verls

    original = verls.ADV_ESTIMATOR_REGISTRY["gpg"]
    if getattr(original, PATCHED, False):
        return

    @functools.wraps(original)
    def compute_gpg_outcome_advantage(
        token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Sequence[str], *more: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found, _ = original(token_level_rewards, response_mask, index, *more, **options)
        responses = sum(not str(prompt).startswith("pad") for prompt in index)
        found = found * (responses / len(index))
        return found, found

    setattr(compute_gpg_outcome_advantage, PATCHED, True)
    verls.ADV_ESTIMATOR_REGISTRY["gpg"] = compute_gpg_outcome_advantage
    verls.compute_gpg_outcome_advantage = compute_gpg_outcome_advantage


def average_gmpo_over_mini_batch() -> None:
    """Make the GMPO loss the mean over the responses of a mini-batch, however that is cut into passes (idempotent).

    verl takes the mean over the responses of each micro-batch and adds up the micro-batches' gradients, so that twice
    as many passes double the gradient (verl/trainer/ppo/core_algos.py:1996 in 0.9.1,
    https://github.com/verl-project/verl/issues/7913, https://github.com/verl-project/verl/pull/5614). Its other losses
    divide by the responses of the mini-batch on all devices, and multiply by the devices, over which FSDP averages.
    Raises RuntimeError for a verl other than 0.9.1.
    """
    _require_verl()
    import verl.trainer.ppo.core_algos as verls

    original = verls.POLICY_LOSS_REGISTRY["geo_mean"]
    if getattr(original, PATCHED, False):
        return

    @functools.wraps(original)
    def compute_policy_loss_geo_mean(*, log_prob: torch.Tensor, config: Any, **more: Any) -> Any:
        loss, metrics = original(log_prob=log_prob, config=config, **more)
        of_all = config.global_batch_info
        responses = of_all.get("global_batch_size") or len(log_prob)
        return loss * (len(log_prob) / responses * of_all.get("dp_size", 1)), metrics

    setattr(compute_policy_loss_geo_mean, PATCHED, True)
    verls.POLICY_LOSS_REGISTRY["geo_mean"] = compute_policy_loss_geo_mean
    verls.compute_policy_loss_geo_mean = compute_policy_loss_geo_mean
