"""Responses by vLLM: tokens in, tokens out, so that each checkpoint is read with its own tokenizer and chat template.

Imported in the engine process only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.evals.results import Response
from flashrl_cli.precision import ON_CPU, PRECISIONS, joined
from flashrl_cli.text import counted
from flashrl_cli.weights import Unreadable, Weights, read_json

if TYPE_CHECKING:
    from flashrl_cli.evals.job import Job

Messages = list[dict[str, str]]
CPU_MEMORY = 0.2
"""Share of the machine's memory that vLLM's CPU worker insists on being free; the KV cache has its own size."""


class Spoilt(Unreadable):
    """Weights that turned out to be unreadable when some of them were in the engine already."""


class Outgrown(Exception):
    """A checkpoint that the running engine cannot answer for as an engine of its own would."""


@dataclass(frozen=True, slots=True)
class _Speech:
    """How a checkpoint is spoken to: its tokenizer, the tokens that end a response, and tokens of the longest prompt and in all of them."""

    tokenizer: Any
    stop: list[int]
    longest: int
    largest: int

    @classmethod
    def of(cls, folder: Path, prompts: Sequence[Messages]) -> _Speech:
        """That of an HF folder. Raises Unreadable."""
        tokenizer = tokenizer_of(folder)
        rows = [tokens_of(tokenizer, prompt) for prompt in prompts]
        largest = max((max(row, default=0) for row in rows), default=0)
        return cls(tokenizer, stop_tokens(folder, tokenizer), max(map(len, rows)), largest)


class Generator:
    """One vLLM engine for the architecture of `job.start`, which takes the weights of checkpoints in place.

    `prompts` are all that will be asked: they say how long a sequence gets. Raises InputError before vLLM starts if one leaves no
    room for a response, Unreadable for a tokenizer that cannot be used or quantized weights that are not complete.
    """

    def __init__(self, job: Job, prompts: Sequence[Messages]) -> None:
        from vllm import LLM

        self._job, self._prompts = job, prompts
        self._loaded: tuple[Weights, str] | None = None
        self._speech = _Speech.of(job.start, prompts)
        self._holds: dict[str, Any] = {}
        self._requests = 0
        self._limit = self._needed(job.start, self._speech)
        self._check_room(self._speech.longest)
        self._started_with = Weights(hf=job.start).fingerprint() if job.quantized else ""
        # read by the plugins in this process and in those that vLLM starts
        os.environ[contract.ENV_ROLLOUT] = contract.RolloutOptions(profile=job.engine.profile).text()
        self._llm = LLM(
            model=str(job.start),
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype="bfloat16",
            load_format="auto" if job.quantized else "dummy",
            quantization=None if job.quantized else PRECISIONS[job.engine.rollout].method,
            worker_extension_cls=contract.EVAL_EXTENSION,
            max_model_len=self._limit,
            tensor_parallel_size=job.engine.tensor_parallel,
            seed=job.sampling.seed,
            **_platform_options(job),
        )

    def load(self, weights: Weights) -> dict[str, Any]:
        """Take `weights`, their tokenizer and stop tokens, unless held already; what the engine holds then (a contract.Handshake).

        Raises Unreadable for weights that cannot be read and a tokenizer that does not fit them, Spoilt if the engine holds no policy
        after that, Outgrown if another engine must answer for them, and EnvironmentNotReady if they are not held in the precision asked
        for: what was not quantized must not pass for it.
        """
        if self._is_held(weights):
            return self._holds
        # compared by content: a run that starts over writes other weights to the same place
        content = weights.fingerprint()
        speech = _Speech.of(weights.hf, self._prompts)
        if self._needed(weights.hf, speech) > self._limit or (self._job.quantized and content != self._started_with):
            raise Outgrown
        self._check_vocabulary(weights.hf, speech)
        self._holds = self._held() if self._job.quantized else self._refitted(weights)
        self._loaded, self._speech = (weights, content), speech
        return self._holds

    def _is_held(self, weights: Weights) -> bool:
        if self._loaded is None or self._loaded[0] != weights:
            return False
        try:
            return self._loaded[1] == weights.fingerprint()
        except (Unreadable, OSError):  # removed since it was loaded
            return True

    def _check_vocabulary(self, folder: Path, speech: _Speech) -> None:
        size = self._llm.llm_engine.vllm_config.model_config.get_vocab_size()
        if speech.largest >= size:
            what = f"the tokenizer in {folder} gives token {speech.largest}, the model has tokens up to {size - 1}"
            raise Unreadable(what)

    def _held(self) -> dict[str, Any]:
        holds: dict[str, Any] = self._llm.collective_rpc("holds")[0]
        return {**holds, "precision": self._job.quantized}

    def _refitted(self, weights: Weights) -> dict[str, Any]:
        ranks: list[dict[str, Any]] = self._llm.collective_rpc("load_from_disk", args=(weights.plain(),))
        failed = [rank for rank in ranks if "unreadable" in rank]
        if failed:
            untouched = len(failed) == len(ranks) and not any(rank["spoilt"] for rank in failed)
            raise (Unreadable if untouched else Spoilt)(failed[0]["unreadable"])
        holds = ranks[0]
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
        numbers: dict[str, int] = {}
        for number, prompt in prompts.items():
            tokens = tokens_of(self._speech.tokenizer, prompt)
            self._check_room(len(tokens))
            self._requests += 1
            numbers[str(self._requests)] = number
            engine.add_request(str(self._requests), {"prompt_token_ids": tokens}, self._parameters(number))
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    yield self._responses(numbers[output.request_id], output)

    def _check_room(self, tokens: int) -> None:
        if tokens >= self._limit:
            raise InputError(
                f"a prompt has {counted(tokens, 'token')}, the limit is {self._limit}", hint="a larger --max-model-len"
            )

    def _needed(self, folder: Path, speech: _Speech) -> int:
        """Tokens of the longest sequence: what is asked for, or what the prompts need if the model knows that many."""
        if self._job.engine.max_model_len:
            return self._job.engine.max_model_len
        needed = speech.longest + self._job.sampling.max_tokens
        return min(needed, int(read_json(folder / "config.json").get("max_position_embeddings", needed)))

    def _parameters(self, number: int) -> Any:
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
            # vLLM's own are those of the folder that the engine started with, whichever weights it holds
            # (`update_from_generation_config`, vllm/sampling_params.py)
            ignore_eos=True,
            stop_token_ids=self._speech.stop,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _responses(self, number: int, output: Any) -> list[Response]:
        samples = sorted(output.outputs, key=lambda sample: sample.index)
        return [
            Response(
                question=number,
                sample=place,
                response=self._speech.tokenizer.decode(sample.token_ids, skip_special_tokens=True),
                tokens=len(sample.token_ids),
                cut=sample.finish_reason == "length",
            )
            for place, sample in enumerate(samples)
        ]


def _platform_options(job: Job) -> dict[str, Any]:
    """Options of vLLM that depend on where it runs."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        row = PRECISIONS[job.engine.rollout]
        if not row.cpu:
            raise EnvironmentNotReady(
                f"vLLM has no {row.number} kernel for a CPU", hint=f"--rollout {joined(ON_CPU, 'or')}"
            )
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


def tokens_of(tokenizer: Any, prompt: Messages) -> list[int]:
    """A prompt in the words of a tokenizer's chat template, up to where the response begins."""
    tokens: list[int] = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    return tokens


def stop_tokens(folder: Path, tokenizer: Any) -> list[int]:
    """Ids that end a response: the tokenizer's, and those of generation_config.json or else of config.json. Raises Unreadable.

    Transformers and vLLM take the file as it is where there is one; what the model's config names as its ends is taken here even if
    the file names none.
    """
    file = folder / "generation_config.json"
    config = read_json(folder / "config.json")
    places = (read_json(file) if file.is_file() else {}, config, config.get("text_config") or {})
    listed = next((found for place in places if (found := place.get("eos_token_id")) is not None), None)
    ends = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    return sorted(end for end in ends if end is not None)
