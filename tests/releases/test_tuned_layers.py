"""`vllm-moe-lora tune` on each release's own quantised layers, and on layers that are wrong.

In Triton's interpreter, on CPU tensors, with loops in place of the base's operators and without
upstream's LoRA kernels: tuned_layers.py, which these tests run once a release, and tuned_model.py.
"""

from __future__ import annotations

import json

import pytest
import unpacked
from packaging.specifiers import SpecifierSet
from release import installed

from vllm_moe_lora.tiny import models

pytest.importorskip("triton")
RELEASES = [r for r in unpacked.available() if r in SpecifierSet(">=0.28,<0.34")]
MARLIN, TRITON = "MarlinExperts", "TritonWNA16Experts"
# Kind -> experts, and a word of the record's path that no other kind of the same experts has.
KINDS = {
    "gptq": (MARLIN, "AutoGPTQMoEMethod, weight_bits 4, group_size 32"),
    "awq": (MARLIN, "AutoAWQMoEMethod, weight_bits 4, group_size 32"),
    "ct": (MARLIN, "CompressedTensorsWNA16MoEMethod, num_bits 4, group_size 32"),
    "moe_wna16": (TRITON, "MoeWNA16Method, weight_bits 4, group_size 32, has_zp False"),
    "moe_wna16-awq": (TRITON, "MoeWNA16Method, weight_bits 4, group_size 32, has_zp True"),
    "fp8-marlin": (MARLIN, "Fp8MoEMethod"),
    "fp8-blocks-marlin": (MARLIN, "Fp8MoEMethod, weight_block_size [32, 32]"),
    "mxfp4-marlin": (MARLIN, "GptOssMxfp4MoEMethod, bias"),
    "mxfp4-oai": ("UnfusedOAITritonExperts", "GptOssMxfp4MoEMethod, bias"),
    "fp8": ("TritonExperts", "Fp8MoEMethod"),  # which quantise the tokens, too
    "bias": ("TritonExperts", "UnquantizedFusedMoEMethod, bias"),
}
FAULTY = [kind if kind == "gptq" else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
# How far answers are from loops in fp32: fp16 for integers, bf16 for the others, tokens in FP8.
LIMIT, LIMIT_BF16, LIMIT_FP8 = 0.004, 0.03, 0.1


def result(release, kind, *given):
    found = unpacked.results(release, "tuned_layers.py", *given)
    assert found["status"]["moe-kernels"] == "on", found["status"]
    assert "error" not in found["cases"][kind], found["cases"][kind]
    return found["cases"][kind]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_right_is_not_refused(release, kind):
    """The fp32 weights that tune compares with are those that the release's own code repacked."""
    right(result(release, kind))


@pytest.mark.parametrize("release", [r for r in RELEASES if r in SpecifierSet(">=0.31")])
def test_with_triton_kernels_3_8(release):
    """Whose rows are sorted by expert; our hooks bring them into token order."""
    right(result(release, "mxfp4-oai", "3.8"))


def right(found):
    limit = LIMIT_BF16 if found["dtype"] == "bfloat16" else LIMIT
    limit = limit if found["exact"] else LIMIT_FP8
    assert found["exact"] == ("TritonExperts, Fp8" not in found["path"])
    assert found["off"] <= limit
    assert found["moved"] > 9 * limit
    assert (found["refused"].keys(), found["remarks"]) == ({"tail"}, [])
    assert (found["kinds"], found["base"]) == (["ours", "upstream"], True)


@pytest.mark.parametrize("release", RELEASES)
def test_a_record_names_what_it_is_of(release):
    paths = {kind: result(release, kind)["path"] for kind in KINDS}
    assert len(set(paths.values())) == len(KINDS)
    for kind, (experts, word) in KINDS.items():
        assert paths[kind].startswith(f"{experts}, {word}")


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("kind", FAULTY)
def test_wrong_lora_is_never_chosen(release, kind):
    """One number off; rows changed that have no LoRA; the base's numbers lost."""
    found = result(release, kind)["wrong"]
    for fault in ("a number of the LoRA", "rows without LoRA", "no base"):
        assert "numbers are wrong" in found[fault]["refused"]
        assert f"after {KINDS[kind][0]}: w13: " in found[fault]["refused"]
        assert (found[fault]["kinds"], found[fault]["timed"]) == (["upstream"], ["upstream"])
    assert "w13: 1 of " in found["a number of the LoRA"]["refused"]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("kind", FAULTY)
def test_a_wrong_base_is_reported(release, kind):
    """It is vLLM's, whatever adds the LoRA: the report says it, and ours are not refused."""
    if not result(release, kind)["exact"]:
        return  # fp32 says nothing of the base
    found = result(release, kind)["wrong"]["a weight"]
    assert found["refused"] == ""
    assert "the base GEMM of w13 is off by up to" in found["remarks"][0]
    if KINDS[kind][0] == MARLIN:
        found = result(release, kind)["wrong"]["a number not written"]
        assert "off by up to inf" in found["remarks"][0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint whose config.json says GPTQ; nothing else of it is read."""
    folder = models.build("qwen3_moe", tmp_path_factory.mktemp("model") / "m", num_experts=32)
    config = json.loads((folder / "config.json").read_text())
    packed = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    config |= {"dtype": "float16", "quantization_config": {**packed, "lm_head": False}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(not RELEASES, reason="no release that has these kernels is here")
@pytest.mark.parametrize(
    ("tensor_parallel", "expert_parallel", "shape"),
    [
        pytest.param(1, 0, (32, 0, 128), marks=pytest.mark.long),
        pytest.param(2, 0, (32, 0, 64), marks=pytest.mark.long),
        (2, 1, (16, 16, 128)),
    ],
)
def test_layers_of_a_model(tensor_parallel, expert_parallel, shape, model):
    """config.json alone says which experts, and the slices are those of rank 0."""
    here = installed().partition("+")[0]
    release = here if here in RELEASES else RELEASES[-1]
    given = map(str, (model, tensor_parallel, expert_parallel))
    found = unpacked.results(release, "tuned_model.py", *given)
    made = found["shape"]
    assert (made["experts"], made["absent"], made["inner"]) == shape
    assert made["path"].startswith("MarlinExperts, AutoGPTQMoEMethod, weight_bits 4, group_size 32")
    assert found["asked"] == found["as_served"], "an engine looks for this record"
    assert (found["refused"].keys(), found["remarks"]) == ({"tail"}, [])
    assert found["timed"] == ["ours", "upstream"]
    where = [*range(16), *[-1] * 16] if expert_parallel else None
    assert found["map"] == where
