"""A tiny random model of any family of transformers: its own configuration, with the sizes made small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.compare import CLASSES
from pipelines.tokenizer_table import TOKENIZERS, save_tokenizer

LONGEST = 48
# What a configuration calls its sizes, and what they are here.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "emb_dim", "n_embd", "d_embed", "embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 64),
    **dict.fromkeys(("dff", "ffn_hidden_size", "d_inner", "moe_intermediate_size"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size",), 64),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("d_kv", "head_dim", "embedding_size", "rotary_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "seq_length"), 66),
}  # fmt: skip
LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers"),
    *("num_decoder_layers", "num_encoder_layers"),
)
# Families whose decoder starts with the token that ends a text; the others with padding.
START = {
    "bart",
    "mbart",
    "mvp",
    "blenderbot",
    "blenderbot-small",
    "plbart",
    "led",
    "bigbird_pegasus",
    "fsmt",
    "m2m_100",
}
# family → what else its configuration has to say
CHANGES: dict[str, dict[str, Any]] = {
    "reformer": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attn_layers": ["local", "local"],
        "attention_head_size": 16, "local_attn_chunk_length": 8, "feed_forward_size": 64, "num_buckets": 4,
        "max_position_embeddings": 64, "is_decoder": False, "hash_seed": 0,
    },
    "funnel": {"block_sizes": [1, 1, 1], "d_head": 16},
    "canine": {"num_hash_buckets": 64, "local_transformer_stride": 8},
    "longt5": {"local_radius": 8, "global_block_size": 4},
    "squeezebert": {"embedding_size": 32},
    "xmod": {"default_language": "en_XX"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "fsmt": {"langs": ["en", "de"], "src_vocab_size": 600, "tgt_vocab_size": 600},
}  # fmt: skip


def config_of(family: str, *, layers: int = 2, **changes: Any) -> Any:
    """The family's configuration with its sizes made small, within its parts too."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    return kind(**{**_small(kind().to_dict(), layers), **CHANGES.get(family, {}), **changes})


def _small(said: dict[str, Any], layers: int) -> dict[str, Any]:
    found = {}
    for name, value in said.items():
        if isinstance(value, dict) and "model_type" in value:
            found[name] = _small(value, layers) | {"model_type": value["model_type"]}
        elif name in LAYERS and isinstance(value, int):
            found[name] = layers
        elif name in SIZES and isinstance(value, int):
            found[name] = SIZES[name]
    return found


def model_of(family: str, task: str, *, seed: int = 0, **changes: Any) -> Any:
    """Random, with biases and norms that are no zeros and ones, and attention that is far from uniform."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = config_of(family, **changes)
    model = getattr(transformers, CLASSES[task][0]).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed" not in name:
                parameter.mul_(3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def text_checkpoint(
    folder: Path, tokenizer: str, family: str | None = None, task: str | None = None, *, longest: int = LONGEST,
    **changes: Any,
) -> None:  # fmt: skip
    """A model of `family` with a tokenizer of the class; family and task of the tokenizer's row where not given."""
    row = TOKENIZERS[tokenizer]
    family, task = family or row.family, task or row.task
    made = save_tokenizer(tokenizer, folder, model_max_length=longest)
    known = config_of(family).to_dict()
    if task == "text2text":
        changes = {"layers": 1, **changes}  # of encoder and decoder each, for these take longest
    said: dict[str, Any] = {"num_labels": 3} if "classification" in task else {}
    for role in ("pad", "bos", "eos", "sep", "cls", "mask", "unk"):
        token = getattr(made, f"{role}_token_id", None)
        if token is not None and f"{role}_token_id" in known:
            said[f"{role}_token_id"] = token
    if made.eos_token_id is None and made.sep_token_id is not None and "eos_token_id" in known:
        said["eos_token_id"] = made.sep_token_id
    if known.get("is_encoder_decoder"):
        said["decoder_start_token_id"] = made.eos_token_id if family in START else made.pad_token_id
    # Languages' tokens of M2M100 are counted from behind its vocabulary, in no table.
    languages = getattr(made, "lang_token_to_id", None) or {}
    most = max([len(made) - 1, *made.get_vocab().values(), *languages.values()])
    rows = {"vocab_size": most + 1} if "vocab_size" in known else {}
    model_of(family, task, **{**rows, **said, **changes}).save_pretrained(folder)


# What is compared beside the tokenizers' own families. Encoders and decoders with a head that classifies a text:
CLASSIFIERS = (
    *("albert", "bert", "big_bird", "camembert", "canine", "convbert", "data2vec-text", "deberta", "deberta-v2"),
    *("distilbert", "electra", "ernie", "esm", "eurobert", "flaubert", "fnet", "funnel", "gte", "ibert"),
    *("megatron-bert", "mobilebert", "modernbert", "mpnet", "mra", "nystromformer", "perceiver", "reformer"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert", "xlm", "xlm-roberta"),
    *("xlm-roberta-xl", "xlnet", "xmod", "yoso", "layoutlm", "lilt", "longformer", "luke", "markuplm"),
    *("bart", "mbart", "mvp", "plbart", "bigbird_pegasus", "t5", "mt5", "umt5"),
    *("gpt2", "gpt_neo", "gpt_neox", "gptj", "bloom", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma"),
    *("gemma2", "gemma3_text", "phi", "phi3", "falcon", "mpt", "ctrl", "openai-gpt", "biogpt", "stablelm", "smollm3"),
)
WRITERS = (
    *("t5", "mt5", "umt5", "longt5", "switch_transformers", "bart", "mbart", "mvp", "plbart", "pegasus", "pegasus_x"),
    *(
        "blenderbot",
        "blenderbot-small",
        "bigbird_pegasus",
        "led",
        "marian",
        "m2m_100",
        "nllb-moe",
        "prophetnet",
        "fsmt",
    ),
)
OTHERS = ("albert", "bert", "deberta", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta")

# (family, task or any) → what has to be said where it is right to refuse it
REFUSED: dict[tuple[str, str], tuple[str, ...]] = {
    ("layoutlm", ""): ("bbox",),
    ("lilt", ""): ("bbox",),
    ("longformer", ""): ("global_attention_mask",),
    ("luke", ""): ("entity_ids",),
    ("markuplm", ""): ("xpath_tags_seq",),
    ("led", "text2text"): ("global_attention_mask",),
    ("reformer", ""): ("does not run on input_ids",),
    ("canine", ""): ("does not run on input_ids",),
    ("funnel", ""): ("does not run on input_ids",),
    ("perceiver", ""): ("takes inputs",),
    ("prophetnet", "text2text"): ("does not take several tokens with a cache",),
    ("fsmt", "text2text"): ("does not take several tokens with a cache",),
}


def tokenizer_for(family: str) -> str:
    """The tokenizer class that transformers has for a family, where it is one of the table; else one that fits any."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    named = TOKENIZER_MAPPING_NAMES.get(family)
    if family in ("markuplm", "luke", "layoutlm"):  # the model is what is refused
        return "BertTokenizer"
    if family == "bigbird_pegasus":
        return "PegasusTokenizer"
    return named if named in TOKENIZERS else "PreTrainedTokenizerFast"
