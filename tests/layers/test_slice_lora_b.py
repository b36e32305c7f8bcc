"""A rank's rows of lora_B are those of its weight, however many parts a merged module has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_moe_lora.hooks import lora_layers_column_parallel_linear

[HOOK] = lora_layers_column_parallel_linear.HOOKS


def upstream(self, lora_b):
    """Two halves, as vLLM 0.11.1 to 0.33 cut a merged module."""
    if not self.is_merged_col_linear:
        return lora_b[self.tp_rank * self.output_size :][: self.output_size]
    half, offset = self.output_size // 2, lora_b.shape[0] // 2
    start = self.tp_rank * half
    return torch.cat([lora_b[start : start + half], lora_b[offset + start : offset + start + half]])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(16,), (8, 8), (8, 8, 16, 16), (8, 16)])
def test_rows(sizes, ranks):
    whole = torch.arange(float(sum(sizes)))[:, None].expand(-1, 3)
    for rank in range(ranks):
        base = SimpleNamespace(output_sizes=list(sizes))
        layer = SimpleNamespace(is_merged_col_linear=True, base_layer=base, tp_rank=rank)
        layer.output_size = sum(sizes) // ranks
        # As MergedColumnParallelLinear.weight_loader cuts the weight.
        want = torch.cat([part.chunk(ranks)[rank] for part in whole.split(sizes)])
        assert torch.equal(HOOK.make(upstream)(layer, whole), want)
        same = torch.equal(upstream(layer, whole), want)
        assert same == (ranks == 1 or sizes == (8, 8)), "where upstream is right"


def test_a_module_that_is_not_merged_is_upstreams():
    layer = SimpleNamespace(
        is_merged_col_linear=False, base_layer=SimpleNamespace(), output_size=4, tp_rank=1
    )
    whole = torch.arange(8.0)[:, None]
    assert torch.equal(HOOK.make(upstream)(layer, whole), whole[4:])
