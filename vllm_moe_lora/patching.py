"""Hooks into vLLM as data: what is replaced, where it is right to, and how to undo it.

Only the standard library is imported here. `apply` resolves and checks every hook of every
feature before it changes anything; a feature with one hook that does not fit stays off as a
whole. `revert` puts back exactly what `vars(owner)` held.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MARK = "__vllm_moe_lora__"
_MISSING = object()


@dataclass(frozen=True)
class Hook:
    """One replacement.

    Attributes:
        feature: what it serves; the hooks of a feature are applied together or not at all.
        target: "package.module:Class.method" or "package.module:function".
        make: original -> replacement. The original is what attribute access on the owner gives:
            a plain function for methods and static methods, a bound method for class methods,
            whose replacement is to be a classmethod object.
        releases: PEP 440 specifier of the vLLM releases it was written for.
        why: what goes wrong without it.
        upstream: link to the report or change upstream, "" where there is none.
        until: the event after which it can go.
        also: other names bound to the same object (copies made by ``from x import f``).
        platforms: vLLM device types it is for ("cpu", "cuda", "rocm", ...); empty means all.
        layers: it changes LoRA layer classes, which out-of-tree platforms replace themselves.
    """

    feature: str
    target: str
    make: Callable[[Any], Any]
    releases: str
    why: str
    upstream: str
    until: str
    also: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ()
    layers: bool = False


@dataclass
class Status:
    """What `apply` did: feature -> "on" or the reason why it is off."""

    features: dict[str, str] = field(default_factory=dict)

    @property
    def on(self) -> list[str]:
        return [name for name, state in self.features.items() if state == "on"]

    @property
    def off(self) -> dict[str, str]:
        return {name: why for name, why in self.features.items() if why != "on"}


class HookError(Exception):
    """A hook does not fit the vLLM that is installed; the text says which and why."""


@dataclass
class _Spot:
    """One name to rebind: ``owner.name``, with what ``vars(owner)`` held."""

    owner: Any
    name: str
    held: Any

    @classmethod
    def find(cls, target: str) -> _Spot:
        module, _, path = target.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        if not hasattr(owner, name):
            raise HookError(f"{target} does not exist")
        return cls(owner, name, vars(owner).get(name, _MISSING))

    def get(self) -> Any:
        return getattr(self.owner, self.name)

    def put(self, value: Any) -> None:
        if isinstance(self.held, staticmethod):
            value = staticmethod(value)
        setattr(self.owner, self.name, value)

    def restore(self) -> None:
        if self.held is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.held)


_applied: list[_Spot] = []


def source_text(function: Any) -> str:
    """Source of a function, dedented, so that it hashes alike whether imported or parsed."""
    text = inspect.getsource(inspect.unwrap(function))
    return textwrap.dedent(text).rstrip() + "\n"


def digest(text: str) -> str:
    """First 16 hex digits of the sha256 of a source text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plan(hook: Hook, known: Mapping[str, Iterable[str]] | None) -> list[_Spot]:
    """The names to rebind, after every check. Raises HookError."""
    spot = _Spot.find(hook.target)
    current = spot.get()
    if hasattr(current, MARK):
        return []
    if known is not None:
        found = digest(source_text(current))
        if found not in known.get(hook.target, ()):
            raise HookError(
                f"the source of {hook.target} (hash {found}) is not one this version was "
                "written against"
            )
    spots = [spot]
    for name in hook.also:
        try:
            alias = _Spot.find(name)
        except (ImportError, AttributeError, HookError):
            continue  # the release does not import the name there
        if alias.get() is not current:
            raise HookError(f"{name} is not {hook.target}: something else replaced it")
        spots.append(alias)
    return spots


def apply(
    hooks: Iterable[Hook],
    *,
    version: str,
    platform: str,
    hashes: Mapping[str, Iterable[str]] | None,
    out_of_tree: bool = False,
) -> Status:
    """Check every hook, then apply the features whose hooks all fit.

    Args:
        hooks: the hooks; two for one target are a programming error.
        version: release of vLLM without local part, "0.32.0".
        platform: vLLM's device type, "cpu", "cuda", ...
        hashes: target -> accepted `digest`s of its source; None skips the check.
        out_of_tree: the platform brings its own LoRA layers: leave out hooks on layers.

    Returns:
        Each feature's state. Applying again changes nothing and answers the same.
    """
    from packaging.specifiers import SpecifierSet

    targets: set[str] = set()
    status, plans = Status(), dict[str, list[tuple[Hook, list[_Spot]]]]()
    for hook in hooks:
        if hook.target in targets:
            raise ValueError(f"two hooks for {hook.target}")
        targets.add(hook.target)
        state = status.features.setdefault(hook.feature, "on")
        if state != "on":
            continue
        try:
            if hook.platforms and platform not in hook.platforms:
                raise HookError(f"not needed on {platform}")
            if hook.layers and out_of_tree:
                raise HookError("the platform plugin brings its own LoRA layers")
            if not SpecifierSet(hook.releases).contains(version, prereleases=True):
                raise HookError(f"vLLM {version} is outside {hook.releases}")
            plans.setdefault(hook.feature, []).append((hook, _plan(hook, hashes)))
        except (HookError, ImportError, AttributeError, OSError, TypeError) as error:
            status.features[hook.feature] = str(error)
    for feature in status.on:
        for hook, spots in plans.get(feature, []):
            _replace(hook, spots)
    return status


def _replace(hook: Hook, spots: list[_Spot]) -> None:
    if not spots:
        return
    replacement = hook.make(spots[0].get())
    function = getattr(replacement, "__func__", replacement)  # of a classmethod or staticmethod
    setattr(function, MARK, hook.target)
    for spot in spots:
        spot.put(replacement)
        _applied.append(spot)


def revert() -> int:
    """Undo everything `apply` did in this process; returns how many names were put back."""
    count = len(_applied)
    while _applied:
        _applied.pop().restore()
    return count
