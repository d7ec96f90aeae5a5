"""Lines of a growing file arrive whole, and once."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli.files import last_lines
from flashrl_cli.runs.metrics import Tail

STREAMS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=12), max_size=8).map(
    lambda lines: "".join(f"{line}\n" for line in lines).encode()
) | st.lists(st.sampled_from([b"a", b"\n", b"\xff", "é".encode(), b"{}"]), max_size=20).map(b"".join)


@given(stream=STREAMS, cuts=st.lists(st.integers(0, 120), max_size=8))
def test_any_chunking_gives_the_same_lines_once(stream: bytes, cuts: list[int]) -> None:
    ends = sorted({min(cut, len(stream)) for cut in cuts} | {len(stream)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        tail, found, start = Tail(path), [], 0
        for end in ends:
            with path.open("ab") as file:
                file.write(stream[start:end])
            found += tail.poll()
            start = end
        assert tail.poll() == []
        assert found == Tail(path).poll()
    complete = stream[: stream.rfind(b"\n") + 1].decode(errors="replace")
    assert "".join(found) == "".join(complete.splitlines())


def test_torn_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    assert tail.poll() == []
    path.write_bytes(b"one\ntw")
    assert tail.poll() == ["one"]
    assert tail.poll() == []
    with path.open("ab") as stream:
        stream.write(b"o\n\nthree\n")
    assert tail.poll() == ["two", "", "three"]


def test_letter_torn_between_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "log"
    first, second = "é".encode()[:1], "é".encode()[1:]
    tail = Tail(path)
    path.write_bytes(first)
    assert tail.poll() == []
    path.write_bytes(first + second + b"\n\xff\n")
    assert tail.poll() == ["é", "�"]


def test_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert last_lines(path, 2) == []
    path.write_text("a\nb\nc\n")
    assert last_lines(path, 2) == ["b", "c"]
    assert last_lines(path, 9) == ["a", "b", "c"]


def test_last_lines_include_one_without_an_end(tmp_path: Path) -> None:
    """A program that was killed leaves its last words without a line end."""
    path = tmp_path / "log"
    path.write_text("a\nb\nlast words")
    assert last_lines(path, 2) == ["b", "last words"]
