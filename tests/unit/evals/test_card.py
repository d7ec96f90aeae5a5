"""A model card says what is known, no more, and names no folder of anybody's machine."""

from __future__ import annotations

from typing import Any

import yaml

from flashrl_cli.evals.export import Facts, text


def plan(**model: str) -> dict[str, Any]:
    return {
        "preset": "dapo",
        "spec": {
            "name": "dapo",
            "model": {"path": "Qwen/Qwen2.5-32B", **model},
            "data": {"train": "/srv/me/secret/train.parquet"},
            "algorithm": {"advantage": "grpo"},
            "rollout": {"precision": "int8"},
            "correction": {"cap": 8.0},
        },
    }


def front(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return found


def test_a_card_of_everything() -> None:
    facts = Facts(run="r", step=20, plan=plan(), versions={"verl": "0.9.1"}, score=("validation", 0.61234))
    card = text(facts)
    assert front(card)["base_model"] == "Qwen/Qwen2.5-32B"
    for row in (
        "# r, step 20",
        "| preset | dapo |",
        "| rollout precision | int8 |",
        "| truncated importance sampling | cap 8 |",
        "| training data | train.parquet |",
        "| versions | verl 0.9.1 |",
        "| accuracy on the run's own validation data, by the rollout engine | 0.6123 |",
    ):
        assert row in card
    assert "/home" not in card


def test_a_card_of_nothing() -> None:
    card = text(Facts(run="a|b", step=1, plan={}))
    assert "base_model" not in front(card)
    assert "| run | a\\|b |" in card
    assert "Nothing is recorded of how good this step is." in card


def test_only_the_hub_has_base_models() -> None:
    for path, shown in {"/models/me/Qwen": "Qwen", "prepared:tiny": "prepared:tiny", "./a/b": "b"}.items():
        card = text(Facts(run="r", step=1, plan=plan(path=path)))
        assert "base_model" not in front(card)
        assert f"| base model | {shown} |" in card


def test_without_correction() -> None:
    spec = plan()
    spec["spec"]["correction"]["cap"] = None
    assert "| truncated importance sampling | off |" in text(Facts(run="r", step=1, plan=spec))
