"""Responses by vLLM: tokens in, tokens out, so that each checkpoint is read with its own tokenizer and chat template.

Imported in the engine process only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract
from flashrl_cli.errors import EnvironmentNotReady, InputError

if TYPE_CHECKING:
    from flashrl_cli.evals.job import Job

Messages = list[dict[str, str]]
_CPU_MEMORY = 0.2
"""Share of the machine's memory that vLLM's CPU worker insists on being free; the KV cache has its own size."""


class Generator:
    """One vLLM engine, started on the weights of `folder`, which takes the weights of other folders in place."""

    def __init__(self, folder: Path, job: Job, prompts: list[Messages]) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        self._job, self._prompts = job, prompts
        longest = max(map(len, self._tokens(_tokenizer(folder))))
        limit = job.max_model_len or _needed(folder, longest + job.sampling.max_tokens)
        if longest >= limit:
            raise InputError(f"a prompt has {longest} tokens, the limit is {limit}", hint="a larger --max-model-len")
        on_cpu = current_platform.is_cpu()
        self._llm = LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype="bfloat16",
            quantization=contract.INT8_METHOD if job.rollout == "int8" else None,
            worker_extension_cls=contract.EVAL_EXTENSION,
            max_model_len=limit,
            enforce_eager=on_cpu,
            seed=job.sampling.seed,
            # a seeded request whose prompt is split fails on a CPU: "CPU Generator does not use offset"
            # (vllm/v1/worker/gpu_model_runner.py:3825, vLLM 0.28)
            **({"gpu_memory_utilization": _CPU_MEMORY, "enable_chunked_prefill": False} if on_cpu else {}),
        )

    def load(self, folder: Path) -> dict[str, Any]:
        """Take the weights of `folder`; returns what the engine holds then (a contract.Handshake).

        Raises EnvironmentNotReady if that is not the precision asked for: what was not quantized must not pass for it.
        """
        holds: dict[str, Any] = self._llm.collective_rpc("load_folder", args=(str(folder),))[0]
        if holds["precision"] != self._job.rollout:
            raise EnvironmentNotReady(
                f"asked for a rollout in {self._job.rollout}, the engine holds {holds['precision']}"
            )
        if not self._llm.reset_prefix_cache():
            raise EnvironmentNotReady("vLLM kept its prefix cache, which belongs to the weights before")
        return holds

    def answer(self, folder: Path, advance: Callable[[int], None]) -> list[list[dict[str, Any]]]:
        """Responses, [prompt][sample], each with text, tokens (count) and whether it was cut at the limit."""
        tokenizer = _tokenizer(folder)
        stop = _stop_tokens(folder, tokenizer)
        prompts = [{"prompt_token_ids": tokens} for tokens in self._tokens(tokenizer)]
        parameters = [self._parameters(number, stop) for number in range(len(prompts))]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=_bar(advance))
        return [[_answer(tokenizer, sample) for sample in output.outputs] for output in outputs]

    def _tokens(self, tokenizer: Any) -> list[list[int]]:
        return [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in self._prompts]

    def _parameters(self, number: int, stop: list[int]) -> Any:
        """Parameters of prompt `number`: a seed of its own makes its responses independent of the batch it is in."""
        from vllm import SamplingParams

        sampling = self._job.sampling
        return SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed + number * sampling.n if sampling.temperature else None,
            stop_token_ids=stop,
            detokenize=False,
        )


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer in {folder} has no chat template", hint="add chat_template.jinja to the folder"
        )
    return tokenizer


def _stop_tokens(folder: Path, tokenizer: Any) -> list[int]:
    file = folder / "generation_config.json"
    listed = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    ends = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    return sorted(end for end in ends if end is not None)


def _needed(folder: Path, tokens: int) -> int:
    """`tokens`, or the longest that the model knows if that is less."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return min(tokens, int(config.get("max_position_embeddings", tokens)))


def _answer(tokenizer: Any, sample: Any) -> dict[str, Any]:
    text = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    return {"response": text, "tokens": len(sample.token_ids), "cut": sample.finish_reason == "length"}


def _bar(advance: Callable[[int], None]) -> type:
    """What vLLM takes for a progress bar: it draws nothing, and reports each finished prompt.

    vLLM calls `update(n)` once for each finished prompt, and iterates with the same class over prompts it adds.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def display(self, *_: object, **__: object) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            if self.iterable is None:
                advance(1)
            super().update(n)

    return Bar
