"""A platform from outside of vLLM's tree with its own LoRA layers: ours stay out, adapters land.

The platform is tests/oot/standin_npu: contract-tested here, not run on an NPU. Where VLLM_ASCEND
is the path of a vllm-ascend checkout, that one's real layer classes have their turn, too.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import layouts
import pytest
import release
import torch
from engine_cases import PROMPTS, compare_fp32
from test_layouts import MODELS, _one_sided

from vllm_moe_lora import supported
from vllm_moe_lora.hooks import all_hooks
from vllm_moe_lora.tiny import engine, oracle

pytestmark = pytest.mark.cpu_engine

# What is the platform's own business: layers, and whatever is for the platforms vLLM knows.
HOOKS = supported.made_for(release.installed().partition("+")[0], all_hooks())
LEFT_OUT = [hook for hook in HOOKS if hook.layers or hook.platforms]
WATCHED = [
    *(name for hook in LEFT_OUT for name in (hook.target, *hook.also)),
    "vllm.lora.layers:FusedMoEWithLoRA",
    "vllm.lora.layers:FusedMoE3DWithLoRA",
    "vllm.lora.layers.fused_moe:FusedMoEWithLoRA",
    "vllm.lora.layers.fused_moe:FusedMoE3DWithLoRA",
    "vllm.lora.model_manager:FusedMoEWithLoRA",
    "vllm.lora.model_manager:from_layer",
    "vllm.lora.utils:from_layer",
    "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU",
]


KINDS = {
    "derived": "standin_npu.layers:Derived,Derived3D",
    "own": "standin_npu.layers:Own,Own3D",
}
if "VLLM_ASCEND" in os.environ:  # the path of a checkout
    KINDS["ascend"] = "vllm_ascend.lora.fused_moe:AscendFusedMoEWithLoRA,AscendFusedMoE3DWithLoRA"
# What vllm-ascend's file of LoRA layers imports and does not use while a layer is made or filled.
STUBS = {
    "__init__.py": "",
    "envs.py": "VLLM_ASCEND_ENABLE_FUSED_MC2 = 0",
    "ascend_forward_context.py": "_EXTRA_CTX = None",
    "ops/fused_moe/moe_utils.py": "async_all_to_all = None",
}


@pytest.fixture(scope="session")
def platform(tmp_path_factory):
    """What the engine's process needs in its environment to find the platform."""
    folder = tmp_path_factory.mktemp("platform")
    info = folder / "standin_npu-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: standin-npu\nVersion: 1.0\n")
    entry = "[vllm.platform_plugins]\nstandin_npu = standin_npu:platform\n"
    (info / "entry_points.txt").write_text(entry)
    code = Path(__file__).parents[1] / "oot"
    if tree := os.environ.get("VLLM_ASCEND"):
        shutil.copytree(Path(tree) / "vllm_ascend" / "lora", folder / "vllm_ascend" / "lora")
        for name, text in STUBS.items():
            (folder / "vllm_ascend" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "vllm_ascend" / name).write_text(text)
    paths = [os.environ.get("PYTHONPATH", ""), str(folder), str(code)]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "WATCHED": "\n".join(WATCHED)}


def _run(case, env, kind):
    """Answers by adapter, its slot, buffers by layer, and what the child says of itself."""
    rounds = [[(p, name) for p in PROMPTS] for name in case.adapters]
    paths = {name: str(path) for name, path in case.adapters.items()}
    options = {"dtype": "float32", "max_loras": len(paths)}
    job = engine.Job(str(case.model), paths, rounds, options=options)
    saved = case.folder / "buffers.pt"
    script = Path(__file__).with_name("out_of_tree.py")
    env = {**env, "BUFFERS": str(saved), "STANDIN_LAYERS": KINDS[kind]}
    answers, _, log = engine.run(job, env, script=script)
    facts = json.loads(log.split("FACTS ", 1)[1].splitlines()[0])
    slots, buffers = torch.load(saved, weights_only=True)
    got = dict(zip(case.adapters, ([lp[-1] for _, lp in batch] for batch in answers), strict=True))
    assert sorted(slots) == list(range(1, len(paths) + 1)), "every adapter has a slot"
    return got, {name: slots.index(i) for i, name in enumerate(paths, 1)}, buffers, facts


