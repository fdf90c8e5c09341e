"""How 8 bits are spent: signs and width of activations and weights, by the instruction set that multiplies them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from edgedistill.errors import UserError, did_you_mean
from edgedistill.machine import facts

AUTO = "auto"


@dataclass(frozen=True)
class Scheme:
    """`signed_activations`: int8 about zero, else uint8 with a zero point. `reduce_range`: weights of 7 bits.

    `signed_weights`: int8; else uint8 about 128, of the same values.
    """

    name: str
    signed_activations: bool = False
    signed_weights: bool = True
    reduce_range: bool = False


SCHEMES = {
    "u8s8": Scheme("u8s8"),
    # A product of uint8 and int8 is summed in pairs in 16 bits by AVX2 and AVX512 without VNNI (vpmaddubsw):
    # 2 · 255 · 127 does not fit, 2 · 255 · 64 does.
    "u8s8-7bit": Scheme("u8s8-7bit", reduce_range=True),
    "u8u8": Scheme("u8u8", signed_weights=False),
    "s8s8": Scheme("s8s8", signed_activations=True),
}
DOT_PRODUCTS = ("avx_vnni", "avx512_vnni", "amx_int8")


def scheme_of(asked: str, *, arch: str | None = None, isa: Collection[str] | None = None) -> tuple[Scheme, str]:
    """The scheme and why it is that one. `auto`: for the instruction set given, else this machine's. UserError."""
    if asked != AUTO:
        if asked not in SCHEMES:
            raise UserError(f"no INT8 scheme '{asked}'", did_you_mean(asked, [AUTO, *SCHEMES]))
        return SCHEMES[asked], "as asked"
    if arch is None or isa is None:
        here = facts.describe()
        arch, isa = str(here["arch"]), list(here["isa"])
    if arch == "x86_64" and not set(isa) & set(DOT_PRODUCTS):
        return SCHEMES["u8s8-7bit"], "x86 without VNNI sums products of 8 bits in 16 and would saturate"
    return SCHEMES["u8s8"], f"{arch} multiplies 8 bits into 32 without saturating"
