"""Replaces functions of vLLM at run time, and puts them back.

A hook is data. The record `Hook` says which function of vLLM is replaced, by what, in which
releases, and why. `apply` takes a list of hooks. It first looks up and checks all of them, and only
then changes anything. The hooks of one feature are applied together: if one of them does not fit
the installed vLLM, the whole feature stays off. `revert` undoes everything that `apply` did.

Importing this module loads only the standard library. `packaging`, which vLLM needs anyway, is
imported when hooks are applied.
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

MARK = "__vllm_moe_lora__"  # attribute that every replacement has; its value is the target
_MISSING = object()


def contains(releases: str, release: str) -> bool:
    """Return whether a PEP 440 specifier contains ``release`` (such as "0.32.0")."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(releases).contains(release, prereleases=True)


@dataclass(frozen=True)
class Hook:
    """One function, property, class or constant of vLLM that the plugin replaces.

    Attributes:
        feature: the name of the fix that the hook belongs to. The hooks of a feature are applied
            all or none.
        target: what is replaced: "package.module:function" or "package.module:Class.method". It may
            also be a property, a class or, with ``hashed=False``, a constant.
        make: gets the original and returns the replacement, or the original if nothing has to be
            replaced. The original is what ``getattr(owner, name)`` gives: a plain function for a
            method or a static method, a bound method for a class method, a property. The
            replacement of a class method must be a ``classmethod`` object.
        releases: PEP 440 specifier of the vLLM releases it was written for: ">=0.13,<0.34".
        why: what goes wrong in vLLM without the hook.
        upstream: link to the issue or the change in vLLM; "" if there is none.
        until: the event after which the hook can be deleted.
        also: further targets that are the same object, because a module copied the name with
            ``from x import f``. They are replaced, too.
        hashed: whether the original's source must have a hash recorded in supported.toml. False
            for a constant, which has no source.
        platforms: the device types the hook is for ("cpu", "cuda", "rocm", ...); empty means all.
            Out-of-tree platforms never get such a hook, because they have their own kernels.
        layers: whether the hook changes vLLM's LoRA layer classes. Out-of-tree platforms have
            their own, so they do not get it.
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
        """Return whether `releases` contains ``release`` (such as "0.32.0")."""
        return contains(self.releases, release)

    def shares_platform(self, other: Hook) -> bool:
        """Return whether some platform gets both hooks."""
        return not (self.platforms and other.platforms) or not {*self.platforms}.isdisjoint(
            other.platforms
        )


@dataclass
class Status:
    """The result of `apply`.

    Attributes:
        features: feature -> "on", or the reason why it is off.
        not_needed: the features that are off because of the platform or the user's choice.
        unverified: sentences about hooks that do not fit this vLLM, but were applied because the
            caller set ``allow_unverified``.
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
        """The features that are off, but are needed here -> the reason."""
        return {name: why for name, why in self.off.items() if name not in self.not_needed}


class HookError(Exception):
    """A hook does not fit the installed vLLM. The text says which hook and why."""


@dataclass
class _Binding:
    """An attribute of a module or a class that a hook replaces."""

    owner: Any  # the module or class
    name: str
    original: Any  # what ``vars(owner)`` has under this name; _MISSING if it is inherited

    @classmethod
    def find(cls, target: str) -> _Binding:
        """Import the module of ``target`` and find the attribute. Raises HookError."""
        module, _, path = target.partition(":")
        try:
            owner: Any = importlib.import_module(module)
        except Exception as error:  # a broken extension may raise anything while it is imported
            raise HookError(
                f"{target}: importing {module} raised {type(error).__name__}: {error}"
            ) from error
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent, None)
        if not hasattr(owner, name):
            raise HookError(f"{target} does not exist in the installed vLLM")
        return cls(owner, name, vars(owner).get(name, _MISSING))

    def get(self) -> Any:
        return getattr(self.owner, self.name)

    def adapt(self, value: Any, target: str) -> Any:
        """Return ``value`` in the form to store: a static method's is wrapped in ``staticmethod``.

        Raises:
            HookError: the original is a class method or a property, and ``value`` is not.
        """
        original = inspect.getattr_static(self.owner, self.name)
        if isinstance(original, staticmethod) and not isinstance(value, staticmethod):
            return staticmethod(value)
        if isinstance(original, classmethod | property) and not isinstance(value, type(original)):
            raise HookError(
                f"{target} is a {type(original).__name__}, but its replacement is a "
                f"{type(value).__name__}"
            )
        return value

    def put(self, value: Any) -> None:
        setattr(self.owner, self.name, value)

    def restore(self) -> None:
        if self.original is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)

    def is_hooked(self) -> bool:
        """Return whether a hook is applied here; other code may have wrapped it since."""
        return hasattr(_function(self.get()), MARK) or any(
            one.owner is self.owner and one.name == self.name for one in _applied
        )


