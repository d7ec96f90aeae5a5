"""The container of the original FlashRL recipe, with the pinned GPU stack.

The flags are those of FlashRL's recipe (recipe/flash_rl/README.md of its verl fork). The image is verl's own for vLLM
0.24.0, which verl's docker/Dockerfile.stable.vllm builds and its workflows test with: CUDA 13.0.2, Python 3.12, torch
2.11.0, vLLM 0.24.0 and flash-attn 2.8.3, which has no wheel for this torch and takes an hour to build. It contains no
verl, and an older transformers; the container installs flashrl with the pinned versions of both before it starts
anything else. vLLM's own image lacks flash-attn and a compiler.

Folders are mounted under the same paths, so that a path means the same inside and outside.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashrl_cli import paths
from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.hub import hub_home
from flashrl_cli.machine.software import GPU

SCHEMA_VERSION = 1
IMAGE = "verlai/verl:vllm024.dev2@sha256:b867883b0dd011363e69ab2ab344922a28c5bd0409e2a324e3ee70fb27ca7543"
RECIPE = (
    ("--gpus", "all"),
    ("--shm-size=10g",),
    ("--ipc=host",),
    ("--ulimit", "memlock=-1"),
    ("--ulimit", "stack=67108864"),
    ("-e", "NCCL_P2P_LEVEL=NVL"),
)
PASSED = (
    *("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "RAY_ADDRESS"),
    *(
        "WANDB_API_KEY",
        "WANDB_BASE_URL",
        "WANDB_ENTITY",
        "WANDB_MODE",
        "SWANLAB_API_KEY",
        "SWANLAB_MODE",
        "MLFLOW_TRACKING_URI",
    ),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
)
"""Variables that are passed from the shell to the container if they are set; their values are not printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """Folders that the container shares with this machine.

    `source` is the running checkout, which the container installs; `read` are further folders that it only reads.
    """

    work: Path
    data: Path
    runs: Path
    checkpoints: Path
    hub: Path
    source: Path
    read: tuple[Path, ...] = ()

    @property
    def written(self) -> tuple[Path, ...]:
        """Folders that the container writes to."""
        return (self.work, self.data, self.runs, self.checkpoints, self.hub)


Words = tuple[tuple[str, ...], ...]
"""A command line, split into lines: an option is on one line with its value."""


def folders(inputs: Iterable[Path]) -> Folders:
    """The folders of this shell's environment, and those of the files and folders that a run reads.

    Raises EnvironmentNotReady if flashrl does not run from a checkout: the container would have nothing to install.
    """
    source = paths.checkout()
    if source is None:
        raise EnvironmentNotReady(
            "flashrl was not installed from a checkout, and the container installs the checkout",
            hint="clone the repository and `pip install -e .` there",
        )
    return Folders(
        work=Path.cwd(),
        data=paths.data_root(),
        runs=paths.runs_root(),
        checkpoints=paths.checkpoints_root(),
        hub=paths.absolute(hub_home(os.environ, Path.home())),
        source=source,
        read=tuple(path if path.is_dir() else path.parent for path in inputs),
    )


def command(
    folders: Folders, inside: Sequence[str], *, environment: Mapping[str, str], nodes: int, terminal: bool
) -> Words:
    """The docker command that runs `inside` with the pinned stack.

    If `nodes` is more than one, it uses the host's network, because Ray's workers on other nodes must reach this one.
    """
    return (
        ("docker", "run"),
        ("--rm", "-it" if terminal else "-i"),
        ("--name", "flashrl"),
        *RECIPE,
        *([("--net=host",)] if nodes > 1 else []),
        *_mounts(folders),
        *_variables(folders, environment),
        ("-w", str(folders.work)),
        (IMAGE,),
        ("bash", "-c", f"{_install(folders.source)} && exec {shlex.join(inside)}"),
    )


def script(words: Words) -> str:
    """The command as text to paste into a shell, one option per line."""
    return " \\\n  ".join(map(shlex.join, words))


def argv(words: Words) -> list[str]:
    """The command as the arguments of a process."""
    return [word for line in words for word in line]


def run(words: Words, folders: Folders) -> None:
    """Replace this process by the command, after creating missing folders, which docker would create as root.

    Raises EnvironmentNotReady if docker is not installed.
    """
    program = shutil.which("docker")
    if program is None:
        raise EnvironmentNotReady("docker is not installed", hint="install Docker with NVIDIA's container toolkit")
    for folder in folders.written:
        folder.mkdir(parents=True, exist_ok=True)
    os.execv(program, argv(words))  # noqa: S606 - no shell is meant


def _mounts(folders: Folders) -> Iterator[tuple[str, str]]:
    written = list(_outermost(folders.written))
    for path in written:
        yield "-v", f"{path}:{path}"
    for path in _outermost([*folders.read, folders.source]):
        if not any(path.is_relative_to(other) for other in written):
            yield "-v", f"{path}:{path}:ro"


def _outermost(paths: Iterable[Path]) -> Iterator[Path]:
    """The folders that are not inside another one of them, each once."""
    found = list(dict.fromkeys(paths))
    for path in found:
        if not any(path != other and path.is_relative_to(other) for other in found):
            yield path


def _variables(folders: Folders, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield "-e", f"FLASHRL_DATA={folders.data}"
    yield "-e", f"FLASHRL_RUNS={folders.runs}"
    yield "-e", f"FLASHRL_CHECKPOINTS={folders.checkpoints}"
    yield "-e", f"HF_HOME={folders.hub}"
    for name in PASSED:
        if environment.get(name):
            yield "-e", name


def _install(source: Path) -> str:
    pins = [f"{name}=={version}" for name, version in GPU.pins.items()]
    return shlex.join(["pip", "install", "-q", f"{source}[gpu]", *pins])
