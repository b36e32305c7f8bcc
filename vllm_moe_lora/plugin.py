"""register(), which vLLM calls in every process, and what `import vllm_moe_lora` arranges."""

from __future__ import annotations

import sys
from typing import Any

from vllm_moe_lora import envs, patching, supported
from vllm_moe_lora.log import get_logger, warning_once

_status: patching.Status | None = None


def register() -> None:
    """Apply the hooks that fit the installed vLLM. Safe to call any number of times.

    Raises:
        RuntimeError: VLLM_MOE_LORA=1 and the plugin cannot be active; the text says why.
        ValueError: VLLM_MOE_LORA has a value it cannot have.
    """
    global _status
    mode = envs.get("VLLM_MOE_LORA")
    if mode == "0":
        return
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        return _stay_off(f"vLLM cannot be imported ({error})", "install vLLM in this environment")
    _name_variables()

    version = str(vllm.__version__).partition("+")[0]
    unverified = bool(envs.get("VLLM_MOE_LORA_ALLOW_UNVERIFIED"))
    if version not in supported.releases() and not unverified:
        known = ", ".join(supported.releases())
        return _stay_off(
            f"vLLM {version} is not a release it knows ({known})",
            "upgrade vllm-moe-lora, or set VLLM_MOE_LORA_ALLOW_UNVERIFIED=1 to try",
        )
    from vllm_moe_lora.hooks import all_hooks

    first = _status is None
    _status = patching.apply(
        all_hooks(),
        version=version,
        platform=current_platform.device_type,
        hashes=None if unverified else supported.hashes(version),
        out_of_tree=current_platform.is_out_of_tree(),
    )
    for feature, why in _status.off.items():
        if not why.startswith("not needed"):
            _stay_off(
                f"feature {feature!r} stays off: {why}",
                "install the vllm-moe-lora made for this vLLM, or set "
                "VLLM_MOE_LORA_ALLOW_UNVERIFIED=1 to try",
            )
    if first:
        names = ", ".join(_status.on) or "nothing"
        get_logger().info("vllm-moe-lora on vLLM %s: %s", version, names)


def revert() -> None:
    """Put every replaced function back."""
    global _status
    patching.revert()
    _status = None


def status() -> dict[str, str]:
    """feature -> "on" or why it is off; empty while the plugin is not active."""
    return dict(_status.features) if _status is not None else {}


def _stay_off(what: str, cure: str) -> None:
    if envs.get("VLLM_MOE_LORA") == "1":
        raise RuntimeError(f"VLLM_MOE_LORA=1, but vllm-moe-lora: {what}. Cure: {cure}.")
    warning_once(f"vllm-moe-lora: {what}. Cure: {cure}.")


def _name_variables() -> None:
    """Tell vLLM our variables, so that it does not warn about unknown VLLM_ names."""
    import vllm.envs

    for name, read in envs.VARIABLES.items():
        vllm.envs.environment_variables.setdefault(name, read)


# -- `import vllm_moe_lora` ------------------------------------------------------------------------


def arrange() -> None:
    """Have register() run when vLLM loads its plugins, without importing vLLM now.

    vLLM calls `vllm.plugins.load_general_plugins` in every process before it builds anything. An
    explicit import counts even where VLLM_PLUGINS leaves our entry point out.
    """
    if envs.get("VLLM_MOE_LORA") == "0":
        return
    if "vllm.plugins" in sys.modules:
        register()  # vLLM may have loaded its plugins already, or hold its own copy of the name
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _follow(plugins: Any) -> None:
    original = plugins.load_general_plugins

    def load_general_plugins(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        register()
        return result

    plugins.load_general_plugins = load_general_plugins


class _Finder:
    """Meta-path finder that calls `_follow` once `vllm.plugins` has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "vllm.plugins":
            return None
        import importlib.util

        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _follow(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
