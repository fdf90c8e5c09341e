"""YAML from outside, read once and strictly: YAML 1.2's core schema, and nothing that silently means another thing.

One reader for recipes, `--set` values and device profiles. `yes`, `on`, `1:30` and dates are the text that they look
like; a key that stands twice, an anchor, an alias, a tag, a directive, a second document, a number that two versions
of YAML read apart (010) or that no double holds are refused, with line and column. libyaml's events are put together
here, in one pass and without a stack of calls, so that depth, size and time are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from edgedistill.errors import UserError
from edgedistill.strict import MAX_NUMBER_CHARS, read_text, shown

MAX_YAML_BYTES = 1 << 20
MAX_YAML_DEPTH = 20  # a profile needs four levels
# libyaml's parser where PyYAML has it: several times faster, and `targets list` reads every profile
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")  # 60_000 too, as YAML 1.1 and Python write it
_PREFIXED = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_OCTAL_OR_NOT = re.compile(r"[-+]?0[0-9_]+")
_NO_NUMBER = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class _NotYaml(Exception):
    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem)
        self.problem, self.mark = problem, mark


class _Dumper(yaml.SafeDumper):
    """PyYAML's, which quotes what YAML 1.1 would read as a number, and here also what 1.2 would."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # What does not print is escaped: PyYAML writes some line breaks of Unicode as they are, and reads them as blanks.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text)
for _pattern in (_PREFIXED, _FLOAT, _OCTAL_OR_NOT, _INTEGER):
    _Dumper.add_implicit_resolver(
        "tag:edgedistill:number", re.compile(f"(?:{_pattern.pattern})$"), list("-+.0123456789")
    )


def read_yaml(path: Path, *, what: str, max_bytes: int = MAX_YAML_BYTES) -> Any:
    """The one document of a YAML file. UserError with file, line, column and cause for anything else."""
    return parse_yaml(read_text(path, what=what, max_bytes=max_bytes), where=f"{what} {path}")


def parse_yaml(text: str, *, where: str) -> Any:
    """YAML text → mappings, lists, str, int, float, bool and None; keys are text. `where` names it in a UserError."""
    try:
        text.encode()
        return _document(yaml.parse(text, Loader=_PARSER))
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds text that is not Unicode: {shown(text[error.start])}", "save it as UTF-8"
        ) from error
    except _NotYaml as error:
        raise UserError(f"{where}{_place(error.mark)}: {error.problem}", "correct it there") from error
    except yaml.MarkedYAMLError as error:
        raise UserError(
            f"{where}{_place(error.problem_mark)} is not YAML: {error.problem}", "correct its syntax"
        ) from error
    except yaml.YAMLError as error:
        reason = getattr(error, "reason", None) or str(error).splitlines()[0]
        raise UserError(f"{where} is not YAML: {reason}{_character(error, text)}", "correct it there") from error


def dump_yaml(value: Any) -> str:
    """YAML text that `parse_yaml` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _place(mark: Any) -> str:
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"


def _character(error: yaml.YAMLError, text: str) -> str:
    place = getattr(error, "position", None)
    if not isinstance(place, int) or not 0 <= place < len(text):
        return ""
    return f": {shown(text[place])} on line {text.count(chr(10), 0, place) + 1}"


@dataclass
class _Open:
    """A mapping or list that has begun. `lines`: where each key stands; `key`: one that waits for its value."""

    made: dict[str, Any] | list[Any]
    lines: dict[str, int] = field(default_factory=dict)
    key: str | None = None

    def takes_key(self) -> bool:
        return isinstance(self.made, dict) and self.key is None

    def take_key(self, event: Any) -> None:
        key = event.value
        if key in self.lines:
            raise _NotYaml(f"the key {shown(key)} appears twice (first on line {self.lines[key]})", event.start_mark)
        self.lines[key] = event.start_mark.line + 1
        self.key = key

    def take(self, value: Any) -> None:
        if isinstance(self.made, list):
            self.made.append(value)
        else:
            assert self.key is not None
            self.made[self.key] = value
            self.key = None


def _document(events: Iterable[yaml.Event]) -> Any:
    documents = 0
    root: Any = None
    stack: list[_Open] = []
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _NotYaml("a second document begins", event.start_mark)
            if event.version or event.tags:
                raise _NotYaml("directives (%YAML, %TAG) are not read", event.start_mark)
            continue
        if isinstance(event, yaml.AliasEvent):
            raise _NotYaml(f"the alias *{shown(event.anchor)[1:-1]}: aliases are not read", event.start_mark)
        if isinstance(event, yaml.ScalarEvent):
            _refuse_properties(event)
            if stack and stack[-1].takes_key():
                stack[-1].take_key(event)
                continue
            value = _scalar(event)
        elif isinstance(event, yaml.CollectionStartEvent):
            _refuse_properties(event)
            if len(stack) >= MAX_YAML_DEPTH:
                raise _NotYaml(f"nested more than {MAX_YAML_DEPTH} deep", event.start_mark)
            if stack and stack[-1].takes_key():
                raise _NotYaml("a key is a mapping or a list; keys are plain text", event.start_mark)
            stack.append(_Open({} if isinstance(event, yaml.MappingStartEvent) else []))
            continue
        elif isinstance(event, yaml.CollectionEndEvent):
            value = stack.pop().made
        else:
            continue
        if stack:
            stack[-1].take(value)
        else:
            root = value
    return root


def _refuse_properties(event: Any) -> None:
    if event.anchor is not None:
        raise _NotYaml(f"the anchor &{shown(event.anchor)[1:-1]}: anchors are not read", event.start_mark)
    if event.tag is not None:
        raise _NotYaml(f"the tag {shown(event.tag)}: tags are not read", event.start_mark)


def _scalar(event: yaml.ScalarEvent) -> Any:
    """A plain scalar by YAML 1.2's core schema; a quoted one is text."""
    text: str = event.value
    if event.style:
        return text
    if text in _NULLS:
        return None
    if text in _TRUTHS:
        return _TRUTHS[text]
    if text[0] not in "-+.0123456789":
        return text
    whole = bool(_INTEGER.fullmatch(text) or _PREFIXED.fullmatch(text))
    if not whole and _OCTAL_OR_NOT.fullmatch(text):
        raise _NotYaml(
            f"{shown(text)} is octal in YAML 1.1 and decimal in 1.2: write it without the zero, or quote it as text",
            event.start_mark,
        )
    if not whole and not _FLOAT.fullmatch(text):
        if _NO_NUMBER.fullmatch(text):
            raise _NotYaml(f"{text} is not a finite number", event.start_mark)
        return text
    if len(text) > MAX_NUMBER_CHARS:
        raise _NotYaml(f"a number of {len(text):,} characters: {text[:20]}…", event.start_mark)
    value = int(text.replace("_", ""), 0) if whole else float(text)
    if value in (float("inf"), float("-inf")):
        raise _NotYaml(f"the number {text} is beyond what a double holds", event.start_mark)
    return value
