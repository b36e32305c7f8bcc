"""Compares what a kernel wrote with the same sums in fp32, number by number."""

from __future__ import annotations

import torch

from vllm_moe_lora.tuning.cases import Batch, Dense, Layer

# How far one rounding of a factor, or of a sum, may be off: half a unit in the last place, doubled.
# fp32 products of upstream's kernels are in tf32, which has 10 bits as fp16 has.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-10}
SUMMING = 2**-18  # a sum of fp32 numbers in any order, relative to the sum of their magnitudes


class Expected:
    """What w13 and w2 must return for one batch.

    Attributes:
        lora: [w13, w2], each [pairs, out] fp32, what LoRA adds; router weights are applied to w2.
        base: [w13, w2], what the base GEMMs return; zeros without base weights, and for experts on
            other devices.
        slack: [w13, w2], the error that rounding may cause.
        touched: [w13, w2], each [pairs, out] bool, where an adapter has a factor.
    """

    def __init__(self, layer: Layer, batch: Batch) -> None:
        """Compute everything by one product for each slot and expert in the batch."""
        self.lora: list[torch.Tensor] = []
        self.base: list[torch.Tensor] = []
        self.slack: list[torch.Tensor] = []
        self.touched: list[torch.Tensor] = []
        tokens = torch.arange(batch.tokens, device=batch.x.device)
        of_pair = tokens.repeat_interleave(layer.shape.top_k)
        weights = batch.weights.flatten()[:, None]
        first, second = (layer.w13, layer.bias13), (layer.w2, layer.bias2)
        self._project(layer, batch, batch.x[of_pair], layer.a13, layer.b13, *first)
        self._project(layer, batch, batch.act, layer.a2, layer.b2, *second)
        for values in (self.lora, self.base, self.slack):
            values[1] *= weights

    def _project(
        self,
        layer: Layer,
        batch: Batch,
        x: torch.Tensor,
        lora_a: tuple[torch.Tensor, ...],
        lora_b: tuple[torch.Tensor, ...],
        base: Dense | None,
        bias: torch.Tensor | None,
    ) -> None:
        """Add one projection to the lists. ``x`` has one row for each pair."""
        ids = layer.here(batch.ids.flatten())
        slots = batch.slots.repeat_interleave(layer.shape.top_k)
        out = sum(b.shape[2] for b in lora_b)
        lora, slack, of_base = (
            torch.zeros(len(ids), out, dtype=torch.float32, device=x.device) for _ in range(3)
        )
        touched = torch.zeros_like(lora, dtype=torch.bool)
        rounding = ROUNDING[x.dtype]
        for expert in ids.unique().tolist():
            if base is not None and expert >= 0:
                rows = (ids == expert).nonzero().flatten()
                weight, given = base[expert].float(), x[rows].float()
                of_base[rows] = given @ weight.T
                slack[rows] += SUMMING * (given.abs() @ weight.abs().T)
                if bias is not None:
                    # It may be added after a rounding.
                    slack[rows] += rounding * (of_base[rows].abs() + bias[expert].abs())
                    of_base[rows] += bias[expert].float()
        for slot, expert in torch.stack([slots, ids]).T.unique(dim=0).tolist():
            if min(slot, expert) < 0 or int(layer.ranks[slot, expert]) == 0:
                continue
            rows = ((ids == expert) & (slots == slot)).nonzero().flatten()
            given, start = x[rows].float(), 0
            for a, b in zip(lora_a, lora_b, strict=True):
                # Shared factors exist once.
                down, up = (one[slot, expert % one.shape[1]].float() for one in (a, b))
                z, stop = given @ down.T, start + up.shape[0]
                unsure = rounding * z.abs() + SUMMING * (given.abs() @ down.abs().T)
                lora[rows, start:stop] = z @ up.T
                slack[rows, start:stop] += unsure @ up.abs().T
                start = stop
            touched[rows] = True
        self.lora.append(lora)
        self.base.append(of_base)
        self.slack.append(slack)
        self.touched.append(touched)


def wrong(
    found: list[torch.Tensor], expected: Expected, start: list[torch.Tensor], how: str
) -> str:
    """Return what is wrong with the outputs of a kernel, or "" if nothing is.

    Args:
        found: [w13, w2], what the kernel left in its outputs, [pairs, out] each.
        expected: of the same batch.
        start: [w13, w2], what the outputs held before.
        how: "add" (LoRA was added to ``start``), "onto" (the same, and pairs without a factor keep
            every bit of ``start``, which may be NaN), "store" (LoRA was stored; the same of pairs
            without a factor), or "base" (base and LoRA were stored in all rows).

    Returns:
        The name of the projection, the place and both numbers of the worst error.
    """
    for index, name in enumerate(("w13", "w2")):
        y, before, lora = found[index], start[index].float(), expected.lora[index]
        if how in ("add", "onto"):
            want = before + lora
        elif how == "store":
            want = torch.where(expected.touched[index], lora, before)
        else:
            want = expected.base[index] + lora
        allowed = expected.slack[index] + ROUNDING[y.dtype] * want.abs() + 1e-7
        if how in ("store", "onto"):  # NaN is expected where nothing is to be written
            kept = ~expected.touched[index]
            same = (y.float() == want) | (y.float().isnan() & want.isnan())
            bad = torch.where(kept, ~same, ~((y.float() - want).abs() <= allowed))
        else:
            bad = ~((y.float() - want).abs() <= allowed)  # NaN is bad
        if bad.any():
            excess = torch.where(bad, (y.float() - want).abs().nan_to_num(torch.inf), -1.0)
            row, column = divmod(int(excess.argmax()), y.shape[1])
            got, wanted = float(y[row, column]), float(want[row, column])
            return (
                f"{name}: {int(bad.sum())} of {bad.numel()} numbers are wrong; pair {row}, "
                f"column {column} is {got:.6g}, expected {wanted:.6g}"
            )
    return ""
