"""Several teachers at once: the student learns the mean of their probabilities, live or from a cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Command, refused, tiny_text
from training_models import VOCAB, model, packed
from transformers import LlamaConfig, LlamaForCausalLM

from edgedistill.config.recipe import Recipe
from edgedistill.config.refusals import refuse_mixture
from edgedistill.errors import UserError
from edgedistill.losses.losses import LossSpec, SparseTargets, TeacherLogits
from edgedistill.models.folder import copy_tokenizer
from edgedistill.signals.cache import build_cache
from edgedistill.signals.cache_reader import open_cache
from edgedistill.signals.signals import LiveSignals, MixedSignals, produce_from
from edgedistill.store import Store
from edgedistill.strategies.distill import load_teachers
from edgedistill.teacher.stage import obtain_teacher, train_tokenizer
from edgedistill.training.loss_module import LossModule
from edgedistill.training.ranks import ranks_here

TOKENS = 320
SHARES = (0.25, 0.75)


def teacher_folder(folder: Path, *, hidden: int, rows: int, seed: int, tokenizer: Path | None = None) -> Path:
    """A Llama with strong opinions: `rows` embedding rows, those beyond the tokens are padding."""
    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True,
            initializer_range=0.4, bos_token_id=0, eos_token_id=1,
        )
    ).save_pretrained(folder)  # fmt: skip
    if tokenizer is None:
        train_tokenizer(tiny_text().split("\n\n"), TOKENS, folder)
    else:
        copy_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> tuple[Path, Path]:
    """Of different widths and different padding, with one tokenizer."""
    folder = tmp_path_factory.mktemp("teachers")
    first = teacher_folder(folder / "first", hidden=64, rows=TOKENS, seed=1)
    return first, teacher_folder(folder / "second", hidden=96, rows=TOKENS + 32, seed=2, tokenizer=first)


def recipe_of(teachers: tuple[Path, Path], **distill) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": {
                "model": str(teachers[0]),
                "weight": 1.0,
                "also": [{"model": str(teachers[1]), "weight": 3.0}],
            },
            "distill": {"precision": "fp32", **distill},
        }
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "taid"])
def test_loss_and_gradient_are_those_of_the_mean_of_probabilities(teachers, tmp_path, temperature, name):
    recipe = recipe_of(teachers)
    teacher = obtain_teacher(recipe, data=None, store=Store(tmp_path))
    signals = load_teachers(recipe, teacher, ranks_here())
    torch.manual_seed(3)
    ids = torch.randint(TOKENS, (2, 9))
    inputs, targets = ids[:, :-1], ids[:, 1:].reshape(-1)
    student = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENS, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.3,
        )
    )  # fmt: skip
    spec = LossSpec({name: 1.0}, temperature=temperature, vocab=TOKENS)
    loss, _ = LossModule(student, spec, low_precision=False)(
        inputs, targets, None, signals.batch(np.arange(2), inputs), valid_total=len(targets), taid_t=0.6
    )
    loss.backward()
    found = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()

    mean = 0.0
    for folder, share in zip(teachers, SHARES, strict=True):
        with torch.no_grad():
            logits = LlamaForCausalLM.from_pretrained(folder)(inputs).logits.flatten(0, 1)[:, :TOKENS].double()
        mean = mean + share * torch.softmax(logits / temperature, -1)
    s = student(inputs).logits.flatten(0, 1).double() / temperature
    if name == "taid":
        mean = torch.softmax(0.4 * s.detach() + 0.6 * mean.log(), -1)
    q = torch.softmax(s, -1)
    p, other = (q, mean) if name == "reverse_kl" else (mean, q)
    expected = temperature**2 * (p * (p.log() - other.log())).sum(-1).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for one, parameter in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-5)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixed() -> MixedSignals:
    parts = [(model(seed=5, hidden=48), 1.0), (model(seed=6, hidden=64), 3.0)]
    for seed, (part, _) in enumerate(parts):  # strong and different opinions, or the mean is near each of them
        part.model.norm.weight.data.copy_(15.0 * torch.randn(part.config.hidden_size, generator=_generator(seed)))
    return MixedSignals([(LiveSignals(part, low_precision=False), weight) for part, weight in parts])


def cached(folder: Path, kind: str, temperature: float):
    data, key = packed(), {"kind": kind}
    build_cache(
        str(folder), key=key, kind=kind, vocab=VOCAB, sequences=data.sequences, context=data.context,
        temperature=temperature, draws=50, top_k=5, seed=3, batch_sequences=7,
        produce=produce_from(mixed(), data, documents=False, temperature=temperature),
    )  # fmt: skip
    return open_cache(str(folder), key=key)


def mean_of(rows: np.ndarray, temperature: float) -> torch.Tensor:
    inputs = torch.from_numpy(packed().sequence_ids(rows)[:, :-1])
    with torch.no_grad():
        logits = [part.teacher(inputs).logits.flatten(0, 1) for part, _ in mixed().parts]
    return sum(
        share * torch.softmax(each.float() / temperature, -1) for share, each in zip(SHARES, logits, strict=True)
    )


def test_a_dense_cache_holds_the_mean(tmp_path):
    rows = np.array([17, 0, 3])
    got = cached(tmp_path / "c", "dense", 1.0).batch(rows)
    assert isinstance(got, TeacherLogits)
    p = mean_of(rows, 1.0)
    # bf16 states and bf16 logits: each is off by 2^-9 of its size
    torch.testing.assert_close(torch.softmax(got.logits.float(), -1), p, rtol=0.1, atol=4e-3)
    alone = torch.softmax(mixed().parts[0][0].teacher(torch.from_numpy(packed().sequence_ids(rows)[:, :-1])).logits, -1)
    assert (alone.flatten(0, 1) - p).abs().max() > 0.2


@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_sparse_caches_hold_the_mean_at_the_temperature(tmp_path, kind):
    rows = np.arange(packed().sequences)
    got = cached(tmp_path / "c", kind, 2.0).batch(rows)
    assert isinstance(got, SparseTargets)
    p = mean_of(rows, 2.0)
    if kind == "topk":
        torch.testing.assert_close(got.weights, p.gather(-1, got.ids), rtol=0.05, atol=4e-3)
        return
    dense = torch.zeros_like(p).scatter_add_(-1, got.ids, got.weights)
    deviation = (dense - p).sum(0) / ((p * (1 - p)).sum(0) / 50).sqrt()
    assert deviation.abs().max() < 4.5
    entropy = -torch.xlogy(p, p).sum(-1)
    assert got.entropy.mean().item() == pytest.approx(entropy.mean().item(), rel=5e-3)


def test_weights_are_shares_above_zero():
    part = LiveSignals(model(), low_precision=False)
    assert [share for _, share in MixedSignals([(part, 2.0), (part, 6.0)]).parts] == [0.25, 0.75]
    with pytest.raises(ValueError, match="above 0"):
        MixedSignals([(part, 1.0), (part, 0.0)])


@pytest.mark.parametrize(
    ("distill", "part"),
    [
        ({"cache": {"kind": "hidden"}}, "states cannot be mixed"),
        ({"cache": {"kind": "dense"}, "temperature": 2.0}, "another temperature"),
        ({"cache": {"hidden_layers": [1]}}, "layers"),
    ],
)
def test_caches_that_several_teachers_cannot_fill_are_refused(teachers, distill, part):
    recipe = recipe_of(teachers, **distill)
    refuse_mixture(recipe, caching=False)
    with pytest.raises(UserError, match=part):
        refuse_mixture(recipe, caching=True)


def test_a_teacher_with_another_tokenizer_is_refused_with_the_token(teachers, tmp_path):
    other = tmp_path / "other"
    teacher_folder(other, hidden=64, rows=TOKENS, seed=4, tokenizer=teachers[0])
    tree = json.loads((other / "tokenizer.json").read_text())
    swapped = {300: 301, 301: 300}
    tree["model"]["vocab"] = {token: swapped.get(index, index) for token, index in tree["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"has id 300 in the teacher's and is 301 in the further teacher"):
        obtain_teacher(recipe_of((teachers[0], other)), data=None, store=Store(tmp_path / "store"))


def test_distilling_from_two_teachers_end_to_end(teachers, tmp_path):
    """Live and sampled; the record names both; another weight is another student; the plan counts both."""
    command = Command(tmp_path, {"OMP_NUM_THREADS": "1"}, warm=True)
    base = ("--teacher", str(teachers[0]), "--set", "student.compression=2", "--set", "distill.tokens=6000")
    also = (*base, "--set", f"teacher.also=[{{model: {teachers[1]}, weight: 3.0}}]")
    recipe = command.recipe()

    def student(*words: str):
        return command.json("distill", recipe, "-t", "phone", *words)["student"]

    two = student(*also)
    assert [(t["weight"], t["shape"]["hidden_size"]) for t in two["further_teachers"]] == [(3.0, 96)]
    assert two["signals"] == "0.25·live, fp32 + 0.75·live, fp32"
    sampled = student(*also, "--set", "distill.teacher_signals=cached")
    assert sampled["signals"] == "cached, sampled"
    ends = [each["training"]["history"][-1] for each in (two, sampled)]
    assert ends[1]["perplexity"] == pytest.approx(ends[0]["perplexity"], rel=0.1)
    other_weight = (*also, "--set", "teacher.weight=2")
    planned = [command.json("plan", recipe, "-t", "phone", *words) for words in (base, also, other_weight)]
    assert [each["store_hits"]["student"] for each in planned] == [False, True, False]
    assert len(planned[1]["further_teachers"]) == 1
    assert planned[2]["training_memory_bytes"]["value"] > planned[0]["training_memory_bytes"]["value"]
    refused(command("plan", recipe, "-t", "phone", *also[-2:]), "further teacher", "--teacher")
    hidden = ("--set", "distill.teacher_signals=cached", "--set", "distill.cache.kind=hidden")
    refused(command("plan", recipe, "-t", "phone", *also, *hidden), "states cannot be mixed")
