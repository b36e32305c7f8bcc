"""Child: routed experts of one release on every rank of a world, bare and with us; prints JSON.

For each case and each of "bare" and "ours": "error", or how far the sum of the ranks' answers is
from the whole layer's ("off"), how far an adapter moves that ("moved"), and how far what the ranks
hold in their slots is from their parts of the adapter ("slots"), relative to the largest number.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import lora_operators
import parallel_cases
import quantised_experts
import ranks
import stage
import torch
from packaging.version import Version
from parallel_truth import Adapter, answer

TOKENS = 9


class Experts(torch.nn.Module):
    """As much of a model as LoRA's managers ask for: one layer of routed experts."""

    supports_lora = True
    is_non_gated_moe = False

    def __init__(self, layer, case):
        super().__init__()
        self.packed_modules_mapping, self.embedding_modules = {}, {}
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.model.layers[0].mlp = torch.nn.Module()
        self.model.layers[0].mlp.experts = layer
        self.is_3d_moe_weight = case.fused
        name = "GptOssForCausalLM" if case.interleaved else "Qwen3MoeForCausalLM"
        sizes = {"hidden_size": case.hidden, "moe_intermediate_size": case.inner}
        from transformers import PretrainedConfig

        self.config = PretrainedConfig(architectures=[name], **sizes)
        self.count, self.copies = case.experts, case.redundant

    def get_expert_mapping(self):
        from vllm.model_executor.layers import fused_moe

        make = getattr(fused_moe, "fused_moe_make_expert_params_mapping", None)
        make = make or fused_moe.FusedMoE.make_expert_params_mapping
        names = dict(zip(_MAPPED, ("gate_proj", "down_proj", "up_proj"), strict=True))
        more = {"model": self} if "model" in inspect.signature(make).parameters else {}
        return make(num_experts=self.count, num_redundant_experts=self.copies, **names, **more)


_MAPPED = ("ckpt_gate_proj_name", "ckpt_down_proj_name", "ckpt_up_proj_name")


class _Anything(types.SimpleNamespace):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _model_config():
    text = _Anything(max_position_embeddings=64)
    text.get_text_config = lambda: text
    return _Anything(
        dtype=torch.float32,
        get_vocab_size=lambda: 64,
        hf_config=text,
        hf_text_config=text,
        is_encoder_decoder=False,
        is_moe=True,
        is_multimodal_model=False,
        runner_type="generate",
    )


