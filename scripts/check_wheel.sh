#!/usr/bin/env bash
# Installs the wheel as a user would, in a clean venv without the tests' packages and away from this checkout, and runs
# the README's commands with it:
#   scripts/check_wheel.sh [python3.11 python3.12 ...]        by default python3
# Fails on a command that fails, on a traceback, and where a kernel had to be compiled. WHEEL names another wheel than
# the one that scripts/build_wheels.sh makes for this machine. VENVS=FOLDER keeps the venvs there, and uses them again.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null; rm -rf "$work"' EXIT
if [ -z "${WHEEL:-}" ]; then
    scripts/build_wheels.sh "$(uname -m)" >"$work/build.log" 2>&1 || { cat "$work/build.log" && exit 1; }
    WHEEL=$(ls "$root"/dist/nexusengine-*manylinux*"_$(uname -m).whl")
fi
wheel=$(realpath "$WHEEL")
unset PYTHONPATH
export CXX=there-is-no-compiler # nothing may be compiled

failed() {
    echo "FAILED: $1" >&2
    cat "$work/said" >&2
    exit 1
}

try() { # a command whose output is in $work/said afterwards
    if ! timeout 300 "$@" >"$work/said" 2>&1 </dev/null; then failed "$*"; fi
    if grep -qE "^Traceback|ModuleNotFoundError|ImportError" "$work/said"; then failed "$*"; fi
    echo "    $(date +%T) ok: ${*/#$bin\//}" | cut -c1-120
}

try_post() { # path, JSON
    try curl --silent --show-error --fail-with-body -H 'Content-Type: application/json' -H 'x-nexus-verdict: 1' "$url$1" -d "$2"
}

serve() { # options; sets url once it is ready
    "$bin/nexusengine" serve --port 0 "$@" >"$work/serve.log" 2>&1 &
    server=$!
    for _ in $(seq 3000); do
        kill -0 "$server" 2>/dev/null || { cp "$work/serve.log" "$work/said" && failed serve; }
        url=$(sed -nE 's/.* at (http[^ ]*) \(ready after.*/\1/p' "$work/serve.log")
        if [ -n "$url" ]; then return; fi
        sleep 0.1
    done
    cp "$work/serve.log" "$work/said" && failed "serve: not ready"
}

check() { # an interpreter
    local venv=${VENVS:-$work}/check-$1
    bin=$venv/bin
    echo "==> $("$1" --version)"
    [ -x "$bin/python" ] || "$1" -m venv "$venv"
    cp "$root/constraints.txt" "$work"
    cd "$work"
    "$bin/python" -c "import torch" 2>/dev/null ||
        "$bin/pip" install --quiet torch==2.13.0+cpu 2>/dev/null || try "$bin/pip" install torch==2.13.0
    try "$bin/pip" install --force-reinstall --no-deps "$wheel"
    try "$bin/pip" install -c constraints.txt "$wheel"
    for name in pytest httpx transformers matplotlib openai; do
        if "$bin/python" -c "import $name" 2>/dev/null; then echo "$name is installed: not a clean venv" >&2 && exit 1; fi
    done
    export NEXUSENGINE_CACHE=$work/cache
    cat >trace.csv <<'TRACE'
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.68,40,8
2023-11-16 18:15:47.18,60,12
2023-11-16 18:15:47.68,30,6
TRACE
    try "$bin/nexusengine" --version
    for command in models config doctor "doctor --json" profiles; do
        # shellcheck disable=SC2086
        try "$bin/nexusengine" $command
        case $command in doctor) grep -q "  compiled kernels: instruction set" said || failed "the wheel carries no kernels" ;; esac
    done
    try "$bin/nexusengine" sim run --trace trace.csv --devices h100,l4 --engine lens --router prism --classes mixed --json
    try "$bin/nexusengine" plan --trace trace.csv --candidates h100,l4 --seeds 1 --precision 0.5 --no-head-room
    serve --debug-endpoints
    echo "    $(date +%T) ok: serve"
    try curl --silent --fail "$url/readyz"
    try curl --silent --fail "$url/metrics"
    try_post /v1/chat/completions '{"model": "smollm2-135m", "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 16}'
    try_post /v1/completions '{"prompt": "2 + 2 =", "max_tokens": 8, "slo": {"class": "interactive", "tpot_ms": 40}}'
    id=$("$bin/python" -c 'import json; print(json.load(open("said"))["id"])')
    try "$bin/nexusengine" explain --url "$url" "$id"
    try_post /tokenize '{"prompt": "2 + 2 ="}'
    try "$bin/nexusengine" bench serve --url "$url" --trace trace.csv --classes mixed --json
    kill "$server"
    wait "$server" || failed "serve ended with $?"
    server=
    if grep -qE "^Traceback|Error" serve.log; then cp serve.log said && failed serve; fi
    "$bin/python" - "$root/README.md" <<'PYTHON' >snippet.py
import re, sys
text = open(sys.argv[1]).read()
print(re.search(r"## In Python\n+```python\n(.*?)```", text, re.S)[1])
PYTHON
    try "$bin/python" snippet.py
    try "$bin/nexusengine" bench throughput --requests 4 --input-tokens 16 --output-tokens 8 --json
    [ ! -e "$NEXUSENGINE_CACHE/native" ] || failed "kernels were compiled"
    cd "$root"
}

for python in "${@:-python3}"; do check "$python"; done
echo "all commands ran"
