#!/usr/bin/env bash
# Everything that waits for a GPU, in one command for a bare machine: Python 3.12 with torch, transformers, accelerate, onnx and
# onnxruntime, no network. Each step is bounded, the whole ends within eight minutes, and results are written as they come.
#
#   benchmarks/on_gpu.sh --prepare FOLDER          here: fetch what such a machine lacks, as wheels, at most 40 MB
#   benchmarks/on_gpu.sh --wheels FOLDER --out OUT there: all steps (on_gpu.py --help names them)
#   benchmarks/on_gpu.sh --tiny --out OUT          anywhere: tries the steps at tiny sizes, gives no result
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"

# What the steps import beyond what the machine has; tests/benchmarks/test_on_gpu.py holds the list to what they do import.
# Without their requirements: the machine has the rest, torch first of all. transformers and huggingface-hub come in the versions
# that edgedistill asks for, where the machine's are older.
wheels=(annotated-types datasets dill execnet huggingface-hub hypothesis iniconfig liger-kernel multiprocess pluggy pydantic
  pydantic-core pygments pytest pytest-timeout pytest-xdist sortedcontainers transformers trl typing-inspection)

if [[ "${1:-}" == --prepare ]]; then
  folder="${2:?on_gpu.sh --prepare wants the folder for the wheels}"
  mkdir -p "$folder"
  # The versions that are installed here, so that what is tried here is what runs there; the newest of what is not.
  for name in "${wheels[@]}"; do
    version="$("$python" -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$name" \
      2>/dev/null || true)"
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$folder" \
      --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
      --platform any "$name${version:+==$version}"
  done
  bytes="$(cat "$folder"/*.whl | wc -c)"
  ((bytes <= 40000000)) || { echo "on_gpu.sh: the wheels in $folder are $bytes bytes, more than 40 MB" >&2; exit 1; }
  echo "$folder: $(find "$folder" -name '*.whl' | wc -l) wheels, $bytes bytes"
  exit
fi

arguments=()
while (($#)); do
  case "$1" in
    --wheels)
      site="$(mktemp -d)"
      trap 'rm -rf "$site"' EXIT
      "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "${2:?--wheels wants a folder}"/*.whl
      export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
      shift 2
      ;;
    *)
      arguments+=("$1")
      shift
      ;;
  esac
done
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
"$python" "$root/benchmarks/on_gpu.py" ${arguments[@]+"${arguments[@]}"}
