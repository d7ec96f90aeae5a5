"""Reads YAML as plain data with the line of every key, writes values as text, and finds what a typing error meant.

PyYAML reads YAML 1.1, in which `1e-6` is text, `off` is false and `1:30` is ninety, and of two equal keys it keeps the
last. Here scalars follow the YAML 1.2 core schema, and whatever might be read differently from what its writer meant is
refused: equal keys, tags, aliases (presets use `extends` instead), Python's None, and typographic quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from flashrl_cli.errors import Location, Problem

MAX_BYTES = 100_000
"""Largest size of a file, in bytes; a preset has about a page of text, so a larger file is something else."""
QUOTES = "“”„‟‘’‚‛«»"
"""Typographic quotes, by which word processors and chat programs replace straight ones."""


class _Scalar(NamedTuple):
    """One type of YAML 1.2's core schema: pattern of its text, possible first characters, and conversion."""

    pattern: str
    starts: str
    convert: Callable[[str], Any]


NOWHERE = Location("")
"""Location of a text that no user wrote, or whose problems are not reported."""
_TAG = "tag:yaml.org,2002:"
_ALIAS, _ANCHOR = "*", "&"
_LINE_BREAK = re.compile("[\n\r\x85\u2028\u2029]")
_REFUSED: Any = object()
"""Marks a refused value, which is left out of the data so that it is not reported twice."""
_SCALARS = {
    "null": _Scalar(r"~|null|Null|NULL|", "~nN", lambda _: None),
    "bool": _Scalar(r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": _Scalar(
        r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
        "-+0123456789",
        lambda text: int(text, 0 if text[:2] in ("0o", "0x") else 10),
    ),
    "float": _Scalar(
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
}
_ADVICE = {
    "'\\t'": "indent with spaces, not with tabs",
    "cannot start any token": "quote it",
    "mapping values are not allowed": "quote text that holds a colon; keys of one map start in one column",
    "could not find expected ':'": "write a colon and a space between a key and its value",
    "expected <block end>": "keys of one map start in one column",
    "expected ',' or": "close the bracket; quote text that holds brackets",
    "unexpected end of stream": "close the quote",
    "but found another document": "one preset a file: drop what follows `---`",
}
"""How to fix a syntax error, by a part of PyYAML's message."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  # PyYAML copies it before changing it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose nodes as PyYAML does, but an alias or an anchored node becomes a special node that is refused.

        An alias is thereby reported in its own line and cannot make the tree infinite. An anchor would otherwise be
        dropped silently.
        """
        if not self.check_event(yaml.AliasEvent):
            anchor = self.peek_event().anchor  # type: ignore[no-untyped-call]
            node = super().compose_node(parent, index)
            if node is None or anchor is None:
                return node
            return yaml.ScalarNode(_ANCHOR, anchor, node.start_mark, node.end_mark)
        event = self.get_event()  # type: ignore[no-untyped-call]
        return yaml.ScalarNode(_ALIAS, event.anchor, event.start_mark, event.end_mark)


for _name, _scalar in _SCALARS.items():
    _starts = [*_scalar.starts, *([""] if _name == "null" else [])]
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_scalar.pattern})$"), _starts)


@dataclass(slots=True)
class Document:
    """A YAML text after parsing: its data, the line (from 1) of every dotted key, and its problems."""

    where: Location
    """The file or the option that contains the text."""
    data: Any = None
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def line_of(self, key: str) -> Location:
        """Location of a dotted key: its line, or the first line if the key was not read."""
        return self.where.at(self.lines.get(key, 1))


def parse(text: str, where: Location = NOWHERE, *, verbatim: Collection[str] = ()) -> Document:
    """Parse the YAML document of the file or option `where`.

    Never raises; errors are in `Document.problems`, each with its line. Numbers and truth values below the top-level
    keys `verbatim` remain text, exactly as written.
    """
    document = Document(where)
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            data = _Builder(document, verbatim).build(node, "")
            document.data = None if data is _REFUSED else data
    except yaml.YAMLError as error:
        document.problems.append(_syntax_problem(error, text, where))
    except RecursionError:
        document.problems.append(Problem("not a preset: nested too deeply", where))
    return document


