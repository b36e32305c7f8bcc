"""Child side: one process as each rank of a world in turn, and the collectives between them.

A rank's process groups are fake ones that say who it is. What the ranks would tell one another is
passed by hand: all of them run up to the first collective, then again up to the second, and so on.
"""

from __future__ import annotations

import contextlib
import copy
import types

import stage
import torch


def become(rank, size, config=None):
    """Make vLLM's groups those of ``rank`` of ``size``; with one rank, of the whole.

    Args:
        config: a `VllmConfig` that says how many of the ranks are data parallel, else none are.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    with contextlib.suppress(AssertionError):
        parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    _fake(parallel_state)
    parallel_state.in_the_same_node_as = lambda *args, **more: [True] * size
    parallel_state.init_distributed_environment(
        world_size=size, rank=rank, local_rank=0, distributed_init_method="env://", backend="gloo"
    )
    if config is None:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
        return
    with set_current_vllm_config(config):  # it would begin a world of its own above
        parallel_state.initialize_model_parallel(config.parallel_config.tensor_parallel_size)
    parallel_state.get_ep_group().device_communicator = _Communicator(rank, size)


class _Communicator:
    """What takes tokens to the ranks that have their experts, and answers back."""

    def __init__(self, rank, size):
        self.all2all_manager = types.SimpleNamespace(rank=rank, world_size=size, dp_world_size=size)

    def destroy(self):
        pass

    def dispatch(self, *given, **more):
        tensors = [one for one in given if isinstance(one, torch.Tensor)]
        extra = next((x for x in (*given, *more.values()) if isinstance(x, list)), None)
        found = exchange.dispatch(*tensors, *(extra or ()))
        rest = () if extra is None else (found[len(tensors) :],)
        return *found[: len(tensors)], *rest

    dispatch_router_logits = dispatch

    def combine(self, x, *args, **more):
        return exchange.combine(x)

    def allocate_combine_input(self, *args, **more):
        return None

    def combine_into_output(self, x, output, *args, **more):
        return output.copy_(exchange.combine(x))


def _fake(parallel_state):
    import torch.distributed as dist

    coordinator = parallel_state.GroupCoordinator.__init__
    if hasattr(coordinator, "silent"):
        return
    new_group = dist.new_group

    def fake_group(ranks=None, backend=None, **more):
        return new_group(ranks, backend="fake")

    def silent(self, *args, **more):
        silence = {"use_device_communicator": False, "use_message_queue_broadcaster": False}
        coordinator(self, *args, **{**more, **silence})

    silent.silent = True
    dist.new_group = fake_group
    parallel_state.GroupCoordinator.__init__ = silent


def config_of(base, case, lora, rank):
    """A `VllmConfig` of one rank of a case's world with the LoRA config ``lora``."""
    config = copy.copy(base)
    config.lora_config = lora
    config.compilation_config = copy.copy(base.compilation_config)
    config.compilation_config.static_forward_context = {}
    # Copies are changed, since vLLM compares what it is given with the devices of this machine.
    parallel = config.parallel_config = copy.copy(base.parallel_config)
    parallel.tensor_parallel_size = parallel.world_size = case.size // case.data_parallel
    parallel.data_parallel_size = case.data_parallel
    parallel.data_parallel_rank = rank // parallel.world_size
    parallel.enable_expert_parallel = case.expert_parallel
    parallel.enable_eplb = case.eplb
    parallel.all2all_backend = case.all2all
    if hasattr(parallel, "expert_placement_strategy"):
        parallel.expert_placement_strategy = case.placement
    return config


class Waiting(Exception):
    """This rank has spoken and waits for the others."""


class Exchange:
    """Collectives of ranks that run one after another, again until all have been heard."""

    def __init__(self):
        self._heard, self._now, self._rank, self._count, self._rows = [], {}, 0, 0, []

    def all_reduce(self, value):
        return torch.stack(self._meet(value)).sum(0)

    def all_gather(self, value, dim=-1):
        return torch.cat(self._meet(value), dim)

    def dispatch(self, *tensors):
        """Each of ``tensors`` of all ranks, one rank's rows behind another's."""
        found = [self._meet(tensor) for tensor in tensors]
        self._rows = [len(one) for one in found[0]]
        return [torch.cat(one) for one in found]

    def combine(self, value):
        """This rank's rows of the sum, as they were given to `dispatch`."""
        return self.all_reduce(value).split(self._rows)[self._rank]

    def _meet(self, value):
        self._count += 1
        if self._count > len(self._heard):
            self._now[self._rank] = value.clone()
            raise Waiting
        return self._heard[self._count - 1]

    def run(self, ranks):
        """What ``ranks``, functions without arguments and without memory, return."""
        while True:
            results, self._now = [], {}
            for self._rank, one in enumerate(ranks):
                self._count = 0
                with contextlib.suppress(Waiting):
                    results.append(one())
            if len(results) == len(ranks):
                return results
            assert len(self._now) == len(ranks), "some ranks speak and some do not"
            self._heard.append([self._now[i] for i in range(len(ranks))])


exchange = Exchange()


def connect():
    """Let vLLM's collectives go by way of `exchange`."""
    stage.everywhere("tensor_model_parallel_all_reduce", _all_reduce)
    stage.everywhere("tensor_model_parallel_all_gather", lambda x, dim=-1: exchange.all_gather(x))


def _all_reduce(x):
    from vllm.distributed import get_tensor_model_parallel_world_size

    return x if get_tensor_model_parallel_world_size() == 1 else exchange.all_reduce(x)


def together(ranks):
    """`Exchange.run` with a past of its own."""
    global exchange
    exchange = Exchange()
    return exchange.run(ranks)
