"""Versions of tokens, and figures of each staleness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flashrl_cli.contract import STALENESS
from flashrl_cli.plugins.staleness import Pieces, Tally, tag_of, versions

CAP = 2.0


def step(seed: int = 0, count: int = 4000) -> dict[str, Any]:
    """Tokens of a step with TIS: log-probs of rollout and trainer, weights, and what was above the cap."""
    make = np.random.default_rng(seed)
    rollout = -make.exponential(1.0, count)
    trainer = np.minimum(rollout + make.normal(0, 0.4, count), 0)
    ratios = np.exp(trainer - rollout)
    return {"trainer": trainer, "rollout": rollout, "weights": np.minimum(ratios, CAP), "above": ratios > CAP}


def part(tokens: dict[str, Any], chosen: Any) -> dict[str, Any]:
    return {name: values[chosen] for name, values in tokens.items()}


def of(figures: dict[str, float], number: int | str) -> dict[str, float]:
    start = f"{STALENESS}{number}/"
    return {name.removeprefix(start): value for name, value in figures.items() if name.startswith(start)}


def test_the_versions_of_a_response_are_those_of_its_pieces() -> None:
    assert versions({"versions": [[3, 2], [5, 1]], "min_global_steps": 3}, 3) is not None
    found = [
        versions({"versions": [[3, 2], [5, 1]], "min_global_steps": 3}, tokens).tolist()  # type: ignore[union-attr]
        for tokens in (1, 3, 5)
    ]
    assert found == [[3], [3, 3, 5], [3, 3, 5, 5, 5]]


def test_without_pieces_a_response_has_its_first_version() -> None:
    found = versions({"min_global_steps": 4, "max_global_steps": 6}, 2)
    assert found is not None
    assert found.tolist() == [4, 4]
    assert versions({"min_global_steps": None}, 2) is None


def test_the_pieces_go_from_the_row_to_its_tag() -> None:
    row = {"extra_fields": {"versions": Pieces([[1, 4], [2, 7]]), "num_turns": 2}}
    assert tag_of(row) == {"versions": [[1, 4], [2, 7]]}
    assert row == {"extra_fields": {"num_turns": 2}}
    assert tag_of(row) == tag_of({}) == {}


def test_figures_of_one_staleness_are_those_of_the_step() -> None:
    tokens = step()
    tally = Tally()
    tally.add(np.full(4000, 1), **tokens)
    found = of(tally.figures(), 1)
    log_ratios, weights = tokens["trainer"] - tokens["rollout"], tokens["weights"]
    p, q = np.exp(tokens["trainer"]), np.exp(tokens["rollout"])
    expected = {
        "tokens": 4000,
        "share": 1,
        "kl": -log_ratios.mean(),
        "kl_k3": (np.exp(log_ratios) - log_ratios - 1).mean(),
        "weight_mean": weights.mean(),
        "effective": weights.mean() ** 2 / (weights**2).mean(),
        "truncated": tokens["above"].mean(),
        "prob_diff": np.abs(p - q).mean(),
        "prob_correlation": np.corrcoef(p, q)[0, 1],
    }
    assert found == pytest.approx(expected, rel=1e-9)
    assert tokens["above"].any()


def test_each_staleness_has_the_figures_of_its_tokens_alone() -> None:
    tokens = step()
    stale = np.random.default_rng(1).integers(0, 3, 4000)
    together = Tally()
    for half in (slice(0, 1500), slice(1500, None)):  # the mini-batches of a step
        together.add(stale[half], **part(tokens, half))
    found = together.figures()
    for number in range(3):
        chosen = stale == number
        alone = Tally()
        alone.add(stale[chosen], **part(tokens, chosen))
        expected = of(alone.figures(), number) | {"share": chosen.mean()}
        assert of(found, number) == pytest.approx(expected, rel=1e-9)
    assert not of(found, 3)


def test_without_a_correction_there_are_no_weights() -> None:
    tokens = step(count=10)
    tally = Tally()
    tally.add(np.zeros(10, int), tokens["trainer"], tokens["rollout"])
    assert {"kl", "prob_diff"} < of(tally.figures(), 0).keys()
    assert not {"weight_mean", "effective", "truncated"} & of(tally.figures(), 0).keys()


def test_values_that_do_not_exist_are_left_out() -> None:
    tally = Tally()
    assert tally.figures() == {}
    tally.add(np.array([0, 0]), np.log([0.5, 0.5]), np.log([0.5, 0.5]))
    assert "prob_correlation" not in of(tally.figures(), 0)
    assert of(tally.figures("fresh"), "fresh")["tokens"] == 2
    assert "share" not in of(tally.figures("fresh"), "fresh")
    assert of(tally.figures(), 0)["kl"] == 0
