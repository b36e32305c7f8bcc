"""LoRA on routed experts that EPLB moves between devices (--enable-eplb, vLLM 0.30 to 0.33).

Between two steps vLLM moves the weights of experts to other places, gives some experts several
places, and then changes the layer's table of places. A slot has to hold the factors of the experts
that are at this device's places now.

A device keeps the factors of all experts of its adapters in CPU memory. A slot gets those of the
experts at its places, when an adapter is activated, and again after each change of the table. So
factors are not sent between devices, and it does not matter when an adapter is loaded.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .moe_layers import Factors


def places(wrapper: Any) -> list[int]:
    """Numbers of the experts at this device's places, in the order of its weights.

    Args:
        wrapper: a `FusedMoEWithLoRA` of an engine with --enable-eplb.
    """
    config = wrapper.base_layer.moe_config
    count = config.num_local_experts
    first = config.moe_parallel_config.ep_rank * count
    table = wrapper.base_layer.eplb_state.logical_to_physical_map
    experts, columns = ((table >= first) & (table < first + count)).nonzero(as_tuple=True)
    # No token is sent to a place without an expert, so any expert will do there.
    found = torch.zeros(count, dtype=torch.int64, device=table.device)
    found[table[experts, columns] - first] = experts
    return found.tolist()


def weights(manager: Any, name: str, wrapper: Any, rank: int, every: Factors) -> Any:
    """Make the `PackedLoRALayerWeights` of a layer, whose factors are those at its places now.

    Args:
        manager: vLLM's `LoRAModelManager`.
        name: the layer's, in ``manager.modules``.
        wrapper: the layer.
        rank: highest of the layer.
        every: from `stage.stage`, with all experts in the order of their numbers.
    """
    # `write_slots` finds the slots by the layer that vLLM's EPLB knows.
    wrapper.base_layer.moe_lora_slots = manager, name
    return _class()(name, rank, wrapper, every)


def write_slots(layer: Any) -> None:
    """Write the factors of a layer's slots again, after the table of places has changed.

    Args:
        layer: vLLM's `MoERunner`; it may have no LoRA.
    """
    if "moe_lora_slots" not in vars(layer):
        return  # no adapter with routed experts was loaded
    manager, name = layer.moe_lora_slots
    adapters = manager.list_adapters()
    # vLLM calls this in inference mode; slots are also written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        for slot, lora_id in enumerate(manager.lora_index_to_id):
            lora = adapters.get(lora_id)
            found = None if lora is None else manager._get_lora_layer_weights(lora, name)
            if isinstance(found, _class()):
                manager.modules[name].set_lora(slot, found.lora_a, found.lora_b)


@cache
def _class() -> type[Any]:
    from vllm.lora.lora_weights import PackedLoRALayerWeights

    class PlacedWeights(PackedLoRALayerWeights):
        """Factors of all experts, which shows those at the places of one device."""

        def __init__(self, name: str, rank: int, wrapper: Any, every: Factors) -> None:
            self._wrapper, self._every = wrapper, every
            self._places: list[int] = []
            self._shown: Factors = [], []
            ones = [1.0] * len(every[0])
            super().__init__(name, rank, list(ones), *self._every, scaling=ones)

        def _now(self) -> Factors:
            now = places(self._wrapper)
            if now != self._places:
                index = torch.tensor(now)
                a, b = ([_select(one, index) for one in side] for side in self._every)
                self._places, self._shown = now, (a, b)
            return self._shown

        # vLLM narrows and replaces the factors of layers under expert parallelism: not these.
        lora_a = property(lambda self: self._now()[0], lambda self, given: None)
        lora_b = property(lambda self: self._now()[1], lambda self, given: None)

    return PlacedWeights


def _select(factor: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """The factors of some experts; if all share one, it is not copied."""
    if factor.stride(0) == 0 or factor.shape[0] == 1:
        return factor[:1].expand(len(experts), -1, -1)
    return factor.index_select(0, experts)
