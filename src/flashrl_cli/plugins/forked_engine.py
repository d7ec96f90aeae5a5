"""vLLM's engine process as a fork of a server (`plugins.forkserver`), or as usual if it refuses or does not answer."""

from __future__ import annotations

import functools
import io
import os
import sys
from multiprocessing import context, popen_forkserver, popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.connection import wait
from typing import Any

from flashrl_cli import contract
from flashrl_cli.plugins.forked import NotForked, connect, read_answer


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


class Popen(popen_forkserver.Popen):
    """A process that the server started; as in popen_forkserver, except for the server."""

    _fds: list[int]

    def _launch(self, process_obj: Any) -> None:
        content = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj._name), content)
            reduction.dump(process_obj, content)
        finally:
            context.set_spawning_popen(None)
        child_r, parent_w = os.pipe()
        try:
            tracker: Any = resource_tracker.getfd()
            fds = [1, 2, child_r, tracker, *self._fds]
            connection, self.pid = connect(None, fds)
        except NotForked:
            os.close(parent_w)
            raise
        finally:
            os.close(child_r)
        self.sentinel = connection.detach()
        # the child takes the end of this pipe for the end of its parent
        self.finalizer = util.Finalize(self, _close, (os.dup(parent_w), self.sentinel))
        with os.fdopen(parent_w, "wb") as stream:
            stream.write(content.getbuffer())

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            if not wait([self.sentinel], 0 if flag == os.WNOHANG else None):
                return None
            try:
                self.returncode = int(read_answer(functools.partial(os.read, self.sentinel))["exit"])
            except (OSError, ValueError):
                self.returncode = 255  # as popen_forkserver does when the server was killed
        return self.returncode


class Process(context.SpawnProcess):
    """A process of the context "spawn", forked by the server if it answers."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - multiprocessing's name
        try:
            return Popen(process_obj)
        except NotForked:
            return popen_spawn_posix.Popen(process_obj)


class Context(context.SpawnContext):
    """The context "spawn" of multiprocessing with these processes."""

    Process = Process


def start_engines_by_fork() -> None:
    """Let vLLM start its processes as forks of the server, which refuses workers (idempotent).

    vLLM spawns them when it runs in a Ray actor (vllm/utils/system_utils.py:141 in 0.28), so each imports everything
    again. Its modules import `get_mp_context` by name.
    """
    import vllm.utils.system_utils

    original = vllm.utils.system_utils.get_mp_context
    if getattr(original, contract.PATCHED, False):
        return
    forking = Context()

    def get_mp_context() -> Any:
        chosen = original()
        return forking if chosen.get_start_method() == "spawn" else chosen

    setattr(get_mp_context, contract.PATCHED, True)
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and vars(module).get("get_mp_context") is original:
            vars(module)["get_mp_context"] = get_mp_context
