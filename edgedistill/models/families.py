"""The families that have a converter, one entry each: names, what changes on the way, metadata, what is refused.

Adding a family is an entry in `FAMILIES`. Names on the left are the torch modules' (as `state_dict` has them), names on
the right GGUF's. A tensor's dimensions are letters: V vocabulary, H width, F feed-forward, G = 2 F, Q and K rows of
query and key heads, A = Q + 2 K, D a head, N query heads, M key heads, P positions, T token types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from edgedistill.models.config import Config, Sizes
from edgedistill.models.family_keys import (
    bert_keys,
    gemma2_keys,
    gemma3_keys,
    gpt2_keys,
    granite_keys,
    llama_keys,
    mistral_keys,
    nomic_keys,
    olmo2_keys,
    phi3_keys,
    qwen2_keys,
    qwen3_keys,
    smollm3_keys,
    stablelm_keys,
)
from edgedistill.models.rope import DECODER_KINDS, MetadataValue

# What a tensor's values undergo: q and k rows from halves to pairs; 1 added (a norm that torch multiplies as 1 + w);
# transposed (GPT-2's Conv1D); one row of a matrix that collects a tensor for each head.
Change = Literal["", "rope", "plus_one", "transposed", "row"]


class Tensor(NamedTuple):
    """A line of a family's table. `when`: the config's flag under which the tensor is there; "!flag": is not."""

    gguf: str
    dims: str
    change: Change = ""
    when: str = ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a transformers class becomes a GGUF.

    first, layer, last   torch name → Tensor; those of a layer without `layer_prefix` ("{}" is its number)
    keys                 metadata after `<arch>.`, from the config; refuses what llama.cpp would run differently
    other_names          a size's usual key → the key that this family's config.json has instead
    tied, theta, partial, kv_heads, head_dim, positions, width   what transformers takes where config.json is silent
    ropes                kinds of rotary embedding that llama.cpp has in this family; none: learned positions
    interleaved_rope     q and k are stored with their pairs side by side
    needs_head           llama.cpp runs no tied head in this family
    heads                must they divide the width, or make it up as a whole (heads · head size = width)?
    renamed              regular expressions: a name in the file → the torch module's
    split                the end of a fused name in the file → the ends of the tensors that it is made of, in order
    ignored              regular expressions of tensors that no output depends on
    """

    gguf: str
    model_type: str
    first: Mapping[str, Tensor]
    layer: Mapping[str, Tensor]
    last: Mapping[str, Tensor]
    keys: Callable[[Config, Sizes], dict[str, MetadataValue]]
    layer_prefix: str = "model.layers.{}."
    embedding: str = "model.embed_tokens.weight"
    task: Literal["causal-lm", "embedding"] = "causal-lm"
    other_names: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False
    kv_heads: int | None = None
    head_dim: int | None = None
    positions: int | None = None
    ropes: tuple[str, ...] = DECODER_KINDS
    theta: float = 10000.0
    partial: float | None = None
    interleaved_rope: bool = False
    needs_head: bool = False
    flags: tuple[str, ...] = ()
    heads: Literal["any", "divide", "whole"] = "any"
    renamed: tuple[tuple[str, str], ...] = ()
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


EMBEDDING = {"model.embed_tokens.weight": Tensor("token_embd.weight", "VH")}
HEAD = {"lm_head.weight": Tensor("output.weight", "VH", when="untied")}
LAST = {"model.norm.weight": Tensor("output_norm.weight", "H"), **HEAD}
ATTENTION = {
    "self_attn.q_proj.weight": Tensor("attn_q.weight", "QH", "rope"),
    "self_attn.k_proj.weight": Tensor("attn_k.weight", "KH", "rope"),
    "self_attn.v_proj.weight": Tensor("attn_v.weight", "KH"),
    "self_attn.o_proj.weight": Tensor("attn_output.weight", "HQ"),
}
MLP = {
    "mlp.gate_proj.weight": Tensor("ffn_gate.weight", "FH"),
    "mlp.up_proj.weight": Tensor("ffn_up.weight", "FH"),
    "mlp.down_proj.weight": Tensor("ffn_down.weight", "HF"),
}
PRE_NORMS = {
    "input_layernorm.weight": Tensor("attn_norm.weight", "H"),
    "post_attention_layernorm.weight": Tensor("ffn_norm.weight", "H"),
}
HEAD_NORMS = {
    "self_attn.q_norm.weight": Tensor("attn_q_norm.weight", "D"),
    "self_attn.k_norm.weight": Tensor("attn_k_norm.weight", "D"),
}
GEMMA_NORMS = {
    "input_layernorm.weight": Tensor("attn_norm.weight", "H", "plus_one"),
    "post_attention_layernorm.weight": Tensor("post_attention_norm.weight", "H", "plus_one"),
    "pre_feedforward_layernorm.weight": Tensor("ffn_norm.weight", "H", "plus_one"),
    "post_feedforward_layernorm.weight": Tensor("post_ffw_norm.weight", "H", "plus_one"),
}
GEMMA_LAST = {"model.norm.weight": Tensor("output_norm.weight", "H", "plus_one")}


