"""Measure what of a small policy update reaches a rollout engine with 8-bit weights, and what rounding does about it.

    PYTHONPATH=src python benchmarks/arrival.py MODEL GSM8K --out benchmarks/results/arrival.json

MODEL is a folder of a language model in bf16, GSM8K one with `train.jsonl` and `test.jsonl`. In plain PyTorch on one
CPU core, AdamW updates float32 weights by GRPO's gradient of a group of two: GSM8K's own answer (advantage 1) and that
to another question (advantage -1), with passes in bf16 as in training. After some of the steps the weights of the
linear layers are held in several ways, all others in bf16, and log-probs z of held-out answers are computed in float32
arithmetic. `of float32` means that the float32 weights are rounded to 8 bits; the other ways round them to bf16 first,
as they are sent to engines and as the trainer itself rounds them for its passes. With Q_t for the weights that an
engine would hold after t steps and W_t for what it should follow, the weights in float32 or in bf16,

- `codes_changed`: share of the 8-bit codes that the last step changed; for `bf16` that of the bf16 weights;
- `static_kl` and `kl`: KL of W_0 from Q_0, and of W_t from Q_t (both in float32), in nats a token;

and against float32 (`float32`) and against bf16 (`trainer`)

- `slope` = <dQ, dW> / <dW, dW> and `cosine` = <dQ, dW> / (|dQ| |dW|) with dQ = Q_t - Q_0 and dW = W_t - W_0: how much
  of the change of the weights arrived on average, and how much of what changed in the engine is that change;
- `logits_slope` and `logits_correlation`: the same of z(Q_t) - z(Q_0) and z(W_t) - z(W_0) over the whole vocabulary,
  each token weighted by its probability under W_0;
- `lag_kl`: half the mean square of z(Q_t) - z(Q_0) - z(W_t) + z(W_0), weighted in the same way: to second order the KL
  that would not be there without an update. `update_kl` is that of z(W_t) - z(W_0).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import files

if TYPE_CHECKING:
    import torch

STEPS = (1, 10, 40)
HELD_OUT = 4
"""Questions on whose answers log-probs are compared."""
BLOCK = 64
"""Size of a block of the rotation."""
ASKED = ' Let\'s think step by step and output the final answer after "####".'

Weights = dict[str, "torch.Tensor"]


@dataclass
class Rows:
    """An 8-bit weight: codes [N, K] as float32 whole numbers (values of e4m3 for FP8), and scales [N, 1]."""

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def values(self) -> torch.Tensor:
        return self.codes * self.scales


def int8(weight: torch.Tensor, scales: torch.Tensor | None = None) -> Rows:
    """Nearest codes, with the scale of the largest weight of each row, or with given scales."""
    if scales is None:
        scales = weight.abs().amax(1, keepdim=True) / 127
    return Rows((weight / scales).round_().clamp_(-127, 127), scales)


def stochastic(weight: torch.Tensor, seed: int) -> Rows:
    """Codes that are rounded up with the probability of their fraction, so that their mean is the weight."""
    import torch

    scales = weight.abs().amax(1, keepdim=True) / 127
    draws = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
    return Rows((weight / scales + draws).floor_().clamp_(-127, 127), scales)


def fp8(weight: torch.Tensor) -> Rows:
    import torch

    scales = weight.abs().amax(1, keepdim=True) / 448
    return Rows((weight / scales).to(torch.float8_e4m3fn).float(), scales)


def hadamard(size: int) -> torch.Tensor:
    import torch

    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / math.sqrt(size)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotate the last dimension in blocks; a second rotation undoes it."""
    return (x.reshape(-1, BLOCK) @ hadamard(BLOCK)).reshape(x.shape)


def by_token(x: torch.Tensor) -> torch.Tensor:
    """Activations rounded to INT8 with one scale per token."""
    scales = x.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
    return (x / scales).round() * scales


@dataclass
class Way:
    """A way of holding weights.

    `quantize` gets a weight, the number of its layer, the step, and the weight before the first step.
    """

    quantize: Callable[[torch.Tensor, int, int, torch.Tensor], Rows]
    exact: bool = False
    """Whether float32 weights are quantized, instead of weights in bf16."""
    rotates: bool = False
    activations: Callable[[torch.Tensor], torch.Tensor] | None = None

    def held(self, weight: torch.Tensor, layer: int, step: int, first: torch.Tensor) -> Rows:
        given = [one if self.exact else bf16(one) for one in (weight, first)]
        weight, first = map(rotated, given) if self.rotates else given
        return self.quantize(weight, layer, step, first)

    def values(self, rows: Rows) -> torch.Tensor:
        return rotated(rows.values) if self.rotates else rows.values


