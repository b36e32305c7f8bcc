"""The patches of a release: what each adds to which files."""

from __future__ import annotations

import ast
import functools
import linecache
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_moe_lora import supported
from vllm_moe_lora.hooks import all_hooks
from vllm_moe_lora.patching import Hook
from vllm_moe_lora.patchset.closure import BASE, PACKAGE, closure, needed
from vllm_moe_lora.patchset.weave import Seam, WeaveError, unweave, weave
from vllm_moe_lora.sources import Found, Reader, find, module_file

HOME = "vllm/lora/moe_lora"
FIRST = "moe-lora-seams"
INIT = '''"""LoRA on Mixture-of-Experts models: seams for the files of vLLM, and what they call."""

from .seams import seam

__all__ = ["seam"]

RELEASE = "{release}"
'''


class SeriesError(Exception):
    """A release for which no patches can be made; the text says which hook and why."""


@dataclass
class Patch:
    """One change.

    Attributes:
        name: of the file, without ".patch"; the feature's, but for the first.
        hooks: that it applies.
        files: path below the tree -> its text before (None: it is new) and after.
    """

    name: str
    hooks: list[Hook] = field(default_factory=list)
    files: dict[str, tuple[str | None, str]] = field(default_factory=dict)


def pristine(file: Path) -> str:
    """A file's text as upstream has it, whether seams were put in or not."""
    # Not read_text: the end of a line is to stay what it is.
    return unweave(file.read_bytes().decode())


def hooks_of(release: str) -> list[Hook]:
    """What the plugin applies on ``release``, a known one, on all platforms together."""
    return supported.made_for(release, all_hooks())


def series(tree: Path, release: str, reader: Reader = pristine) -> list[Patch]:
    """The patches that make the plugin's changes for ``release``, in their order.

    Args:
        tree: the folder that holds ``vllm/``.
        release: one that supported.toml has a row for.
        reader: gives a file's text as upstream has it.

    Raises:
        SeriesError: a hook cannot be a seam there.
    """
    first = Patch(FIRST)
    shipped = closure(BASE)
    first.files = {f"{HOME}/__init__.py": (None, INIT.format(release=release)), **_payload(shipped)}
    patches = [first]
    seams: dict[str, list[Seam]] = {}
    features: dict[str, list[Hook]] = {}
    for hook in hooks_of(release):
        features.setdefault(hook.feature, []).append(hook)
    for feature in sorted(features):
        patch = Patch(feature)
        touched: dict[str, list[Seam]] = {}
        for hook in sorted(features[feature], key=lambda one: one.target):
            try:
                if place := _place(tree, hook, reader):
                    path, seam = place
                    touched.setdefault(path, []).append(seam)
                    patch.hooks.append(hook)
            except (LookupError, SyntaxError, UnicodeError) as error:
                raise SeriesError(f"{hook.target}: {error}") from error
        new = needed(patch.hooks) - shipped
        shipped |= new
        patch.files = _payload(new)
        for path in sorted(touched):
            text, before = reader(tree / path), seams.get(path, [])
            seams[path] = [*before, *touched[path]]
            try:
                patch.files[path] = (weave(text, before), weave(text, seams[path]))
            except WeaveError as error:
                raise SeriesError(f"{path}: {error}") from error
        if patch.hooks:
            patches.append(patch)
    return patches


def _payload(paths: Iterable[str]) -> dict[str, tuple[str | None, str]]:
    return {
        f"{HOME}/{path}": (None, (PACKAGE / path).read_bytes().decode()) for path in sorted(paths)
    }


def _place(tree: Path, hook: Hook, reader: Reader) -> tuple[str, Seam] | None:
    """File and seam of a hook, None where it steps aside. Raises LookupError, SeriesError."""
    module, _, name = hook.target.partition(":")
    found = find(tree, hook.target, reader)
    if not hook.hashed and found.module == module:
        raise SeriesError(f"{hook.target} is plain data, which no decorator can stand above")
    if hook.hashed and _steps_aside(hook, found, reader):
        return None
    if found.inherited:
        return _override(tree, hook, found, reader)
    if found.module == module:
        return _below(tree, found.file), Seam(hook.feature, name)
    if "." in name:
        # A class that the module imports: it is one object, so its home will do.
        return _below(tree, found.file), Seam(hook.feature, name, module=module)
    if found.node.name != name or hook.also:
        raise SeriesError(f"{hook.target} is imported there under several names: hook its home")
    # Only the name of this module is replaced, as the plugin does.
    file = module_file(tree, module)
    return _below(tree, file), Seam(hook.feature, name, "name", module)


def _override(tree: Path, hook: Hook, found: Found, reader: Reader) -> tuple[str, Seam]:
    module, _, name = hook.target.partition(":")
    owner = find(tree, f"{module}:{name.rpartition('.')[0]}", reader)
    marks = [ast.unparse(one) for one in getattr(found.node, "decorator_list", ["?"])]
    kind = {(): "override", ("property",): "property"}.get(tuple(marks))
    if kind is None or type(found.node).__name__ != "FunctionDef" or owner.module != module:
        raise SeriesError(
            f"{hook.target} is inherited from {found.module}, and no plain method or property"
        )
    return _below(tree, owner.file), Seam(hook.feature, name, kind)


def _below(tree: Path, file: Path) -> str:
    return file.relative_to(tree).as_posix()


def _steps_aside(hook: Hook, found: Found, reader: Reader) -> bool:
    """Whether `make` gives back the original: a seam would do nothing.

    It is asked with a function of the same source that cannot be called to any use; nothing of
    the tree is run.
    """
    original: Any = _function(reader(found.file), str(found.file), found.line)
    for mark in getattr(found.node, "decorator_list", ()):
        kind = getattr(mark, "id", "")
        if kind == "property":
            original = property(original)
        elif kind == "classmethod":
            original = types.MethodType(original, object)
    try:
        return hook.make(original) is original
    except Exception:  # it wants more of the original than there is
        return False


@functools.lru_cache(maxsize=512)
def _function(text: str, name: str, line: int) -> Any:
    """The function that begins in ``line``, without the module around it."""
    name = f"<{name} without seams>"
    # Where `inspect.getsource` looks.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    todo = [compile(text, name, "exec", dont_inherit=True)]
    while todo:
        code = todo.pop()
        if code.co_firstlineno == line and code.co_name != "<module>":
            cells = tuple(types.CellType() for _ in code.co_freevars)
            return types.FunctionType(code, {}, code.co_name, None, cells)
        todo += [one for one in code.co_consts if isinstance(one, types.CodeType)]
    return None
