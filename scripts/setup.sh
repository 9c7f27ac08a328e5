#!/usr/bin/env bash
# Makes .venv and installs nexusengine into it with the tested versions. Sourced by serve.sh and test.sh:
#   . scripts/setup.sh EXTRA      EXTRA: "test" adds what the checks need, "" nothing
# Does nothing when .venv already holds what pyproject.toml and constraints.txt ask for.
# PYTHON chooses the interpreter; pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) are respected.

setup() {
    local extra="${1:-}" python="${PYTHON:-}" candidate wanted stamp
    if [ -z "$python" ]; then
        for candidate in python3.12 python3.11 python3.13 python3; do
            if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                python="$candidate"
                break
            fi
        done
    fi
    if [ -z "$python" ]; then
        echo "nexusengine needs Python 3.11 or newer; install it, or name it with PYTHON=/path/to/python" >&2
        return 1
    fi
    wanted="$(cat pyproject.toml constraints.txt | cksum | tr ' ' '-')"
    stamp=".venv/.nexusengine-${extra:-base}"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    if [ ! -x .venv/bin/python ]; then
        echo "==> creating .venv with $("$python" --version)" >&2
        "$python" -m venv .venv || {
            echo "could not create .venv; on Debian and Ubuntu: apt install python3-venv" >&2
            return 1
        }
    fi
    # torch first and by exact version, so that no other package's requirement picks a torch of its own.
    echo "==> installing torch (the first time this takes a minute or two)" >&2
    .venv/bin/python -m pip install --quiet -c constraints.txt torch==2.13.0 || return 1
    echo "==> installing nexusengine${extra:+ with the $extra extra}" >&2
    .venv/bin/python -m pip install --quiet -c constraints.txt -e ".${extra:+[$extra]}" || return 1
    echo "$wanted" >"$stamp"
    if [ "$extra" = test ]; then echo "$wanted" >".venv/.nexusengine-base"; fi
}

setup "$@"
