"""The runtimes, real ones, in their child processes."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_models import tiny_checkpoint, tiny_genai, tiny_gguf, torch_logits

from edgedistill.errors import RuntimeCrashed, UserError
from edgedistill.runtimes import frames, probe, process
from edgedistill.runtimes.child import signal_name
from edgedistill.runtimes.process import RuntimeProcess, fastest_first
from edgedistill.runtimes.quantize import quantize_in_child
from edgedistill.store import Store

TEXTS = ["the thanks of the", "  spaces\n\n\ttabs ", "naïve 😀 日本語", "x = {1: 'a'}; # <|eos|> the", "", "\x00null"]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def f32(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(checkpoint, tmp_path_factory.mktemp("gguf") / "f32.gguf")


@pytest.fixture(scope="session")
def q8_0(f32: Path) -> Path:
    out = f32.with_name("q8_0.gguf")
    quantize_in_child(f32, out, quantization="Q8_0", threads=2)
    return out


@pytest.fixture(scope="session")
def onnx_fp32(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_genai(checkpoint, tmp_path_factory.mktemp("onnx") / "fp32", precision="fp32")


@pytest.fixture(scope="session")
def onnx_int4(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_genai(checkpoint, tmp_path_factory.mktemp("onnx") / "int4", precision="int4")


def opened(runtime: str, artifact: Path, store: Store | None = None, **options) -> RuntimeProcess:
    settings = {"threads": 2, "context_tokens": 256, "timeout_s": 60.0} | options
    return RuntimeProcess(runtime, artifact, store=store, **settings)


def some_tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 260, count)


def gone(pid: int) -> bool:
    """Ended, or a zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# llama.cpp


def test_llama_logits_are_those_of_transformers(checkpoint: Path, f32: Path, store: Store) -> None:
    tokens = some_tokens(1100)
    expected = torch_logits(checkpoint, tokens)
    with opened("llama.cpp", f32, store, context_tokens=1100) as runtime:
        assert runtime.info["options"]["n_batch"] == 512  # so that the sequence takes three batches
        assert runtime.info["context_tokens"] >= 1100
        found = runtime.logits(tokens)
    assert found.shape == expected.shape and found.dtype == np.float32
    # The KV cache is F16.
    assert probe.relative_rms(found, expected) < 2e-3
    assert np.mean(found.argmax(1) == expected.argmax(1)) > 0.99


def test_llama_batch_equals_token_by_token_and_starts_from_an_empty_cache(f32: Path, store: Store) -> None:
    tokens = some_tokens(24)
    with opened("llama.cpp", f32, store) as runtime:
        whole = runtime.logits(tokens)
        for count in (1, 2, 7, 24):
            assert probe.relative_rms(runtime.logits(tokens[:count])[-1], whole[count - 1]) < 2e-3
        assert np.array_equal(runtime.logits(tokens), whole)


@pytest.mark.parametrize("runtime_name", ["llama.cpp", "onnxruntime", "onnxruntime-genai"])
def test_greedy_follows_the_argmax_of_the_logits(runtime_name: str, f32: Path, onnx_fp32: Path, store: Store) -> None:
    artifact = f32 if runtime_name == "llama.cpp" else onnx_fp32
    prompt = [5, 6, 7]
    with opened(runtime_name, artifact, store) as runtime:
        found = runtime.greedy(prompt, 12)
        rows = runtime.logits(prompt + found)
    for token, row in zip(found, rows[len(prompt) - 1 :], strict=False):
        assert row.max() - row[token] < 1e-2
    assert len(found) == 12


def test_llama_tokenizes_as_the_original(checkpoint: Path, f32: Path, store: Store) -> None:
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained(checkpoint)
    with opened("llama.cpp", f32, store) as runtime:
        for text in TEXTS:
            assert runtime.tokenize(text, parse_special=True) == original.encode(text, add_special_tokens=False)
        assert 1 not in runtime.tokenize("<|eos|>")
        assert runtime.tokenize("the", add_special=True)[0] == 0


