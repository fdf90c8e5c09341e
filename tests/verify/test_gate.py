"""The gate: nonsense does not pass, honest artifacts do, and what failed is named with its rung and its tensor."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack.faults import Fault, seeded
from attack.gguf_faults import gguf_faults
from attack.onnx_faults import onnx_faults
from bundle_fixtures import neighbours, retention
from command import Command, tiny_text
from gate_models import changed, noisy, resealed, trained

from edgedistill import stages
from edgedistill.config.recipe import Recipe
from edgedistill.errors import GateFailed, UserError
from edgedistill.records.artifact import Artifact
from edgedistill.records.retention import Departure, Gate, Measured, Retention, Scored
from edgedistill.statistics import ByUnit, perplexity_ratio
from edgedistill.store import Store
from edgedistill.verify.baselines import SMOOTHINGS, unigram
from edgedistill.verify.gate import failures, judge, remedy
from edgedistill.verify.stage import require_gate

NAMES = [
    "teacher against a uniform guess",
    "teacher against word counts",
    "files against the model",
    "tokenizer",
    "quantized against student",
    "shipped against quantized",
    "retention",
    "agreement",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` and `b`: two seeds of one small model that knows the text of `text.txt`'s kind."""
    folder = tmp_path_factory.mktemp("models")
    trained(folder / "a")
    trained(folder / "b", seed=1)
    (folder / "text.txt").write_text(tiny_text(24, seed=2))
    return folder


