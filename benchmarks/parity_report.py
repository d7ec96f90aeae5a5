"""What the runs of `benchmarks.parity` show: means with errors, differences with intervals, tables and pictures.

    python -m benchmarks.parity_report [--results benchmarks/results/parity.json] [--out docs]

Draws docs/parity-*.png; `make tables` writes the tables of docs/parity.md. Everything here is computed from the one
document. Accuracies and their differences are shares; tables show them in percent and percentage points.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.summary import Results, code, markdown

from flashrl_cli import files
from flashrl_cli.evals.stats import Estimate
from flashrl_cli.render import figure
from flashrl_cli.text import counted

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = "parity"
KINDS = ("greedy", "sampled")
GROUPS = ("usual", "hard")
LAST = 10
"""Steps at a run's end whose mean is its reward."""
LEVEL = 0.95
POWER = 0.8
"""Share of experiments that find the difference which is called the least to be found."""
CURVES = ("reward", "kl", "entropy", "response_length", "grad_norm", "truncated")
NOT_YET = "not measured yet"

Document = Mapping[str, Any]
Outcomes = Mapping[str, Mapping[int, float]]
"""A value of each run, by setting and seed."""


# Statistics


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; the error of a single value is not known."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def student(t: float, freedom: int) -> float:
    """Probability that the absolute value of a Student variable with `freedom` degrees is at most `t` ≥ 0.

    M. Abramowitz, I. Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, freedom, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def quantile(share: float, freedom: int) -> float:
    """The t that an absolute Student variable does not exceed with probability `share` in (0, 1)."""
    low, high = 0.0, 1.0
    while student(high, freedom) < share:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, freedom) < share else (low, middle)
    return high


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A setting's mean minus that of its group's bf16, over `seeds` that both have.

    `error` is the standard error with `freedom` degrees of freedom, from `lo` to `hi` is the 95 % interval, `least` the
    true difference that 80 % of such experiments would have found. None without an estimate of the noise.
    """

    value: float
    seeds: int
    error: float | None = None
    freedom: int = 0

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.error is None else quantile(LEVEL, self.freedom) * self.error

    @property
    def lo(self) -> float | None:
        return None if self.half is None else self.value - self.half

    @property
    def hi(self) -> float | None:
        return None if self.half is None else self.value + self.half

    @property
    def least(self) -> float | None:
        """Approximate: the sum of the two quantiles times the error (J. M. Bland, An Introduction to Medical
        Statistics, 2000, 18.2, with Student's t for the normal)."""
        if self.error is None:
            return None
        return (quantile(LEVEL, self.freedom) + quantile(2 * POWER - 1, self.freedom)) * self.error

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes 0."""
        return self.half is not None and abs(self.value) > self.half


def differences(outcomes: Outcomes, base: str) -> dict[str, Difference]:
    """Each setting's difference to `base`, paired by seed, over the seeds that all settings with results share.

    Seeds share the order of the prompts and the policy that they begin with, so a seed is a block: the noise is what
    an additive model of setting and seed leaves, with (settings - 1)(seeds - 1) degrees of freedom (randomized blocks;
    G. W. Snedecor, W. G. Cochran, Statistical Methods, 1989, ch. 14), taken to be the same for all settings. With two
    settings this is the paired t-test.
    """
    held = {setting: by_seed for setting, by_seed in outcomes.items() if by_seed}
    if base not in held or len(held) < 2:
        return {}
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in held.values())))
    if not seeds:
        return {}
    table = [[by_seed[seed] for seed in seeds] for by_seed in held.values()]
    freedom = (len(table) - 1) * (len(seeds) - 1)
    error = math.sqrt(2 * _residual(table) / freedom / len(seeds)) if freedom else None
    means = {setting: statistics.fmean(by_seed[seed] for seed in seeds) for setting, by_seed in held.items()}
    return {
        setting: Difference(value=mean - means[base], seeds=len(seeds), error=error, freedom=freedom)
        for setting, mean in means.items()
        if setting != base
    }


def _residual(table: Sequence[Sequence[float]]) -> float:
    """Sum of squares that row and column means leave."""
    rows = [statistics.fmean(row) for row in table]
    columns = [statistics.fmean(column) for column in zip(*table, strict=True)]
    whole = statistics.fmean(rows)
    return sum(
        (value - rows[i] - columns[j] + whole) ** 2 for i, row in enumerate(table) for j, value in enumerate(row)
    )


# The document


def settings_of(document: Document, group: str) -> list[str]:
    """Names of a group's settings in order, the base of comparison first."""
    return [setting["name"] for setting in document["settings"] if setting["group"] == group]


