"""Values and rules of the correction, the loss and the advantage: what they derive, and which of them go together.

The correction weights tokens by w = p_train / p_rollout, or rejects some of them (docs/correction.md). What a rule says
of verl's trainer was read in verl 0.9.1 or run with it; its files are named below verl/.

Before the start, sequences are judged by a model of their mismatch: ln w of a token has mean -KL and variance 2 KL, the
only pair for which E[w] = 1 if ln w is normal; over a response of L tokens the sum then has mean -L KL and variance
2 L KL. At a KL of 0.025 and 100 tokens the mean of weights at cap 2 is then 0.36.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from flashrl_cli.config.diagnose import Rule, Violation
from flashrl_cli.config.layers import Layer, derived, rank
from flashrl_cli.precision import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flashrl_cli.config.spec import RejectSpec, RunSpec

KIND, CAP, LOWER, REJECT, LOSS = (
    *(f"correction.{name}" for name in ("kind", "cap", "lower", "reject")),
    "algorithm.loss",
)
DEFAULT_CAP = {"tis": 2.0, "seq-tis": 2.0, "icepop": 5.0}
"""Caps where none is set: verl's own, and IcePop's (arXiv 2510.18855)."""
DEFAULT_LOWER = 0.5
"""IcePop's lower bound where none is set (arXiv 2510.18855)."""
BY_LOSS: Mapping[str, Mapping[str, float | str]] = {
    # arXiv 2507.18071, section 5.1: ratios of sequences vary less than those of tokens
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "loss_aggregation": "seq-mean-token-mean"},
    "sapo": {"loss_aggregation": "seq-mean-token-mean"},
    # arXiv 2506.13585: only the upper bound acts
    "cispo": {"clip_low": 10.0, "clip_high": 0.2},
    # arXiv 2602.04879: thresholds of a divergence, and a cap of the ratio that hardly ever acts
    "dppo-tv": {"clip_low": 0.15, "clip_high": 0.15, "clip_c": 20.0},
    "dppo-kl": {"clip_low": 0.05, "clip_high": 0.05, "clip_c": 20.0},
    # arXiv 2507.20673: bounds of ln ratio
    "gmpo": {"clip_low": 0.4, "clip_high": 0.4, "loss_aggregation": "seq-mean-token-mean"},
}
"""Values of `algorithm` that a loss takes unless they are set beside it or later; the others keep `ppo`'s."""
CLIPS = ("ppo", "gspo", "cispo", "dppo-tv", "dppo-kl", "clip-cov", "gmpo")
"""Losses that read `clip_low` and `clip_high`."""
CAPS_RATIO = ("ppo", "dppo-tv", "dppo-kl")
"""Losses that read `clip_c`."""
OWN_AGGREGATION = ("sapo", "gmpo")
"""Losses that average over responses of token averages, whatever `loss_aggregation` is."""
ALONE = ("gae", "reinforce-plus-plus")
"""Advantages that compare no responses to the same prompt."""
BY_STD = ("grpo", "grpo-passk")
"""Advantages that read `normalize_by_std`."""
LOSES_REWARD = {
    "gae": "the reward is at the last token, and a response whose last token is rejected loses it",
    "reinforce-plus-plus": "the reward is at the last token, and a response whose last token is rejected loses it",
    "opo": "the baseline weights responses by their number of kept tokens",
}
"""Advantages that token rejection falsifies, and why (trainer/ppo/core_algos.py:213, 755 and 697)."""
LANGUAGE_MODEL_KL = {False: 0.001, True: 0.025}
"""KL in nats a token between rollout and trainer, by whether the rollout is quantized.

Measured in GRPO runs of SmolLM2-135M (benchmarks/results/language_model.json).
"""
PREPARED_KL = 1e-4
"""The same of the prepared tiny policy, in any precision."""
KEPT = 0.5
"""Least share of tokens or responses that rejection may keep, by the model."""


