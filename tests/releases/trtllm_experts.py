"""Child: TRT-LLM's experts with LoRA of one release on every rank; prints JSON.

As parallel_experts.py, whose managers, wrappers and ranks these are, with the experts that vLLM
chooses on Blackwell and FlashInfer's operators as loops; the two kernels of the experts' own file
run in Triton's interpreter. "bare", "ours", and "kernels": ours with our Triton kernels (0.28 on).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
sys.path.insert(0, str(Path(__file__).parents[1]))

import bf16_exact  # noqa: F401
import lora_operators
import parallel_experts
import ranks
import stage
import torch
import trtllm_cases
import trtllm_operators
from packaging.version import Version


def run(case, base):
    """`parallel_experts.run`'s, and which experts, with a delta how often, and whose kernels."""
    from vllm_moe_lora.kernels.triton import launch

    trtllm_operators.calls.clear()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(launch, "add_lora", wraps=launch.add_lora) as ours,
        ):
            found = parallel_experts.run(case, base, Path(folder))
    finally:
        case.after()
    found |= {"experts": case.chosen, "flags": case.flags, "calls": ours.call_count}
    return found | {"deltas": sum(trtllm_operators.calls)}


def main():
    base, release = stage.begin(torch.float32)
    import vllm.lora.layers.fused_moe
    import vllm.lora.punica_wrapper.punica_gpu  # noqa: F401

    import vllm_moe_lora
    from vllm_moe_lora import supported

    release = supported.release_of(release)
    lora_operators.stand_in()
    trtllm_operators.stand_in()
    ranks.connect()
    results = {"release": release, "bare": {}, "ours": {}}
    if Version(release) >= Version("0.28"):
        results["kernels"] = {}
    for who in ("bare", "ours", "kernels"):
        if who == "ours":
            os.environ["VLLM_MOE_LORA"] = "1"
            with parallel_experts.as_cuda():
                vllm_moe_lora.register()
        os.environ["VLLM_MOE_LORA_KERNELS"] = {"kernels": "ours"}.get(who, "upstream")
        for case in trtllm_cases.cases(release):
            if who not in results or (sys.argv[1:] and case.name not in sys.argv[1:]):
                continue
            try:
                results[who][case.name] = run(case, base)
            except Exception as error:  # is an answer
                results[who][case.name] = {"error": f"{type(error).__name__}: {error}"}
                print(who, case.name, file=sys.stderr)
                traceback.print_exc()
    results["status"] = vllm_moe_lora.status()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
