#!/usr/bin/env bash
# Install what is missing, then style, types and every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
ci/install.sh
ci/lint.sh
exec "${VIRTUAL_ENV:-$PWD/.venv}/bin/pytest" "$@"
