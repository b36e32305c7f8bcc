"""Drafted tokens of sampled requests on a CPU.

For drafted tokens vLLM expands temperature, top_k and top_p of each request to its tokens. Its CPU
operator takes int64, so it fills a copy of the result: the logits are divided by uninitialised
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def expanded() -> Iterator[None]:
    """Inside the block, vLLM's rejection sampler expands by torch."""
    from vllm.v1.sample import rejection_sampler

    original = rejection_sampler.expand_batch_to_tokens
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    try:
        yield
    finally:
        rejection_sampler.expand_batch_to_tokens = original


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """What vLLM's function of this name returns on a GPU.

    Args:
        x: [requests].
        cu_num_tokens: [requests]; the number of tokens of a request and those before it.
        num_tokens: of all requests.
        replace_from: a value of ``x`` that is replaced.
        replace_to: by this one.

    Returns:
        [num_tokens]: for each token the value of its request.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = x.masked_fill(x == replace_from, replace_to)
    return values.repeat_interleave(counts, output_size=num_tokens)
