"""How two plans differ: of presets, or of what runs and their attempts were started with."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from flashrl_cli.config import presets
from flashrl_cli.config.layers import Difference, Verbatim, differences, leaves
from flashrl_cli.errors import InputError
from flashrl_cli.runs.store import find_plan, read_plan, run_names
from flashrl_cli.train.launch import preview
from flashrl_cli.train.plan import plan_document
from flashrl_cli.verl.overrides import quote

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flashrl_cli.config.resolve import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two configurations side by side; `values` is None where a plan was recorded before plans contained them."""

    values: list[Difference] | None
    overrides: list[Difference]
    environment: list[Difference]


def document_of(reference: str, options: Options) -> dict[str, Any]:
    """The plan document of a preset (with options), or the one that a run, an attempt or a plan.json recorded.

    A name of both a preset and a run means the preset. Raises InputError.
    """
    recorded = None if reference in presets.names() else find_plan(reference)
    if recorded and options:
        raise InputError(
            f"{reference} is recorded in {recorded}: --rollout, --tis and --set change presets only",
            hint=f"flashrl presets diff {reference} PRESET --set …",
        )
    if recorded:
        return read_plan(recorded)
    _must_exist(reference)
    return plan_document(preview(reference, options)[1])


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Compare two plan documents. Names, folders and descriptions of the presets do not count as differences."""
    typed = None
    if "spec" in a and "spec" in b:
        typed = list(differences(_values(a), _values(b), b["origins"]))
    return Comparison(
        values=typed,
        overrides=list(differences(_overrides(a), _overrides(b))),
        environment=list(differences(_environment(a), _environment(b))),
    )


def _must_exist(reference: str) -> None:
    """Raise InputError, with the most similar names, for a reference that is neither a preset nor a run."""
    try:
        presets.locate(reference)
    except InputError as error:
        near = get_close_matches(reference, [*presets.names(), *run_names()])
        hint = f"did you mean {' or '.join(near)}?" if near else error.hint
        raise InputError(f"no preset, run or plan {reference!r}", hint=hint) from None


def _values(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in leaves(document["spec"]) if key not in presets.OWN_KEYS}


def _overrides(document: Mapping[str, Any]) -> dict[str, Verbatim]:
    pairs = (text.partition("=") for text in document["overrides"])
    return {key: _without_places(value, document) for key, _, value in pairs}


def _environment(document: Mapping[str, Any]) -> dict[str, Verbatim]:
    """What the plan adds to the environment, without the variables that `env` of the spec sets."""
    in_spec = document.get("spec", {}).get("env", {})
    return {key: _without_places(value, document) for key, value in document["env"].items() if key not in in_spec}


def _without_places(text: str, document: Mapping[str, Any]) -> Verbatim:
    """`text` with the run's name and folders replaced by placeholders."""
    if text == quote(document["name"]):
        return Verbatim("<name>")
    for what, place in sorted(document["files"].items(), key=lambda item: -len(item[1])):
        text = text.replace(place, f"<{what}>")
    return Verbatim(text)
