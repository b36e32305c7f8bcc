"""Two collectives that vLLM's communicator on the CPU does not have, over gloo.

With them `--data-parallel-size` works on a CPU; all that calls them is vLLM's own code.
"""

from __future__ import annotations

import torch
from vllm.distributed.device_communicators import cpu_communicator


def all_gatherv(self, input_, dim=0, sizes=None):
    """Each rank's rows, of which it has ``sizes[rank]``."""
    assert dim == 0
    if isinstance(input_, list):
        return [all_gatherv(self, one, dim, sizes) for one in input_]
    sizes = sizes or [input_.shape[0]] * self.world_size
    padded = input_.new_zeros(max(sizes), *input_.shape[1:])
    padded[: input_.shape[0]] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(self, input_, dim=-1, sizes=None):
    """The sum over all ranks, of which each gets its ``sizes[rank]`` rows."""
    assert dim == 0
    summed = input_.clone()
    torch.distributed.all_reduce(summed, group=self.device_group)
    sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
    return summed.split(sizes)[self.rank_in_group].clone()


def install():
    """Give them to the communicator, in this process and those that it forks."""
    cpu_communicator.CpuCommunicator.all_gatherv = all_gatherv
    cpu_communicator.CpuCommunicator.reduce_scatterv = reduce_scatterv
