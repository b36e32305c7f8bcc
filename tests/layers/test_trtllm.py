"""Pieces of TRT-LLM's experts that no simulated world reaches (tests/releases)."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch

from vllm_moe_lora.layers.gpu import trtllm

NUMBERS = torch.tensor([[0, 4], [5, 9], [-1, 6]], dtype=torch.int32)


def world(first, count, rank, total=10):
    """A rank's experts and the map of its numbers ``first`` on."""
    expert_map = torch.full((total,), -1, dtype=torch.int32)
    expert_map[first : first + count] = torch.arange(count, dtype=torch.int32)
    return SimpleNamespace(local_num_experts=count, ep_rank=rank), expert_map


def test_a_pair_of_no_expert_is_nobodys():
    experts, expert_map = world(first=7, count=3, rank=2)
    ids, own = trtllm.placed(experts, NUMBERS, expert_map)
    assert own[ids.long()].tolist() == [[-1, -1], [-1, 2], [-1, -1]]
    assert ((ids >= 6) & (ids < 9)).flatten().nonzero().flatten().tolist() == [3]
    assert ids.dtype == NUMBERS.dtype


def test_where_the_kernel_looks_already_nothing_changes():
    experts, expert_map = world(first=5, count=5, rank=1)
    assert trtllm.placed(experts, NUMBERS, expert_map) == (NUMBERS, expert_map)
    assert trtllm.placed(experts, NUMBERS, None) == (NUMBERS, None)


def test_a_layer_is_looked_at_once():
    """It waits for the device, which no CUDA graph in the making may."""
    experts, expert_map = world(first=4, count=3, rank=1)
    with mock.patch.object(torch, "equal", wraps=torch.equal) as looked:
        for _ in range(3):
            trtllm.placed(experts, NUMBERS, expert_map)
    assert looked.call_count == 1