def runs_of(document: Document, setting: str) -> list[Document]:
    """Runs of a setting that are trained and evaluated, by seed."""
    done = (run for run in document["runs"] if run["setting"] == setting and set(KINDS) <= set(run["evaluation"]))
    return sorted(done, key=lambda run: int(run["seed"]))


def failures(document: Document) -> list[Document]:
    """Runs that were given up."""
    return [run for run in document["runs"] if run.get("failed")]


def accuracies(document: Document, group: str, kind: str) -> dict[str, dict[int, float]]:
    return _outcomes(document, group, lambda run: float(run["evaluation"][kind]["accuracy"]))


def rewards(document: Document, group: str) -> dict[str, dict[int, float]]:
    """Mean reward of the last steps of each run, as its own rollout sampled them."""
    return _outcomes(document, group, lambda run: _mean(run, "reward", LAST) or 0.0)


def _outcomes(document: Document, group: str, value: Callable[[Document], float]) -> dict[str, dict[int, float]]:
    return {
        setting: {run["seed"]: value(run) for run in runs_of(document, setting)}
        for setting in settings_of(document, group)
    }


def _mean(run: Document, metric: str, last: int | None = None) -> float | None:
    values = [value for value in run["metrics"][metric][-(last or 0) :] if value is not None]
    return statistics.fmean(values) if values else None


def same_prompts(document: Document) -> list[str]:
    """Sentences on seeds whose runs did not see the same prompts, judged by the mean length of each step's prompts."""
    wrong = []
    for seed in sorted({run["seed"] for run in document["runs"]}):
        seen: dict[str, list[float | None]] = {}
        for run in document["runs"]:
            if run["seed"] == seed and run["metrics"]["step"]:
                seen[run["name"]] = run["metrics"]["prompt_length"]
        shortest = min(map(len, seen.values()), default=0)
        if len({tuple(lengths[:shortest]) for lengths in seen.values()}) > 1:
            wrong.append(f"The runs of seed {seed} did not see the same prompts in the same order.")
    return wrong


# Tables


def accuracy_table(results: Results) -> str:
    """Accuracy before and after each setting, mean and standard error over seeds, and the difference to bf16."""
    document = results(DOCUMENT)
    columns = [
        "setting", "runs", "reward at the end", "KL to the trainer", "greedy, %", "sampled, %",
        "sampled, difference to bf16, points",
    ]  # fmt: skip
    rows = [
        [name, "", "", "", *(_with_interval(base["evaluation"].get(kind)) for kind in KINDS), ""]
        for name, base in _bases(document)
    ]
    for group in GROUPS:
        base, *_ = settings_of(document, group)
        against = differences(accuracies(document, group, "sampled"), base)
        for setting in settings_of(document, group):
            done = runs_of(document, setting)
            if not done:
                rows.append([code(setting), "0", *[NOT_YET] * 5])
                continue
            cells = [_cell([_mean(run, "reward", LAST) for run in done], 1, 3)]
            cells.append(_cell([_mean(run, "kl") for run in done], 1, 4))
            cells += [_cell([run["evaluation"][kind]["accuracy"] for run in done], 100, 1) for kind in KINDS]
            rows.append([code(setting), str(len(done)), *cells, _points(against.get(setting), setting == base)])
    return markdown(columns, rows)


