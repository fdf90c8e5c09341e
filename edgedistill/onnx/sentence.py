"""A sentence-transformers folder: what stands behind its transformer, as modules.json and the files beside it say.

modules.json counts, in the form of every version: `sentence_transformers.models.Pooling` and
`sentence_transformers.sentence_transformer.modules.pooling.Pooling` are one thing. A module without settings or weights
(Normalize) may have no folder, for neither git nor hubs keep an empty one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.errors import UserError
from edgedistill.strict import read_json, read_json_value

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"
POOLING_FOLDER, NORMALIZE_FOLDER = "1_Pooling", "2_Normalize"
# Its transformer's own settings; the later names were written for one family each, before 2021.
TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
OWN = "sentence_transformers."
STEPS = ("Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")
# Old keys of a pooling's config.json, in the order in which several are joined.
MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
SENTENCE, TOKENS = "sentence_embedding", "token_embeddings"
ENCODER, CROSS_ENCODER = "SentenceTransformer", "CrossEncoder"
# Settings of the transformer that change what a text becomes, and that are not carried.
NOT_CARRIED = ("processing_kwargs", "query_expansion", "query_length", "document_length")
LOADING = {"dtype", "torch_dtype", "attn_implementation", "trust_remote_code", "add_pooling_layer", "device_map"}
REMEDY = "name what the transformer alone does with --task feature-extraction, and compute the rest outside"


@dataclass(frozen=True)
class Step:
    """A module behind the transformer: its kind (one of STEPS), settings, and the folder of its weights."""

    kind: str
    settings: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True)
class Pipeline:
    """`transformer`: the folder of the model itself. `max_tokens`: what texts are cut to; None: not said.

    `dimensions`: of the embedding so many numbers are kept; None: all. `notes`: what a user of the graph has to do.
    """

    transformer: Path
    steps: tuple[Step, ...]
    max_tokens: int | None = None
    lower_case: bool = False
    dimensions: int | None = None
    notes: tuple[str, ...] = field(default=())


def model_type(checkpoint: Path) -> str | None:
    """ "SentenceTransformer", "CrossEncoder", ... where sentence-transformers' files are there; None where not."""
    said = _settings(checkpoint).get("model_type")
    if isinstance(said, str):
        return said
    if _modules(checkpoint) is None:
        return ENCODER if (checkpoint / POOLING_FOLDER / "config.json").is_file() else None
    transformer = _transformer_settings(model_folder(checkpoint))
    task = transformer.get("transformer_task", "feature-extraction")
    return CROSS_ENCODER if task in ("sequence-classification", "text-generation") else ENCODER


def model_folder(checkpoint: Path) -> Path:
    """The folder of the transformer: the checkpoint itself, or in older folders `0_Transformer`. UserError."""
    for kind, folder, _ in _modules(checkpoint) or ():
        if kind == "Transformer":
            return folder
    return checkpoint


def read_pipeline(checkpoint: Path) -> Pipeline:
    """What the folder does with a text; the mean of the token vectors where no file says anything.

    Raises UserError for a module or a setting that a graph of it would lack.
    """
    listed = _modules(checkpoint)
    if listed is None:
        listed = [("Transformer", checkpoint, "")]
        for kind, name in (("Pooling", POOLING_FOLDER), ("Normalize", NORMALIZE_FOLDER)):
            if kind == "Pooling" or (checkpoint / name).is_dir():
                listed.append((kind, checkpoint / name, name))
    if not listed or listed[0][0] != "Transformer":
        first = listed[0][0] if listed else "nothing"
        raise UserError(f"{checkpoint / MODULES_FILE} begins with {first}, not with a Transformer", REMEDY)
    steps = []
    for kind, folder, name in listed[1:]:
        if kind not in STEPS:
            raise UserError(f"{checkpoint / MODULES_FILE}: a {kind} module, which is not exported", REMEDY)
        path = folder / "config.json"
        settings = read_json(path, what=f"{name}/config.json") if name and path.is_file() else {}
        steps.append(Step(kind, settings, folder))
    if not any(step.kind == "Pooling" for step in steps):
        raise UserError(f"{checkpoint / MODULES_FILE} has no Pooling", REMEDY)
    settings = _settings(checkpoint)
    prompts = {name: text for name, text in (settings.get("prompts") or {}).items() if text}
    for step in steps:
        _require_carried(step, prompts)
    transformer = _transformer_settings(listed[0][1])
    _require_transformer(listed[0][1], transformer)
    longest, kept = transformer.get("max_seq_length"), settings.get("truncate_dim")
    return Pipeline(
        transformer=listed[0][1],
        steps=tuple(steps),
        max_tokens=longest if isinstance(longest, int) and longest > 0 else None,
        lower_case=transformer.get("do_lower_case") is True,
        dimensions=kept if isinstance(kept, int) and kept > 0 else None,
        notes=tuple(_prompt_notes(prompts, settings.get("default_prompt_name"))),
    )


