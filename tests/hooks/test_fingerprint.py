"""vLLM's key of compiled artefacts: another one wherever another function may be traced."""

from __future__ import annotations

import json
import os
import sys

import forks
import pytest
import release

from vllm_moe_lora import supported
from vllm_moe_lora.tiny import models

pytestmark = pytest.mark.skipif(
    release.installed().partition("+")[0] not in supported.releases(),
    reason="asks the config of an installed vLLM of supported.toml: run ci/install.sh",
)

# One fork: each setting is registered, asked and reverted.
ASK = """
import json, os, sys
from vllm.engine.arg_utils import EngineArgs
import vllm_moe_lora
from vllm_moe_lora import supported

def key(model, **more):
    args = dict(model=model, skip_tokenizer_init=True, enforce_eager=True, max_model_len=256)
    return EngineArgs(**args, **more).create_engine_config().compute_hash()

moe, dense, release = sys.argv[1:]

found = {"bare": key(moe, enable_lora=True), "no lora": key(moe)}
found["dense"] = key(dense, enable_lora=True)
settings = {"on": "1", "again": "1"} | {f"-{f}": f"-{f}" for f in supported.releases()[release]}
for name, value in settings.items():
    os.environ["VLLM_MOE_LORA"] = value
    vllm_moe_lora.register()
    found[name] = key(moe, enable_lora=True)
    if name == "on":
        os.environ["VLLM_MOE_LORA_KERNELS"] = "ours"
        found["kernels"] = key(moe, enable_lora=True)
        del os.environ["VLLM_MOE_LORA_KERNELS"]
        found |= {"no lora, on": key(moe), "dense, on": key(dense, enable_lora=True)}
    needed = vllm_moe_lora.status()
    vllm_moe_lora.revert()
found["needed"] = [f for f, why in needed.items() if "not needed" not in why]
print("@" + json.dumps(found))
"""


def test_keys(tmp_path):
    moe = models.build("qwen2_moe", tmp_path / "moe")
    dense = tmp_path / "dense"
    dense.mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **sizes}
    (dense / "config.json").write_text(json.dumps(config))
    number = release.installed().partition("+")[0]
    done = forks.launch(
        [sys.executable, "-c", ASK, str(moe), str(dense), number],
        {**os.environ, "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_MOE_LORA": "0"},
    )
    line = next((one for one in done.stdout.splitlines() if one.startswith("@")), None)
    assert line, done.stdout[-1000:] + done.stderr[-2000:]
    found = json.loads(line[1:])
    assert found["on"] == found["again"], "two starts find each other's artefacts"
    others = [f"-{feature}" for feature in found["needed"] if feature != "compile-cache"]
    assert len(others) > 5
    keys = [found[name] for name in ("bare", "on", "kernels", *others)]
    assert len(set(keys)) == len(keys), "each setting has a key of its own"
    assert found["-compile-cache"] == found["bare"]
    assert (found["no lora"], found["dense"]) == (found["no lora, on"], found["dense, on"])
    assert len(found["on"]) == len(found["bare"])