def ways() -> dict[str, Way]:
    import torch

    def nearest(weight: torch.Tensor, *_: Any) -> Rows:
        return int8(weight)

    def kept(weight: torch.Tensor, _layer: int, _step: int, first: torch.Tensor) -> Rows:
        return int8(weight, int8(first).scales)

    def anew(weight: torch.Tensor, layer: int, step: int, _: Any) -> Rows:
        return stochastic(weight, 1000 * step + layer)

    def drawn_once(weight: torch.Tensor, layer: int, *_: Any) -> Rows:
        return stochastic(weight, layer)

    def e4m3(weight: torch.Tensor, *_: Any) -> Rows:
        return fp8(weight)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return rotated(by_token(rotated(x)))

    return {
        "bf16": Way(lambda weight, *_: Rows(weight, torch.ones(1))),
        "int8": Way(nearest),
        "int8 of float32": Way(nearest, exact=True),
        "int8, stochastic, drawn anew": Way(anew),
        "int8, stochastic, same draws": Way(drawn_once),
        "int8 of float32, scales kept": Way(kept, exact=True),
        "int8 of float32, stochastic, drawn anew": Way(anew, exact=True),
        "int8 of float32, stochastic, same draws": Way(drawn_once, exact=True),
        "int8, rotated": Way(nearest, rotates=True),
        "int8 of float32, rotated": Way(nearest, exact=True, rotates=True),
        "fp8": Way(e4m3),
        "fp8 of float32": Way(e4m3, exact=True),
        "int8, activations too": Way(nearest, activations=by_token),
        "int8 of float32, rotated, activations too": Way(nearest, exact=True, rotates=True, activations=turned),
    }


class Policy:
    """A language model in float32, whose weights can be exchanged, and some answers on which it is judged."""

    def __init__(self, folder: Path, gsm8k: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.linear = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, torch.nn.Linear) and "lm_head" not in name
        }
        self.train, test = (read(gsm8k / f"{split}.jsonl") for split in ("train", "test"))
        self.held_out = [self.tokens(*row) for row in test[:HELD_OUT]]
        self.activations: Callable[[torch.Tensor], torch.Tensor] | None = None
        for layer in self.linear.values():
            layer.register_forward_pre_hook(lambda _, x: (self.activations(x[0]),) if self.activations else None)

    def tokens(self, question: str, answer: str) -> tuple[list[int], int]:
        """Prompt and answer as token ids, and the length of the prompt."""
        words = [{"role": "user", "content": question + ASKED}]
        prompt = self.tokenizer.apply_chat_template(words, add_generation_prompt=True, return_dict=False)
        return prompt + self.tokenizer(answer).input_ids, len(prompt)

    def weights(self) -> Weights:
        """A copy of all parameters, in float32."""
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def log_probs(self, weights: Mapping[str, torch.Tensor], activations: Any = None) -> torch.Tensor:
        """Log-probs [tokens, vocabulary] of the held-out answers under some weights."""
        import torch

        mine = dict(self.model.named_parameters())
        kept = {name: value.data for name, value in mine.items()}
        self.activations = activations
        try:
            for name, value in weights.items():
                mine[name].data = value
            with torch.no_grad():
                found = [self.model(torch.tensor([ids])).logits[0, start - 1 : -1] for ids, start in self.held_out]
        finally:
            self.activations = None
            for name, value in kept.items():
                mine[name].data = value
        return torch.cat(found).log_softmax(-1)

    def updates(self, lr: float, steps: int) -> Iterator[int]:
        """Train, yielding the number of each step after it."""
        import torch

        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.01)
        rows = itertools.cycle(self.train)
        for step in range(1, steps + 1):
            (question, right), (_, wrong) = next(rows), next(rows)
            for answer, advantage in ((right, 1.0), (wrong, -1.0)):
                ids, start = self.tokens(question, answer)
                with torch.autocast("cpu", torch.bfloat16):
                    logits = self.model(torch.tensor([ids])).logits[0, start - 1 : -1].float()
                loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]))
                (advantage * loss / 2).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield step