def value(text: str, where: Location = NOWHERE, *, is_text: bool = False) -> Document:
    """Parse the value of an option: YAML of which, unlike in a file, nothing is silently dropped.

    A plain text is kept as it was written, including what would be a comment (`try #3`), a marker (`--- x`), a block
    (`|`) or a folded line break in a file; only surrounding blanks and quotes around the full text are removed. A list,
    a map or a quoted text of which YAML would drop a part is a problem. With `is_text`, the value is always text.
    """
    written = text.strip()
    document = parse(written, where, verbatim=("",) if is_text else ())
    try:
        node, lossy = yaml.compose(written, Loader=_Loader), _loses(written)
    except (yaml.YAMLError, RecursionError):
        node, lossy = None, is_text
    quoted = isinstance(node, yaml.ScalarNode) and node.style in ("'", '"')
    single = node is None or (isinstance(node, yaml.ScalarNode) and not quoted)
    if (is_text and (lossy or not quoted)) or (lossy and single):
        document = Document(where)
        mark = yaml.Mark(str(where), 0, 0, 0, None, 0)
        document.data = _Builder(document, ()).build(yaml.ScalarNode(f"{_TAG}str", written, mark, mark, style="'"), "")
    elif lossy and not document.problems:
        document.problems.append(Problem("a part of it would be lost: a comment, a marker or a line break", where))
    if document.data is _REFUSED or document.problems:
        document.data = None
    return document


def _loses(text: str) -> bool:
    """Whether YAML drops a part of `text`: a comment, a document marker, a line break in a text, or an empty block."""
    end = 0
    for token in yaml.scan(text, Loader=_Loader):
        start = token.start_mark.index
        if text[end:start].strip() or isinstance(
            token, yaml.DocumentStartToken | yaml.DocumentEndToken | yaml.DirectiveToken
        ):
            return True
        end = max(end, token.end_mark.index)
        if isinstance(token, yaml.ScalarToken):
            head, *rest = _LINE_BREAK.split(text[start:end])
            is_block = token.style in ("|", ">")
            if (not rest or "#" in head) if is_block else rest:
                return True
    return bool(text[end:].strip())


def items(text: str, where: Location) -> tuple[list[str], list[Problem]]:
    """Texts of the items of a list written without brackets, such as `1e-6, [a, b], "x, y"`, and the problems."""
    source, no_list = f"[{text}]", f"{text[:40]!r} is no list of values"
    try:
        node = yaml.compose(source, Loader=_Loader)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        return [], [Problem(f"{no_list}: {reason}", where)]
    except RecursionError:
        return [], [Problem(f"{no_list}: nested too deeply", where)]
    if not isinstance(node, yaml.SequenceNode) or node.end_mark.index != len(source) or text.rstrip().endswith(","):
        return [], [Problem(no_list, where)]
    bounds = [(item.start_mark.index, item.end_mark.index) for item in node.value]
    gaps = zip([1, *(end for _, end in bounds)], [*(start for start, _ in bounds), len(source) - 1], strict=True)
    if any(source[end:start].strip(" \t\n,") for end, start in gaps):
        return [], [Problem(f"{no_list}: a part of it would be lost", where)]
    return [source[start:end] for start, end in bounds], []


def read(path: Path, shown: str, *, verbatim: Collection[str] = (), kind: str = "preset") -> Document:
    """Read a YAML file that contains a map; an empty file is an empty map.

    Never raises; errors are in `Document.problems`, which call the file `shown` and its type `kind`.
    """
    where = Location(shown)
    text = _read_text(path, where, kind)
    if isinstance(text, Problem):
        return Document(where, {}, problems=[text])
    document = parse(text, where, verbatim=verbatim)
    if not isinstance(document.data, dict):
        if document.data is not None:
            what = f"a {kind} is a map of keys, this is {_kind(document.data)}"
            document.problems.append(Problem(what, where.at(1)))
        document.data = {}
    return document


def _kind(data: Any) -> str:
    return "a list" if isinstance(data, list) else "text" if isinstance(data, str) else "a single value"


