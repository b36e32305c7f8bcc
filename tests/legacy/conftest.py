"""Each test of a quantised layer runs without the plugin and with it."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[False, True], ids=["bare", "plugin"])
def ours(request):
    import vllm_moe_lora

    vllm_moe_lora.revert()
    if request.param:
        vllm_moe_lora.register()
    yield request.param
    vllm_moe_lora.revert()
