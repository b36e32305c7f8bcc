"""LoRA on any Mixture-of-Experts model in vLLM.

Importing this package is cheap and safe anywhere: it loads neither torch nor vLLM. It only
arranges that `register` runs when vLLM loads its plugins in this process; with the package
installed, vLLM does so by itself in every process (entry point group `vllm.general_plugins`).
"""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> None:
    """Apply the hooks now; the `vllm.general_plugins` entry point."""
    from vllm_moe_lora import plugin

    plugin.register()


def revert() -> None:
    """Undo `register` in this process."""
    from vllm_moe_lora import plugin

    plugin.revert()


def status() -> dict[str, str]:
    """feature -> "on", or why it is off; empty while the plugin is not active."""
    from vllm_moe_lora import plugin

    return plugin.status()


def _arrange() -> None:
    from vllm_moe_lora import trigger

    trigger.arrange()


_arrange()
