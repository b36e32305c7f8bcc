"""Builds a vLLM model on torch's "meta" device, which has shapes but no memory.

For several devices it builds the share of rank 0 in process groups whose other ranks do not exist,
so one machine is enough. This changes vLLM's and torch's global state: use a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def built(config: Any) -> Iterator[Any]:
    """Build the model of a config.

    Inside the block the config is vLLM's current one, and torch's default dtype is the model's.

    Args:
        config: vLLM's.

    Yields:
        The model.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    parallel = config.parallel_config
    with set_current_vllm_config(config):
        _fake_process_groups(parallel.tensor_parallel_size, parallel.data_parallel_size)
        _build_expert_maps_on_cpu()
        _stay_on_meta()
        default = torch.get_default_dtype()
        torch.set_default_dtype(config.model_config.dtype)
        try:
            with torch.device("meta"):
                model = initialize_model(vllm_config=config)
            yield model
        finally:
            torch.set_default_dtype(default)


def _fake_process_groups(size: int, data_parallel_size: int) -> None:
    """Make vLLM's process groups of all ranks, without communication. We are rank 0.

    Args:
        size: the tensor parallel size.
        data_parallel_size: how many such engines there are.

    The other ranks do not exist. Torch's "fake" backend returns from each collective at once.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.distributed import parallel_state

    world = size * data_parallel_size
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    new_group, coordinator = dist.new_group, parallel_state.GroupCoordinator.__init__

    def fake_group(ranks: Any = None, backend: Any = None, **more: Any) -> Any:
        return new_group(ranks, backend="fake")

    def without_communicators(self: Any, *args: Any, **more: Any) -> None:
        off = {"use_device_communicator": False, "use_message_queue_broadcaster": False}
        coordinator(self, *args, **{**more, **off})

    dist.new_group = fake_group
    parallel_state.GroupCoordinator.__init__ = without_communicators
    parallel_state.in_the_same_node_as = lambda *args, **more: [True] * world
    parallel_state.init_distributed_environment(
        world_size=size, rank=0, local_rank=0, distributed_init_method="env://", backend="gloo"
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)


def _build_expert_maps_on_cpu() -> None:
    """Let vLLM make each layer's expert map on the CPU instead of the meta device.

    vLLM reads numbers from the map while it builds the model, and a meta tensor has none.
    """
    import torch
    from vllm.model_executor.layers.fused_moe import expert_map_manager

    original = expert_map_manager.ExpertMapManager.__init__

    def on_cpu(self: Any, *args: Any, **more: Any) -> None:
        with torch.device("cpu"):
            original(self, *args, **more)

    expert_map_manager.ExpertMapManager.__init__ = on_cpu


def _stay_on_meta() -> None:
    """Let vLLM build models that move a part of themselves to the device, such as Kimi K2.5."""
    import torch

    original = torch.nn.Module.to

    def to(self: Any, *args: Any, **more: Any) -> Any:
        try:
            return original(self, *args, **more)
        except NotImplementedError:  # "Cannot copy out of meta tensor"
            return self

    torch.nn.Module.to = to
