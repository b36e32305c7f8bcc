"""How many blocks of pages the ranks of an engine agree on; the other rank is simulated."""

from __future__ import annotations

import types
from unittest import mock

import pytest
import torch

pytest.importorskip("vllm")
from vllm_moe_lora import records
from vllm_moe_lora.layers.gpu import pages


@pytest.mark.parametrize(
    ("kernels", "record", "other", "want"),
    [
        ("ours", False, (7, True), (5, True)),
        ("ours", False, (3, True), (3, True)),
        ("auto", False, (9, False), (5, False)),
        ("auto", True, (9, False), (5, True)),  # the other machine has no record
        ("auto", False, (4, True), (4, True)),
    ],
)
def test_the_smallest_number(monkeypatch, tmp_path, kernels, record, other, want):
    monkeypatch.setenv("VLLM_MOE_LORA_KERNELS", kernels)
    monkeypatch.setattr(records, "files", lambda: iter([tmp_path] if record else []))
    group = types.SimpleNamespace(world_size=2, cpu_group="both")

    def all_reduce(found, how, group):
        assert (how, group) == (torch.distributed.ReduceOp.MIN, "both")
        found.copy_(torch.minimum(found, torch.tensor([other[0], -int(other[1])])))

    with (
        mock.patch("torch.distributed.is_initialized", return_value=True),
        mock.patch("vllm.distributed.parallel_state.get_world_group", return_value=group),
        mock.patch("torch.distributed.all_reduce", all_reduce),
    ):
        assert pages._agreed(5) == want
