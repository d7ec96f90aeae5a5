"""Every key, option, command and variable that a message, a hint or a page names is one that there is.

Keys are looked up in verl's composed tree and in the fields of a preset, and must be neither dead nor flashrl's own;
options and commands in the command line; variables in the code that reads them. Hints that a rule makes of what it
finds are tested with the rules (tests/contract/test_demands.py, tests/unit/verl/test_keys.py): there the hint is
applied, and must help.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from flashrl_cli.cli import app
from flashrl_cli.config.diagnose import keys_of
from flashrl_cli.config.layers import DEFAULT
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.verl import compose
from flashrl_cli.verl.causes import CAUSES
from flashrl_cli.verl.dead_keys import dead_key
from flashrl_cli.verl.lint import keys as fields
from flashrl_cli.verl.lint.keys import OWNED
from flashrl_cli.verl.overrides import Override

pytestmark = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CONSTANTS = {"verl", "config", "train", "memory", "machine", "doctor"}
"""Parts whose messages are put together of keys that stand in constants of their modules."""
COMPARED = {"migrating.md", "recipes.md"}
"""Pages that set the keys of other scripts beside those of today: there, bare names may be of the past."""
PAST = {
    *("actor_rollout_ref.actor.imp_ratio_cap", "actor_rollout_ref.actor.behav_imp_weight_cap"),
    *("data.path", "data.n_samples", "data.response_key"),
    *("critic.model.fsdp_config.param_offload", "critic.model.fsdp_config.optimizer_offload"),
}
"""Keys of the original's fork and of verl's scripts that neither this verl nor the table of dead keys knows."""
MADE_BY_ADDING = {"ray_kwargs.ray_init.num_gpus"}
"""Keys that are in verl's tree only once somebody adds them, in maps that take any name."""
NO_KEYS = {
    "verl.plugins",
    "verl.model_merger",
    "verl.trainer.main_",
    "verl.utils",
    "verl.workers",
    "model.layers",
    "reward_model.ground_truth",
}
"""What looks like a key and is an entry point, a module, a tensor or a column."""
FOREIGN = {
    "--hypothesis-profile",  # pytest
    *("--address", "--metadata-json", "--no-wait", "--runtime-env-json", "--submission-id"),  # ray job
    *("--language", "--serialized-runtime-env-context"),  # workers of Ray
    *("--ipc", "--net", "--rm", "--shm-size", "--ulimit"),  # docker
    *("--no-build-isolation", "--no-deps"),  # pip
    *("--abbrev-ref", "--no-optional-locks", "--porcelain", "--untracked-files"),  # git
    *("--format", "--query-gpu"),  # nvidia-smi
    *("--curve-", "--ink", "--muted", "--rule"),  # variables of style sheets
    "--config",  # NeMo-RL
    "--algo",  # OpenRLHF
    "--tasks",  # lm-evaluation-harness
}
FORMER = {"setup", "profile", "cleanup"}
"""Commands of the original, in tables that say what replaces them."""

FILES = re.compile(r"\.(?:py|pt|json|jsonl|yaml|md|safetensors|parquet|txt|html|csv|log|bin|png)$")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
SET = re.compile(r"--set ['\"]?([^\s=`'\"]+)=")
VARIABLE = re.compile(r"\bFLASHRL_[A-Z0-9_]+\b")
COMMAND = re.compile(r"(?<![\w./-])flashrl ([a-z]+\b[^`\n;&|#]*)")


@cache
def tree() -> compose.Tree:
    return compose.tree([])