class Rank:
    """One rank's layer, filled with its part of the whole, and its LoRA manager."""

    def __init__(self, case, rank, base, whole):
        self.case, self.rank = case, rank
        from vllm.config import set_current_vllm_config
        from vllm.config.lora import LoRAConfig

        lora = {"max_lora_rank": case.max_rank, "max_loras": stage.SLOTS, **case.lora}
        lora = LoRAConfig(max_cpu_loras=stage.SLOTS, lora_dtype=case.lora_dtype, **lora)
        self.config = ranks.config_of(base, case, lora, rank)
        ranks.become(rank, case.size, self.config if case.data_parallel > 1 else None)
        self.config.model_config = _model_config()
        with set_current_vllm_config(self.config):
            self.layer = self._made()
            self.routed = getattr(self.layer, "routed_experts", self.layer)
            case.fill(self.routed, whole, rank)
            self.routed.quant_method.process_weights_after_loading(self.routed)
            self.worker = self._manager()
        if case.eplb:
            self.begin_places()

    def _made(self):
        from vllm.model_executor.layers import fused_moe

        case = self.case
        factory = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE
        wanted = inspect.signature(factory).parameters
        if factory is getattr(fused_moe, "FusedMoE", None) and inspect.isclass(factory):
            wanted = inspect.signature(factory.__init__).parameters
        torch.set_default_dtype(case.dtype)
        more = dict(case.more)
        if case.eplb:
            more |= {"enable_eplb": True, "num_redundant_experts": case.redundant}
        assert set(more) <= set(wanted), set(more) - set(wanted)
        try:
            return factory(
                num_experts=case.experts,
                top_k=case.top_k,
                hidden_size=case.hidden,
                intermediate_size=case.inner,
                params_dtype=case.dtype,
                quant_config=case.quant_config(),
                prefix="model.layers.0.mlp.experts",
                **more,
            )
        finally:
            torch.set_default_dtype(torch.float32)

    def _manager(self):
        from vllm.lora import worker_manager
        from vllm.lora.punica_wrapper import punica_gpu

        kind = worker_manager.LRUCacheWorkerLoRAManager
        given = {
            "max_num_seqs": 4,
            "max_num_batched_tokens": 64,
            "vocab_size": 64,
            "lora_config": self.config.lora_config,
            "vllm_config": self.config,
            "device": torch.device("cpu"),
            "embedding_modules": {},
            "embedding_padding_modules": [],
            "max_position_embeddings": 64,
        }
        wanted = inspect.signature(kind.__init__).parameters
        worker = kind(**{k: v for k, v in given.items() if k in wanted})
        from vllm.model_executor.models.interfaces import SupportsLoRA

        self.model = type("Model", (Experts, SupportsLoRA), {})(self.layer, self.case)
        wanted = inspect.signature(worker.create_lora_manager).parameters
        here = inspect.getmodule(_manager_class())

        def punica(*args, **more):
            return punica_gpu.PunicaWrapperGPU(*args, **more)

        with mock.patch.object(here, "get_punica_wrapper", punica):
            more = {k: v for k, v in {"vllm_config": self.config}.items() if k in wanted}
            worker.create_lora_manager(self.model, **more)
        (self.wrapper,) = worker._adapter_manager.modules.values()
        return worker

    def begin_places(self):
        """As vLLM's `EplbState.add_model` does with a model: its table of places."""
        from vllm.distributed.eplb import eplb_state

        if not hasattr(eplb_state, "compute_logical_maps"):
            return  # up to 0.23, which neither we nor these cases need
        places = torch.tensor([self.case.order()])
        state = self.eplb = types.SimpleNamespace(
            model=types.SimpleNamespace(moe_layers=[self.layer]),
            physical_to_logical_map=torch.zeros_like(places),
            logical_to_physical_map=torch.full((1, self.case.experts, 8), -1),
            logical_replica_count=torch.zeros(1, self.case.experts, dtype=torch.int64),
        )
        self.layer.set_eplb_state(
            0,
            torch.zeros_like(places),
            state.logical_to_physical_map,
            state.logical_replica_count,
        )
        eplb_state._commit_eplb_maps(state, places)

    def commit_places(self, at_once):
        """As vLLM after it has moved experts' weights."""
        from vllm.distributed.eplb import eplb_state

        if not hasattr(self, "eplb"):
            return
        places = torch.tensor(self.case.order())
        if at_once:
            eplb_state._commit_eplb_maps(self.eplb, places[None])
        else:
            eplb_state._commit_eplb_maps_for_layer(self.eplb, places, 0)

    def load(self, number, path):
        from vllm.lora.request import LoRARequest

        self.worker.add_adapter(LoRARequest(f"a{number}", number, str(path)))

    def warm_up(self):
        """As vLLM before it takes requests: an adapter of zeros that it makes itself."""
        from vllm.lora.request import LoRARequest

        rank = getattr(self.worker, "get_dummy_lora_warmup_rank", lambda rank: rank)(8)
        self.worker.add_dummy_lora(LoRARequest("warm-up", 99, "nowhere"), rank)
        self.worker._adapter_manager.activate_adapter(99)
        self.worker._adapter_manager.remove_all_adapters()

    def apply(self, x, weights, ids, adapters):
        """This rank's part of the answer. ``adapters``: number of each token's, 0 for none."""
        from vllm.lora.layers import LoRAMapping

        manager = self.worker._adapter_manager
        mapping = LoRAMapping(tuple(adapters), tuple(adapters), is_prefill=True)
        manager._last_mapping = None
        manager.set_adapter_mapping(mapping)
        given = (weights.clone(), self.case.routed(ids).to(torch.int32))
        return quantised_experts.forward(self.layer, self.routed, x.clone(), *given).float()


def slots(case, world, adapter, slot):
    """How far the ranks' slots are from their parts of ``adapter``, by the rules of the case."""
    worst = 0.0
    for one in world:
        rows, columns = case.cuts(one.rank)
        padding, products = case.products([r.wrapper for r in world], one.rank, slot)
        worst = max(worst, padding)
        for name, stacks in products.items():
            for place, expert in enumerate(case.owned(one.rank)):
                want = adapter.delta(name, expert)
                if want.ndim:
                    want = want[rows[name]][:, columns[name]]
                worst = max(worst, float((stacks[place] - want).abs().max()))
    return worst


