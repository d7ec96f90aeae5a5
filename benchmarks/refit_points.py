"""Run one point of refit_gpu.py in a separate process: refits of an engine, or its tokens per second.

The engine has dummy weights.

PYTHONPATH=.:src:SITE python benchmarks/refit_points.py POINT OUT
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.fit_points import arguments, register, shape

from flashrl_cli import files
from flashrl_cli.bench.request import config_of

if TYPE_CHECKING:
    import torch

    from flashrl_cli.weights.shape import ModelShape

BUCKET = 2 << 30
"""Bytes of a bucket, verl's default (rollout.checkpoint_engine.update_weights_bucket_megabytes)."""
REPEATS = 7
PROMPT = 512
Sizes = tuple[str, tuple[int, ...]]


def names(found: ModelShape) -> Iterator[Sizes]:
    """The weights of a Qwen2 in the order of its state dict: name and size."""
    hidden, inter = found.hidden, found.intermediate
    yield "model.embed_tokens.weight", (found.vocab, hidden)
    for layer in range(found.layers):
        prefix = f"model.layers.{layer}"
        for name, size in (("q", found.query_size), ("k", found.kv_size), ("v", found.kv_size)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (size, hidden)
            yield f"{prefix}.self_attn.{name}_proj.bias", (size,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, found.query_size)
        for name in ("gate", "up"):
            yield f"{prefix}.mlp.{name}_proj.weight", (inter, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inter)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not found.tied:
        yield "lm_head.weight", (found.vocab, hidden)


def packed(sizes: Iterator[Sizes], room: int) -> Iterator[list[tuple[str, tuple[int, ...], int, int]]]:
    """Buckets of (name, size, first element, elements) that fit into `room` elements.

    They are filled in the same way as by verl's sender.
    """
    bucket: list[tuple[str, tuple[int, ...], int, int]] = []
    offset = 0
    for name, size in sizes:
        count = size[0] * (size[1] if len(size) > 1 else 1)
        if bucket and offset + count > room:
            yield bucket
            bucket, offset = [], 0
        bucket.append((name, size, offset, count))
        offset += count
    yield bucket


def _bits(weight: torch.Tensor) -> torch.Tensor:
    """The bytes of a weight, row by row; kernels hold theirs transposed."""
    import torch

    rows = weight.data if weight.is_contiguous() else weight.data.t()
    return rows.view(torch.uint8)


class RefitBench:
    """vLLM worker extension: refits from one buffer on the GPU that is filled anew for every bucket, as verl's is."""

    model_runner: Any
    device: Any
    arrival: Any = None

    def bench_prepare(self, size: str, dtype: str) -> int:
        """Make the buffer and the plan of its buckets; returns their number."""
        import torch

        kind: torch.dtype = getattr(torch, dtype)
        # verl sends a tensor that does not fit into a bucket separately, through other memory
        room = max(BUCKET // kind.itemsize, shape(size).vocab * shape(size).hidden)
        self.buffer = torch.empty(room, dtype=kind, device=self.device)
        self._fill(0)
        self.buckets = list(packed(names(shape(size)), room))
        return len(self.buckets)

    def _fill(self, seed: int) -> None:
        """New weights, in rows of very different size, so that a wrong scale would show."""
        import torch

        generator = torch.Generator(device=self.device).manual_seed(seed)
        for part in self.buffer.split(1 << 27):
            rows = part.view(-1, 1024)
            scale = torch.rand(rows.shape[0], 1, device=self.device, generator=generator) * 0.05
            rows.copy_(scale * torch.randn(rows.shape, device=self.device, generator=generator))

    def _stream(self, load: Any, *, anew: bool = False) -> None:
        import torch

        for index, bucket in enumerate(self.buckets):
            if anew:
                self._fill(index)
            load([(name, self.buffer[first : first + count].view(size)) for name, size, first, count in bucket])
            # as verl's receiver does before it lets the sender fill the buffer again
            torch.cuda.synchronize()

    def _refit(self, how: str, **options: Any) -> None:
        from flashrl_cli.plugins import refit
        from flashrl_cli.plugins.arrival import Arrival

        runner = self.model_runner
        arguments = (runner.model, runner.vllm_config.model_config, self.device)

        def stream(load: Any) -> None:
            self._stream(load, **options)

        if how == "compared":
            self.arrival = self.arrival or Arrival(runner.model)
            refit.refit(*arguments, stream, reused=True, arrival=self.arrival)
            self.arrival.figures()
            return
        # the complete old way: copies out of the buffer, then vLLM's layerwise reload
        chosen = refit.refit if how == "in place" else refit.layerwise
        chosen(*arguments, stream, reused=True)

    def bench_time(self, how: str) -> dict[str, Any]:
        """Seconds of some refits after one to warm up, and bytes that one needs beside the engine and the buffer."""
        import torch

        seconds = []
        for _ in range(REPEATS + 1):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, started = torch.cuda.memory_allocated(), time.perf_counter()
            self._refit(how)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            extra = torch.cuda.max_memory_allocated() - before
        return {
            "seconds": [round(value, 4) for value in seconds[1:]],
            "median_s": round(sorted(seconds[1:])[REPEATS // 2], 4),
            "extra_gib": round(extra / 2**30, 3),
        }

    def bench_profile(self, how: str) -> dict[str, Any]:
        """Where a refit spends its time: kernels on the GPU, and calls on the CPU by their own time, in ms."""
        import torch
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            self._refit(how)
            torch.cuda.synchronize()
        rows = seen.key_averages()
        on_gpu = (row for row in rows if row.device_type == DeviceType.CUDA and row.self_device_time_total)
        kernels = sorted(on_gpu, key=lambda row: -row.self_device_time_total)
        calls = sorted(rows, key=lambda row: -row.self_cpu_time_total)
        return {
            "gpu_ms": round(sum(row.self_device_time_total for row in kernels) / 1e3, 2),
            "kernels": [[k.key[:90], k.count, round(k.self_device_time_total / 1e3, 2)] for k in kernels[:8]],
            "cpu_calls": [[c.key[:60], c.count, round(c.self_cpu_time_total / 1e3, 2)] for c in calls[:12]],
        }

    def bench_python(self, how: str) -> list[list[Any]]:
        """The Python functions that a refit spends its own time in, in ms (cProfile, which slows them down)."""
        import cProfile
        import pstats

        profiler = cProfile.Profile()
        profiler.runcall(self._refit, how)
        rows: Any = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
        slowest = sorted(rows.items(), key=lambda row: -row[1][2])[:16]
        return [
            [f"{Path(file).name}:{line}:{name}", row[0], round(row[2] * 1e3, 2)] for (file, line, name), row in slowest
        ]

    def bench_same(self) -> dict[str, Any]:
        """Whether both ways leave the same bits in every weight.

        All buckets differ, and at the start no weight is right.
        """
        import torch

        weights = dict(self.model_runner.model.named_parameters())
        self._refit("layerwise", anew=True)
        wanted = {name: weight.detach().clone() for name, weight in weights.items()}
        for weight in weights.values():
            _bits(weight).fill_(37)
        self._refit("in place", anew=True)
        different = [name for name in wanted if not torch.equal(_bits(weights[name]), _bits(wanted[name]))]
        return {"weights": len(wanted), "different": different}

    def bench_floor(self) -> float:
        """Bytes a second of a copy from memory to memory on this GPU, counting reads and writes."""
        import torch

        half = self.buffer[: self.buffer.numel() // 2]
        other = torch.empty_like(half)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.copy_(half)
        start.record()
        for _ in range(10):
            other.copy_(half)
        end.record()
        torch.cuda.synchronize()
        moved, seconds = 20 * int(half.nbytes), float(start.elapsed_time(end)) / 1e3
        return moved / seconds

    def bench_facts(self) -> dict[str, Any]:
        """What the engine holds: the handshake, and bytes of its weights."""
        from dataclasses import asdict

        from flashrl_cli.plugins.refit import describe

        model = self.model_runner.model
        held = {value.data_ptr(): value.nbytes for value in model.parameters()}
        handshake = describe(model, device=self.device, refits=0, refit_s=0.0)
        return {**asdict(handshake), "weights_gib": round(sum(held.values()) / 2**30, 2)}


def engine(size: str, precision: str, folder: str, **options: Any) -> Any:
    """vLLM with dummy weights and CUDA graphs."""
    from vllm import LLM

    Path(folder, "config.json").write_text(json.dumps(config_of(shape(size))), encoding="utf-8")
    return LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enable_prefix_caching=False,
        worker_extension_cls="benchmarks.refit_points.RefitBench",
        disable_log_stats=True,
        **arguments(precision),
        **options,
    )


def measure_refit(size: str, precision: str, dtype: str, folder: str) -> dict[str, Any]:
    """Times, memory and profiles of a refit by both ways, and in place with a sample compared (plugins/arrival.py).

    Where two copies of the weights fit, whether both ways agree.
    """
    started = time.perf_counter()
    llm = engine(size, precision, folder, max_model_len=1024, max_num_seqs=8, kv_cache_memory_bytes=1 << 30,
                 gpu_memory_utilization=0.5 if size == "7b" else 0.75, enforce_eager=True)  # fmt: skip
    result: dict[str, Any] = {
        "engine_s": round(time.perf_counter() - started, 1),
        **llm.collective_rpc("bench_facts")[0],
    }
    result["buckets"] = llm.collective_rpc("bench_prepare", args=(size, dtype))[0]
    result["copy_tb_s"] = round(llm.collective_rpc("bench_floor")[0] / 1e12, 3)
    for how in ("layerwise", "in place", "compared"):
        result[how] = llm.collective_rpc("bench_time", args=(how,))[0]
        result[how]["profile"] = llm.collective_rpc("bench_profile", args=(how,))[0]
        result[how]["python"] = llm.collective_rpc("bench_python", args=(how,))[0]
    if size != "32b":
        result["same"] = llm.collective_rpc("bench_same")[0]
    return result


def measure_speed(size: str, precision: str, sequences: list[int], new: int, folder: str) -> dict[str, Any]:
    """Output tokens per second, end to end, measured three times.

    Each of the prompts has 512 random tokens and gets `new` tokens.
    """
    import numpy as np
    from vllm import SamplingParams

    started = time.perf_counter()
    llm = engine(size, precision, folder, max_model_len=PROMPT + new + 16, max_num_seqs=max(sequences),
                 max_num_batched_tokens=16384, gpu_memory_utilization=0.9)  # fmt: skip
    result: dict[str, Any] = {"engine_s": round(time.perf_counter() - started, 1)}
    if precision != "fp8-block":
        result |= llm.collective_rpc("bench_facts")[0]
        llm.collective_rpc("bench_prepare", args=(size, "bfloat16"))
        llm.collective_rpc("bench_time", args=("in place",))
    numbers = np.random.default_rng(0)
    vocabulary = shape(size).vocab

    def tokens_per_second(together: int, count: int) -> float:
        prompts = [{"prompt_token_ids": row.tolist()} for row in numbers.integers(10, vocabulary, (together, PROMPT))]
        asked = SamplingParams(temperature=1.0, max_tokens=count, ignore_eos=True, logprobs=0, detokenize=False)
        begun = time.perf_counter()
        outputs = llm.generate(prompts, asked, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - begun)

    result["tokens_s"] = {}
    for together in sequences:
        tokens_per_second(together, 24)
        result["tokens_s"][together] = sorted(round(tokens_per_second(together, new)) for _ in range(3))
    return result


def main(point: str, out: str) -> None:
    kind, size, precision, *rest = point.split(":")
    import torch
    import vllm

    register()
    with tempfile.TemporaryDirectory() as folder:
        if kind == "refit":
            result = measure_refit(size, precision, rest[0], folder)
        else:
            result = measure_speed(size, precision, [int(n) for n in rest[0].split("+")], int(rest[1]), folder)
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "device": torch.cuda.get_device_name()}
    files.write_json(Path(out), {**result, **versions})


if __name__ == "__main__":
    main(*sys.argv[1:])
