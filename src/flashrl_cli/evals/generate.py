"""Responses by vLLM: tokens in, tokens out, so that each checkpoint is read with its own tokenizer and chat template.

Imported in the engine process only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.evals.results import Response
from flashrl_cli.text import counted
from flashrl_cli.weights import Unreadable

if TYPE_CHECKING:
    from flashrl_cli.evals.job import Job
    from flashrl_cli.weights import Weights

Messages = list[dict[str, str]]
CPU_MEMORY = 0.2
"""Share of the machine's memory that vLLM's CPU worker insists on being free; the KV cache has its own size."""


class Spoilt(Unreadable):
    """Weights that turned out to be unreadable when some of them were in the engine already."""


class Generator:
    """One vLLM engine for the architecture of `job.start`, which takes the weights of checkpoints in place.

    `prompts` are all that will be asked: they say how long a sequence gets. Raises InputError before vLLM starts if one leaves no
    room for a response, Unreadable for a tokenizer that cannot be used.
    """

    def __init__(self, job: Job, prompts: Sequence[Messages]) -> None:
        from vllm import LLM

        self._job = job
        self._loaded: Weights | None = None
        self._tokenizer = tokenizer_of(job.start)
        self._requests = 0
        longest = max(len(self._tokens(prompt)) for prompt in prompts)
        self._limit = job.engine.max_model_len or _needed(job.start, longest + job.sampling.max_tokens)
        self._check_room(longest)
        # read by the plugins in this process and in those that vLLM starts
        os.environ[contract.ENV_ROLLOUT] = contract.RolloutOptions(profile=job.engine.profile).text()
        self._llm = LLM(
            model=str(job.start),
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype="bfloat16",
            load_format="auto" if job.quantized else "dummy",
            quantization=None if job.quantized else contract.METHODS.get(job.engine.rollout),
            worker_extension_cls=contract.EVAL_EXTENSION,
            max_model_len=self._limit,
            tensor_parallel_size=job.engine.tensor_parallel,
            seed=job.sampling.seed,
            **_platform_options(job),
        )

    def load(self, weights: Weights) -> dict[str, Any]:
        """Take `weights` and their tokenizer, unless they are held already; what the engine holds then (a contract.Handshake).

        Raises Unreadable for weights that cannot be read, and EnvironmentNotReady if they are not held in the precision asked for:
        what was not quantized must not pass for it.
        """
        if weights != self._loaded:
            self._tokenizer = tokenizer_of(weights.hf)
            self._holds = self._held() if self._job.quantized else self._refitted(weights)
            self._loaded = weights
        return self._holds

    def _held(self) -> dict[str, Any]:
        holds: dict[str, Any] = self._llm.collective_rpc("holds")[0]
        return {**holds, "precision": self._job.quantized}

    def _refitted(self, weights: Weights) -> dict[str, Any]:
        holds: dict[str, Any] = self._llm.collective_rpc("load_from_disk", args=(weights.plain(),))[0]
        if "unreadable" in holds:
            raise (Spoilt if holds["spoilt"] else Unreadable)(holds["unreadable"])
        asked = self._job.engine.rollout
        if holds["precision"] != asked:
            raise EnvironmentNotReady(f"asked for a rollout in {asked}, the engine holds {holds['precision']}")
        if bool(holds["smoothed"]) != bool(self._job.engine.profile):
            raise EnvironmentNotReady(
                f"the engine smoothed {counted(holds['smoothed'], 'tensor')}, profile: {self._job.engine.profile}"
            )
        if not self._llm.reset_prefix_cache():
            raise EnvironmentNotReady("vLLM kept its prefix cache, which belongs to the weights before")
        return holds

    def answer(self, prompts: Mapping[int, Messages]) -> Iterator[list[Response]]:
        """Samples of each of `prompts` (by number), as the prompts are finished.

        Raises InputError for a prompt that leaves no room for a response.
        """
        engine = self._llm.llm_engine
        stop = stop_tokens(self._loaded.hf if self._loaded else self._job.start, self._tokenizer)
        numbers: dict[str, int] = {}
        for number, prompt in prompts.items():
            tokens = self._tokens(prompt)
            self._check_room(len(tokens))
            self._requests += 1
            numbers[str(self._requests)] = number
            engine.add_request(str(self._requests), {"prompt_token_ids": tokens}, self._parameters(number, stop))
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    yield self._responses(numbers[output.request_id], output)

    def _check_room(self, tokens: int) -> None:
        if tokens >= self._limit:
            raise InputError(
                f"a prompt has {counted(tokens, 'token')}, the limit is {self._limit}", hint="a larger --max-model-len"
            )

    def _tokens(self, prompt: Messages) -> list[int]:
        tokens: list[int] = self._tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        return tokens

    def _parameters(self, number: int, stop: list[int]) -> Any:
        """Parameters of prompt `number`: a seed of its own makes its responses independent of the batch it is in."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = self._job.sampling
        return SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed + number * sampling.n if sampling.temperature else None,
            stop_token_ids=stop,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _responses(self, number: int, output: Any) -> list[Response]:
        samples = sorted(output.outputs, key=lambda sample: sample.index)
        return [
            Response(
                question=number,
                sample=place,
                response=self._tokenizer.decode(sample.token_ids, skip_special_tokens=True),
                tokens=len(sample.token_ids),
                cut=sample.finish_reason == "length",
            )
            for place, sample in enumerate(samples)
        ]


def _platform_options(job: Job) -> dict[str, Any]:
    """Options of vLLM that depend on where it runs."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        if job.engine.rollout == "fp8":
            raise EnvironmentNotReady("vLLM has no FP8 kernel for a CPU", hint="--rollout bf16 or int8")
        # a seeded request whose prompt is split fails on a CPU: "CPU Generator does not use offset"
        # (vllm/v1/worker/gpu_model_runner.py:3825, vLLM 0.28)
        return {"enforce_eager": True, "gpu_memory_utilization": CPU_MEMORY, "enable_chunked_prefill": False}
    share = job.engine.gpu_memory_utilization
    return {} if share is None else {"gpu_memory_utilization": share}


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


def stop_tokens(folder: Path, tokenizer: Any) -> list[int]:
    """Ids that end a response: the tokenizer's, and those of generation_config.json."""
    file = folder / "generation_config.json"
    listed = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    ends = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    return sorted(end for end in ends if end is not None)


def _needed(folder: Path, tokens: int) -> int:
    """`tokens`, or the longest that the model knows if that is less."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return min(tokens, int(config.get("max_position_embeddings", tokens)))