def _read_text(path: Path, where: Location, kind: str) -> str | Problem:
    try:
        with path.open("rb") as stream:  # devices and pipes have no size that could be checked first
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            return Problem(f"larger than {MAX_BYTES:,} bytes: not a {kind}", where)
        return raw.decode("utf-8-sig")
    except IsADirectoryError:
        return Problem(f"this is a folder, not a {kind} file", where)
    except UnicodeDecodeError as error:
        return Problem(f"not UTF-8 text (byte {error.start})", where, "save it as UTF-8")
    except OSError as error:
        return Problem(f"cannot be read: {error.strerror}", where)


def _syntax_problem(error: yaml.YAMLError, text: str, where: Location) -> Problem:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        return Problem(f"not YAML: {str(error).splitlines()[0]}", where.at(line))
    mark, begun = error.problem_mark, error.context_mark
    context = error.context or ""
    if begun and begun.line != mark.line:
        context += f" that starts in line {begun.line + 1}"
    what = ", ".join(part for part in (context, error.problem) if part)
    line_text = (text.splitlines() or [""])[min(mark.line, len(text.splitlines()) - 1)]
    tab = "'\\t'" if "\t" in line_text[: len(line_text) - len(line_text.lstrip())] else ""
    advice = next((advice for part, advice in _ADVICE.items() if part in what + tab), None)
    return Problem(f"not YAML: {what}", where.at(mark.line + 1), advice)


class _Builder:
    """Converts PyYAML's nodes into data, and records lines and problems in a document."""

    def __init__(self, document: Document, verbatim: Collection[str]) -> None:
        self.document = document
        self.verbatim = verbatim

    def build(self, node: yaml.Node, key: str) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return self.mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            items = [self.build(item, key) for item in node.value]
            return _REFUSED if any(item is _REFUSED for item in items) else items
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, key)
        return self.refuse_tag(node)

    def mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = self.name(key_node)
            if name is _REFUSED:
                continue
            key = f"{prefix}.{name}" if prefix else name
            if name in data:
                first = self.document.lines[key]
                self.refuse(key_node, f"key {key!r} is given twice (first in line {first})", "keep one")
                continue
            self.document.lines[key] = key_node.start_mark.line + 1
            data[name] = self.build(value_node, key)
        return {name: value for name, value in data.items() if value is not _REFUSED}

    def name(self, node: yaml.Node) -> Any:
        """Name of a key; `_REFUSED`, with a problem recorded, for one that is not plain text."""
        if not isinstance(node, yaml.ScalarNode):
            return self.refuse(node, "a key in brackets; presets know no expressions", "write the value out")
        name = str(node.value)
        if name == "<<":
            return self.refuse(node, "merge keys (<<) are not supported", "use extends")
        if not name.isprintable():
            return self.refuse(node, f"key {name!r} holds a character that nobody sees", "type the line anew")
        if not node.tag.endswith(":str"):
            return self.refuse(node, f"key {name!r} is not text", "quote it")
        return name

    def scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        kind, text = node.tag.removeprefix(_TAG), str(node.value)
        if kind == "str":
            return self.text(node, text)
        if kind not in _SCALARS:
            return self.refuse_tag(node)
        if kind != "null" and key.partition(".")[0] in self.verbatim:
            return text
        try:
            return _SCALARS[kind].convert(text)
        except ValueError:
            return self.refuse(node, f"{text[:40]!r} is no {kind}")

    def text(self, node: yaml.ScalarNode, text: str) -> Any:
        plain = node.style is None
        if plain and text == "None":
            return self.refuse(node, "None is Python's", "write null, or quote it")
        if plain and len(text) > 1 and text[0] in QUOTES and text[-1] in QUOTES:
            return self.refuse(node, f"{text} has typographic quotes", f'write "{text[1:-1]}"')
        if "\0" in text or re.search("[\ud800-\udfff]", text):
            return self.refuse(node, f"{text!r} holds what is no character")
        return text

    def refuse_tag(self, node: yaml.Node) -> Any:
        if node.tag == _ALIAS:
            return self.refuse(
                node, f"aliases (*{node.value}) are not supported", "write the value out, or use extends"
            )
        if node.tag == _ANCHOR:
            return self.refuse(node, f"anchors (&{node.value}) are not supported", "quote text that starts with &")
        tag = node.tag.replace(_TAG, "!!")
        return self.refuse(node, f"tag {tag} is not supported", "presets hold plain text, numbers, lists and maps")

    def refuse(self, node: yaml.Node, message: str, hint: str | None = None) -> Any:
        """Record a problem, and return the marker that replaces the value."""
        self.document.problems.append(Problem(message, self.document.where.at(node.start_mark.line + 1), hint))
        return _REFUSED


