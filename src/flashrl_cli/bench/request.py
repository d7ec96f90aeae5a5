"""What a person asks to have measured, looked up and complete: after it, nothing is guessed and no engine was started yet."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract, paths
from flashrl_cli.bench import machine, model, variants
from flashrl_cli.bench.job import EngineOptions
from flashrl_cli.data.rows import Scoring
from flashrl_cli.errors import InputError
from flashrl_cli.evals import devices, questions
from flashrl_cli.evals.job import EngineSettings
from flashrl_cli.fit.shape import of_config
from flashrl_cli.verl.demands.rollout import BLOCK, single, unfilled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrl_cli.bench.machine import Machine
    from flashrl_cli.bench.model import Model
    from flashrl_cli.bench.variants import Variant
    from flashrl_cli.evals.questions import Question
    from flashrl_cli.fit.shape import ModelShape

FOLDER = ".bench"
"""Folder of kept points in the runs folder; no run's name begins with a dot."""
FIT, FIT_WORD = 0, "fit"
"""As a batch: as many sequences as an engine's KV cache holds."""
FITTING = 256
"""Most of them; vLLM's own limit is 256 or 1,024, by GPU."""
_SPARE = 16
"""Tokens of room beside prompt and response."""
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Sizes where nothing is asked for: large enough to fill the machine, small enough to wait for."""

    batches: tuple[int, ...]
    prompt: int
    response: int
    samples: int


DEFAULTS = {
    "cuda": Defaults(batches=(64, 256), prompt=512, response=512, samples=256),
    "cpu": Defaults(batches=(4, 16), prompt=64, response=32, samples=64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """What rollout and trainer are compared on: `samples` responses to `questions` in turn; the trainer computes in `dtype`."""

    questions: tuple[Question, ...]
    samples: int
    dtype: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Options of the command as they were given; None is the default of the machine."""

    model: str
    rollout: str
    batch: str | None = None
    prompt: int | None = None
    response: int | None = None
    repeats: int = 3
    refit: bool = False
    mismatch: bool = False
    data: str | None = None
    samples: int | None = None
    trainer_dtype: str = "bfloat16"
    profile: Path | None = None
    tensor_parallel: int = 1
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    enforce_eager: bool = False
    kv_memory: float | None = None
    budget: float | None = None
    folder: Path | None = None
    fresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is complete: `options` as asked, `engine` the same with the share of memory that is free, `defaults` what was not asked.

    `longest` is what sequences of the mismatch may have: the limit that was given, else the model's; None for no limit.
    """

    model: Model
    variants: tuple[Variant, ...]
    batches: tuple[int, ...]
    prompt: int
    response: int
    repeats: int
    refit: bool
    mismatch: Mismatch | None
    options: EngineOptions
    engine: EngineOptions
    longest: int | None
    devices: str | None
    machine: Machine
    versions: dict[str, str]
    defaults: tuple[str, ...]
    budget: float | None
    folder: Path
    fresh: bool

    def log(self, name: str) -> Path:
        """All output of the engine of a variant, or of the scorer."""
        return self.folder / f"{name}.log"

    def settings(self) -> dict[str, Any]:
        """How it was asked, as plain data."""
        found = {name: getattr(self, name) for name in ("prompt", "response", "repeats", "budget")}
        mismatch = {"samples": self.mismatch.samples, "trainer_dtype": self.mismatch.dtype} if self.mismatch else None
        return {
            "batches": list(self.batches),
            **found,
            "refit": self.refit,
            "mismatch": mismatch,
            "engine": asdict(self.engine),
            "defaults": list(self.defaults),
        }


def plan(asked: Asked) -> Request:
    """Look up everything; raises InputError for what cannot be measured, EnvironmentNotReady where there is nothing to measure on."""
    chosen = variants.parse(asked.rollout, asked.profile)
    batches = _batches(asked.batch)
    _check_mismatch(asked)
    found = model.find(asked.model)
    where = machine.here()
    usual = DEFAULTS[where.kind]
    prompt, response = asked.prompt or usual.prompt, asked.response or usual.response
    batches = batches or usual.batches
    largest = max(*batches, FITTING) if FIT in batches else max(batches)
    options = _options(asked, found, largest, prompt + response + _SPARE)
    options = replace(options, enforce_eager=options.enforce_eager or where.kind == "cpu")
    _check_kinds(chosen, where, found, options.tensor_parallel)
    wanted = EngineSettings(
        gpu_memory_utilization=options.gpu_memory_utilization, tensor_parallel=options.tensor_parallel
    )
    settings, visible = devices.choose(wanted) if where.kind == "cuda" else (wanted, None)
    return Request(
        model=found,
        variants=chosen,
        batches=batches,
        prompt=prompt,
        response=response,
        repeats=asked.repeats,
        refit=asked.refit,
        mismatch=_mismatch(asked, usual) if asked.mismatch else None,
        options=options,
        engine=replace(options, gpu_memory_utilization=settings.gpu_memory_utilization),
        longest=asked.max_model_len or found.positions,
        devices=visible,
        machine=where,
        versions=machine.versions(),
        defaults=tuple(_defaults(asked, usual)),
        budget=asked.budget,
        folder=paths.absolute(asked.folder) if asked.folder else paths.runs_root() / FOLDER,
        fresh=asked.fresh,
    )


def _batches(text: str | None) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")] if text is not None else []
    if any(word != FIT_WORD and (not word.isdecimal() or not int(word)) for word in words):
        raise InputError(f"--batch {text}: numbers of sequences, each at least 1, or fit", hint="--batch 64,256,fit")
    return tuple(dict.fromkeys(FIT if word == FIT_WORD else int(word) for word in words))


def _check_mismatch(asked: Asked) -> None:
    if asked.trainer_dtype not in DTYPES:
        raise InputError(f"--trainer-dtype {asked.trainer_dtype}: there are {' and '.join(DTYPES)}")
    if not asked.mismatch:
        given = [name for name, value in (("--data", asked.data), ("--samples", asked.samples)) if value is not None]
        if given:
            raise InputError(f"{given[0]} is for --mismatch", hint="add --mismatch, or leave it out")
        return
    if asked.model.startswith(model.SHAPE):
        what = f"--mismatch with --model {asked.model}: random weights hide what quantization does"
        raise InputError(what, hint="name a model that was trained: a folder, an id on the hub, prepared:tiny")
    if asked.data is None:
        raise InputError("--mismatch needs prompts to sample from", hint="--data gsm8k, or --data FILE.parquet")


def _check_kinds(chosen: Sequence[Variant], where: Machine, found: Model, tensor_parallel: int) -> None:
    """Raise InputError for kinds of rollouts that training refuses for such a model (verl.demands.rollout)."""
    try:
        shape = of_config(found.config)
    except ValueError:  # of another kind of model only vLLM knows
        return
    for variant in chosen:
        _check_kind(variant, found.name, shape)
    if any(variant.precision == contract.BLOCKS and not where.lacks(variant) for variant in chosen):
        _check_blocks(shape, found.name, tensor_parallel)


def _check_kind(variant: Variant, name: str, shape: ModelShape) -> None:
    """Raise InputError for experts that would stay in bf16, and for an FP8 cache without a bound."""
    if variant.precision in contract.METHODS and shape.experts:
        what = f"--rollout {variant.name}: the {shape.experts} experts of {name} would stay in bf16"
        raise InputError(what, hint=f"--rollout bf16,{contract.BLOCKS}")
    if variant.kv8 and shape.architecture not in contract.CACHE_FAMILIES:
        known = ", ".join(contract.CACHE_FAMILIES)
        what = f"--rollout {variant.name}: an FP8 KV cache has no scales for a {shape.architecture} model, only for {known}"
        raise InputError(what, hint=f"--rollout {replace(variant, kv8=False).name}")


def _check_blocks(shape: ModelShape, name: str, tensor_parallel: int) -> None:
    """Raise InputError for FP8 in blocks of a model whose layers, or parts of them on a GPU, are no whole blocks or a single one."""
    if broken := unfilled(shape, tensor_parallel):
        part = f"a GPU's part of {', '.join(broken)} of {name} at --tp {tensor_parallel}"
        raise InputError(
            f"blocks of {BLOCK} ({contract.BLOCKS}) do not fill {part}", hint="--rollout fp8, or another --tp"
        )
    if narrow := single(shape):
        what = f"layers of {name} whose input is one block of {BLOCK}: {', '.join(narrow)}"
        raise InputError(f"verl cannot load {contract.BLOCKS} into {what}", hint="--rollout fp8")


def _mismatch(asked: Asked, usual: Defaults) -> Mismatch:
    sets = questions.choose(asked.data, (), None, scoring=Scoring.NONE)
    found = tuple(question for one in sets for question in one.questions)
    digest = hashlib.sha256("".join(question.line() for question in found).encode()).hexdigest()
    return Mismatch(
        questions=found, samples=asked.samples or usual.samples, dtype=asked.trainer_dtype, fingerprint=digest
    )


def _options(asked: Asked, found: Model, batch: int, length: int) -> EngineOptions:
    """Options of the engine. Raises InputError for sequences that are longer than the model or the limit that was given."""
    limit = asked.max_model_len or length
    if limit < length:
        raise InputError(
            f"--max-model-len {limit}: prompt and response need {length} tokens, {_SPARE} of them spare",
            hint="a smaller --prompt or --response",
        )
    if found.positions and limit > found.positions:
        raise InputError(
            f"{limit} tokens are longer than {found.name} can take, {found.positions}",
            hint="a smaller --prompt or --response",
        )
    return EngineOptions(
        tensor_parallel=asked.tensor_parallel,
        max_num_seqs=asked.max_num_seqs or batch,
        max_model_len=limit,
        gpu_memory_utilization=asked.gpu_memory_utilization,
        enforce_eager=asked.enforce_eager,
        kv_memory=asked.kv_memory,
    )


def _defaults(asked: Asked, usual: Defaults) -> list[str]:
    """Options that were left to their default, with its value."""
    sizes = {"--prompt": (asked.prompt, usual.prompt), "--response": (asked.response, usual.response)}
    if asked.mismatch:
        sizes["--samples"] = (asked.samples, usual.samples)
    taken = [f"{name} {value}" for name, (given, value) in sizes.items() if given is None]
    return taken if asked.batch else [f"--batch {','.join(map(str, usual.batches))}", *taken]
