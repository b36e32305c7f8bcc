"""One of vLLM's own MoE layers with LoRA, as an engine runs it, for quantised base weights.

For unquantised experts sides.py calls the kernels one by one. Here the whole layer runs: vLLM's
quantisation method, its repacked weights, its experts (MarlinExperts, ...), and its LoRA wrapper.
Only the `PunicaWrapperGPU` is replaced: `Switch` lets upstream's kernels or ours add the LoRA, and
keeps what they read and wrote, so that each step can be compared with fp32.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_moe_lora.layers.gpu import choose, moe_kernels
from vllm_moe_lora.records import LayerShape
from vllm_moe_lora.tuning import cases, packed, sides
from vllm_moe_lora.tuning.numbers import ROUNDING, Expected, wrong

ROUNDINGS = 4  # of the base: the sum, the bias, and the router weight are rounded one by one


@dataclass
class Seen:
    """What the LoRA of one run read and wrote.

    Attributes:
        before: [w13, w2], [pairs, out], what was there before LoRA was added.
        after: the same, after it.
        act: [pairs, inner], what w2 reads.
    """

    before: list[torch.Tensor]
    after: list[torch.Tensor]
    act: torch.Tensor | None = None


class Switch:
    """Stands in the place of a `PunicaWrapperGPU`: upstream's kernels add LoRA, or ours.

    Args:
        punica: vLLM's, with the metadata of the batch.
        factors: for our kernels; None for upstream's.
        gate: the address of gate's lora_a in vLLM's buffers.
        slots: [tokens] int32, the adapter slot of each token, -1 for none.
        seen: where to keep copies; None to keep none.
    """

    def __init__(
        self,
        punica: Any,
        factors: moe_kernels.LayerFactors | None,
        gate: int,
        slots: torch.Tensor,
        seen: Seen | None = None,
    ) -> None:
        self._punica, self._factors, self._gate = punica, factors, gate
        self._slots, self.seen = slots, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._punica, name)

    def add_lora_w13(self, *args: Any, **more: Any) -> Any:
        """See `PunicaWrapperGPU.add_lora_w13`."""
        given = _given(self._punica.add_lora_w13, args, more)
        return self._seen(given, lambda: self._add_w13(given, args, more))

    def add_lora_w2(self, *args: Any, **more: Any) -> Any:
        """See `PunicaWrapperGPU.add_lora_w2`."""
        given = _given(self._punica.add_lora_w2, args, more)
        if self.seen is not None:
            self.seen.act = given["x"].clone()
        return self._seen(given, lambda: self._add_w2(given, args, more))

    def _add_w13(self, given: dict[str, Any], args: Any, more: Any) -> Any:
        if self._factors is None:
            return self._punica.add_lora_w13(*args, **more)
        from vllm_moe_lora.kernels.triton import launch, route

        factors = self._factors.w13
        if given["lora_a_stacked"][0].data_ptr() != self._gate:
            factors = self._factors.swapped
        sizes = factors.num_slots, factors.num_experts, factors.dtype
        mapped = {"expert_map": given["expert_map"], "active": self._factors.active}
        routing = route.route(given["topk_ids"], self._slots, *sizes, **mapped)
        add = given.get("add_inputs", True)
        launch.add_lora(given["y"], given["x"], factors, routing, add_inputs=add)
        return routing, None, None, self._slots

    def _add_w2(self, given: dict[str, Any], args: Any, more: Any) -> Any:
        if self._factors is None:
            return self._punica.add_lora_w2(*args, **more)
        from vllm_moe_lora.kernels.triton import launch

        routing, weights = given["sorted_token_ids_lora"], given["topk_weights"]
        add = given.get("add_inputs", True)
        launch.add_lora(given["y"], given["x"], self._factors.w2, routing, weights, add)
        return None

    def _seen(self, given: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Run, and keep the output before and after."""
        if self.seen is None:
            return run()
        y = given["y"].view(-1, given["y"].shape[-1])
        self.seen.before.append(y.clone())
        result = run()
        self.seen.after.append(y.clone())
        return result


def _given(function: Callable[..., Any], args: Any, more: Any) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    return dict(inspect.signature(function).bind(*args, **more).arguments)


