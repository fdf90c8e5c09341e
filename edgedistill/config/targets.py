"""Device profiles: what a target has, what it runs best, and how to tell that a machine is one.

A user's own file is loaded as a shipped one is: `--target my-board.yaml`. Where those lie: target_files.py.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edgedistill.config.strict_yaml import dump_yaml, parse_yaml
from edgedistill.config.target_files import MAX_PROFILE_BYTES, target_files
from edgedistill.errors import UserError, did_you_mean
from edgedistill.quantization.kinds import ARTIFACTS, ENCODER_RUNTIMES_OF, RUNTIMES_OF
from edgedistill.records.figures import Figure
from edgedistill.strict import compiled_pattern, local_path, read_text, shown

SEARCHED_CHARS = 100  # of a machine's name: a pattern's search takes longer the longer it is
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
# Names as systems give them. A pattern found in two of these names a kind of machine, not a device.
UNLIKE_DEVICES = (
    "Raspberry Pi 4 Model B Rev 1.4\n4× Cortex-A72",
    "NVIDIA Jetson AGX Orin Developer Kit\n12× Cortex-A78AE",
    "Qualcomm SM8750\n2× Oryon",
    "Google Tensor G4\n1× Cortex-X4 + 3× Cortex-A720 + 4× Cortex-A520",
    "Dell Inc. Latitude 7440\n13th Gen Intel(R) Core(TM) i7-1365U",
    "LENOVO 21K5 Linux x86_64\nAMD Ryzen 7 PRO 7840U w/ Radeon 780M Graphics",
    "Amazon EC2 m7i.xlarge\nIntel(R) Xeon(R) Platinum 8488C",
    "QEMU Standard PC\nAMD EPYC 7763 64-Core Processor",
    "Apple Mac14,3 Darwin arm64\nApple M2",
    "NVIDIA GeForce RTX 4090",
    "NVIDIA A100-SXM4-80GB",
)
_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64", "armv8l": "aarch64"}


class Profile(BaseModel):
    """Base of a profile's sections: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)


def _unit(unit: str) -> Any:
    def check(figure: Figure) -> Figure:
        if figure.unit != unit:
            raise ValueError(f"the unit is {figure.unit!r}; write {unit!r}")
        if not math.isfinite(figure.value) or figure.value <= 0:
            raise ValueError(f"the value is {figure.value}; it is a positive number")
        if not figure.source.strip():
            raise ValueError("the source is empty; say where the figure comes from")
        return figure

    return AfterValidator(check)


Bytes = Annotated[Figure, _unit("B")]
BytesPerSecond = Annotated[Figure, _unit("B/s")]
GigaHertz = Annotated[Figure, _unit("GHz")]
OperationsPerSecond = Annotated[Figure, _unit("op/s")]


class Cluster(Profile):
    """Cores of one kind."""

    name: str = Field(min_length=1)
    cores: int = Field(ge=1, le=4096)
    clock_ghz: GigaHertz | None = None


class Cpu(Profile):
    """The CPU: clusters, big cores first, and the instruction sets that runtimes care about."""

    clusters: list[Cluster] = Field(min_length=1)
    isa: list[str]


class BenchSettings(Profile):
    """How speed is measured on this device. `threads`: the big cores; more can cost 100x (llama.cpp #21763)."""

    threads: int = Field(ge=1, le=4096)
    prompt_tokens: int = Field(ge=1)
    new_tokens: int = Field(ge=2)
    warmup: int = Field(ge=0)
    repeats: int = Field(ge=1)


class Limits(Profile):
    """What a finished artifact must keep on this device, and why."""

    max_artifact_bytes: int = Field(ge=1)
    max_memory_bytes: int = Field(ge=1)
    min_decode_tokens_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_ttft_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    rationale: str = Field(min_length=1)


class Identify(Profile):
    """How to tell that a machine is this target; every condition given must hold.

    `machine` and `gpu` are regular expressions searched, ignoring case, in the machine's name (device-tree
    model, product or SoC name), its CPU's name, or its GPU's name.
    """

    arch: Literal["x86_64", "aarch64"]
    isa: list[str] = []
    machine: str | None = Field(None, max_length=200)
    gpu: str | None = Field(None, max_length=200)
    min_memory_bytes: int | None = Field(None, ge=1)

    @field_validator("machine", "gpu")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            compiled_pattern(value)
        return value


