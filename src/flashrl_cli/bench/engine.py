"""The process of one engine: `python -m flashrl_cli.bench.engine JOB.json` measures what the orders on its stdin ask for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli.bench.job import EngineJob
from flashrl_cli.errors import FlashrlError, RunFailed
from flashrl_cli.evals import parent
from flashrl_cli.weights import Unreadable

if TYPE_CHECKING:
    from flashrl_cli.bench.rollout import Rollout


def main() -> None:
    """Fulfil orders until stdin closes; the first one starts the engine."""
    orders, emit = parent.begin()
    try:
        _serve(EngineJob.read(Path(sys.argv[1])), orders, emit)
    except Unreadable as error:
        parent.end(emit, RunFailed(str(error)))
    except FlashrlError as error:
        parent.end(emit, error)


def _serve(job: EngineJob, orders: parent.Orders, emit: parent.Emit) -> None:
    from flashrl_cli.bench.rollout import Rollout

    rollout: Rollout | None = None
    while True:
        asked = json.loads(orders.get())
        rollout = rollout or Rollout(job)
        emit("done", result=_fulfil(rollout, asked, emit))


def _fulfil(rollout: Rollout, asked: dict[str, Any], emit: parent.Emit) -> dict[str, Any]:
    kind = asked.pop("kind")
    if kind == "start":
        return rollout.facts()
    if kind == "speed":
        return rollout.speed(**asked, advance=lambda note: emit("advance", note=note))
    return rollout.refit(**asked) if kind == "refit" else rollout.sample(**asked)


if __name__ == "__main__":
    main()
