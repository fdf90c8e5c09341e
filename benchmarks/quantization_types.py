"""Stages of quantization.py without training: what each type costs, how fast it decodes, what a matrix is worth."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from common import Bound, as_text, lower, upper
from quantization_setup import Subject, exported, kl_by_document, open_runtime, options, scored

from edgedistill import statistics
from edgedistill.progress import Progress
from edgedistill.quantization.mixes import HELPED_BY_IMPORTANCE
from edgedistill.store import Store

TYPES = (
    "gguf:F16", "gguf:Q8_0", "gguf:Q6_K", "gguf:Q5_K_M", "gguf:Q4_K_M", "gguf:IQ4_NL", "gguf:IQ4_XS", "gguf:Q4_0",
    "gguf:Q3_K_M", "gguf:IQ3_S", "gguf:IQ3_XXS", "gguf:Q2_K", "gguf:IQ2_S", "onnx:FP32", "onnx:INT8", "onnx:INT4",
)  # fmt: skip
MATRIX_TYPES = ("Q4_0", "Q4_K_M", "IQ4_NL", "IQ4_XS", "Q3_K_M", "IQ3_S")
PROMPT, NEW = 32, 96
RUNTIME_KL = 5e-3  # an FP32 graph in onnxruntime against F16 in llama.cpp: nothing but rounding


def types_table(
    subjects: list[Subject], *, store: Store, rounds: int, progress: Progress
) -> tuple[dict[str, Any], list[tuple[str, ...]], list[Bound]]:
    """Perplexity, KL from the F16 file, size and decode speed of every type, by the product's defaults."""
    figures: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    bounds = []
    for of in subjects:
        made = {artifact: exported(of, artifact, store=store, progress=progress) for artifact in TYPES}
        speed = decode_speed(of, made, store=store, rounds=rounds)
        figures[of.name] = {}
        for artifact, one in made.items():
            scores = scored(of, one, made["gguf:F16"], store=store)
            kl = statistics.positive_mean(kl_by_document(scores))
            p99 = statistics.p99(scores.kl, scores.document)
            perplexity = statistics.perplexity(statistics.by_unit(scores.nll, scores.document))
            figures[of.name][artifact] = {
                "perplexity": perplexity.value, "perplexity_ci95": perplexity.ci95,
                "kl_mean_nats": kl.value, "kl_mean_nats_ci95": kl.ci95,
                "kl_p99_nats": None if p99 is None else p99.value,
                "bits_per_weight": one.result.bits_per_weight, "bytes": one.result.bytes,
                "importance_matrix": one.result.calibration is not None, "runtime": one.result.runtime,
                "decode_tokens_per_s": speed[artifact][0], "decode_tokens_per_s_ci95": speed[artifact][1],
            }  # fmt: skip
            rows.append(
                (of.name, artifact, f"{perplexity.value:.3f}", as_text(kl, ".5f"),
                 "-" if p99 is None else f"{p99.value:.4f}", f"{one.result.bits_per_weight:.2f}",
                 f"{one.result.bytes / 1e6:.2f} MB", f"{speed[artifact][0]:,.0f}")
            )  # fmt: skip
        kls = {artifact: figures[of.name][artifact]["kl_mean_nats"] for artifact in TYPES}
        bounds.append(Bound(f"{of.name}: FP32 graph, mean KL from F16 GGUF", kls["onnx:FP32"], "<=", RUNTIME_KL))
        bounds.append(Bound(f"{of.name}: Q8_0's KL / Q2_K's", kls["gguf:Q8_0"] / kls["gguf:Q2_K"], "<=", 0.1))
    return figures, rows, bounds


def decode_speed(of: Subject, made: dict[str, Any], *, store: Store, rounds: int) -> dict[str, tuple[float, Any]]:
    """Tokens/s after a prompt, one thread, all types in turn in every round, so that a slow minute hits all alike."""
    prompt = of.windows[0].ids[:PROMPT].astype(np.int64)
    samples: dict[str, list[float]] = {artifact: [] for artifact in made}
    processes = {artifact: open_runtime(one, store, threads=1) for artifact, one in made.items()}
    try:
        for process in processes.values():
            process.timed(prompt, 8)
        for number in range(rounds):
            names = list(processes)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                samples[name].append(float(np.median(processes[name].timed(prompt, NEW)["token_ms"])))
    finally:
        for process in processes.values():
            process.close()
    found = {}
    for name, milliseconds in samples.items():
        values = np.array(milliseconds)
        rate = statistics.median(1e3 / values)
        found[name] = (rate.value, rate.ci95)
    return found


def importance_table(
    subjects: list[Subject], *, store: Store, progress: Progress
) -> tuple[dict[str, Any], list[tuple[str, ...]], list[Bound]]:
    """KL with an importance matrix over KL without it, paired by document; the default must be what it shows."""
    figures: dict[str, Any] = {}
    rows, bounds = [], []
    for quantization in MATRIX_TYPES:
        seen: dict[str, statistics.Estimate] = {}
        for of in subjects:
            reference = exported(of, "gguf:F16", store=store, progress=progress)
            kl = {}
            for setting in ("on", "off"):
                chosen = dataclasses.replace(options(of), importance_matrix=setting)
                one = exported(of, f"gguf:{quantization}", store=store, chosen=chosen, progress=progress)
                kl[setting] = kl_by_document(scored(of, one, reference, store=store))
            seen[of.name] = statistics.ratio_of_means(kl["on"], kl["off"])
            figures.setdefault(quantization, {})[of.name] = {
                "kl_with": kl["on"].mean, "kl_without": kl["off"].mean,
                "ratio": seen[of.name].value, "ratio_ci95": seen[of.name].ci95,
            }  # fmt: skip
        helps = all(upper(one) < 1 for one in seen.values())
        hurts = all(lower(one) > 1 for one in seen.values())
        shows = "helps" if helps else "hurts" if hurts else "undecided"
        default = quantization in HELPED_BY_IMPORTANCE
        figures[quantization] |= {"shows": shows, "default": default}
        for name, one in seen.items():
            rows.append((quantization, name, f"{figures[quantization][name]['kl_with']:.5f}",
                         f"{figures[quantization][name]['kl_without']:.5f}",
                         as_text(one), shows, "on" if default else "off"))  # fmt: skip
        contradicts = (helps and not default) or (hurts and default)
        bounds.append(Bound(f"{quantization}: default contradicts the interval", float(contradicts), "<=", 0))
    return figures, rows, bounds