class Bench:
    """Artifacts of `models`, made once, and their gates by the functions that the command line calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store")

    def artifact(self, of: str, kind: str) -> Path:
        out = self.folder / f"{of}-{kind.replace(':', '-')}"
        if not out.exists():
            format_, quantization = kind.split(":")
            recipe = Recipe()
            quick = recipe.export.model_copy(update={"compare_speed": False})
            stages.export(
                str(self.folder / of), format_=format_, quantization=quantization, context_tokens=None, out=out,
                store=self.store, recipe=recipe.model_copy(update={"export": quick}),
            )  # fmt: skip
        return out

    def verify(
        self, artifact: Path, student: str | Path, teacher: str | Path | None = None, **verify: Any
    ) -> Retention:
        data = verify.pop("data", self.folder / "text.txt")
        recipe = Recipe()
        settings = recipe.verify.model_copy(update={"context_tokens": 64, "max_tokens": 2000, **verify})
        source = recipe.data.model_copy(update={"source": str(data), "min_document_chars": 200})
        recipe = recipe.model_copy(update={"verify": settings, "data": source})
        found, _ = stages.verify(
            artifact,
            student=str(self.folder / student),
            teacher=None if teacher is None else str(self.folder / teacher),
            recipe=recipe,
            store=self.store,
        )
        return found

    def damaged(self, artifact: Path, fault: Fault, at: Path) -> Path:
        copy = shutil.copytree(artifact, at)
        fault.apply(copy / "model.gguf" if (copy / "model.gguf").exists() else copy, seeded(fault))
        return resealed(copy)


@pytest.fixture(scope="module")
def bench(models: Path) -> Bench:
    return Bench(models)


def outcomes(gate: Gate) -> dict[str, bool | None]:
    return {check.name: check.passed for check in gate.checks}


def failed(gate: Gate) -> list[str]:
    return [name for name, passed in outcomes(gate).items() if passed is False]


# ---- honest artifacts


@pytest.mark.parametrize("kind", ["gguf:F32", "gguf:F16", "gguf:Q8_0", "gguf:Q4_0", "onnx:FP32", "onnx:INT4"])
def test_an_honest_artifact_passes(bench: Bench, kind: str) -> None:
    found = bench.verify(bench.artifact("a", kind), "a")
    assert found.gate.verdict == "passed", failures(found.gate)
    assert [check.name for check in found.gate.checks] == NAMES
    assert all(check.passed for check in found.gate.checks)
    assert all(check.why for check in found.gate.checks)
    assert found.baselines.unigram_over_teacher.value > 2
    # what a reader of the record alone finds
    read = Retention.model_validate_json(found.model_dump_json(by_alias=True))
    assert judge(read, read.gate.min_retention) == read.gate


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_honest_artifacts_of_other_families_pass(bench: Bench, family: str) -> None:
    if not (bench.folder / family).exists():
        trained(bench.folder / family, family=family, steps=100)
    for kind in ("gguf:Q4_0", "onnx:INT8"):
        found = bench.verify(bench.artifact(family, kind), family)
        assert found.gate.verdict == "passed", failures(found.gate)


def test_a_student_that_learnt_less_than_its_teacher_passes_low_agreement_and_all(bench: Bench) -> None:
    trained(bench.folder / "early", seed=3, steps=110)
    found = bench.verify(bench.artifact("early", "gguf:Q8_0"), "early", "a", min_retention=0.5)
    assert found.gate.verdict == "passed", failures(found.gate)
    assert found.agreement.top1 < 0.95


def test_a_trained_model_passes_at_coarse_types(test_data: Path, tmp_path: Path) -> None:
    model = test_data / "weights" / "stories260k-hf"
    text = test_data / "text_lm" / "tinystories" / "tinystories_calib.txt"
    if not (model.is_dir() and text.is_file()):
        pytest.skip(f"no {model} or {text}")
    shutil.copytree(model, tmp_path / "stories", copy_function=shutil.copyfile)
    stories = [one for one in text.read_text().split("\n\n") if len(one) > 300][:12]
    (tmp_path / "text.txt").write_text("\n\n".join(stories))
    bench = Bench(tmp_path)
    for kind in ("gguf:Q4_0", "gguf:Q8_0"):
        found = bench.verify(bench.artifact("stories", kind), "stories")
        assert found.gate.verdict == "passed", failures(found.gate)


# ---- teachers that prove nothing


def test_a_teacher_of_noise_fails(bench: Bench) -> None:
    """More noise than weights: retention far above 1."""
    changed(bench.folder / "noise", bench.folder / "a", noisy(2.0))
    found = bench.verify(bench.artifact("a", "gguf:F32"), "a", "noise")
    assert found.retention.value > 2
    assert found.gate.verdict == "failed"
    assert "teacher against word counts" in failed(found.gate)
    assert "agreement" in failed(found.gate)
    with pytest.raises(GateFailed, match="teacher: ") as caught:
        require_gate([("a", found, Path("reports"))])
    assert "check the teacher" in caught.value.remedy


def test_a_teacher_of_a_little_noise_fails_on_agreement_alone(bench: Bench) -> None:
    changed(bench.folder / "noisy", bench.folder / "a", noisy(0.6))
    found = bench.verify(bench.artifact("a", "gguf:F32"), "a", "noisy")
    assert found.retention.ci95 is not None and found.retention.ci95[0] > 1
    assert failed(found.gate) == ["agreement"]


def test_an_overconfident_teacher_fails_though_every_likeliest_token_agrees(bench: Bench) -> None:
    def sharper(name: str, tensor: Any) -> Any:
        return 4 * tensor if name == "lm_head.weight" else tensor

    changed(bench.folder / "sharp", bench.folder / "a", sharper)
    found = bench.verify(bench.artifact("a", "gguf:F32"), "a", "sharp")
    assert found.agreement.top1 > 0.999
    assert failed(found.gate) == ["agreement"]


def test_a_random_model_that_is_its_own_teacher_fails(bench: Bench) -> None:
    trained(bench.folder / "random", steps=0)
    found = bench.verify(bench.artifact("random", "gguf:Q8_0"), "random")
    assert found.retention.value == pytest.approx(1, abs=0.02)
    assert failed(found.gate) == ["teacher against a uniform guess", "teacher against word counts"] or failed(
        found.gate
    ) == ["teacher against word counts"]


def test_a_model_that_says_the_same_whatever_it_reads_fails(bench: Bench) -> None:
    """The head reads nothing of what it is given."""

    def deaf(name: str, tensor: Any) -> Any:
        return 0 * tensor if name == "lm_head.weight" else tensor

    changed(bench.folder / "deaf", bench.folder / "a", deaf)
    found = bench.verify(bench.artifact("deaf", "gguf:F32"), "deaf")
    assert found.retention.value == pytest.approx(1, abs=1e-3)
    assert found.gate.verdict == "failed"


def test_a_teacher_of_a_shuffled_vocabulary_fails(bench: Bench) -> None:
    import torch

    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))

    def shuffled(name: str, tensor: Any) -> Any:
        return tensor[order] if name == "lm_head.weight" else tensor

    changed(bench.folder / "shuffled", bench.folder / "a", shuffled)
    found = bench.verify(bench.artifact("a", "gguf:F32"), "a", "shuffled")
    assert "teacher against a uniform guess" in failed(found.gate)


def test_text_of_one_repeated_word_proves_nothing(bench: Bench, tmp_path: Path) -> None:
    text = tmp_path / "same.txt"
    text.write_text("\n\n".join("dog " * n for n in range(60, 72)))
    with pytest.raises(UserError, match=r"has 1 document\(s\) to score \(11 more have a text that stands there"):
        bench.verify(bench.artifact("a", "gguf:F32"), "a", data=text)


def test_a_document_given_many_times_is_one(bench: Bench, tmp_path: Path) -> None:
    document = tiny_text(1, seed=9)
    others = tiny_text(4, seed=10)
    text = tmp_path / "twice.txt"
    text.write_text("\n\n".join([document] * 40 + [others]))
    found = bench.verify(bench.artifact("a", "gguf:F32"), "a", data=text)
    assert (found.documents, found.duplicate_documents) == (5, 39)


def test_too_few_documents_fail_with_how_many_and_how(bench: Bench, tmp_path: Path) -> None:
    text = tmp_path / "few.txt"
    text.write_text(tiny_text(3, seed=5))
    found = bench.verify(bench.artifact("a", "gguf:F32"), "a", data=text)
    assert found.gate.verdict == "too few documents to tell"
    assert not found.gate.passed
    assert found.retention.ci95 is None
    with pytest.raises(GateFailed, match=r"too few documents to tell, 3") as caught:
        require_gate([("a", found, Path("reports"))])
    assert "at least 5" in caught.value.remedy and "--data" in caught.value.remedy


# ---- artifacts of something else


def test_an_artifact_of_another_model_of_the_same_shape_fails(bench: Bench) -> None:
    found = bench.verify(bench.artifact("b", "gguf:Q8_0"), "a")
    assert {"files against the model", "quantized against student"} <= set(failed(found.gate))
    check = next(check for check in found.gate.checks if check.name == "quantized against student")
    assert check.rung == "quantized" and check.tensor
    assert check.tensor in failures(found.gate)[0]


KINDS = {
    "gguf:F32": ("transposed", "swapped heads", "permuted rows", "zeroed", "scaled norm", "all norms", "rope base"),
    "gguf:Q8_0": ("transposed", "scaled matrix", "rope base"),
    "onnx:FP32": ("transposed", "swapped heads", "scaled norm", "rope base", "attribute do_rotary"),
    "onnx:INT4": ("zeroed", "attribute rotary_interleaved"),
}


@pytest.mark.parametrize(("kind", "fault_kind"), [(kind, fault) for kind, faults in KINDS.items() for fault in faults])
def test_a_planted_fault_fails_and_is_named(bench: Bench, tmp_path: Path, kind: str, fault_kind: str) -> None:
    whole = bench.artifact("a", kind)
    faults = gguf_faults(whole / "model.gguf") if kind.startswith("gguf") else onnx_faults(whole)
    fault = next(fault for fault in faults if fault.kind == fault_kind)
    found = bench.verify(bench.damaged(whole, fault, tmp_path / "damaged"), "a")
    assert found.gate.verdict == "failed", fault.name
    wrong = [check for check in found.gate.checks if check.passed is False]
    assert {check.rung for check in wrong} <= {"quantized", "shipped"}
    assert any(check.tensor for check in wrong)
    if fault_kind in ("rope base", "attribute do_rotary", "attribute rotary_interleaved"):
        assert "shipped against quantized" in failed(found.gate)  # the weights are right, what computes is not
        assert any("0" in (check.tensor or "") for check in wrong), wrong  # in the first layer already
    elif kind.startswith("gguf"):
        assert any(fault.names in departure.tensor for departure in found.departures), failures(found.gate)
        assert any(found.departures[0].tensor in line for line in failures(found.gate))


# ---- the gate as a function of the record


@pytest.fixture(scope="module")
def record() -> Retention:
    artifact = Artifact(
        format="gguf", quantization="Q4_0", runtime="llama.cpp", entry="model.gguf", files=[], bytes=1, sha256="9" * 64,
        parameters=1, bits_per_weight=4.5, tensor_types={}, context_tokens=64, vocab_size=263,
    )  # fmt: skip
    return retention(artifact)


def _with(record: Retention, **changes: Any) -> Gate:
    return judge(record.model_copy(update=changes), 0.8)


def test_the_record_passes_and_says_each_check(record: Retention) -> None:
    assert [check.name for check in record.gate.checks] == NAMES
    assert record.gate.passed


def test_each_neighbour_fails_alone_and_names_its_tensor(record: Retention) -> None:
    gate = _with(
        record,
        neighbours=[record.neighbours[0], neighbours("quantized", "shipped", 0.5)],
        departures=[
            Departure(
                found="runtime", rung="shipped", tensor="kqv_out-0", said="the first tensor that departs is kqv_out-0"
            )
        ],
    )
    assert failed(gate) == ["shipped against quantized"]
    check = next(check for check in gate.checks if check.passed is False)
    assert (check.rung, check.tensor) == ("shipped", "kqv_out-0")
    assert failures(gate)[0].startswith("shipped: ")
    gate = _with(record, neighbours=[neighbours("student", "quantized", 5.0, 1.01), record.neighbours[1]])
    assert failed(gate) == ["quantized against student"]


def test_masters_of_quantization_aware_distillation_are_no_rounding_of_the_student(record: Retention) -> None:
    far = [neighbours("student", "quantized", 5.0), record.neighbours[1]]
    gate = _with(record, neighbours=far, made_of="masters")
    assert gate.passed
    assert "quantized against student" not in outcomes(gate)
    assert "masters" in next(c.why for c in gate.checks if c.name == "files against the model")


def test_retention_above_one_needs_the_agreement(record: Retention) -> None:
    better = Scored(value=1.3, ci95=(1.2, 1.4))
    sharper = record.agreement.model_copy(update={"kl_mean_nats": 0.05})
    for low, passed in ((1.01, True), (1.2, True), (1.3, False), (400.0, False)):
        gate = _with(record, retention=Scored(value=1.1 * low, ci95=(low, 1.2 * low)), agreement=sharper)
        assert gate.passed is passed, low
    for kl, passed in ((0.05, True), (0.22, True), (0.25, False), (9.0, False)):
        gate = _with(record, retention=better, agreement=record.agreement.model_copy(update={"kl_mean_nats": kl}))
        assert gate.passed is passed, kl
    # not shown to be above 1: perplexity tells what was kept
    gate = _with(
        record,
        retention=Scored(value=1.003, ci95=(0.998, 1.008)),
        agreement=record.agreement.model_copy(update={"kl_mean_nats": 0.4}),
    )
    assert gate.passed
    # a gate that asks for less asks for less agreement too
    far = record.agreement.model_copy(update={"kl_mean_nats": 0.6})
    assert judge(record.model_copy(update={"retention": better, "agreement": far}), 0.5).passed


def test_a_failure_outweighs_too_few_documents(record: Retention) -> None:
    unknown = Scored(value=0.9, ci95=None)
    gate = _with(record, retention=unknown)
    assert gate.verdict == "too few documents to tell"
    assert "documents" in remedy(gate)
    gate = _with(
        record, retention=unknown, neighbours=[neighbours("student", "quantized", 5.0, 1.01), record.neighbours[1]]
    )
    assert gate.verdict == "failed"


def test_a_gate_that_contradicts_its_checks_is_no_record(record: Retention) -> None:
    told = json.loads(record.model_dump_json(by_alias=True))
    for change in ({"passed": False}, {"verdict": "failed"}):
        with pytest.raises(ValueError, match="the checks say"):
            Retention.model_validate({**told, "gate": {**told["gate"], **change}})
    wrong = [dict(check, passed=False) for check in told["gate"]["checks"]]
    with pytest.raises(ValueError, match="the checks say"):
        Retention.model_validate({**told, "gate": {**told["gate"], "checks": wrong}})
    with pytest.raises(ValueError, match="the checks say"):
        Retention.model_validate({**told, "gate": {**told["gate"], "checks": []}})


# ---- the text's own counts


def test_unigram_is_that_of_the_other_documents() -> None:
    rng = np.random.default_rng(0)
    targets = rng.zipf(1.5, 300) % 20
    document = np.sort(rng.integers(0, 6, 300))
    found = unigram(targets, document, 20)
    best = math.inf
    for smoothing in SMOOTHINGS:
        nll = []
        for token, own in zip(targets, document, strict=True):
            others = targets[document != own]
            nll.append(-math.log((np.sum(others == token) + smoothing) / (len(others) + 20 * smoothing)))
        if np.mean(nll) < best:
            best, expected = float(np.mean(nll)), nll
    assert np.allclose(found.nll, expected)
    assert found.nll.mean() <= math.log(20) + 1e-6  # never worse than a uniform guess


# ---- simulated gates


def test_simulated_honest_gates_pass_and_nonsense_does_not(record: Retention) -> None:
    """Documents of uneven length and difficulty; the truth is known, the gate sees a sample of it."""
    rng = np.random.default_rng(1)
    cases = 2000

    def sample(documents: int, lost: float, gained: float, spread: float) -> Measured:
        """`lost`: nats a token of the artifact beyond the teacher; `gained`: of the teacher before word counts."""
        counts = np.maximum(20, rng.lognormal(5.5, 0.8, documents)).round()

        def by_unit(mean: float, between: float) -> ByUnit:
            noise = rng.standard_t(5, documents) / math.sqrt(5 / 3)
            return ByUnit((mean + between * noise + rng.normal(0, 1.5, documents) / np.sqrt(counts)) * counts, counts)

        teacher = by_unit(3.0, 0.5)
        artifact = ByUnit(teacher.sums + by_unit(lost, spread).sums, counts)
        counted = ByUnit(teacher.sums + by_unit(gained, 0.3).sums, counts)
        kept, words = perplexity_ratio(teacher, artifact), perplexity_ratio(counted, teacher)
        base = record.baselines.model_copy(
            update={name: Scored(value=words.value, ci95=words.ci95)
                    for name in ("uniform_over_teacher", "unigram_over_teacher")}
        )  # fmt: skip
        agreement = record.agreement.model_copy(update={"kl_mean_nats": max(lost, 0.05)})
        return record.model_copy(
            update={"retention": Scored(value=kept.value, ci95=kept.ci95), "baselines": base, "agreement": agreement}
        )

    for documents in (40, 100):
        # an honest build as the quickstart's: 0.935 kept, 1.5 nats better than counts
        found = [judge(sample(documents, 0.067, 1.5, 0.04), 0.8) for _ in range(cases)]
        assert sum(not gate.passed for gate in found) <= cases / 1000
    # a truth at the gate's threshold, and a teacher that knows no more than counts of words
    at_threshold = [judge(sample(20, math.log(1 / 0.8), 1.5, 0.1), 0.8).passed for _ in range(cases)]
    assert np.mean(at_threshold) < 0.045
    no_better = [judge(sample(20, 0.0, 0.0, 0.04), 0.8).passed for _ in range(cases)]
    assert np.mean(no_better) < 0.045


# ---- by the command line


def test_the_command_line_exits_3_and_names_rung_and_tensor(bench: Bench, tmp_path: Path) -> None:
    command = Command(tmp_path, warm=True)
    text = str(bench.folder / "text.txt")
    words = ["--data", text, "--set", "verify.context_tokens=64", "--set", "verify.max_tokens=2000",
             "--set", "data.min_document_chars=200"]  # fmt: skip
    a = str(bench.folder / "a")
    done = command("verify", str(bench.artifact("a", "gguf:Q8_0")), "--student", a, *words)
    assert done.returncode == 0, done.stderr
    assert "check: retention passed" in done.stdout
    other = command("verify", str(bench.artifact("b", "gguf:Q8_0")), "--student", a, *words)
    assert other.returncode == 3, other.stderr
    assert "Traceback" not in other.stderr
    assert "quantized: " in other.stderr and ".weight" in other.stderr.split("quantized: ")[1].splitlines()[0]
    assert "try: export the artifact again" in other.stderr
    folder = Path(other.stderr.split("reports in ")[1].split(" (")[0].strip())
    kept = json.loads((folder / "retention.json").read_text())
    assert kept["gate"]["verdict"] == "failed"
    assert any(check["tensor"] for check in kept["gate"]["checks"])


def test_a_runtime_that_gives_no_numbers_is_a_failed_gate(bench: Bench, tmp_path: Path) -> None:
    whole = bench.artifact("a", "gguf:F32")
    fault = next(f for f in gguf_faults(whole / "model.gguf") if f.name == "a value that is no number")
    with pytest.raises((GateFailed, UserError)) as caught:
        require_gate([("x", bench.verify(bench.damaged(whole, fault, tmp_path / "nan"), "a"), tmp_path)])
    assert "output_norm" in str(caught.value)
