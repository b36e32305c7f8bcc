#!/usr/bin/env bash
# Install what is missing, then style, types and every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
ci/install.sh
ci/lint.sh
# Releases whose wheels are small, and verl's pin: about 200 MB once, 150 MB kept. Tests say what
# they skip where a release is missing, as on a machine without a network.
fetch() { "${VIRTUAL_ENV:-$PWD/.venv}/bin/python" ci/trees.py "$@"; }
[ -n "${MOE_LORA_TREES:-}" ] ||
  fetch 0.11.1 0.12.0 0.13.0 0.14.1 0.15.1 0.16.0 0.24.0 || echo "not all releases could be fetched"
exec "${VIRTUAL_ENV:-$PWD/.venv}/bin/pytest" "$@"
