"""Which start is best: fresh, the teacher's layers, its widths pruned, or both; with and without its signals.

Teacher: teacher-tinystories-21m. Every student has a quarter of its parameters (as near as whole widths allow: at most
1.3 % apart). Per seed all see the same tokens in the same order; each seed has its own text, order and, for the fresh
one, weights. KD is forward KL at temperature 1 alone; without KD it is cross-entropy alone. Per start and loss, the
rates of a fresh student (BASE) are taken times the factor that was best by the calibration part, on seed 0 at half of
the tokens: from 1 it is halved or doubled until it gets no better. Held-out text is looked at once, at the end.
Intervals: 95 %, over documents, of the mean over seeds; beside them the seeds' smallest and largest.

Claim: the default start has the lowest perplexity with KD. Runs are kept in --work and reused: remove it after a change
of the code.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Bound, as_list, as_text, finish, parser

from edgedistill.config.recipe import Recipe, Student, load_recipe
from edgedistill.data.prepare import prepare_data, read_part
from edgedistill.models.folder import open_model
from edgedistill.plan.plan import AUTO_STARTS
from edgedistill.progress import Progress
from edgedistill.records.shape import Shape
from edgedistill.runtimes.runners import TorchScorer, load_torch
from edgedistill.signals.signals import CachedSignals, cache_hidden
from edgedistill.statistics import by_unit, perplexity, perplexity_ratio, positive_mean
from edgedistill.store import Store
from edgedistill.strategies.distill import SAMPLE_TOKENS, loss_of
from edgedistill.student.start import start_student
from edgedistill.tasks.causal_lm import Packed, Window, encode_blocks, groups, scoring_windows
from edgedistill.tasks.metrics import TokenScores
from edgedistill.training.text import Text, training_text
from edgedistill.training.trainer import train

DATA = Path(os.environ.get("EDGEDISTILL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
# Sizes that differ from the teacher's. "fresh" has what the design gives at this budget, "both" the same.
NARROW = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
STARTS: dict[str, dict[str, int]] = {
    "fresh": {**NARROW, "intermediate_size": 832, "num_hidden_layers": 5},
    "layers": {"num_hidden_layers": 1},
    "width": {**NARROW, "intermediate_size": 640},
    "both": {**NARROW, "intermediate_size": 832, "num_hidden_layers": 5},
}
LOSSES = {
    "KD": ["distill.forward_kl=1", "distill.cross_entropy=0"],
    "CE": ["distill.forward_kl=0", "distill.cross_entropy=1"],
}
# Rates of Muon and AdamW as in recipes/own.yaml.
BASE_MUON, BASE_ADAMW = 0.02, 0.004
CONTEXT, BATCH = 256, 4
CALIBRATION_TOKENS, HELD_OUT_TOKENS = 8_192, 16_000


@dataclass
class Bench:
    """What the runs share: teacher, text, the teacher's hidden states per seed, and what is held out."""

    teacher: Path
    shape: Shape
    text: Text
    tokens: int
    work: Path
    signals: dict[int, CachedSignals] = field(default_factory=dict)
    starts: dict[tuple[str, int], tuple[Any, dict[str, Any]]] = field(default_factory=dict)

    def packed(self, seed: int) -> Packed:
        """The seed's own piece of the training text: as many tokens as a run sees, each once."""
        count = self.tokens // CONTEXT
        first = seed * count * CONTEXT
        return Packed(stream=self.text.packed.stream[first : first + count * CONTEXT + 1], context=CONTEXT, seed=seed)

    def teacher_signals(self, seed: int) -> CachedSignals:
        if seed not in self.signals:
            folder = self.work / f"hidden-{self.tokens}-{seed}"
            model = load_torch(self.teacher)
            self.signals[seed] = cache_hidden(model, self.packed(seed), folder=folder, low_precision=True)
        return self.signals[seed]

    def start(self, start: str, seed: int) -> tuple[Any, dict[str, Any]]:
        """A copy of the student before training, and what of the teacher it kept."""
        if (start, seed) not in self.starts:
            shape, data = self.shape.model_copy(update=STARTS[start]), self.packed(seed)
            sample = torch.from_numpy(data.sequence_ids(np.arange(SAMPLE_TOKENS // CONTEXT))[:, :-1])
            self.starts[start, seed] = start_student(
                Student(start=start), shape, teacher=self.teacher, pretrained=None, seed=seed, sample=sample
            )
        model, kept = self.starts[start, seed]
        return copy.deepcopy(model), kept

    def run(self, start: str, loss: str, factor: float, seed: int, tokens: int) -> tuple[Any, dict[str, Any]]:
        """Train one student: the model, and the trainer's figures with the perplexity on the calibration part."""
        recipe = recipe_of(loss, factor, tokens, seed)
        data = self.packed(seed)
        shape, (model, kept) = self.shape.model_copy(update=STARTS[start]), self.start(start, seed)
        evaluation = first_tokens(self.text.evaluation, CALIBRATION_TOKENS)
        with tempfile.TemporaryDirectory(prefix="edgedistill-start-") as state:
            trained = train(
                model,
                data=data,
                evaluation=evaluation,
                settings=recipe.distill,
                loss=loss_of(recipe.distill, self.text.tokenizer.vocab),
                signals=self.teacher_signals(seed) if loss == "KD" else None,
                state=Path(state),
            )
        figures = {"calibration_perplexity": trained.history[-1]["perplexity"], "seconds": trained.seconds}
        return model, figures | {"steps": trained.steps, "parameters": shape.parameters, "kept": kept}


def recipe_of(loss: str, factor: float, tokens: int, seed: int) -> Recipe:
    return load_recipe(
        "own",
        [
            *LOSSES[loss], "data.split=tail", f"seed={seed}", f"distill.tokens={tokens}",
            f"distill.context_tokens={CONTEXT}", f"distill.batch_sequences={BATCH}",
            f"distill.muon_learning_rate={BASE_MUON * factor}", f"distill.learning_rate={BASE_ADAMW * factor}",
            "distill.evaluate_every_share=1", "distill.checkpoint_every_s=100000",
        ],
    )  # fmt: skip


def first_tokens(windows: list[Window], tokens: int) -> list[Window]:
    """Windows from the front until so many tokens are scored."""
    ends = np.cumsum([w.scored for w in windows])
    return windows[: int(np.searchsorted(ends, tokens)) + 1]


class HeldOut:
    """Held-out tokens, their documents, and the teacher's log-probabilities, computed once."""

    def __init__(self, bench: Bench, blocks: list[list[str]]) -> None:
        self.windows = scoring_windows(
            encode_blocks(bench.text.tokenizer, blocks), context=CONTEXT, stride=None, max_tokens=HELD_OUT_TOKENS
        )
        scorer = TorchScorer(load_torch(bench.teacher))
        self.batches = []
        for group in groups(self.windows):
            ids = np.stack([w.ids for w in group]).astype(np.int64)
            counted = np.stack([np.arange(len(w.ids) - 1) >= w.first for w in group]).reshape(-1)
            log_p = torch.log_softmax(scorer.logits(ids)[:, :-1].flatten(0, 1)[counted], -1)
            self.batches.append((ids, counted, torch.from_numpy(ids[:, 1:].reshape(-1)[counted]), log_p))
        self.document = np.concatenate(
            [np.repeat(w.document, w.scored) for group in groups(self.windows) for w in group]
        ).astype(np.int64)

    def score(self, model: Any) -> tuple[np.ndarray, np.ndarray]:
        """Negative log-likelihood and KL(teacher ‖ model) of every scored token, nats."""
        scorer, scores = TorchScorer(model), TokenScores()
        for ids, counted, targets, log_p in self.batches:
            scores.add(scorer.logits(ids)[:, :-1].flatten(0, 1)[counted], log_p, targets)
        return np.concatenate(scores.nll), np.concatenate(scores.kl)

    def teacher_nll(self) -> np.ndarray:
        return np.concatenate([-p.gather(1, t[:, None])[:, 0].numpy() for _, _, t, p in self.batches])


def kept_run(bench: Bench, held_out: HeldOut | None, *, name: str, **asked: Any) -> dict[str, Any]:
    """A run's figures and, with `held_out`, its token scores: from --work where they are there."""
    path = bench.work / f"{name}.npz"
    if not path.is_file():
        model, figures = bench.run(**asked)
        nll, kl = held_out.score(model) if held_out is not None else (np.zeros(0), np.zeros(0))
        with tempfile.NamedTemporaryFile(dir=bench.work, suffix=".part", delete=False) as file:
            np.savez(file, figures=json.dumps(figures), nll=nll, kl=kl)
        Path(file.name).replace(path)
    stored = np.load(path)
    figures = json.loads(str(stored["figures"]))
    print(f"{name}: calibration perplexity {figures['calibration_perplexity']:.2f}", flush=True, file=sys.stderr)
    return figures | {"nll": stored["nll"], "kl": stored["kl"]}


def best_factor(bench: Bench, start: str, loss: str, tokens: int) -> dict[float, float]:
    """Factor of the rates → perplexity on the calibration part: from 1 up, else down, until it gets worse."""
    found: dict[float, float] = {}

    def tried(factor: float) -> float:
        name = f"sweep-{tokens}-{start}-{loss}-{factor:g}"
        run = kept_run(bench, None, name=name, start=start, loss=loss, factor=factor, seed=0, tokens=tokens)
        found[factor] = run["calibration_perplexity"]
        return found[factor]

    tried(1.0)
    for step in (0.5, 2.0):
        factor = step
        while tried(factor) < found[factor / step]:
            factor *= step
        if factor != step:  # it got better this way, so the other way is worse
            break
    return found


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked.add_argument("--tokens", type=int, default=65_536, help="tokens a run")
    asked.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "edgedistill-student-start")
    arguments = asked.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    store, recipe = Store(), recipe_of("KD", 1.0, arguments.tokens, 0)
    teacher = DATA / "weights" / "teacher-tinystories-21m"
    text_file = DATA / "text_lm" / "tinystories" / "tinystories_lowercase_4MB.txt"
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": str(text_file)})})
    data = prepare_data(recipe.data, store=store, progress=Progress())
    bench = Bench(
        teacher, open_model(str(teacher)).shape, training_text(teacher, data, recipe.distill, seed=0),
        arguments.tokens // (CONTEXT * BATCH) * CONTEXT * BATCH, arguments.work,
    )  # fmt: skip
    rates: dict[str, dict[str, float]] = {}
    sweep: dict[str, dict[str, float]] = {}
    half = bench.tokens // 2
    for start in STARTS:
        for loss in LOSSES:
            found = best_factor(bench, start, loss, half)
            rates.setdefault(start, {})[loss] = min(found, key=lambda factor: found[factor])
            sweep[f"{start}, {loss}"] = {f"{factor:g}": value for factor, value in found.items()}
    held_out = HeldOut(bench, read_part(data.directory, "held_out"))
    report(arguments, bench, held_out, rates, sweep)


def report(
    arguments: Any, bench: Bench, held_out: HeldOut, rates: dict[str, dict[str, float]], sweep: dict[str, Any]
) -> None:
    figures: dict[str, Any] = {"tokens_a_run": bench.tokens, "sweep_calibration_perplexity": sweep, "starts": {}}
    rows, losses = [], {}
    for start in STARTS:
        for loss in LOSSES:
            factor = rates[start][loss]
            runs = [
                kept_run(
                    bench, held_out, name=f"run-{bench.tokens}-{start}-{loss}-{factor:g}-{seed}", start=start,
                    loss=loss, factor=factor, seed=seed, tokens=bench.tokens,
                )
                for seed in arguments.seeds
            ]  # fmt: skip
            losses[start, loss] = by_unit(np.mean([run["nll"] for run in runs], axis=0), held_out.document)
            kl = positive_mean(by_unit(np.mean([run["kl"] for run in runs], axis=0), held_out.document))
            ppl = perplexity(losses[start, loss])
            by_seed = [float(np.exp(run["nll"].mean())) for run in runs]
            figures["starts"][f"{start}, {loss}"] = {
                "parameters": runs[0]["parameters"], "rate_factor": factor, "steps": runs[0]["steps"],
                "perplexity": as_list(ppl), "perplexity_by_seed": by_seed,
                "kl_nats": as_list(kl), "kl_by_seed": [float(run["kl"].mean()) for run in runs],
                "seconds": [run["seconds"] for run in runs], "kept": runs[0]["kept"],
            }  # fmt: skip
            rows.append(
                (start, loss, f"{runs[0]['parameters']:,}", f"{factor:g}",
                 as_text(ppl, ".2f"), f"{min(by_seed):.2f} to {max(by_seed):.2f}",
                 as_text(kl))
            )  # fmt: skip
    teacher = perplexity(by_unit(held_out.teacher_nll(), held_out.document))
    figures["teacher_perplexity"] = as_list(teacher)
    default = AUTO_STARTS[0]
    bounds = []
    for loss in LOSSES:
        for other in STARTS:
            if other == default:
                continue
            ratio = perplexity_ratio(losses[default, loss], losses[other, loss])
            figures[f"{default} ÷ {other}, {loss}"] = as_list(ratio)
            if loss == "KD":
                bounds.append(Bound(f"perplexity with KD: {default} (default) ÷ {other}", ratio.value, "<=", 1.0))
    finish(
        "student_start",
        arguments,
        figures=figures,
        header=("start", "loss", "parameters", "rates ×", "held-out perplexity", "seeds", "KL to the teacher, nats"),
        rows=rows,
        bounds=bounds,
        notes=[
            f"teacher: {bench.shape.parameters:,} parameters, perplexity"
            f" {as_text(teacher, '.2f')}; {len(held_out.document):,} held-out tokens;"
            f" {bench.tokens:,} tokens a run, each once"
        ],
    )


if __name__ == "__main__":
    main()
