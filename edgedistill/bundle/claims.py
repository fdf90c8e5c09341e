"""What a manifest says that can be told false without opening another file: held to itself before anything is read.

A bundle that was changed and sealed again has hashes that are right. What is left to catch it is that its figures
belong together: each is recomputed from others here, from the records in `judge.py`, and from the artifact's own
bytes in `contents.py`.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

from pydantic import ValidationError

from edgedistill import __version__
from edgedistill.bundle.npy import array_bytes
from edgedistill.bundle.samples import sample_names
from edgedistill.config.targets import Target, targets_list
from edgedistill.errors import UserError
from edgedistill.models.hf_tokenizer import TOKENIZER_FILES
from edgedistill.quantization.kinds import ARTIFACTS, RUNTIMES_OF
from edgedistill.records.base import FileEntry
from edgedistill.records.golden import Golden
from edgedistill.records.manifest import MANIFEST, REMEDY, BundleArtifact, Manifest, Tensor
from edgedistill.records.reading import first_fault
from edgedistill.statistics import MIN_UNITS
from edgedistill.store import combined_sha256
from edgedistill.strict import shown

# What a tokenizer's hash is taken over: nothing is in preprocess/ that no hash of the student holds.
PREPROCESS_FILES = TOKENIZER_FILES
DOCUMENTS = (
    "README.md", "MODEL_CARD.md", "LICENSE", "NOTICE", "sbom.cdx.json", "reports/report.html", "samples/README.md",
)  # fmt: skip
MAX_DOCUMENT_BYTES = 16 << 20
MAX_PROMPT_BYTES = 64 << 10
MAX_RECORD_BYTES = 16 << 20  # latency.json holds every sample
# tokenizer.json of the largest vocabularies takes about 130 bytes a token.
TOKENIZER_BYTES_A_TOKEN = 400
TOKENIZER_BYTES = 2 << 20
OTHER_TOKENIZER_BYTES = 32 << 20
SPEED_FACTOR = 2.0  # between a median of ratios and the ratio of the medians: runs vary by less


def refuse(what: str) -> NoReturn:
    """A claim that is not true."""
    raise UserError(what, REMEDY)


def check_claims(manifest: Manifest) -> None:
    """Raises UserError naming what in the manifest cannot be, by what else it says."""
    listed = {entry.path: entry for entry in manifest.files}
    artifacts = manifest.artifacts
    for field in ("name", "folder", "reports"):
        values = [getattr(artifact, field) for artifact in artifacts]
        if len(set(values)) != len(values):
            refuse(f"{MANIFEST} has two artifacts with the {field} {shown(values[0])}")
    for artifact in artifacts:
        _check_artifact(artifact, listed)
        _check_golden(artifact, listed)
    _check_models(manifest)
    _check_files(manifest, listed)
    context = context_asked(manifest)
    for artifact in artifacts:
        # A GGUF's header may say fewer, to which gguf_facts.py holds it.
        if artifact.context_tokens > context or (artifact.format != "gguf" and artifact.context_tokens != context):
            refuse(
                f"{MANIFEST}: {artifact.name} has a context of {artifact.context_tokens}, and was made for {context}"
            )
    limits = target_of(manifest).limits.model_dump(mode="json")
    if manifest.limits != {**limits, "context_tokens": artifacts[0].context_tokens}:
        refuse(f"{MANIFEST}: limits are not those of its target and the context of {artifacts[0].name}")
    if manifest.tool_versions.get("edgedistill") != manifest.edgedistill:
        refuse(f"{MANIFEST}: edgedistill is {shown(manifest.edgedistill)}, and another version in tool_versions")
    recipe = manifest.recipe
    if recipe.get("name") != manifest.student.name or manifest.seeds != {"recipe": recipe.get("seed")}:
        refuse(f"{MANIFEST}: the student's name and the seeds are not those of its recipe")


def _check_artifact(artifact: BundleArtifact, listed: dict[str, FileEntry]) -> None:
    name, format_ = artifact.name, artifact.format
    if name != f"{format_}:{artifact.quantization}":
        refuse(f"{MANIFEST}: the artifact {shown(name)} is {format_}:{shown(artifact.quantization)}")
    if artifact.quantization not in ARTIFACTS[format_]:
        refuse(f"{MANIFEST}: {format_} has no quantization {shown(artifact.quantization)}")
    if {artifact.runtime, artifact.golden.runtime} != {RUNTIMES_OF[format_]}:
        refuse(f"{MANIFEST}: {artifact.runtime} with vectors of {shown(artifact.golden.runtime)} runs no {format_}")
    for entry in artifact.files:
        if listed.get(path := f"{artifact.folder}/{entry.path}") != entry.model_copy(update={"path": path}):
            refuse(f"{MANIFEST} disagrees with itself about {shown(path)}")
    if len({entry.path for entry in artifact.files}) != len(artifact.files):
        refuse(f"{MANIFEST} lists a file of {name} twice")
    if artifact.bytes != sum(entry.bytes for entry in artifact.files):
        refuse(f"{MANIFEST}: {name} has {sum(e.bytes for e in artifact.files)} bytes, not {artifact.bytes}")
    if combined_sha256(artifact.files) != artifact.sha256:
        refuse(f"{MANIFEST}: the sha256 of {name} is not that of its files")
    if artifact.entry != "." and artifact.entry not in {entry.path for entry in artifact.files}:
        refuse(f"{MANIFEST} names {shown(artifact.entry)} in {name}, which is not a file of the bundle")
    if artifact.retention != f"{artifact.reports}/retention.json":
        refuse(f"{MANIFEST}: the retention of {name} is not in {shown(artifact.reports)}: {shown(artifact.retention)}")
    if artifact.latency not in (None, f"{artifact.reports}/latency.json"):
        refuse(f"{MANIFEST}: the latency of {name} is not in {shown(artifact.reports)}: {shown(artifact.latency)}")
    if not 0 < artifact.bits_per_weight <= 8 * artifact.bytes / artifact.parameters * (1 + 1e-9):
        refuse(
            f"{MANIFEST}: {artifact.bits_per_weight:g} bits a weight are not what {artifact.bytes:,} bytes give "
            f"{artifact.parameters:,} parameters"
        )
    _check_signature(artifact)
    _check_parity(artifact)
    _check_speed(artifact)


def _check_parity(artifact: BundleArtifact) -> None:
    """An export ends where the runtime's differences are beyond their limit, or a token that is compared differs."""
    parity, where = artifact.parity, f"{MANIFEST}: parity of {artifact.name}"
    if parity is None:
        return
    figures = (parity.max_abs_difference, parity.mean_abs_difference, parity.relative_rms, parity.limit)
    if not all(0 <= one < math.inf for one in figures) or parity.relative_rms > parity.limit:
        refuse(f"{where}: relative_rms is {parity.relative_rms:g}, and the limit {parity.limit:g}")
    if parity.mean_abs_difference > parity.max_abs_difference * (1 + 1e-6):
        refuse(f"{where}: a mean of {parity.mean_abs_difference:g} is beyond the largest difference")
    tokens, equal = parity.greedy_tokens or 0, parity.greedy_tokens_equal or 0
    compared = tokens if parity.greedy_compared is None else parity.greedy_compared
    if not 0 <= equal <= compared <= tokens or (parity.greedy_compared is not None and equal != compared):
        refuse(f"{where}: {equal} greedy tokens are equal, of {compared} compared of {tokens}")


