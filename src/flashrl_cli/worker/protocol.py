"""The protocol between the command line and a worker process.

A worker is `python -m MODULE JOB.json`. The job is one JSON object in a file that is written before the process starts.
Orders are JSON objects, one per line, on the worker's stdin; the process ends when that closes. Events are JSON
objects, one per line, on its stdout, with a key `event`. An order is answered by any number of events, up to one of
LAST, or up to `error`, with which the process ends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashrl_cli import errors, files

LAST = frozenset({"done", "skipped", "restart"})
"""Events that complete an order."""
ERROR = "error"


def write_job(folder: Path, job: Mapping[str, Any]) -> Path:
    """Write the job file of a worker into its folder, and return its path."""
    file = folder / "job.json"
    files.write_json(file, job)
    return file


def read_job(file: Path) -> dict[str, Any]:
    """The job that `write_job` wrote."""
    job: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return job


def line(message: Mapping[str, Any]) -> str:
    """An order or an event as one line of JSON."""
    return json.dumps(message) + "\n"


def error_event(error: errors.FlashrlError) -> dict[str, Any]:
    """The event that reports an error on which the user can act."""
    return {"event": ERROR, "kind": type(error).__name__, "message": error.message, "hint": error.hint}


def error_of(event: Mapping[str, Any]) -> errors.FlashrlError:
    """The error that `error_event` reported."""
    kind: type[errors.FlashrlError] = getattr(errors, event["kind"])
    return kind(event["message"], hint=event["hint"])
