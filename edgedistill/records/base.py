"""What every record is made of: immutable, unknown keys refused, units in the names of the fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Interval = tuple[float, float]  # 95 %; null beside a figure: too few independent units to tell (statistics.py)


class Record(BaseModel):
    """Base: immutable, unknown keys refused. Its validator is built when it is first used: most commands use few."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)


class FileEntry(Record):
    """A file: path relative to its folder (posix), size, content hash."""

    path: str
    bytes: Count
    sha256: str
