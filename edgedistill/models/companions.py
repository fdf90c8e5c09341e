"""The files beside a model's weights that its tokenizer, its processors and its settings load from, by name.

The union over the classes of transformers: a name that is missing here is a file that an exported folder lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from edgedistill.strict import open_regular

TOKENIZER_NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "bpe.codes", "byte_maps.json", "dict.txt",
    "emoji.json", "entity_vocab.json", "normalizer.json", "prophetnet.tokenizer", "sentencepiece.bpe.model",
    "sentencepiece.model", "source.spm", "spiece.model", "spm.model", "spm_char.model", "target.spm",
    "target_vocab.json", "tokenizer.model", "vocab-src.json", "vocab-tgt.json", "word_pronunciation.json",
    "word_shape.json",
)  # fmt: skip
PROCESSOR_NAMES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
SETTINGS_NAMES = ("config.json", "generation_config.json", "config_sentence_transformers.json")


def companions(folder: Path, further: Iterable[str] = ()) -> Iterator[Path]:
    """The files of `folder` that ship beside an exported graph. `further`: names that the tokenizer's class adds."""
    for name in dict.fromkeys((*TOKENIZER_NAMES, *PROCESSOR_NAMES, *SETTINGS_NAMES, *further)):
        path = folder / name
        if path.name == name and path.is_file():
            with open_regular(path, what=name):
                yield path
