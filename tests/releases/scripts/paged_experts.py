"""Child: factors in pages, under one release's LoRA manager; prints JSON.

As parallel_experts.py, whose managers, wrappers and ranks these are, with our Triton kernels in the
interpreter and room for two adapters of 8 ranks. "cases": what `parallel_experts.run` says of each,
"pages", for each rank how many blocks of 8 ranks it has, None for dense slots, "dense", how many
dense stacks were allocated, if only for a moment, and "calls" of our kernels. "life": what is said
to adapters that come and go, and how many ranks are free after it. "starts": the errors of engines
that do not start. "measured": as "cases", where a record chooses.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
sys.path.insert(0, str(Path(__file__).parents[2]))

import lora_operators
import parallel_cases
import parallel_experts
import quantised_experts
import ranks
import stage
import torch
from parallel_cases import (
    EP,
    FUSED,
    LLAMA,
    OSS,
    RAGGED,
    SHARDED,
    SHARED,
    UNEVEN,
    Case,
    GptOss,
    MovedByLayer,
)
from parallel_truth import Adapter, answer

MAX_RANK, SLOTS = 32, stage.SLOTS


class Rounded(Case):
    """Factors of another dtype than the activations, which our kernels do not take."""

    lora_dtype = torch.bfloat16


def cases():
    more = {"max_rank": MAX_RANK}
    return [
        Case("tp2", size=2, **more),
        Case("ragged", **RAGGED, **more),
        Case("fused, tp2", size=2, **FUSED, **more),
        GptOss("interleaved", **OSS, **more),
        Case("ep3 uneven, ragged", **{**UNEVEN, **RAGGED}, **more),
        Case("shared factors", **SHARED, **more),
        MovedByLayer("moved", size=2, **EP, eplb=True, redundant=2, **more),
        Case("router weights on input", **LLAMA, **more),
        Case("sharded in the rank", size=2, **SHARDED, **more),
        Rounded("factors in bf16", **more),
    ]


def block_bytes(case):
    """Of 8 ranks on rank 0, by hand: columns of lora_a and rows of lora_b, in fp32."""
    experts, (rows, columns) = len(case.owned(0)), case.cuts(0)
    hidden = case.hidden

    def size(cut):
        return len(range(hidden if cut == slice(None) else case.inner)[cut])

    outer = 1 if case.lora.get("enable_moe_shared_loras") else experts
    ups = ("w1",) if case.fused else ("w1", "w3")
    up_a = sum(size(columns[name]) for name in ups) * outer
    up_b = (size(rows["w1"]) + size(rows["w3"])) * experts
    return 4 * 8 * (up_a + up_b + size(columns["w2"]) * experts + size(rows["w2"]) * outer)


def run(case, base, folder):
    from vllm_moe_lora.kernels.triton import launch

    made, init, zeros, dense = [], parallel_experts.Rank.__init__, torch.zeros, []

    def allocated(*size, **more):
        shape = size[0] if isinstance(size[0], tuple) else size
        if len(shape) == 4 and more.get("device") != torch.device("meta"):
            dense.append(shape)
        return zeros(*size, **more)

    def kept(self, *args):
        with mock.patch("vllm.lora.layers.fused_moe.torch.zeros", allocated):
            init(self, *args)
        made.append(self)

    os.environ["VLLM_MOE_LORA_MEMORY"] = str(2 * block_bytes(case))
    with (
        mock.patch.object(parallel_experts.Rank, "__init__", kept),
        mock.patch.object(launch, "add_lora", wraps=launch.add_lora) as ours,
    ):
        found = parallel_experts.run(case, base, folder)
    has = {"pages": [blocks(one.wrapper) for one in made], "dense": len(dense)}
    return found | has | {"calls": ours.call_count}


def arenas(wrapper):
    names = ("w13_lora_a", "w13_lora_b", "w2_lora_a", "w2_lora_b")
    stacks = [getattr(wrapper, f"{name}_stacked")[0] for name in names]
    return [one.arena for one in stacks if hasattr(one, "arena")]


def blocks(wrapper, free=False):
    """Blocks of 8 ranks of all slices and experts: of the fullest arena; None without."""
    found = set()
    for arena in arenas(wrapper):
        _, slices, experts, _ = arena.table.shape
        pages = arena.free_pages if free else arena.memory.shape[0]
        found.add(pages / slices / experts)
    assert free or len(found) <= 1, "all arenas have the same number"
    return min(found, default=None)


class Life:
    """One rank with room for 24 ranks in all, to which adapters come and go."""

    def __init__(self, base, folder):
        self.case = Case("life", max_rank=MAX_RANK)
        self.whole, self.folder, self.adapters = self.case.whole(), folder, {}
        os.environ["VLLM_MOE_LORA_MEMORY"] = str(3 * block_bytes(self.case))
        self.one = parallel_experts.Rank(self.case, 0, base, self.whole)
        self.one.warm_up()
        self.said = []

    @property
    def manager(self):
        return self.one.worker._adapter_manager

    def note(self, what, error=""):
        self.said.append((what, error, 8 * blocks(self.one.wrapper, free=True)))

    def load(self, number, rank, seed=0, replace=False, without=()):
        from vllm.lora.request import LoRARequest

        adapter = Adapter(self.whole, rank, 10 * number + seed)
        adapter.factors |= {name: {} for name in without}
        path = adapter.write(self.folder / str(len(self.said)), adapter.per_expert())
        more = {"load_inplace": True} if replace else {}
        try:
            self.one.worker.add_adapter(LoRARequest(f"a{number}", number, str(path), **more))
        except Exception as error:
            return self.note(f"load {number} of {rank}", str(error))
        self.adapters[number] = adapter
        return self.note(f"load {number} of {rank}")

    def activate(self, number):
        error = ""
        try:
            self.manager.activate_adapter(number)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        self.note(f"activate {number}", error)

    def remove(self, number):
        self.one.worker.remove_adapter(number)
        self.note(f"remove {number}")

    def off(self, numbers):
        """How far the layer's answer is from fp32 loops', for tokens with these adapters."""
        g = torch.Generator().manual_seed(1)
        x = torch.randn(len(numbers), self.case.hidden, generator=g)
        ids = torch.rand(len(numbers), self.case.experts, generator=g).topk(2).indices
        weights = 0.3 + torch.rand(len(numbers), 2, generator=g)
        want = answer(self.whole, x, ids, weights, [self.adapters.get(n) for n in numbers])
        from vllm.forward_context import set_forward_context

        with torch.inference_mode(), set_forward_context(None, self.one.config):
            (got,) = ranks.together([lambda: self.one.apply(x, weights, ids, numbers)])
        return float((got - want).abs().nan_to_num(1e9).max() / want.abs().max())


def life(base, folder):
    one = Life(base, folder)
    arenas_ = arenas(one.one.wrapper)
    for arena in arenas_:
        arena.memory.fill_(torch.nan)
    offs = []
    one.load(1, 8)
    one.load(2, 16)  # now all 24 ranks can be in slots at once
    offs.append(one.off([1, 2, 0, 2]))
    one.load(3, 24)  # with the larger of the others there were 40
    one.load(4, 32)  # never
    one.load(2, 16, seed=1, replace=True)  # as large as the version it replaces
    one.activate(2)
    offs.append(one.off([1, 2, 0, 1]))
    one.remove(1)
    one.remove(2)
    one.load(3, 24)  # all pages, of both slots
    offs.append(one.off([3, 0, 3]))
    one.load(5, 8)
    one.manager.remove_all_adapters()
    one.note("remove all")
    one.load(6, 16)
    one.load(7, 8)
    offs.append(one.off([7, 6, 0]))
    one.remove(6)
    one.load(9, 16, without=["w2"])
    offs.append(one.off([7, 9, 0]))
    one.remove(9)
    # Behind the budget's back, as for a request that needs an adapter again at once.
    one.manager.moe_lora_budget.refuses = False
    one.remove(7)
    one.load(8, 32)
    return {"said": one.said, "off": offs}


def starts(base):
    """What is said where the variable is wrong, or the memory is too small."""
    from vllm_moe_lora.layers.gpu import pages

    case, said = Case("starts", max_rank=MAX_RANK), []
    full = mock.patch.object(pages, "Arena", side_effect=torch.OutOfMemoryError("CUDA is full."))
    for value, patch in (("much", None), ("1KiB", None), ("100KiB", full)):
        os.environ["VLLM_MOE_LORA_MEMORY"] = value
        with patch or contextlib.nullcontext():
            found = stage.attempted(lambda: parallel_experts.Rank(case, 0, base, case.whole()))
        said.append(found["error"])
    return said


def measured(base, folder):
    """What a record of `tune` chooses: ours for all batches, or upstream's for small ones."""
    from vllm_moe_lora import records
    from vllm_moe_lora.layers.gpu import choose

    case, found = Case("measured", max_rank=MAX_RANK), []
    os.environ["VLLM_MOE_LORA_MEMORY"] = str(2 * block_bytes(case))
    shape = choose.shape_of(parallel_experts.Rank(case, 0, base, case.whole()).wrapper)
    for number, small in enumerate(("ours", "upstream")):
        times = {"ours": (1.0, 1.0, 1.0), "upstream": (1.0, 1.0, 1.0)}
        choices = (records.Choice(4, small, times), records.Choice(512, "ours", times))
        own = folder / str(number)
        records.write(records.Record(choose.conditions("cpu"), shape, choices), own)
        named = {"VLLM_MOE_LORA_KERNELS": "auto", "VLLM_MOE_LORA_TUNED": str(own)}
        with mock.patch.dict(os.environ, named):
            found.append(run(case, base, own))
    return found


