"""config.json ⇄ Shape, held to the real transformers models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from family_models import COMMON, DECODERS

from edgedistill.errors import UserError
from edgedistill.models.families import FAMILIES as ALL
from edgedistill.models.shapes import (
    ARCHITECTURES,
    FAMILIES,
    config_from_shape,
    config_of_student,
    refuse_family,
    shape_from_config,
)
from edgedistill.records.shape import Shape

TABLE = {each.model_type: name for name, each in ALL.items() if each.task == "causal-lm"}
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "hidden_act": "silu",
}  # fmt: skip


def _random_shape(family: str, seed: int) -> Shape:
    rng = random.Random(f"{family}{seed}")
    kv_heads = rng.randint(1, 4)
    heads = kv_heads * rng.randint(1, 4)
    return Shape(
        family=family,
        vocab_size=rng.randint(1, 700),
        # Llama's configuration wants a multiple of the heads.
        hidden_size=heads * rng.randint(1, 30) if family == "llama" else rng.choice([32, 40, 96, 256]),
        intermediate_size=rng.randint(1, 300),
        num_hidden_layers=rng.randint(1, 5),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * rng.randint(1, 40),
        tie_word_embeddings=rng.random() < 0.5,
        max_position_embeddings=rng.randint(1, 4096),
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_parameters_are_those_of_the_real_model_and_config_round_trips(family: str, seed: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = _random_shape(family, seed)
    as_dict = config_from_shape(shape, bos_token_id=None, eos_token_id=0, rms_norm_eps=1e-5, rope_theta=5e5)
    config = transformers.AutoConfig.for_model(**as_dict)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == ARCHITECTURES[family]
    # A tied head is one tensor under two names; parameters() counts it once.
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 5e5
    for written in (config.to_dict(), json.loads(config.to_json_string()), as_dict):
        assert shape_from_config(written, where="test") == shape


@pytest.mark.parametrize("weights", ["stories260k-hf", "teacher-tinystories-21m"])
def test_real_checkpoints(weights: str, test_data: Path) -> None:
    folder = test_data / "weights" / weights
    shape = shape_from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")), where=weights)
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__" and not (shape.tie_word_embeddings and name == "lm_head.weight"):
                size = 1
                for dimension in tensor["shape"]:
                    size *= dimension
                total += size
    assert total == shape.parameters


def test_transformers_4_style_is_read() -> None:
    shape = shape_from_config(LLAMA | {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16"}, where="x")
    assert (shape.head_dim, shape.num_key_value_heads, shape.tie_word_embeddings) == (16, 2, False)


def test_what_a_silent_config_means() -> None:
    silent = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert shape_from_config(silent, where="x").num_key_value_heads == 4
    assert shape_from_config(LLAMA | {"head_dim": None, "hidden_size": 128}, where="x").head_dim == 32
    assert shape_from_config(LLAMA | {"model_type": "qwen3"}, where="x").head_dim == 128


def test_mistral_reads_as_llama_up_to_its_window() -> None:
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": None}
    assert shape_from_config(mistral, where="x") == shape_from_config(LLAMA, where="x")
    assert shape_from_config(mistral | {"sliding_window": 128}, where="x").max_position_embeddings == 128
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 128}
    assert shape_from_config(qwen | {"use_sliding_window": False}, where="x").max_position_embeddings == 512
    assert shape_from_config(qwen | {"use_sliding_window": True}, where="x").max_position_embeddings == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "falcon"}, "x: architecture 'falcon' is not supported\n.*llama, mistral, qwen2, qwen3, gemma2"),
        ({"model_type": "qwen2_moe"}, "'qwen2_moe' is not supported"),
        ({"model_type": None}, "architecture None"),
        ({"model_type": ["llama"]}, "not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 64.0}, r"hidden_size is 64\.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        ({"hidden_size": 66, "head_dim": 16}, "hidden_size 66 is not a multiple"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
    ],
)
def test_what_cannot_be_said_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        shape_from_config(LLAMA | change, where="x")


def _family_config(case: str) -> Any:
    transformers = pytest.importorskip("transformers")
    model_type, changes = DECODERS[case]
    settings = COMMON | changes
    if model_type == "gpt2":
        settings = {k: v for k, v in settings.items() if k not in ("num_key_value_heads", "intermediate_size")}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    config.architectures = [TABLE[model_type]]
    return config


@pytest.mark.parametrize("case", [case for case, (family, _) in DECODERS.items() if family not in FAMILIES])
def test_every_family_of_the_table_is_counted_exactly_and_has_students(case: str) -> None:
    """The teacher's parameters are transformers' own count, and so are those of a smaller model of its family."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = _family_config(case)
    shape = shape_from_config(config.to_dict(), where="test")
    layers = 2 if case.startswith(("smollm3", "gemma3")) else 1
    smaller = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 2}
    smaller |= {"num_key_value_heads": 2 if shape.family == "gpt2" else 1, "vocab_size": 100}
    student = config_of_student(config.to_dict(), shape.model_copy(update=smaller), {"eos_token_id": 7})
    assert student["eos_token_id"] == 7
    for made in (config, transformers.AutoConfig.for_model(**student)):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(made)
        found = shape_from_config(made.to_dict() | {"architectures": config.architectures}, where="test")
        assert found.parameters == sum(p.numel() for p in model.parameters())
        assert type(found).model_validate_json(found.model_dump_json()) == found


def test_every_family_of_the_table_is_tried() -> None:
    assert {family for family, _ in DECODERS.values()} == set(TABLE)


def test_sizes_that_a_family_cannot_have_are_refused() -> None:
    config = _family_config("gpt2").to_dict()
    shape = shape_from_config(config, where="x")
    with pytest.raises(UserError, match="gpt2 model cannot have num_key_value_heads 2"):
        config_of_student(config, shape.model_copy(update={"num_key_value_heads": 2}), {})
    with pytest.raises(UserError, match="onnx"):
        refuse_family(shape, "onnx", where="x")


def test_unknown_family_has_no_config() -> None:
    shape = shape_from_config(LLAMA, where="x").model_copy(update={"family": "gpt2"})
    with pytest.raises(UserError, match="family 'gpt2'"):
        config_from_shape(shape, bos_token_id=0, eos_token_id=0)


def test_every_family_read_can_be_written() -> None:
    assert set(FAMILIES.values()) == set(ARCHITECTURES)
