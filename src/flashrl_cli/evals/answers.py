"""Responses as an engine writes them: all samples of a question on one line of JSON, as soon as it is answered.

A process that is killed loses the questions it was answering, and no others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from flashrl_cli import files
from flashrl_cli.evals.results import Response


def append(file: Path, samples: Sequence[Response]) -> None:
    """Add all samples of one question to `file`."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps([asdict(sample) for sample in samples], ensure_ascii=False) + "\n")


def read(file: Path) -> dict[int, list[Response]]:
    """Samples by question; a line that was cut off when its writer was killed is left out, and removed from the file."""
    if not file.is_file():
        return {}
    whole = list(_whole_lines(file))
    found = {samples[0].question: samples for _, samples in whole}
    kept = "".join(line for line, _ in whole)
    if len(kept.encode()) != file.stat().st_size:
        files.write_text(file, kept)
    return found


def _whole_lines(file: Path) -> Iterator[tuple[str, list[Response]]]:
    # responses hold characters that `str.splitlines` would split at
    with file.open(encoding="utf-8", errors="replace", newline="\n") as stream:
        for line in stream:
            try:
                samples = [Response(**sample) for sample in json.loads(line)]
            except (ValueError, TypeError):
                continue
            if samples and line.endswith("\n"):
                yield line, samples
