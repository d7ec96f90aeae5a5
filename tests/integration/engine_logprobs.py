"""Log-probs of given tokens from a vLLM engine, after each of a list of refits.

Usage: JOB.json; writes its "out" file.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


def logprobs(engine: Any, sequences: list[list[int]]) -> list[list[float]]:
    """Natural log-probs of each token but the first, given those before it."""
    from vllm import SamplingParams

    # a cached prefix would answer with the weights that filled it
    engine.reset_prefix_cache()
    prompts = [{"prompt_token_ids": tokens} for tokens in sequences]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    return [
        [row[token].logprob for row, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)]
        for output, tokens in zip(outputs, sequences, strict=True)
    ]


def run(case: dict[str, Any], sequences: list[list[int]]) -> dict[str, Any]:
    """Log-probs after the second and the last refit of one case, and what the engine holds."""
    from vllm import LLM

    from flashrl_cli.contract import EVAL_EXTENSION
    from flashrl_cli.precision import INT8
    from flashrl_cli.weights import Weights

    engine = LLM(
        model=case["model"],
        quantization=INT8.method if case["int8"] else None,
        load_format=case["load_format"],
        worker_extension_cls=EVAL_EXTENSION,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=64,
        gpu_memory_utilization=0.1,
    )
    sources = [Weights(hf=Path(folder)).plain() for folder in case["refits"]]
    holds = [engine.collective_rpc("load_from_disk", args=(source,))[0] for source in sources[:2]]
    after_two = logprobs(engine, sequences)
    holds += [engine.collective_rpc("load_from_disk", args=(source,))[0] for source in sources[2:]]
    result = {"after two": after_two, "logprobs": logprobs(engine, sequences), "holds": holds}
    del engine
    gc.collect()
    return result


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    results = {name: run(case, job["sequences"]) for name, case in job["cases"].items()}
    Path(job["out"]).write_text(json.dumps(results), encoding="utf-8")