def _bases(document: Document) -> Iterator[tuple[str, Document]]:
    """The policies that the runs begin with: one, unless machines made different ones."""
    found = document["bases"]
    if not found:
        yield "before", {"evaluation": {}}
    for base in found:
        yield ("before" if len(found) == 1 else f"before ({base['fingerprint']})"), base


def _with_interval(found: Document | None) -> str:
    return f"{100 * found['accuracy']:.1f} ({100 * found['lo']:.1f} to {100 * found['hi']:.1f})" if found else NOT_YET


def _cell(values: Sequence[float | None], scale: float, digits: int) -> str:
    known = [scale * value for value in values if value is not None]
    if not known:
        return "–"
    mean, error = mean_and_error(known)
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _points(found: Difference | None, is_base: bool) -> str:
    if is_base:
        return "–"
    if found is None:
        return NOT_YET
    value = f"{100 * found.value:+.1f}"
    if found.lo is None or found.hi is None:
        return value
    return f"{value} ({100 * found.lo:+.1f} to {100 * found.hi:+.1f})"


def verdicts(results: Results) -> str:
    """What the accuracies support, one sentence for each setting, and what went wrong."""
    document = results(DOCUMENT)
    said = [*_sentences(document), *same_prompts(document)]
    said += [f"`{run['name']}` was given up after step {_last(run)}: {_first_line(run['failed'])}"
             for run in failures(document)]  # fmt: skip
    return "\n".join(_wrapped(sentence) for sentence in said) + "\n"


def _wrapped(sentence: str) -> str:
    """An item of a list, in lines of at most 120 columns."""
    return textwrap.fill(
        sentence, 120, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _sentences(document: Document) -> Iterator[str]:
    for group in GROUPS:
        base, *others = settings_of(document, group)
        sampled = accuracies(document, group, "sampled")
        if not sampled[base]:
            yield f"`{base}` was not measured yet, so nothing of its group can be compared."
            continue
        yield _learned(document, base, sampled[base])
        found = differences(sampled, base)
        for setting in others:
            yield (
                sentence(setting, base, found[setting]) if setting in found else f"`{setting}` was not measured yet."
            )


def _learned(document: Document, base: str, sampled: Mapping[int, float]) -> str:
    before = [one["evaluation"]["sampled"]["accuracy"] for one in document["bases"] if "sampled" in one["evaluation"]]
    mean, error = mean_and_error([100 * value for value in sampled.values()])
    after = f"{mean:.1f}" + ("" if error is None else f" ± {error:.1f}")
    if not before:
        return f"`{base}` answers {after} % of the sampled responses right after training; before was not measured."
    start = statistics.fmean(before)
    gain = mean - 100 * start
    learned = f"{abs(gain):.1f} points {'more' if gain > 0 else 'less'} than the {100 * start:.1f} % before"
    return f"`{base}` answers {after} % of the sampled responses right after training, {learned}."


def sentence(setting: str, base: str, found: Difference) -> str:
    """What a difference of sampled accuracies supports, whichever way it came out."""
    way = "above" if found.value > 0 else "below"
    size = f"`{setting}` is {100 * abs(found.value):.1f} points {way} `{base}`"
    if found.lo is None or found.hi is None or found.least is None:
        return f"{size} with {counted(found.seeds, 'seed')}, which says nothing about the noise."
    bounds = f"(95 % interval {100 * found.lo:+.1f} to {100 * found.hi:+.1f}, {counted(found.seeds, 'seed')})"
    if found.distinguishable:
        return f"{size} {bounds}: more than the seeds' noise explains."
    return (
        f"{size} {bounds}: not distinguishable. A true difference of {100 * found.least:.1f} points would have been "
        "found with a probability of 80 %; a smaller one may exist."
    )


def _last(run: Document) -> int:
    return max(run["metrics"]["step"], default=0)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300]


