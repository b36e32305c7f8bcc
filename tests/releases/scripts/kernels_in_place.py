"""Child: our Triton kernels where a release's experts call Punica's; prints JSON.

In Triton's interpreter, or where MOE_LORA_DEVICE=cuda on the GPU, with a vLLM that is built for it
and nothing replaced. The release's own are the layer, its LoRA wrapper with `set_lora`, the
modular kernel, the experts, their mixin and `PunicaWrapperGPU`. Replaced are the base's operators,
by loops. For each case:
"moved", how far adapters move the layer's answer; "off", how far the answer is from fp32 loops',
both relative to the largest number of theirs; "calls", how often our kernels and upstream's ran;
"bits", a hash of the answer; "pages", whether the layer's stacks are in pages. With
MOE_LORA_DENSE=1 none are.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import sys
import types
from pathlib import Path
from unittest import mock

os.environ.setdefault("MOE_LORA_DEVICE", "cpu")
# Before triton is imported.
os.environ["TRITON_INTERPRET"] = str(int(os.environ["MOE_LORA_DEVICE"] == "cpu"))
os.environ["VLLM_MOE_LORA_KERNELS"] = "ours"
sys.path.insert(0, str(Path(__file__).parents[2]))

import int4
import kernel_operators
import quantised_experts as layers
import stage
import torch
from kernel_cases import (
    ABSENT,
    CASES,
    HIDDEN,
    INNER,
    RANK,
    REFUSED,
    SLOTS,
    TAIL,
    TAILLESS,
    TOP_K,
    adapter,
    loop,
)

DEVICE = os.environ["MOE_LORA_DEVICE"]


def config_for(case, base, name):
    from vllm.config.lora import LoRAConfig

    more = {"enable_moe_shared_loras": True} if case.shared else {}
    more |= {"fully_sharded_loras": True} if name == "sharded in the rank" else {}
    made = LoRAConfig(max_lora_rank=RANK, max_loras=SLOTS, lora_dtype=case.dtype, **more)
    if name == "rank 4 at most":
        made.max_lora_rank = 4
    base.lora_config = made
    return made


def layer_of(case, number):
    """The release's layer, its experts and its weights [experts, out, in] in fp32, by name."""
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory as factory

    if case.kind != "plain":
        weights = int4.Weights(7, zeros=False)
        with torch.device(DEVICE):
            layer, routed = layers.layer_of(case.kind, number, weights)
        int4.fill(routed, case.kind, weights)
        dense = {"w13": weights.dense("w13"), "w2": weights.dense("w2")}
    else:
        names = ("gate_proj", "down_proj", "up_proj" if case.gated else None)
        with _a_gpu_when_asked(not case.gated), torch.device(DEVICE):
            layer = factory(
                num_experts=case.experts,
                top_k=TOP_K,
                hidden_size=HIDDEN,
                intermediate_size=INNER,
                params_dtype=case.dtype,
                activation="silu" if case.gated else "relu2_no_mul",
                prefix=f"model.layers.{number}.mlp.experts",
                ckpt_names=names,
            )
        routed, dense = layer.routed_experts, {}
        make = torch.Generator().manual_seed(5)
        for name in ("w13", "w2"):
            weight = getattr(routed, f"{name}_weight").data
            weight.copy_(torch.randn(weight.shape, generator=make) / weight.shape[2] ** 0.5)
            dense[name] = weight.float().cpu().clone()
    routed.quant_method.process_weights_after_loading(routed)
    return layer, routed, dense


def _a_gpu_when_asked(wanted):
    """Experts that are not gated are refused where there is no GPU."""
    from vllm.platforms import current_platform

    if not wanted:
        return contextlib.nullcontext()
    return mock.patch.object(type(current_platform), "is_cuda_alike", return_value=True)


class Calls:
    """Counts the calls of our kernels and upstream's; the latter want a GPU to do more."""

    def __init__(self):
        self.ours = self.theirs = self.tails = 0

    def __enter__(self):
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

        from vllm_moe_lora.kernels.triton import grouped, launch

        real, product = launch.add_lora, grouped.grouped_product

        def add_lora(*args, **more):
            self.ours += 1
            return real(*args, **more)

        def grouped_product(*args, **more):
            self.tails += 1
            return product(*args, **more)

        upstream = PunicaWrapperGPU.add_lora_fused_moe

        def theirs(punica, *args, **more):
            self.theirs += 1
            return upstream(punica, *args, **more) if DEVICE != "cpu" else None

        def align(punica, topk_ids, *args, **more):
            return None, None, topk_ids.flatten(), None

        self.patches = [
            mock.patch.object(launch, "add_lora", add_lora),
            mock.patch.object(grouped, "grouped_product", grouped_product),
            mock.patch.object(PunicaWrapperGPU, "add_lora_fused_moe", theirs),
        ]
        config = "vllm.lora.layers.utils.try_get_optimal_moe_lora_config"
        if DEVICE == "cpu":
            self.patches += [
                mock.patch.object(PunicaWrapperGPU, "moe_lora_align_block_size", align),
                mock.patch(config, return_value={}),
            ]
        for one in self.patches:
            one.start()
        return self

    def __exit__(self, *error):
        for one in self.patches:
            one.stop()


