"""What an export prints of its artifact."""

from __future__ import annotations

from edgedistill.cli.show import _fallback_lines
from edgedistill.records.artifact import Fallback


def test_tensors_that_fell_back_alike_share_a_line() -> None:
    why = "96 columns are not a multiple of 256"
    many = [Fallback(tensor=f"blk.{i}.attn_q.weight", wanted="Q4_K", got="Q5_0", why=why) for i in range(3)]
    one = Fallback(tensor="output.weight", wanted="Q6_K", got="Q8_0", why=why)
    assert _fallback_lines([many[0], one, *many[1:]]) == [
        f"fallback: 3 tensors (blk.0.attn_q.weight, ...) are Q5_0 instead of Q4_K: {why}",
        f"fallback: output.weight is Q8_0 instead of Q6_K: {why}",
    ]
