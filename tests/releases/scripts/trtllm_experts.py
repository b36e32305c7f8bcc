"""Child: TRT-LLM's experts with LoRA of one release on every rank; prints JSON.

As parallel_experts.py, whose managers, wrappers and ranks these are, with the experts that vLLM
chooses on Blackwell and FlashInfer's operators as loops; the two kernels of the experts' own file
run in Triton's interpreter. "bare", "ours", and "kernels": ours with our Triton kernels (0.28 on).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
sys.path.insert(0, str(Path(__file__).parents[2]))

import bf16_exact  # noqa: F401
import parallel_experts
import trtllm_cases
import trtllm_operators


def run(case, base, folder):
    """`parallel_experts.run`'s, and which experts, with a delta how often, and whose kernels."""
    from vllm_moe_lora.kernels.triton import launch

    trtllm_operators.calls.clear()
    with mock.patch.object(launch, "add_lora", wraps=launch.add_lora) as ours:
        found = parallel_experts.run(case, base, folder)
    found |= {"experts": case.chosen, "flags": case.flags, "calls": ours.call_count}
    return found | {"deltas": sum(trtllm_operators.calls)}


if __name__ == "__main__":
    stand_in = trtllm_operators.stand_in
    parallel_experts.main(trtllm_cases.cases, run, stand_in, kernels=True)
