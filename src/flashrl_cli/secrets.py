"""Which values must not be shown."""

from __future__ import annotations

import re

_NAME = re.compile(r"(?i)(^|[^a-z])(api_?key|access_?key|token|secret|passw(or)?d|credentials?|private_?key)([^a-z]|$)")
_VALUE = re.compile(r"^(hf_|sk-|ghp_|github_pat_|glpat-|xox[a-z]-|AKIA)|://[^/@\s]+:[^/@\s]+@")


def looks_secret(name: str, value: str) -> bool:
    """Whether a variable or key of that name, or its value, looks like something to keep to oneself."""
    return bool(_NAME.search(name) or _VALUE.search(value))
