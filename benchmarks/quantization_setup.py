"""What the stages of quantization.py share: the two students, exports in the store, and scores against a reference.

Everything lies in the store that EDGEDISTILL_STORE names, so that a run which was interrupted goes on where it was.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgedistill import pipeline
from edgedistill.config.recipe import Recipe, load_recipe
from edgedistill.config.targets import load_target
from edgedistill.data.prepare import read_part
from edgedistill.export.stage import export_model, options_of
from edgedistill.pipeline import Trained, threads_here
from edgedistill.progress import Progress
from edgedistill.quantization.options import ExportOptions
from edgedistill.records.artifact import Artifact
from edgedistill.records.base import Record
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.statistics import ByUnit, by_unit
from edgedistill.store import Store, Stored, Work, versions
from edgedistill.tasks.causal_lm import TextTokenizer, Window, encode_blocks, groups, scoring_windows
from edgedistill.tasks.metrics import TokenScores

DATA = Path(os.environ.get("EDGEDISTILL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
CONTEXT = 256
ORT = {"onnxruntime-genai": "onnxruntime"}  # logits come from onnxruntime, in which genai runs the same graph


@dataclass(frozen=True)
class Subject:
    """A distilled student, its recipe, and the held-out windows."""

    name: str
    recipe: Recipe
    trained: Trained
    windows: list[Window]

    @property
    def folder(self) -> Path:
        return self.trained.student.directory / self.trained.student.result.path

    @property
    def distilled_tokens(self) -> int:
        training = self.trained.student.result.training
        assert training is not None
        return training.tokens


class ScoreFiles(Record):
    """scores.npz: `nll`, `kl` from the reference (nats), `document`, a value a scored token."""

    tokens: int
    runtime: str


@dataclass(frozen=True)
class Scores:
    nll: NDArray[np.float32]
    kl: NDArray[np.float32]
    document: NDArray[np.int64]


def subject(name: str, *, store: Store, max_tokens: int, progress: Progress) -> Subject:
    """`tinystories`: distilled from teacher-tinystories-21m; `quickstart`: the built-in recipe. Found, or made."""
    if name == "quickstart":
        recipe, target = load_recipe("quickstart"), load_target("jetson")
    else:
        text = DATA / "text_lm" / "tinystories" / "tinystories_lowercase_4MB.txt"
        asked = [
            f"data.source={text}",
            "data.split=tail",
            f"teacher.model={DATA / 'weights' / 'teacher-tinystories-21m'}",
            "distill.epochs=1",  # of three: what a CPU does in half an hour
        ]
        recipe, target = load_recipe("own", [*asked, "student.compression=4"]), load_target("phone")
    trained = pipeline.distill(recipe, [target], store=store, progress=progress)
    tokenizer = TextTokenizer.load(trained.student.directory / trained.student.result.path)
    held_out = encode_blocks(tokenizer, read_part(trained.data.directory, "held_out"))
    windows = scoring_windows(held_out, context=CONTEXT, stride=None, max_tokens=max_tokens)
    return Subject(name, recipe, trained, windows)


def options(of: Subject) -> ExportOptions:
    """The recipe's export options, calibrated on the calibration part, which is never the held-out one."""
    return options_of(
        of.recipe.export.model_copy(update={"compare_speed": False}),
        read_part(of.trained.data.directory, "calibration"), "calibration part", of.recipe.seed,
    )  # fmt: skip


def exported(
    of: Subject, artifact: str, *, store: Store, folder: Path | None = None, weights: str | None = None,
    chosen: ExportOptions | None = None, progress: Progress,
) -> Stored[Artifact]:  # fmt: skip
    """The artifact of the student, or of the checkpoint in `folder` whose hash is `weights`."""
    student = of.trained.student.result
    return export_model(
        folder or of.folder, artifact, context_tokens=CONTEXT, name=of.name,
        weights_sha256=weights or student.weights_sha256, tokenizer_sha256=student.tokenizer_sha256, store=store,
        options=chosen or options(of), progress=progress,
    )  # fmt: skip


def open_runtime(made: Stored[Artifact], store: Store, *, threads: int | None = None) -> RuntimeProcess:
    """The artifact in the runtime that runs it."""
    runtime = ORT.get(made.result.runtime, made.result.runtime)
    return RuntimeProcess(
        runtime,
        made.directory / made.result.entry,
        threads=threads or threads_here(),
        context_tokens=CONTEXT,
        store=store,
    )


def scored(of: Subject, made: Stored[Artifact], reference: Stored[Artifact], *, store: Store) -> Scores:
    """KL(reference ‖ artifact) and NLL of every scored token, both in their own runtimes. Kept in the store."""
    ids = [w.ids.tolist() for w in of.windows]

    def measure(work: Work) -> ScoreFiles:
        scores, owner = TokenScores(), []
        with open_runtime(made, store) as one, open_runtime(reference, store) as other:
            for group in groups(of.windows):
                for window in group:
                    tokens = window.ids.astype(np.int64)
                    found, wanted = (
                        torch.from_numpy(process.logits(tokens)[:-1][window.first :].astype(np.float32))
                        for process in (one, other)
                    )
                    vocab = min(found.shape[1], wanted.shape[1])
                    targets = torch.from_numpy(tokens[1:][window.first :])
                    scores.add(found, torch.log_softmax(wanted[:, :vocab], -1), targets)
                    owner.append(np.full(window.scored, window.document, dtype=np.int64))
            runtime = f"{one.info['runtime']} {one.info['runtime_version']}"
        document = np.concatenate(owner)
        np.savez(
            work.out / "scores.npz", nll=np.concatenate(scores.nll), kl=np.concatenate(scores.kl), document=document
        )
        return ScoreFiles(tokens=len(document), runtime=runtime)

    inputs = {
        "artifact": made.result.sha256, "reference": reference.result.sha256, "windows": ids,
        "versions": versions("llama-cpp-python", "onnxruntime"),
    }  # fmt: skip
    stored = store.run("quantization-scores", inputs, measure, ScoreFiles)
    kept = np.load(stored.directory / "scores.npz")
    return Scores(kept["nll"], kept["kl"], kept["document"])


def kl_by_document(scores: Scores) -> ByUnit:
    return by_unit(scores.kl, scores.document)
