#!/usr/bin/env bash
# Builds into dist/ a wheel with compiled kernels for each architecture, one without for all others, and the sdist:
#   scripts/build_wheels.sh                    x86_64 and aarch64
#   scripts/build_wheels.sh x86_64             only this one, and neither the plain wheel nor the sdist
# An architecture other than this machine's needs a cross compiler (Debian: apt install g++-aarch64-linux-gnu).
# Each platform tag says which glibc is needed at least; that it is true is checked on the symbols of the library.
# PYTHON chooses the interpreter; it gets the build tools from a venv of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly GLIBC=2.28 LIBSTDCXX=3.4.24 CXXABI=1.3.11 # what manylinux_2_28 allows
out=$PWD/dist
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compiler() { # of an architecture
    if [ "$1" = "$(uname -m)" ]; then echo "${CXX:-g++}"; else echo "$1-linux-gnu-g++"; fi
}

newest() { # version of a symbol set (GLIBC, ...) that a library asks for
    readelf -W --version-info "$2" | grep -oE "\b$1_[0-9.]+" | cut -d_ -f2 | sort -V | tail -1
}

at_most() { # fails if the first version is newer than the second
    [ "$(printf '%s\n' "$1" "$2" | sort -V | tail -1)" = "$2" ]
}

check() { # that a library runs where its wheel can be installed
    local set limit found
    for set in GLIBC:$GLIBC GLIBCXX:$LIBSTDCXX CXXABI:$CXXABI; do
        limit=${set#*:} set=${set%:*}
        found=$(newest "$set" "$1")
        echo "    needs $set ${found:-none} (at most $limit)" >&2
        at_most "${found:-0}" "$limit" || { echo "$1 needs $set $found, newer than $limit" >&2 && return 1; }
    done
}

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet build
mkdir -p "$out" "$work/source"
cp -rL pyproject.toml setup.py README.md LICENSE nexusengine "$work/source"
find "$work/source" -name __pycache__ -prune -exec rm -r {} +
rm -rf "$work/source/nexusengine/native/lib"

for machine in "${@:-x86_64 aarch64}"; do
    # shellcheck disable=SC2086  # the default is two words
    for one in $machine; do
        echo "==> $one" >&2
        command -v "$(compiler "$one")" >/dev/null || { echo "there is no $(compiler "$one")" >&2 && exit 1; }
        lib=$work/source/nexusengine/native/lib
        rm -rf "$lib" "$work/source/build"
        CXX=$(compiler "$one") PYTHONPATH=$work/source "$work/venv/bin/python" -c "
import pathlib, sys
from nexusengine.native.build import build_packaged
build_packaged(sys.argv[1], pathlib.Path(sys.argv[2]))" "$one" "$lib"
        check "$lib"/*.so
        NEXUSENGINE_PLATFORM=manylinux_${GLIBC/./_}_$one "$work/venv/bin/python" -m build --wheel --outdir "$out" "$work/source" >"$work/log" ||
            { cat "$work/log" >&2 && exit 1; }
    done
done
if [ $# = 0 ]; then
    echo "==> without kernels, and sdist" >&2
    rm -rf "$work/source/nexusengine/native/lib" "$work/source/build"
    "$work/venv/bin/python" -m build --wheel --sdist --outdir "$out" "$work/source" >"$work/log" || { cat "$work/log" >&2 && exit 1; }
fi
ls -l "$out" >&2
