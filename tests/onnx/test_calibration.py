"""Calibration: histograms against a slow count, thresholds against onnxruntime's, what changes no range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CORPUS
from encoders import tiny_encoder
from onnxruntime.quantization.calibrate import HistogramCollector

from edgedistill.errors import UserError
from edgedistill.onnx.calibration import file_samples, given_samples, observe_ranges, ranges_of, text_samples
from edgedistill.onnx.float_export import FloatExport, export_float
from edgedistill.onnx.int8_scheme import SCHEMES
from edgedistill.onnx.qdq import activation_step
from edgedistill.onnx.quantized_graph import static_tensors
from edgedistill.quantization.histogram import (
    BINS,
    METHODS,
    Observed,
    chosen_range,
    entropy_threshold,
    percentile_range,
    rounded_up,
)
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import TensorSpec

IMAGE = TensorSpec(name="image", dtype="float", shape=["batch", 3, 4])


def observed(parts: list[np.ndarray[Any, Any]]) -> Observed:
    """Both passes over parts of a tensor."""
    seen = Observed()
    for part in parts:
        seen.widen(part)
    seen.begin_bins()
    for part in parts:
        seen.count(part)
    return seen


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FloatExport]:
    folder = tmp_path_factory.mktemp("bert")
    checkpoint = tiny_encoder(folder / "model", "bert")
    return checkpoint, export_float(checkpoint, folder / "out")[0]


def test_counts_are_those_of_a_slow_count() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((3, n)).astype(np.float32) * 3 for n in (1, 7, 500)]
    seen = observed(parts)
    everything = np.concatenate([part.reshape(-1) for part in parts])
    assert seen.low == everything.min() and seen.high == everything.max() and seen.values == everything.size
    assert seen.amplitude is not None
    slow = np.zeros(BINS, dtype=np.int64)
    width = 2 * seen.amplitude / BINS
    for value in everything:
        slow[min(BINS - 1, int((float(value) + seen.amplitude) // width))] += 1
    # A value on an edge may fall on either side of it.
    assert np.abs(np.cumsum(seen.counts) - np.cumsum(slow)).max() <= 1 and seen.counts.sum() == everything.size


def test_the_amplitude_is_rounded_up_so_that_noise_moves_no_bin() -> None:
    assert rounded_up(1.0) == 1.0 and rounded_up(0.0) == 0.0
    assert rounded_up(3.1234567) == rounded_up(3.1234567 * (1 + 1e-7)) >= 3.1234567
    assert rounded_up(1e-20) / 1e-20 < 1.002


@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentiles_are_numpys(percentile: float) -> None:
    values = np.random.default_rng(1).laplace(size=200_000).astype(np.float32)
    seen = observed([values])
    assert seen.amplitude is not None
    found = percentile_range(seen.counts, seen.amplitude, percentile)
    cut = (100 - percentile) / 2
    np.testing.assert_allclose(found, np.percentile(values, [cut, 100 - cut]), atol=2 * 2 * seen.amplitude / BINS)


@pytest.mark.parametrize("kind", ["laplace", "normal"])
def test_entropy_finds_what_onnxruntimes_calibrator_finds(kind: str) -> None:
    rng = np.random.default_rng(2)
    values = (rng.laplace(size=100_000) if kind == "laplace" else rng.standard_normal(100_000)).astype(np.float32)
    seen = observed([values])
    amplitude = seen.amplitude
    assert amplitude is not None
    levels = 255
    found = entropy_threshold(seen.counts, amplitude, low=seen.low, high=seen.high, symmetric=True, levels=levels)
    # onnxruntime's takes every bin as a candidate, in a loop over bins and levels: on a coarser histogram.
    coarse = seen.counts.reshape(-1, 4).sum(1)
    edges = np.linspace(-amplitude, amplitude, len(coarse) + 1).astype(np.float32)
    collector = HistogramCollector("entropy", False, len(coarse), levels, 99.99, "same")
    low, high = np.float32(-amplitude), np.float32(amplitude)
    theirs = collector.get_entropy_threshold((coarse, edges, low, high), levels)
    assert found == pytest.approx(float(theirs[1]), rel=0.25) and found < 1.01 * amplitude


def test_an_outlier_is_clipped_by_entropy_and_percentile_and_kept_by_minmax() -> None:
    values = np.random.default_rng(3).standard_normal(200_000).astype(np.float32)
    values[0] = 60
    seen = observed([np.abs(values)])
    highs = {method: chosen_range(seen, method, symmetric=False)[1] for method in METHODS}
    assert highs["minmax"] == 60 and highs["percentile"] < 10 and highs["entropy"] < 30
    assert {chosen_range(seen, method, symmetric=False)[0] for method in METHODS} == {0.0}


def test_constant_and_one_sided_tensors_have_a_step() -> None:
    for value in (0.0, 2.5, -3.0):
        seen = observed([np.full(10, value, np.float32)])
        for method in METHODS:
            limits = chosen_range(seen, method, symmetric=False)
            assert limits == pytest.approx((min(0.0, value), max(0.0, value)))
            scale, zero_point = activation_step(limits, SCHEMES["u8s8"])
            assert scale > 0 and 0 <= zero_point <= 255
            assert (np.clip(np.rint(value / scale) + zero_point, 0, 255) - zero_point) * scale == pytest.approx(value)
            assert activation_step(limits, SCHEMES["s8s8"])[1] == 0


@pytest.mark.parametrize("method", METHODS)
def test_ranges_do_not_depend_on_batch_size_or_order(bert: Any, method: Any) -> None:
    checkpoint, graph = bert
    texts = [*CORPUS, "a", "the", "a girl and a fox and a girl and a fox"]
    found = []
    for batch, order in ((1, texts), (8, texts), (32, texts[::-1])):
        options = ExportOptions(calibration_batch=batch, calibration_method=method, calibration_source="corpus")
        names = [spec.name for spec in graph.inputs]
        samples = text_samples(checkpoint, order, names, max_tokens=64, options=options)
        assert all(given["attention_mask"].all() for given in samples.batches())
        sizes = [len(given["input_ids"]) for given in samples.batches()]
        assert sum(sizes) == samples.record.samples == len(texts) and max(sizes) <= batch
        seen = observe_ranges(graph, samples, static_tensors(graph), method=method)
        found.append(ranges_of(seen, method, symmetric=False))
    for other in found[1:]:
        for name, limits in found[0].items():
            np.testing.assert_allclose(other[name], limits, rtol=1e-5, atol=1e-7)


def test_padding_counts_for_nothing(bert: Any) -> None:
    _, graph = bert
    rng = np.random.default_rng(4)
    ids = rng.integers(4, 200, (4, 9))
    alone = [
        {
            "input_ids": row[None],
            "attention_mask": np.ones((1, 9), np.int64),
            "token_type_ids": np.zeros((1, 9), np.int64),
        }
        for row in ids
    ]
    wide = np.concatenate([ids, np.full((4, 11), 3)], axis=1)
    mask = np.concatenate([np.ones((4, 9), np.int64), np.zeros((4, 11), np.int64)], axis=1)
    padded = [{"input_ids": wide, "attention_mask": mask, "token_type_ids": np.zeros_like(wide)}]
    tensors = static_tensors(graph)
    ranges = []
    for batches in (alone, padded):
        samples = given_samples(batches, graph.inputs, options=ExportOptions())
        seen = observe_ranges(graph, samples, tensors, method="percentile")
        ranges.append((ranges_of(seen, "percentile", symmetric=False), {name: s.values for name, s in seen.items()}))
    assert ranges[0][1] == ranges[1][1]
    for name in tensors:
        np.testing.assert_allclose(ranges[0][0][name], ranges[1][0][name], rtol=1e-4, atol=1e-6)


def test_the_samples_are_drawn_with_the_seed(bert: Any) -> None:
    checkpoint, graph = bert
    names = [spec.name for spec in graph.inputs]

    def record(seed: int) -> Any:
        options = ExportOptions(seed=seed, calibration_samples=4, calibration_tokens=5, calibration_source="corpus")
        return text_samples(checkpoint, CORPUS, names, max_tokens=64, options=options).record

    assert record(0) == record(0) and record(0).order_sha256 != record(1).order_sha256
    assert record(0).samples == 4 and record(0).tokens <= 20


def test_a_file_of_inputs_is_read_and_held_to_the_graph(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    images = rng.standard_normal((10, 3, 4)).astype(np.float32)
    path = tmp_path / "images.npz"
    np.savez(path, image=images)
    samples = file_samples(path, [IMAGE], options=ExportOptions(calibration_samples=7, calibration_batch=3))
    shapes = [batch["image"].shape for batch in samples.batches()]
    assert shapes == [(3, 3, 4), (3, 3, 4), (1, 3, 4)] and samples.record.samples == 7
    np.save(tmp_path / "images.npy", images)
    alone = file_samples(tmp_path / "images.npy", [IMAGE], options=ExportOptions(calibration_samples=7))
    assert alone.record.order_sha256 == samples.record.order_sha256


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


ONES = np.ones((4, 3, 4), np.float32)
NOISE = np.random.default_rng(6).standard_normal((4, 3, 4)).astype(np.float32)
HOLED = np.where(np.arange(4)[:, None, None] == 1, np.nan, NOISE).astype(np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": NOISE[:1]}, "calibrated on 1 sample of"),
        ({"image": NOISE[:0]}, "calibrated on 0 samples of|has the shape"),
        ({"image": np.repeat(NOISE[:1], 3, 0)}, "3 samples that are all the same"),
        ({"image": ONES * np.arange(4, dtype=np.float32)[:, None, None] * 0 + 1}, "samples that are all the same"),
        ({"image": HOLED}, "12 values that are NaN"),
        ({"image": NOISE[:, :2]}, "has the shape"),
        ({"image": NOISE.astype(np.float64)}, "holds float64"),
        ({"pixels": NOISE}, "holds pixels"),
    ],
)
def test_samples_that_cannot_be_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        file_samples(saved(tmp_path / "x.npz", **arrays), [IMAGE], options=ExportOptions())


def test_files_that_are_none_of_numpys_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("text")
    with pytest.raises(UserError, match="cannot be read as numpy's"):
        file_samples(tmp_path / "x.npz", [IMAGE], options=ExportOptions())
    np.save(tmp_path / "two.npy", NOISE)
    two = [IMAGE, TensorSpec(name="other", dtype="float", shape=["batch"])]
    with pytest.raises(UserError, match="holds one array"):
        file_samples(tmp_path / "two.npy", two, options=ExportOptions())
    with pytest.raises(UserError, match=r"image holds 12 values that are NaN"):
        given_samples([{"image": HOLED}], [IMAGE], options=ExportOptions())
    with pytest.raises(UserError, match="without image"):
        given_samples([{"pixels": NOISE}], [IMAGE], options=ExportOptions())


def test_a_graph_that_overflows_is_refused(tmp_path: Path, bert: Any) -> None:
    import onnx
    from onnx import numpy_helper

    checkpoint, graph = bert
    model = onnx.load(str(graph.path))
    table = next(t for t in model.graph.initializer if t.name.endswith("word_embeddings.weight"))
    values = numpy_helper.to_array(table).copy()
    values[:] = np.inf
    table.CopyFrom(numpy_helper.from_array(values, table.name))
    onnx.save(model, str(tmp_path / "model.onnx"))
    broken = FloatExport(tmp_path / "model.onnx", graph.inputs, graph.outputs, graph.module, graph.parameters)
    options = ExportOptions(calibration_source="corpus")
    names = [spec.name for spec in graph.inputs]
    samples = text_samples(checkpoint, CORPUS, names, max_tokens=64, options=options)
    with pytest.raises(UserError, match="holds NaN or infinity"):
        observe_ranges(broken, samples, static_tensors(broken), method="minmax")
