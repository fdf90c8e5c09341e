"""A tiny tokenizer of each class of transformers, each with settings of its own that an export could lose.

Lower case or not, where texts are cut and padded, what is put before and behind, languages, files of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.vocabulary import (
    as_json,
    byte_pairs,
    ending_pairs,
    joined_words,
    lines,
    sentencepiece_model,
    space_pairs,
    unigrams,
    word_pieces,
)

BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
T5 = ("<pad>", "</s>", "<unk>")
XLM = ("<s>", "</s>", "<pad>", "<unk>", "<special0>", "<special1>")
FIXED = ("does not run on input_ids",)
NO_CACHE = ("does not take several tokens with a cache",)
THREE = "the fox jumps"
ALBERT = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Row:
    """How a tokenizer is made, a model's family and task that it goes with, and packages that it needs.

    `made(folder, **options)`: an instance; `folder`: an empty one for files that its class is read from.
    """

    made: Callable[..., Any]
    family: str
    task: str = "text-classification"
    options: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    shortest: str = "a"  # that the model takes
    refused: tuple[str, ...] = ()  # what has to be said, where it is right to refuse it


def _pieces(name: str, specials: tuple[str, ...]) -> Callable[..., Any]:
    return lambda folder, **options: _class(name)(vocab=word_pieces(specials), **options)


def _unigram(name: str, specials: tuple[str, ...]) -> Callable[..., Any]:
    return lambda folder, **options: _class(name)(vocab=unigrams(specials), **options)


def _pairs(name: str, table: Callable[..., Any], specials: tuple[str, ...], **kind: Any) -> Callable[..., Any]:
    def made(folder: Path, **options: Any) -> Any:
        vocab, merges = table(specials, **kind)
        return _class(name)(vocab=vocab, merges=merges, **options)

    return made


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _no_files(name: str) -> Callable[..., Any]:
    return lambda folder, **options: _class(name)(**options)


def _prophetnet(folder: Path, **options: Any) -> Any:
    vocab = word_pieces(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[X_SEP]"))
    return _class("ProphetNetTokenizer")(lines(folder / "prophetnet.tokenizer", list(vocab)), **options)


def _word_list(name: str, file: str, words: tuple[str, ...]) -> Callable[..., Any]:
    return lambda folder, **options: _class(name)(lines(folder / file, words), **options)


def _files(name: str, specials: tuple[str, ...], *, header: bool, counts: bool = False) -> Callable[..., Any]:
    """vocab.json and merges.txt as the classes in plain Python read them."""

    def made(folder: Path, **options: Any) -> Any:
        vocab, merges = ending_pairs(specials)
        rows = ["#version: 0.2"] if header else []
        rows += [f"{left} {right}" + (" 9" if counts else "") for left, right in merges]
        return _class(name)(as_json(folder / "vocab.json", vocab), lines(folder / "merges.txt", rows), **options)

    return made


def _joined(name: str) -> Callable[..., Any]:
    """vocab.txt without special tokens, with counts, and bpe.codes."""

    def made(folder: Path, **options: Any) -> Any:
        pieces, merges = joined_words([])
        rows = [f"{piece} 9" for piece in pieces]
        return _class(name)(lines(folder / "vocab.txt", rows), lines(folder / "bpe.codes", merges), **options)

    return made


def _blenderbot_small(folder: Path, **options: Any) -> Any:
    pieces, merges = joined_words(["__null__", "__start__", "__end__", "__unk__"])
    table = {piece: index for index, piece in enumerate(pieces)}
    rows = ["#version: 0.2", *(merge.removesuffix(" 9") for merge in merges)]
    made = _class("BlenderbotSmallTokenizer")
    return made(as_json(folder / "vocab.json", table), lines(folder / "merges.txt", rows), **options)


def _fsmt(folder: Path, **options: Any) -> Any:
    vocab, merges = ending_pairs(("<s>", "<pad>", "</s>", "<unk>"))
    files = {
        "src_vocab_file": as_json(folder / "vocab-src.json", vocab),
        "tgt_vocab_file": as_json(folder / "vocab-tgt.json", vocab),
        "merges_file": lines(folder / "merges.txt", [f"{left} {right} 9" for left, right in merges]),
    }
    return _class("FSMTTokenizer")(langs=["en", "de"], **files, **options)


def _roc_bert(folder: Path, **options: Any) -> Any:
    vocab = word_pieces(BERT)
    shapes = {token: index % 7 for index, token in enumerate(vocab)}
    sounds = {token: index % 5 for index, token in enumerate(vocab)}
    return _class("RoCBertTokenizer")(
        lines(folder / "vocab.txt", list(vocab)), as_json(folder / "word_shape.json", shapes),
        as_json(folder / "word_pronunciation.json", sounds), **options,
    )  # fmt: skip


def _piece_model(name: str, file: str, **kind: Any) -> Callable[..., Any]:
    return lambda folder, **options: _class(name)(sentencepiece_model(folder / file, **kind), **options)


def _marian(folder: Path, **options: Any) -> Any:
    model = sentencepiece_model(folder / "source.spm")
    target = sentencepiece_model(folder / "target.spm")
    vocab = _model_vocab(model, ("</s>", "<unk>")) | {}
    vocab["<pad>"] = len(vocab)
    return _class("MarianTokenizer")(
        source_spm=model, target_spm=target, vocab=as_json(folder / "vocab.json", vocab), source_lang="en",
        target_lang="de", **options,
    )  # fmt: skip


def _m2m_100(folder: Path, **options: Any) -> Any:
    model = sentencepiece_model(folder / "sentencepiece.bpe.model")
    vocab = _model_vocab(model, ("<s>", "<pad>", "</s>", "<unk>"))
    return _class("M2M100Tokenizer")(
        vocab_file=as_json(folder / "vocab.json", vocab), spm_file=model, src_lang="de", tgt_lang="en", **options
    )


def _model_vocab(path: str, specials: tuple[str, ...]) -> dict[str, int]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=path)
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    return {piece: index for index, piece in enumerate(dict.fromkeys([*specials, *pieces]))}


def _backend(folder: Path, **options: Any) -> Any:
    """A tokenizer.json that no class of its own reads, with a normalizer of several steps."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocab, merges = byte_pairs(("<|endoftext|>", "[PAD]", "[CLS]", "[SEP]", "[MASK]"))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )  # fmt: skip
    roles = {"unk_token": "<|endoftext|>", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return _class("PreTrainedTokenizerFast")(tokenizer_object=tokenizer, mask_token="[MASK]", **roles, **options)


# class → its row. Where a class says nothing else, texts are cut at the length that the case gives, on the right.
TOKENIZERS: dict[str, Row] = {
    "BertTokenizer": Row(_pieces("BertTokenizer", BERT), "bert", options={"do_lower_case": False}),
    "DistilBertTokenizer": Row(
        _pieces("DistilBertTokenizer", BERT), "distilbert", "token-classification", {"strip_accents": False}
    ),
    "ConvBertTokenizer": Row(_pieces("ConvBertTokenizer", BERT), "convbert", options={"tokenize_chinese_chars": False}),
    "MPNetTokenizer": Row(
        _pieces("MPNetTokenizer", ("<s>", "<pad>", "</s>", "[UNK]", "<mask>")), "mpnet", "fill-mask",
        {"do_lower_case": False, "truncation_side": "left"},
    ),
    "FunnelTokenizer": Row(
        _pieces("FunnelTokenizer", ("<pad>", "<unk>", "<cls>", "<sep>", "<mask>", "<s>", "</s>")), "funnel",
        options={"do_lower_case": False}, shortest=THREE, refused=FIXED,
    ),
    "SplinterTokenizer": Row(
        _pieces("SplinterTokenizer", (*BERT, "[QUESTION]")), "splinter", "question-answering", {"do_lower_case": False}
    ),
    "LxmertTokenizer": Row(_pieces("LxmertTokenizer", BERT), "bert", options={"padding_side": "left"}),
    "AlbertTokenizer": Row(_unigram("AlbertTokenizer", ALBERT), "albert", options={"keep_accents": True}),
    "FNetTokenizer": Row(_unigram("FNetTokenizer", ALBERT), "fnet", options={"do_lower_case": False}),
    "RemBertTokenizer": Row(
        _unigram("RemBertTokenizer", ("<pad>", "[CLS]", "<unk>", "[SEP]", "[MASK]")), "rembert",
        options={"keep_accents": False},
    ),
    "BigBirdTokenizer": Row(
        _unigram("BigBirdTokenizer", ("<pad>", "</s>", "<s>", "<unk>", "[SEP]", "[MASK]", "[CLS]")), "big_bird"
    ),
    "XLNetTokenizer": Row(
        _unigram("XLNetTokenizer", ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")),
        "xlnet", options={"do_lower_case": True},
    ),
    "CamembertTokenizer": Row(
        _unigram("CamembertTokenizer", ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<mask>", "<s>", "</s>")),
        "camembert", "token-classification",
    ),
    "BarthezTokenizer": Row(
        _unigram("BarthezTokenizer", ("<s>", "<pad>", "</s>", "<unk>", "<mask>")), "mbart", "text2text"
    ),
    "XLMRobertaTokenizer": Row(
        _unigram("XLMRobertaTokenizer", ROBERTA), "xlm-roberta", options={"add_prefix_space": False}
    ),
    "DebertaV2Tokenizer": Row(
        _unigram("DebertaV2Tokenizer", BERT), "deberta-v2", options={"do_lower_case": True, "split_by_punct": True}
    ),
    "T5Tokenizer": Row(_unigram("T5Tokenizer", T5), "t5", "text2text", {"extra_ids": 4, "padding_side": "left"}),
    "PegasusTokenizer": Row(
        _unigram("PegasusTokenizer", ("<pad>", "</s>", "<unk>", "<mask_2>")), "pegasus", "text2text", {"offset": 5}
    ),
    "MBartTokenizer": Row(
        _unigram("MBartTokenizer", ("<s>", "<pad>", "</s>", "<unk>")), "mbart", "text2text",
        {"src_lang": "de_DE", "tgt_lang": "en_XX"},
    ),
    "MBart50Tokenizer": Row(
        _unigram("MBart50Tokenizer", ("<s>", "<pad>", "</s>", "<unk>")), "mbart", "text2text",
        {"src_lang": "fr_XX", "tgt_lang": "en_XX"},
    ),
    "RobertaTokenizer": Row(
        _pairs("RobertaTokenizer", byte_pairs, ROBERTA), "roberta", "fill-mask", {"add_prefix_space": True}
    ),
    "LEDTokenizer": Row(_pairs("LEDTokenizer", byte_pairs, ROBERTA), "bart"),
    "MvpTokenizer": Row(_pairs("MvpTokenizer", byte_pairs, ROBERTA), "mvp"),
    "BlenderbotTokenizer": Row(
        _pairs("BlenderbotTokenizer", byte_pairs, ROBERTA), "blenderbot", "text2text", {"add_prefix_space": False}
    ),
    "DebertaTokenizer": Row(
        _pairs("DebertaTokenizer", byte_pairs, ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")), "deberta",
        options={"add_prefix_space": True},
    ),
    "GPT2Tokenizer": Row(
        _pairs("GPT2Tokenizer", byte_pairs, ("<|endoftext|>",)), "gpt2",
        options={"pad_token": "<|endoftext|>", "add_prefix_space": True},
    ),
    "GPTNeoXTokenizer": Row(
        _pairs("GPTNeoXTokenizer", byte_pairs, ("<|endoftext|>", "<|padding|>")), "gpt_neox", "token-classification"
    ),
    "Qwen2Tokenizer": Row(
        _pairs("Qwen2Tokenizer", byte_pairs, ("<|endoftext|>",)), "qwen2", options={"padding_side": "left"}
    ),
    "CohereTokenizer": Row(
        _pairs(
            "CohereTokenizer", byte_pairs,
            ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
        ), "llama",
    ),
    "CLIPTokenizer": Row(
        _pairs("CLIPTokenizer", ending_pairs, ("<|startoftext|>", "<|endoftext|>")), "clip_text_model",
        "feature-extraction",
    ),
    "HerbertTokenizer": Row(
        _pairs("HerbertTokenizer", ending_pairs, ("<s>", "<pad>", "</s>", "<unk>", "<mask>")), "roberta"
    ),
    "OpenAIGPTTokenizer": Row(
        _pairs("OpenAIGPTTokenizer", ending_pairs, ("<unk>",)), "openai-gpt", options={"pad_token": "<unk>"}
    ),
    "ReformerTokenizer": Row(
        _pairs("ReformerTokenizer", space_pairs, ("<unk>", "</s>", "<pad>")), "reformer",
        options={"pad_token": "<pad>"}, refused=FIXED,
    ),
    "NllbTokenizer": Row(
        _pairs("NllbTokenizer", space_pairs, ("<s>", "<pad>", "</s>", "<unk>", "deu_Latn", "eng_Latn")), "m2m_100",
        "text2text",
        {"src_lang": "deu_Latn", "tgt_lang": "eng_Latn", "additional_special_tokens": ["deu_Latn", "eng_Latn"]},
    ),
    "LlamaTokenizer": Row(
        _pairs("LlamaTokenizer", space_pairs, ("<unk>", "<s>", "</s>", "<pad>"), byte_fallback=True), "llama",
        options={"pad_token": "<pad>", "add_eos_token": True},
    ),
    "CodeLlamaTokenizer": Row(
        _pairs("CodeLlamaTokenizer", space_pairs, ("<unk>", "<s>", "</s>"), byte_fallback=True), "llama",
        options={"pad_token": "</s>", "add_bos_token": False},
    ),
    "GemmaTokenizer": Row(
        _pairs(
            "GemmaTokenizer", space_pairs, ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), byte_fallback=True
        ), "gemma",
    ),
    "PreTrainedTokenizerFast": Row(
        _backend, "modernbert", options={"model_input_names": ["input_ids", "attention_mask"]}
    ),
    # In plain Python
    "CanineTokenizer": Row(_no_files("CanineTokenizer"), "canine", shortest=THREE, refused=FIXED),
    "ByT5Tokenizer": Row(_no_files("ByT5Tokenizer"), "t5", "text2text", {"extra_ids": 3}),
    "PerceiverTokenizer": Row(_no_files("PerceiverTokenizer"), "perceiver", refused=("takes inputs",)),
    "ProphetNetTokenizer": Row(_prophetnet, "prophetnet", "text2text", {"do_lower_case": False}, refused=NO_CACHE),
    "EsmTokenizer": Row(
        _word_list("EsmTokenizer", "vocab.txt", ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHW", "<mask>")),
        "esm", "fill-mask",
    ),
    "CTRLTokenizer": Row(
        _files("CTRLTokenizer", ("<unk>",), header=True), "ctrl", options={"pad_token": "<unk>"}
    ),
    "RoCBertTokenizer": Row(_roc_bert, "roc_bert", options={"do_lower_case": False}),
    "PhobertTokenizer": Row(_joined("PhobertTokenizer"), "roberta"),
    "BertweetTokenizer": Row(_joined("BertweetTokenizer"), "roberta", options={"normalization": True}),
    "BlenderbotSmallTokenizer": Row(_blenderbot_small, "blenderbot-small", "text2text"),
    "FSMTTokenizer": Row(_fsmt, "fsmt", "text2text", {"do_lower_case": True}, ("sacremoses",), refused=NO_CACHE),
    "XLMTokenizer": Row(
        _files("XLMTokenizer", XLM, header=False, counts=True),
        "xlm", needs=("sacremoses",),
    ),
    "FlaubertTokenizer": Row(
        _files("FlaubertTokenizer", XLM, header=False, counts=True), "flaubert",
        options={"do_lowercase": True}, needs=("sacremoses",),
    ),
    "BioGptTokenizer": Row(
        _files("BioGptTokenizer", ("<s>", "<pad>", "</s>", "<unk>"), header=False, counts=True), "biogpt",
        needs=("sacremoses",),
    ),
    # Of sentencepiece's own files
    "MarianTokenizer": Row(_marian, "marian", "text2text", needs=("sentencepiece",)),
    "M2M100Tokenizer": Row(_m2m_100, "m2m_100", "text2text", needs=("sentencepiece",)),
    "BertGenerationTokenizer": Row(
        _piece_model("BertGenerationTokenizer", "spiece.model"), "bert-generation", "feature-extraction",
        needs=("sentencepiece",),
    ),
    "PLBartTokenizer": Row(
        _piece_model("PLBartTokenizer", "sentencepiece.bpe.model"), "plbart", "text2text",
        {"src_lang": "java", "tgt_lang": "en_XX", "language_codes": "base"}, ("sentencepiece",),
    ),
    "GPTSw3Tokenizer": Row(
        _piece_model("GPTSw3Tokenizer", "spiece.model", kind="bpe", pad_id=3), "gpt2", needs=("sentencepiece",)
    ),
}  # fmt: skip


def tokenizer_of(name: str, **further: Any) -> Any:
    """A tiny tokenizer of the class, with its settings."""
    row = TOKENIZERS[name]
    with tempfile.TemporaryDirectory() as folder:
        return row.made(Path(folder), **{**row.options, **further})


def save_tokenizer(name: str, folder: Path, **further: Any) -> Any:
    """Saved into `folder`, opened from the files that its class reads while they are there."""
    row = TOKENIZERS[name]
    with tempfile.TemporaryDirectory() as files:
        made = row.made(Path(files), **{**row.options, **further})
        made.save_pretrained(folder)
    return made
