"""The server side of a worker process: orders from stdin, events to stdout, and a reliable exit."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from flashrl_cli.errors import ExitCode, FlashrlError, RunFailed
from flashrl_cli.weights import Unreadable
from flashrl_cli.worker import protocol

Orders = Iterator[dict[str, Any]]
Emit = Callable[..., None]
"""`emit(event, **data)` sends an event to the command line."""
_PR_SET_PDEATHSIG = 1


def run(serve: Callable[[dict[str, Any], Orders, Emit], None]) -> None:
    """Run `serve(job, orders, emit)` for the job that the command line names; the process ends when it returns.

    An error on which the user can act is sent to the command line as an event; any other is logged with its traceback.
    """
    orders, emit = begin()
    try:
        serve(protocol.read_job(Path(sys.argv[1])), orders, emit)
    except Unreadable as error:
        emit(**protocol.error_event(RunFailed(str(error))))
        os._exit(ExitCode.FAILED)
    except FlashrlError as error:
        emit(**protocol.error_event(error))
        os._exit(ExitCode.FAILED)
    os._exit(ExitCode.OK)


def begin() -> tuple[Orders, Emit]:
    """The stream of orders, and the function that sends events.

    From this call on the process ends with its parent, and immediately at any error.
    """
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    sys.excepthook = _end_with_traceback
    return map(json.loads, iter(lines.get, None)), _events()


def end_with_parent(number: int) -> None:
    """Make the kernel send signal `number` to this process when its parent dies; this works on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def _events() -> Emit:
    """Reserve stdout for events, and redirect what libraries print there to stderr, which is the log.

    Processes that vLLM forks must not inherit the events' pipe: the command line recognizes this process's end by the
    end of that pipe.
    """
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.register_at_fork(after_in_child=lambda: os.dup2(1, stream.fileno()))

    def emit(event: str, **data: Any) -> None:
        stream.write(protocol.line({"event": event, **data}))
        stream.flush()

    return emit


def _end_with_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback and end the process immediately.

    Processes that vLLM started might otherwise block its exit forever. torch.distributed calls this with `sys.stderr`
    replaced by a buffer, to put the rank before each line (torch/distributed/distributed_c10d.py,
    `_distributed_excepthook`).
    """
    traceback.print_exception(kind, error, trace, file=sys.__stderr__)
    os._exit(ExitCode.FAILED)


def _listen(lines: queue.SimpleQueue[bytes]) -> None:
    """Pass orders on, and end the process when the other side closes the pipe.

    Shutting vLLM down in order would take seconds, and nothing of it is needed any more. This does not use `sys.stdin`:
    its lock, held by a waiting reader, would stay locked forever in processes that vLLM forks.
    """
    rest = b""
    while chunk := os.read(0, 1 << 16):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            lines.put(line)
    os.killpg(0, signal.SIGKILL)
