"""The decorator `seam`, which applies one hook inside of a patched vLLM.

There are two ways to apply the hooks. The plugin replaces vLLM's functions at run time. Patches,
which patchset/ makes, change vLLM's own files: they add this decorator above each function that a
hook replaces.

    from vllm.lora import moe_lora

    class LoRAModelManager:
        @moe_lora.seam("adapters")
        def _add_adapter(self, lora): ...

The seam goes above all other decorators. It replaces the function where it is defined, so modules
that copy the name with ``from x import f`` get the replacement, too. Importing this module loads
only the standard library, so every module of vLLM can import it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from .hooks import all_hooks
from .patching import MARK, Hook, HookError, not_needed


def seam(feature: str, module: str = "") -> Callable[[Any], Any]:
    """Return a decorator that applies a hook to a function, method, property or class.

    The hook is found by its feature and by the name of what is decorated.

    Args:
        feature: the hook's feature.
        module: the module in the hook's target; "" if that is where the definition is.

    Raises:
        HookError: ``feature`` has no hook with this target, or the hook's replacement is of the
            wrong kind (for a property, for example, not a property).
    """

    def decorate(thing: Any) -> Any:
        function = _function(thing)
        target = f"{module or function.__module__}:{function.__qualname__}"
        hook = next((h for h in _hooks() if (h.feature, h.target) == (feature, target)), None)
        if hook is None:
            raise HookError(
                f"no hook of feature {feature!r} has the target {target}; this tree was patched by "
                "another version. Revert the patches and apply them again"
            )
        if not _needed(feature):
            return _marked(thing, hook)
        if isinstance(thing, classmethod):
            return _ClassMethod(thing, hook)
        if isinstance(thing, staticmethod):
            made = _marked(hook.make(function), hook)
            return made if isinstance(made, staticmethod) else staticmethod(made)
        made = hook.make(thing)
        if isinstance(thing, property):
            made = _demand_kind(property, made, hook)
        return _marked(made, hook)

    return decorate


class _ClassMethod:
    """Stands in for a class method while Python builds the class.

    `Hook.make` needs the method bound to its class, and that does not exist yet when a decorator
    runs. Python calls `__set_name__` when it does; there the replacement takes this object's place.
    """

    def __init__(self, original: classmethod[Any, Any, Any], hook: Hook) -> None:
        self.original = original
        self.hook = hook

    def __set_name__(self, owner: type[Any], name: str) -> None:
        bound = self.original.__get__(None, owner)
        made = self.hook.make(bound)
        if made is bound:
            made = self.original
        setattr(owner, name, _marked(_demand_kind(classmethod, made, self.hook), self.hook))


def _hooks() -> list[Hook]:
    """Return the hooks of the release that was patched.

    In a patched tree this package's ``__init__`` holds its name, ``RELEASE``.
    """
    release = getattr(sys.modules[__package__], "RELEASE", None)
    return [hook for hook in all_hooks() if release is None or hook.made_for(release)]


def _demand_kind(kind: type[Any], made: Any, hook: Hook) -> Any:
    """Return ``made``. Raises HookError if it is not a ``kind``."""
    if not isinstance(made, kind):
        raise HookError(
            f"{hook.target} is a {kind.__name__}, but its replacement is a {type(made).__name__}"
        )
    return made


def _needed(feature: str) -> bool:
    """Return whether this platform needs every hook of ``feature``.

    As in `patching.apply`, the hooks of a feature are applied all or none.
    """
    hooks = [hook for hook in _hooks() if hook.feature == feature]
    if not any(hook.platforms or hook.layers for hook in hooks):
        return True
    # Only if a hook depends on the platform: asking for it too early, while vLLM is still being
    # imported, would load platform plugins. The modules of these hooks have asked for it already.
    from vllm.platforms import current_platform

    here = current_platform.device_type, current_platform.is_out_of_tree()
    return not any(not_needed(hook, *here) for hook in hooks)


def _marked(thing: Any, hook: Hook) -> Any:
    """Return ``thing``, marked so that the plugin sees that this function is already handled.

    A function that the hook does not replace is marked, too. The seam added a line to its source,
    so the plugin would find an unknown hash.
    """
    with contextlib.suppress(AttributeError, TypeError):
        setattr(_function(thing), MARK, hook.target)
    return thing


def _function(thing: Any) -> Any:
    """Return the function inside a property, class method, static method or bound method."""
    if isinstance(thing, property):
        return thing.fget
    # One cannot set an attribute on a bound method, but on its function.
    return getattr(thing, "__func__", thing)
