"""Processor time that vLLM and verl spend on each token of a rollout beside the model, stock and as flashrl runs them.

    python -m benchmarks.front_end MODEL [--requests 1024] [--tokens 128] [--out benchmarks/results/front_end.json]

MODEL is a folder with a tokenizer. No engine is started: the outputs of an engine's steps are made up and pass through
vLLM's and verl's own code: the engine's process makes and packs them, the server's process unpacks them, takes them
apart, and gives ids and log-probs to the coroutines of the requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import platform
import random
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from flashrl_cli import contract, files

REPEATS = 3


class Stages(dict[str, float]):
    """Seconds of processor time by stage."""

    @contextlib.contextmanager
    def spend(self, stage: str) -> Iterator[None]:
        begun = time.process_time()
        yield
        self[stage] = self.get(stage, 0.0) + time.process_time() - begun


class Rollout:
    """Requests of `length` tokens each, sampled in as many steps, with `settings` of their SamplingParams."""

    def __init__(self, requests: int, length: int, settings: dict[str, Any]) -> None:
        import numpy as np
        from vllm import SamplingParams

        draw = random.Random(0)
        self.names = [f"{draw.getrandbits(160):040x}" for _ in range(requests)]
        self.ids = np.array([[draw.randrange(32, 127) for _ in self.names] for _ in range(length)], dtype=np.int32)
        self.asked = SamplingParams(max_tokens=length, logprobs=0, **settings)
        self.spent, self.sent = Stages(), 0

    def step(self, number: int) -> list[Any]:
        """What the engine's scheduler makes of a step's tokens and log-probs."""
        import numpy as np
        from vllm.v1.engine import EngineCoreOutput, FinishReason
        from vllm.v1.outputs import LogprobsLists

        ids, count = self.ids[number], len(self.names)
        logprobs: Any = np.full((count, 1), -number / 8, dtype=np.float32)
        arrays = LogprobsLists(ids[:, None], logprobs, np.ones(count, dtype=int))
        ended = FinishReason.LENGTH if number == len(self.ids) - 1 else None
        return [
            EngineCoreOutput(name, [token], new_logprobs=arrays.slice_request(row, 1), finish_reason=ended)
            for row, (name, token) in enumerate(zip(self.names, ids.tolist(), strict=True))
        ]

    def request(self, name: str) -> Any:
        from vllm.v1.engine import EngineCoreRequest

        return EngineCoreRequest(
            request_id=name, external_req_id=name, prompt_token_ids=[1] * 64, mm_features=None,
            sampling_params=self.asked, pooling_params=None, arrival_time=0.0, lora_request=None, cache_salt=None,
            data_parallel_rank=None,
        )  # fmt: skip

    async def answers(self, tokenizer: Any, interval: int) -> list[Any]:
        """Ids and log-probs of all requests, as verl's server gets them."""
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
        from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        from flashrl_cli.plugins.outputs import Keeper, carried

        keeper, running = Keeper(carried(EngineCoreOutput)), dict.fromkeys(self.names, Running(self.asked))
        encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
        processor = OutputProcessor(tokenizer, log_stats=False)
        tasks = []
        for name in self.names:
            collector = RequestOutputCollector(self.asked.output_kind, name)
            processor.add_request(self.request(name), None, None, 0, collector)
            tasks.append(asyncio.create_task(final(collector)))
        for number in range(len(self.ids)):
            with self.spent.spend("engine: outputs"):
                new = self.step(number)
            if interval > 1:
                with self.spent.spend("engine: keep"):
                    new = list(keeper.due(new, running, interval))
                    keeper.forget_all_but(running)
            if not new:
                continue
            with self.spent.spend("engine: pack"):
                message = [bytes(part) for part in encoder.encode(EngineCoreOutputs(outputs=new))]
            self.sent += sum(map(len, message))
            with self.spent.spend("server: unpack"):
                received = decoder.decode(message)
            with self.spent.spend("server: outputs"):
                processor.process_outputs(received.outputs, 0.0, None)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        with self.spent.spend("server: outputs"):
            return list(await asyncio.gather(*tasks))


class Running(NamedTuple):
    """A request that the scheduler has."""

    sampling_params: Any


async def final(collector: Any) -> tuple[list[int], list[float]]:
    """What verl's server does with the outputs of a request (vllm_async_server.py:672, 713 in 0.9.1)."""
    finished = False
    while not finished:
        output = collector.get_nowait() or await collector.get()
        finished = output.finished
    sample = output.outputs[0]
    tokens = list(sample.token_ids)
    return tokens, [row[tokens[number]].logprob for number, row in enumerate(sample.logprobs)]


def main() -> None:
    """Measure both ways in alternation, compare what they give, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/front_end.json"))
    args = parser.parse_args()
    import vllm
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(str(args.model))
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "stock": (1, {}),
        "flashrl": (contract.TOKENS_A_MESSAGE, {"detokenize": False, "flat_logprobs": True}),
    }
    least: dict[str, dict[str, float]] = {}
    sizes: dict[str, float] = {}
    given = {}
    every = args.requests * args.tokens
    for _ in range(REPEATS):
        for way, (interval, settings) in ways.items():
            rollout = Rollout(args.requests, args.tokens, settings)
            gc.collect()
            given[way] = asyncio.run(rollout.answers(tokenizer, interval))
            found = {stage: round(seconds / every * 1e6, 2) for stage, seconds in rollout.spent.items()}
            least[way] = min(found, least.get(way, found), key=lambda one: sum(one.values()))
            sizes[way] = round(rollout.sent / every, 1)
    if given["stock"] != given["flashrl"]:
        sys.exit("the two ways give different tokens or log-probs")
    result = {
        "tokenizer": type(tokenizer).__name__,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {"vllm": vllm.__version__, "verl": version("verl")},
        "requests": args.requests,
        "tokens": args.tokens,
        "us_a_token": least,
        "bytes_a_token": sizes,
    }
    files.write_json(args.out, result)
    print(json.dumps({key: result[key] for key in ("us_a_token", "bytes_a_token")}, indent=2))


if __name__ == "__main__":
    main()
