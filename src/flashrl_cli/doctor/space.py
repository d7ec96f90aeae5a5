"""Is there room for what a run writes: its checkpoints, and the models that it downloads?"""

from __future__ import annotations

from flashrl_cli.doctor.finding import Finding, fail, ok, warn


def checkpoints(one: int, kept: int | None, free: int, *, nodes: int, folder: str, keep_fewer: str) -> Finding:
    """Whether checkpoints of `one` byte size fit into `free` bytes; `kept` is their number, None for an unknown one.

    Each node writes its own share; whether to one disk or its own cannot be seen here, so only a share that does not fit is certain.
    """
    if kept == 0:
        return ok("checkpoints", "none are saved")
    number = f"{kept} checkpoints" if kept and kept > 1 else "a checkpoint"
    text = f"{number} of {size(one)} in {folder}, {size(free)} free"
    if free < one / nodes:
        return fail("checkpoints", text, "FLASHRL_CHECKPOINTS names a folder on a larger disk")
    if free < one * (kept or 1):
        return warn("checkpoints", text, f"{keep_fewer}, or FLASHRL_CHECKPOINTS names a larger disk")
    if kept is None:
        return ok("checkpoints", f"{text}, room for {free // one if one else 'any'}; all are kept")
    return ok("checkpoints", text)


def download(name: str, model: str, needed: int | None, free: int, cache: str) -> Finding:
    """Whether a model that is to be downloaded fits; `needed` is its bytes, None where nobody knows here."""
    if needed is None:
        return ok(name, f"{model} will be downloaded to {cache}")
    text = f"{model} will be downloaded to {cache}: {size(needed)}, {size(free)} free"
    return fail(name, text, "HF_HOME names a folder on a larger disk") if free < needed else ok(name, text)


def size(count: int) -> str:
    """Bytes for people: `393 GB`, `4.4 MB`."""
    for unit, step in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count / 1000:.3g} kB"
