"""LoRA on dense layers of a MoE model on the CPU reads the factors where they are."""

from __future__ import annotations

import pytest
from engine_cases import told

pytestmark = pytest.mark.cpu_engine
TOKENS, SIZE, RANK = 24, 96, 16
CHILD = """
import json, sys
import torch
import vllm_moe_lora
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

vllm_moe_lora.register()
tokens, size, rank = map(int, sys.argv[1:])
torch.manual_seed(0)


class Largest(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view:
            self.numel = max(getattr(self, "numel", 0), out.numel())
        return out


punica = PunicaWrapperCPU(64, 64, "cpu")
punica.moe_lora = True  # hooks/lora_model_manager.py sets it
ids = tuple(i % 3 for i in range(tokens))  # no adapter, the first, the second
punica.update_metadata(LoRAMapping(ids, ids, True), [1, 2], 2, 512)
slots = torch.tensor(ids) - 1
a, b = torch.randn(2, 1, rank, size), torch.randn(2, 1, size, rank)
x, base = torch.randn(tokens, size), torch.randn(tokens, size)
z = torch.randn(tokens, rank)
calls = {
    "linear": lambda y: punica.add_lora_linear(y, x, (a,), (b,), 1.0, (size,)),
    "logits": lambda y: punica.add_lora_logits(y, x, a, b, 1.0),
    "embedding": lambda y: punica.add_lora_embedding(y, z, b),
}
found = {}
for name, call in calls.items():
    y = base.clone()
    with Largest() as largest:
        call(y)
    want = base.double()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            inner = z[row] if name == "embedding" else a[slot, 0].double() @ x[row].double()
            want[row] += b[slot, 0].double() @ inner.double()
    found[name] = [getattr(largest, "numel", 0), (y - want).abs().max().item()]
print("@" + json.dumps(found))
"""


@pytest.mark.parametrize("native", ["0", "1"])
def test_no_factor_is_copied_for_each_token(native):
    """Bare vLLM makes a tensor of [tokens, size, rank]; 0.33's answers are right, and slow."""
    sizes = map(str, (TOKENS, SIZE, RANK))
    found = told("-c", CHILD, *sizes, VLLM_MOE_LORA_NATIVE=native)
    for name, (largest, off) in found.items():
        assert off < 1e-4, name
        assert largest <= TOKENS * SIZE, f"{name}: a tensor of {largest} numbers was made"
