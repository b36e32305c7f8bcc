"""A child that loads adapters from memory, as verl's hijack of vLLM does: no file is read by vLLM.

verl replaces `LRUCacheWorkerLoRAManager._load_adapter` after plugins are loaded, so everything that
the package does for in-memory adapters must happen below that method. A request's path names a
file of pickled tensors and config here, where verl has them on the request.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from vllm_moe_lora.tiny import engine


def _load_adapter(self, lora_request):
    tensors, config = torch.load(Path(lora_request.lora_path), weights_only=True)
    helper = PEFTHelper.from_dict(config)
    helper.validate_legal(self.lora_config)
    mapper = getattr(self._adapter_manager.model, "hf_to_vllm_mapper", None)
    # verl 0.9.1 leaves out skip_prefixes, moe_ep_spec and is_3d_lora_weight, too.
    return LoRAModel.from_lora_tensors(
        lora_model_id=lora_request.lora_int_id,
        tensors=tensors,
        peft_helper=helper,
        device="cpu",
        dtype=self.lora_config.lora_dtype,
        weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
    )


LRUCacheWorkerLoRAManager._load_adapter = _load_adapter
engine.main(*sys.argv[1:])