def _check_speed(artifact: BundleArtifact) -> None:
    """`ratio` is the median of ratios, near that of the medians; it pays where its whole interval lies below 1."""
    speed, where = artifact.speed, f"{MANIFEST}: speed of {artifact.name}"
    if speed is None:
        return
    if not min(speed.float_ms, speed.quantized_ms, speed.ratio) > 0 or speed.pairs < 1:
        refuse(f"{where}: {speed.pairs} pairs of {speed.float_ms:g} and {speed.quantized_ms:g} ms")
    medians = speed.quantized_ms / speed.float_ms
    if not 1 / SPEED_FACTOR < speed.ratio / medians < SPEED_FACTOR:
        refuse(f"{where}: the ratio is {speed.ratio:g}, and its milliseconds give {medians:g}")
    ci95 = speed.ratio_ci95
    if ci95 is not None and (
        speed.pairs < MIN_UNITS or not ci95[0] * (1 - 1e-9) <= speed.ratio <= ci95[1] * (1 + 1e-9)
    ):
        refuse(
            f"{where}: the ratio {speed.ratio:g} of {speed.pairs} pairs has an interval of {ci95[0]:g} to {ci95[1]:g}"
        )
    if speed.pays != (ci95 is not None and ci95[1] < 1):
        refuse(f"{where}: pays is {speed.pays}, and the ratio's interval says otherwise")


