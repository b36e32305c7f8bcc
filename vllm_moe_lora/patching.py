"""Hooks into vLLM as data: what is replaced, where it is right to, and how to undo it.

Only the standard library is imported here (and `packaging`, which vLLM brings, when hooks are
applied). `apply` resolves and checks every hook of every feature before it changes anything; a
feature with one hook that does not fit stays off as a whole. `revert` puts back exactly what
`vars(owner)` held.
"""

from __future__ import annotations

import contextlib
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
        target: "package.module:Class.method" or "package.module:function"; also a property, a
            class or, with ``hashed=False``, plain data.
        make: original -> replacement. The original is what attribute access on the owner gives:
            a plain function for methods and static methods, the property itself, a bound method
            for class methods, whose replacement is to be a classmethod object. To step aside,
            return the original.
        releases: PEP 440 specifier of the vLLM releases it was written for.
        why: what goes wrong without it.
        upstream: link to the report or change upstream, "" where there is none.
        until: the event after which it can go.
        also: other names bound to the same object (copies made by ``from x import f``).
        hashed: False for plain data, which has no source text to check.
        platforms: vLLM device types it is for ("cpu", "cuda", "rocm", ...), of vLLM's own platforms
            only: one from outside has kernels of its own, whatever it calls its device. Empty
            means all platforms.
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
    hashed: bool = True
    platforms: tuple[str, ...] = ()
    layers: bool = False

    def made_for(self, release: str) -> bool:
        """Whether ``release``, "0.32.0", is in `releases`."""
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(self.releases).contains(release, prereleases=True)

    def shares_platform(self, other: Hook) -> bool:
        """Whether there is a platform that both are for."""
        return not (self.platforms and other.platforms) or not {*self.platforms}.isdisjoint(
            other.platforms
        )


@dataclass
class Status:
    """What `apply` did.

    Attributes:
        features: feature -> "on" or the reason why it is off.
        not_needed: features that are off because platform or user have no use for them.
        unverified: what did not fit and was passed over, because the caller allowed it.
    """

    features: dict[str, str] = field(default_factory=dict)
    not_needed: set[str] = field(default_factory=set)
    unverified: list[str] = field(default_factory=list)

    @property
    def on(self) -> list[str]:
        return [name for name, state in self.features.items() if state == "on"]

    @property
    def off(self) -> dict[str, str]:
        return {name: why for name, why in self.features.items() if why != "on"}

    @property
    def refused(self) -> dict[str, str]:
        """The features that are off and should be on."""
        return {name: why for name, why in self.off.items() if name not in self.not_needed}


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
        try:
            owner: Any = importlib.import_module(module)
        except Exception as error:  # a broken extension may raise anything while it is imported
            raise HookError(f"{target}: {type(error).__name__}: {error}") from error
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent, None)
        if not hasattr(owner, name):
            raise HookError(f"{target} does not exist")
        return cls(owner, name, vars(owner).get(name, _MISSING))

    def get(self) -> Any:
        return getattr(self.owner, self.name)

    def fitting(self, value: Any, target: str) -> Any:
        """``value`` as ``vars(owner)`` is to hold it. Raises HookError."""
        kind = inspect.getattr_static(self.owner, self.name)
        if isinstance(kind, staticmethod) and not isinstance(value, staticmethod):
            return staticmethod(value)
        if isinstance(kind, classmethod | property) and not isinstance(value, type(kind)):
            raise HookError(f"the replacement of {target} is no {type(kind).__name__}")
        return value

    def put(self, value: Any) -> None:
        setattr(self.owner, self.name, value)

    def restore(self) -> None:
        if self.held is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.held)

    def is_ours(self) -> bool:
        """Whether `apply` has replaced it; somebody may have wrapped the replacement since."""
        return hasattr(_function(self.get()), MARK) or any(
            spot.owner is self.owner and spot.name == self.name for spot in _applied
        )


_applied: list[_Spot] = []


def _function(thing: Any) -> Any:
    """The function inside a property, classmethod or staticmethod; anything else as it is."""
    if isinstance(thing, property):
        return thing.fget
    return thing.__func__ if isinstance(thing, classmethod | staticmethod) else thing


def source_text(thing: Any) -> str:
    """Source of a function, property or class, dedented: the same imported or parsed.

    Raises OSError or TypeError where there is none.
    """
    text = inspect.getsource(inspect.unwrap(_function(thing)))
    return textwrap.dedent(text).rstrip() + "\n"