@contextlib.contextmanager
def room():
    """Pages for full slots, as a model's layers get them from its manager."""
    from vllm_moe_lora.kernels.paged_stack import pages_for
    from vllm_moe_lora.layers.gpu import pages

    if os.environ.get("MOE_LORA_DENSE") == "1":
        yield
        return
    with pages.blocks_each(SLOTS * pages_for(RANK)):
        yield


def poison(wrapper):
    """Write NaN where no adapter is; return whether the layer has pages."""
    from vllm_moe_lora.layers.gpu import pages

    if found := pages.in_pages(wrapper):
        for name in ("w13_lora_a", "w13_lora_b", "w2_lora_a", "w2_lora_b"):
            getattr(wrapper, f"{name}_stacked")[0].arena.memory.fill_(torch.nan)
    return found


def punica_for(case, lora_config):
    # Dispatched tokens are not the batch's own, which all have the last adapter, or none.
    slots = [case.local] * case.tokens if case.dispatched else case.slots
    return stage.punica_of_a_gpu(slots, SLOTS, lora_config, DEVICE)


def run(name, case, number, config):
    from vllm.forward_context import set_forward_context
    from vllm.lora.layers.fused_moe import FusedMoE3DWithLoRA, FusedMoEWithLoRA

    lora_config = config_for(case, config, name)
    layer, routed, dense = layer_of(case, number)
    wrapper = (FusedMoE3DWithLoRA if case.fused else FusedMoEWithLoRA)(layer)
    model = types.SimpleNamespace(architectures=["Qwen3_5MoeForConditionalGeneration"])
    with room():
        wrapper.create_lora_weights(SLOTS, lora_config, model)
    has_pages = poison(wrapper)
    punica = punica_for(case, lora_config)
    wrapper.set_mapping(punica)
    adapters = {}
    for seed, (slot, rank) in enumerate(case.ranks):
        made = {n: tuple(t.to(case.dtype) for t in ab) for n, ab in
                adapter(case, rank, seed).items()}  # fmt: skip
        names = ["w13", "w2"] if case.fused else ["w1", "w2", "w3"]
        wrapper.set_lora(slot, [made[n][0] for n in names], [made[n][1] for n in names])
        adapters[slot] = {n: (a.float(), b.float()) for n, (a, b) in made.items()}
    for slot in case.cleared:
        wrapper.reset_lora(slot)
        del adapters[slot]
    make = torch.Generator().manual_seed(number)
    x = torch.randn(case.tokens, HIDDEN, generator=make).to(case.dtype)
    ids = torch.rand(case.tokens, case.experts, generator=make).topk(TOP_K).indices
    weights = torch.rand(case.tokens, TOP_K, generator=make) + 0.5
    if name.endswith("weights transposed"):
        weights = weights.t().contiguous().t()
    here = list(range(case.experts))
    if case.mapped:  # the last are here, in another order; the model has ABSENT more, not here
        here = [-1] * ABSENT + here[::-1]
        ids = torch.rand(case.tokens, len(here), generator=make).topk(TOP_K).indices
    with Calls() as calls, set_forward_context(None, config), torch.inference_mode():
        given = (x.to(DEVICE, copy=True), weights.to(DEVICE), ids.to(DEVICE, case.ids))
        if case.mapped or case.apart:
            answer = apply(case, wrapper, routed, *given, here)
        else:
            answer = layers.forward(layer, routed, *given)
        if name == "up before gate":
            return swapped(case, wrapper, routed, *given) | {"pages": has_pages}
    answer = answer.cpu()
    want = loop(case, dense, x, weights, ids, adapters, here)
    plain = loop(case, dense, x, weights, ids, {}, here)
    size = want.abs().max()
    return {
        "moved": float((want - plain).abs().max() / size),
        "off": float((answer.float() - want).abs().max() / size),
        "calls": [calls.ours, calls.theirs],
        "bits": hashlib.sha256(answer.contiguous().view(torch.uint8).numpy()).hexdigest(),
        "tails": calls.tails,
        "base": len(kernel_operators.launched),
        "experts": type(wrapper._moe_kernel.fused_experts).__name__,
        "ranks": ranks_are_right(wrapper, case, adapters),
        "pages": has_pages,
    }


