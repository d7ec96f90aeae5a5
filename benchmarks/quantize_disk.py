"""Compare quantizing a model on disk with copying it by `cp`: seconds and memory, with a cold and a warm page cache.

    python benchmarks/quantize_disk.py [--layers 28] [--repeat 3] [--out benchmarks/results/quantize_disk.json]

Writes models of Qwen2.5-1.5B's shapes with random weights (28 layers: 3.1 GB in bf16) into a temporary folder under
--work, which needs twice that. `cp` and the quantization take turns. Cold: all pages of the model are dropped from the
cache before. Seconds are a command's own until it ends; `core` leaves out the start of Python and torch, which no `cp`
has and which is reported separately. Neither side waits for the disk; `synced` counts until all is on it. `cpu` is what
a command took of the cores, its start included, whatever else runs. A virtual machine gives free memory back to its
host and pays seconds for each GB that it takes again, so both sides begin right after a copy of the model was made and
removed, whose memory they find: the quantization with Python and torch started.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flashrl_cli import files

PACKAGES = ("flashrl-cli", "torch", "safetensors")
HIDDEN, INTER, KV, VOCABULARY = 1536, 8960, 256, 151_936
SHARD = 10**9
CASES = (("bfloat16", "int8"), ("bfloat16", "fp8"), ("float32", "int8"))


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen2 with a tied head."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", HIDDEN), ("k", KV), ("v", KV)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, HIDDEN)
            yield f"{prefix}.self_attn.{name}_proj.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}.mlp.gate_proj.weight", (INTER, HIDDEN)
        yield f"{prefix}.mlp.up_proj.weight", (INTER, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", (HIDDEN, INTER)
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)


def config(layers: int, dtype: str) -> dict[str, Any]:
    """The config.json of that model."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // 128,
        "num_key_value_heads": KV // 128,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "dtype": dtype,
    }


def make(folder: Path, layers: int, dtype: str) -> None:
    """Write the model in files of about SHARD bytes, with an index."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    noise = 0.02 * torch.randn(VOCABULARY * HIDDEN // 8).to(getattr(torch, dtype))
    folder.mkdir()
    group: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    number = 1
    for name, shape in shapes(layers):
        count = torch.Size(shape).numel()
        group[name] = noise.repeat(-(-count // len(noise)))[:count].view(shape).clone()
        weight_map[name] = f"model-{number:05d}.safetensors"
        if sum(tensor.nbytes for tensor in group.values()) > SHARD:
            save_file(group, folder / weight_map[name], metadata={"format": "pt"})
            group, number = {}, number + 1
    save_file(group, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
    files.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    files.write_json(folder / "config.json", config(layers, dtype))
    files.write_json(folder / "tokenizer.json", {})


def cache(folder: Path, *, warm: bool) -> None:
    """Have all pages of a folder's files in the page cache, or none."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while warm and stream.read(2**24):
                pass


def measured(argv: list[str], prepare: Callable[[], None], *, waits: bool) -> dict[str, float]:
    """Seconds of a command, until its files are on the disk, and its peak anonymous and resident memory in MiB.

    `prepare` is called before the command; if the command `waits` for a signal to continue, once it has started.
    """
    start, started = 0.0, time.monotonic()
    process = _started(argv) if waits else None
    if process and process.stdout and process.stdout.readline():
        start = time.monotonic() - started
    prepare()
    used, started = _cpu(), time.monotonic()
    process = process or _started(argv)
    out, err, peaks = _followed(process)
    seconds = time.monotonic() - started
    if process.returncode:
        sys.exit(f"{' '.join(argv)} ended with {process.returncode}:\n{err[-3000:]}")
    cpu = _cpu() - used
    os.sync()
    return {
        "seconds": start + seconds,
        "core_s": json.loads(out)["core_s"] if out else seconds,
        "cpu_s": cpu,
        "synced_s": start + time.monotonic() - started,
        **peaks,
    }


def _started(argv: list[str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8")


def _followed(process: subprocess.Popen[str]) -> tuple[str, str, dict[str, float]]:
    """Output of a command after its signal to continue, and its peak memory."""
    if process.stdin:
        process.stdin.close()
    peaks = {"RssAnon": 0, "VmHWM": 0}
    while process.poll() is None:
        with suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            found = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if "kB" in line}
            peaks = {key: max(value, int(found.get(key, 0))) for key, value in peaks.items()}
        time.sleep(0.01)
    streams = [stream.read() if stream else "" for stream in (process.stdout, process.stderr)]
    return streams[0], streams[1], {"anonymous_mib": peaks["RssAnon"] / 1024, "resident_mib": peaks["VmHWM"] / 1024}


def _cpu() -> float:
    """Seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def quantize(model: str, out: str, scheme: str, *, waits: bool = False) -> float:
    """Seconds of `flashrl quantize` without the start of Python and torch.

    If it `waits`, it begins when it gets the signal to continue.
    """
    import torch

    from flashrl_cli.quantize.inputs import plan
    from flashrl_cli.quantize.offline import quantize as write

    torch.ones(1).bfloat16()
    if waits:
        print("started", flush=True)
        sys.stdin.read()
    started = time.monotonic()
    write(plan(model, Path(out), scheme, [], None), lambda _: None)
    return time.monotonic() - started


def case(model: Path, scheme: str, *, warm: bool, repeat: int) -> dict[str, Any]:
    """Medians of both sides, which take turns, and cp's share of our time."""
    out = model.parent / "out"

    def prepare() -> None:
        subprocess.run(["cp", "-r", str(model), str(out)], check=True)
        shutil.rmtree(out)
        cache(model, warm=warm)

    commands = {
        "cp": ["cp", "-r", str(model), str(out)],
        "quantize": [sys.executable, __file__, "--quantize", str(model), str(out), scheme],
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(repeat):
        for name, argv in commands.items():
            runs[name].append(measured(argv, prepare, waits=name == "quantize"))
            shutil.rmtree(out)
    found = {name: {key: _median(some, key) for key in some[0]} for name, some in runs.items()}
    ratios = {f"of_cp_{key}": round(found["cp"][key] / found["quantize"][key], 3) for key in ("core_s", "synced_s")}
    return {"cache": "warm" if warm else "cold", **found, **ratios, "runs": runs}


def _median(runs: list[dict[str, float]], key: str) -> float:
    return round(statistics.median(run[key] for run in runs), 3)


def main() -> None:
    """Measure all cases, print and store the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantize_disk.json"))
    parser.add_argument("--quantize", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quantize:
        print(json.dumps({"core_s": quantize(*args.quantize, waits=True)}))
        return
    cases = []
    for dtype, scheme in CASES:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            model = Path(folder) / "model"
            make(model, args.layers if dtype == "bfloat16" else args.layers // 2, dtype)
            size = sum(file.stat().st_size for file in model.iterdir())
            for warm in (False, True):
                found = case(model, scheme, warm=warm, repeat=args.repeat)
                cases.append({"dtype": dtype, "scheme": scheme, "bytes": size, **found})
                print(json.dumps({key: value for key, value in cases[-1].items() if key != "runs"}), flush=True)
    result = {
        "command": f"python benchmarks/quantize_disk.py --layers {args.layers} --repeat {args.repeat}",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "cases": cases,
    }
    files.write_json(args.out, result)


if __name__ == "__main__":
    main()
