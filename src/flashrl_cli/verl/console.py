"""verl's console lines as the metrics that its file logger writes, for runs whose files lie on other machines.

`step:3 - critic/score/mean:0.5 - actor/pg_loss:np.float64(0.01) - …` (verl/utils/logger/aggregate_logger.py:26), behind a prefix
of Ray's. Numbers only; NaN and infinity are None, as in the file (orjson).
"""

from __future__ import annotations

import math
import re

STEP = re.compile(r"(?:^|\s)step:(\d+) - (.+)$")
WRAPPED = re.compile(r"^np\.\w+\((.*)\)$")
SEPARATOR = " - "


def read_line(line: str) -> tuple[int, dict[str, float | None]] | None:
    """Step and metrics of a console line without colours; None for any other line."""
    found = STEP.search(line)
    if found is None:
        return None
    data: dict[str, float | None] = {}
    for pair in found[2].split(SEPARATOR):
        key, colon, text = pair.rpartition(":")
        number = _number(text.strip())
        if not colon or not key or number is None:
            return None
        data[key] = number if math.isfinite(number) else None
    return int(found[1]), data


def _number(text: str) -> float | None:
    wrapped = WRAPPED.match(text)
    bare = wrapped[1] if wrapped else text
    if bare in ("True", "False"):
        return float(bare == "True")
    try:
        return float(bare)
    except ValueError:
        return None