def derivations(spec: RunSpec, layers: Sequence[Layer]) -> Iterator[Layer]:
    """Yield a layer for each derived value of the correction and of the loss; see `resolve.derived_layers`.

    `correction.kind` and `correction.cap` are `none` and null together: the later word decides.
    """
    yield from _correction(spec, layers)
    chosen = rank(LOSS, layers)
    for name, value in BY_LOSS.get(spec.algorithm.loss, {}).items():
        key = f"algorithm.{name}"
        if rank(key, layers) < chosen:
            yield derived(key, value, f"{LOSS} = {spec.algorithm.loss}")


def _correction(spec: RunSpec, layers: Sequence[Layer]) -> Iterator[Layer]:
    correction = spec.correction
    kind, cap, lower = correction.kind, correction.cap, correction.lower
    chosen, capped = rank(KIND, layers), rank(CAP, layers)
    if cap is not None and kind == "none" and capped != chosen:
        if capped > chosen:
            kind = "tis"
            yield derived(KIND, kind, f"{CAP} = {cap:g}")
        else:
            yield derived(CAP, None, f"{KIND} = none")
    elif cap is None and kind != "none":
        if capped > chosen:
            kind = "none"
            yield derived(KIND, kind, f"{CAP} = null")
        else:
            yield derived(CAP, DEFAULT_CAP[kind], f"{KIND} = {kind}")
    if kind == "icepop" and lower is None:
        yield derived(LOWER, DEFAULT_LOWER, f"{KIND} = icepop")
    elif kind != "icepop" and lower is not None and rank(LOWER, layers) < max(chosen, capped):
        yield derived(LOWER, None, f"{KIND} = {kind}")
    reject = correction.reject
    if reject and reject.estimator == "k1" and reject.lower is None:
        yield derived(f"{REJECT}.lower", 1 / reject.upper, f"1 / {REJECT}.upper")


def weights_have_a_kind(spec: RunSpec) -> Iterator[Violation]:
    """A cap or a lower bound belongs to a kind of weights that reads it."""
    correction = spec.correction
    if correction.cap is not None and correction.kind == "none":
        yield Violation(CAP, f"{correction.cap:g} with {KIND} = none", "--set correction.kind=tis, or drop the cap")
    if correction.lower is not None and correction.kind != "icepop":
        message = f"{correction.lower:g}: {correction.kind} weights have no lower bound"
        yield Violation(LOWER, message, f"--set {LOWER}=null, or --set {KIND}=icepop")


def icepop_keeps_1(spec: RunSpec) -> Iterator[Violation]:
    """IcePop's bounds enclose 1, the weight of a token on which rollout and trainer agree; others drop all of these."""
    correction = spec.correction
    if correction.kind != "icepop":
        return
    cap, lower = correction.cap or DEFAULT_CAP["icepop"], correction.lower or DEFAULT_LOWER
    if cap < 1:
        message = f"{cap:g} is below 1: icepop would zero every token on which rollout and trainer agree"
        yield Violation(CAP, message, f"--set {CAP}=5")
    elif lower > cap:
        message = f"{lower:g} is above {CAP} = {cap:g}: icepop would zero every token"
        yield Violation(LOWER, message, f"--set {LOWER}=0.5")
    elif lower > 1:
        message = f"{lower:g} is above 1: icepop would zero every token on which rollout and trainer agree"
        yield Violation(LOWER, message, f"--set {LOWER}=0.5")


def icepop_is_no_geometric_mean(spec: RunSpec) -> Iterator[Violation]:
    """GMPO takes the geometric mean of a response's weights, and one weight of 0 makes it 0.

    verl adds 1e-10 to each before the logarithm (trainer/ppo/core_algos.py:1990): with a single token of 20 outside of
    the bounds, a response's weight is 0.32 instead of 1.
    """
    if spec.correction.kind == "icepop" and spec.algorithm.loss == "gmpo":
        yield Violation(
            KIND,
            "icepop with algorithm.loss = gmpo: its geometric mean turns one zeroed token into a zeroed response",
            f"--set {KIND}=tis, or --set {LOSS}=ppo",
        )