@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_quantized_batches_run_on_this_machine(
    checkpoint: Path, f32: Path, store: Store, tmp_path: Path, quantization: str
) -> None:
    out = tmp_path / "model.gguf"
    quantize_in_child(f32, out, quantization=quantization, threads=2)
    tokens = some_tokens(64)
    with opened("llama.cpp", out, store) as runtime:
        assert runtime.info["options"]["use_extra_bufts"] == probe.extra_bufts(store).use
        assert runtime.info["options"]["use_extra_bufts_reason"]
        found = runtime.logits(tokens)
    limit = 0.05 if quantization == "Q8_0" else 0.5
    assert probe.relative_rms(found, torch_logits(checkpoint, tokens)) < limit


def test_extra_buffers_do_as_the_probe_says(q8_0: Path, store: Store) -> None:
    answer = probe.extra_bufts(store)
    tokens = some_tokens(64)
    with opened("llama.cpp", q8_0, use_extra_bufts=False) as runtime:
        plain = runtime.logits(tokens)
    if answer.signal is None:
        with opened("llama.cpp", q8_0, use_extra_bufts=answer.use) as runtime:
            assert probe.relative_rms(runtime.logits(tokens), plain) < probe.MAX_RELATIVE_RMS
        return
    assert answer.use is False
    with (
        opened("llama.cpp", q8_0, use_extra_bufts=True) as runtime,
        pytest.raises(RuntimeCrashed, match=answer.signal) as crash,
    ):
        runtime.logits(tokens)
    assert crash.value.signal_name == answer.signal
    assert f"{probe.OVERRIDE}=0" in crash.value.remedy
    assert str(q8_0) in crash.value.cause


@pytest.mark.parametrize("share", [0.0005, 0.5, 0.999])
def test_a_truncated_gguf_is_refused_with_the_reason(f32: Path, store: Store, tmp_path: Path, share: float) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(f32.read_bytes()[: int(f32.stat().st_size * share)])
    with pytest.raises(UserError, match=r"cut\.gguf") as refused:
        opened("llama.cpp", cut, store)
    assert "export the artifact again" in refused.value.remedy
    assert "cut short" in refused.value.cause
    assert len(str(refused.value).splitlines()) <= 3


def test_what_is_no_gguf_is_refused(store: Store, tmp_path: Path) -> None:
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UserError, match=r"begins with b'PK"):
        opened("llama.cpp", junk, store)
    with pytest.raises(UserError, match="no artifact"):
        opened("llama.cpp", tmp_path / "absent.gguf", store)


def test_wrong_tokens_are_refused_and_the_runtime_goes_on(f32: Path, store: Store) -> None:
    with opened("llama.cpp", f32, store) as runtime:
        vocabulary = runtime.info["vocab_size"]
        with pytest.raises(UserError, match=f"token {vocabulary} is outside of the artifact's vocabulary"):
            runtime.logits([1, vocabulary])
        with pytest.raises(UserError, match="more than the context of 256 tokens"):
            runtime.logits(some_tokens(257))
        with pytest.raises(UserError, match="at least one token"):
            runtime.logits([])
        assert np.isfinite(runtime.logits([1, 2])).all()


# onnxruntime and onnxruntime-genai


@pytest.mark.parametrize("runtime_name", ["onnxruntime", "onnxruntime-genai"])
def test_onnx_logits_are_those_of_transformers(runtime_name: str, checkpoint: Path, onnx_fp32: Path) -> None:
    tokens = some_tokens(100)
    with opened(runtime_name, onnx_fp32) as runtime:
        assert runtime.info["runtime"] == runtime_name
        found = runtime.logits(tokens)
    assert probe.relative_rms(found, torch_logits(checkpoint, tokens)) < 1e-4


