"""Random tiny checkpoints of what is no decoder, with a WordPiece tokenizer where they read text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoints import CORPUS

VOCABULARY = 200
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 66,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip
# name → transformers' configuration and class, and the sizes
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", {**BERT, "num_labels": 3}),
    "bert-tokens": ("BertConfig", "BertForTokenClassification", {**BERT, "num_labels": 3}),
    "bert-model": ("BertConfig", "BertModel", BERT),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", {**BERT, "type_vocab_size": 1}),
    "distilbert": (
        "DistilBertConfig", "DistilBertForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64,
         "max_position_embeddings": 64},
    ),
    "vit": (
        "ViTConfig", "ViTForImageClassification",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "image_size": 16, "patch_size": 4},
    ),
    "resnet": (
        "ResNetConfig", "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "t5": (
        "T5Config", "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
         "decoder_start_token_id": 0},
    ),
    "marian": ("MarianConfig", "MarianMTModel", {**BART, "pad_token_id": 0, "decoder_start_token_id": 0}),
}  # fmt: skip


def tiny_encoder(
    folder: Path, kind: str, *, tokenizer: bool = True, seed: int = 0, head: dict[str, Any] | None = None
) -> Path:
    """A random checkpoint of `MODELS`, whose biases and norms are no zeros and ones: what is lost of them is seen.

    `head`: what its configuration says instead.
    """
    import torch
    import transformers

    config_class, model_class, sizes = MODELS[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**sizes, **(head or {})})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed" not in name:
                parameter.mul_(4)  # attention that is far from uniform
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    model.save_pretrained(folder)
    if tokenizer and model.main_input_name == "input_ids":
        word_piece(folder, types=kind.startswith("bert"))
    return folder


def word_piece(folder: Path, *, vocab_size: int = VOCABULARY, types: bool = True) -> None:
    """A WordPiece tokenizer with padding, trained on a few lines."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]",
        "model_input_names": names, "model_max_length": 64,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
