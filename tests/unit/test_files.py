"""Files are replaced whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashrl_cli import files, signals


def test_write_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a/b/c.txt", "é\n")
    files.write_text(tmp_path / "a/b/c.txt", "ü\n")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "a/b/c.txt", "no UTF-8: \udce9")
    assert (tmp_path / "a/b/c.txt").read_bytes() == "ü\n".encode()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["c.txt"]


def test_json(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"é": [1, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"é": [1, None]}
    assert "é" in text
    assert text.endswith("}\n")


def test_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail() -> None:
        with files.replacing(target) as temporary:
            temporary.write_text("half")
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_old_content_stands_until_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with files.replacing(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent.parent == target.parent, "on the same disk, or it could not be moved at once"
    assert target.read_text() == "new"


def test_folder_replaces_a_missing_or_empty_one(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with files.replacing(target) as temporary:
        temporary.mkdir()
        (temporary / "x").write_text("1")
    assert (target / "x").read_text() == "1"
    with pytest.raises(OSError), files.replacing(target) as temporary:
        temporary.mkdir()
    assert (target / "x").read_text() == "1"


@pytest.mark.parametrize("content", [b"", b"abc", b"x" * 1_000_000])
def test_sha256(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content)
    assert files.sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which locks are kept, in one of the test's own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f"flashrl-{os.getuid()}"


class Turns:
    """What two threads did with one thing, in the order in which they did it."""

    def __init__(self) -> None:
        self.log = list[str]()
        self.inside, self.go_on = threading.Event(), threading.Event()

    def first(self, path: Path) -> None:
        with files.alone(path, lambda: self.log.append("first waits")) as waited:
            self.log.append(f"first in, waited {waited}")
            self.inside.set()
            self.go_on.wait(20)
            self.log.append("first out")

    def waiting(self) -> None:
        self.log.append("second waits")
        self.go_on.set()


@pytest.fixture
def turns(tmp_path: Path, locks: Path) -> Iterator[Turns]:
    """Another is alone with `thing`."""
    found = Turns()
    thread = threading.Thread(target=found.first, args=(tmp_path / "thing",))
    thread.start()
    assert found.inside.wait(20)
    yield found
    found.go_on.set()
    thread.join(20)


@pytest.mark.parametrize("name", ["thing", "link/thing", "deep/../thing"])
def test_the_second_waits_for_the_first(name: str, tmp_path: Path, locks: Path, turns: Turns) -> None:
    """Whatever the path is called by; it need not exist."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    with files.alone(tmp_path / name, turns.waiting) as waited:
        turns.log.append(f"second in, waited {waited}")
    assert turns.log == ["first in, waited False", "second waits", "first out", "second in, waited True"]
    assert stat.S_IMODE(locks.stat().st_mode) == 0o700, "other users cannot hold it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "link", "tmp"], "and nothing made beside it"


def test_what_is_another_thing_is_not_waited_for(tmp_path: Path, turns: Turns) -> None:
    with files.alone(tmp_path / "thing2", turns.waiting) as waited:
        assert not waited
    assert turns.log == ["first in, waited False"]


def test_a_signal_ends_the_waiting(tmp_path: Path, turns: Turns) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    with (
        pytest.raises(signals.Interrupted, match="SIGTERM"),
        signals.raised("again", print),
        files.alone(tmp_path / "thing", timer.start),
    ):
        pytest.fail("the first is still at it")
    timer.join()


def test_many_are_alone_one_after_another(tmp_path: Path, locks: Path) -> None:
    inside, most, done = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, done
        for _ in range(20):
            with files.alone(tmp_path / "thing", lambda: None):
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.0005)
                with guard:
                    inside -= 1
                    done += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (done, most) == (160, 1)


@pytest.mark.processes
def test_who_was_killed_is_not_waited_for(tmp_path: Path, locks: Path) -> None:
    pid = os.fork()
    if pid == 0:
        with files.alone(tmp_path / "thing", lambda: None):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    with files.alone(tmp_path / "thing", lambda: pytest.fail("waits for the dead")) as waited:
        assert not waited


def test_without_a_place_for_locks_nobody_is_waited_for(tmp_path: Path, locks: Path) -> None:
    locks.write_text("somebody's file", encoding="utf-8")
    with (
        files.alone(tmp_path / "thing", lambda: None) as first,
        files.alone(tmp_path / "thing", lambda: None) as second,
    ):
        assert (first, second) == (False, False)


def test_an_error_within_is_the_callers_and_frees_the_lock(tmp_path: Path, locks: Path) -> None:
    with pytest.raises(OSError, match="disk"), files.alone(tmp_path / "thing", lambda: None):
        raise OSError("disk")
    with files.alone(tmp_path / "thing", lambda: pytest.fail("it was not freed")):
        pass


def test_json_holds_names_of_files_that_are_no_text(tmp_path: Path) -> None:
    data = {"folder": "d\udce9\udcff", "é": "→"}
    files.write_json(tmp_path / "f.json", data)
    assert json.loads((tmp_path / "f.json").read_text(encoding="utf-8")) == data
    files.write_json(tmp_path / "g.json", {"é": "→"})
    assert "→" in (tmp_path / "g.json").read_text(encoding="utf-8")
