r"""Where a response says its answer: text in, text or number out; nothing is judged here.

Numbers are what lm-evaluation-harness takes for them in GSM8K (lm_eval/tasks/gsm8k/gsm8k.yaml, filter flexible-extract: the last
match counts; commas, dollar signs and a trailing dot do not), with three differences: a match has a digit, a comma belongs to a number
only where it separates thousands, and a hyphen is a sign only where nothing stands before it (`8-3` ends with 3).
"""

from __future__ import annotations

import re
from decimal import Decimal

from flashrl_cli.data.boxed import boxed_answer

_THIN = re.compile(r"\{,\}|(?:,?\\[,!;:]\s*)(?=\d{3}(?!\d))")
"""What LaTeX puts between thousands, beside the plain comma."""
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])-\s?)?(?:\\?\$\s?)?(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
)
_AFTER_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_AFTER_ANSWER = re.compile(r"answer[ \t]*:[ \t]*([^\n]*)", re.IGNORECASE)
_EDGES = " \t\n*"


def last_number(text: str) -> Decimal | None:
    """The last number of `text`; None if there is none."""
    found = None
    for found in _NUMBER.finditer(_plain(text)):  # noqa: B007
        pass
    return found and _value(found)


def number(text: str) -> Decimal | None:
    """The number that `text` is; None if it is anything else, too."""
    found = _NUMBER.fullmatch(_plain(text))
    return found and _value(found)


def boxed(text: str) -> str | None:
    r"""Content of the last `\boxed` without a full stop or a percent sign at its end; None if there is none that closes."""
    content = boxed_answer(text)
    return None if content is None else without_end(content)


def without_end(answer: str) -> str:
    """`answer` without a full stop and a percent sign at its end, thousands separated by nothing but commas."""
    return _plain(answer).strip().removesuffix(".").removesuffix("%").removesuffix("\\").rstrip()


def without_unit(answer: str) -> str:
    """`answer` without words after the number that it ends with: 72 of `72 clips`."""
    return re.sub(r"(?<=\d)\s+[a-zA-Z][a-zA-Z ]*$", "", answer)


def prediction(text: str) -> str | None:
    """The answer that a reader would take: the last box's, else after ####, else after `Answer:`, else the last number."""
    for found in (boxed(text), _last(_AFTER_HASHES, text), _last(_AFTER_ANSWER, text)):
        if found:
            return found
    number = last_number(text)
    return None if number is None else f"{number:f}"


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return without_end(found[-1].strip(_EDGES)) if found else None


def _plain(text: str) -> str:
    return _THIN.sub(lambda found: "," if found[0] == "{,}" else "", text).replace("\N{MINUS SIGN}", "-")


def _value(found: re.Match[str]) -> Decimal:
    value = Decimal(found["digits"].replace(",", ""))
    return -value if found["sign"] else value
