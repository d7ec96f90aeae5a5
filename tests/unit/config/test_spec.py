"""The spec documents itself."""

from __future__ import annotations

import ast
import inspect

from flashrl_cli.config import spec


def test_every_field_has_a_docstring_or_a_documented_part():
    tree = ast.parse(inspect.getsource(spec))
    for part in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for statement, following in zip(part.body, [*part.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                part_field = ast.unparse(statement.annotation).endswith("Spec")
                assert documented or part_field, f"{part.name}.{ast.unparse(statement.target)}"
