"""Complete tensors from disk: from an HF folder, verl's FSDP checkpoint shards, or a LoRA adapter and its base.

The merge and the evaluation's vLLM worker use this; the latter must not import more of flashrl. torch is imported when
tensors are read; `check` and `fingerprint` do not need it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashrl_cli.weights.accounting import Expected, account, expected, index_problems, not_finite
from flashrl_cli.weights.contents import (
    INDEX,
    Unreadable,
    checksums,
    model_files,
    read_bytes,
    read_json,
    samples,
    table,
    texts,
    torn,
)
from flashrl_cli.weights.lora import PEFT_CONFIG, PEFT_WEIGHTS, VERL_META, Adapter, is_lora, unwrapped
from flashrl_cli.weights.reading import FLOATS, Source, Stored, copied, equal, from_safetensors, from_shards, is_finite

OF_THE_MODEL = (
    "config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "*processor_config.json", "*.model", "*.tiktoken", "*.py",
)  # fmt: skip
"""Files of an HF folder that affect generated answers, as the weights do."""
_TEXTS = frozenset({"", ".json", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".py", ".yaml", ".yml", ".bpe"})
"""Suffixes of files that may be copied along; no form of weights has them."""
_ONCE = (
    "*.index.json", "params.json", "trainer_state.json", "*_results.json", PEFT_CONFIG, VERL_META,
)  # fmt: skip
"""Texts about this folder's weights or about the training, which would be wrong in another folder."""
_TEMPLATES = "additional_chat_templates"
"""Folder in which Transformers keeps named chat templates."""
HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """Files, relative to the folder, that are copied along with the weights, and names of what is left behind."""

    taken: tuple[Path, ...]
    left: tuple[str, ...]


