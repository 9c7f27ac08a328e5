#!/usr/bin/env bash
# Installs what is missing and runs checks. The first argument may name a tier, all others go to pytest:
#   scripts/test.sh                  everything but gpu: format, lint, types, import rules, all tests
#   scripts/test.sh fast             the same checks, and of the tests those of one module each, under two minutes
#   scripts/test.sh chaos            killed and stopped processes alone
#   scripts/test.sh gpu              scripts/gpu_check.py on every GPU of this machine
#   scripts/test.sh -k router        a part of everything
# The Triton kernels' tests are run a second time in Triton's interpreter, which must be chosen before it is imported.
# Tests run in two processes with one thread each; NEXUSENGINE_GOLDEN=full compares longer texts with transformers.
set -euo pipefail
cd "$(dirname "$0")/.."
tier=full
case "${1:-}" in
fast | full | chaos | gpu)
    tier=$1
    shift
    ;;
esac
. scripts/setup.sh test
bin=.venv/bin
run() {
    echo "==> $*" >&2
    "$@"
}
tests() { OMP_NUM_THREADS=1 run $bin/python -m pytest -n 2 --dist loadfile "$@"; }

case $tier in
gpu)
    run $bin/python scripts/gpu_check.py "$@"
    exit
    ;;
chaos)
    tests tests/chaos "$@"
    exit
    ;;
esac
run $bin/ruff format --check .
run $bin/ruff check .
run $bin/mypy
run $bin/lint-imports
if [ $tier = fast ]; then
    tests tests/unit tests/contract tests/property -m "not slow and not model" "$@"
    exit
fi
tests "$@"
if [ "$(uname -s)" = Linux ]; then
    status=0
    TRITON_INTERPRET=1 OMP_NUM_THREADS=1 run $bin/python -m pytest -n 2 tests/triton tests/unit/attention/test_attention.py "$@" || status=$?
    [ "$status" = 5 ] || exit "$status" # 5: the arguments left no test
fi
