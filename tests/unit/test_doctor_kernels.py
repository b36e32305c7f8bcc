"""doctor: what it says of the kernels on a GPU."""

from __future__ import annotations

import test_records

from vllm_moe_lora import records
from vllm_moe_lora.commands import doctor


def test_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_MOE_LORA_TUNED", str(tmp_path))
    assert "tail (VLLM_MOE_LORA_KERNELS)" in doctor._kernels("tail", []).what
    assert "vllm-moe-lora tune" in doctor._kernels("auto", []).what
    path = records.write(test_records.RECORD)
    found = doctor._kernels("auto", [str(path)])
    assert found.well
    assert "128 experts" in found.what
    assert "Some GPU" in found.what
    path.write_text("{")
    found = doctor._kernels("auto", [str(path)])
    assert not found.well
    assert path.name in found.what
