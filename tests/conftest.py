"""What all tests share: layers and their markers, a plain environment, golden files, and where GSM8K lies."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# a neighbour's load is no failure, and the same examples on every machine: `--hypothesis-profile explore` draws others
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("explore"), derandomize=True)
settings.load_profile("same")

TESTS = Path(__file__).parent
LAYERS = ("unit", "golden", "contract", "integration", "gpu")
"""Folders of tests, in the order in which they run: what fails fastest comes first."""
MARKED = {"contract", "integration", "gpu"}
PLACES = ("FLASHRL_DATA", "FLASHRL_RUNS", "FLASHRL_CHECKPOINTS")
MACHINE = ("TMPDIR", "TEMP", "TMP", "RAY_TMPDIR", "VLLM_RPC_BASE_PATH", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
"""Variables of a machine that unit tests are not about."""
TERMINAL = (
    "CI",
    "NO_COLOR",
    "FORCE_COLOR",
    "FLASHRL_NO_PROGRESS",
    "FLASHRL_DEBUG",
    "FLASHRL_PLUGIN_DIR",
    "FLASHRL_PLATFORM",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-golden", action="store_true", help="write the golden files anew instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "processes: a unit test that may start processes")


def _layer(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _layer(item) in MARKED:
            item.add_marker(_layer(item))
    items.sort(key=lambda item: LAYERS.index(_layer(item)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _layer(item) == "gpu" and not _has_cuda():
        pytest.skip("no CUDA GPU here")


@functools.cache
def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


@pytest.fixture(autouse=True)
def plain_environment(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit and golden tests see an empty home, no switches of the person who runs them, and no flash-attn."""
    if _layer(request.node) not in {"unit", "golden"}:
        return
    for name in PLACES:
        monkeypatch.setenv(name, str(tmp_path / name.removeprefix("FLASHRL_").lower()))
    for name in (*TERMINAL, *MACHINE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("flashrl_cli.machine.software.find_spec", lambda _: None)


@contextlib.contextmanager
def starting_with(disposition: signal.Handlers, *numbers: signal.Signals) -> Iterator[None]:
    """What is started inside begins with SIG_DFL or SIG_IGN for signals, whatever the tests themselves were started
    with.

    Where that is SIG_DFL, nothing happens to the tests' own process: it has a handler, which no child inherits.
    """
    handler = disposition if disposition == signal.SIG_IGN else lambda *_: None
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@pytest.fixture(autouse=True)
def ctrl_c_reaches_children() -> Iterator[None]:
    """In the background of a script SIGINT is ignored, and would be in all that tests start and interrupt."""
    ignored = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) == signal.SIG_IGN]
    with starting_with(signal.SIG_DFL, *ignored):
        yield


@pytest.fixture(autouse=True)
def no_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit and golden tests start no process, unless they are marked `processes`."""
    if _layer(request.node) not in {"unit", "golden"} or request.node.get_closest_marker("processes"):
        return

    start = subprocess.Popen.__init__

    def refuse(self: Any, argv: Any = None, *args: Any, **kwargs: Any) -> None:
        # matplotlib lists the fonts of a machine when it is imported there for the first time
        if isinstance(argv, list) and argv[0] in {"fc-list", "system_profiler"}:
            return start(self, argv, *args, **kwargs)
        pytest.fail("a unit test starts a process: mark it `processes`, or make the code under test pure")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(os, "fork", lambda: refuse(None))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden("plan/tiny.sh", text)` compares with tests/golden/plan/tiny.sh, whole text; `make golden` writes it."""

    def check(name: str, text: str) -> None:
        file = TESTS / "golden" / name
        if request.config.getoption("--renew-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.is_file(), f"no golden file {name}: write it with `make golden`"
        assert text == file.read_text(encoding="utf-8"), f"{name} differs; if that is meant: `make golden`"

    return check


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """Folder with GSM8K's train.jsonl and test.jsonl: `$FLASHRL_GSM8K`, or a folder beside the checkout."""
    folder = Path(os.environ.get("FLASHRL_GSM8K") or TESTS.parents[1] / "shared/data/gsm8k")
    if not (folder / "train.jsonl").is_file():
        pytest.skip(f"no GSM8K in {folder}: set FLASHRL_GSM8K to a folder with train.jsonl and test.jsonl")
    return folder
