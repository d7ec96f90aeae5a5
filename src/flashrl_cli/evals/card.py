"""The model card of an exported step: what was trained, how, and what is known of how good it is. No folder is named in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

_SCORES = {
    "evaluation": "accuracy by `flashrl eval`",
    "validation": "accuracy on the run's own validation data, by the rollout engine",
    "reward": "mean reward of the step's own training batch (nothing was held out)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a card tells: the plan of the run's newest attempt, versions of packages, a score and what it rests on."""

    run: str
    step: int
    plan: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    score: tuple[str, float] | None = None


def text(facts: Facts) -> str:
    """The card as Markdown with the hub's front matter."""
    base = _base(facts.plan)
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"base_model: {base}"] if _is_hub_id(base) else []
    lines += ["tags:", "- reinforcement-learning", "- flashrl", "- verl", "---", ""]
    lines += [f"# {facts.run}, step {facts.step}", ""]
    lines += ["A policy trained by reinforcement learning with flashrl on verl and vLLM. Weights are bfloat16.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in _rows(facts))]
    if facts.score is None:
        lines += ["", "Nothing is recorded of how good this step is."]
    return "\n".join(lines) + "\n"


def _rows(facts: Facts) -> Iterator[tuple[str, object]]:
    yield "run", facts.run
    yield "step", facts.step
    spec = facts.plan.get("spec")
    if spec:
        yield "preset", facts.plan.get("preset", spec["name"])
        yield "base model", _base(facts.plan)
        yield "training data", _last(spec["data"]["train"])
        yield "advantage", spec["algorithm"]["advantage"]
        yield "rollout precision", spec["rollout"]["precision"]
        cap = spec["correction"]["cap"]
        yield "truncated importance sampling", "off" if cap is None else f"cap {cap:g}"
    if facts.versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))
    if facts.score:
        by, value = facts.score
        yield _SCORES[by], f"{value:.4g}"


def _base(plan: Mapping[str, Any]) -> str:
    spec = plan.get("spec")
    return _last(spec["model"]["path"]) if spec else ""


def _last(reference: object) -> str:
    """A reference as it may be published: of a local path its last name alone."""
    text = str(reference)
    return PurePath(text).name if text.startswith(("/", "~", ".")) else text


def _is_hub_id(reference: str) -> bool:
    return reference.count("/") == 1 and not reference.startswith("prepared:")


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
