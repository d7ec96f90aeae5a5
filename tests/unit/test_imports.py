"""The shape of the source: which part may import which, who may spell verl's keys, who may start processes."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "flashrl_cli"
SOURCES = sorted(PACKAGE.rglob("*.py"))

LAYERS: tuple[set[str], ...] = (
    {"errors", "files", "paths", "secrets", "text", "contract", "precision", "signals", "reward_function", ""},
    {"weights", "config", "machine"},
    {"plugins", "verl", "hub"},
    {"worker"},
    {"memory", "runs", "data", "doctor"},
    {"evals", "train"},
    {"quantize", "bench", "render"},
    {"cli"},
)
"""Parts of the package from below: each imports itself and what is below it; the lowest ones import each other, too.

"" is `flashrl_cli/__init__.py`, which holds the version alone.
"""
LATE = {"pydantic", "rich"}
"""Fast enough for the core, too slow for `--help`."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not function bodies, not `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from at_import_time(child)


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names of the modules that import statements among `nodes` name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_parts(names: Iterator[str]) -> set[str]:
    """Parts of flashrl_cli among dotted names."""
    found = [name.split(".")[1] for name in names if name.startswith("flashrl_cli.")]
    return {"" if part.startswith("__") else part for part in found}


def below(part: str) -> set[str]:
    """What a part may import."""
    level = next(number for number, layer in enumerate(LAYERS) if part in layer)
    return {part}.union(*LAYERS[: max(level, 1)])


@pytest.mark.parametrize("path", [path for path in SOURCES if part_of(path) != "__main__"], ids=relative)
def test_imports_go_down(path: Path) -> None:
    assert own_parts(imported(ast.walk(tree(path)))) <= below(part_of(path))


def test_modules_form_no_circle() -> None:
    """Of what they import at any time: inside functions and for types, too."""
    modules = {
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"): path
        for path in SOURCES
    }
    graph = {}
    for name, path in modules.items():
        names = set(imported(ast.walk(tree(path))))
        graph[name] = {one if one in modules else one.rpartition(".")[0] for one in names} & set(modules) - {name}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(modules)


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=relative)
def test_commands_import_only_typer_and_the_standard_library(path: Path) -> None:
    names = set(imported(at_import_time(tree(path))))
    outside = {name.split(".")[0] for name in names} - {"flashrl_cli", "typer"} - sys.stdlib_module_names
    assert not outside
    assert own_parts(iter(names)) <= {"cli", "errors", "paths", "contract", "precision", "text", ""}


@pytest.mark.parametrize(
    "name", ["errors.py", "paths.py", "contract.py", "files.py", "precision.py", "render/output.py"]
)
def test_base_modules_import_nothing_slow(name: str) -> None:
    assert not {name.split(".")[0] for name in imported(at_import_time(tree(PACKAGE / name)))} & LATE


@pytest.mark.parametrize("path", sorted((PACKAGE / "weights").glob("*.py")), ids=relative)
def test_weights_import_only_the_standard_library(path: Path) -> None:
    names = set(imported(at_import_time(tree(path))))
    assert not {name.split(".")[0] for name in names} - {"flashrl_cli"} - sys.stdlib_module_names
    assert own_parts(iter(names)) <= {"weights", "text"}


STARTERS = {
    *("train", "worker/client.py", "evals/graders.py"),
    *("machine/gpus.py", "doctor/docker.py"),
    *("plugins/forkserver.py", "plugins/forked.py", "plugins/forked_engine.py"),
}
"""Modules, and one whole part, that may start processes."""
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STARTING = re.compile(
    r"os\.(?:exec\w+|fork\w*|spawn\w+|posix_spawn\w*|system|popen)|(?:asyncio\.)?create_subprocess_\w+"
)


def starts_processes(module: ast.Module) -> bool:
    """Whether a module uses what starts processes; what libraries start on their own (Ray, vLLM) is not seen."""
    names = set(imported(ast.walk(module)))
    calls = {ast.unparse(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)}
    return (
        any(name.split(".")[0] in {"subprocess", "multiprocessing", "pebble", "pty"} for name in names)
        or any(name.startswith("concurrent.futures.ProcessPool") for name in names)
        or any(STARTING.fullmatch(call) for call in calls)
    )


def test_few_modules_start_processes_and_contributing_names_them() -> None:
    found = {str(path.relative_to(PACKAGE)) for path in SOURCES if starts_processes(tree(path))}
    assert {"train" if name.startswith("train/") else name for name in found} == STARTERS
    sentence = CONTRIBUTING.partition("Few modules start")[2].partition("\n- ")[0]
    assert {word.rstrip("/") for word in re.findall(r"`([a-z]+/[a-z_.]*)`", sentence)} == STARTERS


@pytest.mark.parametrize(
    ("code", "starts"),
    [
        ("import subprocess", True),
        ("def f():\n    from multiprocessing import Process", True),
        ("from concurrent.futures import ProcessPoolExecutor", True),
        ("import os\nos.execv('a', [])", True),
        ("import os\nos.fork()", True),
        ("from concurrent.futures import ThreadPoolExecutor", False),
        ("import os\nos.kill(1, 2)", False),
    ],
)
def test_what_starts_a_process_is_seen(code: str, starts: bool) -> None:
    assert starts_processes(ast.parse(code)) is starts


def test_contributing_lists_every_folder() -> None:
    rows = re.findall(r"^\| `([^`]+)/` \|", CONTRIBUTING, re.MULTILINE)
    listed = []
    for row in rows:
        before, brace, rest = row.partition("{")
        listed += [before + name for name in rest.rstrip("}").split(",")] if brace else [row]
    assert len(listed) == len(set(listed))
    parts = {f"src/flashrl_cli/{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    top = {"presets", "benchmarks", "docs", "tests", "requirements"}
    assert set(listed) == parts | top
    assert all((ROOT / name).is_dir() for name in top)


def test_contributing_shows_the_layers() -> None:
    block = CONTRIBUTING.partition("```layers\n")[2].partition("```")[0]
    assert [set(line.split()) for line in reversed(block.splitlines())] == [layer - {""} for layer in LAYERS]


def documentation(module: ast.Module) -> set[int]:
    """Identities of the constants that stand alone as a statement: they document and do nothing."""
    return {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}


@pytest.mark.parametrize("path", [p for p in SOURCES if part_of(p) != "verl"], ids=relative)
def test_only_verl_spells_its_keys(path: Path) -> None:
    module = tree(path)
    texts = {
        id(node): node.value
        for node in ast.walk(module)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    documented = documentation(module)
    spelled = {text for key, text in texts.items() if key not in documented}
    assert not [text for text in spelled if "actor_rollout_ref" in text or "rollout_corr/" in text]
