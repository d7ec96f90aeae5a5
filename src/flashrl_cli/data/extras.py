"""Libraries that come with the `data` extra, imported when first needed, with the fix when they are not installed."""

from __future__ import annotations

import importlib
from typing import Any

from flashrl_cli.doctor import stacks
from flashrl_cli.errors import EnvironmentNotReady


def require(module: str) -> Any:
    """The module; EnvironmentNotReady if its package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise EnvironmentNotReady(f"{package} is not installed", hint=stacks.install_extra("data")) from error
