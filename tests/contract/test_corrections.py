"""verl's own weights, rejections, advantages and losses, under flashrl's keys, against their formulas.

A batch of two prompts with four responses each goes through the functions that verl's V1 trainer and workers call
(trainer/ppo/v1/trainer_base.py:1743, workers/utils/losses.py:58), with the configuration that the overrides of a preset
compose. The formulas are those of docs/correction.md (tests/correction_formulas.py).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_args

import pytest

from flashrl_cli.config.correction import RULES
from flashrl_cli.config.spec import Advantage, By, CorrectionSpec, Estimator, Loss, RejectSpec
from tests import correction_formulas as formulas
from tests.contract.demands_case import A, settings

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.filterwarnings("ignore")
GROUPS, N, TOKENS = 2, 4, 6
LENGTHS = (6, 4, 6, 1, 5, 6, 2, 3)
COVARIANCES = tuple(f"verl.{A}.policy_loss.{text}" for text in formulas.COVARIANCES)


@functools.cache
def batch() -> SimpleNamespace:
    """Log-probs [8, 6] that differ as no healthy run's do, rewards at the last tokens, values and the mask."""
    import torch

    make = torch.Generator().manual_seed(0)

    def random(scale: float) -> torch.Tensor:
        return scale * torch.randn(GROUPS * N, TOKENS, generator=make)

    mask = (torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]).float()
    old = -random(1.0).abs() - 0.05
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(mask)), mask.sum(-1).long() - 1] = torch.tensor([1.0, 0, 0, 2, 0, 1, 1, 0.5])
    return SimpleNamespace(
        mask=mask,
        old=old * mask,
        rollout=(old + random(0.5)) * mask,
        new=((old + random(0.3)).clamp(max=-0.01)) * mask,
        rewards=rewards,
        values=random(0.3) * mask,
        uids=[f"prompt{row // N}" for row in range(GROUPS * N)],
    )


def known() -> formulas.Batch:
    """The batch as the formulas take it."""
    made = batch()
    names = ("mask", "old", "rollout", "rewards", "values")
    return formulas.Batch(**{name: vars(made)[name] for name in names}, groups=(N,) * GROUPS)


def corrected(correction: dict[str, Any], advantage: str = "grpo", **changed: Any) -> Any:
    """The batch after verl's correction and advantages, as trainer_base.py:1743 computes them, and its metrics.

    `changed` are other parts of the batch.
    """
    import numpy as np
    from verl import DataProto
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    made = SimpleNamespace(**{**vars(batch()), **changed})
    tensors = {
        "old_log_probs": made.old,
        "rollout_log_probs": made.rollout,
        "response_mask": made.mask.clone(),
        "token_level_rewards": made.rewards,
        "values": made.values,
    }
    data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": np.array(made.uids, dtype=object)})
    data, metrics = compute_rollout_correction_and_add_to_batch(data, composed(options(correction)).rollout_correction)
    algorithm = composed(options({}, advantage))
    data = compute_advantage_for_multi_trajectories(
        data,
        batch_keys=[f"{uid}_{row}_0" for row, uid in enumerate(made.uids)],
        adv_estimator=algorithm.adv_estimator,
        gamma=algorithm.gamma,
        lam=algorithm.lam,
        num_repeat=N,
        norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo,
        config=algorithm,
    )
    return data.batch, metrics


def options(correction: dict[str, Any], advantage: str = "grpo", loss: str = "ppo") -> tuple[str, ...]:
    """The `--set` options of a correction (none unless it names a kind), an advantage and a loss."""
    given = {"kind": "none"} | {name: value for name, value in correction.items() if name != "reject"}
    given |= {f"reject.{name}": value for name, value in correction.get("reject", {}).items()}
    sets = [f"correction.{name}={value}" for name, value in given.items()]
    return (*sets, f"algorithm.advantage={advantage}", f"algorithm.loss={loss}", "watch.max_weight_deviation=1")


@functools.cache
def composed(sets: tuple[str, ...]) -> Any:
    """verl's node `algorithm` under the overrides of the tiny preset with these options."""
    return settings("tiny", sets).tree._config.algorithm


