"""The only place that starts a vLLM engine, with the functions that all its users share.

These are refits, tokenizers and stop tokens. It is imported in worker processes only.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashrl_cli.errors import InputError
from flashrl_cli.weights import Unreadable, read_json

CPU_MEMORY = 0.2
"""Fraction of the machine's memory that vLLM's CPU worker requires to be free; the KV cache has a separate size."""
Messages = list[dict[str, str]]
_SHOWN = 200


class Spoilt(Unreadable):
    """Weights turned out to be unreadable after some of them were already loaded into the engine."""


def start(
    model: str,
    *,
    on_cpu: Mapping[str, Any],
    on_gpu: Mapping[str, Any],
    kv_memory: float | None = None,
    **arguments: Any,
) -> Any:
    """vLLM's `LLM` for the HF folder `model`: bf16 activations, dummy weights, and token ids instead of text.

    `kv_memory` is the size of the KV cache in GiB, rounded up to whole ones on a CPU; None for vLLM's choice.
    `arguments` are passed to vLLM, with `on_cpu` or `on_gpu` for the present device; they override the defaults here.
    """
    gc.disable()  # importing vLLM creates millions of objects, of which a collection would free none
    from vllm import LLM

    cpu, cache = is_cpu(), {}
    if kv_memory is not None and cpu:
        # the variable, which has a default here, replaces the argument (vllm/platforms/cpu.py:166, vLLM 0.28)
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(kv_memory))
    elif kv_memory is not None:
        # without it vLLM measures the free memory, and fails if another process frees some meanwhile: see
        # determine_available_memory in vllm/v1/worker/gpu_worker.py
        cache = {"kv_cache_memory_bytes": int(kv_memory * 2**30)}
    usual = {"dtype": "bfloat16", "load_format": "dummy", "skip_tokenizer_init": True}
    # there are no CUDA graphs to capture on a CPU
    device = {"enforce_eager": True, "gpu_memory_utilization": CPU_MEMORY, **on_cpu} if cpu else {**cache, **on_gpu}
    llm = LLM(**{"model": model, **usual, **arguments, **device})
    gc.freeze()
    gc.enable()
    return llm


def is_cpu() -> bool:
    """Whether vLLM computes on the CPU in this process."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def refit(llm: Any, source: Mapping[str, Any]) -> dict[str, Any]:
    """Refit all ranks from `source` (a Weights as plain data), and return the first rank's Handshake as plain data.

    Raises Unreadable for weights that no rank loaded, and Spoilt if the engine then holds no complete policy.
    """
    ranks: list[dict[str, Any]] = llm.collective_rpc("load_from_disk", args=(source,))
    failed = [rank for rank in ranks if "unreadable" in rank]
    if failed:
        untouched = len(failed) == len(ranks) and not any(rank["spoilt"] for rank in failed)
        raise (Unreadable if untouched else Spoilt)(failed[0]["unreadable"])
    return ranks[0]


def tokenizer_of(folder: Path, *, chat: bool = True) -> Any:
    """The tokenizer in an HF folder. Raises Unreadable if it cannot be read or, with `chat`, has no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise Unreadable(f"no tokenizer that can be read in {folder}: {str(error).splitlines()[0]}") from error
    if chat and not tokenizer.chat_template:
        raise Unreadable(
            f"the tokenizer in {folder} has no chat template (chat_template.jinja); flashrl eval takes one by "
            "--chat-template FILE, and evaluates a base model without one by --chat-template none"
        )
    return tokenizer


def tokens_of(
    tokenizer: Any, prompt: Messages, *, chat_template: str | None = None, arguments: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a prompt up to the start of the response.

    `chat_template` is the text of a Jinja template instead of the tokenizer's, which gets `arguments`, or empty: then
    the ids are those of `plain_text`, with the special tokens that the tokenizer puts around a text (such as the start
    of a sequence). Raises Unreadable if the tokenizer's own template refuses the prompt, InputError if another one does
    or leaves out the last message.
    """
    from jinja2 import TemplateError

    tokens: list[int]
    if chat_template == "":
        tokens = tokenizer(plain_text(prompt)).input_ids
        return tokens
    made = {"add_generation_prompt": True, "return_dict": False, **(arguments or {})}
    try:
        if chat_template is None:
            tokens = tokenizer.apply_chat_template(prompt, **made)
            return tokens
        made["chat_template"] = chat_template
        text = tokenizer.apply_chat_template(prompt, tokenize=False, **made)
        tokens = tokenizer.apply_chat_template(prompt, **made)
    except (TemplateError, TypeError, ValueError) as error:
        if chat_template is None:
            raise Unreadable(f"the chat template of {tokenizer.name_or_path} refuses a prompt: {error}") from error
        raise InputError(f"--chat-template: {error}", hint="it is a Jinja template over `messages`") from error
    if prompt[-1]["content"].strip() not in text:
        what = f"--chat-template: a prompt that it makes does not contain the question: {text[:_SHOWN]!r}"
        raise InputError(what, hint="each of `messages` has a `role` and a `content`")
    return tokens


def plain_text(prompt: Messages) -> str:
    """The text that asks a model without a chat template: a question and its answer are separated by a line break.

    Blank lines separate questions with their answers from each other and from a system message.
    """
    ends = {"user": "\n", "tool": "\n"}
    return "".join((one["content"] or "") + ends.get(one["role"], "\n\n") for one in prompt)


def stop_tokens(folder: Path, tokenizer: Any) -> list[int]:
    """Token ids that end a response: the tokenizer's, and those of generation_config.json or else of config.json.

    Transformers and vLLM use generation_config.json alone if it exists. Here the end tokens of the model's config are
    used even if that file names none. Raises Unreadable if a file cannot be read.
    """
    file = folder / "generation_config.json"
    config = read_json(folder / "config.json")
    places = (read_json(file) if file.is_file() else {}, config, config.get("text_config") or {})
    listed = next((found for place in places if (found := place.get("eos_token_id")) is not None), None)
    ends = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    return sorted(end for end in ends if end is not None)
