"""Questions with their responses as plain text, in which responses cannot control the terminal or act as markup."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from flashrl_cli.text import counted

_KEPT = 400
"""Characters at each end of a shortened text; the end is included because it holds the answer."""
_INDENT = "    "
_TAB = 4
_BRIEF = 200
"""Number of characters of a truth, an answer or a problem that are shown."""


def question_lines(question: Mapping[str, Any], *, width: int, full: bool) -> Iterator[str]:
    """Lines of one question with its responses, `width` columns wide; long texts lose their middle unless `full`."""
    score = "; ".join(f"{_step(one['step'])} {_of(one['right'], one['of'])}" for one in question["right"])
    samples = {one["step"]: one["of"] for one in question["right"]}
    yield from _wrapped(f"── question {question['question']}: {score}", width)
    yield from _body(question["prompt"], width, full=full)
    yield from _wrapped(f"truth: {_brief(question['ground_truth'])}", width)
    for response in question["responses"]:
        yield ""
        yield from _wrapped(_heading(response, samples[response["step"]]), width)
        yield from _body(response["response"], width, full=full)


def sample_lines(sample: Mapping[str, Any], *, width: int, full: bool) -> Iterator[str]:
    """Lines of a response of a training step (plugins.samples.Sample as data), `width` columns wide."""
    length = counted(sample["length"], "token")
    parts = [f"step {sample['step']}", f"reward {sample['reward']:.3g}"]
    parts.append(f"{length}, as many as a response may have" if sample["truncated"] else length)
    parts += [f"advantage {sample['advantage']:.3g}"] if sample["advantage"] is not None else []
    if sample["weight"] is not None:
        parts.append(f"weight {sample['weight']:.3f}, at most {sample['weight_max']:.3g}")
    yield from _wrapped(f"── {' · '.join(parts)} · {sample['picked']}", width)
    yield from _body(sample["prompt"], width, full=full)
    yield from _wrapped(f"truth: {_brief(str(sample['ground_truth']))}", width)
    yield "response:"
    yield from _body(sample["response"], width, full=full)


def row_lines(row: Mapping[str, Any], *, width: int, full: bool) -> Iterator[str]:
    """Lines of a row of a data set: the text that the model sees, or else its messages, and the truth."""
    yield from _wrapped(f"── {row['split']} {row['row']}, scored as {row['data_source']}", width)
    if row["text"] is not None:
        yield from _body(row["text"], width, full=full)
    else:
        for turn in row["prompt"]:
            yield from _body(f"{turn['role']}: {turn['content'] or ''}", width, full=full)
    yield from _wrapped(f"truth: {_brief(str(row['ground_truth']))}", width)


def safe(text: str) -> str:
    """`text` with line ends and printable characters only; all others are replaced by escape sequences."""
    plain = text.replace("\r\n", "\n").expandtabs(_TAB)
    return "".join(map(_printable, plain))


def shortened(text: str) -> str:
    """`text` without its middle if it is long, with a note on the number of omitted characters."""
    left_out = len(text) - 2 * _KEPT
    if left_out <= _KEPT // 4:
        return text
    return f"{text[:_KEPT]}\n[… {left_out:,} characters; --full shows them …]\n{text[-_KEPT:]}"


def _heading(response: Mapping[str, Any], samples: int) -> str:
    """A heading with the origin and the grade of a response."""
    where = _step(response["step"]) + (f", sample {response['sample']}" if samples > 1 else "")
    parts = [f"{where}: {_mark(response['correct'])}"]
    parts += [
        f"{name} {_mark(response[name])}"
        for name in ("flexible", "boxed")
        if response[name] not in {None, response["correct"]}
    ]
    prediction = response["prediction"]
    parts.append("no answer found" if prediction is None else f"answer {_brief(prediction)}")
    parts.append(f"{counted(response['tokens'], 'token')}{', cut at the limit' if response['cut'] else ''}")
    parts += [f"no verdict: {_brief(response['problem'])}"] if response["problem"] else []
    return " · ".join(parts)


def _brief(text: str) -> str:
    """`text` on one line, truncated if it is long."""
    line = " ".join(safe(text).split())
    return line if len(line) <= _BRIEF else f"{line[:_BRIEF]}…"


def _body(text: str, width: int, *, full: bool) -> Iterator[str]:
    for line in safe(text if full else shortened(text)).strip("\n").split("\n"):
        indent = _INDENT + line[: len(line) - len(line.lstrip())][: width // 4]
        yield from textwrap.wrap(
            line.strip(), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        ) or [""]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=_INDENT)


def _printable(character: str) -> str:
    if character == "\n" or character.isprintable():
        return character
    return " " if unicodedata.category(character) == "Zs" else character.encode("unicode_escape").decode("ascii")


def _mark(right: bool) -> str:
    return "right" if right else "wrong"


def _of(right: int, count: int) -> str:
    return _mark(right > 0) if count == 1 else f"{right} of {count} right"


def _step(step: int | None) -> str:
    return "the model" if step is None else f"step {step}"