def test_both_onnx_runtimes_agree_on_int4(checkpoint: Path, onnx_int4: Path) -> None:
    tokens = some_tokens(60)
    with opened("onnxruntime", onnx_int4) as plain, opened("onnxruntime-genai", onnx_int4) as genai:
        found, other = plain.logits(tokens), genai.logits(tokens)
        assert plain.greedy(tokens, 6) == genai.greedy(tokens, 6)
    assert probe.relative_rms(found, other) < 1e-3
    assert 1e-3 < probe.relative_rms(found, torch_logits(checkpoint, tokens)) < 0.5


def test_genai_tokenizes_as_the_original(checkpoint: Path, onnx_int4: Path) -> None:
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained(checkpoint)
    with opened("onnxruntime-genai", onnx_int4) as runtime:
        for text in TEXTS[:4]:
            assert runtime.tokenize(text, parse_special=True) == original.encode(text, add_special_tokens=False)
        with pytest.raises(UserError, match=r"<\|eos\|>"):
            runtime.tokenize("<|eos|>")


def test_genai_decodes_on_after_an_end_token(onnx_fp32: Path) -> None:
    with opened("onnxruntime-genai", onnx_fp32) as runtime:
        assert len(runtime.greedy([1, 1, 1], 20)) == 20


@pytest.mark.parametrize("runtime_name", ["onnxruntime", "onnxruntime-genai"])
def test_a_damaged_onnx_is_refused(runtime_name: str, onnx_int4: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(onnx_int4, tmp_path / "damaged")
    data = damaged / "model.onnx.data"
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(UserError, match=r"model\.onnx\.data, which has \d"):
        opened(runtime_name, damaged)
    (damaged / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"not a whole ONNX model|not among what is allowed"):
        opened(runtime_name, damaged)


def test_onnxruntime_has_no_tokenizer(onnx_int4: Path) -> None:
    with opened("onnxruntime", onnx_int4) as runtime, pytest.raises(UserError, match="no tokenizer"):
        runtime.tokenize("x")


# Children that die


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGILL", "SIGKILL"])
def test_a_killed_child_is_reported_and_the_parent_goes_on(f32: Path, store: Store, name: str) -> None:
    with opened("llama.cpp", f32, store) as runtime:
        os.kill(runtime.info["pid"], getattr(signal, name))
        with pytest.raises(RuntimeCrashed) as crash:
            runtime.logits([1, 2, 3])
    assert crash.value.signal_name == name
    assert name in crash.value.cause and str(f32) in crash.value.cause and "logits of 3 tokens" in crash.value.cause
    assert crash.value.remedy
    assert "memory" in crash.value.remedy or name != "SIGKILL"
    with opened("llama.cpp", f32, store) as runtime:
        assert np.isfinite(runtime.logits([1, 2, 3])).all()


def test_a_child_killed_in_the_middle_of_its_work_is_reported(f32: Path, store: Store) -> None:
    with opened("llama.cpp", f32, store, context_tokens=4096) as runtime:
        timer = threading.Timer(0.3, os.kill, (runtime.info["pid"], signal.SIGSEGV))
        timer.start()
        with pytest.raises(RuntimeCrashed) as crash:
            while True:
                runtime.logits(some_tokens(4096))
        timer.join()
    assert crash.value.signal_name == "SIGSEGV"


def test_a_child_that_does_not_answer_is_killed(f32: Path, store: Store) -> None:
    with opened("llama.cpp", f32, store) as runtime:
        pid = runtime.info["pid"]
        runtime._child.timeout_s = 0.5  # of what follows; starting may take longer on a busy machine
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(RuntimeCrashed, match=r"did not answer within 0\.5 s in the logits of 2 tokens"):
            runtime.logits([1, 2])
        assert time.monotonic() - started < 5
        assert gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_child_dies_with_its_parent_even_when_it_is_stuck(f32: Path) -> None:
    code = (
        "import os, signal, time\n"
        "from pathlib import Path\n"
        "from edgedistill.runtimes.process import RuntimeProcess\n"
        f"r = RuntimeProcess('llama.cpp', Path({str(f32)!r}), threads=1, context_tokens=64, use_extra_bufts=False)\n"
        "os.kill(r.info['pid'], signal.SIGSTOP)\n"
        "print(r.info['pid'], flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with parent:
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    deadline = time.monotonic() + 5
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    if not gone(pid):
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the child outlived its parent")


def test_the_log_tells_the_runtimes_last_words(f32: Path, store: Store, tmp_path: Path) -> None:
    log = tmp_path / "runtime.log"
    with opened("llama.cpp", f32, store, log=log) as runtime:
        os.kill(runtime.info["pid"], signal.SIGABRT)
        with pytest.raises(RuntimeCrashed, match="SIGABRT") as crash:
            runtime.logits([1])
    assert "its last lines:" in crash.value.cause
    assert crash.value.cause.splitlines()[-1].strip() in log.read_text()


def test_a_missing_runtime_is_named_with_its_extra(f32: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ModuleNotFoundError('gone', name='llama_cpp')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="llama_cpp is not installed") as refused:
        opened("llama.cpp", f32, use_extra_bufts=False)
    assert "edgedistill[llama]" in refused.value.remedy


def test_the_child_needs_neither_torch_nor_transformers(f32: Path, store: Store, tmp_path: Path, monkeypatch) -> None:
    for name in ("torch", "transformers", "onnx", "gguf"):
        (tmp_path / f"{name}.py").write_text(f"raise AssertionError('{name} was imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with opened("llama.cpp", f32, store) as runtime:
        assert len(runtime.logits([1, 2])) == 2


def test_signal_names() -> None:
    assert signal_name(-signal.SIGILL) == "SIGILL"
    assert signal_name(3) == ""


# What bench needs


@pytest.mark.parametrize("runtime_name", ["llama.cpp", "onnxruntime", "onnxruntime-genai"])
def test_timed_gives_every_sample(runtime_name: str, q8_0: Path, onnx_int4: Path, store: Store) -> None:
    artifact = q8_0 if runtime_name == "llama.cpp" else onnx_int4
    with opened(runtime_name, artifact, store, logits_all=False) as runtime:
        first, second = runtime.timed(some_tokens(30), 10), runtime.timed(some_tokens(30), 10)
        assert 10_000_000 < runtime.peak_rss_bytes() < 4_000_000_000
        assert 0 < runtime.info["load_ms"] < runtime.info["spawn_ms"]
    assert first["tokens"] == second["tokens"] and len(first["tokens"]) == 10
    assert len(first["token_ms"]) == 9
    assert min(first["token_ms"]) > 0 and first["ttft_ms"] > 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot pin")
def test_a_pinned_child_runs_on_its_cpus_only(q8_0: Path, store: Store) -> None:
    with opened("llama.cpp", q8_0, store, threads=1, pin=True) as runtime:
        fastest = fastest_first(sorted(os.sched_getaffinity(0)))[0]
        assert os.sched_getaffinity(runtime.info["pid"]) == {fastest}
        assert runtime.info["options"]["cpus"] == [fastest]


def test_the_fastest_cpus_come_first(tmp_path: Path) -> None:
    def tell(name: str, *speeds: str) -> None:
        for cpu, speed in enumerate(speeds):
            path = tmp_path / f"cpu{cpu}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(speed)

    cpus = [0, 1, 2, 3]
    assert fastest_first(cpus, tmp_path) == cpus
    tell("cpufreq/cpuinfo_max_freq", "1800000\n", "2300000\n", "2300000\n", "2800000\n")
    assert fastest_first(cpus, tmp_path) == [3, 1, 2, 0]
    tell("cpu_capacity", "250\n", "1024\n", "800\n")
    assert fastest_first(cpus, tmp_path) == [3, 1, 2, 0], "one CPU without a capacity: by clock"
    tell("cpu_capacity", "250\n", "1024\n", "800\n", "800\n")
    assert fastest_first(cpus, tmp_path) == [1, 2, 3, 0]
    assert fastest_first([0, 2], tmp_path) == [2, 0]
    tell("cpu_capacity", "250\n", "garbage")
    assert fastest_first(cpus, tmp_path) == [3, 1, 2, 0]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot pin")
def test_pinning_takes_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "usable_cpus", lambda: [0, 1, 2])
    monkeypatch.setattr(process, "fastest_first", lambda cpus: list(reversed(cpus)))
    assert process._cpus_for(2) == [2, 1]
    assert process._cpus_for(4) is None


# The quantizer


def test_quantize_writes_the_types_asked_for_and_tells_of_fallbacks(f32: Path, tmp_path: Path) -> None:
    narrow = tiny_gguf(tiny_checkpoint(tmp_path / "narrow", hidden=64), tmp_path / "narrow.gguf", half=True)
    out = tmp_path / "narrow-q4_k_m.gguf"
    log = quantize_in_child(narrow, out, quantization="Q4_K_M", threads=2)
    assert any("fallback" in line for line in log)
    types = {t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert types.isdisjoint({"Q4_K"}) and "Q5_0" in types
    wide = tmp_path / "wide-q4_k_m.gguf"
    quantize_in_child(f32, wide, quantization="Q4_K_M", threads=2)
    assert {"Q4_K", "Q6_K"} <= {t.tensor_type.name for t in gguf.GGUFReader(wide).tensors}
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["narrow-q4_k_m.gguf", "narrow.gguf", wide.name]


@pytest.mark.parametrize(
    ("quantization", "words"), [("Q4_K_X", "did you mean 'Q4_K_"), ("IQ2_XXS", "requires an imatrix")]
)
def test_quantize_refuses_clearly_and_leaves_nothing(f32: Path, tmp_path: Path, quantization: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        quantize_in_child(f32, tmp_path / "out.gguf", quantization=quantization, threads=2)
    assert words in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_quantizer_left_is_cleared_away(f32: Path, tmp_path: Path) -> None:
    stale = tmp_path / ".out.gguf.partial"
    for quantization in ("IQ2_XXS", "Q8_0"):
        stale.write_bytes(b"half of a file")
        try:
            quantize_in_child(f32, tmp_path / "out.gguf", quantization=quantization, threads=2)
        except UserError:
            assert quantization == "IQ2_XXS"
        assert not stale.exists()
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors} == {"F32", "Q8_0"}


def test_quantize_of_a_damaged_source_leaves_the_old_result(f32: Path, tmp_path: Path) -> None:
    cut, out = tmp_path / "cut.gguf", tmp_path / "out.gguf"
    cut.write_bytes(f32.read_bytes()[:-1000])
    out.write_bytes(b"the old one")
    with pytest.raises(UserError, match="not within the file bounds"):
        quantize_in_child(cut, out, quantization="Q8_0", threads=2)
    assert out.read_bytes() == b"the old one"
    with pytest.raises(RuntimeCrashed, match="did not answer"):
        quantize_in_child(f32, out, quantization="Q8_0", threads=2, timeout_s=0.001)
    assert out.read_bytes() == b"the old one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.gguf", "out.gguf"]


# The probe


def test_the_probe_is_kept_and_redone_where_its_file_is_damaged(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(probe.OVERRIDE, raising=False)
    store = Store(tmp_path)
    answer = probe.extra_bufts(store)
    (path,) = (tmp_path / "probes").glob("*.json")
    kept = json.loads(path.read_text())
    assert kept["answer"]["use"] is answer.use and kept["build"]["libraries"]
    kept["answer"]["reason"] = "read from the file"
    path.write_text(json.dumps(kept))
    assert probe.extra_bufts(store).reason == "read from the file"
    path.write_text(path.read_text()[:50])
    assert probe.extra_bufts(store) == answer


def test_another_build_or_machine_is_probed_anew(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(probe.OVERRIDE, raising=False)
    store = Store(tmp_path)
    answers = [probe.ExtraBufts(True, f"probe {i}", None) for i in range(3)]
    monkeypatch.setattr(probe, "probe", lambda: answers.pop(0))
    assert probe.extra_bufts(store).reason == probe.extra_bufts(store).reason == "probe 0"
    monkeypatch.setattr("edgedistill.machine.facts.fingerprint", lambda: "0123456789abcdef")
    assert probe.extra_bufts(store).reason == "probe 1"
    library = tmp_path / "lib" / "libllama.so"
    library.parent.mkdir()
    library.write_bytes(b"another build")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(library.parent))
    assert probe.extra_bufts(store).reason == "probe 2"


def test_extra_buffers_that_run_and_are_wrong_are_not_used(monkeypatch) -> None:
    real = probe._logits
    noise = 0.0

    def logits(model: Path, *, use_extra_bufts: bool) -> np.ndarray:
        found = real(model, use_extra_bufts=False)
        return found + noise * np.random.default_rng(0).standard_normal(found.shape) if use_extra_bufts else found

    monkeypatch.setattr(probe, "_logits", logits)
    assert probe.probe().use is True
    noise = float("nan")
    assert probe.probe().use is False
    noise = 1.0
    answer = probe.probe()
    assert answer.use is False and answer.signal is None and "other results" in answer.reason


def test_the_probe_can_be_overridden(tmp_path: Path, monkeypatch) -> None:
    for value in ("0", "1"):
        monkeypatch.setenv(probe.OVERRIDE, value)
        assert probe.extra_bufts(Store(tmp_path)).use is (value == "1")
    monkeypatch.setenv(probe.OVERRIDE, "yes")
    with pytest.raises(UserError, match="yes"):
        probe.extra_bufts(Store(tmp_path))


def test_the_probes_model_is_a_gguf_that_others_read(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    probe.write_tiny_gguf(path)
    reader = gguf.GGUFReader(path)
    assert {t.name for t in reader.tensors} >= {"token_embd.weight", "output.weight", "blk.0.ffn_down.weight"}
    assert list(next(t for t in reader.tensors if t.name == "blk.0.ffn_down.weight").shape) == [512, 256]


# The frames


def test_frames_come_back_as_they_were_sent() -> None:
    reads, writes = os.pipe()
    arrays = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "b": np.array([], dtype=np.int64),
        "c": np.arange(3, dtype=">i4"),
    }
    frames.send(writes, {"op": "x", "text": "é\n😀"}, arrays)
    os.close(writes)
    params, found = frames.receive(reads)
    assert params == {"op": "x", "text": "é\n😀"}
    for name, array in arrays.items():
        assert np.array_equal(found[name], array) and found[name].shape == array.shape
    assert frames.receive(reads) is None
    os.close(reads)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        frames.PREFIX.pack(frames.MAGIC, 1 << 30, 0),
        frames.PREFIX.pack(frames.MAGIC, 2, 1 << 60),
        frames.PREFIX.pack(frames.MAGIC, 2, 0) + b"[]",
        frames.PREFIX.pack(frames.MAGIC, 20, 0) + b"{}",
        frames.PREFIX.pack(frames.MAGIC, 74, 4)
        + b'{"params": {}, "arrays": [{"name": "a", "dtype": "|O8", "shape": [1]}]}   0000',
        frames.PREFIX.pack(frames.MAGIC, 74, 4)
        + b'{"params": {}, "arrays": [{"name": "a", "dtype": "<f4", "shape": [9]}]}   0000',
        frames.MAGIC,
    ],
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    reads, writes = os.pipe()
    os.write(writes, data)
    os.close(writes)
    with pytest.raises(frames.FrameError):
        frames.receive(reads)
    assert select.select([reads], [], [], 1)[0]
    os.close(reads)


def test_a_type_that_frames_do_not_carry_is_not_sent() -> None:
    with pytest.raises(frames.FrameError, match="float64"):
        frames.send(1, {}, {"a": np.zeros(2)})