@cache
def verls() -> frozenset[str]:
    def walk(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in node.items():
            yield f"{prefix}{name}"
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")

    return frozenset(walk(tree().container()))


@cache
def ours() -> frozenset[str]:
    """Fields of a preset, and the maps that hold them."""
    keys = keys_of(RunSpec)
    return frozenset({".".join(key.split(".")[:end]) for key in keys for end in range(1, len(key.split(".")) + 1)})


def is_ours(key: str) -> bool:
    """Whether a key is of a preset, or of a map whose keys are free there."""
    return key in ours() or key.startswith(("env.", "reward.arguments."))


@cache
def key_pattern() -> re.Pattern[str]:
    roots = sorted({key.partition(".")[0] for key in verls() | ours()} - {"verl"})
    return re.compile(rf"(?<![\w./@$-])(verl\.)?(\+?)((?:{'|'.join(roots)})(?:\.[a-z_]\w*)+)")


@cache
def commands() -> dict[tuple[str, ...], set[str]]:
    """Options of each command."""

    def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[str]]]:
        options = {name for one in command.params for name in (*one.opts, *one.secondary_opts) if name[0] == "-"}
        yield path, {*options, "--help", "-h"}
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, (*path, *name.split()))

    return dict(walk(typer.main.get_command(app.app)))


def texts_of(file: Path) -> Iterator[str]:
    """Lines of a page; string constants of a module without docstrings, with the constants in its f-strings."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        yield from text.splitlines()
        return
    module = ast.parse(text)
    aside = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
    parts = file.relative_to(ROOT / "src").with_suffix("").parts
    known = vars(import_module(".".join(parts))) if parts[1] in CONSTANTS else {}
    for node in ast.walk(module):
        if isinstance(node, ast.JoinedStr):
            yield "".join(_piece(piece, known) for piece in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in aside:
            yield node.value


def _piece(piece: ast.expr, known: dict[str, Any]) -> str:
    if isinstance(piece, ast.Constant):
        return str(piece.value)
    name = piece.value.id if isinstance(piece, ast.FormattedValue) and isinstance(piece.value, ast.Name) else ""
    value = known.get(name)
    return value if isinstance(value, str) else "…"


@cache
def texts() -> tuple[tuple[Path, str], ...]:
    return tuple((file, text) for file in (*SOURCES, *PAGES) for text in texts_of(file))


def wrong_with(prefix: str, plus: str, key: str) -> str | None:
    """Why a key is no advice."""
    if prefix or plus:
        if dead_key(key):
            return "dead"
        if prefix and key in OWNED:
            return "flashrl's own"
        if plus and key not in verls():
            return "refused" if fields.added_key_problems([Override(key, 1, DEFAULT, added=True)], tree()) else None
        return None if key in verls() | MADE_BY_ADDING else "not in verl's tree"
    if is_ours(key):
        return None
    return "dead" if dead_key(key) else None if key in verls() | MADE_BY_ADDING else "nowhere"


def keys_in(text: str) -> Iterator[tuple[str, str, str]]:
    for found in key_pattern().finditer(text):
        if not FILES.search(found[3]) and not any(found[0].startswith(one) for one in NO_KEYS):
            yield found[1] or "", found[2], found[3]


def test_every_key_that_is_named_exists_and_lives() -> None:
    wrong, count = [], 0
    for file, text in texts():
        if file.suffix == ".py" and " " not in text:
            continue  # a key of a table, and not a sentence; those of dead keys are tested in test_dead_keys.py
        for prefix, plus, key in keys_in(text):
            count += 1
            why = wrong_with(prefix, plus, key)
            past = file.name in COMPARED and not prefix and (key in PAST or dead_key(key))
            owned = file.name in COMPARED and plus and key in OWNED
            if why and not past and not owned:
                wrong.append((file.name, key, why))
    assert wrong == []
    assert count > 300


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.what)
def test_a_cause_s_hint_names_keys_as_a_person_writes_them(cause: Any) -> None:
    """A key of a preset, or one of verl's behind `verl.`: after the hint it goes behind `--set`."""
    for prefix, plus, key in keys_in(cause.hint):
        assert prefix or key in ours(), key
        assert wrong_with(prefix, plus, key) is None, key


