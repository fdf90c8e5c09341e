"""Low-rank adapters: what is trained, what a checkpoint holds, exact resume, and the merged student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import Command, refused
from safetensors.torch import load_file
from torch import nn
from training_models import VOCAB, run
from training_models import model as small_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from edgedistill.config.recipe import Lora
from edgedistill.errors import UserError
from edgedistill.student.lora import add_adapters, linear_layers, merge_adapters
from edgedistill.training.step import Step

CPU = torch.device("cpu")
BASES = ("fp32", "int8", "nf4")


def lora(**changes) -> Lora:
    return Lora(**{"rank": 8, "alpha": 16.0, **changes})


def model(seed: int = 0) -> nn.Module:
    return small_model(seed=seed, hidden=64)  # 4-bit blocks are 64 long


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    )


def adapted(folder: Path, ask: Lora, *, start=model, seed: int = 3) -> nn.Module:
    return add_adapters(start(), ask, folder=folder, device=CPU, seed=seed)


def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(student: nn.Module) -> torch.Tensor:
    return student.eval()(ids()).logits.float()


def train(student: nn.Module, state: Path, **changes):
    return run(student, state, **{"optimizer": "adamw", "learning_rate": 0.01, **changes})


@pytest.mark.parametrize("base", BASES)
def test_adapters_alone_are_trained_and_kept(tmp_path, base):
    student = adapted(tmp_path / "start", lora(base=base))
    frozen = {name: p.detach().clone() for name, p in student.named_parameters() if "lora_" not in name}
    before = logits(student)
    result = train(student, tmp_path / "state", tokens=16 * 4 * 60, checkpoint_every_s=1e-9)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in student.named_parameters()} - frozen.keys()
    # two matrices for each of the seven linear layers of two layers; the head has none
    assert len(trained) == 2 * 7 * 2
    assert not any("lm_head" in name for name in trained)
    for name, parameter in student.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    assert result.history[-1]["perplexity"] < 0.75 * VOCAB  # the start's is that of a uniform guess
    assert (logits(student) - before).abs().max() > 0.1
    (newest,) = (tmp_path / "state").glob("step-*")
    kept = load_file(newest / "model.safetensors")
    assert kept.keys() == trained
    for best in (tmp_path / "state").glob("best-*"):
        assert load_file(best / "model.safetensors").keys() == trained
    assert all(name.split("|")[1] in trained for name in load_file(newest / "optimizer.safetensors") if "|" in name)


def test_the_start_is_the_students_own(tmp_path):
    assert torch.equal(logits(adapted(tmp_path, lora())), logits(model()))


@pytest.mark.parametrize("start", [model, gpt2])
def test_the_merged_student_is_the_adapted_one(tmp_path, start):
    student = adapted(tmp_path / "start", lora(), start=start)
    train(student, tmp_path / "state")
    merged = merge_adapters(student, start(seed=9))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert (logits(merged) - logits(start())).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), logits(student), rtol=1e-5, atol=1e-5)


def plain_weight(layer: nn.Module) -> torch.Tensor:
    """A quantized layer's weight, seen from outside: its answer to the unit vectors, in fp32."""
    with torch.no_grad():
        answer = layer(torch.eye(layer.in_features)).T
        return answer if layer.bias is None else answer - layer.bias[:, None]


@pytest.mark.parametrize("start", [model, gpt2])
@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_quantized_base_merges_as_dequantized_plus_delta(tmp_path, base, start):
    student = adapted(tmp_path / "start", lora(base=base), start=start)
    train(student, tmp_path / "state")
    merged = merge_adapters(student, start(seed=9))
    original = dict(start().named_parameters())
    modules = dict(student.named_modules())
    layers = linear_layers(merged)
    assert len(layers) == (14 if start is model else 8)
    for name, module in layers:
        turned = (lambda w: w.T) if start is gpt2 else (lambda w: w)  # [in, out] there
        layer = modules[name]
        delta = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / rank = 2
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(
            module.weight, turned(plain_weight(layer.get_base_layer()) + delta), rtol=2**-7, atol=2**-7 * 0.1
        )
        # the base is near what it was quantized from, and is not it
        rest = module.weight - turned(delta) - original[f"{name}.weight"]
        size = original[f"{name}.weight"].abs().max()
        assert 0 < rest.abs().max() < (0.02 if base == "int8" else 0.2) * size
    # training ran in bf16, the merged student in fp32
    assert (logits(merged) - logits(student)).abs().max() < 0.05 * logits(merged).abs().max()


@pytest.mark.parametrize("base", BASES)
def test_resume_gives_the_same_bytes(tmp_path, monkeypatch, base):
    ask = lora(base=base, dropout=0.1)
    straight = adapted(tmp_path / "start", ask)
    train(straight, tmp_path / "straight")

    class Killed(Exception):
        pass

    original, calls = Step.run, []

    def dying(*args, **named):
        if len(calls) == 5:
            raise Killed
        calls.append(1)
        return original(*args, **named)

    monkeypatch.setattr(Step, "run", dying)
    with pytest.raises(Killed):
        train(adapted(tmp_path / "start", ask), tmp_path / "state", checkpoint_every_s=1e-9)
    monkeypatch.setattr(Step, "run", original)
    # other adapters, so that what is equal afterwards came out of the checkpoint
    resumed = adapted(tmp_path / "start", ask, seed=99)
    train(resumed, tmp_path / "state", checkpoint_every_s=1e-9)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_targets_are_checked(tmp_path):
    student = adapted(tmp_path, lora(targets=["q_proj", "v_proj"]))
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all("q_proj" in name or "v_proj" in name for name in trained)
    with pytest.raises(UserError, match=r"names query, lm_head[\s\S]*has down_proj, gate_proj, k_proj"):
        adapted(tmp_path, lora(targets=["q_proj", "query", "lm_head"]))
    assert "lm_head" not in {name for name, _ in linear_layers(model())}


def test_a_4_bit_base_that_would_be_computed_wrongly_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"q_proj takes 32 inputs[\s\S]*multiple of 64"):
        adapted(tmp_path, lora(base="nf4"), start=small_model)
    with pytest.raises(UserError, match="FSDP cannot shard"):
        add_adapters(model(), lora(base="int8"), folder=tmp_path, device=CPU, seed=0, sharded=True)


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Command:
    return Command(tmp_path_factory.mktemp("lora"), warm=True)


WORDS = (
    "-t", "phone", "--set", "student.start=layers", "--set", "student.compression=1.2", "--set",
    "distill.tokens=3000", "--set", "teacher.train.tokens=3000", "--set", "distill.lora.rank=4",
)  # fmt: skip


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_distill_leaves_a_plain_student(command, base):
    done = command.json("distill", command.recipe(), *WORDS, "--set", f"distill.lora.base={base}")
    folder = Path(done["student"]["path"])
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert not any("lora" in name or "quant" in name for name in weights)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(p.numel() for p in plain.parameters()) == done["student"]["parameters"]


def test_targets_that_are_not_there_end_the_command(command):
    done = command("distill", command.recipe(), *WORDS, "--set", "distill.lora.targets=[wq]")
    refused(done, "distill.lora.targets names wq", "q_proj")
