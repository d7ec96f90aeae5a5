"""What other corrections would have done to the steps of a run, by the log-ratios that it kept of them.

A correction multiplies the gradient term of each token by a weight v that it makes of the importance weights
r = p_train / p_rollout: of the token's own, or of the product W of all of a response's. With W the gradient is exact,
because complete responses are sampled from p_rollout. `weights` computes v as verl does
(verl/trainer/ppo/rollout_corr_helper.py in 0.9.1); `judge` estimates the error of the gradient that v gives.

The length of a gradient does not matter to Adam, only its direction. Weights are therefore compared after division by
their mean: u = v / mean v, and W likewise. With advantages A,

    bias    b = mean |A| |u - W| / mean |A|
    noise   F = mean A² u² / mean A²
    error   E = s π/2 b² + F

- b times the largest term of a token bounds how far the expected gradient is off (E. L. Ionides, Truncated Importance
  Sampling, JCGS 17 (2008) 295). Where all |A| are alike it is between 0 and 2: twice the total variation distance
  between what the weights make of the rollout's distribution and the trainer's.
- F is the factor on the gradient's noise; 1 / F without advantages is Kish's effective sample size, as a share.
- E is the expected squared error of the gradient, in units of a batch's noise where rollout and trainer agree. It takes
  the errors of the terms to be as parallel as the terms themselves, whose sum is the gradient: s is the gradient's
  squared length over a batch's noise, which is 1 at the critical batch size (S. McCandlish et al., An Empirical Model
  of Large-Batch Training, arXiv 1812.06162: batch size over noise scale). The bound itself in place of this, with all
  errors parallel, overrates the bias so much that no weight would ever be truncated. π/2 b² is the mean square of an
  error whose mean absolute value is b, if it is normal (R. C. Geary, Biometrika 27 (1935) 310); the mean square itself
  depends on the few largest W alone.

tests/unit/runs/test_replay.py compares E with the exact error of enumerated gradients.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from flashrl_cli.errors import InputError, NothingMatched
from flashrl_cli.plugins import log_ratios
from flashrl_cli.runs.mismatch import CAPS, Stale
from flashrl_cli.text import counted
from flashrl_cli.verl.overrides import ROLLOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from flashrl_cli.config.spec import By, CorrectionKind, Estimator
    from flashrl_cli.paths import AttemptPaths
    from flashrl_cli.plugins.log_ratios import Sample
    from flashrl_cli.runs.store import Run

    Floats: TypeAlias = NDArray[np.float64]

SCHEMA_VERSION = 1
RECENT = 5
"""Number of last steps that are replayed, unless others are asked for."""
SIGNALS = (0.25, 1.0, 4.0)
"""Values of s for which the best correction is named; the error in the table is that of the middle one."""
ALIKE = 0.02
"""Corrections whose error exceeds the least one by no more than this share do as well."""
FEW = 4
"""Number of such corrections that a sentence names."""
OFF_MEAN = 0.1
"""Where the mean of W differs more from 1, the sample lacks the responses with the largest W."""
CHECKED = 0.4
"""KL of rollout and trainer over a response in nats, up to which E is within 10 % of enumerated gradients' errors."""
SAFETY = 20.0
"""verl clamps the logarithms of weights at this size (rollout_corr_helper.py:75)."""

SOURCES = {
    "verl": "verl 0.9.1, verl/trainer/ppo/rollout_corr_helper.py:522-657 (weights), 197-413 (rejection)",
    "Ionides": "E. L. Ionides, Truncated Importance Sampling, JCGS 17 (2008) 295: bias by the weight that is cut",
    "Kish": "L. Kish, Survey Sampling, 1965: effective sample size (sum v)² / sum v²",
    "McCandlish": "S. McCandlish et al., An Empirical Model of Large-Batch Training, arXiv 1812.06162: noise scale",
    "Geary": "R. C. Geary, Biometrika 27 (1935) 310: mean square and mean absolute value of a normal error",
}
"""Sources of the rule, by the names that sentences give in brackets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """What is left out of the update; the fields are those of `correction.reject`."""

    by: By
    estimator: Estimator = "k1"
    lower: float | None = None
    upper: float

    def __str__(self) -> str:
        bounds = f"{_lower(self):g} to {self.upper:g}" if self.estimator == "k1" else f"at most {self.upper:g}"
        return f"{self.by} {self.estimator} {bounds}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A kind of correction; the fields are those of `correction`."""

    kind: CorrectionKind = "none"
    cap: float | None = None
    lower: float | None = None
    reject: Reject | None = None

    def __str__(self) -> str:
        rejected = f"reject {self.reject}" if self.reject else ""
        if self.kind == "none":
            return rejected or "none"
        bounds = [f"{bound:g}" for bound in (self.lower, self.cap) if bound is not None]
        return f"{self.kind} {' to '.join(bounds)}{' and ' if rejected else ''}{rejected}"


