"""The whole job by the real command line, small: builds, reuse, kills, gates, crashes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import Command, refused

TARGETS = ("-t", "phone")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Command:
    """A finished build for the phone; its store and bundles are read by the tests below."""
    command = Command(tmp_path_factory.mktemp("built"), warm=True)
    done = command("build", command.recipe(), *TARGETS, "--json")
    assert done.returncode == 0, done.stderr
    (command.folder / "first.json").write_text(done.stdout)
    return command


def sums(bundle: Path) -> dict[str, str]:
    lines = (bundle / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ") for line in lines)}


def model_sums(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in sums(folder).items() if name.startswith("model/")}


def bundle_of(command: Command, target: str = "phone-arm64-high") -> Path:
    return command.folder / "bundles" / f"tiny-{target}"


def test_build_leaves_a_bundle_that_verifies(built):
    done = built("bundle", "verify", str(bundle_of(built)))
    assert done.returncode == 0, done.stderr
    assert "integrity" in done.stdout
    assert "origin" in done.stdout
    assert sorted(p.name for p in (built.folder / "bundles").iterdir()) == ["tiny-phone-arm64-high"]
    document = json.loads((built.folder / "first.json").read_text())
    rungs = document["bundles"][0]["artifacts"][0]["retention"]["rungs"]
    assert [r["rung"] for r in rungs] == ["teacher", "student", "quantized", "shipped"]
    assert rungs[0]["kl_mean_nats"] == pytest.approx(0, abs=1e-6)
    assert rungs[0]["retention"] == 1.0
    quantized, shipped = rungs[2], rungs[3]
    assert shipped["perplexity"] == pytest.approx(quantized["perplexity"], rel=0.05)
    assert document["bundles"][0]["artifacts"][0]["latency"]["basis"] == "proxy"
    assert document["compression"] if "compression" in document else document["plan"]["compression"] >= 4


def test_a_second_target_reuses_the_student_and_everything_can_be_reused(built):
    done = built("build", built.recipe(), "-t", "phone", "-t", "raspberry-pi-5", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["student"]["reused"] is True
    assert [b["target"] for b in document["bundles"]] == ["phone-arm64-high", "raspberry-pi-5"]
    assert "teacher 1/" not in done.stderr
    assert model_sums(bundle_of(built)) == model_sums(bundle_of(built, "raspberry-pi-5"))
    changed = built("build", built.recipe(), "-t", "phone", "--set", "bench.repeats=2")
    assert changed.returncode == 0, changed.stderr
    assert "verify: retention" in changed.stderr
    assert changed.stderr.count("(from the store)") == 4  # data, student, export, verify; bench is new


def test_bench_takes_a_bundle_and_checks_it_first(built, tmp_path):
    bundle = bundle_of(built)
    for named in (bundle, bundle / "model"):
        found = built.json("bench", str(named), "-t", "phone", "--set", "bench.repeats=1")
        manifest = json.loads((bundle / "manifest.json").read_text())
        assert found["artifact_sha256"] == manifest["artifacts"][0]["sha256"]
    changed = tmp_path / "changed"
    shutil.copytree(bundle, changed)
    with (changed / "model" / "model.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    refused(built("bench", str(changed), "-t", "phone"), "model/model.gguf")
    refused(built("bench", str(bundle / "preprocess"), "-t", "phone"), "does not say which artifact")


def test_the_store_lists_what_each_thing_is(built):
    rows = built.json("store", "list")
    assert {row["stage"] for row in rows} == {"data", "teacher", "student", "export", "verify", "bench"}
    assert all(row["what"] for row in rows), rows
    shown = built("store", "list").stdout
    for said in ("documents to train on", "parameters", "gguf:Q4_0", "retention ", "tokens/s (proxy)"):
        assert said in shown, shown


def test_plan_tells_what_the_store_has(built):
    hits = built.json("plan", built.recipe(), "-t", "phone")["store_hits"]
    assert all(hits.values()), hits
    other = built.json("plan", built.recipe(), "-t", "phone", "--set", "distill.tokens=50000")["store_hits"]
    assert other == {"data": True, "teacher": True, "student": False}


def test_a_gate_out_of_reach_exits_3_and_leaves_the_reports(built):
    done = built("build", built.recipe(), *TARGETS, "--min-retention", "5", "--out", "gated")
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    folder = Path(done.stderr.split("reports in ")[1].split(" ")[0].split(";")[0].strip())
    retention = json.loads((folder / "retention.json").read_text())
    gate = retention["gate"]
    assert (gate["min_retention"], gate["on"], gate["passed"], gate["verdict"]) == (5.0, "ci95_low", False, "failed")
    assert [check["name"] for check in gate["checks"] if check["passed"] is False] == ["retention"]
    assert len(retention["rungs"]) == 4
    assert "FAILED" in done.stderr
    assert "distill.tokens, 40,000 now" in done.stderr
    written = built("report", str(folder))
    assert written.returncode == 0, written.stderr
    page = (folder / "report.html").read_text()
    assert "gate FAILED" in page and "retention at least" not in page and page.count("<svg") == 2
    for check in gate["checks"]:
        assert check["name"] in page
    shown = built("build", built.recipe(), *TARGETS, "--min-retention", "5", "--out", "gated", "--json")
    assert shown.returncode == 3
    assert json.loads(shown.stdout)["bundles"][0]["bundle"] is None
    assert not (built.folder / "gated").exists() or not any((built.folder / "gated").iterdir())


def test_what_goes_wrong_with_one_target_stops_no_other(built, tmp_path):
    (tmp_path / "tiny-raspberry-pi-5").mkdir()
    (tmp_path / "tiny-raspberry-pi-5" / "thesis.txt").write_text("not a bundle")
    done = built("build", built.recipe(), "-t", "raspberry-pi-5", "-t", "phone", "--out", str(tmp_path), "--json")
    assert done.returncode == 2, done.stderr
    assert "exists and is not a bundle" in done.stderr and "Traceback" not in done.stderr
    assert [b["target"] for b in json.loads(done.stdout)["bundles"]] == ["phone-arm64-high"]
    assert built("bundle", "verify", str(tmp_path / "tiny-phone-arm64-high")).returncode == 0
    assert (tmp_path / "tiny-raspberry-pi-5" / "thesis.txt").read_text() == "not a bundle"


def test_onnx_beside_gguf_in_one_bundle(built):
    done = built("build", built.recipe(), *TARGETS, "--set", "export.artifacts=gguf:Q4_0,onnx:INT4", "--out", "both")
    assert done.returncode == 0, done.stderr
    bundle = built.folder / "both" / "tiny-phone-arm64-high"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert [(a["format"], a["quantization"]) for a in manifest["artifacts"]] == [("gguf", "Q4_0"), ("onnx", "INT4")]
    assert built("bundle", "verify", str(bundle)).returncode == 0


def test_sigkill_at_ten_random_moments_ends_with_the_same_model(built, tmp_path):
    command = Command(tmp_path, warm=True)
    recipe = shutil.copy(built.recipe(), tmp_path / "tiny.yaml")
    seed = int(os.environ.get("EDGEDISTILL_TEST_SEED", time.time_ns() % 10**6))
    rng, kills, done = random.Random(seed), 0, None
    while kills < 10:
        process = command.start("build", str(recipe), *TARGETS)
        try:
            process.communicate(timeout=rng.uniform(0.5, 9.0))
            done = process.returncode
            shutil.rmtree(tmp_path / "bundles", ignore_errors=True)
            if rng.random() < 0.5:  # finished before the kill: take something away, so that there is work to kill
                shutil.rmtree(tmp_path / "store" / "records" / "export", ignore_errors=True)
            else:
                shutil.rmtree(tmp_path / "store", ignore_errors=True)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        assert done in (None, 0), f"seed {seed}"
    final = command("build", str(recipe), *TARGETS)
    assert final.returncode == 0, (seed, final.stderr)
    assert model_sums(bundle_of(command)) == model_sums(bundle_of(built)), f"seed {seed}"
    assert command("store", "verify").returncode == 0


def test_interrupting_twice_is_safe(built, tmp_path):
    command = Command(tmp_path, warm=True)
    recipe = shutil.copy(built.recipe(), tmp_path / "tiny.yaml")
    process = command.start("build", str(recipe), *TARGETS)
    assert process.stderr is not None
    for line in process.stderr:
        if "teacher 1/" in line:
            break
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.05)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), stderr
    assert command("store", "verify").returncode == 0
    done = command("build", str(recipe), *TARGETS)
    assert done.returncode == 0, done.stderr
    assert model_sums(bundle_of(command)) == model_sums(bundle_of(built))


def test_an_interrupt_is_a_checkpoint_of_the_very_step(built, tmp_path):
    """Ctrl-C long before a checkpoint is due: the next run goes on from the step after which it came."""
    command = Command(tmp_path, warm=True)
    recipe = shutil.copy(built.recipe(), tmp_path / "tiny.yaml")
    rarely = ("--set", "teacher.train.checkpoint_every_s=1000", "--set", "distill.checkpoint_every_s=1000")
    process = command.start("distill", str(recipe), *TARGETS, *rarely)
    assert process.stderr is not None
    for line in process.stderr:
        if "teacher 1/" in line:
            break
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "this step is finished, and a checkpoint written" in stderr
    done = command("distill", str(recipe), *TARGETS, *rarely, "--json")
    assert done.returncode == 0, done.stderr
    step, steps = (int(n) for n in re.search(r"teacher: goes on from step (\d+) of (\d+)", done.stderr).groups())
    assert 1 <= step <= steps
    whole = built.json("distill", built.recipe(), *TARGETS)
    assert json.loads(done.stdout)["student"]["weights_sha256"] == whole["student"]["weights_sha256"]


def test_an_interrupt_says_what_is_kept(tmp_path):
    command = Command(tmp_path)
    process = command.start("build", command.recipe(), *TARGETS)
    assert process.stderr is not None
    for line in process.stderr:
        if "teacher 1/" in line:
            break
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: what was finished is kept; the same command goes on from there" in stderr


CRASH = """
import os, signal, sys
if "edgedistill.runtimes.worker" in " ".join(sys.orig_argv):
    import llama_cpp
    def decode(*_):
        os.kill(os.getpid(), signal.SIGSEGV)
    llama_cpp.llama_decode = decode