def main():
    base, release = stage.begin(torch.float32)
    import vllm.lora.layers.fused_moe
    import vllm.lora.punica_wrapper.punica_gpu  # noqa: F401
    from vllm.model_executor.layers.fused_moe import fused_moe_modular_method

    import vllm_moe_lora

    quantised_experts._wanted(fused_moe_modular_method.FusedMoEModularMethod)
    parallel_cases.stand_in()
    lora_operators.stand_in()
    ranks.connect()
    os.environ |= {"VLLM_MOE_LORA": "1", "VLLM_MOE_LORA_KERNELS": "ours"}
    with stage.as_cuda():
        vllm_moe_lora.register()
    results = {"release": release, "cases": {}, "status": vllm_moe_lora.status()}
    for case in cases():
        with tempfile.TemporaryDirectory() as folder:
            asked = functools.partial(run, case, base, Path(folder))
            results["cases"][case.name] = stage.attempted(asked, case.name)
    with tempfile.TemporaryDirectory() as folder:
        results["life"] = stage.attempted(functools.partial(life, base, Path(folder)), "life")
    results["starts"] = starts(base)
    with tempfile.TemporaryDirectory() as folder:
        asked = functools.partial(measured, base, Path(folder))
        results["measured"] = stage.attempted(asked, "measured")
    print(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
