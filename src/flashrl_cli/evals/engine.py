"""The engine process of an evaluation: `python -m flashrl_cli.evals.engine JOB.json`.

One vLLM engine serves all checkpoints of an architecture and loads their weights in place. It receives and returns
tokens, so that each checkpoint is used with its own tokenizer and chat template.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.evals import results
from flashrl_cli.evals.job import Job, Order
from flashrl_cli.evals.results import Response
from flashrl_cli.precision import ON_CPU, PRECISIONS, joined
from flashrl_cli.text import counted
from flashrl_cli.weights import Unreadable, Weights, read_json
from flashrl_cli.worker import engine, server

if TYPE_CHECKING:
    from flashrl_cli.evals.questions import Prompting


class Outgrown(Exception):
    """The running engine cannot answer for a checkpoint as an engine that starts with it would."""


@dataclass(frozen=True, slots=True)
class _Text:
    """A checkpoint's tokenizer, the ids that end a response, tokens of the longest prompt, the largest id of all.

    `how` says how prompts are made.
    """

    tokenizer: Any
    stop: list[int]
    longest: int
    largest: int
    how: Prompting

    @classmethod
    def of(cls, folder: Path, prompts: Sequence[engine.Messages], how: Prompting) -> _Text:
        """Read the tokenizer and its ids from an HF folder.

        Raises Unreadable, and InputError for a template in `how` that makes no prompts.
        """
        tokenizer = engine.tokenizer_of(folder, chat=how.chat_template is None)
        found = cls(tokenizer, engine.stop_tokens(folder, tokenizer), 0, 0, how)
        rows = [found.tokens_of(prompt) for prompt in prompts]
        largest = max((max(row, default=0) for row in rows), default=0)
        return replace(found, longest=max(map(len, rows)), largest=largest)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a response."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def tokens_of(self, prompt: engine.Messages) -> list[int]:
        """Token ids of a prompt up to the start of the response (`engine.tokens_of`)."""
        how = self.how
        return engine.tokens_of(self.tokenizer, prompt, chat_template=how.chat_template, arguments=how.arguments)


class Generator:
    """One vLLM engine for the architecture of `job.start`, which loads the weights of checkpoints in place.

    `prompts` are all prompts of the job, which determine the length of sequences. Raises InputError before vLLM starts
    if a prompt leaves no room for a response, Unreadable for a tokenizer that cannot be used or for incomplete
    quantized weights.
    """

    def __init__(self, job: Job, prompts: Sequence[engine.Messages]) -> None:
        self._job, self._prompts = job, prompts
        self._loaded: tuple[Weights, str] | None = None
        self._text = _Text.of(job.start, prompts, job.prompting)
        self._holds: dict[str, Any] = {}
        self._requests = 0
        self._limit = self._needed(job.start, self._text)
        self._check_room(self._text.longest)
        self._started_with = Weights(hf=job.start).fingerprint() if job.quantized else ""
        row = PRECISIONS[job.engine.rollout]
        if not row.cpu and engine.is_cpu():
            hint = f"--rollout {joined(ON_CPU, 'or')}"
            raise EnvironmentNotReady(f"vLLM has no {row.number_format} kernel for a CPU", hint=hint)
        # the plugins read this in this process and in those that vLLM starts
        self._options = contract.RolloutOptions(profile=job.engine.profile, rotation=job.engine.rotation)
        os.environ[contract.ENV_ROLLOUT] = self._options.text()
        share = job.engine.gpu_memory_utilization
        self._llm = engine.start(
            str(job.start),
            worker_extension_cls=contract.EVAL_EXTENSION,
            generation_config="vllm",
            load_format="auto" if job.quantized else "dummy",
            quantization=None if job.quantized else row.method,
            max_model_len=self._limit,
            tensor_parallel_size=job.engine.tensor_parallel,
            seed=job.sampling.seed,
            kv_memory=job.engine.kv_memory,
            # a seeded request whose prompt is split fails on a CPU: "CPU Generator does not use offset"
            # (vllm/v1/worker/gpu_model_runner.py:3825, vLLM 0.28)
            on_cpu={"enable_chunked_prefill": False},
            on_gpu={} if share is None else {"gpu_memory_utilization": share},
        )

    def load(self, weights: Weights) -> dict[str, Any]:
        """Load `weights` with their tokenizer and stop tokens, unless loaded already; returns the contract.Handshake.

        Raises Unreadable for weights that cannot be read or a tokenizer that does not fit them, Spoilt if the engine
        holds no valid policy afterwards, Outgrown if another engine must answer for them, and EnvironmentNotReady if
        the engine does not hold them in the requested precision: results without quantization must not count as
        quantized.
        """
        if self._is_held(weights):
            return self._holds
        # compared by content: a run that starts over writes other weights to the same path
        content = weights.fingerprint()
        text = _Text.of(weights.hf, self._prompts, self._job.prompting)
        if self._needed(weights.hf, text) > self._limit or (self._job.quantized and content != self._started_with):
            raise Outgrown
        self._check_vocabulary(weights.hf, text)
        self._holds = self._held() if self._job.quantized else self._refitted(weights)
        self._loaded, self._text = (weights, content), text
        return self._holds

    def _is_held(self, weights: Weights) -> bool:
        if self._loaded is None or self._loaded[0] != weights:
            return False
        try:
            return self._loaded[1] == weights.fingerprint()
        except (Unreadable, OSError):  # the weights were removed after they were loaded
            return True

    def _check_vocabulary(self, folder: Path, text: _Text) -> None:
        size = self._llm.llm_engine.vllm_config.model_config.get_vocab_size()
        if text.largest >= size:
            what = f"the tokenizer in {folder} gives token {text.largest}, the model has tokens up to {size - 1}"
            raise Unreadable(what)

    def _held(self) -> dict[str, Any]:
        holds: dict[str, Any] = self._llm.collective_rpc("holds")[0]
        return {**holds, "precision": self._job.quantized}

    def _refitted(self, weights: Weights) -> dict[str, Any]:
        holds = engine.refit(self._llm, weights.plain())
        asked = self._job.engine.rollout
        if holds["precision"] != asked:
            raise EnvironmentNotReady(f"asked for a rollout in {asked}, the engine holds {holds['precision']}")
        if bool(holds["smoothed"]) != bool(self._job.engine.profile):
            raise EnvironmentNotReady(
                f"the engine smoothed {counted(holds['smoothed'], 'tensor')}, profile: {self._job.engine.profile}"
            )
        rotation = self._options.asked_rotation
        if PRECISIONS[asked].rotates and rotation not in {holds["rotation"], contract.AUTO}:
            raise EnvironmentNotReady(
                f"asked for a rotation by blocks of {rotation}, the engine has {holds['rotation']}"
            )
        if not self._llm.reset_prefix_cache():
            raise EnvironmentNotReady("vLLM kept its prefix cache, which belongs to the weights before")
        return holds

    def answer(self, prompts: Mapping[int, engine.Messages]) -> Iterator[list[Response]]:
        """Yield the samples of each of `prompts` (by number) as soon as a prompt is finished.

        Raises InputError for a prompt that leaves no room for a response.
        """
        running = self._llm.llm_engine
        if self._job.sampling.stop:
            # vLLM looks for stop texts in what it decodes, and it started without a tokenizer: each checkpoint has its
            # own (`OutputProcessor.add_request`, vllm/v1/engine/output_processor.py)
            running.output_processor.tokenizer = self._text.tokenizer
        numbers: dict[str, int] = {}
        for number, prompt in prompts.items():
            tokens = self._text.tokens_of(prompt)
            self._check_room(len(tokens))
            self._requests += 1
            numbers[str(self._requests)] = number
            running.add_request(str(self._requests), {"prompt_token_ids": tokens}, self._parameters(number))
        while running.has_unfinished_requests():
            for output in running.step():
                if output.finished:
                    yield self._responses(numbers[output.request_id], output)

    def _check_room(self, tokens: int) -> None:
        if tokens >= self._limit:
            raise InputError(
                f"a prompt has {counted(tokens, 'token')}, the limit is {self._limit}", hint="a larger --max-model-len"
            )

    def _needed(self, folder: Path, text: _Text) -> int:
        """Length of the longest sequence in tokens: as requested, or what the prompts need if the model allows it."""
        if self._job.engine.max_model_len:
            return self._job.engine.max_model_len
        needed = text.longest + self._job.sampling.max_tokens
        return min(needed, int(read_json(folder / "config.json").get("max_position_embeddings", needed)))

    def _parameters(self, number: int) -> Any:
        """Sampling parameters of prompt `number`; its own seed makes responses independent of the batch."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = self._job.sampling
        return SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed + number * sampling.n if sampling.temperature else None,
            # vLLM's own are those of the folder that the engine started with, whichever weights it holds
            # (`update_from_generation_config`, vllm/sampling_params.py)
            ignore_eos=True,
            stop_token_ids=self._text.stop,
            detokenize=bool(sampling.stop),
            stop=list(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _responses(self, number: int, output: Any) -> list[Response]:
        samples = sorted(output.outputs, key=lambda sample: sample.index)
        return [
            Response(
                question=number,
                sample=place,
                response=_before(self._job.sampling.stop, self._text.decode(sample.token_ids)),
                tokens=len(sample.token_ids),
                cut=sample.finish_reason == "length",
            )
            for place, sample in enumerate(samples)
        ]


def serve(data: dict[str, Any], orders: server.Orders, emit: server.Emit) -> None:
    """Process orders until one has spoilt the engine or needs another engine."""
    job = Job.of(data)
    emit("stage", text="starting the vLLM engine")
    prompts = [_prompts(job.questions(number)) for number in range(job.data_sets)]
    generator: Generator | None = None
    for order in map(Order.of, orders):
        try:
            generator = generator or Generator(job, [prompt for one in prompts for prompt in one])
            _fulfil(order, generator, prompts[order.data], emit)
        except Outgrown:
            emit("restart")
            return
        except Unreadable as error:
            ends = generator is None or isinstance(error, engine.Spoilt)
            emit("skipped", reason=str(error), ends=ends)
            if ends:
                return


def _fulfil(order: Order, generator: Generator, prompts: list[Any], emit: server.Emit) -> None:
    started = time.perf_counter()
    emit("loaded", holds=generator.load(order.weights))
    for samples in generator.answer({number: prompts[number] for number in order.questions}):
        results.append(order.answers, samples)
        emit("advance", prompts=1, tokens=sum(sample.tokens for sample in samples))
    emit("done", seconds=round(time.perf_counter() - started, 3))


def _before(stop: Sequence[str], response: str) -> str:
    """The part of a response before the first of the texts `stop` in it."""
    return response[: min((place for text in stop if (place := response.find(text)) >= 0), default=None)]


def _prompts(file: Path) -> list[engine.Messages]:
    with file.open(encoding="utf-8") as stream:
        return [json.loads(line)["prompt"] for line in stream]


if __name__ == "__main__":
    server.run(serve)
