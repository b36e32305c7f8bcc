#!/usr/bin/env bash
# Everything that needs a CUDA GPU: tests of kernels, layers and engines, the kernels once under
# compute-sanitizer, then the benchmarks.
# In the active environment or .venv, whose torch must see the GPU. Arguments go to the first
# benchmark, which runs our kernels behind the hooks into vLLM's own calls.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-${VIRTUAL_ENV:-$PWD/.venv}/bin/python}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
vllm=()
for ((i = 1; i < $#; i++)); do
  if [[ "${!i}" == --vllm ]]; then
    next=$((i + 1))
    vllm=(--vllm "${!next}")
    # A wheel that was unpacked with its binaries is as good as one that is installed.
    if compgen -G "${!next}/vllm/_C*.so" >/dev/null; then
      export PYTHONPATH="$PYTHONPATH:${!next}"
    fi
  fi
done

"$python" - <<'PY'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA GPU; this script needs one.")
print(torch.cuda.get_device_name(), "torch", torch.__version__)
PY

# Kernels alone, at real sizes; then, with a vLLM that is built for CUDA, its own layers and experts
# with our kernels in their place, and engines.
"$python" -m pytest -m gpu tests/kernels
"$python" -m pytest -m gpu tests/e2e/test_cuda.py
"$python" -m pytest tests/kernels/test_compiled.py

if command -v compute-sanitizer >/dev/null; then
  # Memory errors and races, on the smallest layer and one batch of each kind.
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -m gpu tests/kernels/test_gpu.py -k "reference and qwen3-33 and bfloat16"
  done
else
  echo "compute-sanitizer is not installed: NOT RUN"
fi

if [[ " $* " == *" --vllm"* ]] || "$python" -c 'import vllm, sys; sys.exit("cpu" in vllm.__version__)' 2>/dev/null; then
  "$python" - <<'PY'
from pathlib import Path
from vllm_moe_lora.tiny import models
Path("/tmp/moe_lora_tune").exists() or models.build("qwen3_moe", Path("/tmp/moe_lora_tune"))
PY
  "$python" -m vllm_moe_lora.cli tune /tmp/moe_lora_tune --minutes 3 --out /tmp/moe_lora_tuned
  "$python" benchmarks/moe_lora_kernels.py "$@"
  "$python" benchmarks/moe_lora_kernels.py --base --models qwen3 mixtral --ranks 16 64 "${vllm[@]}"
else
  echo "no vLLM with CUDA is installed and --vllm is not given: benchmark NOT RUN"
fi
