"""Float against quantized: the figures, what is said of them, and a real pair of GGUFs."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import tiny

from edgedistill.export.stage import write_artifact
from edgedistill.progress import Progress
from edgedistill.quantization.options import ExportOptions
from edgedistill.runtimes.speed import PAIRS, WARMUP, compare, report


class Heard(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, message: str, *, level: int = 1) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)


@pytest.mark.parametrize(("ratio", "pays", "warned"), [(0.5, True, 0), (1.5, False, 1), (1.0, False, 1)])
def test_the_ratio_is_of_pairs_and_says_whether_it_pays(ratio: float, pays: bool, warned: int) -> None:
    """The machine slows down five times in the middle: pairs do not notice."""
    order: list[str] = []

    def took(name: str, factor: float) -> float:
        order.append(name)
        return factor * (5.0 if (len(order) - 1) // 2 > PAIRS // 2 else 1.0)

    found = compare(
        lambda: took("f", 1.0),
        lambda: took("q", ratio),
        runtime="none",
        threads=1,
    )
    assert found.ratio == pytest.approx(ratio) and found.ratio_ci95 == pytest.approx((ratio, ratio))
    assert found.pays is pays and found.basis == "measured" and found.machine["cpu"]
    assert len(order) == 2 * (PAIRS + WARMUP) and order[:4] == ["q", "f", "f", "q"]
    heard = Heard()
    report(found, "Q4_0", heard)
    assert len(heard.warned) == warned and len(heard.said) == 1 - warned


def test_an_export_compares_itself_with_f16_and_leaves_nothing_else(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "model")
    for compare_speed in (True, False):
        out = tmp_path / str(compare_speed)
        made = write_artifact(
            checkpoint, out, format_="gguf", quantization="Q8_0", context_tokens=64, name="tiny",
            options=ExportOptions(compare_speed=compare_speed),
        )  # fmt: skip
        assert (made.speed is not None) == compare_speed
        assert [path.name for path in out.iterdir()] == ["model.gguf"]
        if made.speed is not None:
            low, high = made.speed.ratio_ci95
            assert 0 < low <= made.speed.ratio <= high and made.speed.runtime.startswith("llama-cpp-python")
