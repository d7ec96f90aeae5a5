"""The working process's side of its talk with the command line: orders from stdin, events to stdout, and an end that is certain."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from flashrl_cli.errors import ExitCode, FlashrlError

Emit = Callable[..., None]
Orders = queue.SimpleQueue[str]


def begin() -> tuple[Orders, Emit]:
    """Orders as they come, and how to tell events. From here on the process ends with its parent, and at once with any error."""
    orders: Orders = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    sys.excepthook = _end_with_traceback
    return orders, _events()


def end(emit: Emit, error: FlashrlError) -> None:
    """Report an error of the user's, and end the process."""
    emit("error", kind=type(error).__name__, message=error.message, hint=error.hint)
    os._exit(ExitCode.FAILED)


def _events() -> Emit:
    """Keep stdout for events, and send what libraries print there to stderr, which is the log.

    What vLLM forks must not hold it: the command line hears of this process's end by the end of its events.
    """
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.register_at_fork(after_in_child=lambda: os.dup2(1, stream.fileno()))

    def emit(event: str, **data: Any) -> None:
        stream.write(json.dumps({"event": event, **data}) + "\n")
        stream.flush()

    return emit


def _end_with_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A failure ends the process at once: what vLLM has started might hold it for ever.

    torch.distributed calls this with `sys.stderr` replaced by a buffer, to put the rank before each line
    (torch/distributed/distributed_c10d.py, `_distributed_excepthook`).
    """
    traceback.print_exception(kind, error, trace, file=sys.__stderr__)
    os._exit(ExitCode.FAILED)


def _listen(orders: Orders) -> None:
    """Pass orders on, and end with the other side: taking vLLM down politely takes seconds, and nothing of it is needed any more."""
    for line in _lines():
        orders.put(line.decode())
    os.killpg(0, signal.SIGKILL)


def _lines() -> Iterator[bytes]:
    """Lines of stdin, read without `sys.stdin`: its lock, held by a waiting reader, would be held for ever in what vLLM forks."""
    rest = b""
    while chunk := os.read(0, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
