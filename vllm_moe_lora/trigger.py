"""What `import vllm_moe_lora` arranges: register() runs when vLLM loads its plugins."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

GROUP = "vllm.general_plugins"
PLUGINS = "vllm.plugins"


def arrange() -> None:
    """Have register() run when vLLM loads its plugins, without importing vLLM now.

    vLLM calls `vllm.plugins.load_general_plugins` in every process before it builds anything. An
    explicit import counts even where VLLM_PLUGINS leaves our entry point out.
    """
    if os.environ.get("VLLM_MOE_LORA", "").strip() == "0":  # a wrong value is for register()
        return
    if PLUGINS not in sys.modules:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    elif _why_no_entry_point():
        # vLLM may have loaded its plugins already, or hold its own copy of the function.
        _register()
    # Otherwise vLLM calls the entry point, and may be importing us for that: it logs and passes
    # over what is raised while it imports a plugin, but not what the entry point raises.


def _register() -> None:
    from vllm_moe_lora import plugin
    from vllm_moe_lora.log import warning_once

    plugin.register()
    if why := _why_no_entry_point():
        warning_once(
            f"vllm-moe-lora: imported in this process, but processes that vLLM spawns run "
            f"without it: {why}."
        )


def _why_no_entry_point() -> str:
    """Why vLLM does not call our entry point in its processes, with the cure; "" if it does."""
    from importlib.metadata import entry_points

    ours = {e.name for e in entry_points(group=GROUP) if e.module == "vllm_moe_lora"}
    if not ours:
        return "the package is not installed. Cure: pip install it in this environment"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or ours & set(allowed.split(",")):
        return ""
    return f"VLLM_PLUGINS={allowed!r} leaves it out. Cure: add {min(ours)} to VLLM_PLUGINS"


def _follow(plugins: Any) -> None:
    original = plugins.load_general_plugins

    def load_general_plugins(*args: Any, **kwargs: Any) -> Any:
        again = plugins.plugins_loaded  # then revert() is to last, as it does with the entry point
        result = original(*args, **kwargs)
        if not again:
            _register()
        return result

    plugins.load_general_plugins = load_general_plugins


class _Finder:
    """Meta-path finder that calls `_follow` once `vllm.plugins` has been imported.

    It stays: `importlib.util.find_spec` asks it too, without importing anything.
    """

    def __init__(self) -> None:
        self.looking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != PLUGINS or self.looking:
            return None
        import importlib.util

        self.looking = True  # the other finders are to answer, not this one again
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _follow(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
