#!/usr/bin/env bash
# Measures this box: starts the server with lens/prism and with fcfs/round-robin on every GPU (on emulated devices where
# there is none, and says so), offers both the same load at rising rates, prints the table and writes JSON and plots.
#   scripts/bench.sh --model llama-3-8b            all options: scripts/bench.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh "" # an argument, or it would get ours
exec .venv/bin/python -m benchmarks.box "$@"