def conditions(results: Results) -> str:
    """With what the runs were made: model, sizes, machine, versions."""
    document = results(DOCUMENT)
    runs = [run for run in document["runs"] if run["metrics"]["step"]]
    if not runs:
        return "No run is recorded yet.\n"
    rows = []
    for group in GROUPS:
        base, *_ = settings_of(document, group)
        for run in runs_of(document, base)[:1]:
            asked = run["asked"]
            rows.append([code(base), code(asked["model"]), str(asked["steps"]), _sizes(run)])
    machines = sorted({_machine(run["machine"]) for run in runs})
    text = markdown(["setting", "model", "steps", "options beside the preset's"], rows, words=4) if rows else ""
    return text + "".join(f"\nOn {one}.\n" for one in machines)


def _sizes(run: Document) -> str:
    mine = [one for one in run["asked"]["sets"] if "seed" not in one]
    last = dict(one.split("=", 1) for one in mine)
    return ", ".join(code(f"{key}={value}") for key, value in last.items())


def _machine(machine: Document) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['device']}, {machine['cores']} cores: {versions}"


def seconds_table(results: Results) -> str:
    """Seconds of a step by phase, which runs that share a GPU lengthen for each other."""
    document = results(DOCUMENT)
    phases = [name for name in _metric_names(document) if name.startswith("seconds.")]
    columns = ["setting", "runs at once", "step, s", *(name.removeprefix("seconds.") for name in phases)]
    rows = []
    for group in GROUPS:
        for setting in settings_of(document, group):
            if done := runs_of(document, setting):
                at_once = sorted({str(run["at_once"]) for run in done})
                medians = [_median(done, name) for name in ("step_s", *phases)]
                rows.append([code(setting), ", ".join(at_once), *medians])
    return markdown(columns, rows) if rows else ""


def _metric_names(document: Document) -> list[str]:
    return list(dict.fromkeys(name for run in document["runs"] for name in run["metrics"]))


def _median(runs: Sequence[Document], name: str) -> str:
    values = [value for run in runs for value in run["metrics"][name][1:] if value is not None]
    return f"{statistics.median(values):.2f}" if values else "–"


def pictures(results: Results) -> str:
    """Links to the pictures that exist."""
    document = results(DOCUMENT)
    lines = []
    for group in GROUPS:
        if any(panels(document, group)):
            about = "all settings" if group == "usual" else "the settings in which the mismatch should hurt"
            lines.append(f"![Reward, KL, entropy and length by step: {about}](parity-{group}.png)\n")
    if any(run["evaluation"] for run in document["runs"]):
        lines.append("![Accuracy of every run with its interval](parity-accuracy.png)\n")
    return "\n".join(lines) or f"The curves are {NOT_YET}.\n"


TABLES: dict[str, Callable[[Results], str]] = {
    "parity": accuracy_table,
    "parity-verdicts": verdicts,
    "parity-conditions": conditions,
    "parity-seconds": seconds_table,
    "parity-pictures": pictures,
}


# Pictures


def panels(document: Document, group: str) -> list[figure.Panel]:
    """Metrics by step of a group, each the mean over seeds with its standard error as a band."""
    found = []
    for metric in CURVES:
        series = [one for setting in settings_of(document, group) if (one := _series(document, setting, metric))]
        if series:
            found.append(figure.Panel(title=figure.heading(metric), series=series, limits=_limits(series)))
    return found


def _series(document: Document, setting: str, metric: str) -> figure.Series | None:
    """The mean over the runs of a setting of each step that all of them have; None without any."""
    runs = [run for run in document["runs"] if run["setting"] == setting and run["metrics"]["step"]]
    columns = [dict(zip(run["metrics"]["step"], run["metrics"][metric], strict=True)) for run in runs]
    steps = sorted(set.intersection(*map(set, columns))) if columns else []
    steps = [step for step in steps if all(column[step] is not None for column in columns)]
    if not steps:
        return None
    points = [mean_and_error([column[step] for column in columns]) for step in steps]
    ys = [mean for mean, _ in points]
    bands = [(mean - (error or 0), mean + (error or 0)) for mean, error in points]
    los, his = zip(*bands, strict=True)
    return figure.Series(label=setting, xs=steps, ys=ys, los=los, his=his)


