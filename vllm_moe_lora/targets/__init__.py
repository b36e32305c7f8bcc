"""Which modules an adapter may target with LoRA, and which routed experts can apply LoRA.

`target_modules.py` answers it from vLLM's --lora-target-modules, `server_adapters.py` from the
adapters in a server's --lora-modules. `supports_lora.py` lists the classes of experts in vLLM that
say they support LoRA but ignore it, and refuses settings with which LoRA would be wrong.
"""
