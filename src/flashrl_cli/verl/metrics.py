"""verl's metric names, and the metrics of a step under flashrl's names.

The names are those of verl 0.9.1: verl/trainer/ppo/metric_utils.py, verl/trainer/ppo/rollout_corr_helper.py and
verl/utils/debug/metrics.py. A value is None where verl logged NaN (its file logger writes null) or nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from flashrl_cli import contract
from flashrl_cli.text import counted


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric under flashrl's `name` and verl's; `verl` is None for a metric computed from several of verl's.

    Figures show `title` and `unit`; columns of tables have `heading` and `form` (a format specification). A NaN in a
    `watched` metric means that the run is lost.
    """

    name: str
    verl: str | None
    title: str = ""
    unit: str = ""
    heading: str = ""
    form: str = ""
    watched: bool = False

    def cell(self, value: float | None) -> str:
        """Text of a value in a column of a table; `–` for None."""
        return "–" if value is None else format(value, self.form)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("reward", "critic/score/mean", "reward", heading="reward", form=".3f", watched=True),
        Metric("reward_max", "critic/score/max", "largest reward"),
        Metric("reward_min", "critic/score/min", "least reward"),
        Metric("accuracy", None, "accuracy", heading="accuracy", form=".3f"),
        Metric("response_length", "response_length/mean", "response length", "tokens", heading="length", form=".1f"),
        Metric("prompt_length", "prompt_length/mean", "prompt length", "tokens"),
        Metric("longest_response", "response_length/max", "longest response", "tokens"),
        Metric("longest_prompt", "prompt_length/max", "longest prompt", "tokens"),
        Metric("longest_share", "response_length/clip_ratio", "responses of the longest length", "share"),
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
        Metric(
            "ratio_max",
            "rollout_corr/ratio_max",
            "largest importance weight before the cap",
            heading="r max",
            form="#.3g",
        ),
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
        Metric("rejected", "rollout_corr/rollout_rs_masked_fraction", "rejected tokens", "share of tokens"),
        Metric("prob_diff", "training/rollout_probs_diff_mean", "mean difference of probabilities", watched=True),
        Metric("prob_diff_max", "training/rollout_probs_diff_max"),
        Metric("prob_correlation", "training/rollout_actor_probs_pearson_corr", "correlation of probabilities"),
        Metric(
            "codes_changed",
            f"{contract.REFIT}codes_changed",
            "8-bit weights that the step changed",
            "share",
            heading="codes %",
            form=".3%",
        ),
        Metric("weights_changed", f"{contract.REFIT}weights_changed", "bf16 weights that the step changed", "share"),
        Metric("arrived", f"{contract.REFIT}arrived", "change of the weights that the 8-bit weights show", "share"),
        Metric("update_cosine", f"{contract.REFIT}update_cosine", "cosine of that change and the 8-bit weights' own"),
        Metric(
            "tokens_per_s", "perf/throughput", "throughput", "tokens a second and device", heading="tok/s", form=".0f"
        ),
        Metric("share", None, "share of the tokens"),
        Metric("stale_groups", "training/off_policy/evicted_samples", "groups dropped as too stale"),
        Metric("failed_groups", "training/rollout_failure/evicted_samples", "groups dropped because a response failed"),
        Metric("tokens", "perf/total_num_tokens", "tokens of a step"),
        Metric("step_s", "timing_s/step", "time of a step", "s", heading="s/step", form=".1f"),
        Metric("mfu", "perf/mfu/actor", "MFU of the policy update", "share of the peak"),
        Metric("critic_mfu", "perf/mfu/critic", "MFU of the critic update", "share of the peak"),
        Metric("staleness", "training/off_policy/trajectory_staleness/mean", "staleness of responses", "steps"),
        Metric("staleness_max", "training/off_policy/trajectory_staleness_worst/max", "largest staleness", "steps"),
        Metric(
            "interrupted", "training/off_policy/trajectory_spans/max", "policies that sampled one response, at most"
        ),
    )
}
"""All metrics of a step.

Lengths are in tokens, KL and NLL in nats per token, `tokens_per_s` per device. `longest_share` is the share of
responses that are as long as the longest one of the batch (verl/trainer/ppo/metric_utils.py:545). Model FLOPs
utilization (`mfu`, `critic_mfu`) is the arithmetic of the tokens without padding and recomputation, divided by that of
a GPU at its peak in bf16 (verl/utils/flops_counter.py); it is 0 for a GPU or a model that verl does not know, and
means nothing on a CPU, for which verl assumes 448 GFLOP/s. To add a metric, add a row here and its
name to the tuples below for the tables and figures that show it.

Metrics that compare rollout and trainer are taken over the response tokens of a step's batch. With
r = p_train / p_rollout of the sampled token and, under token-level TIS, the importance weight w = min(r, cap), they are
(lines of verl/trainer/ppo/rollout_corr_helper.py unless another file is named):

- `kl` (:959) is the mean of -ln r, which may be negative; `kl_k3` (:966) is the mean of r - ln r - 1. Both are taken
  before the cap, and ln r is not clamped.
- `chi2` (:1001) is the mean of r² - 1 before the cap, with ln r clamped to ±20. Like the two above it is logged without
  TIS, too.
- `ratio_max` (plugins/corrections.py) is the largest r, before the cap and with or without one; it is at most exp(20).
- `weight_mean` (:723), `weight_max` (:737), `weight_std` (:749) and `effective` (:757) are of w, after the cap.
  `effective` is (mean w)² / mean w², a share of the tokens. At sequence level `weight_max` is before the cap (:708).
- `truncated` (:728) is the share of tokens with r > cap; IcePop zeroes these. At sequence level it is one of responses.
- `rejected` (:407) is the share of tokens that rejection leaves out.
- `stale_groups` and `failed_groups` (verl/trainer/ppo/v1/replay_buffer.py:367) count groups that were dropped while
  the step waited for its batch, for which other prompts were sampled. Asynchronous modes log the first; the second is
  logged by every mode that replaces failed groups.
- `rollout_nll` and `train_nll` (:972, :952) are means over responses, not over tokens.
- `prob_diff` and `prob_diff_max` (verl/utils/debug/metrics.py:118, 117) are the mean and the maximum of
  |p_train - p_rollout|. These are probabilities, although verl's docstring calls them log-probs.

How old responses are is counted in weight updates since the engine took the weights that sampled them
(verl/trainer/ppo/v1/trainer_base.py:1979): `staleness` by the last of these weights, `staleness_max` by the first. A
response that a weight update interrupted was sampled by several policies, `interrupted` of them at most. In
asynchronous modes the phase `generate` of a step is the time for which the trainer waits for responses.

`codes_changed`, `weights_changed`, `arrived` and `update_cosine` compare the 8-bit weights of the rollout engines with
what the trainer sent them after the step; plugins/arrival.py defines them.
"""

