"""verl's metric names, and a step's metrics under the names that flashrl shows.

Source of the names: verl 0.9.1, verl/trainer/ppo/metric_utils.py, verl/trainer/ppo/rollout_corr_helper.py,
verl/utils/debug/metrics.py. A value is None where verl logged NaN (its file logger writes null) or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

NAMES = {
    "reward": "critic/score/mean",
    "response_length": "response_length/mean",
    "prompt_length": "prompt_length/mean",
    "entropy": "actor/entropy",
    "grad_norm": "actor/grad_norm",
    "loss": "actor/pg_loss",
    "kl": "rollout_corr/kl",
    "kl_k3": "rollout_corr/k3_kl",
    "chi2": "rollout_corr/chi2_token",
    "rollout_nll": "rollout_corr/rollout_log_ppl",
    "train_nll": "rollout_corr/training_log_ppl",
    "weight_mean": "rollout_corr/rollout_is_mean",
    "weight_max": "rollout_corr/rollout_is_max",
    "weight_std": "rollout_corr/rollout_is_std",
    "effective": "rollout_corr/rollout_is_eff_sample_size",
    "truncated": "rollout_corr/rollout_is_ratio_fraction_high",
    "prob_diff": "training/rollout_probs_diff_mean",
    "prob_diff_max": "training/rollout_probs_diff_max",
    "prob_correlation": "training/rollout_actor_probs_pearson_corr",
    "tokens_per_s": "perf/throughput",
    "tokens": "perf/total_num_tokens",
    "step_s": "timing_s/step",
}
"""flashrl's name of a metric to verl's. Lengths in tokens, KL and NLL in nats a token, `tokens_per_s` a device.

Rollout against trainer, over the response tokens of a step's batch, with r = p_train / p_rollout of the sampled token and, under
token-level TIS, w = min(r, cap); in verl/trainer/ppo/rollout_corr_helper.py unless another file is named:

- `kl` (:959): mean of -ln r; may be negative. `kl_k3` (:966): mean of r - ln r - 1. Both before the cap, ln r not clamped.
- `chi2` (:1001): mean of r² - 1, before the cap, ln r clamped to ±20. Logged without TIS too, like the two above.
- `weight_mean` (:723), `weight_max` (:737), `weight_std` (:749), `effective` (:757): of w, after the cap. `effective` is
  (mean w)² / mean w², a share of the tokens. At sequence level `weight_max` is before the cap (:708).
- `truncated` (:728): share of tokens with r > cap, so before it.
- `rollout_nll`, `train_nll` (:972, :952): mean over responses, not over tokens.
- `prob_diff`, `prob_diff_max` (verl/utils/debug/metrics.py:118, 117): |p_train - p_rollout|; probabilities, although its
  docstring says log-probs.
"""

TIMINGS = {
    "generate": "timing_s/gen",
    "reward": "timing_s/reward",
    "log-probs": "timing_s/old_log_prob",
    "values": "timing_s/values",
    "critic": "timing_s/update_critic",
    "actor": "timing_s/update_actor",
    "refit": "timing_s/update_weights",
    "save": "timing_s/save_checkpoint",
    "validate": "timing_s/testing",
}
"""Phases of a step to verl's timers, in seconds."""

WATCHED = ("grad_norm", "loss", "kl", "reward", "prob_diff")
"""Metrics whose NaN means that the run is lost."""

BESIDE_STEP = "validate"
"""The phase that verl's timer of the step leaves out (verl/trainer/ppo/v1/trainer_base.py:494)."""

SECONDS = "seconds."
"""Before a phase's name: the metric of its seconds."""

VALIDATION = "val-"
"""What the names of validation metrics start with (verl/trainer/ppo/v1/trainer_base.py:1356-1379)."""
ACCURACY = re.compile(r"^val-core/(?P<data>.+)/(?P<metric>[^/]+)/mean@\d+$")


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step of training (or validation before training: step 0)."""

    step: int
    values: Mapping[str, float | None]
    seconds: Mapping[str, float]
    accuracy: float | None
    lost: tuple[str, ...]
    """Watched metrics that verl logged as NaN."""
    trained: bool = True
    """False for a validation alone, which verl logs before it trains: as step 0, or as the step that it resumed from."""
    logged: Mapping[str, float | None] = field(default_factory=dict)
    """All that verl logged, under its own names."""

    def __getitem__(self, name: str) -> float | None:
        return self.values.get(name)


def verl_name(name: str) -> str:
    """verl's name of a metric: of one of `NAMES`, of `seconds.<phase>`; any other name is verl's own already."""
    phase = name.removeprefix(SECONDS) if name.startswith(SECONDS) else ""
    return TIMINGS.get(phase) or NAMES.get(name, name)


def read_step(step: int, data: Mapping[str, float | None]) -> StepMetrics:
    """A line of verl's metrics file under flashrl's names; accuracy is the mean over validation sets."""
    accuracies = [value for key, value in data.items() if value is not None and ACCURACY.match(key)]
    return StepMetrics(
        step=step,
        values={name: data.get(key) for name, key in NAMES.items()},
        seconds={phase: value for phase, key in TIMINGS.items() if (value := data.get(key)) is not None},
        accuracy=sum(accuracies) / len(accuracies) if accuracies else None,
        lost=tuple(name for name in WATCHED if NAMES[name] in data and data[NAMES[name]] is None),
        trained=step > 0 and not (data and all(key.startswith(VALIDATION) for key in data)),
        logged=data,
    )
