"""Deferred GEMMs of the base experts: which are deferred, and that each is computed once."""

from __future__ import annotations

import pytest
import torch

from vllm_moe_lora.layers.gpu import base_product

TOKENS, TOP_K, BLOCK = 3, 2, 16


class Base:
    """One call of upstream's GEMM; counts the launches of its kernel."""

    def __init__(self, **more):
        pairs = TOKENS * TOP_K
        self.launches = 0
        self.given = {
            "A": torch.ones(TOKENS, 8),
            "B": torch.ones(4, 16, 8),
            "C": torch.zeros(TOKENS, TOP_K, 16),
            "A_scale": None,
            "B_scale": None,
            "B_bias": None,
            "topk_weights": torch.ones(TOKENS, TOP_K),
            "sorted_token_ids": torch.arange(20 * BLOCK, dtype=torch.int32),
            "expert_ids": torch.zeros(20, dtype=torch.int32),
            "num_tokens_post_padded": torch.tensor([pairs * BLOCK], dtype=torch.int32),
            "mul_routed_weight": False,
            "top_k": TOP_K,
            "config": {"BLOCK_SIZE_M": BLOCK},
            **more,
        }

    def launch(self):
        self.launches += 1

    def defer(self):
        return base_product.defer(self.launch, self.given)


def test_nothing_is_deferred_outside():
    assert not base_product.is_deferring()
    with base_product.deferring(False):
        assert not base_product.is_deferring()
        assert base_product.deferred_for(torch.ones(1), torch.ones(1)) is None
        base_product.flush()


def test_a_deferred_gemm_is_found_by_its_tensors():
    base = Base()
    with base_product.deferring(True):
        assert base.defer()
        product = base_product.deferred_for(base.given["C"].view(-1, 16), base.given["A"])
        assert product.topk_weights is None
        assert product.order.sorted_ids.numel() == TOKENS * TOP_K * BLOCK, "no more than pairs"
        base_product.mark_done()
    assert base.launches == 0


def test_a_small_batch_is_deferred_unsorted():
    base = Base(sorted_token_ids=None)
    with base_product.deferring(True):
        assert base.defer()
        product = base_product.deferred_for(base.given["C"], base.given["A"])
        assert product.order.sorted_ids is None
        assert product.order.expert_ids is base.given["expert_ids"]
        base_product.mark_done()


@pytest.mark.parametrize("other", ["C", "A"])
def test_for_other_tensors_upstreams_kernel_is_launched(other):
    base = Base()
    with base_product.deferring(True):
        assert base.defer()
        tensors = {**base.given, other: base.given[other].clone()}
        assert base_product.deferred_for(tensors["C"], tensors["A"]) is None
        assert base.launches == 1
        base_product.flush()
    assert base.launches == 1


def test_a_second_gemm_launches_the_first():
    first, second = Base(), Base(mul_routed_weight=True)
    with base_product.deferring(True):
        assert first.defer()
        assert second.defer()
        assert (first.launches, second.launches) == (1, 0)
        product = base_product.deferred_for(second.given["C"], second.given["A"])
        assert product.topk_weights is second.given["topk_weights"]
        base_product.flush()
    assert second.launches == 1


@pytest.mark.parametrize(
    "more",
    [
        {"A_scale": torch.ones(1)},
        {"B_scale": torch.ones(1)},
        {"B_bias": torch.ones(4, 16)},
        {"B": torch.ones(4, 16, 8, dtype=torch.int8)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_our_kernel_does_not_support_is_not_deferred(more):
    with base_product.deferring(True):
        assert not Base(**more).defer()


def test_a_gemm_without_lora_is_an_error():
    with (
        pytest.raises(RuntimeError, match=r"Cure: VLLM_MOE_LORA_KERNELS=ours"),
        base_product.deferring(True),
    ):
        assert Base().defer()
    assert not base_product.is_deferring()
    with pytest.raises(KeyError), base_product.deferring(True):
        raise KeyError  # errors of the block are passed on
