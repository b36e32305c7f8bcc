"""register(), which vLLM calls in every process."""

from __future__ import annotations

import sys

from vllm_moe_lora import envs, patching, supported
from vllm_moe_lora.log import info_when_heard, warning_once

_status: patching.Status | None = None


def register() -> None:
    """Apply the hooks that fit the installed vLLM. Safe to call any number of times.

    Raises:
        RuntimeError: VLLM_MOE_LORA=1 and the plugin cannot be active; the text says why.
        ValueError: VLLM_MOE_LORA has a value it cannot have, or names no feature.
    """
    global _status
    if envs.get("VLLM_MOE_LORA") == "0":
        return _name_variables()
    try:
        import vllm
        from vllm.platforms import current_platform
    except Exception as error:  # a broken build may raise anything
        return _stay_off(f"vLLM cannot be imported ({error!r})", "install vLLM in this environment")
    _name_variables()

    version = supported.release_of(str(vllm.__version__))
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
        supported.made_for(version, all_hooks()),
        version=version,
        platform=current_platform.device_type,
        hashes=supported.hashes(version),
        out_of_tree=current_platform.is_out_of_tree(),
        allow_unverified=unverified,
        left_out=envs.left_out(),
    )
    if _status.unverified:
        warning_once(
            "vllm-moe-lora: VLLM_MOE_LORA_ALLOW_UNVERIFIED=1, so these did not keep anything off: "
            + "; ".join(_status.unverified)
        )
    for feature, why in _status.refused.items():
        _stay_off(
            f"feature {feature!r} stays off: {why}",
            "upgrade vllm-moe-lora to a release made for this vLLM"
            + ("" if unverified else ", or set VLLM_MOE_LORA_ALLOW_UNVERIFIED=1 to try"),
        )
    if first:
        names = ", ".join(_status.on) or "nothing"
        info_when_heard(f"vllm-moe-lora on vLLM {version}: {names}")


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
    if "vllm" not in sys.modules:
        return
    import vllm.envs

    for name, read in envs.VARIABLES.items():
        vllm.envs.environment_variables.setdefault(name, read)
