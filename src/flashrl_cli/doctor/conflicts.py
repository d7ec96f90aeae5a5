"""What another FlashRL left behind: a console script of the same name, and a patch that runs at every start of Python.

The original system (distribution `flash-llm-rl`) installs a command `flashrl` too, and appends `import flash_rl` to
`usercustomize.py` in site-packages (its setup.py and flash_rl/commands.py), which changes vLLM in every process.
"""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from flashrl_cli.doctor.finding import Finding, fail, ok, warn

COMMAND = "flashrl"
PACKAGE = "flashrl_cli"
SHIMS = ("pyenv", "asdf", "mise")
"""Version managers whose scripts of any name call the right one."""
PATCH = "flash_rl"
STARTUP = ("usercustomize.py", "sitecustomize.py")
UNINSTALL = "pip uninstall flash-llm-rl"


@dataclass(frozen=True, slots=True)
class Script:
    """A file on the PATH with flashrl's name, whether it calls this package, and whether it is this environment's."""

    path: str
    ours: bool
    here: bool


def probe_scripts(search: str) -> Iterator[Script]:
    """Yield the scripts named flashrl along a PATH, first found first."""
    for folder in dict.fromkeys(filter(None, search.split(os.pathsep))):
        path = Path(folder) / COMMAND
        if path.is_file() and os.access(path, os.X_OK):
            text = path.read_bytes()[:4096].decode("utf-8", errors="replace")
            if not any(shim in text for shim in SHIMS):
                here = Path(folder).resolve() == (Path(sys.prefix) / "bin").resolve()
                yield Script(str(path), PACKAGE in text, here)


def probe_claims() -> dict[str, str]:
    """Other distributions that announce a console script of flashrl's name, and what it calls."""
    points = metadata.entry_points(group="console_scripts", name=COMMAND)
    found = {point.dist.name if point.dist else "unknown": point.value for point in points}
    return {name: value for name, value in found.items() if not value.startswith(PACKAGE)}


def probe_startup_files() -> Iterator[str]:
    """Yield the files that Python reads when it starts and that mention the original's patch outside of comments."""
    folders = dict.fromkeys([*site.getsitepackages(), site.getusersitepackages(), *filter(None, sys.path)])
    for folder in map(Path, folders):
        for path in (*(folder / name for name in STARTUP), *sorted(folder.glob("*.pth"))):
            if path.is_file() and mentions_patch(path.read_text(encoding="utf-8", errors="replace")):
                yield str(path)


def mentions_patch(text: str) -> bool:
    """Whether a startup file does something with the original's package."""
    return any(PATCH in line for line in text.splitlines() if not line.lstrip().startswith("#"))


def scripts(found: Sequence[Script], claims: Mapping[str, str]) -> Iterator[Finding]:
    """Yield which command a person gets who types `flashrl`."""
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
    """Yield what is left of the original; with its package `importable`, a startup file changes vLLM in every process."""
    for file in files:
        fix = f"delete the line with {PATCH} in {file}"
        if importable:
            yield fail("flash-llm-rl", f"{file} patches vLLM at every start of Python", f"{fix}, and {UNINSTALL}")
        else:
            yield warn("flash-llm-rl", f"{file} still asks for its patch", fix)
    for name in variables:
        yield warn("flash-llm-rl", f"{name} is set, which only the original reads", f"unset {name}")


def original_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that the original system reads and flashrl does not."""
    return [name for name in ("FLASHRL_CONFIG", "FLASHRL_LMHEAD_FP32") if name in environment]
