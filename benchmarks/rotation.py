"""Measure what the rotation of INT8 rollouts brings and costs: KL to the trainer, speed, seconds of a refit.

    python benchmarks/rotation.py simulate MODEL TEST.jsonl [--profile FILE]   # in PyTorch, float32, without an engine
    python benchmarks/rotation.py engine MODEL --data gsm8k                    # KL of a real engine, CPU or GPU
    python benchmarks/rotation.py speed [--sizes 7b,32b]                       # on a GPU, random weights

`simulate` rounds weights per row and activations per token as INT8 and FP8 rollouts do, in an otherwise float32 model,
and compares the distributions of all tokens of GSM8K's worked answers (TEST.jsonl: its own file) with those of the
float32 model. The other two run `flashrl bench`. Each adds its part to the file of results.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files
from flashrl_cli.weights.profile import Profile

if TYPE_CHECKING:
    import torch

    Change = Callable[[torch.Tensor], torch.Tensor]

OUT = Path("benchmarks/results/rotation.json")
INSTRUCTION = ' Let\'s think step by step and output the final answer after "####".'
KINDS = "int8+plain,int8+rot16,int8+rot32,int8+rot64,int8"


def int8(values: torch.Tensor) -> torch.Tensor:
    """What symmetric INT8 with a step for each row leaves of `values`."""
    steps = (values.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-8)
    return (values / steps).round() * steps


def int8_by_bf16(values: torch.Tensor) -> torch.Tensor:
    """What symmetric INT8 leaves if the steps are bf16 numbers, as kernels for 16-bit activations read them.

    They are rounded before the values are divided by them, so that they scale no row by another factor.
    """
    steps = (values.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-8).bfloat16().float()
    return (values / steps).round().clamp(-127, 127) * steps


def bf16(values: torch.Tensor) -> torch.Tensor:
    """What bf16 leaves of `values`."""
    return values.bfloat16().float()


def fp8(values: torch.Tensor) -> torch.Tensor:
    """What e4m3 with a scale for each row leaves of `values`."""
    import torch

    scales = (values.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-12)
    return (values / scales).to(torch.float8_e4m3fn).float() * scales


def fp8_of_a_layer(values: torch.Tensor) -> torch.Tensor:
    """What e4m3 leaves of all keys, or values, of a layer with one power of two as their scale."""
    import torch

    scale = 2.0 ** torch.ceil(torch.log2(values.abs().amax() / 448))
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


def as_it_is(values: torch.Tensor) -> torch.Tensor:
    """The values themselves."""
    return values


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How a linear layer is computed: what its weights and activations are rounded to, and the block of its rotation.

    `narrow` says that the rotated input is rounded to bf16 before. `down` is another block for `down_proj`, whose input
    is wider. Layers whose name ends in one of `in_bf16` are computed in bf16 instead. `keys` and `values` round what
    attention reads, as a KV cache does: float32 of shape (batch, heads, tokens, size of a head).
    """

    weights: Change = int8
    activations: Change = int8
    block: int = 0
    down: int | None = None
    narrow: bool = False
    in_bf16: tuple[str, ...] = ()
    smoothed: bool = False
    keys: Change = as_it_is
    values: Change = as_it_is


def cached(keys: Change = as_it_is, values: Change = as_it_is) -> Arithmetic:
    """Linear layers in float32 and a KV cache that rounds."""
    return Arithmetic(as_it_is, as_it_is, keys=keys, values=values)


ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")