@functools.cache
def actor(loss: str) -> Any:
    """verl's configuration of the policy update with a loss."""
    from verl.utils.config import omega_conf_to_dataclass

    tree = settings("tiny", (*options({}, loss=loss), *COVARIANCES)).tree._config
    return omega_conf_to_dataclass(tree.actor_rollout_ref.actor)


def by_verl(
    loss: str, advantages: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor | None, rows: slice = slice(None)
) -> tuple[float, torch.Tensor]:
    """verl's loss of a mini-batch, or of the passes over some of its rows, and its gradient by log-probs [8, 6]."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    config, made = actor(loss), batch()
    config.global_batch_info.update(
        dp_size=1,
        batch_num_tokens=int(made.mask.sum()),
        global_batch_size=len(made.mask),
        loss_scale_factor=config.loss_scale_factor,
    )
    new = made.new.clone().requires_grad_()
    value, _ = get_policy_loss_fn(config.policy_loss.loss_mode)(
        old_log_prob=made.old[rows],
        log_prob=new[rows],
        advantages=advantages[rows],
        response_mask=mask[rows].bool(),
        loss_agg_mode=config.loss_agg_mode,
        config=config,
        rollout_is_weights=None if weights is None else weights[rows],
    )
    value.backward()
    assert new.grad is not None
    return value.item(), new.grad


# Weights and rejection

KINDS: list[dict[str, Any]] = [
    {"kind": "none"},
    {"kind": "tis", "cap": 1.2},
    {"kind": "icepop", "cap": 1.5, "lower": 0.7},
    {"kind": "seq-tis", "cap": 1.3},
]
REJECTS: list[dict[str, Any]] = [
    *({"by": by, "estimator": "k1", "lower": lower, "upper": upper} for by, lower, upper in (
        ("token", 0.8, 1.6), ("seq-sum", 0.7, 2.5), ("seq-mean", 0.92, 1.2)
    )),
    *({"by": by, "estimator": estimator, "upper": upper} for (by, upper), estimator in itertools.product(
        (("token", 0.1), ("seq-sum", 0.6), ("seq-mean", 0.12), ("seq-max", 0.3)), ("k2", "k3")
    )),
]  # fmt: skip
CORRECTIONS = [*KINDS, *({**kind, "reject": reject} for kind in KINDS[:2] for reject in REJECTS)]


def spec_of(correction: dict[str, Any]) -> CorrectionSpec:
    found: CorrectionSpec = settings("tiny", options(correction)).spec.correction
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["kind"])
def test_weights_are_those_of_the_formulas(kind: dict[str, Any]) -> None:
    import torch

    right = formulas.weights(spec_of(kind), known())
    found, metrics = corrected(kind)
    if right is None:
        assert "rollout_is_weights" not in found
        return
    assert torch.allclose(found["rollout_is_weights"].double(), right, atol=1e-5)
    mask = batch().mask.bool()
    assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(right[mask].mean().item(), abs=1e-5)
    assert right.max() <= kind["cap"] < known().log_w.exp().max(), "so that the cap acts"
    if kind["kind"] == "icepop":
        assert (right[mask] == 0).any()
        assert right[right > 0].min() >= kind["lower"]


@pytest.mark.parametrize("reject", REJECTS, ids=lambda reject: f"{reject['by']}-{reject['estimator']}")
def test_rejection_keeps_what_lies_within_the_bounds(reject: dict[str, Any]) -> None:
    """verl states k1's bounds as p_rollout / p_train: given as they are, others would be rejected."""
    import torch

    spec = spec_of({"kind": "none", "reject": reject})
    right = formulas.kept(spec.reject, known())
    found, metrics = corrected({"kind": "none", "reject": reject})
    assert torch.equal(found["response_mask"], right)
    mask = batch().mask
    assert 0 < right.sum() < mask.sum(), "so that the bounds act"
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(1 - (right.sum() / mask.sum()).item())
    if reject["estimator"] == "k1":
        inverted = RejectSpec(by=reject["by"], lower=1 / reject["upper"], upper=1 / reject["lower"])
        assert not torch.equal(formulas.kept(inverted, known()), right), "so that the other direction would be noticed"


