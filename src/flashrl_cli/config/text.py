"""Values as people write them: in a preset, after `--set key=`, and in what `flashrl presets` prints."""

from __future__ import annotations

import json
import re
from typing import Any

from flashrl_cli.config import yaml_file


def text_of(value: Any) -> str:
    """Text that is read back as an equal value of the same type: `null`, `true`, `1e-6`, `[console, file]`."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, str):
        return value if _is_plain(value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return re.sub(r"e([-+]?)0+(\d)", r"e\1\2", repr(value))
    return json.dumps(value)


def _is_plain(text: str) -> bool:
    """Whether text needs no quotes, alone or within a list."""
    return _reads(text, text) and _reads(f"[{text}]", [text])


def _reads(text: str, value: Any) -> bool:
    document = yaml_file.parse(text, "")
    return not document.problems and bool(document.data == value)
