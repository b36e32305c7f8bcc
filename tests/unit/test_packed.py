"""Random quantised weights of `vllm-moe-lora tune`; what vLLM makes of them: tests/releases."""

from __future__ import annotations

import types

import pytest
import torch

from vllm_moe_lora.tuning import packed

HIDDEN, INNER, EXPERTS = 64, 32, 3


def layer(method="Method", dtype=torch.uint8, bias=False, **more):
    """A layer with parameters as a quantisation method makes them, and that method."""
    made = torch.nn.Module()
    made.moe_config = types.SimpleNamespace(
        intermediate_size_per_partition=INNER, hidden_dim=HIDDEN, is_act_and_mul=True, has_bias=bias
    )
    made.quant_method = type(method, (), more)()
    return made


def give(made, **shapes):
    for name, (shape, dtype) in shapes.items():
        values = torch.zeros(EXPERTS, *shape, dtype=dtype)
        made.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))
    return made


def mxfp4():
    made = layer("GptOssMxfp4MoEMethod", bias=True)
    bytes_ = torch.uint8
    return give(
        made,
        w13_weight=((2 * INNER, HIDDEN // 2), bytes_),
        w13_weight_scale=((2 * INNER, HIDDEN // 32), bytes_),
        w13_bias=((2 * INNER,), torch.bfloat16),
        w2_weight=((HIDDEN, INNER // 2), bytes_),
        w2_weight_scale=((HIDDEN, INNER // 32), bytes_),
        w2_bias=((HIDDEN,), torch.bfloat16),
    )


def test_mxfp4_by_hand():
    """The low four bits come first, and scales are exponents from 127 on."""
    made = mxfp4()
    found = packed.fill(made)
    for name, weights, bias in (("w13", found.w13, found.bias13), ("w2", found.w2, found.bias2)):
        codes, scales = getattr(made, f"{name}_weight"), getattr(made, f"{name}_weight_scale")
        dense = weights[1]
        for row, column in ((0, 0), (5, 1), (17, 30), (31, 31)):
            byte = int(codes[1, row, column // 2])
            code = byte >> 4 if column % 2 else byte & 15
            value = packed.FP4[code & 7] * (-1 if code & 8 else 1)
            assert float(dense[row, column]) == value * 2.0 ** (int(scales[1, row, 0]) - 127)
        assert torch.equal(bias, getattr(made, f"{name}_bias"))
        assert bias.any()
    assert not torch.equal(found.w13[0], found.w13[1])
    assert 0.3 < float(found.w13[0].std() * HIDDEN**0.5) < 3, "no adapter drowns in it"


def test_gptq_by_hand():
    made = layer("AutoGPTQMoEMethod")
    made.quant_method.quant_config = types.SimpleNamespace(weight_bits=4, is_sym=True)
    half = torch.float16
    give(
        made,
        w13_qweight=((HIDDEN // 8, 2 * INNER), torch.int32),
        w13_scales=((2, 2 * INNER), half),
        w13_qzeros=((2, 2 * INNER // 8), torch.int32),
        w13_g_idx=((HIDDEN,), torch.int32),
        w13_bias=((2 * INNER,), half),
        w2_qweight=((INNER // 8, HIDDEN), torch.int32),
        w2_scales=((1, HIDDEN), half),
        w2_qzeros=((1, HIDDEN // 8), torch.int32),
    )
    found = packed.fill(made)
    for row, column in ((0, 0), (5, 9), (17, 63), (63, 31)):
        word = int(made.w13_qweight[2, column // 8, row])
        q = word >> 4 * (column % 8) & 15
        scale = float(made.w13_scales[2, column // 32, row])
        assert float(found.w13[2][row, column]) == (q - 8) * scale
    assert made.w13_g_idx[0].tolist() == [0] * 32 + [1] * 32
    assert found.bias13 is None
    assert not made.w13_bias.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantised_weights_have_no_bits_to_round(dtype):
    """Marlin multiplies with the scale in 16 bits."""
    for kind, grid, zeros in (
        ("int4", (8, 4), True),
        ("int8", (8, 1), False),
        ("fp8", (2, 2), False),
        ("fp4", (8, 2), False),
    ):
        form = packed.Format(kind, 8, 64, grid, zeros)
        dense = packed.Weights(form, 0, torch.device("cpu"))[0]
        assert torch.equal(dense.to(dtype).float(), dense), kind


def test_padding_is_where_vllm_puts_it():
    rows = torch.arange(6.0).view(6, 1)
    assert packed.padded(rows, 2, 4).flatten().tolist() == [0, 1, 2, 0, 3, 4, 5, 0]
    assert packed.padded(rows.flatten(), 2, 4).tolist() == [0, 1, 2, 0, 3, 4, 5, 0]
    assert packed.padded(rows.T, 0, 8)[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]


def nvfp4():
    made, fp8 = layer("ModelOptNvFp4FusedMoE"), torch.float8_e4m3fn
    return give(
        made,
        w13_weight=((2 * INNER, HIDDEN // 2), torch.uint8),
        w13_weight_scale=((2 * INNER, HIDDEN // 16), fp8),
        w2_weight=((HIDDEN, INNER // 2), torch.uint8),
        w2_weight_scale=((HIDDEN, INNER // 16), fp8),
    )


def online_fp8():
    """Weights that vLLM quantises after loading."""
    made, half = layer("Fp8OnlineMoEMethod"), torch.bfloat16
    return give(made, w13_weight=((2 * INNER, HIDDEN), half), w2_weight=((HIDDEN, INNER), half))


def asymmetric():
    made = layer("CompressedTensorsWNA16MoEMethod", num_bits=4, symmetric=False)
    whole, half = torch.int32, torch.float16
    return give(
        made,
        w13_weight_packed=((2 * INNER, HIDDEN // 8), whole),
        w13_weight_scale=((2 * INNER, 2), half),
        w2_weight_packed=((HIDDEN, INNER // 8), whole),
        w2_weight_scale=((HIDDEN, 1), half),
    )


@pytest.mark.parametrize("made", [nvfp4, online_fp8, asymmetric])
def test_formats_that_are_not_known(made):
    with pytest.raises(packed.UnknownFormatError, match="tune knows no weights like") as error:
        packed.fill(made())
    assert "w13" in str(error.value)


def test_nothing_is_written_where_w2_is_not_known():
    made = mxfp4()
    made.w2_weight_scale = torch.nn.Parameter(torch.zeros(EXPERTS, 7), requires_grad=False)
    with pytest.raises(packed.UnknownFormatError):
        packed.fill(made)
    assert not made.w13_weight.any()
