"""Upload an exported model to the Hugging Face hub. What can be refused is refused before anything is exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashrl_cli.data import hub
from flashrl_cli.data.extras import require
from flashrl_cli.errors import EnvironmentNotReady, InputError

if TYPE_CHECKING:
    from pathlib import Path

STALE = ["*.safetensors", "*.safetensors.index.json", "*.bin"]
"""Weights of an earlier upload: left there, they would mix with the new ones."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of the hub, with the client (`huggingface_hub.HfApi`) that may write it."""

    name: str
    api: Any

    def upload(self, folder: Path, *, private: bool, message: str) -> str:
        """Upload `folder` in one commit, in place of the weights that are there; the repository's address.

        A repository that exists stays as visible as it is. Raises EnvironmentNotReady if the hub refuses.
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
    """The repository OWNER/NAME, ready to be written. Raises InputError for another name, EnvironmentNotReady without a way there."""
    library = require("huggingface_hub")
    try:
        require("huggingface_hub.utils").validate_repo_id(name)
    except require("huggingface_hub.errors").HFValidationError:
        raise InputError(f"--push {name}: not the name of a repository", hint="--push OWNER/NAME") from None
    hub.detect_offline()
    if hub.is_offline():
        raise EnvironmentNotReady(
            f"--push {name}: the hub cannot be reached from here",
            hint="export without --push, and `hf upload` the folder from a machine with a network",
        )
    if library.get_token() is None:
        raise EnvironmentNotReady(
            f"--push {name}: no token for the hub", hint="`hf auth login`, or set HF_TOKEN to a token that may write"
        )
    return Repository(name, library.HfApi())


def _without_token(text: str) -> str:
    import huggingface_hub

    token = huggingface_hub.get_token()
    return text.replace(token, "…") if token else text
