"""An engine without LoRA under expert parallelism, whose tokens go one by one through upstream's
operator with their local experts only: what base tokens of an engine with LoRA are compared with.

Without this, upstream's CPU experts take global expert ids for local ones.
"""

from __future__ import annotations

import sys

import forked  # noqa: F401 -- its workers are forks
from vllm.model_executor.layers.fused_moe.experts import cpu_moe

from vllm_moe_lora.tiny import engine


def one_by_one(experts):
    """Replace the ``apply`` of an upstream class, in this process and the workers it forks."""
    upstream = experts.apply

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *args, **more):
        # By keyword: activation, global_num_experts, expert_map, and the rest.
        expert_map = more["expert_map"]
        for row in range(hidden_states.shape[0]):
            local = [k for k, e in enumerate(topk_ids[row].tolist()) if expert_map[e] >= 0]
            one = slice(row, row + 1)
            if not local:
                output[one] = 0
                continue
            ids = expert_map[topk_ids[one, local].long()].to(topk_ids.dtype)
            given = (hidden_states[one], w1, w2, topk_weights[one, local].contiguous(), ids)
            part = output.new_empty(1, output.shape[1])
            upstream(self, part, *given, *args, **more)
            output[one] = part

    experts.apply = apply


if __name__ == "__main__":
    one_by_one(cpu_moe.CPUUnquantizedExperts)
    one_by_one(cpu_moe.CPUExpertsInt4)
    engine.main(*sys.argv[1:])