_applied: list[_Binding] = []  # what `apply` replaced in this process, in order


def _function(thing: Any) -> Any:
    """Return the function inside a property, classmethod or staticmethod, or else ``thing``."""
    if isinstance(thing, property):
        return thing.fget
    return thing.__func__ if isinstance(thing, classmethod | staticmethod) else thing


def source_text(thing: Any) -> str:
    """Return the dedented source of a function, property or class.

    `sources.target_text` gives the same text for a file that is not imported.

    Raises:
        OSError: the source file cannot be read.
        TypeError: ``thing`` has no source, as it is built in or a constant.
    """
    text = inspect.getsource(inspect.unwrap(_function(thing)))
    return textwrap.dedent(text).rstrip() + "\n"


def digest(text: str) -> str:
    """Return the first 16 hex digits of the SHA-256 of a source text, as in supported.toml."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def not_needed(hook: Hook, platform: str, out_of_tree: bool) -> str:
    """Return why this platform (see `apply`) does not need ``hook``; "" if it does."""
    if hook.platforms and platform not in hook.platforms:
        return f"not needed on {platform or 'an unknown platform'}"
    if hook.layers and out_of_tree:
        return "the platform plugin brings its own LoRA layers"
    if hook.platforms and out_of_tree:
        return "the platform plugin brings its own kernels"
    return ""


@dataclass
class _Checker:
    """Checks single hooks against the installed vLLM. The fields are explained in `apply`."""

    version: str
    platform: str
    hashes: Mapping[str, Iterable[str]] | None
    out_of_tree: bool
    allow_unverified: bool
    unverified: list[str]
    disabled: frozenset[str]

    def not_needed(self, hook: Hook) -> str:
        """Return why the platform or the user does not need ``hook``; "" if it is needed."""
        if hook.feature in self.disabled:
            return "turned off by VLLM_MOE_LORA"
        return not_needed(hook, self.platform, self.out_of_tree)

    def bindings(self, hook: Hook) -> list[_Binding]:
        """Return the attributes that ``hook`` replaces, if it is not applied. Raises HookError."""
        if not hook.made_for(self.version):
            self._mismatch(
                f"vLLM {self.version} is outside {hook.releases}, the releases of its hooks"
            )
        binding = _Binding.find(hook.target)
        if binding.is_hooked():
            return []
        current = binding.get()
        if hook.hashed and self.hashes is not None:
            self._check_hash(hook.target, current, set(self.hashes.get(hook.target, ())))
        bindings = [binding]
        for name in hook.also:
            try:
                alias = _Binding.find(name)
            except HookError:
                continue  # this release does not import the name there
            if alias.get() is not current:
                raise HookError(
                    f"{name} should be the same object as {hook.target}, but other code replaced it"
                )
            bindings.append(alias)
        return bindings

    def _check_hash(self, target: str, current: Any, known: set[str]) -> None:
        try:
            found = digest(source_text(current))
        except (OSError, TypeError) as error:
            found = f"none, {error}"
        if found not in known:
            expected = " or ".join(sorted(known)) or "none recorded"
            self._mismatch(
                f"the source of {target} is not one this version was written for "
                f"(hash {found}, expected {expected} for vLLM {self.version})"
            )

    def _mismatch(self, text: str) -> None:
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
    disabled: Iterable[str] = (),
) -> Status:
    """Check every hook, then apply the features of which every hook fits.

    Calling it again with the same arguments changes nothing and returns the same status.

    Args:
        hooks: the hooks. No two may have the same target and a platform in common.
        version: the release of vLLM without a local part, such as "0.32.0".
        platform: vLLM's device type: "cpu", "cuda", ...
        hashes: target -> the accepted `digest`s of its source. None skips this check.
        out_of_tree: whether the platform comes from outside of vLLM. Such a platform brings its own
            LoRA layers and kernels, so features with hooks into those are left out.
        allow_unverified: whether to apply a hook although the release is outside its range or its
            target's source has an unknown hash. `Status.unverified` then says so. A target that
            does not exist still keeps its feature off.
        disabled: the features that the user turned off.

    Returns:
        The state of each feature.

    Raises:
        ValueError: two hooks have the same target and a platform in common, or ``disabled`` names
            a feature that no hook has.
    """
    hooks, status, off = list(hooks), Status(), frozenset(disabled)
    if unknown := off - {hook.feature for hook in hooks}:
        names = ", ".join(sorted({hook.feature for hook in hooks}))
        raise ValueError(
            f"VLLM_MOE_LORA: there is no feature {', '.join(sorted(unknown))}. "
            f"On vLLM {version} there are: {names}"
        )
    check = _Checker(
        version, platform, hashes, out_of_tree, allow_unverified, status.unverified, off
    )
    targets: dict[str, list[Hook]] = {}
    plans: dict[str, list[tuple[Hook, list[_Binding]]]] = {}
    for hook in hooks:
        for other in targets.setdefault(hook.target, []):
            if other.shares_platform(hook):
                raise ValueError(f"two hooks replace {hook.target} on the same platform")
        targets[hook.target].append(hook)
        if status.features.setdefault(hook.feature, "on") != "on":
            continue
        if why := check.not_needed(hook):
            status.features[hook.feature] = why
            status.not_needed.add(hook.feature)
            continue
        try:
            plans.setdefault(hook.feature, []).append((hook, check.bindings(hook)))
        except HookError as error:
            status.features[hook.feature] = str(error)
    for feature in status.on:
        try:
            _install(plans[feature])
        except HookError as error:
            status.features[feature] = str(error)
    return status


def _install(plan: list[tuple[Hook, list[_Binding]]]) -> None:
    """Replace all attributes of one feature, or none. Raises HookError."""
    ready: list[tuple[_Binding, Any]] = []
    for hook, bindings in plan:
        if not bindings:
            continue
        original = bindings[0].get()
        try:
            replacement = hook.make(original)
        except Exception as error:
            text = f"the hook of {hook.target} failed to make its replacement: {error!r}"
            raise HookError(text) from error
        if replacement is original:
            continue
        with contextlib.suppress(AttributeError, TypeError):  # a constant takes no attribute
            setattr(_function(replacement), MARK, hook.target)
        ready += [(binding, binding.adapt(replacement, hook.target)) for binding in bindings]
    done: list[_Binding] = []
    try:
        for binding, value in ready:
            binding.put(value)
            done.append(binding)
    except Exception as error:
        for one in reversed(done):
            one.restore()
        raise HookError(f"{binding.owner}.{binding.name} cannot be set: {error}") from error
    _applied.extend(done)


def replaced_by_others() -> dict[str, str]:
    """Return the names that other code replaced after `apply` -> that code's module."""
    found = {}
    for binding in _applied:
        now = _function(inspect.getattr_static(binding.owner, binding.name))
        if not hasattr(now, MARK):
            owner = getattr(binding.owner, "__qualname__", getattr(binding.owner, "__name__", "?"))
            found[f"{owner}.{binding.name}"] = str(getattr(now, "__module__", "?"))
    return found


def revert() -> int:
    """Undo everything that `apply` did in this process.

    Returns:
        How many attributes were put back.
    """
    count = len(_applied)
    while _applied:
        _applied.pop().restore()
    return count