ROWS: Mapping[str, Arithmetic] = {
    "int8 plain": Arithmetic(),
    "int8 plain, weights alone": Arithmetic(activations=as_it_is),
    "int8 plain, activations alone": Arithmetic(weights=as_it_is),
    "int8 rotated by 16": Arithmetic(block=16),
    "int8 rotated by 32": Arithmetic(block=32),
    "int8 rotated by 64": Arithmetic(block=64),
    "int8 rotated by 64, down_proj by 128": Arithmetic(block=64, down=128),
    "int8 rotated by 64, down_proj by 512": Arithmetic(block=64, down=512),
    "int8 rotated by 64, activations rounded to bf16 between": Arithmetic(block=64, narrow=True),
    "int8 rotated by 64, weights alone": Arithmetic(activations=as_it_is, block=64),
    "int8 rotated by 64, activations alone": Arithmetic(weights=as_it_is, block=64),
    "int8 weights, bf16 activations": Arithmetic(int8_by_bf16, bf16),
    "int8 weights, bf16 activations, rotated by 64": Arithmetic(int8_by_bf16, bf16, block=64),
    "int8 weights, bf16 activations, KV cache int8": Arithmetic(int8_by_bf16, bf16, keys=int8, values=int8),
    "int8 plain, bf16 for queries, keys and values": Arithmetic(in_bf16=ATTENTION_INPUTS),
    "int8 rotated by 64, bf16 for queries, keys and values": Arithmetic(block=64, in_bf16=ATTENTION_INPUTS),
    "int8 rotated by 64, bf16 for down_proj": Arithmetic(block=64, in_bf16=("down_proj",)),
    "int8 smoothed": Arithmetic(smoothed=True),
    "int8 smoothed, rotated by 64": Arithmetic(block=64, smoothed=True),
    "fp8 plain": Arithmetic(fp8, fp8),
    "fp8 rotated by 64": Arithmetic(fp8, fp8, block=64),
    "KV cache fp8, a scale a layer": cached(fp8_of_a_layer, fp8_of_a_layer),
    "KV cache fp8, a scale a token and head": cached(fp8, fp8),
    "KV cache int8, a scale a token and head": cached(int8, int8),
    "KV cache int8, keys alone": cached(keys=int8),
    "KV cache int8, values alone": cached(values=int8),
    "int8 rotated by 64, KV cache int8": Arithmetic(block=64, keys=int8, values=int8),
    "int8 rotated by 64, KV cache fp8": Arithmetic(block=64, keys=fp8_of_a_layer, values=fp8_of_a_layer),
}


def turned(values: torch.Tensor, block: int) -> torch.Tensor:
    """Each block of the last dimension times the normalized Hadamard matrix."""
    import torch

    if not block:
        return values
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (values.reshape(-1, block) @ matrix.div(block**0.5)).view(values.shape)