def _limits(series: Sequence[figure.Series]) -> tuple[float, float]:
    lower = min(min(one.los) for one in series)
    upper = max(max(one.his) for one in series)
    margin = 0.06 * (upper - lower) or abs(upper) / 10 or 1.0
    return lower - margin, upper + margin


def draw_accuracies(document: Document, path: Path) -> None:
    """Every run's accuracy with its 95 % interval, grouped by setting, the mean as a line; one panel for each kind."""
    figure.require("matplotlib")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = [name for group in GROUPS for name in settings_of(document, group) if runs_of(document, name)]
    by_group = (zip(settings_of(document, group), figure.CURVES, strict=False) for group in GROUPS)
    colours = {name: colour for pairs in by_group for name, colour in pairs}  # as in the curves of the group
    with mpl.rc_context(figure.STYLE):
        drawing = Figure(figsize=(11, 1.2 + 0.45 * (len(names) + 1)), dpi=110, layout="constrained")
        for place, kind in enumerate(KINDS, 1):
            axes = drawing.add_subplot(1, len(KINDS), place)
            for height, (label, estimates) in enumerate(_estimates(document, names, kind)):
                _draw_estimates(axes, -height, estimates, colours.get(label, figure.MUTED))
                axes.text(0, -height, f"{label} ", ha="right", va="center", color=figure.INK,
                          transform=axes.get_yaxis_transform())  # fmt: skip
            axes.set_yticks([])
            axes.set_ylim(-len(names) - 0.6, 0.6)
            axes.set_title(f"accuracy, {kind}, %", loc="left", color=figure.INK, weight="bold")
            axes.grid(axis="x", color=figure.RULE, linewidth=0.7)
            axes.set_axisbelow(True)
            axes.tick_params(colors=figure.MUTED, length=0)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(figure.RULE)
        with files.replacing(path) as temporary:
            drawing.savefig(temporary, format="png")


def _estimates(document: Document, names: Sequence[str], kind: str) -> Iterator[tuple[str, list[Estimate]]]:
    bases = [base["evaluation"][kind] for base in document["bases"] if kind in base["evaluation"]]
    yield "before", [_estimate(one) for one in bases]
    for name in names:
        yield name, [_estimate(run["evaluation"][kind]) for run in runs_of(document, name)]


def _estimate(found: Document) -> Estimate:
    return Estimate(*(100 * found[key] for key in ("accuracy", "lo", "hi")))


def _draw_estimates(axes: Any, height: float, estimates: Sequence[Estimate], colour: str) -> None:
    apart = 0.18
    for place, one in enumerate(estimates):
        y = height + apart * ((len(estimates) - 1) / 2 - place)
        axes.plot([one.lo, one.hi], [y, y], color=colour, linewidth=1.2, alpha=0.6)
        axes.plot([one.value], [y], color=colour, marker="o", markersize=4, markeredgewidth=0)
    if estimates:
        mean = statistics.fmean(one.value for one in estimates)
        axes.plot([mean, mean], [height - 0.35, height + 0.35], color=colour, linewidth=2)


def shrink(path: Path) -> None:
    """Reduce a PNG to 64 colours, which a fifth of the bytes hold."""
    from PIL import Image

    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(64)
    with files.replacing(path) as temporary:
        reduced.save(temporary, format="png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / f"{DOCUMENT}.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    given = parser.parse_args()
    document = json.loads(given.results.read_text(encoding="utf-8"))
    for group in GROUPS:
        if found := panels(document, group):
            figure.write_png(found, given.out / f"{DOCUMENT}-{group}.png")
            shrink(given.out / f"{DOCUMENT}-{group}.png")
    if any(run["evaluation"] for run in document["runs"]):
        draw_accuracies(document, given.out / f"{DOCUMENT}-accuracy.png")
    for name, table in TABLES.items():
        print(f"{name}\n\n{table(lambda _: document)}")


if __name__ == "__main__":
    main()