class Target(Profile):
    """A device profile. Figures carry unit, basis and source; what nobody published is left out.

    `default_artifacts` and `allowed_artifacts` are of decoders, `encoder_artifacts` of encoders.
    """

    name: str = Field(pattern=NAME_PATTERN)
    aliases: list[Annotated[str, Field(pattern=NAME_PATTERN)]] = []
    title: str = Field(min_length=1)
    arch: Literal["x86_64", "aarch64"]
    cpu: Cpu
    gpu: str | None = None
    memory_bytes: Bytes
    usable_memory_bytes: Bytes
    runtime_bytes: Bytes
    bandwidth_bytes_per_s: BytesPerSecond
    compute: dict[str, OperationsPerSecond] = {}
    runtimes: list[Literal["llama.cpp", "onnxruntime", "onnxruntime-genai", "transformers", "executorch"]] = Field(
        min_length=1
    )
    default_artifacts: list[str] = Field(min_length=1)
    allowed_artifacts: list[str] = Field(min_length=1)
    encoder_artifacts: list[str] = Field(min_length=1)
    context_tokens: int = Field(ge=8)
    bench: BenchSettings
    limits: Limits
    identify: Identify
    notes: list[str] = []

    @field_validator("default_artifacts", "allowed_artifacts", "encoder_artifacts")
    @classmethod
    def _known_artifacts(cls, value: list[str]) -> list[str]:
        try:
            spelled = [":".join(parse_artifact(artifact)) for artifact in value]
        except UserError as error:
            raise ValueError(f"{error.cause}; {error.remedy}") from error
        if len(set(spelled)) != len(spelled):
            raise ValueError("an artifact appears twice")
        return spelled

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        for artifact in self.default_artifacts:
            if artifact not in self.allowed_artifacts:
                raise ValueError(f"default_artifacts has {artifact}, which allowed_artifacts lacks")
        for field, runtime_of in (("allowed_artifacts", RUNTIMES_OF), ("encoder_artifacts", ENCODER_RUNTIMES_OF)):
            for artifact in getattr(self, field):
                runtime = runtime_of[parse_artifact(artifact)[0]]
                if runtime not in self.runtimes:
                    raise ValueError(f"{field} has {artifact}, but runtimes lacks {runtime}")
        if self.usable_memory_bytes.value >= self.memory_bytes.value:
            raise ValueError("usable_memory_bytes is not less than memory_bytes: take off what the system holds")
        if self.limits.max_memory_bytes > self.usable_memory_bytes.value:
            raise ValueError("limits.max_memory_bytes is more than usable_memory_bytes")
        if self.runtime_bytes.value >= self.limits.max_memory_bytes:
            raise ValueError("runtime_bytes leaves nothing of limits.max_memory_bytes for a model")
        if self.bench.prompt_tokens + self.bench.new_tokens > self.context_tokens:
            raise ValueError("bench.prompt_tokens + bench.new_tokens is more than context_tokens")
        if self.bench.threads > sum(cluster.cores for cluster in self.cpu.clusters):
            raise ValueError("bench.threads is more than the CPU's cores")
        return self


# What people ask for by these words, and what no near name stands for.
NO_PROFILE_YET = ("iphone", "ipad", "ios", "macbook", "coral", "hexagon", "esp32", "browser", "wasm", "webgpu")


def parse_artifact(artifact: str) -> tuple[str, str]:
    """`"gguf:Q4_K_M"` -> `("gguf", "Q4_K_M")`; letter case is forgiven. Raises UserError for what is not known."""
    format_, colon, quantization = artifact.strip().partition(":")
    format_, quantization = format_.lower(), quantization.upper()
    if not colon or not quantization:
        raise UserError(f"artifact {artifact!r} is not FORMAT:QUANTIZATION", "write e.g. gguf:Q4_K_M or onnx:INT4")
    if format_ not in ARTIFACTS:
        raise UserError(f"artifact {artifact!r}: no format '{format_}'", did_you_mean(format_, ARTIFACTS))
    if quantization not in ARTIFACTS[format_]:
        raise UserError(
            f"artifact {artifact!r}: {format_} has no quantization '{quantization}'",
            did_you_mean(quantization, ARTIFACTS[format_]),
        )
    return format_, quantization


def load_targets() -> dict[str, Target]:
    """Every profile that ships with edgedistill, by name."""
    targets: dict[str, Target] = {}
    taken: dict[str, str] = {}
    for path in target_files():
        target = targets_check(path)
        for name in (target.name, *target.aliases):
            if name in taken:
                raise UserError(f"target name '{name}' is taken by {taken[name]} and {path.name}", "rename one")
            taken[name] = path.name
        targets[target.name] = target
    return targets


def load_target(name_or_path: str) -> Target:
    """A profile by name, alias, or path of a YAML file; UserError with the nearest name otherwise."""
    if _is_path(name_or_path):
        return targets_check(name_or_path)
    targets = load_targets()
    for target in targets.values():
        if name_or_path == target.name or name_or_path in target.aliases:
            return target
    known = [name for target in targets.values() for name in (target.name, *target.aliases)]
    if any(word in name_or_path.lower() for word in NO_PROFILE_YET):
        raise UserError(
            f"no target '{name_or_path}': no profile of it ships with edgedistill yet",
            "write one as a file, with a name of its own (`edgedistill targets show phone` has every field),"
            f" or take one of {', '.join(known)}",
        )
    raise UserError(f"no target '{name_or_path}'", did_you_mean(name_or_path, known))


def targets_list() -> list[Target]:
    """The shipped profiles, sorted by name."""
    return list(load_targets().values())


def targets_show(name_or_path: str) -> Target:
    """One profile with all its figures."""
    return load_target(name_or_path)


