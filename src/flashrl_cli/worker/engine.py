"""The one place that starts a vLLM engine, and what all that hold one need: new weights, tokenizers and stop tokens.

Imported in worker processes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashrl_cli.weights import Unreadable, read_json

CPU_MEMORY = 0.2
"""Share of the machine's memory that vLLM's CPU worker insists on being free; the KV cache has its own size."""
Messages = list[dict[str, str]]


class Spoilt(Unreadable):
    """Weights that turned out to be unreadable when some of them were in the engine already."""


def start(model: str, *, on_cpu: Mapping[str, Any], on_gpu: Mapping[str, Any], **arguments: Any) -> Any:
    """vLLM's `LLM` for the HF folder `model`: bf16 activations, dummy weights, and tokens in and out instead of text.

    `arguments` are vLLM's, `on_cpu` and `on_gpu` those for one kind of machine; they win over what is usual here.
    """
    from vllm import LLM

    usual = {"dtype": "bfloat16", "load_format": "dummy", "skip_tokenizer_init": True}
    # a CPU has no graphs to capture
    cpu = {"enforce_eager": True, "gpu_memory_utilization": CPU_MEMORY, **on_cpu}
    return LLM(**{"model": model, **usual, **arguments, **(cpu if is_cpu() else on_gpu)})


def is_cpu() -> bool:
    """Whether vLLM computes on the CPU here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def refit(llm: Any, source: Mapping[str, Any]) -> dict[str, Any]:
    """Have all ranks read `source` (a Weights as plain data); the first's contract.Handshake, as plain data.

    Raises Unreadable for weights that no rank took, Spoilt if the engine holds no complete policy after that.
    """
    ranks: list[dict[str, Any]] = llm.collective_rpc("load_from_disk", args=(source,))
    failed = [rank for rank in ranks if "unreadable" in rank]
    if failed:
        untouched = len(failed) == len(ranks) and not any(rank["spoilt"] for rank in failed)
        raise (Unreadable if untouched else Spoilt)(failed[0]["unreadable"])
    return ranks[0]


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in an HF folder. Raises Unreadable if it cannot be read or has no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise Unreadable(f"no tokenizer that can be read in {folder}: {str(error).splitlines()[0]}") from error
    if not tokenizer.chat_template:
        raise Unreadable(f"the tokenizer in {folder} has no chat template (chat_template.jinja)")
    return tokenizer


def tokens_of(tokenizer: Any, prompt: Messages) -> list[int]:
    """Token ids of a prompt by a tokenizer's chat template, up to where the response begins."""
    tokens: list[int] = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    return tokens


def stop_tokens(folder: Path, tokenizer: Any) -> list[int]:
    """Ids that end a response: the tokenizer's, and those of generation_config.json or else of config.json.

    Raises Unreadable. Transformers and vLLM take the file as it is where there is one; what the model's config names as
    its ends is taken here even if the file names none.
    """
    file = folder / "generation_config.json"
    config = read_json(folder / "config.json")
    places = (read_json(file) if file.is_file() else {}, config, config.get("text_config") or {})
    listed = next((found for place in places if (found := place.get("eos_token_id")) is not None), None)
    ends = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    return sorted(end for end in ends if end is not None)
