"""One table of precisions: whatever asks for a precision finds every one there, and they agree with each other."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest

from flashrl_cli import precision
from flashrl_cli.bench.job import parse
from flashrl_cli.config.spec import RolloutSpec
from flashrl_cli.machine import gpus, system
from flashrl_cli.memory import parts
from flashrl_cli.memory.model import shape_of
from flashrl_cli.precision import PRECISIONS, REFITTED, PrecisionName, RefittedName

SOURCES = Path(precision.__file__).parent
ROWS = pytest.mark.parametrize("row", PRECISIONS.values(), ids=lambda row: row.name)


def test_names_that_types_know_are_those_of_the_rows() -> None:
    assert set(get_args(PrecisionName)) == set(PRECISIONS)
    assert get_args(RefittedName) == REFITTED
    assert "|".join(PRECISIONS) == precision.METAVAR
    assert set(REFITTED) == {"bf16", *precision.BY_METHOD}


@ROWS
def test_every_table_covers_every_precision(row: precision.Precision) -> None:
    assert RolloutSpec(precision=row.name).precision == row.name
    assert [variant.precision for variant in parse(row.name, None)] == [row.name]
    old = gpus.Gpu("Old", (3, 0), "580", 8)
    assert str(gpus.lacks(row.name, [old])).startswith(f"{row.name} needs compute capability")
    assert bool(list(system.cpu_lacks(row.name))) is not row.cpu
    shape = shape_of("Qwen/Qwen2.5-7B", Path("/nowhere"))
    assert shape
    assert 0 < parts.weights(shape, row.name) <= parts.weights(shape, "bf16")
    assert row.weight_bytes <= 2 <= row.mlp_bytes
    assert row.asleep_bytes > 0


def test_the_largest_block_divides_every_width() -> None:
    assert {"auto", "off", *precision.BLOCKS} == set(get_args(RolloutSpec.model_fields["rotation"].annotation))
    assert [precision.largest_block(widths) for widths in ([576, 1536], [3584, 18944], [96], [48, 64], [24])] == [
        64, 128, 32, 16, 0,
    ]  # fmt: skip


@ROWS
def test_what_to_take_instead_is_able_to(row: precision.Precision) -> None:
    """On other GPUs, on a CPU, and beside an option that the row does not go with."""
    instead, sibling = PRECISIONS[row.instead], PRECISIONS[row.sibling]
    assert instead.gpus != row.gpus
    assert row.cpu or instead.cpu
    assert sibling.goes_with == precision.WITH_ALL


@ROWS
def test_weights_are_brought_in_one_way(row: precision.Precision) -> None:
    assert row.quantized is (row.method is not None or row.verl is not None)
    assert None in (row.method, row.verl)
    assert bool(row.vllm_config) is (row.verl is not None)
    # what proves and applies an option is flashrl's weight update
    assert row.verl is None or not row.goes_with
    assert row.vllm_config.get("weight_block_size") == ([row.block, row.block] if row.block else None)


def test_every_method_of_flashrl_s_has_a_class_that_quantizes() -> None:
    """Read from the source, which imports torch and vLLM."""
    module = ast.parse((SOURCES / "plugins" / "linear.py").read_text(encoding="utf-8"))
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    named = [
        ast.literal_eval(line.value)
        for one in classes
        for line in one.body
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "precision"
    ]
    configs = next(
        node.value for node in module.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "CONFIGS"
    )
    assert isinstance(configs, ast.Tuple)
    assert sorted(named) == sorted(precision.BY_METHOD)
    assert len(configs.elts) == len(named)


def test_no_other_module_lists_precisions() -> None:
    """Prose and commands in docstrings and hints may name one; a collection of several is a second table."""
    found = []
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            items = [*node.keys] if isinstance(node, ast.Dict) else getattr(node, "elts", [])
            names = [item.value for item in items if isinstance(item, ast.Constant)]
            if len(set(PRECISIONS) & {name for name in names if isinstance(name, str)}) > 1:
                found.append(path.relative_to(SOURCES).as_posix())
            if isinstance(node, ast.Constant) and node.value == "fp8-block":
                found.append(path.relative_to(SOURCES).as_posix())
    assert set(found) == {"precision.py"}


@pytest.mark.parametrize(
    ("names", "sentence"), [(["bf16"], "bf16"), (["bf16", "int8"], "bf16 or int8"), ("abc", "a, b or c")]
)
def test_names_in_a_sentence(names: list[str], sentence: str) -> None:
    assert precision.joined(names, "or") == sentence
