"""`forked.py` with EPLB (--enable-eplb), which vLLM has on GPUs only.

What a CPU lacks is put in place here: events and streams, the router's table look-up (a Triton
kernel on GPUs), and the few lines of the GPU model runner that register the model. All that counts,
decides, moves weights and changes tables is vLLM's own code, also its thread (use_async).
"""

from __future__ import annotations

import json
import sys

import forked  # noqa: F401 -- its workers are forks
import torch
from vllm.config import parallel
from vllm.distributed.eplb import eplb_state
from vllm.model_executor.layers.fused_moe.router import base_router
from vllm.model_executor.models.interfaces import get_mixture_of_experts_model
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_moe_lora.tiny import engine


class Platform:
    """This platform, with EPLB."""

    def __getattr__(self, name):
        return getattr(current_platform, name)

    def is_cuda_alike(self):
        return True


class Event:
    """An event or a stream."""

    def __init__(self, *args, **more):
        pass

    def __getattr__(self, name):
        return lambda *args, **more: 0.0


def look_up(
    topk_ids,
    expert_load_view,
    logical_to_physical_map,
    logical_replica_count,
    record_enabled,
    num_unpadded_tokens,
):
    """The places of experts, in turn where there are several, and how many tokens each gets."""
    experts = topk_ids.long()
    turn = torch.arange(experts.numel()).view_as(experts) % logical_replica_count[experts]
    places = logical_to_physical_map[experts, turn]
    if record_enabled:
        tokens = places[: int(num_unpadded_tokens)].flatten()
        expert_load_view += tokens.bincount(minlength=expert_load_view.numel())
    return places.to(topk_ids.dtype)


def load_model(self, *args, **more):
    upstream_load(self, *args, **more)
    state = self.eplb_state = eplb_state.EplbState(self.parallel_config, self.device)
    state.device_index = 0
    self._moe_model = get_mixture_of_experts_model(self.model)
    state.add_model(self._moe_model, self.model_config)
    if state.is_async:
        state.start_async_loop()


def as_they_are(model, *layers):
    """Tell EPLB the layers' weights of now: on a CPU, adapters make them wider, in other tensors.

    What adapters have added is dropped until the experts compute again.
    """
    torch.Event = Event  # vLLM's worker has put another one there
    for layer in layers:
        experts = model.moe_layers[layer]._quant_method.moe_kernel.fused_experts
        getattr(experts, "suspend", lambda: None)()
        model.expert_weights[layer] = model.moe_layers[layer].get_expert_weights()


def rearrange(self, *args, **more):
    for state in self.model_states.values():
        as_they_are(state.model, *range(state.model.num_moe_layers))
    return upstream_rearrange(self, *args, **more)


def move_to_workspace(model_state, ep_rank):
    result = model_state.pending_result
    as_they_are(model_state.model, result.layer_idx)
    say("moved", result.layer_idx, result.new_physical_to_logical_map.tolist())
    upstream_move_to_workspace(model_state, ep_rank)


def move(old, new, *args, **more):
    for layer, places in enumerate(new.tolist()):
        say("moved", layer, places)
    return upstream_move(old, new, *args, **more)


def say(what, *more):
    if torch.distributed.get_rank() == 0:
        print(what, json.dumps(more), flush=True)


upstream_load, CPUModelRunner.load_model = CPUModelRunner.load_model, load_model
upstream_rearrange = eplb_state.EplbState.rearrange
eplb_state.EplbState.rearrange = rearrange
upstream_move = eplb_state.rearrange_expert_weights_inplace
eplb_state.rearrange_expert_weights_inplace = move
upstream_move_to_workspace = eplb_state._move_to_workspace
eplb_state._move_to_workspace = move_to_workspace
base_router.eplb_map_to_physical_and_record = look_up
parallel.current_platform = Platform()
torch.Event = torch.Stream = torch.accelerator.current_stream = Event
torch.accelerator.set_stream = torch.accelerator.set_device_index = lambda *args: None

if __name__ == "__main__":
    engine.main(*sys.argv[1:])
