"""Classes whose LoRA would be ignored: from 0.33 on the engine's error at the start says why."""

from __future__ import annotations

import subprocess
import sys

import forks
import pytest
import unpacked
from packaging.version import Version

RELEASES = [r for r in unpacked.available() if Version(r) >= Version("0.33")]
CHILD = """
import packages

packages.modules()
from types import SimpleNamespace
import vllm_moe_lora
from vllm.config.lora import LoRAConfig

vllm_moe_lora.register()
name = "DbrxForCausalLM"
info = SimpleNamespace(architecture=name, supports_lora=False)
model = SimpleNamespace(architecture=name, model="folder", runner_type="generate")
model._model_info, model.is_lora_supported = info, False
try:
    LoRAConfig().verify_with_model_config(model)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("plugin", ["0", "1"])
@pytest.mark.parametrize("release", RELEASES)
def test_the_error_says_why(release, plugin):
    env = unpacked.environment(str(unpacked.tree(release))) | {"VLLM_MOE_LORA": plugin}
    done = forks.launch([sys.executable, "-c", CHILD], env, 300, stderr=subprocess.STDOUT)
    assert "LoRA is not supported for DbrxForCausalLM" in done.stdout, done.stdout[-3000:]
    why = "The reason: its experts and its Wqkv are fused tensors"
    assert (why in done.stdout) == (plugin == "1")
