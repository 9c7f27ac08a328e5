#!/usr/bin/env bash
# Serves a small real model on this machine: installs what is missing, fetches the model, starts everything.
# Options are those of `nexusengine serve`:  scripts/serve.sh --model llama-3-8b --port 8001
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh "" # an argument, or it would get ours
exec .venv/bin/nexusengine serve "$@"
