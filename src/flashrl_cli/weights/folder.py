"""Which files of a Hugging Face folder are the model, which go with it, and which stay when it is written anew."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from flashrl_cli.weights.contents import INDEX, Unreadable, model_files
from flashrl_cli.weights.lora import PEFT_CONFIG, VERL_META

OF_THE_MODEL = (
    "config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "*processor_config.json", "*.model", "*.tiktoken", "*.py",
)  # fmt: skip
"""Files of an HF folder that change answers as the weights do."""
_TEXTS = frozenset({"", ".json", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".py", ".yaml", ".yml", ".bpe"})
"""Ends of names of what may go along: never weights in any form."""
_ONCE = (
    "*.index.json", "params.json", "trainer_state.json", "*_results.json", PEFT_CONFIG, VERL_META,
)  # fmt: skip
"""Texts that tell of this folder's own weights or of the training, and would be wrong in another folder."""
_TEMPLATES = "additional_chat_templates"
"""Folder in which Transformers keeps chat templates with names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """Files, relative to the folder, that a copy takes along beside the weights, and names of what it leaves behind."""

    taken: tuple[Path, ...]
    left: tuple[str, ...]


def companions(hf: Path, without: Collection[str] = ()) -> Companions:
    """What goes with the model in `hf`: config, tokenizer, chat templates, code and texts, but for the names `without`.

    Weights in other forms, what a trainer keeps and links that lead nowhere are left behind and named, unless they are
    hidden. Raises Unreadable for a part of the model that is such a link.
    """
    weights = {file.name for file in model_files(hf)} | {INDEX}
    dead = [path.name for path in _parts(hf) if not path.exists()]
    if dead:
        what = f"links to files that do not exist: {', '.join(dead)}"
        raise Unreadable(f"{hf} holds {what}; download or copy the model again")
    taken, left = [], []
    for path in sorted(hf.iterdir()):
        if path.name in weights or path.name in without or path.name.startswith("."):
            continue
        if path.is_dir() and path.name == _TEMPLATES:
            taken += [file.relative_to(hf) for file in sorted(path.glob("*.jinja")) if file.is_file()]
        elif path.is_file() and path.suffix in _TEXTS and not any(path.match(pattern) for pattern in _ONCE):
            taken.append(path.relative_to(hf))
        else:
            left.append(f"{path.name}/" if path.is_dir() else path.name)
    return Companions(taken=tuple(taken), left=tuple(left))


def beside(hf: Path) -> Iterator[Path]:
    """Small files of `hf` that change answers."""
    yield from (path for path in _parts(hf) if path.is_file())


def _parts(hf: Path) -> list[Path]:
    """Parts of the model, links that lead nowhere among them, which `Path.glob` passes over."""
    return sorted(path for path in hf.iterdir() if any(path.match(pattern) for pattern in OF_THE_MODEL))
