"""A number with its unit, basis and source: apart from the other records, for what needs no more of them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Basis = Literal["measured", "proxy", "emulated", "derived"]


class Figure(BaseModel):
    """A number that a person sees: never without its unit, basis and source."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)

    value: float
    unit: str
    basis: Basis
    source: str