def pooling_modes(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """How token vectors become one, in the old and in the new form; several are joined. Mean where nothing is said."""
    said = settings.get("pooling_mode")
    modes = [said] if isinstance(said, str) else list(said or [])
    modes = modes or [mode for key, mode in MODES.items() if settings.get(key)] or ["mean"]
    unknown = [str(mode) for mode in modes if mode not in MODES.values()]
    unknown += [key for key, on in settings.items() if key.startswith("pooling_mode_") and on and key not in MODES]
    if unknown:
        raise UserError(
            f"the pooling is {', '.join(unknown)}", f"{', '.join(MODES.values())} are exported; or {REMEDY}"
        )
    return tuple(modes)


def activation_of(checkpoint: Path, config: Mapping[str, Any], labels: int) -> str | None:
    """What sentence-transformers' CrossEncoder puts behind a reranker's logits, as a class of torch; None: no reranker.

    Said in config_sentence_transformers.json, by versions before 6 in config.json; Sigmoid for one score otherwise.
    """
    own = config.get("sentence_transformers")
    written = own.get("activation_fn") if isinstance(own, Mapping) else None
    written = written or config.get("sbert_ce_default_activation_function")
    if written is None and model_type(checkpoint) == CROSS_ENCODER:
        written = _settings(checkpoint).get("activation_fn")
    if isinstance(written, str):
        return written
    if model_type(checkpoint) != CROSS_ENCODER:
        return None
    return "torch.nn.modules.activation.Sigmoid" if labels == 1 else "torch.nn.modules.linear.Identity"


def _modules(checkpoint: Path) -> list[tuple[str, Path, str]] | None:
    """(kind, folder, path) of each module, in order; None where there is no modules.json. UserError."""
    path = checkpoint / MODULES_FILE
    if not path.is_file():
        return None
    try:
        rows = [(str(row["type"]), str(row.get("path", ""))) for row in read_json_value(path, what=MODULES_FILE)]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}", "replace it with the model's own modules.json") from error
    found = []
    for kind, name in rows:
        if not kind.startswith(OWN):
            raise UserError(f"{path}: {kind} is code of its own, which is not run", REMEDY)
        folder = checkpoint / name
        if not folder.resolve().is_relative_to(checkpoint.resolve()):
            raise UserError(f"{path}: {name!r} leads out of the folder", "replace it with the model's own modules.json")
        found.append((kind.rpartition(".")[2], folder, name))
    return found


def _settings(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / SETTINGS_FILE
    return read_json(path, what=SETTINGS_FILE) if path.is_file() else {}


def _transformer_settings(folder: Path) -> dict[str, Any]:
    for name in TRANSFORMER_FILES:
        if (folder / name).is_file():
            return read_json(folder / name, what=name)
    return {}


def _require_transformer(folder: Path, settings: Mapping[str, Any]) -> None:
    """UserError for a transformer of which anything but its token vectors is taken, and for settings of its own."""
    text = (settings.get("modality_config") or {}).get("text", {})
    taken = [
        ("transformer_task", settings.get("transformer_task"), "feature-extraction"),
        ("module_output_name", settings.get("module_output_name"), TOKENS),
        ("modality_config: text: method", text.get("method"), "forward"),
        ("modality_config: text: method_output_name", text.get("method_output_name"), "last_hidden_state"),
    ]
    odd = next(((key, said) for key, said, wanted in taken if said not in (None, wanted, [wanted])), None)
    if odd is None:
        odd = next(((key, settings[key]) for key in NOT_CARRIED if settings.get(key)), None)
    for key in ("model_args", "model_kwargs", "config_args", "config_kwargs", "tokenizer_args", "processor_kwargs"):
        further = {name: value for name, value in (settings.get(key) or {}).items() if name not in LOADING}
        further.pop("model_max_length", None)
        odd = odd or ((key, further) if further else None)
    if odd is not None:
        raise UserError(f"{folder}: sentence-transformers' {odd[0]} is {odd[1]!r}, which is not exported", REMEDY)


def _require_carried(step: Step, prompts: Mapping[str, str]) -> None:
    settings = step.settings
    names = {str(settings[key]) for key in ("module_input_name", "module_output_name") if settings.get(key)}
    if names - {SENTENCE}:
        raise UserError(f"{step.folder}: a {step.kind} of {', '.join(sorted(names))}, which is not exported", REMEDY)
    if step.kind == "Pooling":
        pooling_modes(settings)
        if settings.get("include_prompt") is False and prompts:
            raise UserError(
                f"{step.folder}: the prompt's tokens are left out of the pooling (include_prompt is false), and a graph"
                " is not told how many they are",
                REMEDY,
            )


def _prompt_notes(prompts: Mapping[str, str], default: Any) -> Iterator[str]:
    if isinstance(default, str) and default in prompts:
        yield f"sentence-transformers puts the prompt {prompts[default]!r} before every text: do the same"
    elif prompts:
        said = ", ".join(f"{text!r} ({name})" for name, text in prompts.items())
        yield f"sentence-transformers puts prompts before texts where it is asked to: {said}"
