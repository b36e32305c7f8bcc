"""Cases of layers/gpu/trtllm.py that the simulated ranks of tests/releases do not reach."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch

from vllm_moe_lora.layers.gpu import trtllm

NUMBERS = torch.tensor([[0, 4], [5, 9], [-1, 6]], dtype=torch.int32)


def experts_of(first, count, rank, total=10):
    """The experts of a rank, and the map of the model's ids that start at ``first``."""
    expert_map = torch.full((total,), -1, dtype=torch.int32)
    expert_map[first : first + count] = torch.arange(count, dtype=torch.int32)
    return SimpleNamespace(local_num_experts=count, ep_rank=rank), expert_map


def test_the_id_minus_one_is_not_local():
    experts, expert_map = experts_of(first=7, count=3, rank=2)
    ids, own = trtllm.renumber(experts, NUMBERS, expert_map)
    assert own[ids.long()].tolist() == [[-1, -1], [-1, 2], [-1, -1]]
    assert ((ids >= 6) & (ids < 9)).flatten().nonzero().flatten().tolist() == [3]
    assert ids.dtype == NUMBERS.dtype


def test_ids_that_the_kernel_assumes_are_kept():
    experts, expert_map = experts_of(first=5, count=5, rank=1)
    assert trtllm.renumber(experts, NUMBERS, expert_map) == (NUMBERS, expert_map)
    assert trtllm.renumber(experts, NUMBERS, None) == (NUMBERS, None)


def test_the_ids_of_a_layer_are_computed_once():
    """It waits for the device, which is not allowed while a CUDA graph is captured."""
    experts, expert_map = experts_of(first=4, count=3, rank=1)
    with mock.patch.object(torch, "equal", wraps=torch.equal) as looked:
        for _ in range(3):
            trtllm.renumber(experts, NUMBERS, expert_map)
    assert looked.call_count == 1
