"""What there is to measure, one point after another, and the key under which a point's result is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from flashrl_cli.text import counted

if TYPE_CHECKING:
    from flashrl_cli.bench.request import Request
    from flashrl_cli.bench.variants import Variant

REFITS = 5
START, SPEED, REFIT, SAMPLE, SCORE = "start", "speed", "refit", "sample", "score"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement: `asked` are the words of the order for it, `key` names everything that its result depends on."""

    variant: str
    kind: str
    asked: dict[str, Any] = field(hash=False)
    key: str

    @property
    def label(self) -> str:
        """For people."""
        if self.kind != SPEED:
            return f"{self.variant}, {self.kind}"
        batch = self.asked["batch"]
        return f"{self.variant}, {counted(batch, 'sequence') if batch else 'as many as fit'}"

    @property
    def like(self) -> tuple[str, int]:
        """The same for points of other variants that take about as long."""
        return self.kind, self.asked.get("batch", 0)


def points(request: Request, variant: Variant) -> Iterator[Point]:
    """Points of a variant in their order: the refits come last, after them the engine holds random weights."""
    yield _point(request, variant, START, {})
    for batch in request.batches:
        sizes = {"batch": batch, "prompt": request.prompt, "response": request.response, "repeats": request.repeats}
        yield _point(request, variant, SPEED, sizes)
    if request.mismatch:
        asked = {"samples": request.mismatch.samples, "response": request.response}
        yield _point(request, variant, SAMPLE, asked, request.mismatch.fingerprint)
        yield _point(request, variant, SCORE, {}, [asked, request.mismatch.fingerprint, request.mismatch.dtype])
    if request.refit:
        yield _point(request, variant, REFIT, {"repeats": REFITS})


def count(request: Request) -> int:
    """Points of all variants."""
    return sum(1 for variant in request.variants for _ in points(request, variant))


def _point(request: Request, variant: Variant, kind: str, asked: dict[str, Any], more: Any = None) -> Point:
    depends = {
        "model": request.model.fingerprint,
        "variant": variant.key(),
        "kind": kind,
        "asked": asked,
        "more": more,
        "options": asdict(request.options),
        "versions": request.versions,
        "device": request.machine.device,
    }
    text = json.dumps(depends, sort_keys=True)
    return Point(variant=variant.name, kind=kind, asked=asked, key=hashlib.sha256(text.encode()).hexdigest()[:24])
