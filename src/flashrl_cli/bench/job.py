"""What the command line asks of the processes that measure, as files and lines of JSON.

An engine process gets an EngineJob, a scorer a ScorerJob; orders are JSON objects with a key `kind`, one a line (`order`). Events are
`advance` (note), and one that ends the order: `done` (result) or `error` (kind, message, hint), with which the process ends.

Kinds of rollouts that are compared: a precision, and what an engine does beside it.

What there is to measure, one point after another, and the key under which a point's result is kept.

Sampled responses with the log-probs that the rollout gave them, kept in a file until the trainer's are known.

What is known of each kind of rollout, as it grows.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from flashrl_cli import contract, files, paths
from flashrl_cli.contract import RolloutOptions
from flashrl_cli.errors import InputError
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrl_cli.bench.request import Request

PRECISIONS = ("bf16", "int8", "fp8", contract.BLOCKS)
SUFFIXES = ("kv8", "head32", "smooth")
QUANTIZATION = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
"""What verl tells vLLM for FP8 in blocks, beside the routers of experts (verl/workers/rollout/vllm_rollout/vllm_async_server.py:1245)."""
_FLOAT32 = ("float32", "fp32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """`kv8`: an FP8 KV cache; `head32`: logits in float32; `profile`: the smoothing profile that is applied at each refit."""

    precision: str
    kv8: bool = False
    head32: bool = False
    profile: Path | None = None

    @property
    def name(self) -> str:
        """As a person writes it: `int8+kv8`."""
        chosen = zip(SUFFIXES, (self.kv8, self.head32, self.profile is not None), strict=True)
        return "+".join([self.precision, *(suffix for suffix, on in chosen if on)])

    def arguments(self, layers: int) -> dict[str, Any]:
        """What vLLM's engine is told of it for a model with so many layers."""
        if self.precision == contract.BLOCKS:
            quantization = {**QUANTIZATION, "ignored_layers": [f"model.layers.{n}.mlp.gate" for n in range(layers)]}
            return {
                "worker_extension_cls": contract.BLOCKS_EXTENSION,
                "hf_overrides": {"quantization_config": quantization},
            }
        cache = {"kv_cache_dtype": "fp8"} if self.kv8 else {}
        method = contract.METHODS.get(self.precision)
        return {"worker_extension_cls": contract.BENCH_EXTENSION, "quantization": method, **cache}

    def options(self) -> RolloutOptions:
        """What the plugins inside the engine are told."""
        return RolloutOptions(profile=str(self.profile) if self.profile else None, lm_head_fp32=self.head32)

    def key(self) -> dict[str, Any]:
        """What tells it from every other variant, a profile by its content."""
        profile = files.sha256(self.profile) if self.profile else None
        return {**asdict(self), "profile": profile}

    def contradiction(self, holds: dict[str, Any]) -> str | None:
        """Where what an engine holds (a contract.Handshake) is something else; None if it is this variant."""
        if holds["precision"] != self.precision:
            layers = f"{holds['quantized_layers']} of {holds['linear_layers']} linear layers are quantized"
            told = f"{holds['precision']} ({layers}, kernel {holds['kernel']})"
            return f"{self.name} was asked for, but the engine holds {told}"
        checks = (
            (self.kv8, holds["kv_cache"].startswith("fp8"), f"its KV cache is {holds['kv_cache']}"),
            (self.head32, holds["lm_head"] in _FLOAT32, f"its logits are computed in {holds['lm_head']}"),
            (self.profile is not None, holds["smoothed"] > 0, f"{holds['smoothed']} of its tensors are smoothed"),
        )
        wrong = [text for wanted, held, text in checks if wanted != held]
        return f"{self.name} was asked for, but of the engine {' and '.join(wrong)}" if wrong else None


def parse(text: str, profile: Path | None) -> tuple[Variant, ...]:
    """Variants of `bf16,int8+kv8`, each once. Raises InputError for an unknown word or a profile that is missing or useless."""
    found = tuple(dict.fromkeys(_variant(word.strip(), profile) for word in text.split(",")))
    if profile and not any(variant.profile for variant in found):
        raise InputError(f"--profile {profile}: no variant uses it", hint="--rollout int8,int8+smooth")
    return found


def _variant(word: str, profile: Path | None) -> Variant:
    precision, *suffixes = word.split("+")
    _known(precision, PRECISIONS, f"--rollout {word}: no precision {precision!r}")
    for suffix in suffixes:
        _known(suffix, SUFFIXES, f"--rollout {word}: no suffix {suffix!r}")
    if precision == contract.BLOCKS and "kv8" in suffixes:
        what = f"--rollout {word}: an FP8 KV cache takes flashrl's own weight update, and {contract.BLOCKS} has verl's"
        raise InputError(what, hint="--rollout fp8+kv8")
    if "smooth" not in suffixes:
        return Variant(precision=precision, kv8="kv8" in suffixes, head32="head32" in suffixes)
    if precision not in contract.METHODS:
        raise InputError(f"--rollout {word}: smoothing is for int8 and fp8", hint="--rollout int8+smooth")
    file = _profile(word, profile)
    return Variant(precision=precision, kv8="kv8" in suffixes, head32="head32" in suffixes, profile=file)


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