NAMES = {name: metric.verl for name, metric in METRICS.items() if metric.verl}
"""Metrics that verl logs: flashrl's name to verl's."""

WATCHED = tuple(name for name, metric in METRICS.items() if metric.watched)
"""Metrics whose NaN means that the run is lost."""


def _those(*names: str) -> tuple[Metric, ...]:
    return tuple(METRICS[name] for name in names)


LIVE = _those(
    *("reward", "response_length", "kl", "weight_mean", "weight_max", "ratio_max", "truncated", "codes_changed"),
    *("entropy", "grad_norm", "tokens_per_s", "step_s"),
)
"""Columns of the table that a running training shows, besides accuracy."""
SPARED = _those(
    *("weight_max", "ratio_max", "grad_norm", "weight_mean", "codes_changed"),
    *("entropy", "response_length", "tokens_per_s", "truncated", "kl"),
)
"""Columns of `LIVE` in the order in which they are left out on a narrow terminal."""
LIVE_BY_STALENESS = ("kl", "weight_mean")
"""Metrics of which that table also has a column for each staleness, in an asynchronous mode."""
SWEEP = _those("reward", "kl", "truncated", "step_s", "tokens_per_s")
"""Columns of a sweep's table, besides accuracy.

Each is the arithmetic mean over a run's last steps; accuracy is that of the last validation.
"""
PLOTTED = ("reward", "accuracy", "response_length", "kl", "truncated", "entropy", "step_s")
"""Metrics that `runs plot` draws by default."""
LEARNING_CURVES = ("reward", "accuracy", "response_length", "entropy", "grad_norm", "step_s")
MISMATCH_CURVES = ("kl", "ratio_max", "weight_max", "truncated", "effective", "codes_changed", "arrived")
"""Metrics of rollout against trainer that the page of `runs report` draws."""
STALENESS_CURVES = ("kl_k3", "weight_mean", "effective", "truncated", "share")
"""Metrics of which that page draws a curve for each staleness, in an asynchronous mode."""
MISMATCH = (
    *("kl", "weight_mean", "weight_max", "ratio_max", "truncated", "rejected", "effective", "prob_diff"),
    *("prob_correlation", *contract.ARRIVAL),
)
"""Metrics of rollout against trainer whose mean, extremes and last value `runs report` lists."""

TIMINGS = {
    "generate": "timing_s/gen",
    "reward": "timing_s/reward",
    "log-probs": "timing_s/old_log_prob",
    "reference": "timing_s/ref",
    "values": "timing_s/values",
    "advantage": "timing_s/adv",
    "critic": "timing_s/update_critic",
    "actor": "timing_s/update_actor",
    "refit": "timing_s/update_weights",
    "save": "timing_s/save_checkpoint",
    "validate": "timing_s/testing",
}
"""Phases of a step to verl's timers, whose values are in seconds."""

BESIDE_STEP = "validate"
"""The phase that verl's timer of the step does not include (verl/trainer/ppo/v1/trainer_base.py:494)."""

DROPPED = {
    "stale_groups": "older than trainer.max_staleness",
    "failed_groups": "with a response that could not be sampled or scored",
}
"""Metrics that count groups of responses which were sampled and not trained on, and why."""

OCCASIONAL = ("save", "validate")
"""Phases that only some steps have."""

