"""Fixtures of the tests of quantised layers. What they import may import another vLLM."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[False, True], ids=["bare", "plugin"])
def ours(request):
    """Each test runs without the plugin and with it."""
    import vllm_moe_lora

    vllm_moe_lora.revert()
    if request.param:
        vllm_moe_lora.register()
    yield request.param
    vllm_moe_lora.revert()


@pytest.fixture(scope="module")
def config():
    import quantised

    with quantised.parallel() as config:
        yield config


@pytest.fixture
def cuda(monkeypatch):
    import cuda_in_torch

    cuda_in_torch.install(monkeypatch)
    return cuda_in_torch
