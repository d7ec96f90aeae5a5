"""Export a saved step as a Hugging Face model: bf16 safetensors, config, tokenizer, and a model card.

The card states what was trained, how, and what is known about its quality; it names no local folder. An upload to the
Hugging Face hub that is not possible is refused before anything is exported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from flashrl_cli import files, hub
from flashrl_cli.errors import EnvironmentNotReady, InputError, NothingMatched, RunFailed
from flashrl_cli.machine import software
from flashrl_cli.runs import merge, store
from flashrl_cli.verl import checkpoints as layout
from flashrl_cli.weights import Unreadable, Weights

if TYPE_CHECKING:
    from flashrl_cli.runs.saved import CheckpointList, Saved

_SCORES = {
    "evaluation": "accuracy by `flashrl eval`",
    "validation": "accuracy on the run's own validation data, by the rollout engine",
    "reward": "mean reward of the step's own training batch (nothing was held out)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Content of a card: the plan of the run's newest attempt, package versions, and a score with its evidence."""

    run: str
    step: int
    plan: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    score: tuple[str, float] | None = None


def text(facts: Facts) -> str:
    """The card as Markdown with the front matter of the hub."""
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
        yield "correction", _correction(spec["correction"])
    if facts.versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))
    if facts.score:
        by, value = facts.score
        yield _SCORES[by], f"{value:.4g}"


def _correction(recorded: Mapping[str, Any]) -> str:
    """The correction in words; a plan of before there were several kinds has its cap only."""
    from flashrl_cli.config.spec import CorrectionSpec

    kind = "none" if recorded["cap"] is None else "tis"
    return CorrectionSpec.model_validate({"kind": kind} | dict(recorded)).text


def _base(plan: Mapping[str, Any]) -> str:
    spec = plan.get("spec")
    return _last(spec["model"]["path"]) if spec else ""


def _last(reference: object) -> str:
    """A reference in a form that may be published: only the last part of a local path."""
    text = str(reference)
    return PurePath(text).name if text.startswith(("/", "~", ".")) else text


def _is_hub_id(reference: str) -> bool:
    return reference.count("/") == 1 and not reference.startswith("prepared:")


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A model that was written: its size, and what its tensors were compared with."""

    run: str
    step: int
    path: Path
    tensors: int
    parameters: int
    bytes: int
    compared: str

    def document(self) -> dict[str, Any]:
        """The result of the export as plain data."""
        return {**asdict(self), "path": str(self.path)}


def choose(listed: CheckpointList, step: str) -> Saved:
    """The step that the user names by a number, `latest` or `best`. Raises InputError or NothingMatched."""
    usable = {one.step: one for one in listed.saved if one.has_weights}
    numbers = ", ".join(map(str, usable)) or "none"
    if step == "latest":
        number = max(usable, default=None)
    elif step == "best":
        number = listed.best if listed.best is not None else max(usable, default=None) if len(usable) == 1 else None
    elif step.isascii() and step.isdecimal():
        number = int(step)
    else:
        raise InputError(f"STEP {step}: neither a number nor latest nor best", hint=f"steps with weights: {numbers}")
    if number is None or number not in usable:
        what = "no scores to tell the best step by" if step == "best" and usable else f"no weights of step {step}"
        raise NothingMatched(f"run {listed.run.name}: {what}", hint=f"steps with weights: {numbers}")
    return usable[number]


def export(listed: CheckpointList, saved: Saved, target: Path) -> Exported:
    """Write `saved` to `target`, which appears only once it is complete and its weights match its config.

    Raises RunFailed for weights that cannot be read or do not match their config, EnvironmentNotReady for a folder that
    cannot be written.
    """
    weights = _weights(saved)
    try:
        with files.replacing(target) as temporary:
            written = merge.write(weights, temporary)
            (temporary / "README.md").write_text(_card(listed, saved), encoding="utf-8")
            size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
    except Unreadable as error:
        raise RunFailed(f"step {saved.step} cannot be exported: {error}") from None
    except OSError as error:
        raise EnvironmentNotReady(f"{target} cannot be written: {error.strerror or error}") from None
    return Exported(
        run=listed.run.name,
        step=saved.step,
        path=target,
        tensors=len(written.shapes),
        parameters=sum(map(math.prod, written.shapes.values())),
        bytes=size,
        compared=written.compared,
    )


def _weights(saved: Saved) -> Weights:
    """The step's weights on disk. Raises InputError for an adapter."""
    actor = saved.path / layout.ACTOR
    hf = actor / layout.HUGGINGFACE
    if saved.has_hf:
        return Weights(hf=hf)
    if saved.lora:
        what = f"step {saved.step} is a LoRA adapter, not a whole model"
        raise InputError(what, hint=f"flashrl eval {saved.path} --merge FOLDER")
    found = layout.shards(actor)
    return Weights(hf=hf, shards=found.files if found else ())


def _card(listed: CheckpointList, saved: Saved) -> str:
    found = store.load(listed.run.record)
    versions: Mapping[str, str] = found.last.versions if found and found.last else {}
    score = listed.scores.values.get(saved.step) if listed.scores else None
    by = listed.scores.by if listed.scores else None
    return text(
        Facts(
            run=listed.run.name,
            step=saved.step,
            plan=store.newest_plan(listed.run),
            versions=versions,
            score=None if score is None or by is None else (by, score),
        )
    )


STALE = ["*.safetensors", "*.safetensors.index.json", "*.bin"]
"""Weights of an earlier upload, which would mix with the new ones if they were not deleted."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of the hub, with a client (`huggingface_hub.HfApi`) that may write to it."""

    name: str
    api: Any

    def upload(self, folder: Path, *, private: bool, message: str) -> str:
        """Upload `folder` in one commit that replaces the weights there; returns the repository's address.

        A repository that exists keeps its visibility. Raises EnvironmentNotReady if the hub refuses the upload.
        """
        from huggingface_hub.errors import HTTPError

        try:
            made = self.api.create_repo(self.name, private=private, exist_ok=True)
            self.api.upload_folder(repo_id=self.name, folder_path=folder, commit_message=message, delete_patterns=STALE)
        except (OSError, HTTPError) as error:
            raise EnvironmentNotReady(
                f"{self.name} was not uploaded: {_without_token(str(error))}",
                hint=f"the model is in {folder}: `hf upload {self.name} {folder}` tries again",
            ) from None
        return str(made)


def repository(name: str) -> Repository:
    """The repository OWNER/NAME, ready for an upload.

    Raises InputError for a name of another form, EnvironmentNotReady if the library, the network or a valid token is
    missing.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ModuleNotFoundError:
        hint = software.install_extra("data")
        raise EnvironmentNotReady("huggingface_hub is not installed", hint=hint) from None
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise InputError(f"--push {name}: not the name of a repository", hint="--push OWNER/NAME") from None
    if hub.offline(os.environ) or not hub.resolves(os.environ):
        raise EnvironmentNotReady(
            f"--push {name}: the hub cannot be reached from here",
            hint="export without --push, and `hf upload` the folder from a machine with a network",
        )
    if huggingface_hub.get_token() is None:
        raise EnvironmentNotReady(
            f"--push {name}: no token for the hub", hint="`hf auth login`, or set HF_TOKEN to a token that may write"
        )
    return Repository(name, huggingface_hub.HfApi())


def _without_token(text: str) -> str:
    import huggingface_hub

    token = huggingface_hub.get_token()
    return text.replace(token, "…") if token else text