AT = "@"
"""Between a metric of FIGURES and the staleness of whose tokens it is: `kl@1`."""
FRESH, ENOUGH = contract.FRESH, contract.ENOUGH
FIGURES = (
    *("tokens", "share", "kl", "kl_k3", "weight_mean", "effective", "truncated"),
    *("prob_diff", "prob_correlation"),
)
"""Metrics by staleness (plugins/staleness.py); `share` is that of the step's tokens."""
_STALE = re.compile(rf"{contract.STALENESS}(\d+|{FRESH})/(\w+)")

SECONDS = "seconds."
"""Prefix of the name of a metric that is a phase's duration: `seconds.refit`."""

VALIDATION = "val-"
"""Start of the names of validation metrics (verl/trainer/ppo/v1/trainer_base.py:1356-1379)."""
ACCURACY = re.compile(r"^val-core/(?P<data>.+)/(?P<metric>[^/]+)/mean@\d+$")


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Metrics of one training step, or of a validation before training (step 0).

    Metrics of the tokens of one staleness are among the `values` of steps of an asynchronous mode (`AT`).
    """

    step: int
    values: Mapping[str, float | None]
    seconds: Mapping[str, float]
    accuracy: float | None
    lost: tuple[str, ...]
    """Watched metrics that verl logged as NaN."""
    trained: bool = True
    """False for a validation without a training step.

    verl logs one before it trains, as step 0 or as the step that it resumed from.
    """
    logged: Mapping[str, float | None] = field(default_factory=dict)
    """Everything that verl logged, under verl's names."""

    def __getitem__(self, name: str) -> float | None:
        return self.values.get(name)

    @property
    def stalenesses(self) -> tuple[int, ...]:
        """Stalenesses of the step's tokens, in order; empty if the mode of the trainer is `sync`."""
        found = (name.partition(AT)[2] for name in self.values if name.startswith(f"share{AT}"))
        return tuple(sorted(int(number) for number in found if number != FRESH))

    @property
    def fresh(self) -> str | None:
        """End of the names of metrics over tokens without staleness: the step's own in mode `sync`, else `@0`.

        In a step with few tokens of staleness 0 it is that of the tokens that were scored again; None without these.
        """
        if not self.stalenesses:
            return ""
        if (self[f"tokens{AT}0"] or 0) >= ENOUGH:
            return f"{AT}0"
        return f"{AT}{FRESH}" if self[f"tokens{AT}{FRESH}"] else None


def by_staleness(name: str, steps: Iterable[StepMetrics]) -> list[Metric]:
    """A metric of FIGURES for each staleness in `steps`, and for tokens that were scored again."""
    whole, found = METRICS[name], {part for step in steps for metric in step.values if (part := _part(name, metric))}
    parts = [*sorted((part for part in found if part != FRESH), key=int), *({FRESH} & found)]
    return [
        replace(whole, name=f"{name}{AT}{part}", verl=None, heading=f"{whole.heading}{AT}{part}", watched=False)
        for part in parts
    ]


def _part(name: str, metric: str) -> str:
    """The staleness of a metric called `name`; empty for another one."""
    figure, _, part = metric.partition(AT)
    return part if figure == name else ""


def dropped(steps: Iterable[StepMetrics]) -> Counter[str]:
    """How many groups of responses these steps dropped, by the metric that counts them."""
    counts: Counter[str] = Counter()
    for step in steps:
        counts.update({name: round(step[name] or 0) for name in DROPPED})
    return +counts


def dropped_in_words(counts: Mapping[str, int]) -> str:
    """`3 groups older than trainer.max_staleness and 1 group with a response that …`."""
    return " and ".join(f"{counted(counts[name], 'group')} {why}" for name, why in DROPPED.items() if counts.get(name))


def verl_name(name: str) -> str:
    """verl's name of a metric called as in `NAMES`, `seconds.<phase>` or `kl@1`; other names are returned unchanged."""
    figure, at, number = name.partition(AT)
    if at and figure in FIGURES:  # names of validation metrics have such a sign, too
        return f"{contract.STALENESS}{number}/{figure}"
    phase = name.removeprefix(SECONDS) if name.startswith(SECONDS) else ""
    return TIMINGS.get(phase) or NAMES.get(name, name)


def read_step(step: int, data: Mapping[str, float | None]) -> StepMetrics:
    """Metrics of a line of verl's metrics file; accuracy is the mean over the validation sets."""
    accuracies = [value for key, value in data.items() if value is not None and ACCURACY.match(key)]
    stale = {f"{found[2]}{AT}{found[1]}": value for key, value in data.items() if (found := _STALE.fullmatch(key))}
    return StepMetrics(
        step=step,
        values={name: data.get(key) for name, key in NAMES.items()} | stale,
        seconds={phase: value for phase, key in TIMINGS.items() if (value := data.get(key)) is not None},
        accuracy=sum(accuracies) / len(accuracies) if accuracies else None,
        lost=tuple(name for name in WATCHED if NAMES[name] in data and data[NAMES[name]] is None),
        trained=step > 0 and not (data and all(key.startswith(VALIDATION) for key in data)),
        logged=data,
    )
