"""Runs of two steps with each loss, advantage, kind of weights and rejection, on the real stack.

In the tests each occurs at least once, in one run each for a loss. All combinations that are offered are run by hand,
which takes hours:

    python tests/integration/test_corrections.py [LOSS ...]      # of these losses; all without one
    python tests/integration/test_corrections.py pairs           # those of the tests

The bounds are such that they act on any machine: half of the ratios p_train / p_rollout are above 1, however close
rollout and trainer are. The numbers are compared with those of the log-ratios that a run keeps;
tests/contract/test_corrections.py has the formulas of the losses and advantages.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest

from flashrl_cli.config.spec import Advantage, Loss
from flashrl_cli.plugins import log_ratios

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from tests.integration.conftest import Workshop

WEIGHTS = {
    "none": ("kind=none",),
    "tis": ("kind=tis", "cap=1"),
    "icepop": ("kind=icepop", "cap=1", "lower=0.5"),
    "seq-tis": ("kind=seq-tis", "cap=1"),
}
UPPER = {"k1": "1.0001", "k2": "1e-5", "k3": "1e-5"}
REJECTS = {
    f"{by} {estimator}": (f"reject.by={by}", f"reject.estimator={estimator}", f"reject.upper={upper}")
    for by in ("token", "seq-sum", "seq-mean", "seq-max")
    for estimator, upper in UPPER.items()
    if (by, estimator) != ("seq-max", "k1")
}
PAIRS = (
    ("ppo", "gae", "tis", "seq-mean k1"),
    ("gspo", "grpo", "icepop", None),
    ("sapo", "reinforce-plus-plus", "tis", "seq-sum k2"),
    ("cispo", "rloo", "seq-tis", None),
    ("gpg", "gpg", "tis", "token k1"),
    ("dppo-tv", "opo", "icepop", None),
    ("dppo-kl", "grpo-vectorized", "none", "token k3"),
    ("clip-cov", "rloo-vectorized", "tis", "seq-max k3"),
    ("kl-cov", "reinforce-plus-plus-baseline", "icepop", "seq-mean k3"),
    ("gmpo", "grpo-passk", "seq-tis", "seq-max k2"),
    ("dro", "grpo", "none", "seq-sum k1"),
)
"""Loss, advantage, kind of weights and rejection of each run."""
SMALLEST = (
    "trainer.steps=2", "trainer.save_every=-1", "data.train_batch_size=8", "rollout.n=4", "algorithm.mini_batch_size=4",
    "algorithm.micro_batch_size_per_gpu=8", "watch.max_weight_deviation=1", "watch.max_rejected=1",
)  # fmt: skip
CORRECTION = "rollout_corr"


def options(loss: str, advantage: str, weights: str, reject: str | None) -> list[str]:
    """Options of `flashrl train` for a run of the tiny preset."""
    sets = [f"correction.{text}" for text in (*WEIGHTS[weights], *REJECTS.get(reject or "", ()))]
    if reject and reject.endswith("k1"):
        sets.append("correction.reject.lower=1e-6")  # only weights above 1 are rejected: some always are
    if reject in ("seq-sum k2", "seq-mean k2", "seq-sum k3", "seq-mean k3"):
        # below the noise that is expected, the bound would be refused
        sets[-1] = f"correction.reject.upper={2e-3 if 'sum' in reject else 1.1e-4}"
    elif reject in ("seq-max k2", "seq-max k3"):
        sets[-1] = "correction.reject.upper=1e-3"  # some token of nearly every response is beyond a narrower bound
    if loss == "dro":
        sets.append("verl.actor_rollout_ref.actor.policy_loss.dro_beta=0.1")
    sets += [f"algorithm.loss={loss}", f"algorithm.advantage={advantage}", *SMALLEST]
    return ["train", "--preset", "tiny", *itertools.chain.from_iterable(("--set", text) for text in sets)]


def check(attempt: Path, weights: str, reject: str | None) -> None:
    """What verl logged of two steps is that of the correction, which acted, on the log-ratios that the run kept."""
    lines = (attempt / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps: list[dict[str, float]] = [line["data"] for line in map(json.loads, lines)]
    kept = [log_ratios.read(file) for file in log_ratios.steps_in(attempt / "log_ratios").values()]
    assert len(steps) == len(kept) == 2
    for step, sample in zip(steps, kept, strict=True):
        assert all(math.isfinite(step[f"actor/{name}"]) for name in ("pg_loss", "grad_norm"))
        of = {name.removeprefix(f"{CORRECTION}/"): value for name, value in step.items() if name.startswith(CORRECTION)}
        assert of["ratio_max"] > 1
        check_weights(of, weights)
        check_rejection(of, reject)
        check_formulas(of, sample, weights, reject)
    # rejection may leave a group without spread, and the widest bound of a loss may clip every token
    assert max(step["actor/grad_norm"] for step in steps) > 0


def check_weights(of: dict[str, float], weights: str) -> None:
    """Weights are at most 1 and some were above it."""
    if weights == "none":
        assert "rollout_is_mean" not in of
        return
    assert of["rollout_is_mean"] < 1
    assert of["rollout_is_seq_max"] <= 1 + 1e-6
    assert 0 < of["rollout_is_ratio_fraction_high"] <= 1
    if weights == "seq-tis":
        assert of["rollout_is_max"] > 1, "of responses, before the cap"
        return
    assert of["rollout_is_max"] <= 1
    if weights == "icepop":
        assert of["rollout_is_min"] == 0
        assert of["rollout_is_oob_ratio"] == pytest.approx(
            of["rollout_is_ratio_fraction_high"] + of["rollout_is_ratio_fraction_low"], abs=1e-6
        )
        assert of["rollout_is_mean"] <= 1 - of["rollout_is_oob_ratio"] + 1e-6
    else:
        assert of["rollout_is_min"] > 0


def check_rejection(of: dict[str, float], reject: str | None) -> None:
    """Something is rejected if and only if an estimate is beyond its bound."""
    if reject is None:
        assert "rollout_rs_masked_fraction" not in of
        return
    name = reject.replace("-", "_").replace(" ", "_")
    rejected = of["rollout_rs_masked_fraction"]
    assert rejected == of[f"rollout_rs_{name}_masked_fraction"]
    least, largest = of[f"rollout_rs_{name}_min"], of[f"rollout_rs_{name}_max"]
    if reject.endswith("k1"):
        # verl's estimate is -ln w
        assert (rejected > 0) is (-least > math.log(float(UPPER["k1"])))
    else:
        assert least >= -1e-6
        assert (rejected > 0) is (largest > bound_of(reject))
    if reject.startswith("token") or reject == "seq-sum k1":
        assert 0 < rejected < 1


def check_formulas(of: dict[str, float], sample: log_ratios.Sample, weights: str, reject: str | None) -> None:
    """The largest ratio, the mean weight and the rejected share are those of the log-ratios, kept as float16."""
    assert len(sample.lengths) == sample.responses, "all responses of a run as small as this are kept"
    logs = sample.log_ratios.astype(np.float64)
    w = np.exp(logs)
    rows: NDArray[np.intp] = np.repeat(np.arange(len(sample.lengths)), sample.lengths)
    assert of["ratio_max"] == pytest.approx(w.max(), rel=1e-3)
    applied = {
        "none": None,
        "tis": np.minimum(w, 1),
        "icepop": np.where((w >= 0.5) & (w <= 1), w, 0),
        "seq-tis": np.minimum(np.exp(np.bincount(rows, logs)), 1)[rows],
    }[weights]
    # a weight of 1 may lie on either side of the bound after its rounding
    near = 0.0 if weights != "icepop" else float((np.abs(w - 1) < 1e-6).mean())
    if applied is not None:
        assert of["rollout_is_mean"] == pytest.approx(applied.mean(), abs=1e-3 + near)
    if reject is None:
        return
    by, estimator = reject.split()
    estimate = {"k1": logs, "k2": logs**2 / 2, "k3": w - 1 - logs}[estimator]
    if by != "token":
        totals = np.bincount(rows, estimate)
        largest = np.array([estimate[rows == row].max() for row in range(len(sample.lengths))])
        estimate = {"seq-sum": totals, "seq-mean": totals / sample.lengths, "seq-max": largest}[by][rows]
    bound = math.log(float(UPPER["k1"])) if estimator == "k1" else bound_of(reject)
    at_bound = np.abs(estimate - bound) < 1e-3 * np.abs(estimate) + 1e-7
    assert abs(of["rollout_rs_masked_fraction"] - (estimate > bound).mean()) <= at_bound.mean() + 1e-6


def bound_of(reject: str) -> float:
    """The bound in nats that `options` gives a rejection by k2 or k3."""
    (text,) = (text for text in options("ppo", "grpo", "none", reject) if "reject.upper" in text)
    return float(text.partition("=")[2])


@pytest.mark.parametrize(("loss", "advantage", "weights", "reject"), PAIRS)
def test_two_steps(workshop: Workshop, loss: str, advantage: str, weights: str, reject: str | None) -> None:
    workshop.run(*options(loss, advantage, weights, reject), "--name", f"two-{loss}")
    check(workshop.root / "runs" / f"two-{loss}" / "attempt_1", weights, reject)


def test_a_run_that_rejects_too_much_is_ended(workshop: Workshop) -> None:
    more = ("watch.max_rejected=0.05", "trainer.steps=50")
    sets = [word for text in more for word in ("--set", text)]
    _, err = workshop.run(*options("ppo", "grpo", "tis", "token k1"), *sets, "--name", "too-much", code=1)
    rejected = re.search(r"correction\.reject leaves out (\d+)% of the tokens \(bound 5%\)", err)
    assert rejected is not None, err
    assert "wider bounds, or --set correction.reject=null" in err
    lines = (workshop.root / "runs/too-much/attempt_1/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 50
    first = json.loads(lines[0])["data"][f"{CORRECTION}/rollout_rs_masked_fraction"]
    assert float(rejected[1]) == pytest.approx(100 * first, abs=0.5)


def test_everything_that_is_offered_occurs() -> None:
    losses, advantages, weights, rejects = (set(column) for column in zip(*PAIRS, strict=True))
    assert (losses, advantages, weights) == (set(get_args(Loss)), set(get_args(Advantage)), set(WEIGHTS))
    assert {str(one).split()[0] for one in rejects - {None}} == {one.split()[0] for one in REJECTS}
    assert {str(one).split()[1] for one in rejects - {None}} == set(UPPER)


def combinations(losses: list[str]) -> Iterator[tuple[str, str, str, str | None]]:
    """All combinations of these losses, whether they are refused or not, or those of the tests."""
    if losses == ["pairs"]:
        return iter(PAIRS)
    return itertools.product(losses or get_args(Loss), get_args(Advantage), WEIGHTS, (None, *REJECTS))


def run_all(losses: list[str]) -> int:
    """Run all combinations one after another; return the number of those that failed."""
    failed = 0
    with TemporaryDirectory(prefix="corrections-") as folder:
        env = {"CI": "1", **os.environ, "FLASHRL_RUNS": folder, "FLASHRL_CHECKPOINTS": f"{folder}/checkpoints"}
        for number, one in enumerate(combinations(losses)):
            loss, advantage, weights, reject = one
            command = [sys.executable, "-m", "flashrl_cli", *options(*one), "--name", f"run-{number}"]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            said = "refused" if done.returncode == 2 else "ran"
            try:
                if done.returncode != 2:
                    assert done.returncode == 0, done.stderr[-2000:]
                    check(Path(folder, f"run-{number}", "attempt_1"), weights, reject)
            except (AssertionError, KeyError) as error:
                said, failed = f"FAILED: {error}", failed + 1
            print(f"{loss} {advantage} {weights} {reject or '-'}: {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1:]) > 0)
