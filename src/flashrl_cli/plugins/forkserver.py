"""A process that imports torch, verl and vLLM once; each process of a run then begins as a fork of it.

A run on one machine has ten Python processes, which one after another import the same 7,000 modules: 6 to 10 s of a
core each. `train.guardian` starts this server beside verl's driver; `plugins.forked` and `plugins.forked_engine` make
Ray and vLLM ask it for their processes. A process that it cannot serve starts as it would without: a request is refused
when the server's modules might differ from what the new process would import (another environment, threads).

On a CPU vLLM's worker starts as usual: vLLM binds it to cores by variables of OpenMP, whose library reads them when it
is loaded (vllm/utils/ompmultiprocessing.py).

On GPUs a fork cannot use CUDA once its parent has initialized it. Modules of verl ask for GPUs while they are imported
(verl/utils/device.py:57, verl/trainer/constants_ppo.py:26). The server answers them from NVML, which leaves CUDA alone
(PYTORCH_NVML_BASED_CUDA_CHECK of a run's environment, and `capabilities_by_nvidia_smi`). If a module initializes CUDA
nevertheless, the server names it and ends, and all processes of the run start as usual. It does the same if Ray's
random numbers were drawn, which all forks would then draw alike (`ray_is_seeded`).

The server listens on a socket that the guardian opened, and ends when the guardian closes the lifeline. A request is a
length and JSON, with file descriptors: stdout, stderr and, for a process of multiprocessing, what
`multiprocessing.popen_forkserver` sends. The answers are JSON lines: the process id, then the exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashrl_cli import contract

MODULES = (
    "verl.trainer.main_ppo",
    "verl.trainer.ppo.v1",
    "verl.workers.engine_workers",
    "verl.workers.engine.fsdp.transformer_impl",
    "verl.experimental.reward_loop.reward_manager",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
)
"""What the processes of a run import, beside what these modules import in turn."""
ON_CPU = (
    "verl.workers.rollout.vllm_rollout.vllm_async_server",
    "flashrl_cli.plugins.verl_refit",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
)
ON_CUDA = ("vllm.v1.worker.gpu_worker", "vllm.v1.attention.backends.flash_attn")
"""Without verl's rollout, which imports vLLM's linear attention (verl/utils/vllm/patch.py:56), which asks CUDA for the
name and the memory of the GPU (vllm/model_executor/layers/fla/ops/utils.py:123 to 167 in 0.24).
"""
CUDA_DRIVER = "libcuda.so.1"
NOT_INITIALIZED = 3
"""CUDA_ERROR_NOT_INITIALIZED of CUDA's driver, in a process in which nothing has called cuInit yet."""
THREADS = "OMP_NUM_THREADS"
JOB, FIRST_JOB, RAYLET = "RAY_JOB_ID", "01000000", "RAY_RAYLET_PID"
ANSWER_S = 10.0
"""Seconds that a client has for sending its request once it is connected."""
AT_RUN_TIME = frozenset(
    {
        "COLUMNS",
        "CUDA_VISIBLE_DEVICES",
        "LD_PRELOAD",
        "LINES",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NCCL_CUMEM_ENABLE",
        "NUMEXPR_MAX_THREADS",
        "OMP_NUM_THREADS",
        "PWD",
        "PYTHONBREAKPOINT",
        "RANK",
        "SHLVL",
        "SPT_NOENV",
        "TORCHINDUCTOR_CPP_DYNAMIC_THREADS",
        "VERL_RAY_JOB_ID",
        "VERL_REPLICA_RANK",
        "VLLM_DISABLE_SHARED_EXPERTS_STREAM",
        "VLLM_WORKER_MULTIPROC_METHOD",
        "WG_BACKEND",
        "WG_PREFIX",
        "WORLD_SIZE",
        "_",
    }
)
"""Variables that no module reads while it is imported, or whose effect `_settle` brings about."""


@dataclass(frozen=True, slots=True)
class Imports:
    """The environment before and after the server's imports, some of which set variables."""

    before: dict[str, str]
    after: dict[str, str]

    def refusal(self, env: Mapping[str, str]) -> str | None:
        """Which variables of `env` might have made the imports another result; None if there are none."""
        names = {name for name in {*env, *self.before} if env.get(name) != self.before.get(name)}
        ours = {name for name in names if name.startswith(("RAY_", "FLASHRL_")) or name in AT_RUN_TIME}
        others = sorted(name for name in names - ours if name not in env or env[name] != self.after.get(name))
        return f"{', '.join(others)} in its environment" if others else None

    def added(self) -> dict[str, str]:
        """The variables that the imports set."""
        return {name: value for name, value in self.after.items() if name not in self.before}


@dataclass(frozen=True, slots=True)
class Request:
    """A process to start: `argv` of a Python script, or None for a process of multiprocessing."""

    argv: list[str] | None
    env: dict[str, str]
    cwd: str
    fds: list[int]

    def run(self, imports: Imports) -> None:
        """Become the requested process; returns when its script ends."""
        out, err, *rest = self.fds
        for fd, place in ((out, 1), (err, 2)):
            os.dup2(fd, place)
            os.close(fd)
        os.environ.clear()
        os.environ.update(imports.added() | self.env)
        os.chdir(self.cwd)
        _settle()
        if self.argv is None:
            _run_child(rest)
        _run_script(self.argv or [])