class Simulation:
    """A float32 model whose linear layers can be computed by another arithmetic, on given sequences."""

    def __init__(self, folder: str, test: Path, questions: int, profile: Path | None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._rows = list(self._read(test, questions))
        self._before = {name: value.data for name, value in self._model.named_parameters()}
        found = Profile.read(profile) if profile else None
        # the scales are powers of two, so the smoothed model computes the same bits
        self._after = {name: found.apply(name, value) for name, value in self._before.items()} if found else None
        self._exact = self._logprobs()
        self._arithmetic = Arithmetic()
        self._round_caches()

    def _round_caches(self) -> None:
        """Have attention read keys and values as the cache of the present arithmetic holds them."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        def rounded(layer: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:
            key, value = self._arithmetic.keys(key.contiguous()), self._arithmetic.values(value.contiguous())
            return sdpa_attention_forward(layer, query, key, value, *rest, **more)

        ALL_ATTENTION_FUNCTIONS.register("rounded", rounded)
        self._model.set_attn_implementation("rounded")

    def rows(self) -> Iterator[tuple[str, float]]:
        """The KL to the float32 model, in nats a token, of each arithmetic that can be had."""
        import torch

        for name, arithmetic in ROWS.items():
            if not arithmetic.smoothed or self._after:
                yield name, self.kl(arithmetic)
        self._place(self._before)
        self._arithmetic = Arithmetic()
        self._model.to(torch.bfloat16)
        yield "bf16", self._distance(self._logprobs())

    def kl(self, arithmetic: Arithmetic) -> float:
        """The KL to the float32 model with this arithmetic in all linear layers but the head."""
        import torch

        self._place(self._after if arithmetic.smoothed and self._after else self._before)
        self._arithmetic = arithmetic
        hooks = []
        for name, layer in self._model.named_modules():
            if not isinstance(layer, torch.nn.Linear) or "lm_head" in name:
                continue
            own, block = arithmetic, arithmetic.block
            if name.endswith(arithmetic.in_bf16):
                own, block = Arithmetic(bf16, bf16), 0
            elif arithmetic.down is not None and name.endswith("down_proj"):
                block = arithmetic.down
            layer.weight.data = own.weights(turned(layer.weight.data, block))
            hooks.append(layer.register_forward_pre_hook(self._hook(own, block)))
        found = self._distance(self._logprobs())
        for hook in hooks:
            hook.remove()
        return found

    @property
    def tokens(self) -> int:
        """Number of tokens that are compared."""
        return int(self._exact.shape[0])

    def _hook(self, arithmetic: Arithmetic, block: int) -> Callable[[Any, Any], tuple[torch.Tensor]]:
        def hook(_: Any, inputs: Any) -> tuple[torch.Tensor]:
            values = turned(inputs[0], block)
            return (arithmetic.activations(bf16(values) if arithmetic.narrow else values),)

        return hook

    def _place(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.data = weights[name]

    def _read(self, test: Path, questions: int) -> Iterator[tuple[list[int], int]]:
        """Token ids of a question with its answer, and the number of those of the question."""
        for line in test.read_text(encoding="utf-8").splitlines()[:questions]:
            row = json.loads(line)
            messages = [{"role": "user", "content": row["question"] + INSTRUCTION}]
            asked = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            answer = self._tokenizer(re.sub(r"<<[^>]*>>", "", row["answer"]))["input_ids"]
            yield asked + answer, len(asked)

    def _logprobs(self) -> torch.Tensor:
        """Log-probs of the vocabulary at each token of the answers."""
        import torch

        with torch.no_grad():
            logits = [self._model(torch.tensor([row])).logits[0, start - 1 : -1].float() for row, start in self._rows]
        return torch.cat(logits).log_softmax(-1)

    def _distance(self, found: torch.Tensor) -> float:
        return float((self._exact.exp() * (self._exact - found)).sum(-1).mean())


def simulate(arguments: argparse.Namespace) -> dict[str, Any]:
    """KL of each arithmetic to the float32 model, in nats a token."""
    import torch

    torch.set_num_threads(arguments.threads)
    simulation = Simulation(arguments.model, arguments.test, arguments.questions, arguments.profile)
    found: dict[str, float] = {}
    for name, kl in simulation.rows():
        found[name] = round(kl, 5)
        print(f"{name}: {kl:.5f}", flush=True)
    return {"questions": arguments.questions, "tokens": simulation.tokens, "kl": found}


def bench(*words: str, kept: Path | None = None) -> dict[str, Any]:
    """The document of `flashrl bench` with these words; `kept` is the folder of finished points, None for none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        place = str(kept or folder)
        command = [sys.executable, "-m", "flashrl_cli", "bench", *words, "--dir", place, "--out", str(out)]
        subprocess.run(command, check=True)
        document: dict[str, Any] = json.loads(out.read_text())
    return document


def engine(arguments: argparse.Namespace) -> dict[str, Any]:
    """KL of real engines to the trainer, in float32 and in bf16."""
    kinds = arguments.rollout or f"bf16,{KINDS}"
    words = ["--model", arguments.model, "--data", arguments.data, "--mismatch", "--rollout", kinds]
    words += ["--samples", str(arguments.samples), "--response", str(arguments.response), "--repeats", "1"]
    words += ["--batch", str(arguments.batch), "--prompt", "32", "--trainer-dtype", arguments.trainer_dtype]
    found = bench(*words, kept=arguments.dir)
    figures = {one["rollout"]: one["mismatch"] for one in found["variants"]}
    return {"device": found["device"], "versions": found["versions"], "settings": found["settings"], "kl": figures}


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second and seconds of a refit of plain and rotated INT8, by size."""
    result: dict[str, Any] = {}
    for size in arguments.sizes.split(","):
        words = ["--model", f"shape:{size}", "--rollout", arguments.rollout or "int8+plain,int8", "--refit"]
        found = bench(*words, "--batch", "64,256")
        base = {one["batch"]: one["tokens_s"] for one in found["variants"][0]["speed"]}
        result[size] = {
            one["rollout"]: {
                "tokens_s": {point["batch"]: point["values"] for point in one["speed"]},
                "of_plain": {
                    point["batch"]: round(point["tokens_s"] / base[point["batch"]], 4) for point in one["speed"]
                },
                "refit": one["refit"],
            }
            for one in found["variants"]
        } | {"device": found["device"], "versions": found["versions"], "settings": found["settings"]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("simulate")
    one.add_argument("model")
    one.add_argument("test", type=Path)
    one.add_argument("--questions", type=int, default=6)
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--profile", type=Path)
    two = parts.add_parser("engine")
    two.add_argument("model")
    two.add_argument("--data", default="gsm8k")
    two.add_argument("--rollout")
    two.add_argument("--samples", type=int, default=32)
    two.add_argument("--response", type=int, default=64)
    two.add_argument("--batch", type=int, default=16)
    two.add_argument("--trainer-dtype", default="float32")
    two.add_argument("--dir", type=Path, help="folder that keeps the samples, for the other --trainer-dtype")
    three = parts.add_parser("speed")
    three.add_argument("--sizes", default="7b,32b")
    three.add_argument("--rollout")
    arguments = parser.parse_args()
    found = {"simulate": simulate, "engine": engine, "speed": speed}[arguments.part](arguments)
    command = "python benchmarks/rotation.py " + " ".join(Path(word).name for word in sys.argv[1:])
    key = f"{arguments.part} {arguments.trainer_dtype}" if arguments.part == "engine" else arguments.part
    before = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    files.write_json(arguments.out, before | {key: {"command": command, **found}})


if __name__ == "__main__":
    main()
