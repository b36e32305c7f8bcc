"""`seams.seam`: what the decorator makes of each kind of thing, and what the plugin then sees."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import sys
import types

import pytest

from vllm_moe_lora import patching, seams
from vllm_moe_lora.patching import MARK, Hook, HookError


@pytest.fixture
def hooks(monkeypatch):
    """A list that stands for all hooks; `hook(name, make)` adds one on this module."""
    found = []
    monkeypatch.setattr(seams, "all_hooks", lambda: found)
    return found


@pytest.fixture
def hook(hooks):
    def add(name, make, feature="fix", module=__name__, **more):
        more = {"releases": ">=1", "why": "w", "upstream": "", "until": "u", **more}
        hooks.append(Hook(feature, f"{module}:{name}", make, **more))
        return hooks[-1]

    return add


@pytest.fixture
def here(monkeypatch):
    """Put a platform in the place of vLLM's."""

    def put(device="cpu", out_of_tree=False):
        module = types.ModuleType("vllm.platforms")
        module.current_platform = types.SimpleNamespace(
            device_type=device, is_out_of_tree=lambda: out_of_tree
        )
        monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.platforms", module)

    return put


def twice(original):
    def replacement(*args, **kwargs):
        return 2 * original(*args, **kwargs)

    return replacement


def local(name):
    """The qualified name that ``name`` has where it is defined inside the calling test."""
    return f"{sys._getframe(1).f_code.co_name}.<locals>.{name}"


def test_function(hook):
    target = hook(local("f"), twice).target

    @seams.seam("fix")
    def f(x):
        return x

    assert f(3) == 6
    assert getattr(f, MARK) == target


@pytest.mark.parametrize(("device", "factor"), [("cpu", 2), ("cuda", 3), ("xpu", 1)])
def test_two_features_on_one_function_are_for_two_platforms(hook, here, device, factor):
    here(device)

    def thrice(original):
        @functools.wraps(original)
        def replacement(x):
            return 3 * original(x)

        return replacement

    hook(local("f"), twice, feature="first", platforms=("cpu",))
    hook(local("f"), thrice, feature="second", platforms=("cuda",))

    @seams.seam("first")
    @seams.seam("second")
    def f(x):
        return x

    assert f(5) == 5 * factor


def test_async_function(hook):
    def make(original):
        async def replacement(x):
            return 2 * await original(x)

        return replacement

    hook(local("f"), make)

    @seams.seam("fix")
    async def f(x):
        return x

    assert asyncio.run(f(3)) == 6


def test_methods_of_every_kind(hook):
    def of_class(original):
        assert original.__self__.__name__ == "C", "bound to the class that defines it"

        def replacement(cls, x):
            return cls.__name__, 2 * original(x)[1]

        return classmethod(replacement)

    def of_property(original):
        return property(lambda self: 2 * original.fget(self))

    hook(local("C.plain"), twice)
    hook(local("C.made"), of_class)
    hook(local("C.still"), twice)
    hook(local("C.seen"), of_property)

    @dataclasses.dataclass
    class C:
        x: int = 1

        @seams.seam("fix")
        def plain(self, y):
            return self.x + y

        @seams.seam("fix")
        @classmethod
        def made(cls, y):
            return cls.__name__, y

        @seams.seam("fix")
        @staticmethod
        def still(y):
            return y

        @seams.seam("fix")
        @property
        def seen(self):
            return self.x

        @seen.setter
        def seen(self, x):
            self.x = x

    class D(C):
        pass

    for owner in (C, D):
        one = owner(2)
        assert one.plain(3) == 10
        assert owner.made(3) == one.made(3) == (owner.__name__, 6)
        assert owner.still(3) == one.still(3) == 6
        assert one.seen == 4
        one.seen = 5
        assert one.seen == 10
    assert isinstance(vars(C)["made"], classmethod)
    assert isinstance(vars(C)["still"], staticmethod)
    for name in ("plain", "made", "still"):
        assert hasattr(getattr(C, name), MARK), name
    assert hasattr(C.seen.fget, MARK)