def read(file: Path) -> list[tuple[str, str]]:
    """Questions and answers of GSM8K, without the answers' marks for a calculator."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [(row["question"], re.sub(r"<<[^>]*>>", "", row["answer"])) for row in rows]


class Comparison:
    """Compares each way of holding weights with the float32 weights, step by step."""

    def __init__(self, policy: Policy, chosen: Mapping[str, Way]) -> None:
        self.policy, self.ways = policy, chosen
        self.first = policy.weights()
        self.log_probs = policy.log_probs(self.first)
        self.p = self.log_probs.exp()
        self.starts = {name: self.of(way, self.held(way, self.first, 0), self.first) for name, way in self.ways.items()}

    def held(self, way: Way, weights: Weights, step: int) -> dict[str, Rows]:
        return {
            name: way.held(weights[f"{name}.weight"], layer, step, self.first[f"{name}.weight"])
            for layer, name in enumerate(self.policy.linear)
        }

    def of(self, way: Way, rows: Mapping[str, Rows], weights: Weights) -> torch.Tensor:
        sent = {name: bf16(value) for name, value in weights.items()}
        sent |= {f"{name}.weight": way.values(one) for name, one in rows.items()}
        return self.policy.log_probs(sent, way.activations)

    def mean(self, values: torch.Tensor) -> float:
        """Mean over tokens of the expectation under the first policy."""
        return float((self.p * values).sum(-1).double().mean())

    def step(self, step: int, before: Weights, after: Weights) -> dict[str, Any]:
        """The figures of all ways after a step that changed `before` to `after`."""
        log_probs = self.policy.log_probs(after)
        wanted, found = {"float32": log_probs - self.log_probs}, {}
        for name, way in self.ways.items():  # bf16 first
            rows = self.held(way, after, step)
            mine = self.of(way, rows, after)
            got = mine - self.starts[name]
            wanted.setdefault("trainer", got)
            found[name] = {
                "codes_changed": changed(self.held(way, before, step - 1), rows),
                "static_kl": self.mean(self.log_probs - self.starts[name]),
                "kl": float((log_probs.exp() * (log_probs - mine)).sum(-1).double().mean()),
                **{
                    against: {**each, **self.logits(got, wanted[against])}
                    for against, each in self.weights(name, rows, after).items()
                },
            }
        return {"step": step, "update_kl": {key: self.mean(one**2) / 2 for key, one in wanted.items()}, "ways": found}

    def logits(self, got: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
        both, theirs, mine = (self.mean(one) for one in (got * wanted, wanted**2, got**2))
        return {
            "logits_slope": both / theirs if theirs else 0.0,
            "logits_correlation": both / math.sqrt(theirs * mine) if theirs and mine else 0.0,
            "lag_kl": self.mean((got - wanted) ** 2) / 2,
        }

    def weights(self, name: str, rows: Mapping[str, Rows], after: Weights) -> dict[str, dict[str, float]]:
        """Slope and cosine of the change of the weights since the first step, against float32 and bf16."""
        sums = {"float32": [0.0] * 3, "trainer": [0.0] * 3}
        way = self.ways[name]
        for layer, (key, one) in enumerate(rows.items()):
            first, last = self.first[f"{key}.weight"], after[f"{key}.weight"]
            got = way.values(one) - way.values(way.held(first, layer, 0, first))
            for against, wanted in (("float32", last - first), ("trainer", bf16(last) - bf16(first))):
                each = (got * wanted, wanted**2, got**2)
                sums[against] = [
                    total + float(part.double().sum()) for total, part in zip(sums[against], each, strict=True)
                ]
        return {
            against: {
                "slope": both / theirs if theirs else 0.0,
                "cosine": both / math.sqrt(theirs * mine) if theirs and mine else 0.0,
            }
            for against, (both, theirs, mine) in sums.items()
        }


def bf16(weight: torch.Tensor) -> torch.Tensor:
    import torch

    return weight.to(torch.bfloat16).float()


def changed(before: Mapping[str, Rows], after: Mapping[str, Rows]) -> float:
    """Share of codes that differ."""
    differ = sum(int((before[name].codes != one.codes).sum()) for name, one in after.items())
    return differ / sum(int(one.codes.numel()) for one in after.values())


def measure(folder: Path, gsm8k: Path, lr: float, chosen: Mapping[str, Way]) -> Iterator[dict[str, Any]]:
    """The figures of one learning rate, after each of STEPS."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy = Policy(folder, gsm8k)
    comparison = Comparison(policy, chosen)
    before = comparison.first
    for step in policy.updates(lr, max(STEPS)):
        if step in STEPS:
            yield comparison.step(step, before, policy.weights())
        if step + 1 in STEPS:
            before = policy.weights()


def add(runs: list[dict[str, Any]], lr: float, figures: dict[str, Any]) -> None:
    """Add the figures of a step to those that are known of the same updates, in the order of `ways`."""
    run = next((run for run in runs if run["lr"] == lr), None)
    if run is None:
        run = {"lr": lr, "steps": []}
        runs.append(run)
    step = next((step for step in run["steps"] if step["step"] == figures["step"]), None)
    if step is None:
        run["steps"].append(figures)
        return
    if step["update_kl"] != figures["update_kl"]:
        raise SystemExit(f"the updates at {lr:g} are others than those of the results: begin a new file")
    both = {**step["ways"], **figures["ways"]}
    step["ways"] = {name: both[name] for name in ways() if name in both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 1e-5], help="learning rates (%(default)s)")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct", help="what the results call the model")
    parser.add_argument("--ways", nargs="+", default=list(ways()), help="only these, added to what --out has")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    document = {"schema_version": 1, "model": given.name, "held_out": HELD_OUT, "runs": []}
    if given.out.exists():
        document = json.loads(given.out.read_text(encoding="utf-8"))
    chosen = {name: way for name, way in ways().items() if name in {"bf16", *given.ways}}
    started = time.process_time()
    for lr in given.lr:
        for figures in measure(given.model, given.gsm8k, lr, chosen):
            add(document["runs"], lr, figures)
            files.write_json(given.out, document)
            print(f"lr {lr:g}, step {figures['step']}, {time.process_time() - started:.0f} s of CPU", flush=True)
            for name, one in figures["ways"].items():
                parts = {key: value for key, value in one.items() if not isinstance(value, dict)}
                for against in ("float32", "trainer"):
                    parts |= {f"{against} {key}": value for key, value in one[against].items()}
                print(f"  {name:48}" + "  ".join(f"{key} {value:.3g}" for key, value in parts.items()), flush=True)


if __name__ == "__main__":
    main()
