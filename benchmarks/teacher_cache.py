"""The teacher's signals on disk: their bytes, their gradient, what they save, and what they cost in quality.

Claims, by part (`--only a,b` runs some; a saved result needs all):
a  sampled signals take at most 40 bytes a token at 12 distinct draws of 50 (vocabularies of 32,000 and 131,072, and
   every byte of the files counts), and at most 1.15 times the entropy bound of the multisets, whatever their k (of
   the sizes that vocabularies have; just above 2,048, 4,096 and 8,192 a teacher that always draws one id costs more);
b  the gradient from 50 draws stands at most 6 degrees from full distillation's (student: every other layer of the
   teacher; before training; KL alone at T = 1, all parameters, 16,384 tokens), beside top-k 12, 50 and 300;
c  training from the cache is at least 1.6 times as fast as with the live teacher at 5:1 in size;
d  and its held-out loss lies within 1 % of the live teacher's.

The entropy bound is that of a code that knows draws, vocabulary and each token's k: log2 C(V, k) + log2 C(n-1, k-1),
and k's own empirical entropy, which such a decoder must be told. A code that also knew how often each id is drawn
anywhere could go lower; what it would save is in the figures.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Bound, finish, parser
from transformers import AutoModelForCausalLM

from edgedistill import statistics
from edgedistill.config.recipe import Data, Distill, Teacher
from edgedistill.data.prepare import prepare_data, read_part
from edgedistill.losses.losses import Head, LossSpec, SparseTargets, head_loss
from edgedistill.losses.model_parts import final_hidden, head_of
from edgedistill.signals import multiset
from edgedistill.signals.cache import Produced, build_cache
from edgedistill.signals.cache_reader import CacheReader, open_cache
from edgedistill.signals.signals import CachedSignals, LiveSignals, produce_from
from edgedistill.statistics import ByUnit
from edgedistill.store import Store
from edgedistill.student.prune import Sizes, cut, sizes_of
from edgedistill.tasks.causal_lm import Packed, encode_blocks, scoring_windows
from edgedistill.teacher.live import live_teacher
from edgedistill.training.evaluate import perplexity
from edgedistill.training.loss_module import LossModule
from edgedistill.training.ranks import ranks_here
from edgedistill.training.text import Text, training_text
from edgedistill.training.trainer import train

DATA = Path(os.environ.get("EDGEDISTILL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
PARTS = "abcd"
DRAWS, CONTEXT = 50, 512
MOST_BYTES, MOST_OF_BOUND, MOST_DEGREES, LEAST_SPEEDUP, MOST_LOSS = 40.0, 1.15, 6.0, 1.6, 0.01
SYNTHETIC_TOKENS, REAL_TOKENS, ANGLE_TOKENS = 4096, 65_536, 16_384
PAIRS, STEPS_A_RUN, SPEED_BATCH = 6, 3, 16
QUALITY_TOKENS, QUALITY_BATCH = 196_608, 8
SMALL = Sizes(hidden=256, ffn=768, layers=4, heads=4, kv_heads=2, head_dim=64, vocab=4096)  # a fifth of the teacher

Row = tuple[str, str, str, str]
Figures = dict[str, Any]
Produce = Callable[[np.ndarray], Produced]


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--only", default=PARTS, help="parts to run, e.g. a,b")
    asked.add_argument("--seeds", type=int, default=3, help="seeds of part d")
    asked.add_argument("--teacher", default=str(DATA / "weights" / "teacher-tinystories-21m"))
    asked.add_argument("--data", default=str(DATA / "text_lm" / "tinystories" / "tinystories_lowercase_4MB.txt"))
    arguments = asked.parse_args()
    parts = arguments.only.replace(",", "")
    if not set(parts) <= set(PARTS):
        asked.error(f"--only {arguments.only}: parts are {', '.join(PARTS)}")
    if arguments.save and set(parts) != set(PARTS):
        asked.error("--save needs every part: leave --only out")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
    figures: Figures = {}
    rows: list[Row] = []
    bounds: list[Bound] = []
    with tempfile.TemporaryDirectory(prefix="edgedistill-cache-") as scratch:
        bench = Bench(Path(arguments.teacher), arguments.data, Path(scratch), arguments.seeds)
        for name, part in (("a", bench.bytes), ("b", bench.angles), ("c", bench.speed), ("d", bench.quality)):
            if name in parts:
                found, shown, claims = part()
                figures |= found
                rows += shown
                bounds += claims
    finish(
        "teacher_cache",
        arguments,
        figures=figures,
        header=("part", "what", "value", "beside"),
        rows=rows,
        bounds=bounds,
        notes=[
            "angles and losses do not depend on the machine's load; tokens/s are ratios of interleaved runs",
            "the quality runs start from a width- and depth-pruned teacher; a seed changes the order and the draws",
        ],
    )


class Bench:
    """The parts, and what they share: teacher, text, scratch folder."""

    def __init__(self, teacher: Path, source: str, scratch: Path, seeds: int) -> None:
        self.folder, self.scratch, self.seeds = teacher, scratch, seeds
        self.ranks = ranks_here()
        self.data = prepare_data(Data(source=source, split="tail"), store=Store(scratch / "store"))
        self.text: Text = training_text(teacher, self.data, Distill(context_tokens=CONTEXT), seed=0)
        self.vocab = self.text.tokenizer.vocab

    def live(self, *, precision: str) -> LiveSignals:
        return live_teacher(self.folder, Teacher(), low_precision=precision == "bf16", ranks=self.ranks)

    def some(self, tokens: int, seed: int = 0) -> Packed:
        """The first sequences of the packed text."""
        packed, count = self.text.packed, tokens // CONTEXT
        assert count <= packed.sequences, f"{packed.sequences} sequences of text, {count} wanted"
        stream = packed.stream[: count * CONTEXT + 1]
        return Packed(stream=stream, context=CONTEXT, seed=seed, starts=packed.starts[packed.starts < len(stream)])

    def cache(self, name: str, produce: Produce, sequences: int, *, kind: str = "sampled", **changes: Any) -> Path:
        asked = {"vocab": self.vocab, "context": CONTEXT, "temperature": 1.0, "draws": DRAWS, "top_k": 0, "seed": 0,
                 "batch_sequences": 8}  # fmt: skip
        folder = self.scratch / name
        build_cache(str(folder), key={"name": name}, kind=kind, sequences=sequences, produce=produce, **asked | changes)
        return folder

    def read(self, folder: Path) -> CacheReader:
        return open_cache(str(folder), key={"name": folder.name})

    # ---- a

    def bytes(self) -> tuple[Figures, list[Row], list[Bound]]:
        found: Figures = {}
        for vocab in (32_000, 131_072):
            sequences = SYNTHETIC_TOKENS // CONTEXT
            spread = _spread_for(vocab, distinct=12.0)
            folder = self.cache(f"made-{vocab}", _synthetic(vocab, spread), sequences, vocab=vocab, batch_sequences=1)
            found[f"made, V = {vocab:,}"] = self._cost(folder, vocab, sequences)
        packed = self.some(REAL_TOKENS)
        produce = produce_from(self.live(precision="bf16"), packed, documents=False)
        found["teacher-tinystories-21m"] = self._cost(
            self.cache("real", produce, packed.sequences), self.vocab, packed.sequences
        )
        worst = _worst_code((4096, 32_000, 50_257, 128_256, 131_072))
        # whole bits cost most where a vocabulary is just above a power of two and every token draws one id alone
        corner = _worst_code((2049, 4097, 8193))
        rows: list[Row] = [
            ("a", name, f"{f['bytes_per_token']:.2f} bytes a token, {f['of_bound']:.3f} of the bound",
             f"{f['distinct_mean']:.2f} distinct of {DRAWS} ({f['distinct_p5']:.0f} to {f['distinct_p95']:.0f});"
             f" without k's entropy {f['of_bound_without_k']:.3f}; decoding {f['decode_us_per_token']:.2f} us a token")
            for name, f in found.items()
        ]  # fmt: skip
        rows.append(("a", "worst mix of k found, code alone", f"{worst['of_bound']:.3f} of the bound", worst["where"]))
        rows.append(("a", "the same, awkward vocabularies", f"{corner['of_bound']:.3f} of the bound", corner["where"]))
        bounds = [
            Bound(f"{name}: bytes a token", f["bytes_per_token"], "<=", MOST_BYTES)
            for name, f in found.items()
            if name.startswith("made")
        ]
        bounds += [
            Bound(f"{name}: bytes of the bound", f["of_bound"], "<=", MOST_OF_BOUND) for name, f in found.items()
        ]
        bounds.append(Bound("worst mix of k: bits of the bound", worst["of_bound"], "<=", MOST_OF_BOUND))
        return {"bytes": found, "worst_code": worst, "awkward_vocabularies": corner}, rows, bounds

    def _cost(self, folder: Path, vocab: int, sequences: int) -> Figures:
        size = sum(p.stat().st_size for p in folder.iterdir())
        reader = self.read(folder)
        numbers = np.arange(sequences)
        k = reader.distinct(numbers)
        times = []
        for _ in range(5):
            before = time.perf_counter()
            given = reader.batch(numbers[:16])
            times.append(time.perf_counter() - before)
        assert isinstance(given, SparseTargets)
        tokens, decoded = sequences * CONTEXT, min(16, sequences) * CONTEXT
        bound = multiset.entropy_bound_bits(k, draws=DRAWS, vocab=vocab)
        alone = multiset.entropy_bound_bits(k, draws=DRAWS, vocab=vocab, with_k=False)
        whole = reader.batch(numbers)
        assert isinstance(whole, SparseTargets)
        return {
            "tokens": tokens,
            "bytes_per_token": size / tokens,
            "of_bound": 8 * size / bound,
            "of_bound_without_k": 8 * size / alone,
            "bound_bytes_per_token": bound / 8 / tokens,
            "known_frequencies_bytes_per_token": _known_frequencies_bits(whole, k, vocab) / 8 / tokens,
            "distinct_mean": float(k.mean()),
            "distinct_p5": float(np.percentile(k, 5)),
            "distinct_p95": float(np.percentile(k, 95)),
            "decode_us_per_token": min(times) / decoded * 1e6,
        }

    # ---- b

    def angles(self) -> tuple[Figures, list[Row], list[Bound]]:
        packed = self.some(ANGLE_TOKENS)
        live = self.live(precision="fp32")
        produce = _remembered(produce_from(live, packed, documents=False))
        caches: dict[str, tuple[CacheReader, bool]] = {}
        for seed in range(3):
            folder = self.cache(f"angle-sampled-{seed}", produce, packed.sequences, seed=seed)
            caches[f"sampled, seed {seed}"] = self.read(folder), False
        for top_k in (12, 50, 300):
            folder = self.cache(f"angle-top-{top_k}", produce, packed.sequences, kind="topk", top_k=top_k)
            caches[f"top-k {top_k} with tail"] = self.read(folder), False
            caches[f"top-k {top_k} renormalised"] = self.read(folder), True
        teacher = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        sizes = sizes_of(teacher.config)
        student, _ = cut(teacher, Sizes(**{**vars(sizes), "layers": sizes.layers // 2}))
        sums = _gradients(student.eval(), packed, live, caches, self.vocab)
        full = sums.pop("full")
        found = {}
        for name, other in sums.items():
            cosine = float(full @ other / (full.norm() * other.norm()))
            degrees = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
            found[name] = {"degrees": degrees, "norm_ratio": float(other.norm() / full.norm())}
        rows: list[Row] = [
            ("b", name, f"{f['degrees']:.2f} degrees", f"norm {f['norm_ratio']:.3f} of full KD's")
            for name, f in found.items()
        ]
        worst = max(f["degrees"] for name, f in found.items() if name.startswith("sampled"))
        return {"gradient": found}, rows, [Bound("angle of 50 draws, largest of 3 seeds", worst, "<=", MOST_DEGREES)]

    # ---- c

    def student(self, live: LiveSignals) -> torch.nn.Module:
        sample = torch.from_numpy(self.text.packed.sequence_ids(np.arange(16)))[:, :-1]
        made, _ = cut(live.teacher, SMALL, sample=sample)
        return made

    def train(self, packed: Packed, signals: Any, student: torch.nn.Module, *, batch: int, seed: int) -> float:
        """tokens/s of one run of the engine's own loop over `packed`, once through."""
        settings = Distill(
            tokens=packed.sequences * CONTEXT, context_tokens=CONTEXT, batch_sequences=batch, evaluate_every_share=1.0,
            checkpoint_every_s=1e6, tracker=None,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(dir=self.scratch) as state:
            return train(
                student, data=packed, evaluation=self.text.evaluation[:2], settings=settings,
                loss=LossSpec({"forward_kl": 1.0}, temperature=1.0, vocab=self.vocab), signals=signals,
                state=Path(state), ranks=self.ranks,
            ).tokens_per_s  # fmt: skip

    def speed(self) -> tuple[Figures, list[Row], list[Bound]]:
        packed = self.some(STEPS_A_RUN * SPEED_BATCH * CONTEXT)
        live = self.live(precision="bf16")
        before = time.perf_counter()
        folder = self.cache("speed", produce_from(live, packed, documents=False), packed.sequences)
        building = packed.sequences * CONTEXT / (time.perf_counter() - before)
        cached = CachedSignals(self.read(folder))
        student = self.student(live)
        share = _parameters(live.teacher) / _parameters(student)
        runs: dict[str, list[float]] = {"live": [], "cached": []}
        for number in range(PAIRS + 1):
            for name, signals in (("live", live), ("cached", cached)) if number % 2 else (
                ("cached", cached), ("live", live)):  # fmt: skip
                speed = self.train(packed, signals, student, batch=SPEED_BATCH, seed=0)
                if number:  # the first pair warms up
                    runs[name].append(speed)
        ratios = np.array(runs["cached"]) / np.array(runs["live"])
        low, high = statistics.median(ratios).ci95 or (math.nan, math.nan)
        found = {
            "size_ratio": share,
            "live_tokens_per_s": runs["live"],
            "cached_tokens_per_s": runs["cached"],
            "ratio": float(np.median(ratios)),
            "ratio_ci95": [low, high],
            "building_tokens_per_s": building,
            "epochs_until_it_pays": _pays_after(building, runs),
        }
        rows: list[Row] = [
            ("c", "training from the cache / with the live teacher", f"{found['ratio']:.2f} [{low:.2f}, {high:.2f}]",
             f"{np.median(runs['cached']):,.0f} and {np.median(runs['live']):,.0f} tokens/s at {share:.2f}:1; building"
             f" {building:,.0f} tokens/s, repaid after {found['epochs_until_it_pays']:.1f} epochs")
        ]  # fmt: skip
        bound = Bound("cached / live tokens/s, median of pairs", found["ratio"], ">=", LEAST_SPEEDUP)
        return {"speed": found}, rows, [bound]

    # ---- d

    def quality(self) -> tuple[Figures, list[Row], list[Bound]]:
        live = self.live(precision="bf16")
        held_out = encode_blocks(self.text.tokenizer, read_part(self.data.directory, "held_out"))
        losses: dict[str, list[np.ndarray]] = {"live": [], "cached": []}
        whole = self.some(QUALITY_TOKENS)
        produce = _remembered(produce_from(live, whole, documents=False))
        for seed in range(self.seeds):
            packed = self.some(QUALITY_TOKENS, seed)
            folder = self.cache(f"quality-{seed}", produce, packed.sequences, seed=seed)
            for name, signals in (("live", live), ("cached", CachedSignals(self.read(folder)))):
                student = self.student(live)
                self.train(packed, signals, student, batch=QUALITY_BATCH, seed=seed)
                losses[name].append(self._held_out(student, held_out))
        tokens = np.array([len(ids) - 1 for ids in held_out], dtype=np.float64)
        sums = {name: np.sum(per_seed, axis=0) for name, per_seed in losses.items()}
        ratio = statistics.ratio_of_means(ByUnit(sums["cached"], tokens), ByUnit(sums["live"], tokens))
        value = ratio.value - 1.0
        low, high = (end - 1.0 for end in ratio.ci95 or (math.nan, math.nan))
        mean = {name: [float(each.sum() / tokens.sum()) for each in per_seed] for name, per_seed in losses.items()}
        found = {
            "tokens": QUALITY_TOKENS, "seeds": self.seeds, "held_out_tokens": int(tokens.sum()),
            "loss_nats": mean, "cached_minus_live": value, "cached_minus_live_ci95": [low, high],
        }  # fmt: skip
        shown = {name: ", ".join(f"{each:.4f}" for each in values) for name, values in mean.items()}
        rows: list[Row] = [
            ("d", "held-out loss, cached over live", f"{100 * value:+.2f} % [{100 * low:+.2f}, {100 * high:+.2f}]",
             f"nats a token, by seed: cached {shown['cached']}; live {shown['live']}")
        ]  # fmt: skip
        return {"quality": found}, rows, [Bound("|held-out loss, cached / live - 1|", abs(value), "<=", MOST_LOSS)]

    def _held_out(self, student: torch.nn.Module, documents: list[np.ndarray]) -> np.ndarray:
        """Summed negative log-likelihood of each held-out document, nats."""
        spec = LossSpec({"cross_entropy": 1.0}, temperature=1.0, vocab=self.vocab)
        module = LossModule(student, spec, low_precision=False)
        made = []
        for ids in documents:
            windows = scoring_windows([ids], context=CONTEXT, stride=None, max_tokens=None)
            made.append(math.log(perplexity(module, windows, self.ranks)) * sum(w.scored for w in windows))
        return np.array(made)


def _parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _pays_after(building: float, runs: dict[str, list[float]]) -> float:
    saved = 1 / float(np.median(runs["live"])) - 1 / float(np.median(runs["cached"]))
    return 1 / building / saved if saved > 0 else math.inf


def _remembered(produce: Produce) -> Produce:
    """`produce`, with the teacher run once over each batch; states are kept in bf16, as every cache takes them."""
    kept: dict[bytes, Produced] = {}

    def again(rows: np.ndarray) -> Produced:
        name = rows.tobytes()
        if name not in kept:
            made = produce(rows)
            kept[name] = Produced(made.hidden.to(torch.bfloat16), made.head, made.layers, made.attentions, made.counted)
        return kept[name]

    return again


def _synthetic(vocab: int, spread: float) -> Produce:
    """Distributions of normal logits whose spread differs from token to token, as a real teacher's does."""
    width = 64
    generator = torch.Generator().manual_seed(vocab)
    head = Head(torch.randn(vocab, width, generator=generator) / width**0.5)

    def produce(rows: np.ndarray) -> Produced:
        g = torch.Generator().manual_seed(int(rows[0]))
        hidden = torch.randn(len(rows), CONTEXT, width, generator=g)
        hidden *= spread * torch.exp(0.2 * torch.randn(len(rows), CONTEXT, 1, generator=g))
        return Produced(hidden, head, {}, {}, torch.ones(len(rows), CONTEXT, dtype=torch.bool))

    return produce


def _spread_for(vocab: int, distinct: float) -> float:
    """The logits' spread at which 50 draws give so many distinct ids on average, by bisection on 48 tokens."""
    low, high = 0.5, 30.0
    while high - low > 0.02:
        middle = (low + high) / 2
        made = _synthetic(vocab, middle)(np.array([10**6]))
        p = torch.softmax(made.hidden[0, :48] @ made.head.weight.T, -1).double()
        expected = float((1 - (1 - p) ** DRAWS).sum(-1).mean())
        low, high = (middle, high) if expected > distinct else (low, middle)
    return (low + high) / 2


def _known_frequencies_bits(given: SparseTargets, k: np.ndarray, vocab: int) -> float:
    """About what ids and counts would take if the code knew how often each id is drawn at all (its table free)."""
    used = given.weights > 0
    often = torch.bincount(given.ids[used], minlength=vocab).double()
    cost = -(often / often.sum()).log2()[given.ids[used]].sum()
    orders = sum(math.lgamma(int(each) + 1) / math.log(2) for each in k)
    counts = sum(math.log2(math.comb(DRAWS - 1, int(each) - 1)) for each in k)
    return float(cost) - orders + counts


def _worst_code(vocabularies: tuple[int, ...]) -> Figures:
    """The largest cost over the bound among mixes of k: one k everywhere, two of them, geometric; code alone."""
    worst: Figures = {"of_bound": 0.0, "where": ""}
    rng = np.random.default_rng(0)
    for vocab in vocabularies:
        mixes = {f"k = {k}": np.full(CONTEXT, k) for k in range(1, DRAWS + 1)}
        for share in (0.5, 0.9, 0.98):
            mixes |= {f"k = 1 ({share:.0%}) or {k}": np.where(np.arange(CONTEXT) < share * CONTEXT, 1, k) for k in
                      (2, 3, 5, 12, 30, 50)}  # fmt: skip
        mixes |= {
            f"geometric k of mean {mean}": np.minimum(rng.geometric(1 / mean, CONTEXT), DRAWS)
            for mean in (1.1, 1.5, 2, 3, 5, 12)
        }
        for name, k in mixes.items():
            ids = np.zeros((CONTEXT, DRAWS), dtype=np.int64)
            counts = np.zeros_like(ids)
            ids[:] = np.arange(DRAWS)  # a code's length depends on k alone, so any ids will do
            counts[np.arange(DRAWS) < k[:, None]] = 1
            counts[:, 0] += DRAWS - k
            bits = 64 * len(multiset.encode(ids, counts, draws=DRAWS, vocab=vocab)[0])
            ratio = bits / multiset.entropy_bound_bits(k, draws=DRAWS, vocab=vocab)
            if ratio > worst["of_bound"]:
                worst = {"of_bound": ratio, "where": f"V = {vocab:,}, {name}"}
    return worst


def _gradients(
    student: Any, packed: Packed, live: LiveSignals, caches: dict[str, tuple[CacheReader, bool]], vocab: int
) -> dict[str, torch.Tensor]:
    """Gradients of the KL over all parameters, float64, summed over the batches: full, and from each cache."""
    spec = LossSpec({"forward_kl": 1.0}, temperature=1.0, vocab=vocab)
    parameters = [p for p in student.parameters() if p.requires_grad]
    sums: dict[str, torch.Tensor] = {}
    valid = packed.sequences * CONTEXT
    for start in range(0, packed.sequences, 4):
        rows = np.arange(start, min(start + 4, packed.sequences))
        ids = torch.from_numpy(packed.sequence_ids(rows))
        targets = ids[:, 1:].reshape(-1)
        hidden = final_hidden(student, ids[:, :-1], False)
        for name, given in {"full": None, **caches}.items():
            if given is None:
                teacher: Any = live.batch(rows, ids[:, :-1])
            else:
                teacher = given[0].batch(rows)
                if given[1]:
                    teacher = SparseTargets(teacher.ids, teacher.weights / teacher.weights.sum(-1, keepdim=True))
            loss, _ = head_loss(
                hidden, head_of(student), teacher, targets, spec, valid_total=valid, low_precision=False
            )
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            flat = torch.cat([g.flatten() for g in found]).double()
            sums[name] = sums[name] + flat if name in sums else flat
    return sums


if __name__ == "__main__":
    main()
