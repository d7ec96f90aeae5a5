"""What one engine answers with several values of `stream_interval`, and in how many messages.

Usage: JOB.json; writes its "out" file. The engine shares this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so that the
option can change while it runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def requests(tokenizer: Any) -> list[Any]:
    """Greedy sampling (vLLM's CPU build ignores seeds) that ends in all ways: by length, end, token or string."""
    from vllm import SamplingParams

    common: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
    ids: dict[str, Any] = {**common, "logprobs": 0, "flat_logprobs": True, "detokenize": False}
    digits = list("0123456789")
    tokens = [tokenizer.encode(digit, add_special_tokens=False)[0] for digit in digits]
    return [
        *(SamplingParams(**{**ids, "max_tokens": length}, ignore_eos=True) for length in (1, 2, 4, 5, 16, 17, 40)),
        *(SamplingParams(**ids) for _ in range(3)),
        *(SamplingParams(**ids, stop_token_ids=tokens, min_tokens=least) for least in (0, 3, 7)),
        *(SamplingParams(**common, ignore_eos=True, stop=digits, min_tokens=least) for least in (0, 3, 7)),
        SamplingParams(**common, ignore_eos=True, stop=digits, include_stop_str_in_output=True, logprobs=0),
        SamplingParams(**common, ignore_eos=True),
        SamplingParams(**common, prompt_logprobs=0, logprobs=2),
    ]


def answers(engine: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    engine.reset_prefix_cache()
    asked = requests(engine.get_tokenizer())
    given = [{"prompt_token_ids": prompts[number % len(prompts)]} for number in range(len(asked))]
    found = []
    for output in engine.generate(given, asked, use_tqdm=False):
        (sample,) = output.outputs
        rows = [sorted((token, one.logprob) for token, one in row.items()) for row in sample.logprobs or ()]
        prompt = [
            row and sorted((token, one.logprob) for token, one in row.items()) for row in output.prompt_logprobs or ()
        ]
        found.append(
            {
                "tokens": list(sample.token_ids),
                "logprobs": rows,
                "prompt": prompt,
                "text": sample.text,
                "ended": [sample.finish_reason, sample.stop_reason],
                "cached": output.num_cached_tokens,
            }
        )
    return found


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers and numbers of messages for each value of the option."""
    from vllm import LLM

    engine = LLM(
        model=job["model"], dtype="bfloat16", enforce_eager=True, max_model_len=128, max_num_seqs=16, stream_interval=2
    )
    processor = engine.llm_engine.output_processor
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    process, messages = processor.process_outputs, [0]

    def counted(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        messages[0] += len(outputs)
        return process(outputs, *args, **kwargs)

    processor.process_outputs = counted
    results = []
    for interval in job["intervals"]:
        scheduler.scheduler_config.stream_interval = interval
        messages[0] = 0
        results.append({"answers": answers(engine, job["prompts"]), "messages": messages[0]})
    return results


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(asked["out"]).write_text(json.dumps(run(asked)), encoding="utf-8")
