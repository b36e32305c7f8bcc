"""Makes `import vllm_moe_lora` enough to turn the plugin on.

vLLM calls the entry point `vllm_moe_lora:register` by itself, but not if the package is only on
Python's path, or if VLLM_PLUGINS is set and does not name it. In these cases, too, the import has
to turn the plugin on. It must not import vLLM itself, so `install` waits until vLLM loads plugins.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

GROUP = "vllm.general_plugins"
PLUGINS = "vllm.plugins"


def install() -> None:
    """Make `plugin.register` run when vLLM loads its plugins, without importing vLLM now.

    vLLM calls `vllm.plugins.load_general_plugins` in every process before it builds anything. This
    function wraps that call. The wrapper also works if VLLM_PLUGINS does not name our entry point.
    """
    if os.environ.get("VLLM_MOE_LORA", "").strip() == "0":  # register() rejects wrong values
        return
    if PLUGINS not in sys.modules:
        if not any(isinstance(finder, _PluginsFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _PluginsFinder())
    elif _why_no_entry_point():
        # It is too late to wrap the function: vLLM may have called it already, and other modules
        # may hold copies of it.
        _register()
    # Otherwise vLLM will call the entry point. It may be importing this package right now in order
    # to do so. Then we must not raise here: vLLM only logs what a plugin's import raises, but it
    # stops for what the entry point raises.


def _register() -> None:
    from vllm_moe_lora import plugin
    from vllm_moe_lora.log import warning_once

    plugin.register()
    if why := _why_no_entry_point():
        warning_once(
            f"vllm-moe-lora: it is active in this process, but not in the processes that vLLM "
            f"spawns: {why}."
        )


def _why_no_entry_point() -> str:
    """Return why vLLM does not call our entry point, and the cure; "" if it does call it."""
    from importlib.metadata import entry_points

    ours = {e.name for e in entry_points(group=GROUP) if e.module == "vllm_moe_lora"}
    if not ours:
        return "the package is not installed. Cure: pip install it in this environment"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or ours & set(allowed.split(",")):
        return ""
    return f"VLLM_PLUGINS={allowed!r} does not name it. Cure: add {min(ours)} to VLLM_PLUGINS"


def _wrap_plugin_loader(plugins: Any) -> None:
    """Wrap `load_general_plugins` of the module `vllm.plugins`: call `_register` after it."""
    original = plugins.load_general_plugins

    def load_general_plugins(*args: Any, **kwargs: Any) -> Any:
        # vLLM calls entry points only the first time. We do the same, so that revert() is not
        # undone by a later call.
        called_before = plugins.plugins_loaded
        result = original(*args, **kwargs)
        if not called_before:
            _register()
        return result

    plugins.load_general_plugins = load_general_plugins


class _PluginsFinder:
    """Meta-path finder that calls `_wrap_plugin_loader` when `vllm.plugins` has been imported.

    It stays in `sys.meta_path` after its first answer: `importlib.util.find_spec("vllm.plugins")`
    asks it as well, and that imports nothing.
    """

    def __init__(self) -> None:
        self.searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != PLUGINS or self.searching:
            return None
        import importlib.util

        self.searching = True  # find_spec below asks this finder again; let the others answer
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _wrap_plugin_loader(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
