#!/usr/bin/env bash
# Collects the wheels that a bare GPU image lacks, so that scripts/gpu_check.py, `serve` and the tests run there without
# a network:
#   scripts/gpu_wheels.sh [FOLDER]       by default build/gpu-wheels, which git ignores; gpu_check.py looks there
# Versions are those of constraints.txt. PYTHON_VERSION (3.12) and PLATFORM (x86_64) say for what; PYTHON runs pip.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:-build/gpu-wheels}"
python="${PYTHON:-.venv/bin/python}"
version="${PYTHON_VERSION:-3.12}"
machine="${PLATFORM:-x86_64}"
limit_bytes=$((64 * 1024 * 1024))
# what gpu_check.py needs, what `serve` needs beside it, what the tests need
packages="msgspec pyzmq gguf starlette uvicorn httptools pydantic pydantic_core annotated-types typing-inspection
typing_extensions pytest-asyncio"

wanted=()
for package in $packages; do
    line="$(grep -i "^$package==" constraints.txt)" || {
        echo "gpu_wheels.sh: constraints.txt has no version of $package" >&2
        exit 1
    }
    wanted+=("$line")
done
rm -rf "$folder"
mkdir -p "$folder"
"$python" -m pip download --quiet --only-binary :all: --no-deps --dest "$folder" \
    --python-version "$version" --implementation cp --abi "cp${version/./}" --abi abi3 --abi none \
    --platform "manylinux_2_28_$machine" --platform "manylinux_2_26_$machine" --platform "manylinux_2_17_$machine" \
    --platform "manylinux2014_$machine" --platform "manylinux_2_12_$machine" --platform "manylinux2010_$machine" \
    --platform any "${wanted[@]}"
total_bytes=0
for wheel in "$folder"/*.whl; do
    bytes=$(wc -c <"$wheel")
    total_bytes=$((total_bytes + bytes))
    printf '%10d  %s\n' "$bytes" "${wheel##*/}"
done
printf '%10d  bytes in %s\n' "$total_bytes" "$folder"
if [ "$total_bytes" -gt "$limit_bytes" ]; then
    echo "gpu_wheels.sh: that is more than $limit_bytes bytes" >&2
    exit 1
fi
