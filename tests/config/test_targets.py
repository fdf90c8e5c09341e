"""Device profiles: every shipped one is whole and honest; a wrong one is refused with key and remedy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgedistill.config import target_files
from edgedistill.config import targets as module
from edgedistill.config.target_files import target_rows, targets_folder
from edgedistill.config.targets import (
    ARTIFACTS,
    Target,
    is_this_machine,
    load_target,
    load_targets,
    parse_artifact,
    parse_target,
    target_yaml,
    targets_check,
    targets_list,
    targets_show,
    why_not,
)
from edgedistill.errors import UserError
from edgedistill.fit.sizes import ONNX_FLOAT_BYTES, ONNX_MATMUL_BYTES
from edgedistill.records.figures import Figure

NAMES = [
    "cpu-x86", "jetson-agx-orin", "jetson-orin-nano", "phone-arm64-high", "phone-arm64-mid", "raspberry-pi-5",
    "server-gpu",
]  # fmt: skip


def _tree(name: str = "jetson-orin-nano") -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((targets_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    return tree


def _check(tree: Any, tmp_path: Path) -> Target:
    path = tmp_path / "mine.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
    return targets_check(path)


def _figures(value: Any) -> list[Figure]:
    if isinstance(value, Figure):
        return [value]
    if isinstance(value, dict):
        return [figure for inner in value.values() for figure in _figures(inner)]
    if isinstance(value, list):
        return [figure for inner in value for figure in _figures(inner)]
    if hasattr(value, "__class__") and hasattr(type(value), "model_fields"):
        return [figure for name in type(value).model_fields for figure in _figures(getattr(value, name))]
    return []


def test_the_promised_profiles_are_there() -> None:
    assert [target.name for target in targets_list()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_is_whole_and_honest(name: str) -> None:
    target = load_target(name)
    assert (targets_folder() / f"{name}.yaml").is_file(), "a profile's file has its name"
    figures = _figures(target)
    assert len(figures) >= 4
    # Nobody has measured these devices with this program.
    assert {figure.basis for figure in figures} == {"derived"}
    assert all(len(figure.source) > 15 for figure in figures)
    assert target.limits.max_memory_bytes <= target.usable_memory_bytes.value < target.memory_bytes.value
    # 99th percentile of the time a token: at least 100 samples.
    assert target.bench.repeats * (target.bench.new_tokens - 1) >= 100
    assert target.bench.threads <= sum(cluster.cores for cluster in target.cpu.clusters)


@pytest.mark.parametrize(
    ("name", "artifact"),
    [
        ("jetson-orin-nano", "gguf:Q4_K_M"), ("jetson-agx-orin", "gguf:Q4_K_M"), ("server-gpu", "gguf:Q8_0"),
        ("phone-arm64-high", "gguf:Q4_0"), ("phone-arm64-mid", "gguf:Q4_0"), ("raspberry-pi-5", "gguf:Q4_0"),
        ("cpu-x86", "gguf:Q4_K_M"),
    ],
)  # fmt: skip
def test_default_artifacts(name: str, artifact: str) -> None:
    target = load_target(name)
    assert target.default_artifacts == [artifact]
    assert target.encoder_artifacts == ["onnx:INT8"]


def test_phones_may_ship_onnx_int4_beside_gguf_and_bench_without_little_cores() -> None:
    for name, big in (("phone-arm64-high", 4), ("phone-arm64-mid", 4)):
        target = load_target(name)
        assert "onnx:INT4" in target.allowed_artifacts
        assert "onnxruntime-genai" in target.runtimes
        assert target.bench.threads == big < sum(cluster.cores for cluster in target.cpu.clusters)
    assert "i8mm" in load_target("phone").cpu.isa
    assert "i8mm" not in load_target("phone-arm64-mid").cpu.isa


def test_encoders_need_another_runtime_than_decoders_and_no_allowed_decoder(tmp_path: Path) -> None:
    tree = _tree() | {"runtimes": ["llama.cpp", "onnxruntime"]}
    with pytest.raises(UserError, match="allowed_artifacts has onnx:INT8, but runtimes lacks onnxruntime-genai"):
        _check(tree, tmp_path)
    ggufs = [artifact for artifact in tree["allowed_artifacts"] if artifact.startswith("gguf:")]
    target = _check(tree | {"allowed_artifacts": ggufs}, tmp_path)
    assert target.encoder_artifacts == ["onnx:INT8"]
    with pytest.raises(UserError, match="encoder_artifacts has onnx:INT8, but runtimes lacks onnxruntime"):
        _check(tree | {"allowed_artifacts": ggufs, "runtimes": ["llama.cpp", "onnxruntime-genai"]}, tmp_path)


def test_what_no_runtime_decodes_is_not_offered() -> None:
    """onnxruntime-genai 0.18 cannot decode an FP16 graph on a CPU, and export_onnx refuses it."""
    assert set(ARTIFACTS["onnx"]) >= set(ONNX_MATMUL_BYTES) == set(ONNX_FLOAT_BYTES)
    assert not [t.name for t in targets_list() if "onnx:FP16" in t.allowed_artifacts]


def test_aliases() -> None:
    assert load_target("jetson").name == "jetson-orin-nano"
    assert load_target("phone").name == "phone-arm64-high"
    assert targets_show("jetson") == load_target("jetson-orin-nano") == targets_check("jetson")


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        load_target("jetsen")
    assert "no target 'jetsen'" in caught.value.cause
    assert caught.value.remedy == "did you mean 'jetson'?"
    with pytest.raises(UserError, match=r"known: .*raspberry-pi-5"):
        load_target("qqqq")


def test_a_users_own_file_loads_by_path_and_round_trips(tmp_path: Path) -> None:
    tree = _tree() | {"name": "my-board", "aliases": []}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    target = load_target(str(tmp_path / "mine.yaml"))
    assert target.name == "my-board"
    assert parse_target(target_yaml(target), where="again") == target
    assert "my-board" not in load_targets()


def test_missing_file_folder_and_binary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml is missing"):
        load_target(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="is a folder"):
        targets_check(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-16, not UTF-8"):
        targets_check(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("key", "typo", "meant"),
    [
        ((), "bandwith_bytes_per_s", "bandwidth_bytes_per_s"),
        (("bench",), "thread", "threads"),
        (("limits",), "max_ttft", "max_ttft_ms"),
        (("memory_bytes",), "bases", "basis"),
        (("cpu",), "cluster", "clusters"),
        (("cpu", "clusters", 0), "clock_gz", "clock_ghz"),
        (("compute", "int8"), "values", "value"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(
    key: tuple[str | int, ...], typo: str, meant: str, tmp_path: Path
) -> None:
    tree = _tree()
    section: Any = tree
    for part in key:
        section = section[part]
    section[typo] = 1
    with pytest.raises(UserError) as caught:
        _check(tree, tmp_path)
    assert ".".join([*map(str, key), typo]) in caught.value.cause
    assert caught.value.remedy == f"did you mean '{meant}'?"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "riscv"}, "arch = 'riscv'"),
        ({"name": "../evil"}, r"name = '\.\./evil'"),
        ({"name": "Upper"}, "name = 'Upper'"),
        ({"memory_bytes": {"value": 1, "unit": "GB", "basis": "derived", "source": "x"}}, "unit is 'GB'; write 'B'"),
        ({"memory_bytes": {"value": -1, "unit": "B", "basis": "derived", "source": "x"}}, "value is -1.0"),
        ({"memory_bytes": {"value": float("inf"), "unit": "B", "basis": "derived", "source": "x"}}, "a finite number"),
        ({"memory_bytes": {"value": float("nan"), "unit": "B", "basis": "derived", "source": "x"}}, "a finite number"),
        ({"memory_bytes": {"value": 1, "unit": "B", "basis": "guessed", "source": "x"}}, "basis = 'guessed'"),
        ({"memory_bytes": {"value": 1, "unit": "B", "basis": "derived", "source": " "}}, "source is empty"),
        ({"memory_bytes": {"value": 1, "unit": "B", "basis": "derived"}}, r"memory_bytes\.source' is missing"),
        ({"memory_bytes": {"value": 5e9, "unit": "B", "basis": "derived", "source": "x"}}, "is not less than"),
        ({"default_artifacts": ["gguf:Q4_K_MM"]}, "did you mean 'Q4_K_M'"),
        ({"default_artifacts": ["tflite:INT8"]}, "no format 'tflite'"),
        ({"default_artifacts": ["gguf"]}, "not FORMAT:QUANTIZATION"),
        ({"default_artifacts": ["gguf:BF16"]}, "default_artifacts has gguf:BF16, which allowed_artifacts lacks"),
        ({"default_artifacts": []}, "default_artifacts"),
        ({"default_artifacts": ["gguf:Q4_0", "GGUF:q4_0"]}, "appears twice"),
        ({"runtimes": ["onnxruntime"]}, r"allowed_artifacts has gguf:Q4_K_M, but runtimes lacks llama\.cpp"),
        ({"runtimes": ["tensorrt"]}, "tensorrt"),
        ({"bench": {"threads": 7, "prompt_tokens": 8, "new_tokens": 8, "warmup": 1, "repeats": 1}}, "the CPU's cores"),
        ({"context_tokens": 191}, r"bench\.prompt_tokens \+ bench\.new_tokens is more"),
        ({"limits": {"max_artifact_bytes": 1, "max_memory_bytes": 10**12, "rationale": "x"}}, "more than usable"),
        ({"limits": {"max_artifact_bytes": 1, "max_memory_bytes": 10**8, "rationale": "x"}}, "leaves nothing"),
        ({"limits": {"max_artifact_bytes": 1, "max_memory_bytes": 10**9}}, r"limits\.rationale' is missing"),
        ({"identify": {"arch": "aarch64", "machine": "("}}, "not a regular expression"),
        ({"cpu": {"clusters": [], "isa": []}}, r"cpu\.clusters"),
    ],
)  # fmt: skip
def test_wrong_values_name_key_and_value(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        _check(_tree() | change, tmp_path)


def test_boundaries_are_allowed(tmp_path: Path) -> None:
    tree = _tree()
    tree["context_tokens"] = tree["bench"]["prompt_tokens"] + tree["bench"]["new_tokens"]
    tree["limits"]["max_memory_bytes"] = tree["usable_memory_bytes"]["value"]
    tree["default_artifacts"] = ["GGUF:q4_0"]
    target = _check(tree, tmp_path)
    assert target.context_tokens == 192
    assert target.default_artifacts == ["gguf:Q4_0"], "one spelling, whatever was written"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds a NoneType"),
        ("- a\n- b\n", "holds a list"),
        ("a: [1,", "not YAML"),
        ("a: !!python/object/apply:os.system [true]", "tags are not read"),
        ("a: &x [1, 2]\nb: *x\n", "anchors are not read"),
        ("a: &a [x]\nb: &b [*a, *a, *a, *a]\nc: [*b, *b, *b, *b]\n", "anchors are not read"),
        ("name: a\nname: b\n", "appears twice"),
        ("a: " + "[" * 60000 + "]" * 60000, "nested more than|nesting depth"),
        ("[" * 200000, "nested more than|nesting depth"),
        ("? [a, b]\n: 1\n", "keys are plain text"),
        ("[" * 3000, "target profile"),
        ("name: 2020-99-99\n", "target profile"),
    ],
)
def test_hostile_yaml_is_refused_shortly(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _check(text, tmp_path)
    assert len(str(caught.value)) < 600


def test_large_files_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="262,145 bytes"):
        _check("#" * (module.MAX_PROFILE_BYTES + 1), tmp_path)
    with pytest.raises(UserError, match="holds a NoneType"):
        _check("#" * module.MAX_PROFILE_BYTES, tmp_path)


def test_parse_artifact() -> None:
    assert parse_artifact("gguf:Q4_K_M") == parse_artifact(" GGUF:q4_k_m ") == ("gguf", "Q4_K_M")
    assert all(parse_artifact(f"{f}:{q}") == (f, q) for f, qs in ARTIFACTS.items() for q in qs)
    for wrong in ("", ":", "gguf:", ":Q4_0", "Q4_K_M", "gguf:INT4", "onnx:Q4_0"):
        with pytest.raises(UserError):
            parse_artifact(wrong)
    with pytest.raises(UserError, match="did you mean 'gguf'"):
        parse_artifact("ggfu:Q4_0")


GB = 10**9
JETSON = {"machine": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "cpu": "6× Cortex-A78AE",
          "arch": "aarch64", "isa": ["dotprod", "fp16", "neon"], "cores": 8, "memory_bytes": 7.6 * GB,
          "gpu": []}  # fmt: skip
AGX = JETSON | {"machine": "Jetson AGX Orin Developer Kit", "cores": 12, "memory_bytes": 65 * GB}
PC = {"machine": "PC", "cpu": "Intel(R) Core(TM) i7-8700", "arch": "x86_64", "isa": ["avx2"], "cores": 12,
      "memory_bytes": 16 * GB, "gpu": []}  # fmt: skip
MACHINES: list[tuple[dict[str, Any], set[str]]] = [
    (JETSON, {"jetson-orin-nano"}),
    (JETSON | {"memory_bytes": 3.6 * GB}, set()),  # the 4 GB module is another device
    (JETSON | {"cores": 4}, set()),  # a power mode that switches two of its cores off
    (AGX, {"jetson-agx-orin"}),
    (JETSON | {"machine": "Raspberry Pi 5 Model B Rev 1.0", "cpu": "4× Cortex-A76"}, {"raspberry-pi-5"}),
    (JETSON | {"machine": "Raspberry Pi 500 Rev 1.0"}, set()),
    (JETSON | {"machine": "Raspberry Pi 4 Model B", "isa": ["neon"]}, set()),
    (JETSON | {"machine": "Snapdragon 8 Gen 3 SM8650", "isa": ["dotprod", "i8mm"]}, {"phone-arm64-high"}),
    (JETSON | {"machine": "SM8650", "isa": ["dotprod"]}, set()),
    # cpu-x86 stands for a class of machines: none of them is the one whose figures it holds
    (PC, set()),
    (PC | {"arch": "AMD64", "isa": [], "memory_bytes": None, "gpu": None}, set()),
    (PC | {"machine": "DGX", "gpu": ["NVIDIA H200"]}, {"server-gpu"}),
    (PC | {"machine": "DGX", "gpu": ["NVIDIA A100"]}, set()),
    ({"machine": "an H200 in the name only", "arch": "x86_64"}, set()),
    ({}, set()),
]  # fmt: skip


@pytest.mark.parametrize(("machine", "expected"), MACHINES)
def test_a_machine_is_told_apart(machine: dict[str, Any], expected: set[str]) -> None:
    assert {target.name for target in targets_list() if is_this_machine(target, machine)} == expected


@pytest.mark.parametrize("pattern", [None, "", ".*", "Linux|Intel|AMD", "x", "(?i)I"])
def test_a_profile_that_names_no_device_matches_no_machine(pattern: str | None) -> None:
    target = load_target("cpu-x86")
    machine = {**PC, "machine": "Linux x86_64"}
    named = target.model_copy(update={"identify": target.identify.model_copy(update={"machine": "i7-8700"})})
    assert why_not(named, machine) is None
    identify = target.identify.model_copy(update={"machine": pattern})
    why = why_not(target.model_copy(update={"identify": identify}), machine)
    assert why is not None and "names no device" in why


def test_names_taken_twice_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(_tree() | {"name": name}), encoding="utf-8")
    monkeypatch.setattr(target_files, "targets_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=r"'jetson' is taken by a\.yaml and b\.yaml"):
        load_targets()
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no device profiles"):
        load_targets()


def test_profiles_are_found_inside_an_installed_package_too(tmp_path: Path) -> None:
    """A wheel has the profiles in edgedistill/_targets and no targets/ beside the package."""
    source = Path(module.__file__).parents[1]
    package = tmp_path / "edgedistill"
    (package / "_targets").mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "strict.py", "config", "records", "quantization"):
        copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
        copy(source / name, package / name)
    (package / "_targets" / "cpu-x86.yaml").write_bytes((targets_folder() / "cpu-x86.yaml").read_bytes())
    code = "from edgedistill.config.targets import targets_list; print([t.name for t in targets_list()])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['cpu-x86']"


def test_the_list_says_what_the_profiles_say() -> None:
    assert target_rows() == [
        (
            t.name, t.aliases, t.title, t.default_artifacts, t.usable_memory_bytes.value, t.bandwidth_bytes_per_s.value,
        )
        for t in targets_list()
    ]  # fmt: skip


def test_a_damaged_profile_is_named_by_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_files, "targets_folder", lambda: tmp_path)
    for text in ("name: x\n", "[]\n", "1\n", yaml.safe_dump(_tree() | {"usable_memory_bytes": {"value": "x"}})):
        (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"x\.yaml is damaged"):
            target_rows()


def test_listing_targets_loads_no_models() -> None:
    code = (
        "import sys; from edgedistill.cli.app import run\n"
        "try:\n    run(['targets', 'list'])\nfinally:\n    print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cpu-x86" in done.stdout and "'pydantic'" not in done.stdout, "that alone takes half of the time"


def test_importing_targets_and_plan_is_light() -> None:
    code = (
        "import sys, edgedistill.config.targets, edgedistill.plan.plan; edgedistill.config.targets.load_targets();"
        "print([m for m in ('torch', 'transformers', 'numpy', 'onnx', 'gguf', 'llama_cpp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