def ranks_are_right(wrapper, case, adapters):
    """Whether the kernels are told each factor's own rank, and which pairs have none at all."""
    kept = wrapper.__dict__.get("_moe_lora_factors")
    if kept is None:
        return None
    names = [["w13"] if case.fused else ["w1", "w3"] if case.gated else ["w1"], ["w2"]]
    active = torch.zeros(SLOTS, case.experts, dtype=torch.bool)
    for factors, projections in zip((kept.w13, kept.w2), names, strict=True):
        want = torch.zeros(len(projections), SLOTS, case.experts, dtype=torch.int32)
        for slot, found in adapters.items():
            for index, projection in enumerate(projections):
                a, b = found[projection]
                for expert in range(case.experts):
                    for rank in range(a.shape[1]):
                        if a[expert, rank].any() and b[expert, :, rank].any():
                            want[index, slot, expert] = rank + 1
        active |= want.gt(0).any(0)
        if not torch.equal(want, factors.ranks.cpu()):
            return False
    return torch.equal(active, kept.active.cpu())


def swapped(case, wrapper, routed, x, weights, ids):
    """As TRT-LLM's experts ask for gate's and up's share: alone, up first."""
    experts, found = wrapper._moe_kernel.fused_experts, []
    for swap in (False, True):
        y = torch.zeros(case.tokens, TOP_K, 2 * INNER, dtype=x.dtype, device=DEVICE)
        with Calls() as calls:
            experts.apply_w13_lora(
                experts._lora_context,
                y=y,
                x=x,
                topk_ids=ids,
                topk_weights=weights,
                expert_map=None,
                w1=routed.w13_weight,
                w2=routed.w2_weight,
                num_tokens=case.tokens,
                top_k_num=TOP_K,
                add_inputs=False,
                swap_w13_slices=swap,
            )
        found.append(y.float().cpu())
    want = torch.cat(found[0].chunk(2, dim=-1)[::-1], dim=-1)
    size = want.abs().max()
    return {
        "moved": float((want - found[0]).abs().max() / size),
        "off": float((want - found[1]).abs().max() / size),
        "calls": [2 * calls.ours, calls.theirs],
        "experts": type(experts).__name__,
        "ranks": True,
    }


def apply(case, wrapper, routed, x, weights, ids, here):
    """The experts by themselves: what the modular kernel hands them on a GPU among several."""
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    experts = wrapper._moe_kernel.fused_experts
    context = experts._lora_context
    if case.dispatched:
        context.local_token_lora_mapping = torch.tensor(
            case.slots, dtype=torch.int32, device=DEVICE
        )
    if case.apart:
        context.aux_stream, context.events = object(), (None,) * 4
    activation = wrapper.moe_config.activation
    first, second, _ = experts.workspace_shapes(
        case.tokens, 2 * INNER, HIDDEN, TOP_K, len(here), case.experts, None, activation
    )
    out, empty = torch.empty_like(x), {"dtype": x.dtype, "device": DEVICE}
    own = torch.tensor(here, dtype=torch.int32, device=DEVICE)
    together = mock.patch.object(
        triton_moe, "maybe_execute_in_parallel", lambda one, other, *rest: (one(), other())
    )
    with together:
        experts.apply(
            output=out,
            hidden_states=x,
            w1=routed.w13_weight,
            w2=routed.w2_weight,
            topk_weights=weights,
            topk_ids=ids,
            activation=activation,
            global_num_experts=len(here),
            expert_map=own if case.mapped else None,
            a1q_scale=None,
            a2_scale=None,
            workspace13=torch.full(first, float("nan"), **empty),
            workspace2=torch.full(second, float("nan"), **empty),
            expert_tokens_meta=None,
            apply_router_weight_on_input=False,
        )
    return out


def main():
    config, release = stage.begin(torch.float32, DEVICE)
    import vllm.lora.layers.fused_moe  # noqa: F401

    for kind in ("gptq", "moe_wna16"):
        layers.method_of(kind)
    if DEVICE == "cpu":
        importlib.import_module("bf16_exact")
        kernel_operators.stand_in()
    results = {"release": release, "cases": {}}
    results["status"] = stage.hooks_of_a_gpu(release, "moe-kernels", "quantised-experts")
    chosen = {**CASES, **REFUSED, **TAIL, **TAILLESS}
    for number, (name, case) in enumerate(chosen.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        if case.kind != "plain" and DEVICE == "cpu":
            layers.choose(case.kind)
        settings = {"asked for upstream": "upstream", "not measured": "auto"}
        os.environ["VLLM_MOE_LORA_KERNELS"] = settings.get(
            name, "tail" if name.startswith("tail, ") else "ours"
        )
        kernel_operators.launched.clear()
        asked = functools.partial(run, name, case, number, config)
        results["cases"][name] = stage.attempted(asked, name)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
