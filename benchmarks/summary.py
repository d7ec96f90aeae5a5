"""The short tables of quantized rollouts, for the README and the pages, and what all tables are written with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flashrl_cli.text import GIB

Results = Callable[[str], dict[str, Any]]
"""A document of benchmarks/results by its name without `.json`. Raises FileNotFoundError."""


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A table whose first `words` columns are text and the others numbers."""
    rules = ["---"] * words + ["--:"] * (len(columns) - words)
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]]) + "\n"


def code(text: str) -> str:
    return f"`{text}`"


def speeds(one: dict[str, Any], *, bounds: bool) -> Iterator[str]:
    """Yield tokens per second at each batch size, with the speed-up over bf16 and, with `bounds`, its range."""
    for found in one["speed"]:
        up = found["speed_up"]
        left_open = f": {up['least']:.2f} to {up['greatest']:.2f}" if up and bounds else ""
        beside = f" ({up['value']:.2f}x{left_open})" if up else ""
        yield f"{found['tokens_s']:,.0f}{beside}"


def measured(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in document["variants"] if one["engine"]]


def headline(results: Results) -> str:
    """Speed, memory and mismatch of the README, each from the measurement that says most about it."""
    document = results("bench_7b_h200")
    kl = {run["rollout"]: f"{run['kl']:.4f}" for run in results("language_model")["runs"]}
    columns = [
        "rollout", "speed: output tokens/s", "memory: weights, room in the KV cache", "mismatch: KL to the trainer",
    ]  # fmt: skip
    rows = []
    for one in measured(document):
        if one["rollout"] not in {*kl, "int8+kv8"}:
            continue
        *_, fastest = speeds(one, bounds=False)
        engine = one["engine"]
        memory = f"{engine['weights_bytes'] / GIB:.1f} GiB, {engine['kv_tokens'] / 1e6:.1f} M tokens"
        rows.append([code(one["rollout"]), fastest, memory, kl.get(one["rollout"], "not measured")])
    return markdown(columns, rows) + f"\n{long_chains(results)}\n"


def speed(results: Results) -> str:
    """Speed, memory and refits at 7B, in short."""
    document = results("bench_7b_h200")
    batches = document["settings"]["batches"]
    columns = [
        "rollout", *(f"tok/s, {batch} sequences" for batch in batches), "weights, GiB", "KV cache, tokens", "refit, s",
    ]  # fmt: skip
    rows = []
    for one in measured(document):
        engine = one["engine"]
        sizes = [f"{engine['weights_bytes'] / GIB:.2f}", f"{engine['kv_tokens']:,}", f"{one['refit']['seconds']:.3f}"]
        rows.append([code(one["rollout"]), *speeds(one, bounds=False), *sizes])
    return markdown(columns, rows)


def in_short(results: Results) -> str:
    """One row for each question."""
    return markdown(["measured", "found", "file"], rows(results), words=3)


def rows(results: Results) -> list[list[str]]:
    """Question, answer, and the results that it is from."""
    return [list(row(results)) for row in (_runs, _refit, _update, _long, _compressor, _copy)]


def _runs(results: Results) -> tuple[str, str, str]:
    cases = [case for case in results("train_on_gpu")["cases"] if case["passed"]]
    kl = max(abs(step["kl"]) for case in cases for step in case["steps"])
    apart = min(step["prob_correlation"] for case in cases for step in case["steps"])
    names = ", ".join(f"`{case['case']}`" for case in cases)
    found = f"{names}: largest \\|KL\\| {kl:.4f}, correlation of the sampled tokens' probabilities at least {apart:.3f}"
    return "training runs of the tiny policy with TIS, on one and two GPUs", found, "`train_on_gpu`"


def _refit(results: Results) -> tuple[str, str, str]:
    points = {point["point"]: point.get("in place") for point in results("refit_gpu")["points"]}
    found = {kind: points[f"refit:32b:{kind}:bfloat16"] for kind in ("int8", "fp8")}
    seconds = " and ".join(f"{one['median_s']:.3f} s (`{kind}`)" for kind, one in found.items())
    beside = max(one["extra_gib"] for one in found.values())
    answer = f"{seconds}, {beside:.2f} GiB of extra memory"
    return "refit of a running engine at 32B, one H100", answer, "`refit_gpu`"


def _update(results: Results) -> tuple[str, str, str]:
    found = []
    for run in results("weight_update")["runs"]:
        medians = {point["variant"]: point["median_s"] for point in run["points"]}
        where = f"{run['world']} × {run['device'].split()[1]}"
        found.append(f"{where}: {medians['int8:bf16']:.2f} s, verl's own FP8 {medians['fp8-block:float32']:.2f} s")
    question = "a whole weight update at 7B (gather, transfer, refit) with `int8`"
    return question, "; ".join(found), "`weight_update`"


def _long(results: Results) -> tuple[str, str, str]:
    return "decoding long chains at 32B, one H200", _long_answer(results), "`bench_32b_long`"


def _long_answer(results: Results) -> str:
    document = results("bench_32b_long")
    found = {one["rollout"]: one["speed"][0] for one in document["variants"]}
    base, eight = found[document["base"]], found["int8+kv8"]
    faster = eight["decode_tokens_s"] / base["decode_tokens_s"]
    sequences = f"with {eight['batch']} sequences at once instead of {base['batch']}"
    return f"`int8+kv8` is {faster:.2f}x as fast as `bf16`, {sequences}"


def long_chains(results: Results) -> str:
    """The same as a sentence."""
    return (
        "Where memory bounds the batch, 8 bits gain more: in the middle of chains of 2k + 8k tokens at 32B on one "
        "H200,\n"
        f"decoding with {_long_answer(results)}."
    )


def _compressor(results: Results) -> tuple[str, str, str]:
    found = []
    for case in results("quantize_vs_llmcompressor")["cases"]:
        seconds = {tool: median["seconds"] for tool, median in case["medians"].items()}
        times = [seconds[tool] / seconds["flashrl"] for tool in ("oneshot", "model_free_ptq")]
        found.append(f"{case['scheme']} {times[0]:.1f}x and {times[1]:.1f}x as fast")
    question = "`flashrl quantize` compared with llmcompressor's `oneshot` and `model_free_ptq`, whole commands"
    return question, "; ".join(found), "`quantize_vs_llmcompressor`"


def _copy(results: Results) -> tuple[str, str, str]:
    found = {
        (case["scheme"], case["dtype"], case["cache"]): case["of_cp_core_s"]
        for case in results("quantize_disk")["cases"]
    }
    cold = [f"{scheme} {100 * found[scheme, 'bfloat16', 'cold']:.0f} %" for scheme in ("int8", "fp8")]
    warm = [f"{100 * found[scheme, 'bfloat16', 'warm']:.0f} %" for scheme in ("int8", "fp8")]
    answer = f"{', '.join(cold)}; {' and '.join(warm)} when the model is in the page cache"
    question = "speed of `flashrl quantize` relative to `cp`, bf16 weights from disk, imports left out, two cores"
    return question, answer, "`quantize_disk`"
