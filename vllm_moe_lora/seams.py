"""The seam that patches/ puts into vLLM's own files: a decorator that applies one hook.

    from vllm.lora import moe_lora

    class LoRAModelManager:
        @moe_lora.seam("adapters")
        def _add_adapter(self, lora): ...

It stands above every other decorator. What the plugin rebinds from outside, a seam replaces where
it is defined, so copies made by ``from x import f`` hold the replacement too. Importing this
loads nothing but the standard library: every module of vLLM may do it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from .hooks import all_hooks
from .patching import MARK, Hook, HookError, not_needed


def seam(feature: str, module: str = "") -> Callable[[Any], Any]:
    """Replace the decorated function, class method, static method, property or class.

    Args:
        feature: of the hook whose target is decorated.
        module: the target's module, where that is not the one of the definition.

    Raises:
        HookError: no hook of ``feature`` has that target, or its replacement is of another kind.
    """

    def decorate(thing: Any) -> Any:
        function = _function(thing)
        target = f"{module or function.__module__}:{function.__qualname__}"
        hook = next((h for h in _hooks() if (h.feature, h.target) == (feature, target)), None)
        if hook is None:
            raise HookError(f"no hook of feature {feature!r} has the target {target}")
        if not _needed(feature):
            return _marked(thing, hook)
        if isinstance(thing, classmethod):
            return _ClassMethod(thing, hook)
        if isinstance(thing, staticmethod):
            made = _marked(hook.make(function), hook)
            return made if isinstance(made, staticmethod) else staticmethod(made)
        made = hook.make(thing)
        if isinstance(thing, property):
            made = _of_kind(property, made, hook)
        return _marked(made, hook)

    return decorate


class _ClassMethod:
    """Stands in until the class exists: `Hook.make` wants the method bound to it."""

    def __init__(self, original: classmethod[Any, Any, Any], hook: Hook) -> None:
        self.original = original
        self.hook = hook

    def __set_name__(self, owner: type[Any], name: str) -> None:
        bound = self.original.__get__(None, owner)
        made = self.hook.make(bound)
        if made is bound:
            made = self.original
        setattr(owner, name, _marked(_of_kind(classmethod, made, self.hook), self.hook))


def _hooks() -> list[Hook]:
    """Those of the release that was patched; the folder's __init__ has its name."""
    release = getattr(sys.modules[__package__], "RELEASE", None)
    return [hook for hook in all_hooks() if release is None or hook.made_for(release)]


def _of_kind(kind: type[Any], made: Any, hook: Hook) -> Any:
    if not isinstance(made, kind):
        raise HookError(f"the replacement of {hook.target} is no {kind.__name__}")
    return made


def _needed(feature: str) -> bool:
    """Whether this platform has a use for ``feature``; as with the plugin, all of it or nothing."""
    hooks = [hook for hook in _hooks() if hook.feature == feature]
    if not any(hook.platforms or hook.layers for hook in hooks):
        return True
    # Only here: the modules such hooks are for have asked for the platform before us.
    from vllm.platforms import current_platform

    here = current_platform.device_type, current_platform.is_out_of_tree()
    return not any(not_needed(hook, *here) for hook in hooks)


def _marked(thing: Any, hook: Hook) -> Any:
    """``thing`` with the mark by which the plugin sees that this place is dealt with.

    What is left as it is gets it too: its source text, which now has a line more, is no concern
    of the plugin's.
    """
    with contextlib.suppress(AttributeError, TypeError):
        setattr(_function(thing), MARK, hook.target)
    return thing


def _function(thing: Any) -> Any:
    if isinstance(thing, property):
        return thing.fget
    # A bound method takes no attribute, its function does.
    return getattr(thing, "__func__", thing)