def test_all_rejections_of_verl_are_tried() -> None:
    tried = {(reject["by"], reject["estimator"]) for reject in REJECTS}
    assert tried == set(itertools.product(get_args(By), get_args(Estimator))) - {("seq-max", "k1")}


# Advantages


@pytest.mark.parametrize("advantage", get_args(Advantage))
def test_advantages_are_those_of_the_formulas(advantage: str) -> None:
    import torch

    right = formulas.ADVANTAGES[advantage](known(), batch().mask)
    found, _ = corrected({}, advantage)
    assert torch.allclose((found["advantages"] * batch().mask).double(), right, atol=1e-4)
    assert right.std() > 0


def test_token_rejection_takes_rewards_along_where_it_is_refused() -> None:
    """The reward is at the last token; most advantages of groups take it from the rewards, whatever the mask is."""
    import torch

    kept, mask = formulas.kept(RejectSpec(by="token", lower=0.8, upper=1.6), known()), batch().mask
    last = mask.sum(-1, keepdim=True).long() - 1
    losing = (kept.gather(-1, last) == 0) & (kept.sum(-1, keepdim=True) > 0) & (batch().rewards.sum(-1) > 0)[:, None]
    inside = losing & kept.bool()
    assert inside.any()
    for advantage in ("gae", "reinforce-plus-plus"):
        free, found = (corrected({}, advantage, **more)[0]["returns"] for more in ({}, {"mask": kept}))
        assert (free - found)[inside].min() > 0.4
    for advantage in ("grpo", "rloo", "gpg", "grpo-passk"):
        free, found = (corrected({}, advantage, **more)[0]["advantages"] for more in ({}, {"mask": kept}))
        assert torch.equal(free[kept.bool()], found[kept.bool()])
    free, found = (corrected({}, "opo", **more)[0]["advantages"] for more in ({}, {"mask": kept}))
    assert (free - found)[kept.bool()].abs().max() > 1e-3


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("advantage", get_args(Advantage))
def test_a_batch_of_which_nothing_is_left_has_advantages_of_0(advantage: str, left: int) -> None:
    """verl's own ends with a ValueError where it whitens, and is NaN for OPO."""
    far = (batch().old - 3) * batch().mask
    far[0, :left] = batch().old[0, :left]
    reject = {"by": "token", "lower": 0.5, "upper": 2.0}
    found, metrics = corrected({"reject": reject}, advantage, rollout=far)
    assert found["response_mask"].sum() == left
    assert found["advantages"].isfinite().all()
    assert (found["advantages"] * (1 - found["response_mask"])).abs().max() == 0
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(1 - left / sum(LENGTHS))


def test_opo_compares_what_is_left_of_a_group() -> None:
    import torch
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    mask = batch().mask.clone()
    mask[:N] = 0
    mask[N] = 0
    free = corrected({}, "opo")[0]["advantages"]
    found = corrected({}, "opo", mask=mask)[0]["advantages"]
    assert found[: N + 1].abs().max() == 0
    scores, lengths = batch().rewards[N + 1 :].sum(-1), mask[N + 1 :].sum(-1)
    right = scores - (scores * lengths).sum() / lengths.sum()
    assert torch.allclose(found[N + 1 :], right[:, None] * mask[N + 1 :], atol=1e-6)
    stock = get_adv_estimator_fn("opo").__wrapped__
    assert stock(batch().rewards, mask, batch().uids)[0][:N].isnan().all()
    assert torch.equal(stock(batch().rewards, batch().mask, batch().uids)[0], free)


def test_gpg_does_not_count_rows_that_fill_a_batch_up() -> None:
    import torch

    made = batch()
    of_first = torch.zeros_like(made.mask)
    of_first[:N] = 1
    uids = [uid if row < N else "pad0123" for row, uid in enumerate(made.uids)]
    few = {"rewards": made.rewards * of_first, "mask": made.mask * of_first}
    found = corrected({}, "gpg", **few, uids=uids)[0]["advantages"]
    scores = made.rewards[:N].sum(-1)
    right = N / scores.count_nonzero() * (scores - scores.mean())
    assert torch.allclose(found[:N], right[:, None] * made.mask[:N], atol=1e-6)
    assert found[N:].abs().max() == 0