def companions(hf: Path, without: Collection[str] = ()) -> Companions:
    """Files that belong to the model in `hf`, except the names `without`.

    They are config, tokenizer, chat templates, code and texts. Weights in other formats, a trainer's files and broken
    links are left behind, and listed unless they are hidden. Raises Unreadable if a part of the model is a broken link.
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
    """Small files of `hf` that affect generated answers."""
    yield from (path for path in _parts(hf) if path.is_file())


def _parts(hf: Path) -> list[Path]:
    """Parts of the model, including broken links, which `Path.glob` skips."""
    return sorted(path for path in hf.iterdir() if any(path.match(pattern) for pattern in OF_THE_MODEL))


__all__ = [
    "FLOATS",
    "HEAD",
    "INDEX",
    "PEFT_CONFIG",
    "PEFT_WEIGHTS",
    "VERL_META",
    "Companions",
    "Expected",
    "Stored",
    "Unreadable",
    "Weights",
    "companions",
    "copied",
    "expected",
    "holds_adapter_alone",
    "is_finite",
    "model_files",
    "not_finite",
    "read_bytes",
    "read_json",
    "stored_in_float32",
    "table",
    "ties_head",
    "torn",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Location of the weights of one checkpoint.

    They are in `shards` (in the order of ranks), or else in the safetensors files of `hf`, which contains config and
    tokenizer in any case. If `adapter` is given (a folder as PEFT writes it, or the `actor/` of a LoRA run), the
    adapter is added to the weights of `base`, or to those in the shards.
    """

    hf: Path
    shards: tuple[Path, ...] = ()
    adapter: Path | None = None
    base: Path | None = None

    def plain(self) -> dict[str, Any]:
        """The location as plain data, for another process."""
        names = {name: str(path) for name in ("hf", "adapter", "base") if (path := getattr(self, name))}
        return {**names, "shards": [str(shard) for shard in self.shards]}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Weights:
        """The weights from the plain data of `plain`."""
        paths = {name: Path(data[name]) for name in ("hf", "adapter", "base") if name in data}
        return cls(**paths, shards=tuple(map(Path, data["shards"])))

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Yield the name and complete tensor (on the CPU) of each weight, with the names of Transformers.

        Tensors of an HF folder keep their stored dtype; all others are in bf16, without a tied lm_head. Files are
        memory-mapped and released after use, so this needs memory for a few tensors, not for the model. Raises
        Unreadable before the first tensor for anything that `accounted` refuses. Raises Unreadable for NaN or infinite
        values when they are met, after the remaining tensors were searched for more of them.
        """
        source = self.accounted()
        files = {name: stored.file for name, stored in source.items()}
        for name in sorted(source):
            tensor = source.pop(name).read()
            if not is_finite(tensor):
                more = [other for other in sorted(source) if not is_finite(source.pop(other).read())]
                raise not_finite([name, *more], files)
            yield name, tensor

    def accounted(self) -> Source:
        """The tensors that `tensors` reads, after comparing them with those of the architecture.

        It reads the files' tables of contents and, for an architecture that is not in the cache yet, imports
        Transformers. Values are not read, except those of an lm_head that config.json ties to the embedding: the two
        must be equal. Raises Unreadable with all problems.
        """
        self._check_index()
        source = self.source()
        account(self.hf, source, expected(self.hf))
        return source

    def source(self) -> Source:
        """The tensors that `tensors` reads, by name, with shape and dtype, before reading any. Raises Unreadable."""
        if self.adapter:
            return self._adapted(self.adapter)
        if not self.shards:
            source = from_safetensors(model_files(self.hf))
            self._tied_head(source)
            return source
        source = from_shards(self.shards)
        if any(map(is_lora, source)):
            raise Unreadable(f"{self.shards[0]} holds a LoRA adapter, and no {VERL_META} says its alpha")
        return self._without_tied(source)

    def check(self) -> None:
        """Raise Unreadable for damage that the files' tables of contents show; reads no tensors."""
        for shard in self.shards:
            if problem := torn(shard):
                raise Unreadable(f"{shard} is torn: {problem}")
        self._check_index()
        for file in self._safetensors():
            table(file)

    def _check_index(self) -> None:
        if (self.base or not self.shards) and (problems := index_problems(self.base or self.hf)):
            raise Unreadable("; ".join(problems))

    def fingerprint(self) -> str:
        """Hex digest that depends on the tensors, the config and the tokenizer, but not on paths or dates.

        It uses the CRC-32s that torch.save writes into the shards, or else both ends of each tensor, because training
        changes all of a tensor. Raises Unreadable for damaged files.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(checksums(shard))
        for file in self._safetensors():
            digest.update(samples(file))
        for file in self._beside():
            digest.update(file.name.encode() + hashlib.sha256(read_bytes(file)).digest())
        return digest.hexdigest()

    def _adapted(self, folder: Path) -> Source:
        adapter = Adapter.read(folder)
        found = from_shards(self.shards, exact=True) if self.shards else from_safetensors([folder / PEFT_WEIGHTS])
        lora = {unwrapped(name): read for name, read in found.items() if is_lora(name)}
        whole = {unwrapped(name): read for name, read in found.items() if not is_lora(name)}
        if whole and not self.shards:
            raise Unreadable(f"{folder / PEFT_WEIGHTS} holds {min(whole)}, which cannot be merged")
        return adapter.add(self._without_tied(whole or self._of_base(folder)), lora)

    def _of_base(self, folder: Path) -> Source:
        if self.base is None:
            raise Unreadable(f"{folder} holds an adapter alone, and its base model is unknown")
        if "quantization_config" in read_json(self.base / "config.json"):
            raise Unreadable(f"{self.base} is quantized: no adapter can be merged into it")
        return from_safetensors(model_files(self.base))

    def _without_tied(self, source: Source) -> Source:
        if head := self._tied_head(source):
            source.pop(head)
        return source

    def _tied_head(self, source: Source) -> str | None:
        """Name of an lm_head that the config ties to the embedding; None without one.

        Raises Unreadable if the two differ.
        """
        if not ties_head(self.hf, source):
            return None
        embedding = next(name for name in source if name.endswith(_EMBEDDING))
        if not equal(source[HEAD], source[embedding]):
            raise Unreadable(
                f"{HEAD} differs from {embedding}, and config.json ties them (tie_word_embeddings): set that to false "
                f"if the head was trained by itself, or remove {HEAD}"
            )
        return HEAD

    def _safetensors(self) -> Iterator[Path]:
        if self.adapter and not self.shards:
            yield self.adapter / PEFT_WEIGHTS
        if self.base or not self.shards:
            yield from model_files(self.base or self.hf)

    def _beside(self) -> Iterator[Path]:
        """Small files that affect generated answers: those of `hf`, the adapter's, and the base's config."""
        yield from beside(self.hf)
        if self.adapter:
            yield from (file for name in (PEFT_CONFIG, VERL_META) if (file := self.adapter / name).is_file())
        if self.base and self.base != self.hf:
            yield self.base / "config.json"


def holds_adapter_alone(shard: Path) -> bool:
    """Whether a shard of a LoRA run was saved without the base's weights. Raises Unreadable for a damaged file."""
    return not any(text.endswith(".base_layer.weight") for text in texts(shard))


def stored_in_float32(shard: Path) -> bool:
    """Whether a shard holds float32 tensors, which take twice as many bytes as in bf16.

    Raises Unreadable for a damaged file.
    """
    return "torch FloatStorage" in texts(shard)


def ties_head(hf: Path, names: Collection[str]) -> bool:
    """Whether a model has an lm_head that its config ties to the embedding, so that readers ignore it."""
    both = HEAD in names and any(name.endswith(_EMBEDDING) for name in names)
    return both and _is_tied(hf)


def _is_tied(hf: Path) -> bool:
    config = read_json(hf / "config.json")
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    from transformers import AutoConfig

    try:
        text = AutoConfig.from_pretrained(hf, trust_remote_code=False).get_text_config()
    except (ValueError, KeyError, OSError):
        return False
    return bool(getattr(text, "tie_word_embeddings", False))
