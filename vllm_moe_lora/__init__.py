"""LoRA on any Mixture-of-Experts model in vLLM.

The package is a vLLM plugin. If it is installed, vLLM calls `register` in every process it starts
(entry point group `vllm.general_plugins`). `register` replaces some of vLLM's functions.

Importing this package is cheap: it loads neither torch nor vLLM. The import makes sure that
`register` runs in this process as soon as vLLM loads its plugins.
"""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> None:
    """Apply the hooks to the vLLM of this process.

    This is the `vllm.general_plugins` entry point. `plugin.register` lists the errors it raises.
    """
    from vllm_moe_lora import plugin

    plugin.register()


def revert() -> None:
    """Undo `register` in this process: put every original function of vLLM back."""
    from vllm_moe_lora import plugin

    plugin.revert()


def status() -> dict[str, str]:
    """Return {feature: "on", or the reason why it is off}; empty while the plugin is off."""
    from vllm_moe_lora import plugin

    return plugin.status()


def _install_trigger() -> None:
    from vllm_moe_lora import trigger

    trigger.install()


_install_trigger()
