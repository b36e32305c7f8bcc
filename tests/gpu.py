"""Whether there is a GPU, and a vLLM for it."""

from __future__ import annotations

import pytest
import torch


def usable() -> bool:
    """Whether vLLM's own kernels run here."""
    if not torch.cuda.is_available():
        return False
    import vllm

    return "cpu" not in vllm.__version__


MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not usable(), reason="no CUDA GPU, or a vLLM that is not built for it"),
]