COMPARED = (
    Correction(),
    *(Correction(kind="tis", cap=cap) for cap in CAPS),
    Correction(kind="icepop", lower=0.5, cap=2.0),
    Correction(kind="icepop", lower=0.5, cap=5.0),
    *(Correction(kind="seq-tis", cap=cap) for cap in CAPS[:3]),
    Correction(reject=Reject(by="token", lower=0.5, upper=2.0)),
    Correction(reject=Reject(by="seq-sum", lower=0.5, upper=2.0)),
    Correction(reject=Reject(by="seq-mean", lower=0.99, upper=1.01)),
    Correction(reject=Reject(by="seq-max", estimator="k3", upper=1.0)),
)
"""Corrections that are compared, beside the run's own; of those with the same error the first is named."""


def _lower(reject: Reject) -> float:
    """The lower bound of k1, which by default is the reciprocal of the upper one (rollout_corr_helper.py:164)."""
    return 1 / reject.upper if reject.lower is None else reject.lower


@dataclass(frozen=True, eq=False)
class Replayed:
    """Kept responses of some steps as float64: log-ratios [tokens], starts and lengths [responses], advantages.

    `advantages` is [responses]; where it is not known it is the root mean square of the others. `staleness` is
    [tokens], None if no sample has one.
    """

    log_ratios: Floats
    lengths: NDArray[np.int64]
    advantages: Floats
    staleness: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Replayed:
        """The responses of one or more samples."""
        import numpy as np

        advantages = np.concatenate([one.advantages for one in samples]).astype(np.float64)
        known = advantages[np.isfinite(advantages)]
        usual = math.sqrt(float((known**2).mean())) if len(known) else 1.0
        stale = [np.zeros(len(one.log_ratios)) if one.staleness is None else one.staleness for one in samples]
        aged = any(one.staleness is not None for one in samples)
        return cls(
            np.concatenate([one.log_ratios for one in samples]).astype(np.float64),
            np.concatenate([one.lengths for one in samples]).astype(np.int64),
            np.where(np.isfinite(advantages), advantages, usual),
            np.concatenate(stale).astype(np.int64) if aged else None,
        )

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Index of each response's first token."""
        import numpy as np

        return np.cumsum(self.lengths) - self.lengths

    def sums(self, values: Floats) -> Floats:
        """Sums of `values` [tokens] over each response [responses]."""
        import numpy as np

        return np.add.reduceat(values, self.starts)

    def spread(self, values: Floats) -> Floats:
        """Values [responses] for each of the responses' tokens [tokens]."""
        import numpy as np

        return np.repeat(values, self.lengths)

    @cached_property
    def ratios(self) -> Floats:
        """Importance weight of each token."""
        return _exp(self.log_ratios)

    @cached_property
    def products(self) -> Floats:
        """Importance weight of its response for each token."""
        return self.spread(_exp(self.sums(self.log_ratios)))

    @cached_property
    def sizes(self) -> Floats:
        """Size of its response's advantage for each token; 1 if no response has one."""
        import numpy as np

        sizes = np.abs(self.advantages)
        return self.spread(sizes if sizes.any() else np.ones(len(sizes)))


def _exp(values: Floats) -> Floats:
    import numpy as np

    found: Floats = np.exp(np.clip(values, -SAFETY, SAFETY))
    return found


def weights(kept: Replayed, correction: Correction) -> Floats:
    """The factor [tokens] by which a correction multiplies each token's gradient term; 0 where it is rejected."""
    found = _weights(kept, correction)
    return found if correction.reject is None else found * _stays(kept, correction.reject)


