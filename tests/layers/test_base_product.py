"""Which products wait for their LoRA, and that none is lost."""

from __future__ import annotations

import pytest
import torch

from vllm_moe_lora.layers.gpu import base_product

TOKENS, TOP_K, BLOCK = 3, 2, 16


class Base:
    """One call of upstream's product; counts its launches."""

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

    def put_off(self):
        return base_product.put_off(self.launch, self.given)


def test_nothing_waits_outside():
    assert not base_product.wanted()
    with base_product.applying(False):
        assert not base_product.wanted()
        assert base_product.waiting(torch.ones(1), torch.ones(1)) is None
        base_product.flush()


def test_a_product_waits_for_its_own_tensors():
    base = Base()
    with base_product.applying(True):
        assert base.put_off()
        product = base_product.waiting(base.given["C"].view(-1, 16), base.given["A"])
        assert product.topk_weights is None
        assert product.order.sorted_ids.numel() == TOKENS * TOP_K * BLOCK, "no more than pairs"
        base_product.done()
    assert base.launches == 0


def test_few_pairs_wait_unsorted():
    base = Base(sorted_token_ids=None)
    with base_product.applying(True):
        assert base.put_off()
        product = base_product.waiting(base.given["C"], base.given["A"])
        assert product.order.sorted_ids is None
        assert product.order.expert_ids is base.given["expert_ids"]
        base_product.done()


@pytest.mark.parametrize("other", ["C", "A"])
def test_for_others_it_is_run_as_upstream_does(other):
    base = Base()
    with base_product.applying(True):
        assert base.put_off()
        tensors = {**base.given, other: base.given[other].clone()}
        assert base_product.waiting(tensors["C"], tensors["A"]) is None
        assert base.launches == 1
        base_product.flush()
    assert base.launches == 1


def test_the_next_product_runs_the_one_before():
    first, second = Base(), Base(mul_routed_weight=True)
    with base_product.applying(True):
        assert first.put_off()
        assert second.put_off()
        assert (first.launches, second.launches) == (1, 0)
        waits = base_product.waiting(second.given["C"], second.given["A"])
        assert waits.topk_weights is second.given["topk_weights"]
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
def test_what_our_kernel_does_not_multiply_does_not_wait(more):
    with base_product.applying(True):
        assert not Base(**more).put_off()


def test_a_product_that_nothing_asks_for_is_an_error():
    with (
        pytest.raises(RuntimeError, match=r"Cure: VLLM_MOE_LORA_KERNELS=ours"),
        base_product.applying(True),
    ):
        assert Base().put_off()
    assert not base_product.wanted()
    with pytest.raises(KeyError), base_product.applying(True):
        raise KeyError  # an error of upstream's stays itself
