"""The engine process of the reload test: `python -m flashrl_cli.doctor.reload_engine JOB.json`.

A tiny Qwen2 is loaded with dummy weights, as in training, and takes two policies in turn: A, B, and A again. Its
log-probs with B are compared with those of Transformers on the CPU in float32. Random weights of the usual size would
sample almost uniformly and hide a broken refit; these are large, so that the two policies differ by nats.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract
from flashrl_cli.precision import PRECISIONS, largest_block
from flashrl_cli.weights import Weights
from flashrl_cli.worker import engine, server

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

SEQUENCES, PROMPT, NEW = 16, 32, 16
"""Number of prompts, tokens per prompt, and tokens generated after each."""
VOCABULARY = 512
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
"""Shapes that every 8-bit kernel supports; heads have 64 dimensions."""
ROTATION = largest_block((SIZES["hidden_size"], SIZES["intermediate_size"]))
"""Block by which such a policy's inputs are rotated by default."""
SPREAD, EMBEDDING_SPREAD = 0.05, 0.1
"""Standard deviations of the weights of the layers and of the tied embedding; an untrained Qwen2 has 0.02.

With a larger embedding each token would predict itself, whatever the layers compute.
"""
MEMORY, KV_GIB = 0.05, 0.25
"""Fraction of the device's memory that must be free, and GiB of the KV cache."""

Answer = dict[str, list[Any]]


def serve(job: dict[str, Any], orders: server.Orders, emit: server.Emit) -> None:
    """Answer the only order with the measurements at the job's precision."""
    next(orders)
    precision, folder = job["precision"], Path(job["work"])
    started = time.perf_counter()
    models = {name: policy(folder / name, seed) for seed, name in enumerate("AB")}
    llm = start(folder / "A", precision)
    seconds = time.perf_counter() - started
    emit("done", result={"start_s": round(seconds, 1), **measure(llm, folder, models)})


def policy(folder: Path, seed: int) -> Qwen2ForCausalLM:
    """Write a random policy in bf16 to `folder`, and return it in float32."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=2, tie_word_embeddings=True, **SIZES)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = EMBEDDING_SPREAD if "embed" in name else SPREAD
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator) + ("norm" in name))
    model.to(torch.bfloat16).save_pretrained(folder)
    return model.float().eval()


def start(folder: Path, precision: str) -> Any:
    """An engine for the architecture in `folder`; on CUDA with graphs for decoding, which must survive a refit."""
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, SEQUENCES]}
    memory = {"gpu_memory_utilization": MEMORY}
    return engine.start(
        str(folder),
        quantization=PRECISIONS[precision].method,
        worker_extension_cls=contract.EVAL_EXTENSION,
        max_model_len=PROMPT + NEW,
        max_num_seqs=SEQUENCES,
        enable_prefix_caching=False,
        kv_memory=KV_GIB,
        on_cpu=memory,
        on_gpu={**memory, "compilation_config": graphs},
    )


def measure(llm: Any, folder: Path, models: dict[str, Qwen2ForCausalLM]) -> dict[str, Any]:
    """The engine's handshake after three refits, and the differences of its log-probs from those of Transformers.

    Differences are mean absolute values in nats, separately for prompt tokens and generated tokens.
    """
    holds, answers = [], []
    for name in "ABA":
        holds.append(engine.refit(llm, Weights(hf=folder / name).plain()))
        answers.append(answer(llm))
    found, rows = answers[1]["logprobs"], answers[1]["tokens"]
    old, new = (truth(models[name], rows) for name in "AB")
    return {
        "holds": holds[-1],
        "change": mean_difference(old, new),
        "read_error": mean_difference(_part(found, 0, PROMPT - 1), _part(new, 0, PROMPT - 1)),
        "made_error": mean_difference(_part(found, PROMPT - 1, None), _part(new, PROMPT - 1, None)),
        "returns": answers[0] == answers[2],
    }


def answer(llm: Any) -> Answer:
    """Token ids of each sequence (prompt and greedy response), and the log-probs of all tokens but the first."""
    from vllm import SamplingParams

    asked = SamplingParams(
        temperature=0.0, max_tokens=NEW, ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": row} for row in prompts()], asked, use_tqdm=False)
    tokens = [[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs]
    steps = [[*o.prompt_logprobs[1:], *o.outputs[0].logprobs] for o in outputs]
    pairs = [zip(row, step, strict=True) for row, step in zip((row[1:] for row in tokens), steps, strict=True)]
    return {"tokens": tokens, "logprobs": [[step[token].logprob for token, step in pair] for pair in pairs]}


def prompts() -> list[list[int]]:
    """Prompts of random tokens, the same at every call."""
    import torch

    rows: list[list[int]] = torch.randint(
        VOCABULARY, (SEQUENCES, PROMPT), generator=torch.Generator().manual_seed(2)
    ).tolist()
    return rows


def truth(model: Qwen2ForCausalLM, rows: list[list[int]]) -> list[list[float]]:
    """Log-probs of all tokens but the first, computed by Transformers."""
    import torch

    ids = torch.tensor(rows)
    with torch.no_grad():
        scores = model(ids).logits[:, :-1].log_softmax(-1)
    found: list[list[float]] = scores.gather(2, ids[:, 1:, None])[..., 0].tolist()
    return found


def mean_difference(left: list[list[float]], right: list[list[float]]) -> float:
    """Mean |left - right| over all tokens; NaN if any value is NaN."""
    pairs = [pair for rows in zip(left, right, strict=True) for pair in zip(*rows, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def _part(rows: list[list[float]], start_: int, end: int | None) -> list[list[float]]:
    return [row[start_:end] for row in rows]


if __name__ == "__main__":
    server.run(serve)
