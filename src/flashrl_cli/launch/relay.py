"""Metrics and handshakes out of a job's log, for runs whose workers cannot write into the attempt's folder."""

from __future__ import annotations

import json
from collections import deque
from typing import TYPE_CHECKING

from flashrl_cli import contract
from flashrl_cli.runs.tail import Tail
from flashrl_cli.verl.console import read_line
from flashrl_cli.verl.log_lines import plain

if TYPE_CHECKING:
    from flashrl_cli.paths import AttemptPaths


class Relay:
    """Follows the attempt's log and writes `metrics.jsonl` and `plugins/` as verl and the plugins would."""

    def __init__(self, attempt: AttemptPaths) -> None:
        self._attempt = attempt
        self._tail = Tail(attempt.log)
        # nodes that share Ray's own folder, such as two on one machine, each send all lines of it
        self._written: deque[tuple[int, dict[str, float | None]]] = deque(maxlen=8)

    def poll(self, *, ended: bool = False) -> None:
        """Take in the lines that came since the last call."""
        for line in self._tail.poll(ended=ended):
            self._take(plain(line))

    def _take(self, line: str) -> None:
        shake = contract.told_handshake(line)
        if shake is not None:
            contract.write_handshake(self._attempt.plugins, shake)
            return
        found = read_line(line)
        if found is not None and found not in self._written:
            self._written.append(found)
            step, data = found
            with self._attempt.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, "data": data}) + "\n")
