"""The process of one engine: `python -m flashrl_cli.bench.engine JOB.json` measures what the orders on its stdin ask for.

One vLLM engine under measurement, set up as a rollout of RL is: log-probs of what was sampled, no text, no prefix cache.

Imported in the engine process only.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashrl_cli.bench.job import EngineJob, Samples
from flashrl_cli.errors import EnvironmentNotReady, FlashrlError, InputError, RunFailed
from flashrl_cli.evals.generate import CPU_MEMORY, stop_tokens, tokenizer_of
from flashrl_cli.weights import Unreadable
from flashrl_cli.worker import server

BATCHED_TOKENS = 16384
"""Tokens that a step on a GPU computes at most; vLLM's default depends on the GPU."""
_WARM_UP = 24
"""Tokens a response to warm up."""
Advance = Callable[[str], None]


class Rollout:
    """The engine of a job, with its weights in it.

    Raises InputError for prompts that leave no room, Unreadable for weights or a tokenizer that cannot be read.
    """

    def __init__(self, job: EngineJob) -> None:
        self._job = job
        self._folder = Path(job.model)
        self._prompts = list(self._tokenized(job.questions)) if job.questions else []
        limit = self._limit()
        started = time.perf_counter()
        from vllm import LLM

        imported = time.perf_counter()
        self._llm = LLM(
            model=job.model,
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype="bfloat16",
            load_format="dummy",
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=False,
            disable_log_stats=True,
            tensor_parallel_size=job.options.tensor_parallel,
            max_num_seqs=job.options.max_num_seqs,
            max_model_len=limit,
            **_platform_options(job, limit),
            **job.arguments,
        )
        self.import_s, self.start_s = imported - started, time.perf_counter() - imported
        self._fill()

    def facts(self) -> dict[str, Any]:
        """What the engine is: seconds to import and to start it, tokens of its KV cache, and by GPU its weights' bytes and handshake."""
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
        """Output tokens a second, end to end, of `batch` random prompts at once; `prompt` and `response` are tokens of each.

        FIT takes as many as the KV cache holds whole. Where all run at once, decoding alone is told too: the first tokens' time is off.
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
        told = _decoding(batch * (response - 1), [one - prefill for one in seconds]) if batch <= fitting else {}
        return {
            "batch": batch,
            "tokens_s": statistics.median(values),
            "values": values,
            "prefill_s": round(prefill, 3),
            **told,
        }

    def _fitting(self, length: int) -> int:
        """Sequences of `length` tokens that the engine computes at once with all their keys and values, 1 at least."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        tokens = (cache.num_gpu_blocks or 0) * (cache.block_size or 0)
        return max(1, min(tokens // length, self._job.options.max_num_seqs))

    def refit(self, *, repeats: int) -> dict[str, Any]:
        """Seconds of refits with random weights, after which the engine holds those; of several GPUs the slowest counts."""
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
        """Write `samples` responses of at most `response` tokens, to the prompts in turn, with the log-probs that verl would get."""
        from vllm import SamplingParams

        prompts = [self._prompts[number % len(self._prompts)] for number in range(samples)]
        asked = SamplingParams(
            temperature=1.0,
            max_tokens=response,
            logprobs=0,
            detokenize=False,
            stop_token_ids=stop_tokens(self._folder, tokenizer_of(self._folder)),
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
        """Real weights from disk, random ones for a shape."""
        if self._job.weights is None:
            self._llm.collective_rpc("bench_fill")
            return
        for holds in self._llm.collective_rpc("load_from_disk", args=(self._job.weights,)):
            if "unreadable" in holds:
                raise Unreadable(holds["unreadable"])

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
        tokenizer = tokenizer_of(self._folder)
        for line in Path(questions).read_text(encoding="utf-8").splitlines():
            yield tokenizer.apply_chat_template(json.loads(line), add_generation_prompt=True, return_dict=False)

    def _limit(self) -> int:
        """Longest sequence: what the options say, or what the prompts need, so that no response is cut by it."""
        usual, most = self._job.options.max_model_len, self._job.longest
        needed = max(map(len, self._prompts)) + self._job.response if self._prompts else 0
        if most and needed > most:
            what = f"a prompt of --data and its response need {needed} tokens, the limit is {most}"
            raise InputError(what, hint="a smaller --response, or a larger --max-model-len if the model can take it")
        return max(usual, needed)


def _decoding(tokens: int, seconds: list[float]) -> dict[str, Any]:
    """Speed of decoding `tokens` in what is left of each repeat's seconds without the prefill; nothing where nothing is left to tell."""
    if not tokens or min(seconds) <= 0:
        return {}
    values = [round(tokens / one, 1) for one in seconds]
    return {"decode_tokens_s": statistics.median(values), "decode_values": values}


def _logprobs(output: Any) -> list[float]:
    return [row[token].logprob for row, token in zip(output.logprobs, output.token_ids, strict=True)]


def _platform_options(job: EngineJob, limit: int) -> dict[str, Any]:
    """Options of vLLM that depend on where it runs; on a CPU the KV cache's size is a variable of the environment."""
    from vllm.platforms import current_platform

    options = job.options
    if current_platform.is_cpu():
        return {"enforce_eager": options.enforce_eager, "gpu_memory_utilization": CPU_MEMORY}
    share, cache = options.gpu_memory_utilization, options.kv_memory
    return {
        "enforce_eager": options.enforce_eager,
        "max_num_batched_tokens": max(BATCHED_TOKENS, limit),
        **({} if share is None else {"gpu_memory_utilization": share}),
        **({} if cache is None else {"kv_cache_memory_bytes": int(cache * 2**30)}),
    }


def main() -> None:
    """Fulfil orders until stdin closes; the first one starts the engine."""
    orders, emit = server.begin()
    try:
        _serve(EngineJob.read(Path(sys.argv[1])), orders, emit)
    except Unreadable as error:
        server.end(emit, RunFailed(str(error)))
    except FlashrlError as error:
        server.end(emit, error)


def _serve(job: EngineJob, orders: server.Orders, emit: server.Emit) -> None:

    rollout: Rollout | None = None
    while True:
        asked = json.loads(orders.get())
        rollout = rollout or Rollout(job)
        emit("done", result=_fulfil(rollout, asked, emit))


def _fulfil(rollout: Rollout, asked: dict[str, Any], emit: server.Emit) -> dict[str, Any]:
    kind = asked.pop("kind")
    if kind == "start":
        return rollout.facts()
    if kind == "speed":
        return rollout.speed(**asked, advance=lambda note: emit("advance", note=note))
    return rollout.refit(**asked) if kind == "refit" else rollout.sample(**asked)


if __name__ == "__main__":
    main()