def digest(text: str) -> str:
    """First 16 hex digits of the sha256 of a source text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def not_needed(hook: Hook, platform: str, out_of_tree: bool) -> str:
    """Why this platform has no use for ``hook``, or ""; the arguments are those of `apply`."""
    if hook.platforms and platform not in hook.platforms:
        return f"not needed on {platform or 'an unknown platform'}"
    if hook.layers and out_of_tree:
        return "the platform plugin brings its own LoRA layers"
    if hook.platforms and out_of_tree:
        return "the platform plugin brings its own kernels"
    return ""


@dataclass
class _Checker:
    """The circumstances of one `apply`; the arguments are explained there."""

    version: str
    platform: str
    hashes: Mapping[str, Iterable[str]] | None
    out_of_tree: bool
    allow_unverified: bool
    unverified: list[str]
    left_out: frozenset[str]

    def not_needed(self, hook: Hook) -> str:
        """Why the platform or the user has no use for ``hook``, or ""."""
        if hook.feature in self.left_out:
            return "turned off by VLLM_MOE_LORA"
        return not_needed(hook, self.platform, self.out_of_tree)

    def spots(self, hook: Hook) -> list[_Spot]:
        """The names to rebind, none where that is done already. Raises HookError."""
        if not hook.made_for(self.version):
            self._doubt(f"vLLM {self.version} is outside {hook.releases}")
        spot = _Spot.find(hook.target)
        if spot.is_ours():
            return []
        current = spot.get()
        if hook.hashed and self.hashes is not None:
            self._compare(hook.target, current, set(self.hashes.get(hook.target, ())))
        spots = [spot]
        for name in hook.also:
            try:
                alias = _Spot.find(name)
            except HookError:
                continue  # the release does not import the name there
            if alias.get() is not current:
                raise HookError(f"{name} is not {hook.target}: something else replaced it")
            spots.append(alias)
        return spots

    def _compare(self, target: str, current: Any, known: set[str]) -> None:
        try:
            found = digest(source_text(current))
        except (OSError, TypeError) as error:
            found = f"none, {error}"
        if found not in known:
            expected = " or ".join(sorted(known)) or "none recorded"
            self._doubt(
                f"the source of {target} is not one this version was written against "
                f"(hash {found}, expected {expected} for vLLM {self.version})"
            )

    def _doubt(self, text: str) -> None:
        if not self.allow_unverified:
            raise HookError(text)
        if text not in self.unverified:
            self.unverified.append(text)


def apply(
    hooks: Iterable[Hook],
    *,
    version: str,
    platform: str,
    hashes: Mapping[str, Iterable[str]] | None,
    out_of_tree: bool = False,
    allow_unverified: bool = False,
    left_out: Iterable[str] = (),
) -> Status:
    """Check every hook, then apply the features whose hooks all fit.

    Args:
        hooks: the hooks; two for one target and platform are a programming error.
        version: release of vLLM without local part, "0.32.0".
        platform: vLLM's device type, "cpu", "cuda", ...
        hashes: target -> accepted `digest`s of its source; None skips the check.
        out_of_tree: the platform brings its own LoRA layers and kernels: leave out features with
            hooks into those.
        allow_unverified: a release outside a hook's range, or a source of another hash, is only
            noted in `Status.unverified`. A target that does not exist still keeps its feature off.
        left_out: features that the user does not want.

    Returns:
        Each feature's state. Applying again changes nothing and answers the same.

    Raises:
        ValueError: two hooks for one target and platform; ``left_out`` names a feature that no
            hook has.
    """
    hooks, status, without = list(hooks), Status(), frozenset(left_out)
    if unknown := without - {hook.feature for hook in hooks}:
        names = ", ".join(sorted({hook.feature for hook in hooks}))
        raise ValueError(f"no feature {', '.join(sorted(unknown))}; there are {names}")
    check = _Checker(
        version, platform, hashes, out_of_tree, allow_unverified, status.unverified, without
    )
    targets: dict[str, list[Hook]] = {}
    plans: dict[str, list[tuple[Hook, list[_Spot]]]] = {}
    for hook in hooks:
        for other in targets.setdefault(hook.target, []):
            if other.shares_platform(hook):
                raise ValueError(f"two hooks for {hook.target}")
        targets[hook.target].append(hook)
        if status.features.setdefault(hook.feature, "on") != "on":
            continue
        if why := check.not_needed(hook):
            status.features[hook.feature] = why
            status.not_needed.add(hook.feature)
            continue
        try:
            plans.setdefault(hook.feature, []).append((hook, check.spots(hook)))
        except HookError as error:
            status.features[hook.feature] = str(error)
    for feature in status.on:
        try:
            _install(plans[feature])
        except HookError as error:
            status.features[feature] = str(error)
    return status


def _install(plan: list[tuple[Hook, list[_Spot]]]) -> None:
    """Rebind all names of one feature, or none. Raises HookError."""
    ready: list[tuple[_Spot, Any]] = []
    for hook, spots in plan:
        if not spots:
            continue
        original = spots[0].get()
        try:
            replacement = hook.make(original)
        except Exception as error:
            text = f"the replacement of {hook.target} cannot be made: {error!r}"
            raise HookError(text) from error
        if replacement is original:
            continue
        with contextlib.suppress(AttributeError, TypeError):  # plain data takes no mark
            setattr(_function(replacement), MARK, hook.target)
        ready += [(spot, spot.fitting(replacement, hook.target)) for spot in spots]
    done: list[_Spot] = []
    try:
        for spot, value in ready:
            spot.put(value)
            done.append(spot)
    except Exception as error:
        for spot in reversed(done):
            spot.restore()
        raise HookError(f"{spot.owner}.{spot.name} cannot be set: {error}") from error
    _applied.extend(done)


def strangers() -> dict[str, str]:
    """Names that we replaced and somebody has replaced again since -> the module that did."""
    found = {}
    for spot in _applied:
        now = _function(inspect.getattr_static(spot.owner, spot.name))
        if not hasattr(now, MARK):
            owner = getattr(spot.owner, "__qualname__", getattr(spot.owner, "__name__", "?"))
            found[f"{owner}.{spot.name}"] = str(getattr(now, "__module__", "?"))
    return found


def revert() -> int:
    """Undo everything `apply` did in this process; returns how many names were put back."""
    count = len(_applied)
    while _applied:
        _applied.pop().restore()
    return count
