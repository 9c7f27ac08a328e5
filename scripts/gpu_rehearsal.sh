#!/usr/bin/env bash
# Rehearses on a CPU what will run on a bare GPU image, with its versions of Python, torch, Triton, numpy and
# transformers, and with nothing else but the wheels of scripts/gpu_wheels.sh:
#   scripts/gpu_rehearsal.sh [FOLDER]    the virtual environment, by default build/gpu-image
# 1. gpu_check.py without the wheels says which packages are missing; 2. with them every phase passes or is skipped;
# 3. the Triton kernels compile, and are right in the interpreter (there with an older numpy). No part of
# scripts/test.sh: it downloads another torch and takes some minutes more.
# TORCH_INDEX: an index that has torch's CPU builds; without it the torch is PyPI's CUDA build of some gigabytes.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:-build/gpu-image}"
python="${PYTHON:-python3.12}"
torch="torch==2.11.0"
image="triton==3.6.0 numpy==2.5.2 transformers==5.17.0"
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
run() {
    echo "==> $*" >&2
    "$@"
}
if [ ! -x "$folder/bin/python" ]; then
    run "$python" -m venv "$folder"
    if [ -n "${TORCH_INDEX:-}" ]; then torch="--extra-index-url $TORCH_INDEX $torch+cpu"; fi
    # shellcheck disable=SC2086  # lists of words
    run "$folder/bin/pip" install --quiet $torch
    # shellcheck disable=SC2086
    run "$folder/bin/pip" install --quiet $image pytest pytest-timeout psutil hypothesis
fi
here="$folder/bin/python"
for package in msgspec pyzmq gguf starlette uvicorn httptools pytest-asyncio; do
    if "$here" -m pip show --quiet "$package" 2>/dev/null; then
        echo "gpu_rehearsal.sh: $folder has $package, which the image lacks; remove the folder" >&2
        exit 1
    fi
done
status=0
"$here" scripts/gpu_check.py --device cpu --tiny --wheels "$out" 2>"$out/missing" || status=$?
if [ "$status" != 2 ] || [ "$(wc -l <"$out/missing")" != 1 ] || ! grep -q "lacks msgspec" "$out/missing"; then
    echo "gpu_rehearsal.sh: without wheels gpu_check.py ended with $status and said:" >&2
    cat "$out/missing" >&2
    exit 1
fi
cat "$out/missing"
PYTHON="$here" run scripts/gpu_wheels.sh
run "$here" scripts/gpu_check.py --device cpu --tiny --json "$out/found.json"
run "$here" -m pip install --quiet --no-index --no-deps --target "$out/packages" build/gpu-wheels/*.whl
export PYTHONPATH="$PWD:$out/packages" OMP_NUM_THREADS=1
run "$here" -m pytest -q -p no:cacheprovider tests/triton
# Triton 3.6's interpreter makes numbers of arrays of one element, which numpy refuses from 2.4 on
run "$here" -m pip install --quiet --no-deps --target "$out/packages" "numpy==2.3.5"
TRITON_INTERPRET=1 run "$here" -m pytest -q -p no:cacheprovider tests/triton
