"""The report of a benchmark: a table, sentences, and a JSON document.

Sentences claim no more than repeats of the same measurement support: a speed-up is between the slowest repeat over the
fastest of bf16, and the fastest over the slowest. If that range includes 1, nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from flashrl_cli.bench.front import Front, fronts
from flashrl_cli.bench.request import FIT, FIT_WORD, Request
from flashrl_cli.bench.run import REFIT, SCORE, SPEED, START, Measured
from flashrl_cli.text import counted


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """A speed-up as the ratio of medians, with the least and greatest ratio of single repeats."""

    value: float
    least: float
    greatest: float

    @property
    def text(self) -> str:
        """The speed-up as `1.45x`, with its bounds if they are rounded to other values."""
        bounds = f"{self.least:.2f} to {self.greatest:.2f}"
        return f"{self.value:.2f}x" + ("" if f"{self.least:.2f}" == f"{self.greatest:.2f}" else f" ({bounds})")

    @property
    def sure(self) -> bool:
        """Whether all repeats agree that it is faster or slower."""
        return not self.least <= 1 <= self.greatest


Speeds = Mapping[int, Sequence[float]]
"""Tokens per second of each repeat, by batch."""


def speed_up(values: Sequence[float], base: Sequence[float]) -> SpeedUp:
    """The speed-up of repeats over those of the base."""
    return SpeedUp(median(values) / median(base), min(values) / max(base), max(values) / min(base))


def sentences(speeds: Mapping[str, Speeds], base: str | None) -> Iterator[str]:
    """Yield sentences that compare the speeds of variants with those of `base`; nothing without a base."""
    against = speeds.get(base or "", {})
    others = {name: by_batch for name, by_batch in speeds.items() if name != base}
    for batch in sorted(against):
        found = {name: speed_up(by[batch], against[batch]) for name, by in others.items() if batch in by}
        if found:
            yield _sentence(batch, found, base or "", single=len(against[batch]) < 2)


def _sentence(batch: int, found: Mapping[str, SpeedUp], base: str, *, single: bool) -> str:
    where = f"at {counted(batch, 'sequence')}" if batch else "with as many sequences as fit"
    if single:
        speed_ups = ", ".join(f"{name} {one.value:.2f}x" for name, one in found.items())
        return f"{where}: {speed_ups}, measured once each, so that small differences mean nothing"
    faster = {name: one for name, one in found.items() if one.least > 1}
    best, fastest = max((faster or found).items(), key=lambda one: one[1].value)
    same = [name for name, one in found.items() if not one.sure]
    if same and not faster:
        slower = [f"{name} is slower, {one.text}" for name, one in found.items() if one.sure]
        unsure = f"what lies between {base} and {', '.join(same)} is within the spread of the repeats"
        return f"{where}: {'; '.join([unsure, *slower])}: take {base}"
    if not faster:
        return f"{where}: take {base}; the closest is {best}, {fastest.text}"
    rivals = [name for name, one in found.items() if name != best and one.greatest >= fastest.least]
    close = f"; {', '.join(rivals)} as fast within the spread of the repeats" if rivals else ""
    return f"{where}: {best} gives {fastest.text} of {base}{close}"


SCHEMA_VERSION = 1
TIMES = "x"
"""Heading of the speed-up's column, which follows that of the speed."""