# Losses


@pytest.fixture(autouse=True, scope="module")
def patched() -> Iterator[None]:
    """verl as flashrl's plugin changes it; afterwards it is as it was."""
    import verl.trainer.ppo.core_algos as losses
    import verl.trainer.ppo.rollout_corr_helper as helper
    import verl.utils.torch_functional as functional

    from flashrl_cli.plugins import corrections

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module, name in (
            (helper, "compute_is_metrics"),
            (helper, "compute_offpolicy_metrics"),
            (losses, "compute_policy_loss_geo_mean"),
            (losses, "compute_opo_outcome_advantage"),
            (losses, "compute_gpg_outcome_advantage"),
            (functional, "masked_whiten"),
        ):
            monkeypatch.setattr(module, name, getattr(module, name))
        advantages = losses.ADV_ESTIMATOR_REGISTRY
        for registry, name in (
            (losses.POLICY_LOSS_REGISTRY, "geo_mean"),
            (advantages, "opo"),
            (advantages, "gpg"),
        ):
            monkeypatch.setitem(registry, name, registry[name])
        corrections.prepare_trainer()
        corrections.average_gmpo_over_mini_batch()
        yield


@pytest.mark.parametrize(
    "correction", [KINDS[0], KINDS[1], {**KINDS[0], "reject": REJECTS[0]}], ids=["none", "tis", "reject"]
)
@pytest.mark.parametrize("loss", get_args(Loss))
def test_losses_are_those_of_the_formulas(loss: str, correction: dict[str, Any]) -> None:
    import torch

    found, _ = corrected(correction, "rloo")
    weights, mask, advantages = found.get("rollout_is_weights"), found["response_mask"], found["advantages"]
    value, gradient = by_verl(loss, advantages, mask, weights)
    new = batch().new.double().requires_grad_()
    of_tokens = formulas.losses(loss, new, batch().old, advantages, mask)
    size = {"tokens": int(batch().mask.sum()), "responses": GROUPS * N}
    right = formulas.mean(loss, of_tokens, mask, weights, **size)
    right.backward()
    assert new.grad is not None
    assert value == pytest.approx(right.item(), abs=1e-5)
    assert torch.allclose(gradient.double(), new.grad, atol=1e-5)


def test_every_offered_combination_has_a_loss_and_a_gradient() -> None:
    """Each kind, rejection, advantage and loss, in all combinations that are not refused."""
    base = settings("tiny", options({})).spec
    losses = {loss: settings("tiny", options({}, loss=loss)).spec.algorithm for loss in get_args(Loss)}
    refused, values, idle = [], set(), set()
    for correction, advantage in itertools.product(CORRECTIONS, get_args(Advantage)):
        spec = spec_of(correction)
        found, _ = corrected(correction, advantage)
        weights, mask = found.get("rollout_is_weights"), found["response_mask"]
        acting = mask if weights is None else mask * (weights != 0)
        for loss, algorithm in losses.items():
            whole = {"correction": spec, "algorithm": algorithm.model_copy(update={"advantage": advantage})}
            if any(list(rule(base.model_copy(update=whole))) for rule in RULES):
                refused.append((spec.kind, spec.reject and spec.reject.by, advantage, loss))
                continue
            value, gradient = by_verl(loss, found["advantages"], mask, weights)
            assert math.isfinite(value)
            assert gradient.isfinite().all()
            if not gradient.abs().sum() > 0:
                idle.add((loss, advantage))
            assert loss == "gmpo" or gradient[acting == 0].abs().max() == 0
            values.add((round(value, 6), loss))
    # one response of a group has an advantage, which may be rejected or clipped; OPO's is 0 where one is left
    assert {advantage for _, advantage in idle} == {"grpo-passk", "opo"}
    token = [one for one in refused if one[1] == "token"]
    assert len(token) == 2 * 3 * 3 * len(losses), "kinds none and tis, three estimators, gae, reinforce++ and opo"
    assert {one for one in refused if one[0] == "icepop"} == {
        ("icepop", None, advantage, "gmpo") for advantage in get_args(Advantage)
    }
    assert len(refused) == len(token) + len(get_args(Advantage))
    assert len(values) > 0.9 * len({value for value, _ in values})


