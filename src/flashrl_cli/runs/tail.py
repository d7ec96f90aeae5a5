"""Read the lines that another process appends to a file."""

from __future__ import annotations

from pathlib import Path


class Tail:
    """Complete lines of a growing file from byte `start` on, each once. The file may not exist yet; a torn last line waits for its end."""

    def __init__(self, path: Path, *, start: int = 0) -> None:
        self.path = path
        self._offset = start

    def poll(self, *, ended: bool = False) -> list[str]:
        """Lines completed since the last call, without their line ends; undecodable bytes are replaced.

        Once the writer has `ended`, a last line without an end is a line too.
        """
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return []
        end = len(data) if ended else data.rfind(b"\n") + 1
        self._offset += end
        return data[:end].decode("utf-8", errors="replace").splitlines()


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a file; empty if there is none."""
    return Tail(path).poll(ended=True)[-count:]
