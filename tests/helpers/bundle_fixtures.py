"""A small real bundle: a random Llama as a quantized GGUF, with records that are made up but valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import tiny_checkpoint

from edgedistill.bench.ceiling import BytesRead, bytes_read_a_token, ceiling
from edgedistill.bench.measure import drift, percentiles
from edgedistill.bundle.build import BundledArtifact, bundle
from edgedistill.config.recipe import Recipe
from edgedistill.config.targets import load_target
from edgedistill.gguf.quantize import export_gguf
from edgedistill.models.folder import tokenizer_sha256
from edgedistill.records.artifact import Artifact, Parity, SpeedComparison
from edgedistill.records.data import DataResult, SplitPart
from edgedistill.records.latency import Latency, Workload
from edgedistill.records.retention import (
    Agreement,
    Baselines,
    Measured,
    Neighbours,
    Retention,
    Rung,
    Scored,
    TokenizerCheck,
)
from edgedistill.records.shape import Shape
from edgedistill.records.training import StudentResult, TeacherResult
from edgedistill.statistics import METHOD, rate
from edgedistill.store import Store
from edgedistill.verify.gate import judged

HELD_OUT = ["Once upon a time there was a cat. " * 20, "for x in range(10):\n    print(x)\n" * 9, "日本語 and émigré"]
SHAPE = Shape(
    vocab_size=263,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=False,
)


def rung(name: str, perplexity: float, teacher: float, sha256: str, **changes: Any) -> Rung:
    kept = teacher / perplexity
    itself: dict[str, Any] = {
        "retention_ci95": (1.0, 1.0),
        "kl_mean_nats": 0.0,
        "kl_mean_nats_ci95": (0.0, 0.0),
        "kl_p99_nats": 0.0,
        "kl_p99_nats_ci95": (0.0, 0.0),
        "top1_agreement": 1.0,
        "top1_agreement_ci95": (0.9999, 1.0),
    }
    return Rung(
        **{
            "rung": name,
            "value": perplexity,
            "ci95": (perplexity * 0.96, perplexity * 1.05),
            "perplexity": perplexity,
            "perplexity_ci95": (perplexity * 0.96, perplexity * 1.05),
            "next_token_accuracy": 0.41,
            "next_token_accuracy_ci95": (0.40, 0.42),
            "retention": kept,
            "retention_ci95": (kept * 0.985, kept * 1.012),
            "kl_mean_nats": 0.13,
            "kl_mean_nats_ci95": (0.12, 0.14),
            "kl_p99_nats": 1.2,
            "kl_p99_nats_ci95": (1.1, 1.4),
            "top1_agreement": 0.78,
            "top1_agreement_ci95": (0.77, 0.79),
            "artifact_sha256": sha256,
            "basis": "measured",
            "runtime": "torch",
            **(itself if name == "teacher" else {}),
            **changes,
        }
    )


def neighbours(above: str, below: str, kl: float, ratio: float = 1.0) -> Neighbours:
    return Neighbours(
        above=above,
        below=below,
        kl_mean_nats=Scored(value=kl, ci95=(0.9 * kl, 1.1 * kl)),
        perplexity_ratio=Scored(value=ratio, ci95=(0.999 * ratio, 1.001 * ratio)),
        top1_agreement=0.98,
    )


def retention(artifact: Artifact, min_retention: float = 0.8, **changes: Any) -> Retention:
    """A record that its gate agrees with: 0.882 kept of a teacher that knows its text."""
    rungs = [
        rung("teacher", 20.4, 20.4, "a" * 64),
        rung("student", 22.9, 20.4, "b" * 64),
        rung("quantized", 23.1, 20.4, artifact.sha256),
        rung("shipped", 23.12, 20.4, artifact.sha256, runtime=artifact.runtime.removesuffix("-genai")),
    ]
    kept = Scored(value=rungs[-1].retention, ci95=rungs[-1].retention_ci95)
    values: dict[str, Any] = {
        "task": "causal-lm",
        "metric": "perplexity",
        "higher_is_better": False,
        "examples": 60_000,
        "documents": 212,
        "eval_sha256": "c" * 64,
        "context_tokens": 256,
        "stride_tokens": 255,
        "bos": True,
        "effective_documents": 187.4,
        "intervals": METHOD,
        "artifact": f"{artifact.format}:{artifact.quantization}",
        "baselines": Baselines(
            tokens=263,
            uniform_over_teacher=Scored(value=263 / 20.4, ci95=(12.1, 13.6)),
            unigram_perplexity=118.0,
            unigram_over_teacher=Scored(value=118.0 / 20.4, ci95=(5.5, 6.1)),
            smoothing=0.01,
        ),
        "neighbours": [
            neighbours("student", "quantized", 0.004, 23.1 / 22.9),
            neighbours("quantized", "shipped", 1e-5, 23.12 / 23.1),
        ],
        "machine": {"cpu": "a CPU"},
        "runtime_options": {"threads": 2},
        "rungs": rungs,
        "retention": kept,
        "agreement": Agreement(
            top1=0.78,
            top1_ci95=(0.77, 0.79),
            kl_mean_nats=0.13,
            kl_mean_nats_ci95=(0.12, 0.14),
            kl_p99_nats=1.2,
            kl_p99_nats_ci95=(1.1, 1.4),
        ),
        "tokenizer": TokenizerCheck(texts=64, mismatches=0),
    }
    return judged(Measured(**{**values, **changes}), min_retention)


def latency(artifact: Artifact, folder: Path | None = None, **changes: Any) -> Latency:
    """A record of made-up samples; what follows from them is computed, as of real ones, unless it is given.

    `folder`: where the artifact lies; None: its ceiling is made up too.
    """
    read = BytesRead(4_900_000, 100_000, "")
    if folder is not None:
        read = bytes_read_a_token(artifact, folder, context_tokens=128)
    random = np.random.default_rng(0)
    samples = {
        "ttft_ms": [80.2, 81.0, 83.9, 80.9, 84.2],
        "token_ms": [float(ms) for ms in 6.0 + random.gamma(2.0, 0.4, 315)],
        "load_ms": [41.0],
    }
    ttft_ms, token_ms = samples["ttft_ms"], samples["token_ms"]
    prefill = rate(ttft_ms, [128] * 5)
    decode = rate([sum(token_ms[start : start + 63]) for start in range(0, 315, 63)], [63] * 5)
    values: dict[str, Any] = {
        "target": "jetson-orin-nano",
        "measured_on": {"machine": "a build server", "cpu": "a CPU", "memory_bytes": 8 << 30, "threads": 2},
        "basis": "proxy",
        "artifact_sha256": artifact.sha256,
        "workload": Workload(batch=1, prompt_tokens=128, new_tokens=64, warmup=2, repeats=5),
        "ttft_ms": percentiles(ttft_ms),
        "token_ms": percentiles(token_ms),
        "prefill_tokens_per_s": prefill.value,
        "prefill_tokens_per_s_ci95": prefill.ci95,
        "decode_tokens_per_s": decode.value,
        "decode_tokens_per_s_ci95": decode.ci95,
        "rate_units": 5,
        "load_ms": 41.0,
        "peak_rss_bytes": 93_000_000,
        "drift": drift(token_ms),
        "samples": samples,
        "ceiling": ceiling(load_target("jetson").bandwidth_bytes_per_s, read, context_tokens=128),
        "notes": ["this machine is not jetson-orin-nano: the figures tell nothing of its speed"],
    }
    return Latency(**{**values, **changes})


def parity(**changes: Any) -> Parity:
    values: dict[str, Any] = {
        "runtime": "llama-cpp-python 0.3.36",
        "inputs": "4 sequences, 256 tokens: texts of the package",
        "reference": "stored",
        "values": 67_328,
        "max_abs_difference": 0.06,
        "mean_abs_difference": 0.01,
        "relative_rms": 0.017,
        "limit": 0.2,
        "greedy_tokens": 16,
        "greedy_compared": 12,
        "greedy_tokens_equal": 12,
    }
    return Parity(**{**values, **changes})


def speed(**changes: Any) -> SpeedComparison:
    values: dict[str, Any] = {
        "machine": {"cpu": "a CPU"},
        "runtime": "llama-cpp-python 0.3.36",
        "float_ms": 2.0,
        "quantized_ms": 1.0,
        "ratio": 0.51,
        "ratio_ci95": (0.45, 0.6),
        "pairs": 9,
        "pays": True,
    }
    return SpeedComparison(**{**values, **changes})


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({"verify": {"min_retention": 0.8}, **changes})


def data_result() -> DataResult:
    return DataResult(
        source="python-docs",
        split="hash",
        parts={"train": SplitPart(documents=900, bytes=2_000_000, sha256="d" * 64)},
        duplicates_dropped=3,
        overlap={"documents_in_both": 1.0, "documents_sharing_13_words": 7.0, "share_of_13_word_runs": 0.0123},
        sha256="e" * 64,
    )


def teacher_result(folder: Path, **changes: Any) -> TeacherResult:
    shape = SHAPE.model_copy(update={"num_hidden_layers": 8})
    values: dict[str, Any] = {
        "origin": "folder",
        "name": "/home/someone/secret/big-llama",
        "path": str(folder),
        "shape": shape,
        "parameters": shape.parameters,
        "weights_sha256": "a" * 64,
        "tokenizer_sha256": "f" * 64,
    }
    return TeacherResult(**{**values, **changes})


def student_result(tokenizer: str = "f" * 64) -> StudentResult:
    return StudentResult(
        path="model",
        start="fresh",
        shape=SHAPE,
        parameters=SHAPE.parameters,
        weights_sha256="b" * 64,
        tokenizer_sha256=tokenizer,
    )


class Ingredients:
    """What a bundle is made of, in `folder`; `make` bundles it, with whatever is given instead."""

    def __init__(self, folder: Path, *, quantization: str = "Q4_0") -> None:
        self.folder = folder
        self.store = Store(folder / "store")
        self.checkpoint = tiny_checkpoint(folder / "student")
        self.teacher_dir = folder / "teacher"
        self.teacher_dir.mkdir()
        self.artifact_dir = folder / "artifact"
        self.artifact = export_gguf(
            self.checkpoint, self.artifact_dir, quantization=quantization, context_tokens=2048, threads=2, name="tiny"
        )

    def exported(self, quantization: str, *, onnx: bool = False) -> BundledArtifact:
        """Another artifact of the same checkpoint."""
        folder = self.folder / f"artifact-{quantization}"
        if onnx:
            from edgedistill.onnx.decoder import export_onnx

            artifact = export_onnx(
                self.checkpoint, folder, quantization=quantization, context_tokens=2048, threads=2, name="tiny"
            )
        else:
            artifact = export_gguf(
                self.checkpoint, folder, quantization=quantization, context_tokens=2048, threads=2, name="tiny"
            )
        return self.bundled(
            artifact=artifact, folder=folder, retention=retention(artifact), latency=latency(artifact, folder)
        )

    def bundled(self, **changes: Any) -> BundledArtifact:
        values: dict[str, Any] = {
            "artifact": self.artifact,
            "folder": self.artifact_dir,
            "retention": retention(self.artifact),
            "latency": latency(self.artifact, self.artifact_dir),
        }
        return BundledArtifact(**{**values, **changes})

    def make(self, folder: Path, **changes: Any) -> Path:
        values: dict[str, Any] = {
            "recipe": recipe(),
            "target": load_target("jetson"),
            "artifacts": [self.bundled()],
            "student": student_result(tokenizer_sha256(self.checkpoint)),
            "teacher": teacher_result(self.teacher_dir),
            "data": data_result(),
            "student_dir": self.checkpoint,
            "held_out_texts": HELD_OUT,
            "store": self.store,
        }
        return bundle(folder, **{**values, **changes})
