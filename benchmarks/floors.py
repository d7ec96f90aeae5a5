"""The floors of a training step: what an engine alone and a bare PyTorch loop need for the same tokens.

    python -m benchmarks.floors engine|trainer|model JOB.json OUT.json

`engine` generates with vLLM's `LLM`: the same prompts, the same sampling, and responses of the recorded lengths, so
that it makes as many tokens as the training did. `trainer` computes log-probs of the same sequences once, and updates
the policy once a mini-batch, with packed sequences and without verl; the entropies that verl computes beside log-probs
are left out. A job is the plain data of EngineJob or TrainerJob; its sequences are in a file of JSON lines (`Sample`),
which `benchmarks.recorder` writes in a real run. `model` writes a model with a known shape and random
weights, of which a run needs a folder.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.fit_points import shape

from flashrl_cli import files
from flashrl_cli.bench.job import Variant
from flashrl_cli.bench.request import config_of
from flashrl_cli.data.tiny import CHAT_TEMPLATE, make_tokenizer
from flashrl_cli.runs.checkpoints import hf_folder
from flashrl_cli.verl.overrides import ACTOR, MODEL, ROLLOUT
from flashrl_cli.weights import Weights, read_json

PEAKS = {"B200": 2.25e15, "H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 operations a second by GPU, from NVIDIA's data sheets."""
WARM_UP = (8, 16)
"""Requests and tokens of the engine's warm-up; CUDA graphs are captured before it."""
SHARD_BYTES = 4 << 30
LONG_S = 60.0
"""Seconds after which the engine does not generate once more."""
LINEAR = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""Linear layers of a decoder layer in Llama and Qwen, which LoRA's `all-linear` adapts."""


SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 576,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    "rope_theta": 1e5, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
"""The config.json of SmolLM2-135M, as far as it decides the shape."""


class Sample(NamedTuple):
    """Token ids of a prompt and of a response to it."""

    prompt: list[int]
    response: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.response


def read_samples(path: Path) -> list[Sample]:
    """Samples from JSON lines `{"prompt": […], "response": […]}`."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [Sample(row["prompt"], row["response"]) for row in rows]


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    files.write_text(path, "".join(json.dumps(one._asdict()) + "\n" for one in samples))


def drawn(lengths: Iterable[tuple[int, int]], vocabulary: int, n: int = 1) -> list[Sample]:
    """Random samples of these lengths (prompt, response); each `n` in a row share the prompt of the first."""
    draw = random.Random(0)
    samples: list[Sample] = []
    for number, (prompt, response) in enumerate(lengths):
        shared = number % n > 0
        first = samples[-1].prompt if shared else [draw.randrange(vocabulary) for _ in range(prompt)]
        samples.append(Sample(first, [draw.randrange(vocabulary) for _ in range(response)]))
    return samples


# The engine alone.


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """One engine's share of a step's rollout; `settings` are vLLM's arguments, `sampling` those of SamplingParams.

    `arguments` (on a GPU only) size the engine as the training's; a CPU's KV cache is sized by the environment.
    """

    model: str
    samples: str
    precision: str = "bf16"
    kv_cache: str = "auto"
    head32: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    on_gpu: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    lora_rank: int = 0
    repeats: int = 2


def engine(job: EngineJob) -> dict[str, Any]:
    """Seconds in which the engine generates the job's responses, least of the repeats, with an empty prefix cache."""
    from vllm import SamplingParams

    from flashrl_cli.worker import engine as vllm_engine

    samples = read_samples(Path(job.samples))
    layers = int(read_json(Path(job.model) / "config.json")["num_hidden_layers"])
    variant = Variant(precision=job.precision, kv_cache=job.kv_cache, head32=job.head32)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        adapter, lora = _adapter(job, Path(folder))
        llm = vllm_engine.start(
            job.model,
            generation_config="vllm",
            disable_log_stats=True,
            on_cpu={},
            on_gpu=job.on_gpu,
            **job.settings,
            **lora,
            **variant.arguments(layers),
        )
        # vLLM wraps adapted layers, so that an engine with LoRA reads its base by itself
        holds = None if adapter else vllm_engine.refit(llm, Weights(hf=Path(job.model)).plain())
        started = time.perf_counter() - begun

        def generate(some: Sequence[Sample], longest: int | None = None) -> float:
            asked = [
                SamplingParams(
                    **job.sampling,
                    max_tokens=max(1, min(len(one.response), longest or len(one.response))),
                    ignore_eos=True,
                    detokenize=False,
                )
                for one in some
            ]
            prompts = [{"prompt_token_ids": one.prompt} for one in some]
            llm.reset_prefix_cache()
            begun = time.perf_counter()
            outputs = llm.generate(prompts, asked, use_tqdm=False, lora_request=adapter)
            seconds = time.perf_counter() - begun
            made = sum(len(output.outputs[0].token_ids) for output in outputs)
            wanted = sum(one.max_tokens or 0 for one in asked)
            if made != wanted:
                raise RuntimeError(f"vLLM gave {made} tokens where {wanted} were asked for")
            return seconds

        requests, tokens = WARM_UP
        generate(samples[:requests], tokens)
        values: list[float] = []
        while len(values) < job.repeats and (not values or values[-1] < LONG_S):
            values.append(round(generate(samples), 3))
    cache = llm.llm_engine.vllm_config.cache_config
    response = sum(len(one.response) for one in samples)
    return {
        "seconds": min(values),
        "values": values,
        "requests": len(samples),
        "prompt_tokens": sum(len(one.prompt) for one in samples),
        "response_tokens": response,
        "tokens_s": round(response / min(values), 1),
        "kv_tokens": (cache.num_gpu_blocks or 0) * (cache.block_size or 0),
        "start_s": round(started, 1),
        "holds": holds,
    }


