#!/usr/bin/env bash
# The engine tests on a patched copy of the installed vLLM, without the plugin: what patches/ does is
# what the plugin does. About 15 minutes; not part of ci/test.sh. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${VIRTUAL_ENV:-$PWD/.venv}/bin/python"
tree="$(mktemp -d)"
trap 'rm -rf "$tree"' EXIT
"$python" - "$tree" <<'PY'
import importlib.util
import os
import shutil
import sys
from pathlib import Path

vllm = Path(importlib.util.find_spec("vllm").origin).parent


def place(have, want):  # what is not Python is linked
    (shutil.copy2 if have.endswith(".py") else os.symlink)(have, want)


target = Path(sys.argv[1], "vllm")
shutil.copytree(vllm, target, copy_function=place, ignore=shutil.ignore_patterns("__pycache__"))
PY
"$python" -m vllm_moe_lora.cli patches apply --tree "$tree"
export PYTHONPATH="$tree" VLLM_PLUGINS="" VLLM_MOE_LORA=0
# Left out: tests of how the plugin gets into a process, and of platforms' plugins.
"$python" -m pytest -p no:cacheprovider tests/e2e --ignore tests/e2e/test_routes.py \
  --ignore tests/e2e/test_out_of_tree.py --ignore tests/e2e/test_plan.py "$@"