def test_an_inherited_method_is_replaced_below_only(hook):
    hook(local("Below.f"), twice)

    class Above:
        def f(self, x):
            return x

    class Below(Above):
        @seams.seam("fix")
        def f(self, *args, **kwargs):
            return super().f(*args, **kwargs)

    assert (Above().f(3), Below().f(3)) == (3, 6)


def test_a_class(hook):
    hook(local("C"), lambda original: type("C", (original,), {"more": True}))

    @seams.seam("fix")
    class C:
        pass

    assert C.more
    assert hasattr(C, MARK)


def test_a_name_of_another_module(hook):
    def f(x):
        return x

    target = hook(f.__qualname__, twice, module="some.where").target
    bound = seams.seam("fix", "some.where")(f)
    assert (bound(3), f(3)) == (6, 3)
    assert getattr(bound, MARK) == target
    assert not hasattr(f, MARK)


@pytest.mark.parametrize("kind", [lambda f: f, classmethod, staticmethod, property])
def test_what_steps_aside_is_left(hook, kind):
    hook(local("C.f"), lambda original: original)

    def f(self=None):
        return 1

    f.__qualname__ = local("C.f")
    thing = kind(f)
    owner = type("C", (), {"f": seams.seam("fix")(thing)})
    held = vars(owner)["f"]
    assert type(held) is type(thing)
    assert (held.fget if kind is property else getattr(held, "__func__", held)) is f


def test_unknown_feature_or_target(hook):
    hook(local("f"), twice, feature="other")

    def f():
        pass

    with pytest.raises(HookError, match=r"no hook of feature 'fix' has the target .*f"):
        seams.seam("fix")(f)


@pytest.mark.parametrize(("kind", "name"), [(classmethod, "classmethod"), (property, "property")])
def test_a_replacement_of_another_kind(hook, kind, name):
    def f(self):
        return 1

    hook(f.__qualname__, lambda original: f)
    # Python 3.11 and before wrap what __set_name__ raises.
    with pytest.raises((HookError, RuntimeError)) as error:
        type("C", (), {"f": seams.seam("fix")(kind(f))})
    cause = error.value if isinstance(error.value, HookError) else error.value.__cause__
    assert f"is a {name}, but its replacement is" in str(cause)


@pytest.mark.parametrize(
    ("device", "out_of_tree", "want"),
    [("cpu", False, 6), ("cuda", False, 3), ("cpu", True, 3), ("", False, 3)],
)
def test_platform(hook, here, device, out_of_tree, want):
    """A feature is on where all of its hooks are wanted, as with the plugin."""
    here(device, out_of_tree)
    hook(local("f"), twice, platforms=("cpu",))
    hook("elsewhere", twice, platforms=("cpu",), layers=True)

    @seams.seam("fix")
    def f(x):
        return x

    assert f(3) == want
    assert hasattr(f, MARK), "either way the plugin is to leave it alone"


def test_no_platform_is_asked_for_in_vain(hook, monkeypatch):
    """Asking loads platform plugins; while vLLM is being imported that is no time for it."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    hook(local("f"), twice)
    hook("g", twice, feature="other", platforms=("cpu",))

    @seams.seam("fix")
    def f(x):
        return x

    assert f(3) == 6


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plugin_applies_nothing_twice(hook, hooks, here, device):
    here(device)
    module = types.ModuleType("some_seamed_module")
    for name, more in [("on", {}), ("off", {"platforms": ("cpu",), "feature": "cpu-only"})]:
        hook(name, twice, module=module.__name__, **more)

        def f(x):
            return x

        f.__module__, f.__qualname__ = module.__name__, name
        setattr(module, name, seams.seam(hooks[-1].feature)(f))
    sys.modules[module.__name__] = module
    try:
        held = dict(vars(module))
        # No hash fits the source of these functions: it is not to be asked for.
        status = patching.apply(hooks, version="1", platform=device, hashes={})
        assert dict(vars(module)) == held
        assert not status.refused
        assert status.features["fix"] == "on"
        assert status.features["cpu-only"] == ("on" if device == "cpu" else "not needed on cuda")
        assert patching.revert() == 0
    finally:
        del sys.modules[module.__name__]
