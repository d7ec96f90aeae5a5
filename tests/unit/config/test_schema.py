"""The language of presets, documented: as a JSON schema that the presets validate against, and as docs/presets.md."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from flashrl_cli import paths
from flashrl_cli.config import schema, spec
from flashrl_cli.config.diagnose import keys_of
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.config.yaml_file import read
from flashrl_cli.precision import PRECISIONS

PAGE = Path(__file__).parents[3] / "docs" / "presets.md"
MARK = "edit the docstrings there. -->\n"
FILES = sorted(paths.presets_root().rglob("*.yaml"))


def rows() -> dict[str, schema.Row]:
    return {row.key.strip("`"): row for _, _, found in schema.sections(schema.preset_schema()) for row in found}


def test_the_page_holds_the_tables_of_today(request):
    written = PAGE.read_text(encoding="utf-8")
    head, mark, _ = written.partition(MARK)
    page = f"{head}{mark}\n{schema.tables()}"
    if request.config.getoption("--renew-golden"):
        PAGE.write_text(page, encoding="utf-8")
        written = page
    assert mark
    assert page == written, "docs/presets.md is not of today's spec: `make golden` writes it anew"


def test_every_key_is_documented_once():
    documented = [row.key.strip("`") for _, _, found in schema.sections(schema.preset_schema()) for row in found]
    assert sorted(documented) == sorted({"extends", "reward.overlong", "correction.reject", *keys_of(RunSpec)})
    assert all(row.meaning for row in rows().values())


def test_rows_hold_values_defaults_and_meaning():
    found = rows()
    assert found["rollout.precision"][1:3] == (", ".join(f"`{name}`" for name in sorted(PRECISIONS)), "`bf16`")
    assert found["rollout.top_p"][1:3] == ("number above 0, at most 1", "`1.0`")
    assert found["critic.lr"].default == "`1e-5`"
    assert found["data.train_batch_size"][1:3] == ("whole number above 0", "must be set")
    assert found["correction.cap"][1:3] == ("number above 0 or `null`", "`null`")
    assert found["trainer.logger"][1:3] == ("list of text", "`[console, file]`")
    assert found["name"].default == "–"
    assert found["verl"].values == "map of values or lists of values"
    assert found["model.path"].meaning.startswith("Hugging Face id")


def test_a_bar_does_not_end_a_cell():
    (line,) = (line for line in schema.tables().splitlines() if line.startswith("| `watch.max_kl`"))
    assert r"\|KL\|" in line


def test_docstrings_of_several_lines_become_one():
    descriptions = [row.meaning for row in rows().values()]
    assert not [text for text in descriptions if "\n" in text or "  " in text]


def validate(preset: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(schema.preset_schema()).validate(preset)


def test_it_is_a_json_schema():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema.preset_schema())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(paths.presets_root())))
def test_shipped_files_keep_to_it(path):
    validate(read(path, path.name).data)


@pytest.mark.parametrize(
    "text",
    [
        "rollout: {precision: int3}",
        "data: {train_batch_size: 0}",
        "data: {train_batch_size: many}",
        "rolout: {n: 2}",
        "rollout: {nn: 2}",
        "correction: 2",
        "extends: 3",
        "verl: {a: {b: 1}}",
        "name: a/b",
        "reward: {overlong: {length: 3}}",
    ],
)
def test_what_the_schema_refuses(text):
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.ValidationError):
        validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text", ["extends: tiny", "env: {A: 1, B: b}", "verl: {a.b: [1, null], c: true}", "correction: {cap: null}", "{}"]
)
def test_what_the_schema_accepts(text):
    validate(yaml.safe_load(text))


def test_every_field_has_a_docstring_or_a_documented_part():
    tree = ast.parse(inspect.getsource(spec))
    for part in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for statement, following in zip(part.body, [*part.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                part_field = ast.unparse(statement.annotation).endswith("Spec")
                assert documented or part_field, f"{part.name}.{ast.unparse(statement.target)}"
