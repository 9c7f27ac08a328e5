#!/usr/bin/env bash
# Installs what is missing and runs every check: format, lint, types, import rules, tests.
# Arguments go to pytest:  scripts/test.sh -k router
# The Triton kernels' tests are run a second time in Triton's interpreter, which must be chosen before it is imported.
# Tests run in two processes with one thread each; NEXUSENGINE_GOLDEN=full compares longer texts with transformers.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh test
bin=.venv/bin
run() {
    echo "==> $*" >&2
    "$@"
}
run $bin/ruff format --check .
run $bin/ruff check .
run $bin/mypy
run $bin/lint-imports
OMP_NUM_THREADS=1 run $bin/python -m pytest -n 2 --dist loadfile "$@"
if [ "$(uname -s)" = Linux ]; then
    status=0
    TRITON_INTERPRET=1 OMP_NUM_THREADS=1 run $bin/python -m pytest -n 2 tests/triton tests/unit/attention/test_attention.py "$@" || status=$?
    [ "$status" = 5 ] || exit "$status" # 5: the arguments left no test
fi