def _weights(kept: Replayed, correction: Correction) -> Floats:
    import numpy as np

    free = untruncated(kept, correction)
    if correction.cap is None:
        return free
    if correction.lower is None:
        return np.minimum(free, correction.cap)
    return np.where((free >= correction.lower) & (free <= correction.cap), free, 0.0)


def untruncated(kept: Replayed, correction: Correction) -> Floats:
    """The weights [tokens] of a kind before anything is cut: 1, the token's or the response's."""
    import numpy as np

    if correction.kind == "none":
        return np.ones(len(kept.log_ratios))
    return kept.products if correction.kind == "seq-tis" else kept.ratios


def _stays(kept: Replayed, reject: Reject) -> NDArray[np.bool_]:
    """Whether each token stays; k1 is judged as an importance weight, by its product or its geometric mean."""
    import numpy as np

    clipped = np.clip(kept.log_ratios, -SAFETY, SAFETY)
    estimates = {"k1": clipped, "k2": clipped**2 / 2, "k3": np.exp(clipped) - 1 - clipped}[reject.estimator]
    if reject.by == "token":
        judged = estimates
    elif reject.by == "seq-max":
        judged = kept.spread(np.maximum.reduceat(estimates, kept.starts))
    else:
        sums = kept.sums(estimates)
        judged = kept.spread(sums / kept.lengths if reject.by == "seq-mean" else sums)
    if reject.estimator == "k1":
        return (judged >= math.log(_lower(reject))) & (judged <= math.log(reject.upper))
    return judged <= reject.upper


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a correction does to the kept responses; the module's docstring defines the values."""

    correction: Correction
    mean: float
    """Mean weight of a token: the gradient is so much shorter or longer."""
    cut: float
    """Mean weight that truncation and rejection take away."""
    touched: float
    """Share of tokens whose weight is cut."""
    effective: float
    """Effective sample size of the tokens, as a share of them."""
    stopped: bool
    """Whether a run with it would be ended, because it leaves too little to learn from (`Limits`)."""
    bias: float | None
    """b; None if no weight is left."""
    noise: float | None
    """F; None if no weight is left."""

    def error(self, signal: float = SIGNALS[1]) -> float:
        """E at a signal s; infinite if no weight is left."""
        if self.bias is None or self.noise is None:
            return math.inf
        return signal * math.pi / 2 * self.bias**2 + self.noise


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds beyond which a run ends, as those of `watch`: what weights lack of a mean of 1, and the share rejected."""

    max_weight_deviation: float = 0.5
    max_rejected: float = 0.9

    def stop(self, kept: Replayed, correction: Correction) -> bool:
        """Whether a run with this correction would be ended (`train.supervise.lost_to_correction`)."""
        vanished = 1 - float(_weights(kept, correction).mean()) > self.max_weight_deviation
        reject = correction.reject
        return vanished or (reject is not None and 1 - float(_stays(kept, reject).mean()) > self.max_rejected)


def judge(kept: Replayed, correction: Correction, limits: Limits | None = None) -> Judged:
    """Judge one correction on kept responses."""
    import numpy as np

    free, found, exact = untruncated(kept, correction), weights(kept, correction), kept.products
    mean = float(found.mean())
    bias = noise = None
    if mean > 0:
        sizes, scaled = kept.sizes, found / mean
        bias = float((sizes * np.abs(scaled - exact / exact.mean())).sum() / sizes.sum())
        noise = float((sizes**2 * scaled**2).sum() / (sizes**2).sum())
    return Judged(
        correction=correction,
        mean=mean,
        cut=float((free - found).mean()),
        touched=float((free != found).mean()),
        effective=mean**2 / float((found**2).mean()) if mean > 0 else 0.0,
        stopped=(limits or Limits()).stop(kept, correction),
        bias=bias,
        noise=noise,
    )


@dataclass(frozen=True, slots=True)
class Replay:
    """Corrections compared on the kept responses of some steps: least errors first, and last what would end a run."""

    steps: tuple[int, ...]
    trained: int
    """Responses that these steps trained on; `responses` of them are kept, with `tokens` tokens."""
    responses: int
    tokens: int
    mean_product: float
    """Mean of W over responses, which should be 1."""
    divergence: float
    """KL of rollout and trainer over a response: the mean of -ln W, in nats."""
    own: Correction | None
    judged: tuple[Judged, ...]
    histogram: Histogram
    by_position: tuple[Position, ...]
    by_staleness: tuple[Stale, ...] = ()
    """The kept tokens by staleness, with the weights of the run's own correction; empty in mode `sync`."""
    damaged: tuple[str, ...] = field(default=())

    @property
    def best(self) -> Judged:
        """The correction with the least estimated error."""
        return self.judged[0]

    def best_at(self, signal: float) -> Judged:
        """The correction with the least error at another signal."""
        return min(self.judged, key=lambda one: (one.stopped, one.error(signal)))

    @property
    def alike(self) -> list[Judged]:
        """Corrections whose error is hardly larger than the least one."""
        limit = (1 + ALIKE) * self.best.error()
        return [one for one in self.judged[1:] if one.error() <= limit and not one.stopped]

    @property
    def span(self) -> str:
        """The steps in words."""
        first, last = self.steps[0], self.steps[-1]
        return f"step {first}" if first == last else f"steps {first} to {last}"

    @property
    def lines(self) -> list[str]:
        """The comparison in sentences, each with its sources in brackets."""
        return list(_sentences(self))

    def document(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return {
            "steps": list(self.steps),
            "responses": {"trained": self.trained, "kept": self.responses},
            "tokens": self.tokens,
            "mean_response_weight": self.mean_product,
            "response_kl": self.divergence,
            "own": str(self.own) if self.own else None,
            "best": {f"{signal:g}": str(self.best_at(signal).correction) for signal in SIGNALS},
            "alike": [str(one.correction) for one in self.alike],
            "corrections": [_row(one) for one in self.judged],
            "log_ratios": asdict(self.histogram),
            "positions": [asdict(one) for one in self.by_position],
            **({"by_staleness": [asdict(one) for one in self.by_staleness]} if self.by_staleness else {}),
            "sentences": self.lines,
            "damaged": list(self.damaged),
            "sources": SOURCES,
        }


def _row(one: Judged) -> dict[str, Any]:
    """A judged correction as plain data, with null for an error that is not finite."""
    error = one.error()
    data = {"name": str(one.correction), **asdict(one.correction)}
    values = {name: value for name, value in asdict(one).items() if name != "correction"}
    return data | values | {"error": error if math.isfinite(error) else None}


def _sentences(found: Replay) -> Iterator[str]:
    best = found.best
    rival = next((one for one in found.judged if one.correction == found.own), None)
    yield (
        f"Least estimated error: {best.correction}, {best.error():.3g} times the noise of a batch on which rollout and "
        f"trainer agree [{', '.join(SOURCES)}]."
    )
    others = [str(one.correction) for one in found.alike]
    if str(Correction()) in others:
        yield f"To correct nothing does as well: its error is within {ALIKE:.0%} of that."
    elif others and best.correction != Correction():
        shown = "; ".join(others[:FEW]) + (f" and {len(others) - FEW} more" if len(others) > FEW else "")
        yield f"As good, within {ALIKE:.0%} of it: {shown}."
    if rival and rival is not best:
        yield f"The run's own correction, {rival.correction}, has {rival.error() / best.error():.3g} times that error."
    low, high = found.best_at(SIGNALS[0]), found.best_at(SIGNALS[-1])
    if low is not best or high is not best:
        yield (
            f"A batch at the critical size is assumed: at a quarter of its size {low.correction} would be best, at "
            f"four times {high.correction} [McCandlish]."
        )
    if found.divergence > CHECKED:
        yield (
            f"Rollout and trainer are {found.divergence:.2g} nats a response apart: the estimate was compared with "
            f"exact errors up to {CHECKED:g}, and errors beyond are larger than it says."
        )
    if abs(found.mean_product - 1) > OFF_MEAN:
        yield (
            f"The mean weight of a response is {found.mean_product:.2g} and should be 1: these "
            f"{counted(found.responses, 'response')} are too few for the tail of such weights, or what the rollout "
            "reports is not what it samples by. Sequence weights look better here than they are."
        )


@dataclass(frozen=True, slots=True)
class Histogram:
    """Shares of tokens by log-ratio: `shares` [bins] between `edges` [bins + 1]; the outer bins hold all beyond."""

    edges: tuple[float, ...]
    shares: tuple[float, ...]


BINS = 41
QUANTILE = 0.995
"""Share of tokens within a histogram's edges; the rest is counted in the outer bins."""


def histogram(kept: Replayed) -> Histogram:
    """The log-ratios of tokens in bins of equal width, symmetric about 0."""
    import numpy as np

    limit = float(np.quantile(np.abs(kept.log_ratios), QUANTILE)) or 1e-6
    edges = np.linspace(-limit, limit, BINS + 1)
    counts, _ = np.histogram(np.clip(kept.log_ratios, -limit, limit), edges)
    return Histogram(tuple(map(float, edges)), tuple(float(count) for count in counts / counts.sum()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Weights at the tokens `first` to `last` (from 1) of the responses that are so long; `tokens` of them.

    `distance` is the mean of |r - 1|. `low`, `middle` and `high` are the 5 %, 50 % and 95 % quantiles of the product of
    the weights up to the token, which is the weight that the response has had so far.
    """

    first: int
    last: int
    tokens: int
    distance: float
    low: float
    middle: float
    high: float


SECTIONS = 24
LEAST = 16
"""Tokens that a section needs to be shown."""


def by_position(kept: Replayed) -> list[Position]:
    """Weights by position in the response, in sections of equal length."""
    import numpy as np

    positions = np.arange(len(kept.log_ratios)) - kept.spread(kept.starts.astype(np.float64)).astype(np.int64)
    totals = np.cumsum(kept.log_ratios)
    before = kept.spread(totals[kept.starts] - kept.log_ratios[kept.starts])
    products, distances = _exp(totals - before), np.abs(kept.ratios - 1)
    longest = int(kept.lengths.max())
    size = max(1, math.ceil(longest / SECTIONS))
    found = []
    for first in range(0, longest, size):
        inside = (positions >= first) & (positions < first + size)
        if (count := int(inside.sum())) < LEAST and first:
            break
        low, middle, high = (float(np.quantile(products[inside], share)) for share in (0.05, 0.5, 0.95))
        found.append(
            Position(
                first=first + 1,
                last=min(first + size, longest),
                tokens=count,
                distance=float(distances[inside].mean()),
                low=low,
                middle=middle,
                high=high,
            )
        )
    return found


def by_staleness(kept: Replayed, own: Correction | None) -> list[Stale]:
    """The tokens by staleness, with the weights that a correction gives them."""
    import numpy as np

    if kept.staleness is None:
        return []
    weighted = own is not None and own.kind != "none"
    free, found = (untruncated(kept, own), _weights(kept, own)) if own else (kept.ratios, kept.ratios)
    k3 = np.exp(kept.log_ratios) - kept.log_ratios - 1
    rows = []
    for number in np.unique(kept.staleness).tolist():
        inside = kept.staleness == number
        mine = found[inside]
        square = float((mine**2).mean())
        rows.append(
            Stale(
                staleness=number,
                tokens=int(inside.sum()),
                share=float(inside.mean()),
                kl=-float(kept.log_ratios[inside].mean()),
                kl_k3=float(k3[inside].mean()),
                weight_mean=float(mine.mean()) if weighted else None,
                effective=(float(mine.mean()) ** 2 / square if square else 0.0) if weighted else None,
                truncated=float((free > own.cap)[inside].mean()) if own and weighted and own.cap else None,
            )
        )
    return rows


def replay(
    samples: Sequence[Sample], own: Correction | None, limits: Limits | None = None, damaged: Sequence[str] = ()
) -> Replay:
    """Compare all corrections, and the run's own, on samples of one or more steps."""
    kept = Replayed.of(samples)
    logs = kept.sums(kept.log_ratios)
    compared = dict.fromkeys([*COMPARED, *([own] if own else [])])
    judged = sorted((judge(kept, one, limits) for one in compared), key=lambda one: (one.stopped, one.error()))
    return Replay(
        steps=tuple(one.step for one in samples),
        trained=sum(one.responses for one in samples),
        responses=len(kept.lengths),
        tokens=len(kept.log_ratios),
        mean_product=float(_exp(logs).mean()),
        divergence=float(-logs.mean()),
        own=own,
        judged=tuple(judged),
        histogram=histogram(kept),
        by_position=tuple(by_position(kept)),
        by_staleness=tuple(by_staleness(kept, own)),
        damaged=tuple(damaged),
    )


def _log_ratios(attempt: AttemptPaths) -> dict[int, Path]:
    return log_ratios.steps_in(attempt.log_ratios)


def kept_steps(run: Run, files: Callable[[AttemptPaths], dict[int, Path]] = _log_ratios) -> dict[int, Path]:
    """Files of kept steps, from the newest attempt that has the step; what a resume undid is left out.

    `files` gives those of an attempt, by default of log-ratios.
    """
    resumed = {attempt.number: attempt.resumed_from or 0 for attempt in run.attempts}
    steps: dict[int, Path] = {}
    for number in run.paths.attempts():
        found = files(run.paths.attempt(number))
        if found and number in resumed:
            steps = {step: path for step, path in steps.items() if step <= resumed[number]}
        steps.update(found)
    return dict(sorted(steps.items()))


def replay_run(run: Run, *, step: int | None = None, last: int = RECENT, staleness: int | None = None) -> Replay:
    """Replay one step of a run, or the last ones that it kept; of the responses of one `staleness`, if it is given.

    The staleness of a response is that of its most stale token. Raises NothingMatched if the run kept none, InputError
    if it lacks the step or the staleness, or if no file can be read.
    """
    found = kept_steps(run)
    if not found:
        raise NothingMatched(f"run {run.name} kept no log-ratios", hint=_why_none(run))
    if step is not None and step not in found:
        raise InputError(f"run {run.name} kept no log-ratios of step {step}", hint=f"there are: {_ranges(list(found))}")
    chosen = [step] if step is not None else list(found)[-last:]
    samples, damaged = [], []
    for one in chosen:
        try:
            samples.append(log_ratios.read(found[one]))
        except InputError as error:
            damaged.append(error)
        except FileNotFoundError:  # the run removed its oldest step meanwhile
            continue
    if not samples:
        raise damaged[0] if damaged else InputError(f"the log-ratios of run {run.name} were removed meanwhile")
    if staleness is not None:
        samples = _of_staleness(samples, staleness)
    own, limits = planned(run)
    return replay(samples, own, limits, [error.message for error in damaged])


def _of_staleness(samples: Sequence[Sample], staleness: int) -> list[Sample]:
    """The responses of one staleness. Raises InputError if there are none."""
    of = [(one, one.most_stale()) for one in samples]
    found = [one.chosen(stale == staleness) for one, stale in of if (stale == staleness).any()]
    if not found:
        there = sorted({int(number) for _, stale in of for number in stale})
        raise InputError(f"no kept response has a staleness of {staleness}", hint=f"there are: {_ranges(there)}")
    return found


def _why_none(run: Run) -> str:
    number = run.paths.attempts()[-1] if run.paths.attempts() else None
    keep = run.setting(number, "correction", "keep_responses") if number else None
    if keep is None:
        return "runs that were started before flashrl kept them have none; a new run keeps them"
    if keep == 0:
        return "its correction.keep_responses is 0; 256 is the default"
    return (
        "verl compares rollout and trainer only if the rollout reports log-probs: with a correction (--tis CAP), or "
        f"with --set verl.{ROLLOUT}.calculate_log_probs=true"
    )


def _ranges(steps: Sequence[int]) -> str:
    """Steps as `1 to 4, 7`."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def planned(run: Run) -> tuple[Correction | None, Limits]:
    """The correction that a run's newest plan asks for (None if there is no plan), and the limits of its watch."""
    for number in reversed(run.paths.attempts()):
        if run.plan(number):
            watch = run.setting(number, "watch") or {}
            known = {one.name: watch[one.name] for one in fields(Limits) if watch.get(one.name) is not None}
            return correction_of(run.setting(number, "correction") or {}), Limits(**known)
    return None, Limits()


def correction_of(spec: Mapping[str, Any]) -> Correction:
    """The correction of a plan's `correction`; a cap without a kind is `tis`, as in plans that know no kinds."""
    cap, reject = spec.get("cap"), spec.get("reject")
    kind: CorrectionKind = spec.get("kind") or ("none" if cap is None else "tis")
    return Correction(
        kind=kind,
        cap=None if kind == "none" else cap,
        lower=spec.get("lower") if kind == "icepop" else None,
        reject=Reject(**reject) if reject else None,
    )
