"""Inputs and outputs of the benchmark's processes: a rollout variant, its engine's job, and sampled responses.

An engine receives an EngineJob, and the scorer the keys `model` (an HF folder) and `dtype` (in which the trainer
computes: bfloat16 or float32). Orders have a key `kind` (run.KINDS). Events are `advance` (note), and `done` (result),
which completes the order (worker.protocol).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashrl_cli import contract, files, paths
from flashrl_cli.contract import RolloutOptions
from flashrl_cli.errors import InputError
from flashrl_cli.precision import BLOCKS, KV_CACHES, PRECISIONS, ROTATED, SMOOTHED, joined

PLAIN = "plain"
ROTATIONS = {PLAIN: 0, **{f"rot{block}": block for block in BLOCKS}}
"""Blocks of the suffixes that say how int8 rotates its inputs; without one, as a run does by default."""
CACHES = {row.suffix: row.name for row in KV_CACHES.values()}
"""KV caches by the suffixes that ask for them."""
SUFFIXES = (*CACHES, "head32", "smooth", *ROTATIONS)
_FLOAT32 = ("float32", "fp32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A rollout variant: a precision and further options of its engine.

    `kv_cache` is as a run names it, `head32` means logits in float32; `profile` is the smoothing profile that each
    refit applies. `rotation` is one of ROTATIONS, None for the default.
    """

    precision: str
    kv_cache: str = "auto"
    head32: bool = False
    profile: Path | None = None
    rotation: str | None = None

    @property
    def name(self) -> str:
        """The variant's name on the command line: `int8+kv8`."""
        caches = {suffix: self.kv_cache == name for suffix, name in CACHES.items()}
        chosen = {**caches, "head32": self.head32, "smooth": self.profile is not None}
        suffixes = [*(suffix for suffix, on in chosen.items() if on), *filter(None, [self.rotation])]
        return "+".join([self.precision, *suffixes])

    @property
    def asked_rotation(self) -> int | str:
        """The block of its rotation, 0 for none, `auto` for the largest that fits."""
        return self.options().asked_rotation if PRECISIONS[self.precision].rotates else 0

    def arguments(self, layers: int) -> dict[str, Any]:
        """vLLM's arguments for a model with this number of layers."""
        row = PRECISIONS[self.precision]
        if row.verl:
            # verl does not quantize the routers of experts
            quantization = {**row.vllm_config, "ignored_layers": [f"model.layers.{n}.mlp.gate" for n in range(layers)]}
            return {
                "worker_extension_cls": contract.BLOCKS_EXTENSION,
                "hf_overrides": {"quantization_config": quantization},
            }
        row_of_cache = KV_CACHES.get(self.kv_cache)
        cache = {"kv_cache_dtype": row_of_cache.vllm} if row_of_cache else {}
        return {"worker_extension_cls": contract.BENCH_EXTENSION, "quantization": row.method, **cache}

    def options(self) -> RolloutOptions:
        """The variant's RolloutOptions for the plugins inside the engine."""
        return RolloutOptions(
            profile=str(self.profile) if self.profile else None,
            lm_head_fp32=self.head32,
            rotation=contract.AUTO if self.rotation is None else ROTATIONS[self.rotation],
        )

    def key(self) -> dict[str, Any]:
        """Plain data that distinguishes it from every other variant; a profile is identified by its content."""
        profile = files.sha256(self.profile) if self.profile else None
        return {**asdict(self), "profile": profile, "rotation": self.asked_rotation}

    def contradiction(self, holds: dict[str, Any]) -> str | None:
        """The difference of an engine's contract.Handshake from this variant; None if they agree."""
        if holds["precision"] != self.precision:
            layers = f"{holds['quantized_layers']} of {holds['linear_layers']} linear layers are quantized"
            found = f"{holds['precision']} ({layers}, kernel {holds['kernel']})"
            return f"{self.name} was asked for, but the engine holds {found}"
        checks = (
            (self.kv_cache, holds["kv_cache"], f"its KV cache is {holds['kv_cache']}"),
            (self.head32, holds["lm_head"] in _FLOAT32, f"its logits are computed in {holds['lm_head']}"),
            (self.profile is not None, holds["smoothed"] > 0, f"{holds['smoothed']} of its tensors are smoothed"),
        )
        wrong = [text for wanted, held, text in checks if wanted != held]
        if self.asked_rotation not in {holds["rotation"], contract.AUTO}:
            wrong.append(f"its inputs are rotated by blocks of {holds['rotation']}")
        return f"{self.name} was asked for, but of the engine {' and '.join(wrong)}" if wrong else None