REFITS = 5
START, SPEED, REFIT, SAMPLE, SCORE = "start", "speed", "refit", "sample", "score"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement: `asked` are the words of the order for it, `key` names everything that its result depends on."""

    variant: str
    kind: str
    asked: dict[str, Any] = field(hash=False)
    key: str

    @property
    def label(self) -> str:
        """For people."""
        if self.kind != SPEED:
            return f"{self.variant}, {self.kind}"
        batch = self.asked["batch"]
        return f"{self.variant}, {counted(batch, 'sequence') if batch else 'as many as fit'}"

    @property
    def like(self) -> tuple[str, int]:
        """The same for points of other variants that take about as long."""
        return self.kind, self.asked.get("batch", 0)


def points(request: Request, variant: Variant) -> Iterator[Point]:
    """Points of a variant in their order: the refits come last, after them the engine holds random weights."""
    yield _point(request, variant, START, {})
    for batch in request.batches:
        sizes = {"batch": batch, "prompt": request.prompt, "response": request.response, "repeats": request.repeats}
        yield _point(request, variant, SPEED, sizes)
    if request.mismatch:
        asked = {"samples": request.mismatch.samples, "response": request.response}
        yield _point(request, variant, SAMPLE, asked, request.mismatch.fingerprint)
        yield _point(request, variant, SCORE, {}, [asked, request.mismatch.fingerprint, request.mismatch.dtype])
    if request.refit:
        yield _point(request, variant, REFIT, {"repeats": REFITS})


def count(request: Request) -> int:
    """Points of all variants."""
    return sum(1 for variant in request.variants for _ in points(request, variant))


def _point(request: Request, variant: Variant, kind: str, asked: dict[str, Any], more: Any = None) -> Point:
    depends = {
        "model": request.model.fingerprint,
        "variant": variant.key(),
        "kind": kind,
        "asked": asked,
        "more": more,
        "options": asdict(request.options),
        "versions": request.versions,
        "device": request.machine.device,
    }
    text = json.dumps(depends, sort_keys=True)
    return Point(variant=variant.name, kind=kind, asked=asked, key=hashlib.sha256(text.encode()).hexdigest()[:24])


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Token ids of prompts and responses, and natural log-probs of each response's tokens at temperature 1."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]

    def write(self, path: Path) -> None:
        """Write to `path`, all sequences end to end."""
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
        """Read what `write` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{name: _split(stored, name) for name in ("prompts", "responses", "logprobs")})


def _split(stored: Any, name: str) -> list[Any]:
    ends = np.cumsum(stored[f"{name}_lengths"])
    return [part.tolist() for part in np.split(stored[name], ends[:-1])]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a variant, or the rest of it, has no figures. `left_out` says that the budget had no room, which is no failure."""

    message: str
    hint: str | None = None
    left_out: bool = False


@dataclass(slots=True)
class Measured:
    """What is known of a variant: results by point, and what went wrong."""

    variant: Variant
    points: tuple[Point, ...]
    results: dict[Point, dict[str, Any]] = field(default_factory=dict)
    failure: Failure | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[Point]:
        """Points without a result."""
        return [point for point in self.points if point not in self.results]

    def of(self, kind: str) -> list[tuple[Point, dict[str, Any]]]:
        """Points of a kind that have a result."""
        return [(point, result) for point, result in self.results.items() if point.kind == kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How engines run: `kv_memory` in GiB (None: what is left of the memory), lengths in tokens, `tensor_parallel` in GPUs."""

    tensor_parallel: int
    max_num_seqs: int
    max_model_len: int
    gpu_memory_utilization: float | None
    enforce_eager: bool
    kv_memory: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """One engine: `arguments` are vLLM's for the variant, `weights` (a Weights as plain data) None where random ones are wanted.

    `questions` is a file of chat prompts, one a line, that get up to `response` tokens each later; for them the engine takes longer
    sequences than its options say, up to `longest`.
    """

    model: str
    weights: dict[str, Any] | None
    arguments: dict[str, Any]
    options: EngineOptions
    questions: str | None
    response: int
    longest: int | None

    def write(self, path: Path) -> None:
        """Write the job to `path`."""
        files.write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**data, "options": EngineOptions(**data["options"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerJob:
    """A model that judges tokens which others sampled: an HF folder, computed in `dtype` (bfloat16 or float32)."""

    model: str
    dtype: str

    def write(self, path: Path) -> None:
        """Write the job to `path`."""
        files.write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def order(kind: str, **asked: Any) -> str:
    """An order as one line of JSON."""
    return json.dumps({"kind": kind, **asked})