def _demand_stand_in(facts, kind):
    assert facts["platform"] == [True, False]
    assert facts["changed"] == []
    module = KINDS[kind].partition(":")[0]
    assert facts["classes"] == [module] * 2
    assert facts["upstream's classes"]
    assert facts["wrappers"] == [module]
    off = {hook.feature for hook in LEFT_OUT}
    status = facts["status"]
    assert {name for name, state in status.items() if state == "on"} == set(status) - off
    assert {"adapters", "safe-loading", "shared-experts"} <= set(status) - off


def _delta(buffers, slot, expert, projection, interleaved):
    """Out x in, from what the platform's kernels would multiply."""
    which = "w2" if projection == "down_proj" else "w13"
    a, b = (buffers[f"{which}_lora_{side}_stacked"] for side in "ab")
    if which == "w13" and len(a) == 2:
        index = 0 if projection == "gate_proj" else 1
        return b[index][slot, expert].double() @ a[index][slot, expert].double()
    whole = b[0][slot, expert].double() @ a[0][slot, expert].double()
    if which == "w2":
        return whole
    if interleaved:
        return whole[0 if projection == "gate_proj" else 1 :: 2]
    return whole.chunk(2)[0 if projection == "gate_proj" else 1]


def _compare_buffers(truth, buffers, slot, interleaved):
    """The products in the buffers are the adapter's, by the definition of LoRA, to 1e-5."""
    assert len(buffers) == layouts.LAYERS
    for name, stacks in buffers.items():
        layer = int(name.split("layers.")[1].split(".")[0])
        for projection in ("gate_proj", "up_proj", "down_proj"):
            for expert in range(layouts.EXPERTS):
                have = _delta(stacks, slot, expert, projection, interleaved)
                difference = (have - truth.delta(layer, projection, expert)).abs().max()
                assert difference <= 1e-5, (name, projection, expert, difference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_every_layout_lands(make_case, platform, family, kind):
    """2-D and 3-D wrappers; each layout against its truth in the buffers, and merged."""
    overrides, form, interleaved = MODELS[family]
    case = make_case(family, **overrides)
    every = {**layouts.every(form, interleaved), **_one_sided(form, interleaved)}
    wide = layouts.Truth(seed=7, rank=7, alpha=3.0, tied=False)
    every["another rank"] = (wide, layouts.per_expert(wide, form), {})
    merged = {}
    for name, (truth, tensors, config) in every.items():
        case.adapters[name] = layouts.save(case.folder / name, tensors, truth, **config)
        if id(truth) not in merged:
            target = layouts.merge(case.plain, truth, case.folder / f"merged-{len(merged)}")
            merged[id(truth)] = oracle.log_probs(target, PROMPTS)
        case.oracles[name] = merged[id(truth)]
    got, slots, buffers, facts = _run(case, platform, kind)
    _demand_stand_in(facts, kind)
    for name, (truth, _, _) in every.items():
        _compare_buffers(truth, buffers, slots[name], interleaved)
        if name != "identity":
            compare_fp32(got[name], case, name)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"own"}))
def test_gates_and_shared_experts(make_case, platform, kind):
    """Both gates and the shared experts reach the forward pass by the platform's own runner."""
    case = make_case("qwen2_moe")
    for seed, (name, keep) in enumerate(
        {
            "all": lambda name: True,
            "gate": lambda name: name.endswith("mlp.gate"),
            "shared gate": lambda name: name.endswith("shared_expert_gate"),
            "shared": lambda name: ".shared_expert." in name,
        }.items()
    ):
        case.add(name, keep, seed=seed)
    got, _, _, facts = _run(case, platform, kind)
    _demand_stand_in(facts, kind)
    for name, have in got.items():
        compare_fp32(have, case, name)
