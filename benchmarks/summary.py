"""The table that says in short what was measured of quantized rollouts, a row for each question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Results = Callable[[str], dict[str, Any]]
"""A document of benchmarks/results by its name without `.json`. Raises FileNotFoundError."""


def rows(results: Results) -> list[list[str]]:
    """Question, answer, and the results that it is from."""
    return [list(row(results)) for row in (_runs, _refit, _update, _long, _compressor, _copy)]


def _runs(results: Results) -> tuple[str, str, str]:
    cases = [case for case in results("train_on_gpu")["cases"] if case["passed"]]
    kl = max(abs(step["kl"]) for case in cases for step in case["steps"])
    apart = min(step["prob_correlation"] for case in cases for step in case["steps"])
    names = ", ".join(f"`{case['case']}`" for case in cases)
    told = f"{names}: largest \\|KL\\| {kl:.4f}, probabilities of sampled tokens correlate by {apart:.3f} or more"
    return "runs of the tiny policy with TIS by verl, Ray and vLLM, on one and two GPUs", told, "`train_on_gpu`"


def _refit(results: Results) -> tuple[str, str, str]:
    points = {point["point"]: point.get("in place") for point in results("refit_gpu")["points"]}
    found = {kind: points[f"refit:32b:{kind}:bfloat16"] for kind in ("int8", "fp8")}
    told = " and ".join(f"{one['median_s']:.3f} s (`{kind}`)" for kind, one in found.items())
    beside = max(one["extra_gib"] for one in found.values())
    return "new weights in a running engine at 32B, H100", f"{told}, {beside:.2f} GiB beside the engine", "`refit_gpu`"


def _update(results: Results) -> tuple[str, str, str]:
    told = []
    for run in results("weight_update")["runs"]:
        found = {point["variant"]: point["median_s"] for point in run["points"]}
        where = f"{run['world']} × {run['device'].split()[1]}"
        told.append(f"{where}: {found['int8:bf16']:.2f} s, verl's own FP8 {found['fp8-block:float32']:.2f} s")
    question = "a whole weight update of verl at 7B (gather, transfer, refit), `int8`"
    return question, "; ".join(told), "`weight_update`"


def _long(results: Results) -> tuple[str, str, str]:
    document = results("bench_32b_long")
    found = {one["rollout"]: one["speed"][0] for one in document["variants"]}
    base, eight = found[document["base"]], found["int8+kv8"]
    faster = eight["decode_tokens_s"] / base["decode_tokens_s"]
    told = f"`int8+kv8` {faster:.2f}x of `bf16`, with {eight['batch']} sequences at once instead of {base['batch']}"
    return "decoding in the middle of chains of 2k + 8k tokens at 32B, H200", told, "`bench_32b_long`"


def _compressor(results: Results) -> tuple[str, str, str]:
    told = []
    for case in results("quantize_vs_llmcompressor")["cases"]:
        seconds = {tool: found["seconds"] for tool, found in case["medians"].items()}
        times = [seconds[tool] / seconds["flashrl"] for tool in ("oneshot", "model_free_ptq")]
        told.append(f"{case['scheme']} {times[0]:.1f}x and {times[1]:.1f}x")
    question = (
        "times that `flashrl quantize` is as fast as llmcompressor's `oneshot` and `model_free_ptq`, whole commands"
    )
    return question, "; ".join(told), "`quantize_vs_llmcompressor`"


def _copy(results: Results) -> tuple[str, str, str]:
    found = {
        (case["scheme"], case["dtype"], case["cache"]): case["of_cp_core_s"]
        for case in results("quantize_disk")["cases"]
    }
    told = [f"{scheme} {100 * found[scheme, 'bfloat16', 'cold']:.0f} %" for scheme in ("int8", "fp8")]
    warm = [f"{100 * found[scheme, 'bfloat16', 'warm']:.0f} %" for scheme in ("int8", "fp8")]
    answer = f"{', '.join(told)}; {' and '.join(warm)} with the model in memory already"
    return "its speed of `cp`'s, bf16 weights from the disk, without imports, two cores", answer, "`quantize_disk`"
