"""`flashrl prepare tiny`: generate sums and a small Qwen2 that can add from a seed, in about a minute.

Reinforcement learning on it must have something to improve and must show when a rollout engine is broken, so the policy
is neither random nor perfect: it first learns sums digit by digit from correct demonstrations, then becomes careless
through demonstrations of which half are wrong. The skill remains, and training removes the carelessness.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import __version__, contract, files
from flashrl_cli.data import arith, writing
from flashrl_cli.data.arith import Pair, pairs, question, solution
from flashrl_cli.data.writing import stamp, unchanged
from flashrl_cli.errors import RunFailed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    from flashrl_cli.paths import DatasetPaths

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_NEW_TOKENS = 16
WEIGHTS = "model.safetensors"
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class WarmUp:
    """How the policy is trained: sizes in demonstrations, AdamW learning rates, accuracies that end a phase."""

    batch: int = 48
    clean_lr: float = 2e-3
    careless_lr: float = 1e-4
    warmup_steps: int = 50
    skilled: float = 0.7
    careless: float = 0.5
    floor: float = 0.25
    first_look: int = 200
    max_clean_steps: int = 1500
    max_careless_steps: int = 200


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges: 256 bytes (a newline is one, as verl insists) and three control tokens."""
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: index for index, symbol in enumerate([*sorted(ByteLevel.alphabet()), PAD, START, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, additional_special_tokens=[START]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, *, tied: bool = True, width: int = 128) -> Qwen2ForCausalLM:
    """Create an untrained float32 Qwen2, 0.4 M parameters at the usual `width`, with `len(tokenizer)` embedding rows.

    verl masks embedding rows beyond the vocabulary in the rollout only, which would appear as a constant KL.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Demonstrations:
    """Batches of worked sums, correct or careless, tokenized once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.pairs = pairs(seed)
        self.prompts = {pair: self.encode_prompt(*pair) for split in self.pairs.values() for pair in split}
        self.width = max(map(len, self.prompts.values())) + MAX_NEW_TOKENS

    def encode_prompt(self, a: int, b: int) -> list[int]:
        """Token ids of the chat prompt that asks for a + b."""
        messages = [{"role": "user", "content": question(a, b)}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text).input_ids)

    def pair(self) -> Pair:
        """Random summands of the training split."""
        return self.rng.choice(self.pairs["train"])

    def answer(self, a: int, b: int, *, careless: bool) -> str:
        """The worked solution of a + b, or, in half of the cases if `careless`, that of another sum."""
        if careless and self.rng.random() < 0.5:
            a, b = self.pair()
        return solution(a, b) + END

    def batch(self, size: int, *, careless: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded token ids and labels, int64 [size, width]; labels are -100 outside the answer."""
        import torch

        ids = torch.full((size, self.width), self.tokenizer.pad_token_id)
        labels = torch.full((size, self.width), -100)
        for row in range(size):
            pair = self.pair()
            prompt = self.prompts[pair]
            answer = self.tokenizer(self.answer(*pair, careless=careless)).input_ids
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        return ids, labels


def sampled(
    model: Qwen2ForCausalLM, demonstrations: Demonstrations, asked: Sequence[Pair], *, limit: int = MAX_NEW_TOKENS
) -> torch.Tensor:
    """Sample a response of at most `limit` tokens to each pair at temperature 1, by Transformers.

    Returns token ids, int64 [pairs, longest], padded on the right.
    """
    import torch

    tokenizer = demonstrations.tokenizer
    prompts = [demonstrations.prompts[pair] for pair in asked]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
    model.eval()
    with torch.no_grad():
        mask = (ids != tokenizer.pad_token_id).long()
        out = model.generate(ids, attention_mask=mask, max_new_tokens=limit, do_sample=True, top_k=0)
    model.train()
    responses: torch.Tensor = out[:, width:]
    return responses


def sampled_accuracy(model: Qwen2ForCausalLM, demonstrations: Demonstrations, *, repeats: int = 1) -> float:
    """Share of the 256 held-out sums answered right at temperature 1, `repeats` times each, by Transformers."""
    asked = demonstrations.pairs["test"] * repeats
    rows = sampled(model, demonstrations, asked)
    texts = [demonstrations.tokenizer.decode(row).split(END)[0] for row in rows]
    right = [text.split("#### ")[-1] == str(a + b) for text, (a, b) in zip(texts, asked, strict=True)]
    return float(sum(right) / len(right))


def teach(
    model: Qwen2ForCausalLM, optimizer: Any, demonstrations: Demonstrations, recipe: WarmUp, *, careless: bool
) -> float:
    """Take one step of `optimizer` on a batch of demonstrations; returns their mean loss, nats a token."""
    import torch

    ids, labels = demonstrations.batch(recipe.batch, careless=careless)
    loss = model(
        input_ids=ids, attention_mask=(ids != demonstrations.tokenizer.pad_token_id).long(), labels=labels
    ).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def warm_up(
    *, seed: int, tied: bool = True, width: int = 128, recipe: WarmUp | None = None, report: Report = lambda _: None
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast, dict[str, float]]:
    """Train a new policy until its sampled accuracy is between `recipe.floor` and `recipe.careless`.

    Returns model (float32), tokenizer and {"accuracy", "skilled_accuracy", "clean_steps", "careless_steps"}. The same
    seed, thread count and processor give the same policy. Raises RunFailed if the policy does not reach that range.
    """
    import torch

    recipe = recipe or WarmUp()
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, tied=tied, width=width)
    demonstrations = Demonstrations(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.clean_lr, betas=(0.9, 0.98), weight_decay=0.01)

    clean_steps, skilled = _learn(model, optimizer, demonstrations, recipe, report)
    careless_steps, accuracy = _grow_careless(model, optimizer, demonstrations, recipe, report)
    if not recipe.floor <= accuracy <= recipe.careless:
        raise RunFailed(f"the tiny policy ended at sampled accuracy {accuracy:.2f}", hint="try another --seed")
    steps = {"clean_steps": clean_steps, "careless_steps": careless_steps}
    return model, tokenizer, {"accuracy": accuracy, "skilled_accuracy": skilled, **steps}


def _learn(
    model: Qwen2ForCausalLM, optimizer: Any, demonstrations: Demonstrations, recipe: WarmUp, report: Report
) -> tuple[int, float]:
    """Train on correct demonstrations until the policy is skilled; returns steps and sampled accuracy."""
    step, accuracy = 0, 0.0
    while accuracy < recipe.skilled and step < recipe.max_clean_steps:
        _set_lr(optimizer, recipe.clean_lr * min(1.0, (step + 1) / recipe.warmup_steps))
        teach(model, optimizer, demonstrations, recipe, careless=False)
        step += 1
        if step >= recipe.first_look and step % 25 == 0:
            accuracy = sampled_accuracy(model, demonstrations)
            report(f"learning sums: step {step}, sampled accuracy {accuracy:.2f}")
    return step, accuracy


def _grow_careless(
    model: Qwen2ForCausalLM, optimizer: Any, demonstrations: Demonstrations, recipe: WarmUp, report: Report
) -> tuple[int, float]:
    """Train on half-wrong demonstrations until the policy is careless; returns steps and sampled accuracy."""
    step, accuracy = 0, 1.0
    _set_lr(optimizer, recipe.careless_lr)
    while accuracy > recipe.careless and step < recipe.max_careless_steps:
        teach(model, optimizer, demonstrations, recipe, careless=True)
        step += 1
        if step % 5 == 0:
            accuracy = sampled_accuracy(model, demonstrations, repeats=2)
            report(f"learning to be careless: step {step}, sampled accuracy {accuracy:.2f}")
    return step, accuracy


def _set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a plain HF folder: bfloat16 safetensors, config, tokenizer with chat template."""
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare_tiny(paths: DatasetPaths, *, seed: int, force: bool, report: Report) -> dict[str, Any]:
    """Create `arith` rows and a warmed-up policy in `paths`, unless they exist; returns status and manifest.

    It takes about a minute on two cores. RunFailed if the policy cannot be trained.
    """
    there = writing.read_manifest(paths)
    if not force and there is not None and _up_to_date(paths, there, seed):
        return {"status": "up to date", **there}
    report("tiny: teaching a policy of 0.4 M parameters to add …")
    for key, value in contract.THREADS.items():
        os.environ.setdefault(key, value)
    model, tokenizer, taught = warm_up(seed=seed, report=report)
    with files.replacing(paths.model) as folder:
        save(model, tokenizer, folder)
        weights = stamp(folder / WEIGHTS, name=f"{paths.model.name}/{WEIGHTS}")
        if paths.model.exists():
            shutil.rmtree(paths.model)
    rows = {
        split: [arith.row({"a": a, "b": b}, split, index) for index, (a, b) in enumerate(drawn)]
        for split, drawn in arith.pairs(seed).items()
    }
    about = {"source": None, "options": {"seed": seed}, "tokenizer": None, "model": {**taught, "weights": weights}}
    manifest = writing.write_dataset(paths, rows, about, {split: {} for split in rows})
    return {"status": "prepared", **manifest}


def _up_to_date(paths: DatasetPaths, manifest: writing.Manifest, seed: int) -> bool:
    same = manifest.get("flashrl") == __version__ and manifest["options"] == {"seed": seed} and "model" in manifest
    return (
        same
        and unchanged(paths.model / WEIGHTS, manifest["model"]["weights"])
        and all((paths.model / name).is_file() for name in ("config.json", "tokenizer.json"))
        and writing.outputs_unchanged(paths, manifest)
    )