# What flashrl's plugin changes


def test_a_batch_that_icepop_zeroes_is_reported() -> None:
    """verl's own ends with a ZeroDivisionError."""
    import torch
    from verl.trainer.ppo.rollout_corr_helper import compute_is_metrics

    made = batch()
    found, metrics = corrected(KINDS[2], rollout=(made.old - 3) * made.mask)
    assert not found["rollout_is_weights"].any()
    of = {name.removeprefix("rollout_corr/"): value for name, value in metrics.items()}
    names = ("mean", "max", "min", "std", "eff_sample_size", "seq_mean", "seq_max", "seq_min", "seq_std")
    assert {of[f"rollout_is_{name}"] for name in names} == {0.0}
    high = ("rollout_is_ratio_fraction_high", "rollout_is_oob_ratio", "rollout_is_seq_fraction_high")
    assert [of[name] for name in high] == pytest.approx([1.0] * 3)
    assert of["rollout_is_seq_max_deviation"] == 1.0
    one = {"raw_rollout_is_weights": torch.ones(1, 2), "log_ratio_for_metrics": torch.zeros(1, 2)}
    more = {"response_mask": torch.ones(1, 2), "rollout_is": "token", "rollout_is_threshold": 2.0}
    with pytest.raises(ZeroDivisionError):
        compute_is_metrics.__wrapped__(rollout_is_weights=torch.zeros(1, 2), **one, **more)
    weights = torch.tensor([[0.0, 1.0]])
    right = compute_is_metrics.__wrapped__(rollout_is_weights=weights, **one, **more)
    assert compute_is_metrics(rollout_is_weights=weights, **one, **more) == right


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["kind"])
def test_the_largest_ratio_is_that_before_any_cap(kind: dict[str, Any]) -> None:
    _, metrics = corrected(kind)
    largest = known().log_w.max().exp().item()
    assert metrics["rollout_corr/ratio_max"] == pytest.approx(largest, rel=1e-5)


def test_the_largest_ratio_is_bounded_as_weights_are() -> None:
    made = batch()
    _, metrics = corrected({}, rollout=(made.old - 100) * made.mask)
    assert metrics["rollout_corr/ratio_max"] == pytest.approx(math.exp(20), rel=1e-5)


@pytest.mark.parametrize("loss", get_args(Loss))
def test_a_loss_does_not_depend_on_the_number_of_passes(loss: str) -> None:
    """verl's GMPO did; covariances are taken within a pass, so that those losses choose other tokens."""
    import torch

    found, _ = corrected(KINDS[1], "rloo")
    advantages, mask, weights = found["advantages"], found["response_mask"], found["rollout_is_weights"]
    value, gradient = by_verl(loss, advantages, mask, weights)
    parts = [by_verl(loss, advantages, mask, weights, rows) for rows in (slice(0, 3), slice(3, 8))]
    if not loss.endswith("-cov"):
        assert sum(part for part, _ in parts) == pytest.approx(value, abs=1e-6)
        assert torch.allclose(sum(part for _, part in parts), gradient, atol=1e-6)
    if loss == "gmpo":
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn

        patched = get_policy_loss_fn("geo_mean")
        POLICY_LOSS_REGISTRY["geo_mean"] = patched.__wrapped__
        stock = [by_verl(loss, advantages, mask, weights, rows)[1] for rows in (slice(0, 4), slice(4, 8))]
        POLICY_LOSS_REGISTRY["geo_mean"] = patched
        assert torch.allclose(sum(stock), 2 * gradient, atol=1e-6)


def test_the_plugin_changes_no_other_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashrl_cli.plugins import corrections

    monkeypatch.setattr(corrections, "VERL", "0.9.2")
    for change in (
        corrections.report_weights_that_are_all_zero,
        corrections.report_largest_ratio,
        corrections.whiten_what_is_left,
        corrections.compare_no_empty_responses,
        corrections.count_only_responses,
        corrections.average_gmpo_over_mini_batch,
    ):
        with pytest.raises(RuntimeError, match=r"of verl 0\.9\.2 only"):
            change()
