"""Random quantised base weights, as a checkpoint has them, and what they are in fp32.

`fill` writes them into the parameters that vLLM made for a layer. vLLM's own code then repacks them
for its kernels. What a kernel computes is held against `Weights`, which never sees the repacked
form. All scales are powers of two, so that a kernel that rounds a dequantised weight to 16 bits
rounds nothing away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1; the fourth bit is the sign
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each nibble of an int32 holds
E8M0_BIAS = 127
# Standard deviations of the numbers that `_numbers` makes.
DEVIATION = {"int4": 4.6, "int8": 73.9, "fp8": 1.0, "fp4": 2.9, "plain": 1.0}


class UnknownFormatError(ValueError):
    """The weights have a format that this module does not know; the text says which."""


@dataclass(frozen=True)
class Format:
    """How one projection's weights are stored.

    Attributes:
        kind: "int4", "int8", "fp8", "fp4" (MXFP4) or "plain" (bfloat16).
        out, width: rows and columns of one expert's weight.
        grid: (rows, columns) of its scales; each is for out / rows x width / columns numbers.
            Plain weights are multiplied by theirs before they are stored.
        zeros: whether each scale has a zero point; else it is the middle, or 0 for fp8 and fp4.
    """

    kind: str
    out: int
    width: int
    grid: tuple[int, int]
    zeros: bool = False


class Weights:
    """The fp32 weights of one projection. They are made again from the seed when asked for.

    Args:
        format: see `Format`.
        seed: of the random numbers.
        device: where they are made.
    """

    def __init__(self, format: Format, seed: int, device: torch.device) -> None:
        self.format, self._seed, self._device = format, seed, device

    def numbers(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return what is stored.

        Returns:
            [out, in]: uint8 for integers and fp4 codes, else floats; the exponents of the scales
            [rows, columns] int32; the zero points, likewise, or None.
        """
        form = self.format
        make = torch.Generator(self._device).manual_seed(self._seed + expert)
        more: dict[str, Any] = {"generator": make, "device": self._device}
        size = (form.out, form.width)
        if form.kind in ("fp8", "plain"):
            dtype = torch.float8_e4m3fn if form.kind == "fp8" else torch.bfloat16
            stored = torch.randn(size, dtype=torch.float32, **more).to(dtype)
        else:
            top = 256 if form.kind == "int8" else 16
            stored = torch.randint(0, top, size, dtype=torch.uint8, **more)
        # One scale for all numbers is the same for all experts and for gate and up: some releases
        # convert the numbers of those to the largest scale, and round them.
        spread = 1 if form.grid == (1, 1) else 2
        lowest = round(math.log2(form.width**-0.5 / DEVIATION[form.kind]))
        scales = torch.randint(lowest - spread + 1, lowest + 1, form.grid, **more)
        zeros = torch.randint(4, 12, form.grid, **more) if form.zeros else None
        return stored, scales.int(), zeros

    def __getitem__(self, expert: int) -> torch.Tensor:
        """Return [out, in] fp32."""
        stored, scales, zeros = self.numbers(expert)
        if self.format.kind == "fp4":
            values = torch.tensor([*FP4, *(-one for one in FP4)], device=self._device)
            whole = values[stored.long()]
        elif self.format.kind in ("fp8", "plain"):
            whole = stored.float()
        else:
            middle = 8 if self.format.kind == "int4" else 128
            whole = stored.float() - (middle if zeros is None else self._spread(zeros.float()))
        return whole * self._spread(torch.exp2(scales.float()))

    def _spread(self, grid: torch.Tensor) -> torch.Tensor:
        """Repeat an entry of ``grid`` for all numbers that it is for: [out, in]."""
        rows, columns = self.format.grid
        wide = grid.repeat_interleave(-(-self.format.width // columns), 1)
        tall = wide.repeat_interleave(-(-self.format.out // rows), 0)
        return tall[: self.format.out, : self.format.width]


@dataclass
class Filled:
    """What `fill` wrote.

    Attributes:
        w13, w2: the weights.
        bias13, bias2: [experts, out], or None.
    """

    w13: Weights
    w2: Weights
    bias13: torch.Tensor | None
    bias2: torch.Tensor | None


class Padded:
    """Weights with zeros where vLLM pads the intermediate size after loading.

    Args:
        weights: without padding.
        parts: number of equal blocks of rows (2 for gate and up), of which each is padded; 0 to pad
            the columns.
        size: rows of a block, or columns, with padding.
    """

    def __init__(self, weights: Weights, parts: int, size: int) -> None:
        self._weights, self._parts, self._size = weights, parts, size

    def __getitem__(self, expert: int) -> torch.Tensor:
        """Return [out, in] fp32."""
        return padded(self._weights[expert], self._parts, self._size)


def padded(values: torch.Tensor, parts: int, size: int) -> torch.Tensor:
    """Pad rows or columns with zeros; the arguments are those of `Padded`."""
    if not parts:
        return torch.nn.functional.pad(values, (0, size - values.shape[-1]))
    blocks = values.unflatten(0, (parts, -1))
    gap = [0] * (2 * values.ndim - 1) + [size - blocks.shape[1]]
    return torch.nn.functional.pad(blocks, gap).flatten(0, 1)


Writers = dict[str, Callable[[Weights, int], torch.Tensor]]  # parameter -> what an expert has there


def fill(layer: Any, seed: int = 0) -> Filled:
    """Write random weights into a layer, before vLLM's `process_weights_after_loading`.

    Args:
        layer: vLLM's `RoutedExperts`, with the parameters of its quantisation method.
        seed: of the random numbers.

    Raises:
        UnknownFormatError: see there. Nothing was written.
    """
    moe = layer.moe_config
    inner, hidden = moe.intermediate_size_per_partition, moe.hidden_dim
    fused = 2 if moe.is_act_and_mul else 1
    sizes = {"w13": (fused * inner, hidden), "w2": (hidden, inner)}
    there = dict(layer.named_parameters(recurse=False))
    method = getattr(layer.quant_method, "old_quant_method", layer.quant_method)
    known = {name: _recognised(name, there, *size, method) for name, size in sizes.items()}
    made: dict[str, Any] = {}
    for number, (name, (form, writers)) in enumerate(known.items()):
        weights = Weights(form, seed + 100_000 * (number + 1), there[next(iter(writers))].device)
        for parameter, stored in writers.items():
            for expert, place in enumerate(there[parameter].data):
                place.copy_(stored(weights, expert).reshape(place.shape))
        made[name] = weights
        made[f"{name}_bias"] = _fill_bias(there.get(f"{name}_bias"), moe.has_bias, seed + number)
    written = {parameter for _, writers in known.values() for parameter in writers}
    for name, parameter in there.items():
        if name not in written and not name.endswith("_bias"):
            projection = "w2" if name.startswith("w2_") else "w13"
            _fill_other(name, parameter.data, known[projection][0])
    return Filled(made["w13"], made["w2"], made["w13_bias"], made["w2_bias"])


def _fill_bias(bias: torch.Tensor | None, used: bool, seed: int) -> torch.Tensor | None:
    """Fill the bias of a layer that has one; GPTQ layers have the parameter in any case."""
    if bias is None or not used:
        if bias is not None:
            bias.data.zero_()
        return None
    bias.data.normal_(generator=torch.Generator(bias.device).manual_seed(seed))
    return bias.data.clone()


def _fill_other(name: str, values: torch.Tensor, form: Format) -> None:
    """Fill a parameter that has no weights."""
    if name.endswith("g_idx"):  # the groups in their order
        columns = torch.arange(values.shape[-1], device=values.device)
        values.copy_((columns // (form.width // form.grid[1])).expand_as(values))
    elif name.endswith("qzeros") and values.numel():  # GPTQ has one less than the middle there
        values.fill_(0x77777777 if form.kind == "int4" else 0x7F7F7F7F)
    elif values.is_floating_point():  # scales of inputs
        values.fill_(1.0)
    else:
        values.zero_()


def _recognised(
    name: str, there: dict[str, torch.nn.Parameter], out: int, width: int, method: Any
) -> tuple[Format, Writers]:
    """Find the format of one projection, ``name``, and how its parameters are written."""
    for what in (_integers, _fp8, _mxfp4, _plain):
        for found in what(name, there, out, width, method):
            return found
    shapes = {one: (tuple(p.shape), p.dtype) for one, p in there.items() if one.startswith(name)}
    raise UnknownFormatError(
        f"tune knows no weights like {type(method).__name__}'s, whose {name} are {shapes}"
    )


def _integers(
    name: str, there: dict[str, torch.nn.Parameter], out: int, width: int, method: Any
) -> Iterator[tuple[Format, Writers]]:
    """GPTQ, AWQ, compressed-tensors' pack-quantized, and `moe_wna16`."""
    names = {
        "qweight": ("scales", "qzeros"),
        "weight_packed": ("weight_scale", "weight_zero_point"),
    }
    for suffix, (scales, zero_points) in names.items():
        packed, scale = there.get(f"{name}_{suffix}"), there.get(f"{name}_{scales}")
        if packed is None or scale is None or not scale.is_floating_point():
            continue
        config = getattr(method, "quant_config", None)
        bits = getattr(method, "num_bits", None) or getattr(config, "weight_bits", None)
        if bits not in (4, 8) or packed.dtype not in (torch.int32, torch.uint8):
            continue
        each = 8 * packed.element_size() // bits
        size, kind = tuple(packed.shape[1:]), f"int{bits}"
        zeros = there.get(f"{name}_{zero_points}")
        # "in first" means that a parameter has the columns of the weight as its rows.
        awq = "AWQ" in type(method).__name__
        in_first = awq or size == (width // each, out)
        if size not in ((width // each, out), (out, width // each), (width, out // each)):
            continue
        rows, columns = scale.shape[1:][::-1] if in_first else scale.shape[1:]
        symmetric = getattr(method, "symmetric", getattr(config, "is_sym", None))
        with_zeros = awq or (symmetric is None and zeros is not None and zeros.numel() > 0)
        if symmetric is False or rows != out or (with_zeros and bits == 8):
            continue
        form = Format(kind, out, width, (rows, columns), with_zeros)
        writers: Writers = {
            f"{name}_{suffix}": _packed(packed.dtype, bits, in_first, awq),
            f"{name}_{scales}": _turned(_scales, in_first),
        }
        if with_zeros:
            writers[f"{name}_{zero_points}"] = _zero_points(packed.dtype, in_first, awq)
        yield form, writers


def _packed(
    dtype: torch.dtype, bits: int, in_first: bool, awq: bool
) -> Callable[[Weights, int], torch.Tensor]:
    def write(weights: Weights, expert: int) -> torch.Tensor:
        stored = weights.numbers(expert)[0]
        if awq:  # [in, out / 8]
            return pack(stored.T.contiguous(), bits, dtype, AWQ_ORDER)
        whole = pack(stored, bits, dtype)  # [out, in / 8]
        return whole.T if in_first else whole

    return write


def _zero_points(
    dtype: torch.dtype, in_first: bool, awq: bool
) -> Callable[[Weights, int], torch.Tensor]:
    def write(weights: Weights, expert: int) -> torch.Tensor:
        zeros = weights.numbers(expert)[2]
        assert zeros is not None
        whole = pack(zeros.T.contiguous(), 4, dtype, AWQ_ORDER if awq else None)
        return whole if in_first else whole.T  # packed along out in any case

    return write


def _scales(weights: Weights, expert: int) -> torch.Tensor:
    return torch.exp2(weights.numbers(expert)[1].float())


def _turned(
    write: Callable[[Weights, int], torch.Tensor], turn: bool
) -> Callable[[Weights, int], torch.Tensor]:
    return (lambda weights, expert: write(weights, expert).T) if turn else write


def pack(
    values: torch.Tensor, bits: int, dtype: torch.dtype, order: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Pack small integers along the last dimension, the first in the lowest bits.

    Args:
        values: [..., n], from 0.
        bits: of each.
        dtype: int32 or uint8, to pack into.
        order: the number among those of one word that each position holds; None for the order.
    """
    each = 8 * torch.empty((), dtype=dtype).element_size() // bits
    parts = values.long().unflatten(-1, (-1, each))
    if order is not None:
        parts = parts[..., list(order)]
    shifts = bits * torch.arange(each, device=values.device)
    whole = (parts << shifts).sum(-1)
    if dtype is torch.int32:
        whole = torch.where(whole >= 2**31, whole - 2**32, whole)
    return whole.to(dtype)


def _fp8(
    name: str, there: dict[str, torch.nn.Parameter], out: int, width: int, method: Any
) -> Iterator[tuple[Format, Writers]]:
    """FP8 with a scale for an expert, a row, or a block."""
    weight = there.get(f"{name}_weight")
    if weight is None or weight.dtype is not torch.float8_e4m3fn:
        return
    for suffix in ("weight_scale", "weight_scale_inv"):
        scale = there.get(f"{name}_{suffix}")
        if scale is None or tuple(weight.shape[1:]) != (out, width):
            continue
        if not scale.is_floating_point() or scale.element_size() < 2:
            continue  # MXFP8
        size = tuple(scale.shape[1:])
        grid = (1, 1) if size in ((), (1,), (2,), (1, 1)) else (*size, 1)[:2]
        block = getattr(method, "weight_block_size", None)
        if block and grid != (-(-out // block[0]), -(-width // block[1])):
            continue
        if not block and grid not in ((1, 1), (out, 1)):
            continue
        if out % grid[0] or width % grid[1]:
            continue  # the last block is smaller
        form = Format("fp8", out, width, (grid[0], grid[1]))

        def scales(weights: Weights, expert: int, size: tuple[int, ...] = size) -> torch.Tensor:
            found = _scales(weights, expert)
            return found.expand(1, 2) if size == (2,) else found

        yield (
            form,
            {
                f"{name}_weight": lambda weights, expert: weights.numbers(expert)[0],
                f"{name}_{suffix}": scales,
            },
        )


def _mxfp4(
    name: str, there: dict[str, torch.nn.Parameter], out: int, width: int, method: Any
) -> Iterator[tuple[Format, Writers]]:
    """MXFP4: two codes a byte, and an exponent for 32 numbers of a row."""
    for suffix in ("weight", "weight_packed"):
        weight, scale = there.get(f"{name}_{suffix}"), there.get(f"{name}_weight_scale")
        if weight is None or scale is None or not weight.dtype == scale.dtype == torch.uint8:
            continue
        if tuple(weight.shape[1:]) != (out, width // 2) or width % 32:
            continue
        if tuple(scale.shape[1:]) != (out, width // 32):
            continue
        yield (
            Format("fp4", out, width, (out, width // 32)),
            {
                f"{name}_{suffix}": lambda weights, expert: pack(
                    weights.numbers(expert)[0], 4, torch.uint8
                ),
                f"{name}_weight_scale": lambda weights, expert: (
                    weights.numbers(expert)[1] + E8M0_BIAS
                ).to(torch.uint8),
            },
        )


def _plain(
    name: str, there: dict[str, torch.nn.Parameter], out: int, width: int, method: Any
) -> Iterator[tuple[Format, Writers]]:
    """Unquantised weights."""
    weight = there.get(f"{name}_weight")
    if weight is None or not type(method).__name__.startswith("Unquantized"):
        return
    if tuple(weight.shape[1:]) == (out, width):
        form = Format("plain", out, width, (1, 1))
        yield form, {f"{name}_weight": lambda weights, expert: weights[expert]}
