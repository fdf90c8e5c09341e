"""Records of our schemas in files that somebody else may have written: JSON, bounded before anything is built of it."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from edgedistill.errors import UserError
from edgedistill.strict import NotJson, parse_json

R = TypeVar("R", bound=BaseModel)
MAX_DEPTH = 32
MAX_VALUES = 1_000_000
INTEGERS = range(-(2**63), 2**63)
MAX_STRING = 100_000  # characters: nothing that a record says is longer
FAULT_CHARS = 300


def json_value(
    data: bytes, *, what: str, remedy: str, max_bytes: int, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES
) -> Any:
    """The value of a JSON document, by the rules of `strict.parse_json`. `what` names it in errors.

    Raises UserError for more than `max_bytes` bytes, `max_depth` levels or `max_values` values.
    """
    if len(data) > max_bytes:
        raise UserError(f"{what} has {len(data):,} bytes, more than {max_bytes:,}", remedy)
    # Commas and brackets inside strings count too: an upper bound, for the price of three scans in C.
    values = 1 + sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > max_values:
        raise UserError(f"{what} may hold {values:,} values, more than {max_values:,}", remedy)
    try:
        return parse_json(data, max_depth=max_depth)
    except NotJson as error:
        raise UserError(f"{what} is not valid JSON: {error}", remedy) from error


def json_record(
    kind: type[R], data: bytes, *, what: str, remedy: str, max_bytes: int, max_values: int = MAX_VALUES
) -> R:
    """A record of one of our schemas, integers of 64 bits, strings of at most `MAX_STRING`.

    Raises UserError naming the file and the field.
    """
    value = json_value(data, what=what, remedy=remedy, max_bytes=max_bytes, max_values=max_values)
    _check_values(value, what, remedy)
    try:
        # As JSON's types are: "1" is no number and 1.5 no integer.
        return kind.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise UserError(f"{what}: {first_fault(error)}", remedy) from error


def first_fault(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, as `field.path: reason`."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where + ': ' if where else ''}{first['msg']}"[:FAULT_CHARS]


def _check_values(value: Any, what: str, remedy: str) -> None:
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left.extend(one)
            left.extend(one.values())
        elif isinstance(one, list):
            left.extend(one)
        elif isinstance(one, int) and one not in INTEGERS:
            raise UserError(f"{what}: the integer {one} does not fit in 64 bits", remedy)
        elif isinstance(one, str) and len(one) > MAX_STRING:
            raise UserError(f"{what}: a string of {len(one):,} characters, more than {MAX_STRING:,}", remedy)
