"""verl's own list of loggers, read from its source without importing it."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from flashrl_cli.verl.environment import LOGGERS


def test_the_loggers_are_verl_s() -> None:
    package = importlib.util.find_spec("verl")
    assert package is not None
    assert package.origin is not None
    module = ast.parse((Path(package.origin).parent / "utils/tracking.py").read_text(encoding="utf-8"))
    (names,) = (
        ast.literal_eval(node.value)
        for node in ast.walk(module)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "supported_backend"
    )
    assert set(LOGGERS) == set(names)
