"""The tokenizer inside an artifact against the original, on texts where tokenizers tend to differ."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.gguf.pretokenizers import NEW_CHARACTERS_NOTE
from edgedistill.gguf.quantize import CONVERTER
from edgedistill.gguf.tokenizer import GgufTokenizer, read_tokenizer, write_vocabulary
from edgedistill.records.artifact import Artifact
from edgedistill.records.retention import TokenizerCheck
from edgedistill.runtimes.process import RuntimeProcess

TEXT_SHOWN = 60
IDS_SHOWN = 12
TOKENIZERS = ("llama.cpp", "onnxruntime-genai", "transformers")  # runtimes that have one
ADDED_TEXT = "{0}hello {0}\n{0}"  # an added token at the start, behind a space, behind a line end
ADDED_PROBED = 20
MOST_UNEXPLAINED = 0.1  # of the texts: corners of a runtime touch a few, a wrong tokenizer most

# Tokens of control that appear as plain words in texts; the tokenizer's own are added in the check.
CONTROL_LIKE = ("<|im_start|>", "<|eot_id|>", "[INST]", "<s>", "</s>", "<unk>", "<|endoftext|>", "<0x0A>")
VARIED_TEXTS: tuple[str, ...] = (
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "once upon a time there was a little girl named lily . she loved to play outside .",
    "I'm sure they've said we'll go; HE'S here, DON'T go, it`s o'clock.",
    # code
    "def f(x: int) -> str:\n    return f'{x:>8}'  # comment\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; } /* ok */",
    '{"key": [1, 2.5e-3, null], "nested": {"a\\n": true}}',
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\temp\\x.txt",
    "SELECT * FROM t WHERE a>=10 AND b!='x';--",
    # numbers
    "0 1 12 123 1234 12345 123456 3.14159 -2,718.28 1e-10 0xFF 50% $9.99 ½ ² ٣٤٥ १२३",
    # whitespace
    "a b  c   d    e     f",
    " one leading",
    "  two leading",
    "trailing ",
    "trailing two  ",
    "\ttab\t\ttabs \t mixed",
    "line\nline\n\nblank\n\n\ntwo blank\r\nwindows\r\n\r\nblank\rold mac",
    "\n",
    "\n\n \n  \n",
    " ",
    "   ",
    "\u00a0no\u00a0break\u2003em\u3000ideographic\u200bzero\u2028line",
    # scripts
    "你好，世界。今天天气很好！日本語のテキスト、ひらがなカタカナ。한국어 문장입니다.",
    "Привет, мир! Ελληνικά γράμματα. Հայերեն",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם",
    "नमस्ते दुनिया। สวัสดีชาวโลก வணக்கம்",
    "Zażółć gęślą jaźń; Straße, naïve façade, Ångström, İstanbul",
    # combining marks: the same letters as above, decomposed
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m Z\u0351\u036b\u0343a\u0362lgo\u0301",
    # emoji: plain, with skin tone, joined, flags, keycap
    "😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 1️⃣ ❤️‍🔥 end",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀 \U0001f9ff",
    # punctuation and repeats
    "...!!!???---___***###@@@ «quotes» “curly” ‘single’ – — …",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "MixedCASE camelCase snake_case kebab-case UPPER lower",
    "\u2581marked\u2581spaces \ufffd \ue000 \u0001\u001f\u007f",
    " ".join(CONTROL_LIKE),
)


def check_tokenizer(
    hf_tokenizer_dir: Path,
    tokenize: Callable[[str, bool, bool], list[int]],
    *,
    control_tokens_always_parsed: bool = False,
) -> TokenizerCheck:
    """Compare `tokenize(text, add_special, parse_special)` of an artifact with the folder's tokenizer.json.

    Each varied text counts once, and is right when the ids are equal in all three ways of asking: as plain
    text, with special tokens parsed, and with special tokens parsed and BOS/EOS added. Texts made of the
    tokenizer's own added tokens are included. `control_tokens_always_parsed`: the runtime cannot be asked for plain
    text, so that way of asking is left out. Raises UserError where the folder has no tokenizer.json.
    """
    from edgedistill.models.hf_tokenizer import open_for_text, open_tokenizer, tokenizer_tree

    path = hf_tokenizer_dir / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{hf_tokenizer_dir} has no tokenizer.json", "check against the folder of the student")
    plain, parsing = open_for_text(path), open_tokenizer(path)
    texts = probing_texts(tokenizer_tree(path))
    mismatches = 0
    first: str | None = None
    for text in texts:
        parsed = list(parsing.encode(text, add_special_tokens=False).ids)
        asked: list[tuple[bool, bool, list[int]]] = [
            (False, False, list(plain.encode(text, add_special_tokens=False).ids)),
            (False, True, parsed),
            (True, True, list(parsing.encode(text, add_special_tokens=True).ids)),
        ]
        if control_tokens_always_parsed:
            asked = [way for way in asked if way[1]]
        found = [(expected, tokenize(text, special, parse)) for special, parse, expected in asked]
        wrong = next(((expected, got) for expected, got in found if got != expected), None)
        if wrong is not None:
            mismatches += 1
            first = first or _difference(text, *wrong)
    return TokenizerCheck(texts=len(texts), mismatches=mismatches, first_mismatch=first)


def with_checked_tokenizer(artifact: Artifact, folder: Path, checkpoint: Path) -> Artifact:
    """An artifact in `folder`, its tokenizer and chat template held to the checkpoint's in the artifact's runtime.

    Where texts differ and the notes of its kind of tokenizer say why, a note with the first of them is added.
    Raises UserError where texts differ and nothing says why: the tokenizer is wrong; and where the template renders
    something else than in transformers, or nothing. An artifact without a tokenizer,
    or whose runtime has none, is left to verify/faithful.py, which compares the files.
    """
    if artifact.runtime not in TOKENIZERS or not (checkpoint / "tokenizer.json").is_file():
        return artifact
    from edgedistill.runtimes.chat import made_chat

    entry = folder / artifact.entry
    # llama.cpp reads the vocabulary alone; onnxruntime-genai has no way to read a control token in a text as text.
    vocabulary_alone = artifact.runtime == "llama.cpp"
    with RuntimeProcess(
        artifact.runtime, entry, threads=1, context_tokens=0 if vocabulary_alone else 32, use_extra_bufts=False
    ) as process:
        check = check_tokenizer(
            checkpoint,
            lambda text, special, parse: process.tokenize(text, add_special=special, parse_special=parse),
            control_tokens_always_parsed=not vocabulary_alone,
        )
        unread = None if vocabulary_alone else _unread_word(checkpoint, process)
        if artifact.task == "causal-lm":
            made_chat(process, checkpoint)  # what a bundle's recorded conversation refuses is refused here too
    if unread is not None:
        raise UserError(
            f"{checkpoint}: {artifact.runtime} does not find the added word {unread!r} in a text as the original does",
            "add it as AddedToken(..., normalized=False) before training, or choose a format that transformers itself"
            " reads (bitsandbytes)",
        )
    if not check.mismatches:
        return artifact
    runtime = artifact.runtime
    differs = f"{runtime}'s tokens differ on {check.mismatches} of {check.texts} probing texts: {check.first_mismatch}"
    explained = vocabulary_alone and _explained(artifact, entry, checkpoint, check)
    if runtime == "onnxruntime-genai":
        # It reads the checkpoint's own tokenizer.json, which faithful.py compares: what differs is the runtime's doing.
        explained = check.mismatches <= MOST_UNEXPLAINED * check.texts
    if not explained:
        raise UserError(
            f"{checkpoint}: {differs}",
            "the artifact would read text that the model was not trained on: choose another format",
        )
    return artifact.model_copy(update={"notes": [*artifact.notes, differs]})


def _unread_word(checkpoint: Path, process: RuntimeProcess) -> str | None:
    """The first word that was added to the vocabulary, no special token, which the runtime reads otherwise in a text.

    A corner of a runtime touches few texts; such a word is in all that it was added for.
    """
    from edgedistill.models.hf_tokenizer import open_tokenizer, tokenizer_tree

    added = tokenizer_tree(checkpoint / "tokenizer.json").get("added_tokens") or []
    words = [str(a["content"]) for a in added if not a.get("special")][:ADDED_PROBED]
    if not words:
        return None
    original = open_tokenizer(checkpoint / "tokenizer.json")
    for word in words:
        text = ADDED_TEXT.format(word)
        if process.tokenize(text, parse_special=True) != original.encode(text, add_special_tokens=False).ids:
            return word
    return None


def _explained(artifact: Artifact, entry: Path, checkpoint: Path, check: TokenizerCheck) -> bool:
    """Whether what is known of llama.cpp accounts for the differences."""
    try:
        tokenizer = read_tokenizer(checkpoint, vocab_size=artifact.vocab_size)
    except UserError:
        # Unknown here: llama.cpp's own converter wrote it, and answers for corners, not for every second text.
        return CONVERTER in artifact.tool_versions and check.mismatches <= MOST_UNEXPLAINED * check.texts
    # No probing text has the newest characters.
    if all(note == NEW_CHARACTERS_NOTE for note in tokenizer.notes):
        return False
    if CONVERTER not in artifact.tool_versions:
        return True  # faithful.py holds every key to the one that the notes are about
    return _as_ours(tokenizer, entry, checkpoint)


def _as_ours(tokenizer: GgufTokenizer, entry: Path, checkpoint: Path) -> bool:
    """Whether llama.cpp reads every probing text as it does with the keys that edgedistill writes."""
    from edgedistill.models.hf_tokenizer import tokenizer_tree

    texts = probing_texts(tokenizer_tree(checkpoint / "tokenizer.json"))

    def tokens(gguf: Path) -> list[list[list[int]]]:
        with RuntimeProcess("llama.cpp", gguf, threads=1, context_tokens=0, use_extra_bufts=False) as process:
            return [
                process.tokenize_many(texts, add_special=special, parse_special=parse)
                for special, parse in ((False, False), (False, True), (True, True))
            ]

    with tempfile.TemporaryDirectory(prefix="edgedistill.") as scratch:
        ours = Path(scratch) / "vocabulary.gguf"
        write_vocabulary(ours, tokenizer)
        return tokens(ours) == tokens(entry)


def probing_texts(tokenizer_json: Mapping[str, Any]) -> list[str]:
    """The varied texts, and some that are made of the tokenizer's own added tokens."""
    return [*VARIED_TEXTS, *_texts_of_added_tokens(tokenizer_json)]


def _texts_of_added_tokens(tokenizer: Mapping[str, Any]) -> list[str]:
    added = tokenizer.get("added_tokens")
    contents = [str(a["content"]) for a in added if isinstance(a, dict)] if isinstance(added, list) else []
    return [ADDED_TEXT.format(token) for token in contents[:ADDED_PROBED]]


def _difference(text: str, expected: list[int], got: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    window = slice(max(0, at - 2), at + IDS_SHOWN)
    return f"{text[:TEXT_SHOWN]!r} at token {at}: original {expected[window]}, artifact {got[window]}"