@dataclass(frozen=True, slots=True)
class Report:
    """The results for a request; `command` is the command line of the benchmark."""

    request: Request
    measured: Sequence[Measured]
    command: Sequence[str]

    @property
    def base(self) -> str | None:
        """The variant with which others are compared: the first plain bf16."""
        return next((one.variant.name for one in self.measured if one.variant.name == "bf16"), None)

    @property
    def speeds(self) -> dict[str, dict[int, list[float]]]:
        """Speeds of all repeats by variant and batch."""
        return {
            one.variant.name: {point.asked["batch"]: result["values"] for point, result in one.of(SPEED)}
            for one in self.measured
        }

    @property
    def failed(self) -> list[Measured]:
        """Variants with an error."""
        return [one for one in self.measured if one.failure and not one.failure.left_out]

    @property
    def fronts(self) -> list[Front]:
        """The front of speed against KL at each batch; none for a model that knows nothing."""
        found = {one.variant.name: result for one in self.measured if (result := _first(one, SCORE))}
        return [] if any(result["knows_nothing"] for result in found.values()) else fronts(self.speeds, found)

    def sentences(self) -> list[str]:
        """Sentences on the results and how reliable they are."""
        advice = [one.sentence(self.base) for one in self.fronts]
        return [*sentences(self.speeds, self.base), *self._of_mismatch(), *advice, *self._notes()]

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Columns and rows of the table, without empty columns."""
        columns = ["rollout"]
        for batch in self.request.batches:
            columns += [f"tok/s at {batch or FIT_WORD}", TIMES]
        columns += ["sequences", "decode tok/s"] if FIT in self.request.batches else []
        columns += [
            "weights GiB",
            "KV tokens",
            "start s",
            "refit s",
            "mean |Δ log p|",
            "KL (k3)",
            "share > 2",
            "",
        ]
        rows = [self._row(one) for one in self.measured]
        used = [n for n in range(len(columns)) if not n or any(row[n] is not None for row in rows)]
        return [columns[n] for n in used], [[row[n] for n in used] for row in rows]

    def document(self) -> dict[str, Any]:
        """Plain data for JSON: sizes in bytes and tokens, times in seconds, speeds in output tokens per second."""
        return {
            "schema_version": SCHEMA_VERSION,
            "command": list(self.command),
            "versions": self.request.versions,
            "device": self.request.machine.device,
            "model": {"name": self.request.model.name, "fingerprint": self.request.model.fingerprint},
            "settings": self.request.settings(),
            "includes_prefill": True,
            "base": self.base,
            "variants": [self._variant(one) for one in self.measured],
            "fronts": [one.document() for one in self.fronts],
            "verdicts": self.sentences(),
        }

    def _variant(self, one: Measured) -> dict[str, Any]:
        failure = one.failure
        return {
            "rollout": one.variant.name,
            "status": _status(one),
            "problem": failure.message if failure else None,
            "hint": failure.hint if failure else None,
            "notes": one.notes,
            "engine": _first(one, START),
            "speed": [self._speed(one, point.asked, result) for point, result in one.of(SPEED)],
            "refit": _first(one, REFIT),
            "mismatch": _first(one, SCORE),
        }

    def _speed(self, one: Measured, asked: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        found = self._speed_up(one, asked["batch"])
        bounds = {"least": round(found.least, 4), "greatest": round(found.greatest, 4)} if found else {}
        return {**asked, **result, "speed_up": {"value": round(found.value, 4), **bounds} if found else None}

    def _speed_up(self, one: Measured, batch: int) -> SpeedUp | None:
        base, own = self.speeds.get(self.base or "", {}), self.speeds[one.variant.name]
        compared = one.variant.name != self.base and batch in base and batch in own
        return speed_up(own[batch], base[batch]) if compared else None

    def _row(self, one: Measured) -> list[object]:
        engine, refit, mismatch = (_first(one, kind) for kind in (START, REFIT, SCORE))
        row: list[object] = [one.variant.name]
        medians = {point.asked["batch"]: result["tokens_s"] for point, result in one.of(SPEED)}
        for batch in self.request.batches:
            found = self._speed_up(one, batch)
            row += [round(medians[batch]) if batch in medians else None, f"{found.value:.2f}" if found else None]
        if FIT in self.request.batches:
            fit = next((result for point, result in one.of(SPEED) if point.asked["batch"] == FIT), {})
            row += [fit.get("batch"), round(fit["decode_tokens_s"]) if "decode_tokens_s" in fit else None]
        row += [engine["weights_bytes"] / 2**30, engine["kv_tokens"], engine["start_s"]] if engine else [None] * 3
        row.append(refit["seconds"] if refit else None)
        if mismatch:
            row += [mismatch["abs_difference"]["mean"], mismatch["kl"]["k3"], mismatch["token_weights"]["above_2"]]
        else:
            row += [None] * 3
        row.append(None if _status(one) == "ok" else _status(one))
        return row

    def _of_mismatch(self) -> Iterator[str]:
        found = {one.variant.name: result for one in self.measured if (result := _first(one, SCORE))}
        if any(result["knows_nothing"] for result in found.values()):
            yield (
                "warning: the model's entropy is near that of a uniform choice: it knows nothing, "
                "and random weights hide what quantization does"
            )
        for name, result in found.items():
            weights = result["token_weights"]
            yield (
                f"{name} against the trainer: KL {result['kl']['k3']:.2g} nats a token (k3), "
                f"{100 * weights['above_2']:.2g} % of {result['tokens']:,} weights above 2, "
                f"the largest {weights['max']:.3g}"
            )

    def _notes(self) -> Iterator[str]:
        for one in self.measured:
            yield from (f"{one.variant.name}: {note}" for note in one.notes)
            if one.failure and one.failure.left_out:
                yield f"{one.variant.name}: {one.failure.message}"


def _first(one: Measured, kind: str) -> dict[str, Any] | None:
    return next((result for _, result in one.of(kind)), None)


def _status(one: Measured) -> str:
    if one.failure is None:
        return "partial" if one.left else "ok"
    return "left out" if one.failure.left_out else "failed"