def rejection_has_bounds(spec: RunSpec) -> Iterator[Violation]:
    """Bounds of k1 are importance weights and enclose 1; k2 and k3 are divergences, with an upper bound only.

    verl has no `seq_max_k1` (trainer/ppo/rollout_corr_helper.py:77).
    """
    reject = spec.correction.reject
    if reject is None:
        return
    if reject.estimator != "k1":
        if reject.lower is not None:
            yield Violation(
                f"{REJECT}.lower",
                f"{reject.lower:g}: {reject.estimator} is a divergence, which has no lower bound",
                f"--set {REJECT}.lower=null, or --set {REJECT}.estimator=k1 for bounds of weights",
            )
        return
    lower = 1 / reject.upper if reject.lower is None else reject.lower
    if reject.by == "seq-max":
        yield Violation(
            f"{REJECT}.estimator",
            "verl takes the largest k2 or k3 of a response, not k1",
            f"--set {REJECT}.estimator=k3",
        )
    elif reject.lower is not None and lower > reject.upper:
        message = f"{lower:g} is above {REJECT}.upper = {reject.upper:g}: everything would be rejected"
        yield Violation(f"{REJECT}.lower", message, f"--set {REJECT}.lower=null")
    elif reject.upper <= 1:
        message = f"{reject.upper:g}: weights of 1, where rollout and trainer agree, would be rejected"
        yield Violation(f"{REJECT}.upper", message, f"--set {REJECT}.upper=2")
    elif lower >= 1:
        message = f"{lower:g}: weights of 1, where rollout and trainer agree, would be rejected"
        yield Violation(f"{REJECT}.lower", message, f"--set {REJECT}.lower=null")


def rejection_leaves_rewards(spec: RunSpec) -> Iterator[Violation]:
    """Rejection clears the response mask before advantages are computed from it.

    With GAE, an advantage of +0.97 became -0.58 where the last token was rejected.
    """
    reject, advantage = spec.correction.reject, spec.algorithm.advantage
    if reject is not None and reject.by == "token" and advantage in LOSES_REWARD:
        yield Violation(
            f"{REJECT}.by",
            f"token with algorithm.advantage = {advantage}: {LOSES_REWARD[advantage]}",
            f"--set {REJECT}.by=seq-mean",
        )


def group_has_members(spec: RunSpec) -> Iterator[Violation]:
    """An advantage within a group compares the responses to one prompt, and a single response with nothing."""
    advantage = spec.algorithm.advantage
    if advantage not in ALONE and spec.rollout.n == 1:
        yield Violation("rollout.n", f"{advantage} needs more than one response a prompt", fix={"rollout.n": 8})


def std_is_read(spec: RunSpec) -> Iterator[Violation]:
    """Of the advantages that divide by a standard deviation, verl lets only GRPO and its pass@k form go without.

    See trainer/ppo/ray_trainer.py:252, which does not pass the switch on to `grpo_vectorized`.
    """
    if spec.algorithm.advantage == "grpo-vectorized" and not spec.algorithm.normalize_by_std:
        yield Violation(
            "algorithm.normalize_by_std",
            "false is not read by grpo-vectorized, which always divides by the standard deviation",
            fix={"algorithm.advantage": "grpo"},
        )


def aggregation_is_read(spec: RunSpec) -> Iterator[Violation]:
    """SAPO and GMPO average over responses whatever is configured (trainer/ppo/core_algos.py:1695, 1995)."""
    loss, aggregation = spec.algorithm.loss, spec.algorithm.loss_aggregation
    if loss in OWN_AGGREGATION and aggregation != "seq-mean-token-mean":
        yield Violation(
            "algorithm.loss_aggregation",
            f"{aggregation} is not read by {loss}, which averages over responses",
            fix={"algorithm.loss_aggregation": "seq-mean-token-mean"},
        )


class Noise(NamedTuple):
    """Mean and standard deviation of ln w under the model of the module's docstring."""

    mean: float
    deviation: float

    def below(self, weight: float) -> float:
        """Probability of a weight below `weight`."""
        return _normal((math.log(weight) - self.mean) / self.deviation)

    def truncated_mean(self, cap: float) -> float:
        """Mean of min(w, cap)."""
        variance = self.deviation**2
        kept = math.exp(self.mean + variance / 2) * _normal((math.log(cap) - self.mean - variance) / self.deviation)
        return kept + cap * (1 - self.below(cap))


