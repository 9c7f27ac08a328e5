#!/usr/bin/env bash
# Makes .venv and installs nexusengine into it with the tested versions. Sourced by serve.sh and test.sh:
#   . scripts/setup.sh EXTRA      EXTRA: "test" adds what the checks need, "" nothing
# Does nothing when .venv already holds what pyproject.toml and constraints.txt ask for.
# PYTHON chooses the interpreter; pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) are respected.
# TORCH_INDEX: an index that has torch's CPU builds, which are taken where there is no NVIDIA driver. PyPI has none for
# Linux: its wheel is the CUDA build, which computes on a CPU as well but brings gigabytes of libraries.

TORCH_VERSION=2.13.0

has_nvidia_driver() {
    [ -e "${NVIDIA_DRIVER:-/proc/driver/nvidia/version}" ] || command -v nvidia-smi >/dev/null
}

# On a terminal pip shows how far its downloads are; with --quiet it cannot.
install() {
    local quiet=--quiet
    if [ -t 1 ]; then quiet=; fi
    .venv/bin/python -m pip install ${quiet:+"$quiet"} -c constraints.txt "$@"
}

# First and by exact version, so that no other package's requirement picks a torch of its own.
install_torch() {
    echo "==> installing torch (the first time this takes a minute or two)" >&2
    if ! has_nvidia_driver; then
        if install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "torch==$TORCH_VERSION+cpu" 2>.venv/torch.log; then
            return 0
        elif [ -n "${TORCH_INDEX:-}" ]; then
            tail -1 .venv/torch.log >&2
            echo "TORCH_INDEX has no CPU build of torch $TORCH_VERSION for this Python and machine" >&2
            return 1
        fi
        echo "==> there is no NVIDIA driver here, and pip's indexes have no CPU build of torch: taking the one that they" \
            "have (on x86-64 from PyPI a CUDA build of some gigabytes); set TORCH_INDEX to avoid it, see README.md" >&2
    fi
    install "torch==$TORCH_VERSION"
}

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
    install_torch || return 1
    echo "==> installing nexusengine${extra:+ with the $extra extra}" >&2
    install -e ".${extra:+[$extra]}" || return 1
    echo "$wanted" >"$stamp"
    if [ "$extra" = test ]; then echo "$wanted" >".venv/.nexusengine-base"; fi
}

setup "$@"