def _settle() -> None:
    """Do what libraries would have done in a new process when they were loaded."""
    if raylet := sys.modules.get("ray._raylet"):
        raylet.Config.initialize("")  # reads the variables RAY_*
    if config := sys.modules.get("torch._inductor.config"):
        config.cpp.dynamic_threads = os.environ.get("TORCHINDUCTOR_CPP_DYNAMIC_THREADS") == "1"
    torch, threads = sys.modules.get("torch"), os.environ.get(THREADS, "")
    if torch and threads.isdigit():
        torch.set_num_threads(int(threads))
    with contextlib.suppress(OSError):
        # Ray sets it for the process that it starts, so that the system ends workers first when memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # otherwise all forks would draw the same numbers


def _run_script(argv: list[str]) -> None:
    import runpy

    sys.argv[:] = argv
    sys.path[0] = str(Path(argv[0]).parent)
    runpy.run_path(argv[0], run_name="__main__")


def _run_child(fds: list[int]) -> None:
    """Run a process of multiprocessing, as `multiprocessing.forkserver._serve_one` does, and end."""
    from multiprocessing import forkserver, resource_tracker, spawn

    child_r, tracker, *inherited = fds
    server: Any = forkserver._forkserver
    server._inherited_fds = inherited
    resource_tracker._resource_tracker._fd = tracker  # type: ignore[attr-defined]
    code = 1
    try:
        code = spawn._main(child_r, os.dup(child_r))
    except Exception:  # noqa: BLE001 - of other people's code; a new process would print it and end, too
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to this process's user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[4:8], sys.byteorder) == os.getuid()


class Server:
    """The loop of the server: `next_request` returns in forks only, in each with what it shall do."""

    def __init__(self, listener: socket.socket, lifeline: int, imports: Imports) -> None:
        self._listener, self._lifeline, self._imports = listener, lifeline, imports
        self._children: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._raylet: int | None = None
        self._ended, self._waker = os.pipe()
        for fd in (self._ended, self._waker):
            os.set_blocking(fd, False)

    def next_request(self) -> Request:
        """Start processes until the lifeline closes; in a process that was started, return its request."""
        before = signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker)
        for source in (self._listener, self._lifeline, self._ended):
            self._selector.register(source, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in self._selector.select()}
            if ready & {self._lifeline, self._raylet}:
                sys.exit()
            if self._ended in ready:
                os.read(self._ended, 65536)
                self._reap()
            if self._listener in ready and (request := self._accept()):
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, before)
                self._close()
                return request

    def _accept(self) -> Request | None:
        """Fork for one client; the request in the fork, None in the server."""
        connection, _ = self._listener.accept()
        connection.settimeout(ANSWER_S)
        try:
            request = self._receive(connection)
            why = self._refusal(request)
            self._end_with_raylet(request.env.get(RAYLET))
            pid = None if why else os.fork()
            if pid == 0:
                connection.close()
                return request
            for fd in request.fds:
                os.close(fd)
            if pid:
                self._children[pid] = connection
                _answer(connection, pid=pid)
            else:
                print(f"a process starts without the fork server: {why}", file=sys.stderr, flush=True)
                _answer(connection, refused=why)
                connection.close()
        except (OSError, ValueError, KeyError, PermissionError) as error:
            print(f"the fork server could not serve a client: {error!r}", file=sys.stderr, flush=True)
            connection.close()
        return None

    def _refusal(self, request: Request) -> str | None:
        if request.env.get(JOB, FIRST_JOB) != FIRST_JOB:
            return f"{JOB}={request.env[JOB]}"
        if threading.active_count() > 1:
            return f"threads of the server: {threading.enumerate()}"
        return self._imports.refusal(request.env)

    def _end_with_raylet(self, pid: str | None) -> None:
        """Watch the raylet that asked first."""
        if pid and self._raylet is None:
            self._raylet = os.pidfd_open(int(pid))
            self._selector.register(self._raylet, selectors.EVENT_READ)

    @staticmethod
    def _receive(connection: socket.socket) -> Request:
        if not same_user(connection):
            raise PermissionError("a client of another user")
        header, fds, _, _ = socket.recv_fds(connection, 4, 64)
        with connection.makefile("rb") as stream:
            content = json.loads(stream.read(int.from_bytes(header, "big")))
        return Request(content["argv"], content["env"], content["cwd"], fds)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if connection := self._children.pop(pid, None):
                    _answer(connection, exit=os.waitstatus_to_exitcode(status))
                    connection.close()

    def _close(self) -> None:
        """Close in a fork what is the server's."""
        for connection in self._children.values():
            connection.close()
        self._listener.close()
        self._selector.close()
        for fd in (self._lifeline, self._ended, self._waker, self._raylet):
            if fd is not None:
                os.close(fd)


def _answer(connection: socket.socket, **answer: Any) -> None:
    with contextlib.suppress(OSError):  # the client has ended
        connection.sendall(json.dumps(answer).encode() + b"\n")