def _adapter(job: EngineJob, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A request for a random LoRA adapter, and vLLM's arguments for it; None and nothing without LoRA."""
    if not job.lora_rank:
        return None, {}
    from vllm.lora.request import LoRARequest

    write_adapter(Path(job.model), folder, job.lora_rank)
    widest = next(rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= job.lora_rank)
    return LoRARequest("floor", 1, str(folder)), {
        "load_format": "auto", "enable_lora": True, "max_loras": 1, "max_lora_rank": widest,
    }  # fmt: skip


def write_adapter(model: Path, folder: Path, rank: int) -> None:
    """Write a random LoRA adapter of all linear layers of a Llama or Qwen in PEFT's layout."""
    import torch
    from safetensors.torch import save_file

    config = read_json(model / "config.json")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, values, inner = heads * head, config["num_key_value_heads"] * head, config["intermediate_size"]
    sizes = {
        "q_proj": (hidden, queries), "k_proj": (hidden, values), "v_proj": (hidden, values),
        "o_proj": (queries, hidden), "gate_proj": (hidden, inner), "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }  # fmt: skip
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for part, names in LINEAR.items():
            for name in names:
                key = f"base_model.model.model.layers.{layer}.{part}.{name}"
                inputs, outputs = sizes[name]
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inputs, dtype=torch.bfloat16) * 0.01
                tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, rank, dtype=torch.bfloat16) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    files.write_json(folder / "adapter_config.json", {**settings, "target_modules": list(sizes)})


# A bare PyTorch loop.


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerJob:
    """The trainer's part of a step: log-probs of all samples, then `mini_batches` updates with an equal share each.

    A micro-batch holds up to `budget` tokens; where they do not fit, half as many are tried. `master` keeps weights and
    Adam's states in float32 beside a bf16 copy to compute with (on a CPU all is float32). On several devices weights
    are sharded by FSDP2.
    """

    model: str
    samples: str
    mini_batches: int
    budget: int = 32768
    devices: int = 1
    lr: float = 1e-6
    master: bool = True
    lora_rank: int = 0
    repeats: int = 3


def trainer(job: TrainerJob) -> dict[str, Any]:
    """Seconds of the log-probs and of the whole update, least of the repeats, with memory and operations a second."""
    import torch

    if job.devices == 1:
        return _rank(0, job, None)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        torch.multiprocessing.spawn(_rank, (job, out), nprocs=job.devices)
        return read_json(out)


def _rank(rank: int, job: TrainerJob, out: Path | None) -> dict[str, Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    if job.devices > 1:
        store = "tcp://127.0.0.1:29613"
        backend = "nccl" if device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=store, rank=rank, world_size=job.devices)
    loop, budget = Loop(job, device, rank), job.budget
    while True:
        try:
            result = loop.measured(budget)
            break
        except torch.OutOfMemoryError:
            budget //= 2
            if budget < 1024 or job.devices > 1:
                raise
        loop.forget()
    if out and rank == 0:
        files.write_json(out, result)
    return result