def qkv_biases(when: str) -> dict[str, Tensor]:
    return {
        "self_attn.q_proj.bias": Tensor("attn_q.bias", "Q", "rope", when),
        "self_attn.k_proj.bias": Tensor("attn_k.bias", "K", "rope", when),
        "self_attn.v_proj.bias": Tensor("attn_v.bias", "K", when=when),
    }


LLAMA_BIASES = {
    **qkv_biases("attention_bias"),
    "self_attn.o_proj.bias": Tensor("attn_output.bias", "H", when="attention_bias"),
    "mlp.gate_proj.bias": Tensor("ffn_gate.bias", "F", when="mlp_bias"),
    "mlp.up_proj.bias": Tensor("ffn_up.bias", "F", when="mlp_bias"),
    "mlp.down_proj.bias": Tensor("ffn_down.bias", "H", when="mlp_bias"),
}
LLAMA_LAYER = {**PRE_NORMS, **ATTENTION, **MLP}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        gguf="llama",
        model_type="llama",
        heads="divide",
        first=EMBEDDING,
        layer={**LLAMA_LAYER, **LLAMA_BIASES},
        last=LAST,
        keys=llama_keys,
        positions=2048,
        interleaved_rope=True,
        flags=("attention_bias", "mlp_bias"),
    ),
    "MistralForCausalLM": Family(
        gguf="llama",
        model_type="mistral",
        first=EMBEDDING,
        layer=LLAMA_LAYER,
        last=LAST,
        keys=mistral_keys,
        kv_heads=8,
        positions=131072,
        interleaved_rope=True,
    ),
    "Qwen2ForCausalLM": Family(
        gguf="qwen2",
        model_type="qwen2",
        first=EMBEDDING,
        layer={**LLAMA_LAYER, **qkv_biases("")},
        last=LAST,
        keys=qwen2_keys,
        kv_heads=32,
        positions=32768,
        ropes=("default", "linear", "yarn"),
    ),
    "Qwen3ForCausalLM": Family(
        gguf="qwen3",
        model_type="qwen3",
        first=EMBEDDING,
        layer={**LLAMA_LAYER, **HEAD_NORMS},
        last=LAST,
        keys=qwen3_keys,
        kv_heads=32,
        head_dim=128,
        positions=32768,
        ropes=("default", "linear", "yarn"),
    ),
    "Gemma2ForCausalLM": Family(
        gguf="gemma2",
        model_type="gemma2",
        heads="divide",
        first=EMBEDDING,
        layer={**GEMMA_NORMS, **ATTENTION, **MLP},
        last=GEMMA_LAST,
        keys=gemma2_keys,
        tied=True,
        kv_heads=4,
        head_dim=256,
        positions=8192,
        ropes=("default",),
    ),
    "Gemma3ForCausalLM": Family(
        gguf="gemma3",
        model_type="gemma3_text",
        heads="divide",
        first=EMBEDDING,
        layer={
            **GEMMA_NORMS,
            **ATTENTION,
            "self_attn.q_norm.weight": Tensor("attn_q_norm.weight", "D", "plus_one"),
            "self_attn.k_norm.weight": Tensor("attn_k_norm.weight", "D", "plus_one"),
            **MLP,
        },
        last={**GEMMA_LAST, **HEAD},
        keys=gemma3_keys,
        tied=True,
        kv_heads=4,
        head_dim=256,
        positions=131072,
        ropes=("default", "linear"),
        theta=1e6,
    ),
    "Phi3ForCausalLM": Family(
        gguf="phi3",
        model_type="phi3",
        first=EMBEDDING,
        layer={
            **PRE_NORMS,
            "self_attn.qkv_proj.weight": Tensor("attn_qkv.weight", "AH"),
            "self_attn.o_proj.weight": Tensor("attn_output.weight", "HQ"),
            "mlp.gate_up_proj.weight": Tensor("ffn_up.weight", "GH"),
            "mlp.down_proj.weight": Tensor("ffn_down.weight", "HF"),
        },
        last=LAST,
        keys=phi3_keys,
        positions=4096,
        ropes=("default", "longrope"),
        partial=1.0,
    ),
    "GraniteForCausalLM": Family(
        gguf="granite",
        model_type="granite",
        first=EMBEDDING,
        layer={**LLAMA_LAYER, **LLAMA_BIASES},
        last=LAST,
        keys=granite_keys,
        positions=2048,
        interleaved_rope=True,
        flags=("attention_bias", "mlp_bias"),
    ),
    "Olmo2ForCausalLM": Family(
        gguf="olmo2",
        model_type="olmo2",
        heads="whole",
        first=EMBEDDING,
        layer={
            **ATTENTION,
            "self_attn.q_norm.weight": Tensor("attn_q_norm.weight", "Q"),
            "self_attn.k_norm.weight": Tensor("attn_k_norm.weight", "K"),
            "post_attention_layernorm.weight": Tensor("post_attention_norm.weight", "H"),
            **MLP,
            "post_feedforward_layernorm.weight": Tensor("post_ffw_norm.weight", "H"),
        },
        last=LAST,
        keys=olmo2_keys,
        positions=2048,
        ropes=("default", "linear", "yarn"),
        needs_head=True,
    ),
    "SmolLM3ForCausalLM": Family(
        gguf="smollm3",
        model_type="smollm3",
        first=EMBEDDING,
        layer=LLAMA_LAYER,
        last=LAST,
        keys=smollm3_keys,
        tied=True,
        kv_heads=4,
        positions=32768,
        ropes=("default", "linear", "yarn"),
        theta=2e6,
        interleaved_rope=True,
    ),
    "GPT2LMHeadModel": Family(
        gguf="gpt2",
        model_type="gpt2",
        heads="whole",
        embedding="transformer.wte.weight",
        layer_prefix="transformer.h.{}.",
        first={
            "transformer.wte.weight": Tensor("token_embd.weight", "VH"),
            "transformer.wpe.weight": Tensor("position_embd.weight", "PH"),
        },
        layer={
            "ln_1.weight": Tensor("attn_norm.weight", "H"),
            "ln_1.bias": Tensor("attn_norm.bias", "H"),
            "attn.c_attn.weight": Tensor("attn_qkv.weight", "HA", "transposed"),
            "attn.c_attn.bias": Tensor("attn_qkv.bias", "A"),
            "attn.c_proj.weight": Tensor("attn_output.weight", "HH", "transposed"),
            "attn.c_proj.bias": Tensor("attn_output.bias", "H"),
            "ln_2.weight": Tensor("ffn_norm.weight", "H"),
            "ln_2.bias": Tensor("ffn_norm.bias", "H"),
            "mlp.c_fc.weight": Tensor("ffn_up.weight", "HF", "transposed"),
            "mlp.c_fc.bias": Tensor("ffn_up.bias", "F"),
            "mlp.c_proj.weight": Tensor("ffn_down.weight", "FH", "transposed"),
            "mlp.c_proj.bias": Tensor("ffn_down.bias", "H"),
        },
        last={
            "transformer.ln_f.weight": Tensor("output_norm.weight", "H"),
            "transformer.ln_f.bias": Tensor("output_norm.bias", "H"),
            **HEAD,
        },
        keys=gpt2_keys,
        other_names={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
        },
        tied=True,
        positions=1024,
        ropes=(),
        renamed=((r"^(?=(?:wte|wpe|h|ln_f)\.)", "transformer."),),
        ignored=(r"\.attn\.bias$", r"\.attn\.masked_bias$"),
    ),
    "StableLmForCausalLM": Family(
        gguf="stablelm",
        model_type="stablelm",
        heads="whole",
        first=EMBEDDING,
        layer={
            "input_layernorm.weight": Tensor("attn_norm.weight", "H"),
            "input_layernorm.bias": Tensor("attn_norm.bias", "H"),
            **ATTENTION,
            **qkv_biases("use_qkv_bias"),
            "self_attn.q_layernorm.norms.{}.weight": Tensor("attn_q_norm.weight", "ND", "row", "qk_layernorm"),
            "self_attn.k_layernorm.norms.{}.weight": Tensor("attn_k_norm.weight", "MD", "row", "qk_layernorm"),
            "post_attention_layernorm.weight": Tensor("ffn_norm.weight", "H", when="!use_parallel_residual"),
            "post_attention_layernorm.bias": Tensor("ffn_norm.bias", "H", when="!use_parallel_residual"),
            **MLP,
        },
        last={
            "model.norm.weight": Tensor("output_norm.weight", "H"),
            "model.norm.bias": Tensor("output_norm.bias", "H"),
            **HEAD,
        },
        keys=stablelm_keys,
        kv_heads=32,
        positions=4096,
        ropes=("default", "linear"),
        partial=0.25,
        needs_head=True,
        flags=("use_qkv_bias", "qk_layernorm", "use_parallel_residual"),
    ),
    "BertModel": Family(
        gguf="bert",
        model_type="bert",
        task="embedding",
        embedding="embeddings.word_embeddings.weight",
        layer_prefix="encoder.layer.{}.",
        first={
            "embeddings.word_embeddings.weight": Tensor("token_embd.weight", "VH"),
            "embeddings.position_embeddings.weight": Tensor("position_embd.weight", "PH"),
            "embeddings.token_type_embeddings.weight": Tensor("token_types.weight", "TH"),
            "embeddings.LayerNorm.weight": Tensor("token_embd_norm.weight", "H"),
            "embeddings.LayerNorm.bias": Tensor("token_embd_norm.bias", "H"),
        },
        layer={
            "attention.self.query.weight": Tensor("attn_q.weight", "HH"),
            "attention.self.query.bias": Tensor("attn_q.bias", "H"),
            "attention.self.key.weight": Tensor("attn_k.weight", "HH"),
            "attention.self.key.bias": Tensor("attn_k.bias", "H"),
            "attention.self.value.weight": Tensor("attn_v.weight", "HH"),
            "attention.self.value.bias": Tensor("attn_v.bias", "H"),
            "attention.output.dense.weight": Tensor("attn_output.weight", "HH"),
            "attention.output.dense.bias": Tensor("attn_output.bias", "H"),
            "attention.output.LayerNorm.weight": Tensor("attn_output_norm.weight", "H"),
            "attention.output.LayerNorm.bias": Tensor("attn_output_norm.bias", "H"),
            "intermediate.dense.weight": Tensor("ffn_up.weight", "FH"),
            "intermediate.dense.bias": Tensor("ffn_up.bias", "F"),
            "output.dense.weight": Tensor("ffn_down.weight", "HF"),
            "output.dense.bias": Tensor("ffn_down.bias", "H"),
            "output.LayerNorm.weight": Tensor("layer_output_norm.weight", "H"),
            "output.LayerNorm.bias": Tensor("layer_output_norm.bias", "H"),
        },
        last={},
        keys=bert_keys,
        tied=True,
        positions=512,
        ropes=(),
        renamed=((r"^bert\.", ""), (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
        ignored=(r"^pooler\.", r"\.position_ids$"),
    ),
    "NomicBertModel": Family(
        gguf="nomic-bert",
        model_type="nomic_bert",
        task="embedding",
        embedding="embeddings.word_embeddings.weight",
        layer_prefix="layers.{}.",
        first={
            "embeddings.word_embeddings.weight": Tensor("token_embd.weight", "VH"),
            "embeddings.token_type_embeddings.weight": Tensor("token_types.weight", "TH"),
            "embeddings.LayerNorm.weight": Tensor("token_embd_norm.weight", "H"),
            "embeddings.LayerNorm.bias": Tensor("token_embd_norm.bias", "H"),
        },
        layer={
            **ATTENTION,
            "post_attention_layernorm.weight": Tensor("attn_output_norm.weight", "H"),
            "post_attention_layernorm.bias": Tensor("attn_output_norm.bias", "H"),
            **MLP,
            "post_mlp_layernorm.weight": Tensor("layer_output_norm.weight", "H"),
            "post_mlp_layernorm.bias": Tensor("layer_output_norm.bias", "H"),
        },
        last={},
        keys=nomic_keys,
        other_names={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "layer_norm_eps": "layer_norm_epsilon",
            "rope_theta": "rotary_emb_base",
        },
        tied=True,
        positions=2048,
        ropes=("default",),
        theta=1000.0,
        renamed=(
            (r"^nomic_bert\.", ""),
            (r"^encoder\.layers\.", "layers."),
            (r"^emb_ln\.", "embeddings.LayerNorm."),
            (r"\.attn\.Wqkv\.", ".self_attn.Wqkv."),
            (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
            (r"\.mlp\.fc11\.", ".mlp.up_proj."),
            (r"\.mlp\.fc12\.", ".mlp.gate_proj."),
            (r"\.mlp\.fc2\.", ".mlp.down_proj."),
            (r"\.norm1\.", ".post_attention_layernorm."),
            (r"\.norm2\.", ".post_mlp_layernorm."),
        ),
        split={
            "self_attn.Wqkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
        },
        ignored=(r"^pooler\.",),
    ),
}

# model_type → the entry of a decoder
DECODERS = {family.model_type: family for family in FAMILIES.values() if family.task == "causal-lm"}
