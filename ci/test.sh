#!/usr/bin/env bash
# Install what is missing, then style, types and every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
ci/install.sh
ci/lint.sh
python="${VIRTUAL_ENV:-$PWD/.venv}/bin/python"
# Releases whose wheels are small, and verl's pin: about 200 MB once, 150 MB kept; and the Triton of
# releases with torch 2.11, 190 MB once, 640 MB kept. Tests say what they skip where one is missing,
# as on a machine without a network.
if [ -z "${MOE_LORA_TREES:-}" ]; then
  "$python" ci/trees.py 0.11.1 0.12.0 0.13.0 0.14.1 0.15.1 0.16.0 0.24.0 ||
    echo "not all releases could be fetched"
  [ -d .trees/triton-3.6.0 ] ||
    { rm -rf .trees/part &&
      "$python" -m pip install --quiet --no-deps --target .trees/part triton==3.6.0 &&
      mv .trees/part .trees/triton-3.6.0; } ||  # there when it is whole
    echo "Triton 3.6.0 could not be fetched"
fi
# Nearly all of a test is the start of a process, which one core does: two at a time, each of them
# and of the engines they start with one thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
exec "$python" -m pytest --numprocesses "${WORKERS:-2}" --dist loadfile "$@"
