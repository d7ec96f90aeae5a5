"""verl's metric names, and a step's metrics under the names that flashrl shows.

Source of the names: verl 0.9.1, verl/trainer/ppo/metric_utils.py, verl/trainer/ppo/rollout_corr_helper.py,
verl/utils/debug/metrics.py. A value is None where verl logged NaN (its file logger writes null) or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric under flashrl's `name` and verl's; `verl` is None for what is computed from several of verl's.

    `title` and `unit` are for figures; `heading` and `form` (a format specification) for columns of tables. NaN in a
    `watched` one means that the run is lost.
    """

    name: str
    verl: str | None
    title: str = ""
    unit: str = ""
    heading: str = ""
    form: str = ""
    watched: bool = False

    def cell(self, value: float | None) -> str:
        """A value as a column shows it, `–` for none."""
        return "–" if value is None else format(value, self.form)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("reward", "critic/score/mean", "reward", heading="reward", form=".3f", watched=True),
        Metric("accuracy", None, "accuracy", heading="accuracy", form=".3f"),
        Metric("response_length", "response_length/mean", "response length", "tokens", heading="length", form=".1f"),
        Metric("prompt_length", "prompt_length/mean", "prompt length", "tokens"),
        Metric("entropy", "actor/entropy", "entropy", "nats a token", heading="entropy", form=".3f"),
        Metric("grad_norm", "actor/grad_norm", "gradient norm", heading="grad", form=".3f", watched=True),
        Metric("loss", "actor/pg_loss", "policy loss", watched=True),
        Metric(
            "kl",
            "rollout_corr/kl",
            "KL of rollout against trainer",
            "nats a token",
            heading="KL",
            form=".4f",
            watched=True,
        ),
        Metric("kl_k3", "rollout_corr/k3_kl", "KL of rollout against trainer, never negative", "nats a token"),
        Metric("chi2", "rollout_corr/chi2_token"),
        Metric("rollout_nll", "rollout_corr/rollout_log_ppl", "negative log-likelihood in the rollout", "nats a token"),
        Metric("train_nll", "rollout_corr/training_log_ppl", "negative log-likelihood in the trainer", "nats a token"),
        Metric("weight_mean", "rollout_corr/rollout_is_mean", "mean importance weight", heading="w mean", form=".3f"),
        Metric("weight_max", "rollout_corr/rollout_is_max", "largest importance weight", heading="w max", form=".2f"),
        Metric("weight_std", "rollout_corr/rollout_is_std"),
        Metric("effective", "rollout_corr/rollout_is_eff_sample_size", "effective sample size", "share of tokens"),
        Metric(
            "truncated",
            "rollout_corr/rollout_is_ratio_fraction_high",
            "truncated weights",
            "share of tokens",
            heading="cut %",
            form=".2%",
        ),
        Metric("prob_diff", "training/rollout_probs_diff_mean", "mean difference of probabilities", watched=True),
        Metric("prob_diff_max", "training/rollout_probs_diff_max"),
        Metric("prob_correlation", "training/rollout_actor_probs_pearson_corr", "correlation of probabilities"),
        Metric(
            "tokens_per_s", "perf/throughput", "throughput", "tokens a second and device", heading="tok/s", form=".0f"
        ),
        Metric("tokens", "perf/total_num_tokens", "tokens of a step"),
        Metric("step_s", "timing_s/step", "time of a step", "s", heading="s/step", form=".1f"),
    )
}
"""All metrics of a step; lengths in tokens, KL and NLL in nats a token, `tokens_per_s` a device.

A new one is a row here, and its name in the tuples below of the places that show it.

Rollout against trainer, over the response tokens of a step's batch, with r = p_train / p_rollout of the sampled token
and, under token-level TIS, w = min(r, cap); in verl/trainer/ppo/rollout_corr_helper.py unless another file is named:

- `kl` (:959): mean of -ln r; may be negative. `kl_k3` (:966): mean of r - ln r - 1. Both before the cap, ln r not clamped.
- `chi2` (:1001): mean of r² - 1, before the cap, ln r clamped to ±20. Logged without TIS too, like the two above.
- `weight_mean` (:723), `weight_max` (:737), `weight_std` (:749), `effective` (:757): of w, after the cap. `effective` is
  (mean w)² / mean w², a share of the tokens. At sequence level `weight_max` is before the cap (:708).
- `truncated` (:728): share of tokens with r > cap, so before it.
- `rollout_nll`, `train_nll` (:972, :952): mean over responses, not over tokens.
- `prob_diff`, `prob_diff_max` (verl/utils/debug/metrics.py:118, 117): |p_train - p_rollout|; probabilities, although its
  docstring says log-probs.
"""

NAMES = {name: metric.verl for name, metric in METRICS.items() if metric.verl}
"""flashrl's name of a metric to verl's."""

WATCHED = tuple(name for name, metric in METRICS.items() if metric.watched)
"""Metrics whose NaN means that the run is lost."""


def _those(*names: str) -> tuple[Metric, ...]:
    return tuple(METRICS[name] for name in names)


LIVE = _those(
    *("reward", "response_length", "kl", "weight_mean", "weight_max", "truncated"),
    *("entropy", "grad_norm", "tokens_per_s", "step_s"),
)
"""Columns of the table of a run that is under way, beside accuracy."""
SPARED = _those(
    "weight_max", "grad_norm", "weight_mean", "entropy", "response_length", "tokens_per_s", "truncated", "kl"
)
"""Columns that a narrow terminal does without, the first one first."""
SWEEP = _those("reward", "kl", "truncated", "step_s", "tokens_per_s")
"""Columns of a sweep's table, each the arithmetic mean over a run's last steps; accuracy is that of the last
validation.
"""
PLOTTED = ("reward", "accuracy", "response_length", "kl", "truncated", "entropy", "step_s")
"""Metrics that `runs plot` draws where none are named."""
LEARNING_CURVES = ("reward", "accuracy", "response_length", "entropy", "grad_norm", "step_s")
MISMATCH_CURVES = ("kl", "weight_max", "truncated", "effective")
"""Metrics that the page of `runs report` draws."""
MISMATCH = ("kl", "weight_mean", "weight_max", "truncated", "effective", "prob_diff", "prob_correlation")
"""Metrics of rollout against trainer of which `runs report` has mean, extremes and last value."""

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
    """False for a validation alone, which verl logs before it trains: as step 0, or as the step that it resumed from.
    """
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