"""


def test_a_runtime_that_crashes_is_reported_and_what_was_finished_stays(built, tmp_path):
    """The child process really dies of SIGSEGV in its first decode."""
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    store = shutil.copytree(built.folder / "store", tmp_path / "store")
    shutil.rmtree(store / "records" / "verify")
    crashing = Command(tmp_path, {"PYTHONPATH": str(tmp_path)})
    recipe = shutil.copy(built.recipe(), tmp_path / "tiny.yaml")
    done = crashing("build", str(recipe), *TARGETS)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for part in ("llama.cpp", "SIGSEGV", "model.gguf", "try: "):
        assert part in done.stderr, done.stderr
    (tmp_path / "sitecustomize.py").unlink()
    again = Command(tmp_path, warm=True)("build", str(recipe), *TARGETS, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["student"]["reused"] is True


@pytest.mark.skipif(
    os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="mounting a small disk needs root"
)
def test_a_disk_that_fills_up_loses_nothing_that_was_finished(built, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    try:
        full = built("build", built.recipe(), *TARGETS, "--out", str(place))
        refused(full, "No space left on device", "free space")
        assert not list(place.glob("tiny-*"))
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert built("store", "verify").returncode == 0


def test_export_verify_and_bench_stand_alone(built):
    student = built.json("distill", built.recipe(), *TARGETS)["student"]["path"]
    exported = built.json("export", "--student", student, "--quantization", "Q8_0", "--out", "alone")
    assert exported["quantization"] == "Q8_0"
    text = str(built.folder / "text.txt")
    words = ["verify", "alone", "--student", student, "--data", text, "--set", "verify.context_tokens=64"]
    words += ["--set", "data.min_document_chars=200"]  # so many documents in 2,000 tokens that there is an interval
    retention = built.json(*words, "--set", "verify.max_tokens=2000")
    assert retention["retention"]["value"] == pytest.approx(1.0, abs=0.02)
    failed = built(*words, "--set", "verify.max_tokens=2000", "--min-retention", "3")
    assert failed.returncode == 3
    latency = built.json(
        "bench", "alone", "-t", "cpu-x86", "--set", "bench.prompt_tokens=8", "--set", "bench.new_tokens=8",
        "--set", "bench.repeats=1", "--set", "bench.warmup=0",
    )  # fmt: skip
    assert latency["decode_tokens_per_s"] > 0
    data = bytearray((built.folder / "alone" / "model.gguf").read_bytes())
    data[-1] ^= 1
    (built.folder / "alone" / "model.gguf").write_bytes(data)
    refused(built(*words), "model.gguf", "hash differs")


def test_students_cut_from_layers_and_pretrained(built):
    recipe = built.recipe()
    cut = built.json("distill", recipe, *TARGETS, "--set", "student.start=layers", "--set", "student.compression=1.2")
    assert cut["student"]["start"] == "layers"
    assert cut["student"]["shape"]["num_hidden_layers"] == 1
    assert cut["student"]["shape"]["hidden_size"] == 64
    student = built.json("distill", recipe, *TARGETS)["student"]["path"]
    more = built.json("distill", recipe, *TARGETS, "--student", student, "--set", "distill.tokens=5000")
    assert more["student"]["start"] == "pretrained"
    assert more["student"]["training"]["history"][-1]["perplexity"] < 100


@pytest.mark.parametrize("start", ["width", "both"])
def test_a_bundle_of_a_student_cut_out_of_its_teacher(built, start):
    words = ("--set", f"student.start={start}", "--set", "student.compression=2.5", "--out", f"cut-{start}")
    document = built.json("build", built.recipe(), *TARGETS, *words)
    student = document["student"]
    assert student["start"] == start
    assert student["shape"]["num_hidden_layers"] == 2
    assert student["shape"]["hidden_size"] == 32
    assert student["shape"]["head_dim"] == 16
    assert student["start_details"]["method"] == "activation importance"
    rungs = {r["rung"]: r["perplexity"] for r in document["bundles"][0]["artifacts"][0]["retention"]["rungs"]}
    # 40,000 tokens of a small grammar: far from the 320 of a student that knows nothing, as in the shipped bytes
    assert rungs["student"] < 60
    assert rungs["shipped"] == pytest.approx(rungs["student"], rel=0.1)
    assert built("bundle", "verify", str(built.folder / f"cut-{start}" / "tiny-phone-arm64-high")).returncode == 0
    again = built.json("distill", built.recipe(), *TARGETS, *words[:4])
    assert again["student"]["reused"] is True


def test_losses_can_be_mixed(built):
    words = ("--set", "distill.cross_entropy=0.5", "--set", "distill.temperature=2", "--set", "distill.tokens=5000")
    mixed = built.json("distill", built.recipe(), *TARGETS, *words)
    assert mixed["student"]["training"]["loss"] == "1·forward-kl(T=2) + 0.5·cross-entropy"