@contextmanager
def _as_in_an_engine(dtype: torch.dtype) -> Iterator[None]:
    """Have the model's dtype as torch's default, and vLLM's own LoRA buffers, inside the block."""
    name, default = "VLLM_MOE_LORA_KERNELS", torch.get_default_dtype()
    before = os.environ.get(name)
    os.environ[name] = "upstream"
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class Served:
    """A layer of vLLM's with random base weights and random adapters in its slots.

    Attributes:
        shape: as an engine would name it.
        layer: the LoRA factors and the base weights in fp32.
        experts: the name of the class that computes the base GEMMs.
        exact: whether these read the tokens as they are. If they quantise them, fp32 says nothing
            of what they must return.
    """

    def __init__(self, runner: Any, config: Any, model: Any, fused: bool, seed: int = 0) -> None:
        """Fill a layer, let vLLM repack its weights, and wrap it.

        Args:
            runner: vLLM's `MoERunner`, whose `routed_experts` has its parameters on the device.
            config: vLLM's.
            model: the model's config, of transformers.
            fused: whether gate and up have the same factors (`FusedMoE3DWithLoRA`).
            seed: of the random numbers.

        Raises:
            packed.UnknownFormatError: of the weights.
            ValueError: the experts do not add the LoRA to what their base GEMMs wrote.
        """
        routed, lora = runner.routed_experts, config.lora_config
        experts = getattr(getattr(routed.quant_method, "experts_cls", None), "__name__", "")
        if experts.startswith("TrtLlm"):
            raise ValueError(
                f"{experts} take the LoRA as an input of one kernel for the whole layer"
            )
        from vllm.lora.layers import fused_moe

        self._config, self._routed = config, routed
        base = packed.fill(routed, seed)
        kind = fused_moe.FusedMoE3DWithLoRA if fused else fused_moe.FusedMoEWithLoRA
        with _as_in_an_engine(routed.moe_config.in_dtype):
            routed.quant_method.process_weights_after_loading(routed)
            made: Any = kind(runner)
            made.create_lora_weights(lora.max_loras, lora, model)
        self._wrapper = made
        made.adapter_enabled.fill_(1)
        self.shape: LayerShape = choose.shape_of(made)
        stacks = (
            tuple(made.w13_lora_a_stacked),
            tuple(made.w13_lora_b_stacked),
            tuple(made.w2_lora_a_stacked),
            tuple(made.w2_lora_b_stacked),
        )
        self.layer = cases.filled(self.shape, stacks, made.adapter_enabled, seed)
        # The stacks have the intermediate size that the kernel really has.
        fused_rows, inner = self.shape.fused, self.shape.inner
        self.layer.w13 = packed.Padded(base.w13, fused_rows, inner)
        self.layer.w2 = packed.Padded(base.w2, 0, inner)
        self.layer.bias13, self.layer.bias2 = base.bias13, base.bias2
        if base.bias13 is not None:
            rows = [packed.padded(one, fused_rows, inner) for one in base.bias13]
            self.layer.bias13 = torch.stack(rows)
        self.layer.expert_map = routed.expert_map
        kernel = made._moe_kernel
        self.experts = type(kernel.fused_experts).__name__
        self.exact = kernel.fused_experts.quant_config.quant_dtype is None
        self._poison = False
        self._apply = kernel.fused_experts.apply
        kernel.fused_experts.apply = self._poisoned

    def _poisoned(self, *args: Any, **more: Any) -> Any:
        """Run the experts; while a run is checked, fill what they write with NaN before."""
        if self._poison:
            for name in ("output", "workspace13", "workspace2"):
                if more[name].is_floating_point():
                    more[name].fill_(torch.nan)
        return self._apply(*args, **more)

    @contextmanager
    def _poisoning(self, wanted: bool) -> Iterator[None]:
        self._poison = wanted
        try:
            yield
        finally:
            self._poison = False

    def call(
        self,
        batch: cases.Batch,
        factors: moe_kernels.LayerFactors | None,
        seen: Seen | None = None,
        keep: list[torch.Tensor] | None = None,
    ) -> sides.Call:
        """Return a call of the whole layer: base GEMMs, LoRA, activation and sum.

        Args:
            batch: what to run on; its ``act`` is not used.
            factors: of our kernels; None for upstream's.
            seen: where to keep what the LoRA read and wrote.
            keep: where to put the layer's answer, [tokens, hidden].
        """
        gate = self.layer.a13[0].data_ptr()
        made = sides.punica_of(self.shape, batch)
        punica: Any = Switch(made, factors, gate, batch.slots, seen)

        def call() -> None:
            from vllm.forward_context import set_forward_context

            self._wrapper.set_mapping(punica)
            with (
                set_forward_context(None, self._config),
                torch.inference_mode(),
                self._poisoning(seen is not None),
            ):
                found = self._wrapper.quant_method.apply(
                    layer=self._routed,
                    x=batch.x,
                    topk_weights=batch.weights,
                    topk_ids=batch.ids,
                    shared_experts=None,
                    shared_experts_input=None,
                )
            if keep is not None:
                keep.append(found)

        return call

    def judged(
        self, batch: cases.Batch, factors: moe_kernels.LayerFactors | None
    ) -> tuple[str, str]:
        """Run the layer once and compare each step with fp32.

        Args:
            batch: what to run on.
            factors: of our kernels; None for upstream's.

        Returns:
            What is wrong with the LoRA, and what with the rest of the layer; "" for nothing.
        """
        seen, keep = Seen([], []), list[torch.Tensor]()
        self.call(batch, factors, seen, keep)()
        assert seen.act is not None
        batch = replace(batch, act=seen.act.view(-1, seen.act.shape[-1]))
        expected = Expected(self.layer, batch)
        added = wrong(seen.after, expected, seen.before, "onto")
        return added, self._base(batch, seen, expected, keep[0])

    def _base(
        self, batch: cases.Batch, seen: Seen, expected: Expected, answer: torch.Tensor
    ) -> str:
        """Return what is wrong with the base GEMMs or the final sum."""
        here = self.layer.here(batch.ids) >= 0
        for index, name in enumerate(("w13", "w2")):
            # gpt-oss' gate and up alternate: with factors of their own, LoRA is computed apart.
            apart = index == 0 and not seen.before[0].any()
            if not self.exact or apart:
                continue
            rows, want = here.flatten(), expected.base[index]
            found = seen.before[index].float()[rows]
            allowed = ROUNDINGS * ROUNDING[batch.x.dtype] * want.abs() + expected.slack[index]
            off = (found - want[rows]).abs()
            if not (off <= allowed[rows] + 1e-7).all():
                worst = float(off.nan_to_num(torch.inf).max())
                return f"the base GEMM of {name} is off by up to {worst:.6g} from fp32"
        terms = seen.after[1].view(*batch.ids.shape, -1).float()
        terms = terms.masked_fill(~here[..., None], 0.0)
        want, size = terms.sum(1), terms.abs().sum(1)
        # Some experts sum in 16 bits, one term after the other.
        allowed = batch.ids.shape[1] * ROUNDING[batch.x.dtype] * size + 1e-7
        if not ((answer.float() - want).abs() <= allowed).all():
            return "the layer's answer is not the sum of its experts' outputs"
        return ""
