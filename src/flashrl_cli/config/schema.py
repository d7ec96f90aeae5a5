"""The keys of presets as a JSON schema and as documentation tables, both made from the spec and its docstrings.

pydantic can read the docstrings itself (`use_attribute_docstrings`), but would do so in every command that loads a
preset and make the spec's import a quarter slower. Here the spec's source is parsed only when the schema is requested.
"""

from __future__ import annotations

import ast
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

from flashrl_cli.config import spec
from flashrl_cli.config.yaml_file import text_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Schema = dict[str, Any]

_SCALAR = {"type": ["boolean", "number", "string", "null"]}
OPEN_MAPS: Mapping[str, Schema] = {
    "env": {"title": "text or numbers", "type": ["string", "number"]},
    "verl": {"title": "values or lists of values", "anyOf": [_SCALAR, {"type": "array", "items": _SCALAR}]},
}
"""Values of the maps with arbitrary keys; validators check them, which pydantic's schema does not describe."""
EXTENDS: Schema = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "default": [],
    "description": "Presets to start from, by name or by path relative to this file; later ones win, this file last.",
}
NAMES = {
    "boolean": "`true` or `false`",
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "null": "`null`",
}
BOUNDS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}


class Row(NamedTuple):
    """A key of a preset, documented in Markdown."""

    key: str
    values: str
    default: str
    meaning: str


def preset_schema() -> Schema:
    """JSON schema (draft 2020-12) of a preset file.

    `required` is renamed to `x-required`, because a file may leave out keys that it inherits or that `--set` gives.
    """
    schema = spec.RunSpec.model_json_schema()
    documented = _docstrings()
    for name, part in {"RunSpec": schema, **schema["$defs"]}.items():
        part["x-required"] = part.pop("required", [])
        for field, described in part["properties"].items():
            described.pop("title", None)
            if (name, field) in documented:
                described["description"] = documented[name, field]
    for name, values in OPEN_MAPS.items():
        schema["properties"][name]["additionalProperties"] = values
    schema["$defs"]["RewardSpec"]["properties"]["arguments"]["additionalProperties"] = OPEN_MAPS["verl"]
    schema["x-required"].remove("name")  # the file's name replaces it
    own = {"extends": EXTENDS} | schema["properties"]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "flashrl preset"}
    return head | schema | {"title": "flashrl preset", "description": "A preset file.", "properties": own}


def sections(schema: Schema) -> Iterator[tuple[str, str, list[Row]]]:
    """Yield (title, meaning, rows) for the keys that belong to no part of a preset, then for every part."""
    parts = {name: part for name, field in schema["properties"].items() if (part := _part(field, schema))}
    single = {name: field for name, field in schema["properties"].items() if name not in parts}
    yield "At the top", "Keys that belong to no part.", list(_rows(schema | {"properties": single}, "", schema))
    for name, part in parts.items():
        yield f"`{name}`", part["description"], list(_rows(part, f"{name}.", schema))


def tables() -> str:
    """Markdown text with a table for every part of a preset."""
    return "\n".join(_table(*section) for section in sections(preset_schema()))


def _docstrings() -> dict[tuple[str, str], str]:
    """The docstring of each field of the spec, by class and field name, on one line."""
    found = {}
    for part in ast.parse(inspect.getsource(spec)).body:
        if not isinstance(part, ast.ClassDef):
            continue
        for field, below in zip(part.body, part.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[part.name, name] = " ".join(text.split())
    return found


def _part(field: Schema, schema: Schema) -> Schema | None:
    """Schema of the part that a field holds, even if the field may be null; None for a plain value."""
    options = [field, *field.get("anyOf", [])]
    reference = next((option["$ref"] for option in options if "$ref" in option), None)
    return schema["$defs"][reference.rpartition("/")[2]] if reference else None


def _rows(part: Schema, prefix: str, schema: Schema) -> Iterator[Row]:
    for name, field in part["properties"].items():
        inner = _part(field, schema)
        if inner is None or "anyOf" in field:
            default = "must be set" if name in part["x-required"] else "–"
            if "default" in field:
                default = f"`{text_of(field['default'])}`"
            yield Row(f"`{prefix}{name}`", _values(field), default, field["description"])
        if inner:
            yield from _rows(inner, f"{prefix}{name}.", schema)


def _values(field: Schema) -> str:
    if "title" in field:
        return str(field["title"])
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if "anyOf" in field:
        return " or ".join(_values(option) for option in field["anyOf"])
    return _kind(field)


def _kind(field: Schema) -> str:
    if "$ref" in field:
        return "map"
    if field["type"] == "array":
        return f"list of {_values(field['items'])}"
    if field["type"] == "object":
        return f"map of {_values(field['additionalProperties'])}"
    bounds = [f"{word} {text_of(field[bound])}" for bound, word in BOUNDS.items() if bound in field]
    kind = "name of a folder" if "pattern" in field else NAMES[field["type"]]
    return " ".join([kind, ", ".join(bounds)]).strip()


def _table(title: str, meaning: str, rows: list[Row]) -> str:
    lines = [f"### {title}", "", meaning, "", "| key | values | default | meaning |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, ""])