def targets_check(path_or_name: str | Path) -> Target:
    """Validate a profile file (or a shipped one by name); the Target, or UserError with file, key and remedy."""
    text = str(path_or_name)
    if isinstance(path_or_name, str) and not _is_path(text):
        return load_target(text)
    path = local_path(text, what="target profile")
    return parse_target(read_text(path, what="target profile", max_bytes=MAX_PROFILE_BYTES), where=str(path))


def parse_target(text: str, *, where: str) -> Target:
    """YAML text -> Target; `where` names it in errors. Aliases and repeated keys are refused."""
    tree = parse_yaml(text, where=f"target profile {where}")
    if not isinstance(tree, dict):
        raise UserError(
            f"target profile {where} holds a {type(tree).__name__}",
            "a profile is a mapping; start from `edgedistill targets probe` or `targets show`",
        )
    try:
        return Target.model_validate(tree)
    except ValidationError as error:
        raise _profile_error(error, where) from error


def target_yaml(target: Target) -> str:
    """The profile as YAML text that `targets_check` accepts."""
    return dump_yaml(target.model_dump(exclude_none=True))


def is_this_machine(target: Target, machine: Mapping[str, Any]) -> bool:
    """Whether the machine (as `machine.describe()` gives it) is this target: only then may a figure be `measured`."""
    return why_not(target, machine) is None


def why_not(target: Target, machine: Mapping[str, Any]) -> str | None:
    """What keeps a machine from being known as this target; None: it is the target.

    What the machine does not tell does not match, and a profile that names no device matches none: an architecture
    is common to a notebook and a server.
    """
    identify = target.identify
    arch = str(machine.get("arch", "")).lower()
    if _ARCHITECTURES.get(arch, arch) != identify.arch:
        return f"its architecture is {arch or 'unknown'}, not {identify.arch}"
    lacking = sorted(set(identify.isa) - set(machine.get("isa") or ()))
    if lacking:
        return f"it has no {lacking[0]}"
    if identify.min_memory_bytes and int(machine.get("memory_bytes") or 0) < identify.min_memory_bytes:
        return f"it has {int(machine.get('memory_bytes') or 0):,} bytes of memory, not {identify.min_memory_bytes:,}"
    cores = sum(cluster.cores for cluster in target.cpu.clusters)
    if identify.gpu is None and int(machine.get("cores") or 0) < cores:  # beside a named GPU hosts differ
        return f"it has {machine.get('cores') or 'an unknown number of'} cores, not {cores}"
    names = "\n".join(str(machine.get(key) or "")[:SEARCHED_CHARS] for key in ("machine", "cpu"))
    if identify.machine and not re.search(identify.machine, names, re.IGNORECASE):
        return f"its names ({names.strip().replace(chr(10), ', ') or 'none'}) have nothing of {identify.machine!r}"
    gpu = machine.get("gpu") or ""
    listed = dict.fromkeys(map(str, gpu)) if isinstance(gpu, (list, tuple)) else [str(gpu)]
    gpus = "\n".join(name[:SEARCHED_CHARS] for name in listed)[: 2 * SEARCHED_CHARS]
    if identify.gpu and not re.search(identify.gpu, gpus, re.IGNORECASE):
        return f"its GPU ({gpus.strip() or 'none'}) has nothing of {identify.gpu!r}"
    if not any(_tells_apart(pattern) for pattern in (identify.machine, identify.gpu)):
        return (
            "its profile's `identify` names no device, so that any machine of its kind would match"
            " (`edgedistill targets probe` drafts a profile that does)"
        )
    return None


def _tells_apart(pattern: str | None) -> bool:
    """Whether a pattern names a device: it is found in the names of at most one of several unlike ones."""
    if pattern is None or re.search(pattern, "", re.IGNORECASE):
        return False
    return sum(bool(re.search(pattern, name, re.IGNORECASE)) for name in UNLIKE_DEVICES) <= 1


def _is_path(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) or os.sep in text or "/" in text


def _profile_error(error: ValidationError, where: str) -> UserError:
    first = error.errors()[0]
    loc = list(first["loc"])
    path = ".".join(str(part) for part in loc)
    if first["type"] == "extra_forbidden":
        return UserError(
            f"target profile {where}: unknown key '{path}'", did_you_mean(str(loc[-1]), _fields_at(loc[:-1]))
        )
    if first["type"] == "missing":
        return UserError(f"target profile {where}: '{path}' is missing", "see `edgedistill targets show jetson`")
    seen = first["input"]
    value = f" = {shown(seen, 80)}" if isinstance(seen, (str, int, float, bool, type(None))) else ""
    message = first["msg"].removeprefix("Value error, ")
    at = f"{path}{value}: " if path else ""
    return UserError(f"target profile {where}: {at}{message}", "correct it; `edgedistill targets show` has examples")


def _fields_at(loc: list[int | str]) -> list[str]:
    """Names of the fields of the section that `loc` leads to."""
    model: type[BaseModel] | None = Target
    for part in loc:
        if model is not None and part in model.model_fields:
            model = _section_in(model.model_fields[str(part)].annotation)
    return list(model.model_fields) if model else []


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    for inner in get_args(annotation):
        found = _section_in(inner)
        if found is not None:
            return found
    return None