def test_a_dead_key_would_be_found() -> None:
    assert wrong_with("", "", "actor_rollout_ref.nccl_timeout") == "dead"
    assert wrong_with("verl.", "", "actor_rollout_ref.actor.grad_clip") == "dead"
    assert wrong_with("", "", "trainer.stepz") == "nowhere"
    assert wrong_with("verl.", "", "trainer.stepz") == "not in verl's tree"
    assert wrong_with("verl.", "", "trainer.experiment_name") == "flashrl's own"
    assert wrong_with("verl.", "+", "actor_rollout_ref.actor.optim.lrr") == "refused"
    assert wrong_with("", "", "rollout.gpu_memory_utilization") is None
    assert list(keys_in("see `data.train_batch_size`, data.pt and verl.model_merger")) == [
        ("", "", "data.train_batch_size")
    ]


def test_what_is_set_can_be_set() -> None:
    count = 0
    for file, text in texts():
        for found in SET.finditer(text):
            key = found[1]
            if not re.fullmatch(r"[\w.+-]+", key) or not key.islower() or key == "key":
                continue  # KEY=VALUE, key=value, env.NAME
            count += 1
            if "." not in key:
                assert key in ours(), (file.name, key)
                continue
            found_keys = list(keys_in(key))
            assert found_keys, (file.name, key)
            prefix, _, name = found_keys[0]
            assert prefix or is_ours(name), (file.name, key)
    assert count > 20


def options_of_benchmarks() -> set[str]:
    return {
        option
        for file in (ROOT / "benchmarks").glob("*.py")
        for option in re.findall(r'add_argument\(\s*"(--[a-z-]+)"', file.read_text(encoding="utf-8"))
    }


def test_every_option_that_is_named_exists() -> None:
    known = set().union(*commands().values()) | FOREIGN | options_of_benchmarks()
    named = {(file.name, found[0]) for file, text in texts() for found in OPTION.finditer(text)}
    assert {(name, option) for name, option in named if option not in known} == set()
    assert len(named) > 100
    assert not FOREIGN & set().union(*commands().values()), "ours now"


def shown(file: Path, text: str) -> Iterator[str]:
    """Command lines in a text: in backquotes, and lines that begin with one."""
    for line in text.split("\n"):
        yield from re.findall(r"`([^`]*)`", line)
        if (file.suffix == ".md" and line.startswith(("$ flashrl ", "flashrl "))) or line.startswith("flashrl "):
            yield line


def problem_of(line: str) -> str | None:
    """Why the words behind `flashrl` are no command that there is."""
    try:
        words = shlex.split(re.sub(r"[…\[\]\\]", " ", line))
    except ValueError:
        return "quotes"
    path: tuple[str, ...] = ()
    while words and (*path, words[0]) in commands():
        path = (*path, words.pop(0))
    if not path:
        return "no command"
    unknown = [
        word
        for word in words
        if word.startswith("-") and not word[1:2].isdigit() and word.partition("=")[0] not in commands()[path]
    ]
    return f"{' '.join(path)} has no {unknown[0]}" if unknown else None


def test_every_command_that_is_shown_exists_with_its_options() -> None:
    wrong, count = [], 0
    for file, text in texts():
        for line in shown(file, text):
            for found in COMMAND.finditer(line):
                first = found[1].split()[0]
                sentence = file.suffix == ".py" and (first,) not in commands()
                if sentence or (first in FORMER and file.name in {"README.md", "migrating.md"}):
                    continue
                count += 1
                if why := problem_of(found[1]):
                    wrong.append((file.name, line, why))
    assert wrong == []
    assert count > 150
    assert problem_of("train --presett tiny") == "train has no --presett"
    assert problem_of("eval show RUN --json --fail-under 1") == "eval show has no --fail-under"
    assert problem_of("deploy x") == "no command"


def test_every_variable_that_is_named_is_read() -> None:
    """By the code, or by the tests where the page for contributors says so."""
    code = "\n".join(file.read_text(encoding="utf-8") for file in (*SOURCES, *(ROOT / "tests").rglob("*.py")))
    read = {name for name in VARIABLE.findall(code) if re.search(rf'["\']{name}["\']', code)}
    prefixes = set(re.findall(r'["\'](FLASHRL_[A-Z_]+) ', code))
    """Words at the beginning of lines that workers print."""
    named = {(file.name, name) for file, text in texts() for name in VARIABLE.findall(text)}
    assert {(file, name) for file, name in named if name not in read | prefixes} == set()
