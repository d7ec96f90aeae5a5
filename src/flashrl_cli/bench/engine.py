"""The process of one measured engine: `python -m flashrl_cli.bench.engine JOB.json`.

The engine is configured like a rollout engine in RL: it returns log-probs of sampled tokens but no text, and has no
prefix cache.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashrl_cli.bench.job import EngineJob, Samples
from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.worker import engine, server

BATCHED_TOKENS = 16384
"""Maximum number of tokens per step on a GPU; vLLM's default depends on the GPU."""
_WARM_UP = 24
"""Tokens per response of the warm-up."""
Advance = Callable[[str], None]


class Rollout:
    """The engine of a job, with its weights loaded.

    Raises InputError for prompts that leave no room for a response, and Unreadable for weights or a tokenizer that
    cannot be read.
    """

    def __init__(self, job: EngineJob) -> None:
        self._job = job
        self._folder = Path(job.model)
        self._prompts = list(self._tokenized(job.questions)) if job.questions else []
        limit = self._limit()
        options = job.options
        share = options.gpu_memory_utilization
        started = time.perf_counter()
        from vllm import LLM  # noqa: F401 - the duration of the import is reported separately

        imported = time.perf_counter()
        self._llm = engine.start(
            job.model,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=False,
            disable_log_stats=True,
            tensor_parallel_size=options.tensor_parallel,
            max_num_seqs=options.max_num_seqs,
            max_model_len=limit,
            kv_memory=options.kv_memory,
            on_cpu={"enforce_eager": options.enforce_eager},
            on_gpu={
                "enforce_eager": options.enforce_eager,
                "max_num_batched_tokens": max(BATCHED_TOKENS, limit),
                **({} if share is None else {"gpu_memory_utilization": share}),
            },
            **job.arguments,
        )
        self.import_s, self.start_s = imported - started, time.perf_counter() - imported
        self._fill()

    def facts(self) -> dict[str, Any]:
        """The engine's start-up times in seconds, tokens of KV cache, bytes of weights, and handshakes.

        Importing vLLM and starting the engine are timed separately.
        """
        cache = self._llm.llm_engine.vllm_config.cache_config
        workers = self._llm.collective_rpc("bench_facts")
        return {
            "import_s": round(self.import_s, 2),
            "start_s": round(self.start_s, 2),
            "kv_tokens": (cache.num_gpu_blocks or 0) * (cache.block_size or 0),
            "weights_bytes": max(worker["weights_bytes"] for worker in workers),
            "holds": [worker["holds"] for worker in workers],
        }

    def speed(self, *, batch: int, prompt: int, response: int, repeats: int, advance: Advance) -> dict[str, Any]:
        """End-to-end output tokens per second for `batch` random prompts at once.

        `prompt` and `response` are the tokens of each sequence. The batch FIT stands for as many sequences as fit
        completely into the KV cache. If all sequences run at once, the speed of decoding alone is also measured,
        without the time to the first tokens.
        """
        fitting = self._fitting(prompt + response)
        batch = batch or fitting
        self._seconds(batch, prompt, min(_WARM_UP, response), seed=repeats)
        prefill = self._seconds(batch, prompt, 1, seed=repeats)
        seconds, values = [], []
        for seed in range(repeats):
            seconds.append(self._seconds(batch, prompt, response, seed=seed))
            values.append(round(batch * response / seconds[-1], 1))
            advance(f"{values[-1]:,.0f} tokens/s")
        decoding = _decoding(batch * (response - 1), [one - prefill for one in seconds]) if batch <= fitting else {}
        return {
            "batch": batch,
            "tokens_s": statistics.median(values),
            "values": values,
            "prefill_s": round(prefill, 3),
            **decoding,
        }

    def _fitting(self, length: int) -> int:
        """Number of sequences of `length` tokens that the engine can run at once, at least 1.

        All their keys and values must fit into the KV cache, and vLLM's `max_num_seqs` limits their number.
        """
        cache = self._llm.llm_engine.vllm_config.cache_config
        tokens = (cache.num_gpu_blocks or 0) * (cache.block_size or 0)
        return max(1, min(tokens // length, self._job.options.max_num_seqs))

    def refit(self, *, repeats: int) -> dict[str, Any]:
        """Seconds of refits with random weights, which the engine then holds; of several GPUs the slowest counts."""
        ranks = self._llm.collective_rpc("bench_refit", args=(repeats, self._job.weights))
        values = [round(max(times), 4) for times in zip(*(rank["seconds"] for rank in ranks), strict=True)]
        extra = [rank["extra_bytes"] for rank in ranks if rank["extra_bytes"] is not None]
        return {
            "seconds": round(statistics.median(values), 4),
            "values": values,
            "extra_bytes": max(extra, default=None),
            "bytes": ranks[0]["bytes"],
            "buckets": ranks[0]["buckets"],
        }

    def sample(self, *, samples: int, response: int, out: str) -> dict[str, Any]:
        """Write `samples` responses of at most `response` tokens with their log-probs, using the prompts in turn."""
        from vllm import SamplingParams

        prompts = [self._prompts[number % len(self._prompts)] for number in range(samples)]
        asked = SamplingParams(
            temperature=1.0,
            max_tokens=response,
            logprobs=0,
            detokenize=False,
            stop_token_ids=engine.stop_tokens(self._folder, engine.tokenizer_of(self._folder)),
        )
        outputs = [one.outputs[0] for one in self._generate(prompts, asked)]
        found = Samples(
            prompts=prompts,
            responses=[list(output.token_ids) for output in outputs],
            logprobs=[_logprobs(output) for output in outputs],
        )
        found.write(Path(out))
        return {"tokens": sum(map(len, found.responses)), "sequences": samples}

    def _fill(self) -> None:
        """Load real weights from disk, or random ones for a shape."""
        if self._job.weights is None:
            self._llm.collective_rpc("bench_fill")
        else:
            engine.refit(self._llm, self._job.weights)

    def _seconds(self, batch: int, prompt: int, response: int, *, seed: int) -> float:
        import numpy as np
        from vllm import SamplingParams

        vocabulary = self._llm.llm_engine.vllm_config.model_config.get_vocab_size()
        rows = np.random.default_rng(seed).integers(0, vocabulary, (batch, prompt)).tolist()
        asked = SamplingParams(temperature=1.0, max_tokens=response, ignore_eos=True, logprobs=0, detokenize=False)
        begun = time.perf_counter()
        outputs = self._generate(rows, asked)
        seconds = time.perf_counter() - begun
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        if tokens != batch * response:
            raise EnvironmentNotReady(f"vLLM gave {tokens} tokens where {batch * response} were asked for")
        return seconds

    def _generate(self, prompts: list[list[int]], asked: Any) -> list[Any]:
        outputs: list[Any] = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False
        )
        return outputs

    def _tokenized(self, questions: str) -> Iterator[list[int]]:
        tokenizer = engine.tokenizer_of(self._folder)
        for line in Path(questions).read_text(encoding="utf-8").splitlines():
            yield engine.tokens_of(tokenizer, json.loads(line))

    def _limit(self) -> int:
        """Maximum length of a sequence: that of the options, or enough that no response to the prompts is cut off."""
        usual, most = self._job.options.max_model_len, self._job.longest
        needed = max(map(len, self._prompts)) + self._job.response if self._prompts else 0
        if most and needed > most:
            what = f"a prompt of --data and its response need {needed} tokens, the limit is {most}"
            raise InputError(what, hint="a smaller --response, or a larger --max-model-len if the model can take it")
        return max(usual, needed)


def _decoding(tokens: int, seconds: list[float]) -> dict[str, Any]:
    """Speed of decoding `tokens` in the seconds of each repeat without prefill; empty if no time is left."""
    if not tokens or min(seconds) <= 0:
        return {}
    values = [round(tokens / one, 1) for one in seconds]
    return {"decode_tokens_s": statistics.median(values), "decode_values": values}


def _logprobs(output: Any) -> list[float]:
    return [row[token].logprob for row, token in zip(output.logprobs, output.token_ids, strict=True)]


def serve(data: dict[str, Any], orders: server.Orders, emit: server.Emit) -> None:
    """Execute orders; the first one starts the engine."""
    rollout: Rollout | None = None
    for asked in orders:
        rollout = rollout or Rollout(EngineJob.of(data))
        emit("done", result=_fulfil(rollout, asked, emit))


def _fulfil(rollout: Rollout, asked: dict[str, Any], emit: server.Emit) -> dict[str, Any]:
    kind = asked.pop("kind")
    if kind == "start":
        return rollout.facts()
    if kind == "speed":
        return rollout.speed(**asked, advance=lambda note: emit("advance", note=note))
    return rollout.refit(**asked) if kind == "refit" else rollout.sample(**asked)


if __name__ == "__main__":
    server.run(serve)
