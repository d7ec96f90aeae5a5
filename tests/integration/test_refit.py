"""Refits of a real vLLM engine with a trained policy: what the engine computes afterwards is what the weights say.

A random policy would hide a broken refit: all engines then sample about uniformly.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.data import arith
from tests.integration.conftest import PATIENCE_S, Workshop

SUMS = arith.pairs(0)["test"][:32]
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def variants(source: Path, out: Path, *, tied: bool) -> dict[str, Path]:
    """Two policies that know sums, A and B: the trained one, and the same with every weight changed by about 5 %."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    trained = Qwen2ForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = Qwen2Config.from_pretrained(source, tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(0)
    folders = {}
    for name, change in (("A", 0.0), ("B", 0.05)):
        model = Qwen2ForCausalLM(config)
        model.load_state_dict(trained.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + change * torch.randn(parameter.shape, generator=generator))
        folders[name] = out / name
        model.to(torch.bfloat16).save_pretrained(folders[name])
        AutoTokenizer.from_pretrained(source).save_pretrained(folders[name])
    return folders


def sequences(tokenizer: Any) -> tuple[list[list[int]], int]:
    """Worked sums as token ids; log-probs from the last prompt token on belong to the answer (at least that many)."""
    texts = [(PROMPT.format(arith.question(*pair)), arith.solution(*pair)) for pair in SUMS]
    return [tokenizer(prompt + answer).input_ids for prompt, answer in texts], min(len(answer) for _, answer in texts)


def independent(
    folder: Path, rows: list[list[int]], dtype: str = "float32", *, int8: bool = False
) -> list[list[float]]:
    """The same log-probs by Transformers, one sequence at a time; `int8` rounds weights and inputs of the layers to 8
    bits.
    """
    import torch
    from transformers import Qwen2ForCausalLM

    from tests.integration.test_smoothing import by_row

    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    for name, module in model.named_modules():
        if int8 and name.endswith("_proj"):
            module.weight.data = by_row(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs: (by_row(inputs[0]),))
    out = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            scores = model(ids).logits[0, :-1].float().log_softmax(-1)
            out.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return out


def answers(logprobs: list[list[float]], length: int) -> list[float]:
    """The log-probs of the answers, flat: the policy knows those, while a prompt's numbers are anyone's guess."""
    return [value for row in logprobs for value in row[-length:]]


def mean_difference(left: list[float], right: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_refit_equals_a_fresh_engine(workshop: Workshop, tmp_path: Path, tied: bool) -> None:
    from transformers import AutoTokenizer

    folders = variants(workshop.root / "data" / "tiny" / "model", tmp_path, tied=tied)
    rows, length = sequences(AutoTokenizer.from_pretrained(folders["A"]))
    a, b = str(folders["A"]), str(folders["B"])
    job = {
        "out": str(tmp_path / "out.json"),
        "sequences": rows,
        "cases": {
            f"{precision} {how}": {"model": a if refits else b, "int8": precision == "int8", **case, "refits": refits}
            for precision in ("int8", "bf16")
            for how, case, refits in (
                ("fresh", {"load_format": "auto"}, []),
                ("refitted", {"load_format": "dummy"}, [a, b] * 5),
            )
        },
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("engine_logprobs.py")
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "FLASHRL_PLUGIN_DIR": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    subprocess.run([sys.executable, script, tmp_path / "job.json"], env=env, check=True, timeout=PATIENCE_S)
    results = json.loads((tmp_path / "out.json").read_text())
    other, wanted = (answers(independent(folders[name], rows), length) for name in ("A", "B"))
    noise = mean_difference(answers(independent(folders["B"], rows, "bfloat16"), length), wanted)
    loss = mean_difference(answers(independent(folders["B"], rows, int8=True), length), wanted)
    check(results, wanted, other, {"bf16": 5 * noise, "int8": 5 * (noise + loss)}, length)


def check(
    results: dict[str, Any], wanted: list[float], other: list[float], tolerances: dict[str, float], length: int
) -> None:
    """Refits equal fresh engines bit for bit; all are near the independent computation, and nearer to B than to A.

    How near is what bf16 and 8 bits change in that computation: a few times that is another order of sums, and not
    other weights.
    """
    assert sum(wanted) / len(wanted) > -math.log(259) / 2, "the policy must know sums, or this test proves nothing"
    for precision, tolerance in tolerances.items():
        fresh = results[f"{precision} fresh"]["logprobs"]
        assert results[f"{precision} refitted"]["after two"] == fresh
        assert results[f"{precision} refitted"]["logprobs"] == fresh, "after ten"
        got = answers(fresh, length)
        assert all(map(math.isfinite, got))
        assert mean_difference(got, wanted) < tolerance
        assert mean_difference(got, wanted) < mean_difference(got, other)
    int8, bf16 = (answers(results[f"{p} fresh"]["logprobs"], length) for p in ("int8", "bf16"))
    assert 0 < mean_difference(int8, bf16) < sum(tolerances.values()), "INT8 must differ from bf16, but little"
    assert {handshake["precision"] for handshake in results["int8 refitted"]["holds"]} == {"int8"}
    assert {handshake["quantized_layers"] for handshake in results["int8 refitted"]["holds"]} == {8}
    assert {handshake["rotation"] for handshake in results["int8 refitted"]["holds"]} == {128}
    assert {handshake["precision"] for handshake in results["bf16 refitted"]["holds"]} == {"bf16"}