def text_of(value: Any) -> str:
    """YAML text of a value, from which an equal value of the same type is read: `null`, `1e-6`, `[console, file]`."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, str):
        return value if _is_plain(value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return re.sub(r"e([-+]?)0+(\d)", r"e\1\2", repr(value))
    return json.dumps(value)


def _is_plain(text: str) -> bool:
    """Whether a text needs no quotes, alone and within a list."""
    return _reads(text, text) and _reads(f"[{text}]", [text])


def _reads(text: str, value: Any) -> bool:
    document = parse(text)
    return not document.problems and bool(document.data == value)


CUTOFF = 0.6
"""Least similarity, from 0 to 1, at which one name may be a misspelling of another (difflib's default)."""
_WORDS = {
    None: ("", "none", "null", "nil", "off", "no", "false"),
    True: ("true", "yes", "on", "1", "y"),
    False: ("false", "no", "off", "0", "n"),
}
"""Other spellings of null and truth values."""


def fold(text: str) -> str:
    """A text without differences that are easily typed: case, dashes, spaces, surrounding quotes."""
    return re.sub(r"[-\s]+", "_", text.strip(f" \t'\"-+{QUOTES}").casefold())


def nearest(text: str, names: Iterable[str], count: int = 2) -> list[str]:
    """Up to `count` names similar to `text`, the nearest first; just one if it equals `text` after folding."""
    folded = {fold(name).replace("_", ""): name for name in names}
    written = fold(text).replace("_", "")
    return [
        folded[near] for near in get_close_matches(written, folded, n=1 if written in folded else count, cutoff=CUTOFF)
    ]


def same_key(text: str, keys: Sequence[str]) -> str | None:
    """The key that `text` equals after folding, with `/` read as a dot and without an attached value (`lr:1e-6`)."""
    forms = (fold(text).replace("/", "."), re.split("[:=]", fold(text))[0])
    return next((form for form in forms if form in keys), None)


def nearest_keys(text: str, keys: Sequence[str]) -> list[str]:
    """Up to two dotted keys similar to `text`; the last name weighs twice as much as the names before it."""
    head, _, name = fold(text).rpartition(".")
    scores = {}
    for key in keys:
        other_head, _, other = key.rpartition(".")
        alike = _likeness(name, other)
        score = (2 * alike + _ratio(head, other_head)) / 3 if head else alike
        if min(alike, score) >= CUTOFF:
            scores[key] = score
    best = sorted(scores, key=lambda key: -scores[key])[:2]
    return [key for key in best if scores[key] > scores[best[0]] - 0.1]


def readings(value: Any, example: Any = None) -> Iterator[Any]:
    """Yield other readings of a refused value, the likeliest first; `example` is a valid value of its key."""
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    if isinstance(value, list) and len(value) == 1:
        yield value[0]
    text = value if isinstance(value, str) else str(value)
    if isinstance(example, tuple | list):
        yield list(dict.fromkeys([*example, *(part.strip() for part in text.split(","))]))
    yield from (meant for meant, words in _WORDS.items() if text.strip().casefold() in words)
    if isinstance(value, str):
        yield from _numbers(text.strip(f" ,;'\"{QUOTES}"))
    elif isinstance(value, bool | int | float):
        yield text.lower()


def _numbers(text: str) -> Iterator[Any]:
    grouped = re.fullmatch(r"[-+]?\d{1,3}([,_]\d{3})+", text)
    plain = re.sub("[,_]", "", text) if grouped else re.sub(r"^(\d+),(\d+)$", r"\1.\2", text)
    number = parse(plain.rstrip("% ") or "null").data
    if isinstance(number, int | float):
        yield number / 100 if plain.endswith("%") else number


def _likeness(a: str, b: str) -> float:
    words, others = set(a.split("_")), set(b.split("_"))
    return max(_ratio(a, b), 0.8 if words < others or others < words else 0.0)


def _ratio(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b).ratio()
