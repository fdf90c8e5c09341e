"""Every family with a GGUF converter: a random model of its shape in real llama.cpp, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import torch_greedy, torch_logits, torch_model
from family_models import DECODERS, ENCODERS, LONGROPE, edit_config, embedding, family

from edgedistill.errors import RuntimeCrashed, UserError
from edgedistill.gguf.convert import convert_to_gguf
from edgedistill.gguf.converter import run_script
from edgedistill.gguf.dequantize import dequantized
from edgedistill.models.families import FAMILIES
from edgedistill.runtimes.process import RuntimeProcess
from edgedistill.stages import export
from edgedistill.store import Store

# Of a standard deviation of transformers' float32 logits: rounding to F16 and llama.cpp's F16 cache of keys and values.
LARGEST_ERROR = 0.02
SMALLEST_COSINE = 0.9999
TOKENS = 200  # more than four of the sliding windows


def in_llama_cpp(gguf: Path, context_tokens: int = 256) -> RuntimeProcess:
    return RuntimeProcess("llama.cpp", gguf, threads=1, context_tokens=context_tokens, use_extra_bufts=False)


def error_of(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / expected.std())


def random_tokens(count: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 400, count)


def test_every_family_of_the_table_is_tried() -> None:
    tried = {kind for kind, _ in (*DECODERS.values(), *ENCODERS.values())} | {"llama"}
    assert {entry.model_type for entry in FAMILIES.values()} == tried


@pytest.mark.parametrize("case", DECODERS)
def test_f16_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    checkpoint = family(tmp_path / "model", *DECODERS[case])
    facts = convert_to_gguf(checkpoint, tmp_path / "model.gguf")
    model = torch_model(checkpoint)
    tokens = random_tokens()
    expected = torch_logits(model, tokens)
    with in_llama_cpp(tmp_path / "model.gguf") as runtime:
        assert error_of(runtime.logits(tokens), expected) <= LARGEST_ERROR
        prompt = [int(t) for t in tokens[:20]]
        assert runtime.greedy(prompt, 8) == torch_greedy(model, prompt, 8)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["task"] == "causal-lm"


@pytest.mark.parametrize("case", [*DECODERS, *ENCODERS])
def test_dequantized_is_the_torch_models_state(case: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    checkpoint = family(tmp_path / "model", *(DECODERS | ENCODERS)[case])
    convert_to_gguf(checkpoint, tmp_path / "model.gguf", dtype="F32")
    model = AutoModel.from_pretrained(checkpoint).eval() if case in ENCODERS else torch_model(checkpoint)
    state = model.state_dict()
    tied = {"lm_head.weight"} if case in DECODERS and model.config.tie_word_embeddings else set()
    found = dict(dequantized(tmp_path / "model.gguf"))
    assert found.keys() == {name for name in state if name not in tied and not name.startswith("pooler.")}
    for name, values in found.items():
        # Gemma's norms are stored with 1 added, which costs their last bits.
        tolerance = 2e-7 if "gemma" in case and values.ndim == 1 else 0.0
        np.testing.assert_allclose(values, state[name].numpy(), rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("case", ENCODERS)
def test_embeddings_are_those_of_transformers(case: str, pooling: str, tmp_path: Path) -> None:
    checkpoint = family(tmp_path / "model", *ENCODERS[case])
    write_pooling(checkpoint, mean_tokens=pooling == "mean", cls_token=pooling == "cls")
    facts = convert_to_gguf(checkpoint, tmp_path / "model.gguf")
    assert facts["task"] == "embedding"
    with in_llama_cpp(tmp_path / "model.gguf") as runtime:
        for count in (1, 7, TOKENS):
            tokens = random_tokens(count)
            found, expected = runtime.embedding(tokens), embedding(checkpoint, tokens, pooling)
            cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
            assert cosine >= SMALLEST_COSINE
            np.testing.assert_allclose(found, expected, atol=0.02)
        with pytest.raises(UserError, match="gives embeddings, no logits"):
            runtime.logits(random_tokens())


def test_a_decoder_gives_no_embedding(tmp_path: Path) -> None:
    convert_to_gguf(family(tmp_path / "model", "gpt2", {}), tmp_path / "model.gguf")
    with in_llama_cpp(tmp_path / "model.gguf") as runtime, pytest.raises(UserError, match="decoder and gives logits"):
        runtime.embedding([1, 2])


def test_nomics_own_config_and_the_modules_names(tmp_path: Path) -> None:
    """nomic-ai's config.json has GPT-2's keys, and transformers 5 may keep its modules' names: the same GGUF."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel

    checkpoint = family(tmp_path / "model", "nomic_bert", {})
    convert_to_gguf(checkpoint, tmp_path / "a.gguf")
    config = json.loads((checkpoint / "config.json").read_text())
    own = {
        "n_embd": config["hidden_size"], "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"], "n_inner": config["intermediate_size"],
        "n_positions": 512, "max_trained_positions": 256,
        "layer_norm_epsilon": config["layer_norm_eps"], "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False, "activation_function": "swiglu", "qkv_proj_bias": False,
    }  # fmt: skip
    usual = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
             "layer_norm_eps", "rope_parameters", "hidden_act", "head_dim")  # fmt: skip
    renamed = edit_config(checkpoint, tmp_path / "own", **own, **dict.fromkeys(usual))
    assert "encoder.layers.0.attn.Wqkv.weight" in load_file(renamed / "model.safetensors")
    state = AutoModel.from_pretrained(checkpoint).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, renamed / "model.safetensors")
    facts = convert_to_gguf(renamed, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert any("the context is 256 tokens and not 512" in note for note in facts["notes"])


@pytest.mark.parametrize("case", ["bert", "gpt2"])
def test_names_of_old_checkpoints(case: str, tmp_path: Path) -> None:
    """Google's BERT has a prefix, gamma and beta; OpenAI's GPT-2 no prefix, but its masks: the same GGUF."""
    import torch
    from safetensors.torch import load_file, save_file

    checkpoint = family(tmp_path / "model", case, {})
    convert_to_gguf(checkpoint, tmp_path / "a.gguf")
    tensors = load_file(checkpoint / "model.safetensors")
    if case == "bert":
        tensors = {f"bert.{n}".replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in tensors.items()}
        tensors = {n.replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in tensors.items()}
        tensors["bert.embeddings.position_ids"] = torch.arange(256.0)
    else:
        tensors = {n.removeprefix("transformer."): t for n, t in tensors.items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 256, 256)
    old = edit_config(checkpoint, tmp_path / "old")
    save_file(tensors, old / "model.safetensors")
    convert_to_gguf(old, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("length", [200, 400])
def test_phi3_longrope_on_either_side_of_the_original_length(length: int, tmp_path: Path) -> None:
    """256 positions at first, 512 now: the short factors up to 256 tokens of context, the long ones beyond."""
    changes = {
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 256,
        "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 256},
    }
    checkpoint = family(tmp_path / "model", "phi3", changes)
    facts = convert_to_gguf(checkpoint, tmp_path / "model.gguf")
    tokens = random_tokens(length)
    expected = torch_logits(torch_model(checkpoint), tokens)
    with in_llama_cpp(tmp_path / "model.gguf", 256 if length <= 256 else 512) as runtime:
        assert error_of(runtime.logits(tokens), expected) <= LARGEST_ERROR
    assert any("long or the short rotary factors" in note for note in facts["notes"])


def test_sliding_windows_that_llama_cpp_lacks_cap_the_context(tmp_path: Path) -> None:
    checkpoint = family(tmp_path / "model", "phi3", {"sliding_window": 100})
    facts = convert_to_gguf(checkpoint, tmp_path / "model.gguf")
    assert facts["context_length"] == 100
    assert any("the context is 100 tokens and not 256" in note for note in facts["notes"])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2 without caps": ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping is None"),
    "gemma2 scale": ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100"),
    "gemma2 activation": ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    "gemma3 caps": ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    "gemma3 both ways": ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "gemma3 layer types": ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types is"),
    "phi3 factors": ("phi3", {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "long_factor of"),
    "granite multiplier": ("granite", {"logits_scaling": 0}, "logits_scaling is 0"),
    "olmo2 tied": ("olmo2", {"tie_word_embeddings": True}, "only with its own head"),
    "olmo2 biases": ("olmo2", {"attention_bias": True}, "attention_bias is True"),
    "smollm3 layers": ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\]"),
    "smollm3 window": ("smollm3", {"use_sliding_window": True}, "use_sliding_window is True"),
    "gpt2 activation": ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
    "gpt2 scale": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    "stablelm rotation": ("stablelm", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "rotates 3 dimensions"),
    "qwen3 biases": ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    "qwen2 rope": ("qwen2", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
    "bert positions": ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is"),
    "bert decoder": ("bert", {"is_decoder": True}, "is_decoder is True"),
    "bert classifier": ("bert", {"architectures": ["BertForSequenceClassification"]}, "no GGUF converter"),
    "nomic rotation": ("nomic_bert", {"rotary_emb_interleaved": True}, "rotary_emb_interleaved is True"),
    "quantized": ("gpt2", {"quantization_config": {"bits": 4}}, "already quantized"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint a family that is refused below."""
    root = tmp_path_factory.mktemp("plain")
    changes = dict(reversed(DECODERS.values()))
    wanted = {kind for kind, _, _ in REFUSED.values()}
    return {kind: family(root / kind, kind, changes.get(kind, {})) for kind in sorted(wanted)}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_run_differently_is_refused(case: str, plain: dict[str, Path], tmp_path: Path) -> None:
    kind, changes, cause = REFUSED[case]
    folder = edit_config(plain[kind], tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=cause) as caught:
        convert_to_gguf(folder, tmp_path / "out" / "model.gguf")
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        ({"1_Pooling/config.json": {"pooling_mode_max_tokens": True}}, "pooling_mode_max_tokens, which llama.cpp"),
        (
            {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
            "pooling_mode_mean_tokens and pooling_mode_cls_token",
        ),
        ({"modules.json": [{"type": "sentence_transformers.models.Dense"}]}, "a Dense layer follows the pooling"),
    ],
)
def test_pooling_that_llama_cpp_lacks_is_refused(
    files: dict[str, Any], cause: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    folder = edit_config(plain["bert"], tmp_path / "model")
    (folder / "1_Pooling").mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=cause):
        convert_to_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_the_list_of_what_works_and_the_way_around(plain: dict[str, Path], tmp_path: Path) -> None:
    folder = edit_config(plain["gpt2"], tmp_path / "model", architectures=["MambaForCausalLM"])
    with pytest.raises(UserError, match="no GGUF converter for architecture 'MambaForCausalLM'") as caught:
        export_gguf(folder, tmp_path)
    assert all(name in caught.value.remedy for name in FAMILIES)
    assert "--converter" in caught.value.remedy
    assert "did you mean" not in caught.value.remedy  # what every class of this kind ends in is no likeness
    assert not (tmp_path / "out").exists()
    folder = edit_config(plain["gpt2"], tmp_path / "typo", architectures=["LlamForCausalLM"])
    with pytest.raises(UserError) as caught:
        export_gguf(folder, tmp_path)
    assert caught.value.remedy.startswith("did you mean 'LlamaForCausalLM'?")


@pytest.mark.parametrize("case", ["gpt2", "bert"])
def test_export_of_a_family_without_a_shape(case: str, plain: dict[str, Path], tmp_path: Path) -> None:
    artifact = export_gguf(plain[case], tmp_path)
    assert artifact.task == ("embedding" if case == "bert" else "causal-lm")
    assert artifact.context_tokens == 256
    assert (tmp_path / "out" / "artifact.json").is_file()


SCRIPT = """
import sys
from pathlib import Path
from edgedistill.gguf.convert import convert_to_gguf
checkpoint, _, out, _, kind = sys.argv[1:]
print("reading", checkpoint)
{what}
"""


@pytest.fixture
def script(tmp_path: Path) -> Any:
    def write(what: str) -> Path:
        path = tmp_path / "convert_hf_to_gguf.py"
        path.write_text(SCRIPT.format(what=what))
        return path

    return write


def test_a_converter_of_the_users(script: Any, plain: dict[str, Path], tmp_path: Path) -> None:
    """A script with the arguments of llama.cpp's own; the result is opened before it is put in place."""
    path = script("convert_to_gguf(Path(checkpoint), Path(out), dtype=kind.upper())")
    facts = run_script(path, plain["gpt2"], tmp_path / "ours.gguf", dtype="F16")
    convert_to_gguf(plain["gpt2"], tmp_path / "theirs.gguf", dtype="F16")
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    assert facts["architecture"] == "gpt2" and facts["vocab_size"] == 400 and facts["context_length"] == 256
    assert facts["notes"] == ["converted by convert_hf_to_gguf.py"]
    artifact = export_gguf(plain["gpt2"], tmp_path, converter=path)
    assert artifact.notes == facts["notes"] and artifact.tool_versions["converter"] == "convert_hf_to_gguf.py"
    assert artifact.parity is not None and artifact.parity.relative_rms < 0.02


@pytest.mark.parametrize(
    ("what", "kind", "cause"),
    [
        ("raise SystemExit('no such thing')", UserError, r"(?s)exit code 1; its last lines:.*reading .*no such thing"),
        ("", UserError, "wrote no GGUF"),
        ("Path(out).write_bytes(b'GGUF' + bytes(20))", UserError, "is not a GGUF"),
        ("import time; time.sleep(60)", UserError, r"did not finish in 1 s"),
    ],
)
def test_a_converter_that_fails(
    what: str, kind: type[Exception], cause: str, script: Any, plain: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(kind, match=cause):
        run_script(script(what), plain["gpt2"], out / "model.gguf", dtype="F16", timeout_s=1 if "sleep" in what else 60)
    assert list(out.iterdir()) == []


def test_a_converter_whose_result_llama_cpp_refuses(script: Any, plain: dict[str, Path], tmp_path: Path) -> None:
    """Whole as a file, but a tensor is missing."""
    path = script(
        "from gguf import GGUFWriter; w = GGUFWriter(out, 'gpt2'); w.add_context_length(8); w.write_header_to_file();"
        " w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()"
    )
    with pytest.raises((UserError, RuntimeCrashed), match=r"llama\.cpp cannot"):
        run_script(path, plain["gpt2"], tmp_path / "out" / "model.gguf", dtype="F16")
    assert list((tmp_path / "out").iterdir()) == []


def write_pooling(checkpoint: Path, **modes: bool) -> None:
    (checkpoint / "1_Pooling").mkdir()
    config = {f"pooling_mode_{mode}": on for mode, on in modes.items()}
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps(config))


def export_gguf(checkpoint: Path, folder: Path, converter: Path | None = None) -> Any:
    return export(
        str(checkpoint), format_="gguf", quantization="F16", context_tokens=None, out=folder / "out",
        store=Store(folder / "store"), converter=converter,
    )  # fmt: skip
