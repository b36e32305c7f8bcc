"""Turns the plugin on and off in one process.

vLLM calls `register` in every process it starts, through the entry point in pyproject.toml.
`register` checks the vLLM release and hands the hooks to `patching.apply`.
"""

from __future__ import annotations

import sys

from vllm_moe_lora import envs, patching, supported
from vllm_moe_lora.log import info_deferred, warning_once

_status: patching.Status | None = None


def register() -> None:
    """Apply the hooks that fit the installed vLLM.

    Calling it again changes nothing. If vLLM cannot be imported, or its release is not known, no
    hook is applied, and a warning says why.

    Raises:
        RuntimeError: VLLM_MOE_LORA=1, and the plugin or one of its features cannot be on; the text
            says why.
        ValueError: VLLM_MOE_LORA has a value that is not allowed, or names an unknown feature.
    """
    global _status
    if envs.get("VLLM_MOE_LORA") == "0":
        return _register_env_vars()
    try:
        import vllm
        from vllm.platforms import current_platform
    except Exception as error:  # a broken build may raise anything
        return _report_off(
            f"vLLM cannot be imported ({error!r})", "install vLLM in this environment"
        )
    _register_env_vars()

    version = supported.release_of(str(vllm.__version__))
    unverified = bool(envs.get("VLLM_MOE_LORA_ALLOW_UNVERIFIED"))
    if version not in supported.releases() and not unverified:
        known = ", ".join(supported.releases())
        return _report_off(
            f"vLLM {version} is not a supported release (supported: {known})",
            "upgrade vllm-moe-lora, or set VLLM_MOE_LORA_ALLOW_UNVERIFIED=1 to try",
        )
    from vllm_moe_lora import platforms
    from vllm_moe_lora.hooks import all_hooks

    first = _status is None
    hooks, hashes = platforms.for_platform(current_platform, version)
    _status = patching.apply(
        supported.made_for(version, all_hooks()) + hooks,
        version=version,
        platform=current_platform.device_type,
        hashes=supported.hashes(version) | hashes,
        out_of_tree=current_platform.is_out_of_tree(),
        allow_unverified=unverified,
        disabled=envs.disabled_features(),
    )
    if _status.unverified:
        warning_once(
            "vllm-moe-lora: because of VLLM_MOE_LORA_ALLOW_UNVERIFIED=1 these mismatches were "
            "ignored, and LoRA may give wrong results: " + "; ".join(_status.unverified)
        )
    for feature, why in _status.refused.items():
        _report_off(
            f"feature {feature!r} stays off: {why}",
            "upgrade vllm-moe-lora to a release made for this vLLM"
            + ("" if unverified else ", or set VLLM_MOE_LORA_ALLOW_UNVERIFIED=1 to try"),
        )
    if first:
        names = ", ".join(_status.on) or "nothing"
        info_deferred(f"vllm-moe-lora on vLLM {version}: {names}")


def revert() -> None:
    """Put every function back that `register` replaced in this process."""
    global _status
    patching.revert()
    _status = None


def status() -> dict[str, str]:
    """Return {feature: "on", or the reason why it is off}; empty while the plugin is off."""
    return dict(_status.features) if _status is not None else {}


def _report_off(what: str, cure: str) -> None:
    """Warn that the plugin or a feature is off; with VLLM_MOE_LORA=1 raise RuntimeError instead."""
    if envs.get("VLLM_MOE_LORA") == "1":
        raise RuntimeError(f"VLLM_MOE_LORA=1, but vllm-moe-lora: {what}. Cure: {cure}.")
    warning_once(f"vllm-moe-lora: {what}. Cure: {cure}.")


def _register_env_vars() -> None:
    """Tell vLLM about our environment variables, or it warns that it does not know their names."""
    if "vllm" not in sys.modules:
        return
    import vllm.envs

    for name, read in envs.VARIABLES.items():
        vllm.envs.environment_variables.setdefault(name, read)
