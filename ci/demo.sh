#!/usr/bin/env bash
# The main job on a fresh machine: install, then a real vLLM engine on the CPU, adapter == merged.
set -euo pipefail
cd "$(dirname "$0")/.."
ci/install.sh
exec "${VIRTUAL_ENV:-$PWD/.venv}/bin/vllm-moe-lora" demo "$@"