def parse(text: str, profile: Path | None) -> tuple[Variant, ...]:
    """The variants in a text such as `bf16,int8+kv8`, each once.

    Raises InputError for unknown words and unusable profiles.
    """
    found = tuple(dict.fromkeys(_variant(word.strip(), profile) for word in text.split(",")))
    if profile and not any(variant.profile for variant in found):
        raise InputError(f"--profile {profile}: no variant uses it", hint="--rollout int8,int8+smooth")
    return found


def _variant(word: str, profile: Path | None) -> Variant:
    precision, *suffixes = word.split("+")
    _known(precision, tuple(PRECISIONS), f"--rollout {word}: no precision {precision!r}")
    for suffix in suffixes:
        _known(suffix, SUFFIXES, f"--rollout {word}: no suffix {suffix!r}")
    row = PRECISIONS[precision]
    rotations = [suffix for suffix in suffixes if suffix in ROTATIONS]
    if rotations and not row.rotates:
        what = f"--rollout {word}: rotations are for {joined(ROTATED, 'and')}"
        raise InputError(what, hint=f"--rollout {ROTATED[0]}+{rotations[0]}")
    if len(rotations) > 1:
        raise InputError(
            f"--rollout {word}: one rotation, not {joined(rotations, 'and')}", hint=f"--rollout {ROTATED[0]}"
        )
    caches = [suffix for suffix in suffixes if suffix in CACHES]
    if caches and "kv8" not in row.goes_with:
        what = f"--rollout {word}: a KV cache in 8 bits takes flashrl's own weight update, and {precision} has verl's"
        raise InputError(what, hint=f"--rollout {row.sibling}+{caches[0]}")
    if len(caches) > 1:
        raise InputError(
            f"--rollout {word}: one KV cache, not {joined(caches, 'and')}", hint=f"--rollout {precision}+{caches[0]}"
        )
    plain = Variant(
        precision=precision,
        kv_cache=CACHES[caches[0]] if caches else "auto",
        head32="head32" in suffixes,
        rotation=next(iter(rotations), None),
    )
    if "smooth" not in suffixes:
        return plain
    if "smooth" not in row.goes_with:
        what = f"--rollout {word}: smoothing is for {joined(SMOOTHED, 'and')}"
        raise InputError(what, hint=f"--rollout {SMOOTHED[0]}+smooth")
    return replace(plain, profile=_profile(word, profile))


def _profile(word: str, profile: Path | None) -> Path:
    if profile is None:
        raise InputError(f"--rollout {word}: smoothing needs a profile", hint="--profile FILE")
    file = paths.absolute(profile)
    if not file.is_file():
        raise InputError(f"--profile {profile}: no such file", hint="name a profile that was made for this model")
    return file


def _known(word: str, words: tuple[str, ...], what: str) -> None:
    if word not in words:
        near = difflib.get_close_matches(word, words, n=1)
        raise InputError(what, hint=f"did you mean {near[0]}?" if near else f"there are {', '.join(words)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Engine options: `kv_memory` in GiB (None: all that is left), lengths in tokens, `tensor_parallel` in GPUs."""

    tensor_parallel: int
    max_num_seqs: int
    max_model_len: int
    gpu_memory_utilization: float | None
    enforce_eager: bool
    kv_memory: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """The job of one engine; `arguments` are vLLM's for the variant.

    `weights` (a Weights as plain data) is None for random ones. `questions` is a file of chat prompts, one per line,
    for later responses of up to `response` tokens each; for them the engine accepts longer sequences than its options
    say, up to `longest`.
    """

    model: str
    weights: dict[str, Any] | None
    arguments: dict[str, Any]
    options: EngineOptions
    questions: str | None
    response: int
    longest: int | None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> EngineJob:
        """The job from the plain data of `dataclasses.asdict`."""
        return cls(**{**data, "options": EngineOptions(**data["options"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Token ids of prompts and responses, and natural log-probs of each response's tokens at temperature 1."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]

    def write(self, path: Path) -> None:
        """Write the samples to `path`, with all sequences concatenated."""
        kinds: dict[str, Any] = {"prompts": np.int32, "responses": np.int32, "logprobs": np.float64}
        arrays: dict[str, Any] = {}
        for name, kind in kinds.items():
            parts = getattr(self, name)
            arrays[name] = np.array([value for part in parts for value in part], dtype=kind)
            arrays[f"{name}_lengths"] = np.array([len(part) for part in parts], dtype=np.int64)
        with files.replacing(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **arrays)

    @classmethod
    def read(cls, path: Path) -> Samples:
        """Read the samples that `write` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{name: _split(stored, name) for name in ("prompts", "responses", "logprobs")})


def _split(stored: Any, name: str) -> list[Any]:
    ends = np.cumsum(stored[f"{name}_lengths"])
    return [part.tolist() for part in np.split(stored[name], ends[:-1])]
