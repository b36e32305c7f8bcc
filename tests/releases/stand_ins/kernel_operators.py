"""Child side of kernels_in_place.py: the operators of unquantised experts, in loops."""

from __future__ import annotations

import importlib
import os

import int4
import stage
import torch

launched = []  # by upstream's `apply`, in one case


def _align(given, order, expert_ids, count):
    """What `_prepare_expert_assignment` gives; absent experts are -1, as upstream's.

    In blocks of one, for the tail in those of the kernels, with a block behind them not in use.

    Args:
        order, expert_ids, count: by `stage.align`.
    """
    if os.environ["VLLM_MOE_LORA_KERNELS"] == "tail":
        size, pairs = given.config["BLOCK_SIZE_M"], order.numel()
        blocks, experts = [], []
        for expert in expert_ids.unique().tolist():
            rows = order[expert_ids == expert]
            whole = -(-len(rows) // size) * size
            blocks.append(torch.nn.functional.pad(rows, (0, whole - len(rows)), value=pairs))
            experts += [expert] * (whole // size)
        count = torch.tensor([sum(map(len, blocks))], dtype=torch.int32)
        order = torch.cat([*blocks, torch.full((size,), 7, dtype=torch.int32)])
        expert_ids = torch.tensor([*experts, 0], dtype=torch.int32)
    if given.expert_map is not None:
        expert_ids = given.expert_map[expert_ids.long()]
    return order, expert_ids, count


def _product(given):
    """`invoke_fused_moe_triton_kernel`, unquantised; rows of absent experts are zero."""
    launched.append(given.mul_routed_weight)
    if given.sorted_token_ids is None:  # each pair by itself
        given.expert_ids = given.expert_ids.int()
        given.sorted_token_ids = torch.arange(given.expert_ids.numel(), dtype=torch.int32)
        given.num_tokens_post_padded = given.expert_ids.numel()
    given.mul, result = given.mul_routed_weight, given.C.view(-1, given.C.shape[-1])
    used = int(given.num_tokens_post_padded)
    size = given.sorted_token_ids.numel() // given.expert_ids.numel()
    ids = given.sorted_token_ids[:used]
    experts = given.expert_ids.repeat_interleave(size)[:used]
    ids, experts = ids[ids < len(result)], experts[ids < len(result)]
    here = experts >= 0
    result[ids[~here].long()] = 0
    given.sorted_token_ids, given.expert_ids = ids[here], experts[here]
    stage.product(given, given.A, given.B.float(), given.C, given.C.shape[-1])


def _sum(input, output, topk_ids=None, expert_map=None):
    output.copy_(input.float().sum(1))


def stand_in():
    from vllm import _custom_ops as ops

    where = "vllm.model_executor.layers.fused_moe"
    fused_moe = importlib.import_module(f"{where}.fused_moe")
    importlib.import_module(f"{where}.experts.triton_moe")
    int4.stand_in()
    ops.moe_sum = _sum
    own = fused_moe._prepare_expert_assignment

    def align(given):
        found = own(**vars(given))
        return found if found[0] is None else _align(given, *found)  # few pairs are not sorted

    for name, function in (
        ("invoke_fused_moe_triton_kernel", _product),
        ("_prepare_expert_assignment", align),
    ):
        real = getattr(fused_moe, name)
        stage.everywhere(name, stage.bound(real, function), real)