def _manager_class():
    try:
        from vllm.lora.model_manager import LoRAModelManager
    except ImportError:
        from vllm.lora.models import LoRAModelManager
    return LoRAModelManager


def _adapters(case, whole, folder):
    """Two adapters on disk."""
    found = []
    for number, seed in ((1, 11), (2, 12)):
        adapter = Adapter(whole, case.rank, seed, **case.adapter)
        tensors = adapter.fused(case.interleaved) if case.on_disk == "fused" else None
        tensors = tensors or adapter.per_expert()
        found.append((adapter, adapter.write(folder / f"{case.name}-{number}", tensors)))
    return found


def run(case, base, folder):
    from vllm.forward_context import set_forward_context

    whole = case.whole()
    adapters = _adapters(case, whole, folder)
    world = []
    case.choose()
    for rank in range(case.size):
        one = Rank(case, rank, base, whole)
        one.warm_up()
        for number, (_, path) in enumerate(adapters, start=1):
            one.load(number, path)
        world.append(one)
    case.after_loading(world, whole)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, case.hidden, generator=g).to(case.dtype)
    ids = torch.rand(TOKENS, case.experts, generator=g).topk(case.top_k).indices
    weights = 0.3 + torch.rand(TOKENS, case.top_k, generator=g)
    numbers = [1, 2, 0, 2, 1, 0, 1, 2, 1]
    per_token = [adapters[n - 1][0] if n else None for n in numbers]
    how = {"on_input": case.on_input, "activation": case.activation}
    want = answer(whole, x, ids, weights, per_token, **how)
    plain = answer(whole, x, ids, weights, [None] * TOKENS, **how)
    manager = world[0].worker._adapter_manager
    slot = manager.lora_index_to_id.index(1)
    with torch.inference_mode(), set_forward_context(None, world[0].config):
        outs = ranks.together(
            [lambda one=one: one.apply(x, weights, ids, numbers) for one in world]
        )
        base_outs = ranks.together(
            [lambda one=one: one.apply(x, weights, ids, [0] * TOKENS) for one in world]
        )
    size = want.abs().max()

    def off(parts, truth):
        return float((sum(parts) - truth).abs().nan_to_num(1e9).max() / size)

    return {
        "off": off(outs, want),
        "moved": float((want - plain).abs().max() / size),
        "base_off": off(base_outs, plain),
        "slots": slots(case, world, adapters[0][0], slot),
    }


def main(cases=parallel_cases.cases, run=run, stand_in=parallel_cases.stand_in, kernels=False):
    """Print the answers.

    Args:
        cases: release -> the worlds.
        run: (case, base config, folder for adapters) -> what is printed of it.
        stand_in: replaces the operators that ``cases`` need beside LoRA's.
        kernels: also with our Triton kernels, from 0.28 on.
    """
    base, release = stage.begin(torch.float32)
    import vllm.lora.layers.fused_moe
    import vllm.lora.punica_wrapper.punica_gpu  # noqa: F401

    import vllm_moe_lora
    from vllm_moe_lora import supported
    from vllm_moe_lora.layers.quantised import vllm_0_11

    release = supported.release_of(release)
    stand_in()
    lora_operators.stand_in()
    ranks.connect()
    wanted = sys.argv[1:]
    made = [c for c in cases(release) if not wanted or c.name in wanted]
    results = {"release": release, "bare": {}, "ours": {}}
    if kernels and Version(release) >= Version("0.28"):
        results["kernels"] = {}
    for who in list(results)[1:]:
        if who == "ours":
            os.environ["VLLM_MOE_LORA"] = "1"
            with stage.as_cuda():
                vllm_moe_lora.register()
            vllm_0_11.on_cpu = lambda wrapper: False
        os.environ["VLLM_MOE_LORA_KERNELS"] = "ours" if who == "kernels" else "upstream"
        for case in made:
            with tempfile.TemporaryDirectory() as folder:
                asked = functools.partial(run, case, base, Path(folder))
                results[who][case.name] = stage.attempted(asked, who, case.name)
                case.after()
    results["status"] = vllm_moe_lora.status()
    print(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
