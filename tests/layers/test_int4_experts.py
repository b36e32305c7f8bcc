"""INT4 experts on the CPU: the weights of each expert, taken out of vLLM's stacked ones.

The oracle multiplies with dequantised weights. vLLM's operator quantises activations to 8 bits.
"""

from __future__ import annotations

import pytest
import torch

from vllm_moe_lora.layers.cpu import int4

pytestmark = pytest.mark.cpu_engine
EXPERTS, IN, OUT, GROUP = 3, 128, 64, 64


@pytest.fixture(autouse=True)
def operators():
    import vllm._C  # noqa: F401

    if not int4.operators_work():
        pytest.skip("this CPU has neither AMX nor AVX-512 with VNNI, which vLLM's INT4 wants")


def packed(seed):
    """(weights, zeros, scales) as vLLM packs them, and the dequantised [experts, out, in]."""
    from vllm import _custom_ops as ops

    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (EXPERTS, OUT, IN), dtype=torch.int32, generator=g)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    words = (q.view(EXPERTS, OUT, IN // 8, 8) << shifts).sum(-1).to(torch.int32)
    scales = torch.rand(EXPERTS, IN // GROUP, OUT, generator=g).to(torch.bfloat16)
    zeros = torch.full((EXPERTS, IN // GROUP, OUT // 8), 0x77777777, dtype=torch.int32)
    made = ops.convert_weight_packed_scale_zp(
        words.transpose(1, 2).contiguous(), zeros, scales, ops.CPUQuantAlgo.GPTQ
    )
    return made, (q - 8) * scales.float().transpose(1, 2).repeat_interleave(GROUP, 2)


def experts_of(made):
    found = object.__new__(int4.Int4CPUExperts)
    found._views = {}
    found.w1_zp, found.w1_scale = made[1:]
    return found


def check(experts, w, plain):
    x = torch.randn(5, IN, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    slices = [(2, 0, 1), (0, 1, 4), (1, 4, 5)]
    got = int4._matmul(x, experts._experts("w1", w), slices).float()
    want = torch.cat([x[i:j].float() @ plain[e].t() for e, i, j in slices])
    assert (got - want).abs().mean() < 0.05 * want.abs().mean()


def test_each_pair_gets_its_experts_weights():
    made, plain = packed(0)
    check(experts_of(made), made[0], plain)


def test_weights_that_moved_are_found():
    made, plain = packed(0)
    experts = experts_of(made)
    check(experts, made[0], plain)
    others, plain = packed(2)
    experts.w1_zp, experts.w1_scale = others[1:]
    check(experts, others[0], plain)


def test_weights_written_in_place_are_seen():
    made, plain = packed(0)
    experts = experts_of(made)
    check(experts, made[0], plain)
    others, plain = packed(2)
    for mine, other in zip(made, others, strict=True):
        mine.copy_(other)
    check(experts, made[0], plain)


def test_no_pairs():
    made, _ = packed(0)
    views = experts_of(made)._experts("w1", made[0])
    x = torch.empty(0, IN, dtype=torch.bfloat16)
    assert int4._matmul(x, views, []).shape == (0, OUT)
