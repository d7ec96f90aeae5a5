"""Values as Hydra's command line reads them back."""

from __future__ import annotations

import re
from collections.abc import Sequence

Value = bool | int | float | str | None | Sequence["Value"]

# Text that Hydra's lexer takes as it is. Anything that could be a number, a keyword or an operator is quoted instead.
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.+%@-]*")
_KEYWORD = re.compile(r"null|true|false|inf|nan", re.IGNORECASE)


def quote(value: Value) -> str:
    """Text of `value` in Hydra's override grammar; parsing it gives an equal value of the same type."""
    match value:
        case None:
            return "null"
        case bool() | int():
            return str(value)
        case float():
            return _float(value)
        case str():
            return value if _PLAIN.fullmatch(value) and not _KEYWORD.fullmatch(value) else _quoted(value)
        case _:
            return f"[{','.join(quote(item) for item in value)}]"


def _float(value: float) -> str:
    """Shortest text, `1e-6` rather than Python's `1e-06`."""
    return re.sub(r"e([-+]?)0+(\d)", r"e\1\2", repr(value))


def _quoted(text: str) -> str:
    """Single-quoted; backslashes count only before a quote (hydra/core/override_parser/types.py, QuotedString)."""
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"