def preload(names: tuple[str, ...]) -> None:
    """Import modules; one that is missing here is left to the processes that need it.

    Raises SystemExit if one initializes CUDA, which no fork could use then, or draws one of Ray's random numbers, of
    which all forks would draw the same ones then.
    """
    gc.disable()  # a collection finds nothing to free between imports
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"not imported ahead: {name}: {error}", file=sys.stderr, flush=True)
        if cuda_is_initialized():
            sys.exit(f"all processes start without the fork server: importing {name} initializes CUDA")
    if ray_is_seeded():
        what = f"importing {', '.join(names)} draws Ray's random numbers"
        sys.exit(f"all processes start without the fork server: {what}")
    gc.enable()


def ray_is_seeded() -> bool:
    """Whether forks of this process would draw the same random ids from Ray; False where Ray is not imported.

    Two forks draw one each. Ray's C++ code takes ids from a generator that a fork inherits as soon as it was used, and
    warns of it (src/ray/util/random.h). A thread of an asynchronous actor has a random id, of which the ids of its
    calls are hashes: calls of two forks to the same actor would have the same ids, and Ray ends an actor that runs both
    at once ("Check failed: erased == 1", core_worker.cc:2919 in 2.56), or a call never returns.
    """
    if "ray._raylet" not in sys.modules:
        return False
    from ray import JobID
    from ray._raylet import TaskID

    drawn = []
    for _ in range(2):
        reader, writer = os.pipe()
        if not (pid := os.fork()):
            os.write(writer, TaskID.for_fake_task(JobID.from_int(1)).binary())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            drawn.append(stream.read())
        os.waitpid(pid, 0)
    return drawn[0] == drawn[1]


def draw_class_ids_from_the_system() -> None:
    """Let classes that are declared actors take their ids from the system's random numbers (idempotent).

    A declaration takes a random id (ray/actor.py:2938 in 2.60, :2696 in 2.56), which seeds Ray's generator for all
    forks; see `ray_is_seeded`.
    """
    import ray.actor

    original = ray.actor.ActorClassID
    if getattr(original, contract.PATCHED, False):
        return
    length = len(original.nil().binary())
    ids = type("ActorClassID", (), {"from_random": staticmethod(lambda: original(os.urandom(length)))})
    setattr(ids, contract.PATCHED, True)
    ray.actor.ActorClassID = ids


def cuda_is_initialized() -> bool:
    """Whether something in this process has initialized CUDA's driver; False where there is none."""
    try:
        driver = ctypes.CDLL(CUDA_DRIVER)
    except OSError:
        return False
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != NOT_INITIALIZED)


@contextlib.contextmanager
def capabilities_by_nvidia_smi() -> Iterator[None]:
    """While modules are imported, answer torch.cuda.get_device_capability without initializing CUDA."""
    import torch

    from flashrl_cli.machine import gpus

    original, seen = torch.cuda.get_device_capability, gpus.seen()

    def get_device_capability(device: Any = None) -> tuple[int, int]:
        index = device if isinstance(device, int) else torch.device(device or "cuda").index
        return seen[index or 0].capability

    torch.cuda.get_device_capability = get_device_capability
    try:
        yield
    finally:
        torch.cuda.get_device_capability = original


def prepare_for_run() -> None:
    """Take the environment that verl gives a run's processes, and that of a Ray worker as far as `import ray` reads it.

    Ray's library reads RAY_JOB_ID and RAY_RAYLET_PID once, when it is loaded, so they must be true of all forks: the
    driver of a run is the first job of its own Ray instance, and workers exit when the process RAY_RAYLET_PID ends,
    which is this server; it ends with the raylet.
    """
    os.environ.update({JOB: FIRST_JOB, RAYLET: str(os.getpid())})
    draw_class_ids_from_the_system()
    preload(("verl.trainer.constants_ppo",))
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    os.environ.update(get_ppo_ray_runtime_env()["env_vars"])


def main() -> None:
    """Run the server: `python -m flashrl_cli.plugins.forkserver LISTENER [MODULE …]`.

    LISTENER is a file descriptor, the standard input is the lifeline, and the modules are those of a run by default.
    """
    listener, lifeline = socket.socket(fileno=int(sys.argv[1])), os.dup(0)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    began = time.monotonic()
    names, on_cpu = tuple(sys.argv[2:]), os.environ.get(contract.ENV_PLATFORM) == "cpu"
    # Ray sets it in workers whose actors ask for no CPUs, before they import torch (ray/_private/utils.py:235)
    os.environ.setdefault(THREADS, "1")
    with contextlib.nullcontext() if names or on_cpu else capabilities_by_nvidia_smi():
        if not names:
            prepare_for_run()
            names = MODULES + (ON_CPU if on_cpu else ON_CUDA)
        before = dict(os.environ)
        preload(names)
    imports = Imports(before, dict(os.environ))
    contract.logger().info("imported %d modules in %.1f s", len(sys.modules), time.monotonic() - began)
    gc.freeze()  # forks then share the objects' pages for longer
    Server(listener, lifeline, imports).next_request().run(imports)


if __name__ == "__main__":
    main()
