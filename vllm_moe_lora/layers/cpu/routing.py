"""Routing that vLLM's CPU backend lacks: sigmoid without groups, and a bias without groups.

vLLM's router for the CPU asserts softmax if there are no groups of experts, so that Step-3.5 does
not start, and leaves ``e_score_correction_bias`` out, so that Ernie 4.5 chooses other experts than
it was trained with. Both are grouped routing with a single group, which vLLM has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Chosen = tuple[torch.Tensor, torch.Tensor]  # weights fp32 and ids int32, both [tokens, top_k]


def lacks_scheme(router: Any) -> bool:
    """Return whether vLLM's `CPURouter` does not compute what ``router`` was made for."""
    if router.use_grouped_topk or router.custom_routing_function is not None:
        return False
    biased = router.e_score_correction_bias is not None
    return router.scoring_func == "sigmoid" or (router.scoring_func == "softmax" and biased)


def in_one_group(router: Any) -> Callable[..., Chosen]:
    """Return a function for ``custom_routing_function`` of a `CPURouter`.

    Args:
        router: its scoring function, bias and scaling factor are read with each call.
    """
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    def route(
        hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> Chosen:
        chosen: Chosen = cpu_router._grouped_topk(
            gating_output=gating_output,
            topk=topk,
            renormalize=renormalize,
            num_expert_group=1,
            topk_group=1,
            scoring_func=router.scoring_func,
            routed_scaling_factor=router.routed_scaling_factor,
            e_score_correction_bias=router.e_score_correction_bias,
        )
        return chosen

    return route
