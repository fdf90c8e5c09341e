"""Benchmarks of tiny artifacts in their real runtimes, and the arithmetic of what is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_models import tiny_checkpoint, tiny_genai, tiny_gguf

from edgedistill import statistics
from edgedistill.bench import measure
from edgedistill.bench.ceiling import BytesRead, bytes_read_a_token, ceiling
from edgedistill.bench.measure import bench, drift, percentiles
from edgedistill.cli.show import latency_text
from edgedistill.config.probe import targets_probe
from edgedistill.config.recipe import Bench
from edgedistill.config.targets import Target, load_target
from edgedistill.errors import UserError
from edgedistill.machine import facts
from edgedistill.records.artifact import Artifact
from edgedistill.records.figures import Figure
from edgedistill.records.latency import Latency
from edgedistill.runtimes.quantize import quantize_in_child
from edgedistill.store import Store, combined_sha256, file_entries


def artifact_of(folder: Path, *, format_: str, runtime: str, entry: str) -> Artifact:
    files = file_entries(folder)
    return Artifact(
        format=format_,
        quantization="Q8_0",
        runtime=runtime,
        entry=entry,
        files=files,
        bytes=sum(f.bytes for f in files),
        sha256=combined_sha256(files),
        parameters=1,
        bits_per_weight=8.5,
        tensor_types={},
        context_tokens=256,
        vocab_size=263,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def gguf_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tiny_gguf(checkpoint, tmp_path_factory.mktemp("f32") / "f32.gguf")
    folder = tmp_path_factory.mktemp("gguf")
    quantize_in_child(source, folder / "model.gguf", quantization="Q8_0", threads=2)
    return folder


@pytest.fixture(scope="module")
def onnx_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_genai(checkpoint, tmp_path_factory.mktemp("onnx") / "fp32", precision="fp32")


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("jetson-orin-nano")


SMALL = Bench(prompt_tokens=20, new_tokens=30, warmup=1, repeats=5, threads=1)


def test_gguf_on_another_machine_is_a_proxy_with_every_sample(gguf_folder: Path, target: Target, store: Store) -> None:
    artifact = artifact_of(gguf_folder, format_="gguf", runtime="llama.cpp", entry="model.gguf")
    found = bench(artifact, gguf_folder, target, settings=SMALL, store=store, notes=["from the caller"])
    assert Latency.model_validate_json(found.model_dump_json(by_alias=True)) == found
    assert found.basis == "proxy" and any("is not known to be jetson-orin-nano" in note for note in found.notes)
    assert found.notes[0] == "from the caller"
    assert found.workload.model_dump() == {
        "batch": 1, "prompt_tokens": 20, "new_tokens": 30, "warmup": 1, "repeats": 5
    }  # fmt: skip
    samples = found.samples
    assert len(samples["ttft_ms"]) == 5 and len(samples["token_ms"]) == 5 * 29
    assert found.token_ms.p99 is not None and found.ttft_ms.p99 is None
    assert found.token_ms.p50 == pytest.approx(np.median(samples["token_ms"]))
    assert found.decode_tokens_per_s == pytest.approx(1e3 * 5 * 29 / sum(samples["token_ms"]))
    assert found.prefill_tokens_per_s == pytest.approx(1e3 * 5 * 20 / sum(samples["ttft_ms"]))
    assert found.decode_tokens_per_s_ci95 is not None and found.rate_units == 5
    low, high = found.decode_tokens_per_s_ci95
    assert low < found.decode_tokens_per_s <= high
    assert found.measured_on["threads"] == 1 and found.measured_on["runtime"] == "llama.cpp"
    assert found.measured_on["cpu"] == facts.describe()["cpu"]
    assert found.measured_on["options"]["kv_cache"] == ["f16", "f16"]
    assert found.artifact_sha256 == artifact.sha256
    assert found.peak_rss_bytes > artifact.bytes and found.load_ms == samples["load_ms"][0]
    assert found.ceiling.basis == "derived" and target.bandwidth_bytes_per_s.source in found.ceiling.source


def test_onnx_is_benchmarked_in_genai(onnx_folder: Path, target: Target, store: Store) -> None:
    artifact = artifact_of(onnx_folder, format_="onnx", runtime="onnxruntime-genai", entry=".")
    found = bench(artifact, onnx_folder, target, settings=SMALL, store=store)
    assert found.measured_on["runtime"] == "onnxruntime-genai"
    assert len(found.samples["token_ms"]) == 5 * 29
    assert not any("use_extra_bufts" in note for note in found.notes)


def test_the_basis_is_measured_on_the_target_itself_under_its_load(gguf_folder: Path, store: Store) -> None:
    drafted = targets_probe(buffer_bytes=1 << 20)
    asked = {"prompt_tokens": 8, "new_tokens": 4, "warmup": 1, "repeats": 2}
    target = drafted.model_copy(update={"bench": drafted.bench.model_copy(update=asked)})
    artifact = artifact_of(gguf_folder, format_="gguf", runtime="llama.cpp", entry="model.gguf")

    def basis(target: Target, **settings: int) -> tuple[str, str]:
        found = bench(artifact, gguf_folder, target, settings=Bench(**settings), store=store)
        return found.basis, " ".join(found.notes)

    assert basis(target)[0] == "measured"
    assert basis(target, repeats=3)[0] == "measured"
    for other in ({"new_tokens": 3}, {"prompt_tokens": 9}, {"repeats": 1}, {"warmup": 0}):
        name, value = next(iter(other.items()))
        found, notes = basis(target, **other)
        assert found == "proxy" and f"not that of the profile: {name} {value}, not {asked[name]}" in notes
    # more threads than there are: fewer run than the profile asks for
    more = target.model_copy(update={"bench": target.bench.model_copy(update={"threads": target.bench.threads + 2})})
    found, notes = basis(more)
    assert found == "proxy" and f"threads {target.bench.threads}, not {target.bench.threads + 2}" in notes


def test_any_x86_machine_is_no_measurement_of_the_x86_profile(gguf_folder: Path, store: Store) -> None:
    artifact = artifact_of(gguf_folder, format_="gguf", runtime="llama.cpp", entry="model.gguf")
    found = bench(artifact, gguf_folder, load_target("cpu-x86"), settings=SMALL, store=store)
    assert found.basis == "proxy" and any("not known to be cpu-x86" in note for note in found.notes)


@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_the_memory_is_that_of_the_whole_context(name: str, request: pytest.FixtureRequest, store: Store) -> None:
    folder = request.getfixturevalue(f"{name}_folder")
    runtime, entry, short, long = {
        "gguf": ("llama.cpp", "model.gguf", 256, 32768),
        "onnx": ("onnxruntime-genai", ".", 64, 2048),
    }[name]
    target = load_target("cpu-x86")
    artifact = artifact_of(folder, format_=name, runtime=runtime, entry=entry)
    found = [
        bench(artifact.model_copy(update={"context_tokens": tokens}), folder, target, settings=SMALL, store=store)
        for tokens in (short, long)
    ]
    # Two layers, keys and values, two heads of 64; F16 in llama.cpp, float32 in this graph.
    cache = 2 * 2 * 2 * 64 * (2 if name == "gguf" else 4) * (long - short)
    assert found[1].peak_rss_bytes - found[0].peak_rss_bytes > 0.7 * cache
    assert any(f"a KV cache of {long} tokens, the artifact's whole context" in note for note in found[1].notes)


def test_without_the_targets_gpu_the_basis_is_a_proxy(gguf_folder: Path) -> None:
    target = load_target("server-gpu")
    here = {"arch": "x86_64", "gpu": ["NVIDIA H200"]}
    artifact = artifact_of(gguf_folder, format_="gguf", runtime="llama.cpp", entry="model.gguf")
    workload, threads = measure._workload(artifact.model_copy(update={"context_tokens": 8192}), target, Bench())

    def basis(here: dict[str, Any], n_gpu_layers: int) -> tuple[str, list[str]]:
        info = {"runtime_version": "llama.cpp 1", "options": {"n_gpu_layers": n_gpu_layers}}
        return measure.basis_of(target, here, info, workload, threads)

    assert basis(here, -1) == ("measured", [])  # -1: all layers
    found, notes = basis(here, 0)
    assert found == "proxy" and len(notes) == 1 and "the target's GPU was not used" in notes[0]
    found, notes = basis(here | {"gpu": []}, 0)
    assert found == "proxy" and "is not known to be server-gpu" in notes[0]


def test_a_target_with_a_gpu_is_a_proxy_where_it_is_not_used(gguf_folder: Path, store: Store) -> None:
    target = load_target("cpu-x86")
    if facts.arch() != target.identify.arch:
        pytest.skip(f"this machine is {facts.arch()}")
    artifact = artifact_of(gguf_folder, format_="gguf", runtime="llama.cpp", entry="model.gguf")
    with_gpu = target.model_copy(update={"gpu": "a GPU"})
    found = bench(artifact, gguf_folder, with_gpu, settings=SMALL, store=store)
    offloaded = bool(found.measured_on["options"]["n_gpu_layers"])
    assert found.basis == "proxy"
    assert any("GPU was not used" in note for note in found.notes) is not offloaded


def test_more_threads_than_cpus_are_cut_and_told(gguf_folder: Path, target: Target, store: Store) -> None:
    usable = len(facts.usable_cpus())
    artifact = artifact_of(gguf_folder, format_="gguf", runtime="llama.cpp", entry="model.gguf")
    settings = SMALL.model_copy(update={"threads": usable + 5, "repeats": 1, "new_tokens": 4})
    found = bench(artifact, gguf_folder, target, settings=settings, store=store)
    assert found.measured_on["threads"] == usable
    assert f"{usable + 5} threads were asked for and this machine has {usable} CPUs" in " ".join(found.notes)
    assert found.decode_tokens_per_s_ci95 is None and found.prefill_tokens_per_s_ci95 is None
    assert found.rate_units == 1 and "too few repeats (1) for an interval" in latency_text(found)


def test_settings_default_to_the_targets(target: Target, gguf_folder: Path) -> None:
    artifact = artifact_of(gguf_folder, format_="gguf", runtime="llama.cpp", entry="model.gguf")
    workload, threads = measure._workload(artifact, target, Bench(repeats=9))
    assert (workload.prompt_tokens, workload.new_tokens, workload.warmup) == (
        target.bench.prompt_tokens,
        target.bench.new_tokens,
        target.bench.warmup,
    )
    assert workload.repeats == 9 and threads == target.bench.threads
    with pytest.raises(UserError, match="a context of 256"):
        measure._workload(artifact, target, Bench(prompt_tokens=250, new_tokens=7))


def test_bytes_read_of_a_gguf(checkpoint: Path, gguf_folder: Path, tmp_path: Path) -> None:
    artifact = artifact_of(gguf_folder, format_="gguf", runtime="llama.cpp", entry="model.gguf")
    weights = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(gguf_folder / "model.gguf").tensors}
    read = bytes_read_a_token(artifact, gguf_folder, context_tokens=100)
    table = weights["token_embd.weight"]
    assert read.weights == sum(weights.values()) - table + table // 263
    # Two layers, keys and values, two heads of 64, F16.
    assert read.kv_cache == 2 * 2 * 2 * 64 * 2 * 100
    tied = tiny_checkpoint(tmp_path / "tied", tied=True)
    path = tiny_gguf(tied, tmp_path / "model.gguf")
    read = bytes_read_a_token(artifact, tmp_path, context_tokens=0)
    assert read.weights == sum(int(t.n_bytes) for t in gguf.GGUFReader(path).tensors)
    assert read.left_out == ""


def test_bytes_read_of_an_onnx(onnx_folder: Path) -> None:
    artifact = artifact_of(onnx_folder, format_="onnx", runtime="onnxruntime-genai", entry=".")
    read = bytes_read_a_token(artifact, onnx_folder, context_tokens=100)
    data = (onnx_folder / "model.onnx.data").stat().st_size
    table = 263 * 256 * 4
    assert data - 1.2 * table < read.weights < data - 0.8 * table
    assert read.kv_cache == 2 * 2 * 2 * 64 * 4 * 100
    assert "embed" in read.left_out


def test_the_ceiling_is_bandwidth_over_bytes() -> None:
    bandwidth = Figure(value=1e9, unit="B/s", basis="derived", source="a data sheet")
    found = ceiling(bandwidth, BytesRead(weights=9_000_000, kv_cache=1_000_000, left_out=""), context_tokens=128)
    assert (found.value, found.unit, found.basis) == (100.0, "tokens/s", "derived")
    for words in ("a data sheet", "10,000,000 bytes", "128 tokens"):
        assert words in found.source


def test_percentiles_have_no_p99_of_few_samples() -> None:
    assert percentiles([1.0] * 99).p99 is None
    found = percentiles([float(i) for i in range(1, 102)])
    assert (found.p50, found.p90, found.p99) == (51.0, 91.0, 100.0)


def test_rates_are_all_tokens_over_all_time_and_repeats_are_their_units() -> None:
    found = statistics.rate([100.0, 300.0], [10, 10])
    assert found.value == pytest.approx(50.0) and found.ci95 is None and found.units == 2
    assert statistics.rate([70.0], [7]).value == 100.0
    times = np.array([100.0, 104.0, 98.0, 110.0, 101.0])
    low, high = statistics.rate(times, np.full(5, 10)).ci95 or (0.0, 0.0)
    error = times.std(ddof=1) / np.sqrt(5)
    # Student's t with four degrees, and what a skewness of 1.6 moves it by: 1.6 (2 t² + 1) / (6 √5), 0.3 of it inwards
    t, shift = 2.776445, 1.957
    assert low == pytest.approx(1e4 / (times.mean() + (t + shift) * error), rel=1e-4)
    assert high == pytest.approx(1e4 / (times.mean() - (t - 0.3 * shift) * error), rel=1e-4)


def test_drift_is_last_quarter_over_first() -> None:
    assert drift([1.0, 5.0, 5.0, 3.0]) == 3.0
    assert drift([2.0] * 40) == 1.0
    assert drift([2.0]) == 1.0


def test_a_latency_record_is_plain_json(gguf_folder: Path, target: Target, store: Store) -> None:
    artifact = artifact_of(gguf_folder, format_="gguf", runtime="llama.cpp", entry="model.gguf")
    found = bench(artifact, gguf_folder, target, settings=SMALL, store=store)
    record = json.loads(found.model_dump_json(by_alias=True))
    assert record["schema"] == "edgedistill.latency/1"
    assert record["energy_j"] is None
