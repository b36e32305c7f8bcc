#!/usr/bin/env bash
# Install what is missing, then style, types and tests. Other arguments go to pytest.
#     ci/test.sh            what CI runs: 14 to 17 minutes on 2 cores
#     ci/test.sh --quick    for a change in progress: 2 minutes, one release, one engine, no compiler
#     ci/test.sh --all      every release of supported.toml, every variant of the kernels
set -euo pipefail
cd "$(dirname "$0")/.."
mode=default
case "${1:-}" in --quick | --all) mode="${1#--}" && shift ;; esac
ci/install.sh
python="${VIRTUAL_ENV:-$PWD/.venv}/bin/python"

# Nearly all of a test is what one core does, or waiting: three at a time on two cores, each of them
# and of the engines they start with one thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
# In the order of the files: the short tests come last, and no worker waits for a long one.
run=("$python" -m pytest --numprocesses "${WORKERS:-3}" --dist loadscope --no-loadscope-reorder)

if [ "$mode" = quick ]; then
  ci/lint.sh
  exec "${run[@]}" tests/{unit,adapters,fitting,loading,targets,layers,hooks} \
    tests/kernels/test_{reference,cpu}.py "tests/e2e/test_families.py::test_fp32[qwen2_moe]" "$@"
fi
# Releases whose wheels are small, and verl's pin: about 200 MB once, 150 MB kept; and the Triton of
# releases with torch 2.11, 190 MB once, 640 MB kept. What cannot be fetched is not tested.
releases=(0.11.1 0.12.0 0.13.0 0.14.1 0.15.1 0.16.0 0.24.0)
# A trainer whose own files run in tests/e2e/rl, and a platform's with the vLLM it is made for.
others=(verl==0.9.1 vllm_ascend==0.23.0.post1)
if [ "$mode" = all ]; then
  export MOE_LORA_ALL=1
  mapfile -t releases < <("$python" -c "
from vllm_moe_lora import supported
print(*supported.releases(), sep='\n')")
fi
fetch() {
  "$python" ci/trees.py "${releases[@]}" "${others[@]}" || echo "not all releases could be fetched"
  [ -d .trees/triton-3.6.0 ] ||
    { rm -rf .trees/part &&
      "$python" -m pip install --quiet --no-deps --target .trees/part triton==3.6.0 &&
      mv .trees/part .trees/triton-3.6.0; } ||  # there when it is whole
    echo "Triton 3.6.0 could not be fetched"
}
if [ -z "${MOE_LORA_TREES:-}" ]; then fetch & fi
ci/lint.sh
wait
exec "${run[@]}" "$@"