def _normal(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def expected_kl(spec: RunSpec) -> float:
    """KL in nats a token that rollouts of this precision have shown, of a language model or of the tiny policy."""
    if spec.model.path.startswith("prepared:"):
        return PREPARED_KL
    return LANGUAGE_MODEL_KL[PRECISIONS[spec.rollout.precision].quantized]


def noise(by: str, kl: float, length: float) -> Noise:
    """Noise of a token's weight, or of the product (`seq-sum`) or geometric mean (`seq-mean`) of `length` tokens."""
    tokens = {"seq-sum": length, "seq-mean": 1 / length}.get(by, 1.0)
    return Noise(-kl * (length if by == "seq-sum" else 1), math.sqrt(2 * kl * tokens))


def sequence_weights_survive(spec: RunSpec) -> Iterator[Violation]:
    """Weights of responses are products over tokens, whose median vanishes with KL times length."""
    correction, longest = spec.correction, spec.data.max_response_length
    if correction.kind != "seq-tis":
        return
    kl, cap = expected_kl(spec), correction.cap or DEFAULT_CAP["seq-tis"]
    mean = noise("seq-sum", kl, longest).truncated_mean(cap)
    if 1 - mean > spec.watch.max_weight_deviation:
        yield Violation(
            KIND,
            f"seq-tis with data.max_response_length = {longest}: at a KL of {kl:g} nats a token, as measured with"
            f" {spec.rollout.precision} rollouts, the mean weight of a response is {mean:.2g} instead of 1",
            f"--set {KIND}=tis, whose mean does not fall with the length",
        )


def rejection_is_wider_than_noise(spec: RunSpec) -> Iterator[Violation]:
    """Bounds tighter than the mismatch itself reject most of a batch, whatever is wrong with the rest of it."""
    reject = spec.correction.reject
    if reject is None or list(rejection_has_bounds(spec)):
        return
    kl, longest = expected_kl(spec), spec.data.max_response_length
    kept = _kept(reject, kl, longest)
    if kept < KEPT:
        what = "tokens" if reject.by == "token" else "responses"
        yield Violation(
            f"{REJECT}.upper",
            f"{reject.upper:g} by {reject.by} {reject.estimator} is tighter than the noise: at a KL of {kl:g} nats a"
            f" token, as measured with {spec.rollout.precision} rollouts, {kept:.0%} of {what} would be kept",
            f"--set {REJECT}.upper={_wider(reject, kl, longest):.4g}",
        )


def _kept(reject: RejectSpec, kl: float, length: int) -> float:
    """Share that rejection keeps: by the model for k1; for k2 and k3 all or nothing, as their mean is the KL."""
    if reject.estimator == "k1":
        of = noise(reject.by, kl, length)
        return of.below(reject.upper) - of.below(reject.lower or 1 / reject.upper)
    return float(reject.by in ("token", "seq-max") or reject.upper > _divergence(reject, kl, length))


def _wider(reject: RejectSpec, kl: float, length: int) -> float:
    """An upper bound that would keep nearly all: three deviations of k1, three times the mean of k2 or k3."""
    if reject.estimator == "k1":
        of = noise(reject.by, kl, length)
        return math.exp(min(-of.mean + 3 * of.deviation, 20.0))
    return 3 * _divergence(reject, kl, length)


def _divergence(reject: RejectSpec, kl: float, length: int) -> float:
    return kl * length if reject.by == "seq-sum" else kl


RULES: tuple[Rule, ...] = (
    weights_have_a_kind,
    icepop_keeps_1,
    icepop_is_no_geometric_mean,
    rejection_has_bounds,
    rejection_leaves_rewards,
    group_has_members,
    std_is_read,
    aggregation_is_read,
    sequence_weights_survive,
    rejection_is_wider_than_noise,
)