def _check_signature(artifact: BundleArtifact) -> None:
    """Inputs and outputs of the formats that have no graph of their own; a graph's are read in `contents.py`."""
    if artifact.format != "onnx" and (artifact.inputs, artifact.outputs) != signature_of(
        artifact.format, artifact.vocab_size
    ):
        refuse(f"{MANIFEST}: inputs and outputs of {artifact.name} are not those of {artifact.runtime}")


def signature_of(format_: str, vocab_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """What llama_decode takes and gives, or a folder's forward."""
    if format_ == "gguf":
        logits = Tensor(name="logits", dtype="float32", shape=["tokens", vocab_size])
        return [Tensor(name="tokens", dtype="int32", shape=["tokens"])], [logits]
    logits = Tensor(name="logits", dtype="bfloat16", shape=["batch", "tokens", vocab_size])
    return [Tensor(name="input_ids", dtype="int64", shape=["batch", "tokens"])], [logits]


def _check_golden(artifact: BundleArtifact, listed: dict[str, FileEntry]) -> None:
    golden, name = artifact.golden, artifact.name
    if golden.context_tokens > artifact.context_tokens:
        refuse(f"{MANIFEST}: golden vectors of {name} take {golden.context_tokens} tokens, its context has fewer")
    if len({output.name for output in golden.outputs}) != len(golden.outputs):
        refuse(f"{MANIFEST}: golden vectors of {name} have an output twice")
    if any(output.tolerance or output.largest_seen for output in golden.outputs if output.name in ("tokens", "greedy")):
        refuse(f"{MANIFEST}: token ids of {name} are equal or wrong, and a tolerance is given")
    paths = [path for case in golden.cases for path in (case.prompt, *golden.files(case))]
    if len(set(paths)) != len(paths):
        refuse(f"{MANIFEST}: two golden cases of {name} share a file")
    for number, case in enumerate(golden.cases):
        if case.greedy_compared > golden.new_tokens:
            refuse(
                f"{MANIFEST}: golden case {number} of {name} compares {case.greedy_compared} of {golden.new_tokens} "
                "greedy tokens"
            )
        if case.token_count + golden.new_tokens > golden.context_tokens:
            refuse(f"{MANIFEST}: golden case {number} of {name} has more tokens than their context")
        for path, size in golden_sizes(golden, number).items():
            if path not in listed or not path.startswith("golden/"):
                refuse(f"{MANIFEST} names {shown(path)} in {name}, which is not a file of the bundle in golden/")
            found = listed[path].bytes
            if found != size if size is not None else found > MAX_PROMPT_BYTES:
                wanted = f"not {size}" if size is not None else f"more than {MAX_PROMPT_BYTES}"
                refuse(f"{MANIFEST}: {path} has {found} bytes, {wanted}")


def golden_sizes(golden: Golden, number: int) -> dict[str, int | None]:
    """Path → bytes of a case's files; None for the prompt, which may have any."""
    case = golden.cases[number]
    arrays = golden.files(case).items()
    return {case.prompt: None, **{path: array_bytes(dtype, shape) for path, (dtype, shape) in arrays}}


def _check_models(manifest: Manifest) -> None:
    """Parameters are those of the shape, of the artifacts too; the vocabulary is the student's."""
    student = manifest.student
    models = [student, *filter(None, [manifest.teacher]), *manifest.further_teachers]
    for model in models:
        if model.parameters != model.shape.parameters:
            refuse(
                f"{MANIFEST}: {shown(model.name)} has {model.parameters:,} parameters, and its shape gives "
                f"{model.shape.parameters:,}"
            )
    for artifact in manifest.artifacts:
        if (artifact.parameters, artifact.vocab_size) != (student.parameters, student.shape.vocab_size):
            refuse(
                f"{MANIFEST}: {artifact.name} has {artifact.parameters:,} parameters and {artifact.vocab_size:,} "
                f"tokens, its student {student.parameters:,} and {student.shape.vocab_size:,}"
            )


def target_of(manifest: Manifest) -> Target:
    """The device profile in the manifest. Raises UserError where it is none."""
    try:
        return Target.model_validate(manifest.target)
    except ValidationError as error:
        refuse(f"{MANIFEST}: target: {first_fault(error)}")


def recipe_part(manifest: Manifest, *names: str) -> dict[str, Any]:
    """A section of the recipe as the manifest has it; empty where it has none. UserError where it is no mapping."""
    part: Any = manifest.recipe
    for name in names:
        part = part.get(name, {})
        if not isinstance(part, dict):
            refuse(f"{MANIFEST}: recipe.{'.'.join(names)} is {shown(part)}, which is not a mapping")
    return dict(part)


def context_asked(manifest: Manifest) -> int:
    """Tokens that the artifacts were exported for: the recipe's, else the target's, within the model's positions."""
    asked = recipe_part(manifest, "export").get("context_tokens") or target_of(manifest).context_tokens
    if not isinstance(asked, int):
        refuse(f"{MANIFEST}: the recipe's export.context_tokens is {shown(asked)}")
    return min(asked, manifest.student.shape.max_position_embeddings)


def profile_notes(manifest: Manifest) -> list[str]:
    """A profile of one's own may have a shipped one's name; its figures are then not those that the name tells of."""
    if manifest.edgedistill != __version__:
        return []
    target = target_of(manifest)
    ours = next((one for one in targets_list() if one.name == target.name), None)
    if ours is None or ours == target:
        return []
    other = [name for name in type(ours).model_fields if getattr(ours, name) != getattr(target, name)]
    return [f"the profile {target.name} is not the one of edgedistill {__version__}: {', '.join(other)} differ"]


def _check_files(manifest: Manifest, listed: dict[str, FileEntry]) -> None:
    """Nothing but what a bundle holds, none of it larger than it can be."""
    known: dict[str, float] = dict.fromkeys(DOCUMENTS, MAX_DOCUMENT_BYTES)
    formats = [artifact.format for artifact in manifest.artifacts]
    known |= dict.fromkeys(sample_names(formats), MAX_DOCUMENT_BYTES)
    vocabulary = max(artifact.vocab_size for artifact in manifest.artifacts)
    known |= {f"preprocess/{name}": OTHER_TOKENIZER_BYTES for name in PREPROCESS_FILES}
    known["preprocess/tokenizer.json"] = TOKENIZER_BYTES + TOKENIZER_BYTES_A_TOKEN * vocabulary
    for artifact in manifest.artifacts:
        known |= {f"{artifact.folder}/{entry.path}": math.inf for entry in artifact.files}
        known |= {path: MAX_RECORD_BYTES for path in (artifact.retention, artifact.latency) if path}
        for number in range(len(artifact.golden.cases)):
            known |= dict.fromkeys(golden_sizes(artifact.golden, number), MAX_DOCUMENT_BYTES)
        if artifact.folder != "model" and not artifact.folder.startswith("model/"):
            refuse(f"{MANIFEST}: the folder of {artifact.name} is not in model/: {shown(artifact.folder)}")
    for path, entry in listed.items():
        if path not in known:
            refuse(f"{MANIFEST} lists {shown(path)}, which is not part of a bundle")
        if entry.bytes > known[path]:
            refuse(f"{MANIFEST}: {path} has {entry.bytes:,} bytes, more than {known[path]:,.0f}")
    needed = [*DOCUMENTS, "preprocess/tokenizer.json"]
    needed += [path for artifact in manifest.artifacts for path in (artifact.retention, artifact.latency) if path]
    for path in needed:
        if path not in listed:
            refuse(f"{MANIFEST} does not list {path}, which every bundle holds")