class Loop:
    """The policy with its optimizer, on one rank."""

    def __init__(self, job: TrainerJob, device: str, rank: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from flashrl_cli.plugins import attention

        self.job, self.device, self.rank = job, device, rank
        self.compute = torch.bfloat16 if device == "cuda" else torch.float32
        sharded = job.devices > 1
        held = torch.float32 if sharded and job.master else self.compute
        attention.register()
        chosen = attention.VARLEN if device == "cuda" else "sdpa"
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=held, attn_implementation=chosen)
        self.operations = operations(model.config)
        if job.lora_rank:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=job.lora_rank, target_modules="all-linear"))
            model.to(held)
        if sharded:
            _shard(model, self.compute)  # moves a layer at a time
        self.model = model.to(device).train()
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        copied = job.master and not sharded and self.compute != torch.float32
        self.masters = [weight.detach().float() for weight in self.weights] if copied else None
        self.optimizer = torch.optim.AdamW(self.masters or self.weights, lr=job.lr, fused=device == "cuda")

    def measured(self, budget: int) -> dict[str, Any]:
        """Seconds of each part with micro-batches of up to `budget` tokens."""
        job = self.job
        samples = read_samples(Path(job.samples))
        batches = [list(self.micro_batches(part, budget)) for part in split(samples, job.mini_batches)]
        micro = [one for batch in batches for one in batch]
        self.warm_up(micro[0])
        old: list[Any] = []

        def infer() -> None:
            import torch

            with torch.no_grad():
                old[:] = [self.log_probs(one) for one in micro]

        def update() -> None:
            before = iter(old)
            for batch in batches:
                for one in batch:
                    self.loss(one, next(before), sum(other.responses for other in batch)).backward()
                    self.accumulate()
                self.step()

        lengths = [len(one.tokens) for one in samples]
        parts = {"log-probs": self.timed(infer), "actor": self.timed(update)}
        peak = PEAKS.get(gpu()) if self.device == "cuda" else None
        for found in parts.values():
            found["tokens_s"] = round(sum(lengths) / found["seconds"], 1)
        return {
            **parts,
            "operations": self.operations(lengths),
            "peak": peak,
            "sequences": len(samples),
            "tokens": sum(lengths),
            "budget": budget,
            "micro_batches": len(micro),
            "attention": self.model.config._attn_implementation,
        }

    def warm_up(self, batch: Packed) -> None:
        """Compute one micro-batch, the fullest, and forget it: it shows early whether it fits."""
        import torch

        with torch.no_grad():
            old = self.log_probs(batch)
        self.loss(batch, old, batch.responses).backward()
        self.forget()

    def timed(self, work: Callable[[], None]) -> dict[str, Any]:
        import torch

        cuda = self.device == "cuda"
        values, processor = [], []
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(self.job.repeats):
            self.wait()
            begun, spent = time.perf_counter(), time.process_time()
            work()
            self.wait()
            values.append(round(time.perf_counter() - begun, 3))
            processor.append(round(time.process_time() - spent, 3))
        peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None
        return {"seconds": min(values), "values": values, "cpu_s": min(processor), "peak_gib": peak}

    def wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        if self.job.devices > 1:
            torch.distributed.barrier()

    def micro_batches(self, samples: Sequence[Sample], budget: int) -> Iterator[Packed]:
        """This rank's share of a mini-batch; every rank gets as many micro-batches, as FSDP needs it."""
        packs = packed if self.device == "cuda" else padded
        order = sorted(samples, key=lambda one: len(one.tokens), reverse=True)
        shares = [list(packs(order[rank :: self.job.devices], budget)) for rank in range(self.job.devices)]
        most = max(map(len, shares))
        for number in range(most):
            share = shares[self.rank]
            chosen = share[number] if number < len(share) else [Sample([0], [0])]
            yield (Packed.together if self.device == "cuda" else Packed.rows)(chosen, self.device)

    def log_probs(self, batch: Packed) -> Any:
        from flashrl_cli.plugins.log_probs import log_probs

        logits = self.model(input_ids=batch.ids, use_cache=False, **batch.arguments).logits
        return log_probs(logits, batch.labels).flatten()

    def loss(self, batch: Packed, old: Any, responses: int) -> Any:
        """The policy-gradient loss with random advantages, a share of the mini-batch's mean over response tokens."""
        import torch

        ratio = torch.exp(self.log_probs(batch) - old)
        return -(ratio * batch.advantages.flatten()).sum() / responses

    def accumulate(self) -> None:
        """Add the micro-batch's gradients to those of the float32 weights."""
        if self.masters is None:
            return
        for master, weight in zip(self.masters, self.weights, strict=True):
            if weight.grad is not None:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None

    def forget(self) -> None:
        """Free the gradients of a pass that did not fit."""
        import torch

        for weight in (*self.weights, *(self.masters or ())):
            weight.grad = None
        torch.cuda.empty_cache()

    def step(self) -> None:
        import torch

        torch.nn.utils.clip_grad_norm_(self.masters or self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A micro-batch: ids and labels [rows, tokens], labels one ahead, and advantages, which are 0 beside responses."""

    ids: Any
    labels: Any
    advantages: Any
    responses: int
    arguments: dict[str, Any]

    @classmethod
    def together(cls, samples: Sequence[Sample], device: str) -> Packed:
        """One row without padding, whose positions restart with each sequence."""
        import torch

        ids = torch.tensor([[token for one in samples for token in one.tokens]], device=device)
        positions = torch.cat([torch.arange(len(one.tokens)) for one in samples])[None].to(device)
        advantages = torch.cat([_advantages(one) for one in samples])[None].to(device)
        return cls(ids=ids, labels=ids.roll(-1, 1), advantages=advantages, responses=_responses(samples),
                   arguments={"position_ids": positions})  # fmt: skip

    @classmethod
    def rows(cls, samples: Sequence[Sample], device: str) -> Packed:
        """Rows padded on the right, which causal attention does not look at from the left."""
        import torch

        rows = [torch.tensor(one.tokens) for one in samples]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        advantages = torch.nn.utils.rnn.pad_sequence([_advantages(one) for one in samples], batch_first=True)
        return cls(ids=ids, labels=ids.roll(-1, 1), advantages=advantages.to(device), responses=_responses(samples),
                   arguments={})  # fmt: skip


def _advantages(sample: Sample) -> Any:
    """+1 or -1 where the next token belongs to the response, by the response's length."""
    import torch

    found = torch.zeros(len(sample.tokens))
    found[len(sample.prompt) - 1 : -1] = 1.0 if len(sample.response) % 2 else -1.0
    return found


def _responses(samples: Sequence[Sample]) -> int:
    return sum(len(one.response) for one in samples)


def split(samples: Sequence[Sample], parts: int) -> list[Sequence[Sample]]:
    """Equal shares in order; the last ones are one shorter where the number does not divide."""
    share, more = divmod(len(samples), parts)
    starts = [number * share + min(number, more) for number in range(parts + 1)]
    return [samples[start:end] for start, end in itertools.pairwise(starts)]


def packed(samples: Sequence[Sample], budget: int) -> Iterator[list[Sample]]:
    """Samples in order, together as long as their tokens are within `budget`; a longer one is alone."""
    yield from _groups(samples, budget, lambda group: sum(len(one.tokens) for one in group))


def padded(samples: Sequence[Sample], budget: int) -> Iterator[list[Sample]]:
    """The same for rows padded to the longest of a group."""
    yield from _groups(samples, budget, lambda group: len(group) * max(len(one.tokens) for one in group))


def _groups(samples: Sequence[Sample], budget: int, size: Callable[[Sequence[Sample]], int]) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    for one in samples:
        if group and size([*group, one]) > budget:
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def operations(config: Any) -> Callable[[Sequence[int]], float]:
    """Floating-point operations of a forward pass over sequences of given lengths.

    Two for each weight of a linear layer and token, and four for each pair of tokens that attention looks at (half of
    them, as it is causal), head and its size, as in PaLM's appendix B (arXiv 2204.02311); a backward pass takes twice
    as many.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    attention = hidden * head * (2 * heads + 2 * config.num_key_value_heads)
    weights = config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size)
    weights += config.vocab_size * hidden

    def of(lengths: Sequence[int]) -> float:
        pairs = sum(length * length for length in lengths) / 2
        return float(2 * weights * sum(lengths) + 4 * pairs * heads * head * config.num_hidden_layers)

    return of


def gpu() -> str:
    """The key of PEAKS for this GPU; its whole name if it is not listed."""
    import torch

    name: str = torch.cuda.get_device_name()
    return next((key for key in PEAKS if key in name), name)


def _shard(model: Any, compute: Any) -> None:
    """FSDP2 in verl's units: each layer, and the rest."""
    import torch
    from torch.distributed import fsdp

    policy = fsdp.MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    layers = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
    for unit in (*layers, model):
        fsdp.fully_shard(unit, mp_policy=policy)


# Models with random weights.


def write_model(size: str, folder: Path) -> dict[str, Any]:
    """Write an HF folder with a shape (`smollm2`, `7b`, `32b/4` for the first four layers) and random bf16 weights.

    Its tokenizer reads bytes and has a token for every row of the embedding. Returns the number of parameters.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    config = dict(SMOLLM2) if size == "smollm2" else config_of(shape(size))
    config |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    _widen(tokenizer, config["vocab_size"]).save_pretrained(folder)
    files.write_json(folder / "config.json", config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shards: list[dict[str, Any]] = [{}]
    weights: dict[str, str] = {}
    total = 0
    for name, weight in model.named_parameters():  # tied weights once
        value = torch.ones if "norm" in name else torch.randn
        made = value(weight.shape, dtype=torch.bfloat16, device=device)
        if sum(one.nbytes for one in shards[-1].values()) + made.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = (made if "norm" in name else made.mul_(0.02)).cpu()
        weights[name] = f"model-{len(shards):05d}.safetensors"
        total += made.nbytes
        if len(shards) > 1 and shards[-2]:
            save_file(shards[-2], folder / f"model-{len(shards) - 1:05d}.safetensors", {"format": "pt"})
            shards[-2] = {}
    save_file(shards[-1], folder / f"model-{len(shards):05d}.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    files.write_json(folder / "model.safetensors.index.json", index)
    return {"parameters": total // 2, "folder": str(folder)}


def _widen(tokenizer: Any, rows: int) -> Any:
    """The tokenizer with further tokens that no text has, `rows` in all."""
    from transformers import PreTrainedTokenizerFast

    data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    vocabulary |= {f"<{number}>": number for number in range(len(vocabulary), rows)}
    wide = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(data)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )
    wide.chat_template = CHAT_TEMPLATE
    return wide


# A run's jobs.


def model_of(plan: Mapping[str, Any]) -> str:
    """The folder of a run's model, by its plan (plan.json). Raises InputError if it is on this machine in part only."""
    given = next(text for text in plan["overrides"] if text.startswith(f"{MODEL}.path="))
    return str(hf_folder(given.partition("=")[2].strip("'")).hf)


def engine_job(plan: Mapping[str, Any], samples: Path) -> EngineJob:
    """The job of one engine of a run, which gets `samples` (see `share`), by the run's plan."""
    spec = plan["spec"]
    rollout = spec["rollout"]
    settings = {name: rollout[name] for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len")} | {
        "tensor_parallel_size": rollout["tensor_parallel"],
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
    }
    # importance sampling needs the log-probs of sampled tokens
    logged = {"logprobs": 0} if f"{ROLLOUT}.calculate_log_probs=True" in plan["overrides"] else {}
    return EngineJob(
        model=model_of(plan),
        samples=str(samples),
        precision=rollout["precision"],
        kv_cache=rollout["kv_cache"],
        head32=rollout["lm_head_fp32"],
        settings=settings,
        on_gpu={name: rollout[name] for name in ("gpu_memory_utilization", "enforce_eager")},
        sampling={name: rollout[name] for name in ("temperature", "top_p", "top_k")} | logged,
        lora_rank=0 if _verl(spec, f"{MODEL}.lora.merge") else lora_rank(spec),
    )


def trainer_job(plan: Mapping[str, Any], samples: Path) -> TrainerJob:
    """The job of the trainer of a run, by the run's plan."""
    spec = plan["spec"]
    return TrainerJob(
        model=model_of(plan),
        samples=str(samples),
        mini_batches=spec["data"]["train_batch_size"] // spec["algorithm"]["mini_batch_size"],
        devices=1 if spec["resources"]["platform"] == "cpu" else devices(spec),
        lr=spec["algorithm"]["lr"],
        master=_verl(spec, f"{ACTOR}.fsdp_config.model_dtype") not in {"bf16", "bfloat16"},
        lora_rank=lora_rank(spec),
    )


def share(samples: Sequence[Sample], spec: Mapping[str, Any]) -> Sequence[Sample]:
    """What one of a run's engines generates: the first equal part."""
    replicas = max(1, devices(spec) // spec["rollout"]["tensor_parallel"])
    return split(samples, replicas)[0]


def devices(spec: Mapping[str, Any]) -> int:
    return int(spec["resources"]["nodes"] * spec["resources"]["gpus_per_node"])


def lora_rank(spec: Mapping[str, Any]) -> int:
    return int(_verl(spec, f"{MODEL}.lora_rank") or 0)


def _verl(spec: Mapping[str, Any], key: str) -> Any:
    """The value that a spec gives to a key of verl; None if it gives none."""
    return spec["verl"].get(key, spec["verl"].get(f"+{key}"))


def main(kind: str, job: str, out: str) -> None:
    begun = time.perf_counter()
    data = read_json(Path(job))
    if kind == "model":
        result = write_model(data["shape"], Path(data["folder"]))
    else:
        result = engine(EngineJob(**data)) if kind == "engine" else trainer(TrainerJob(**data))
    files.write_json(Path(out), {**result, "whole_s": round(time.perf_counter() - begun, 1), "job": data})


if __name__ == "__main__":
    main(*sys.argv[1:])
