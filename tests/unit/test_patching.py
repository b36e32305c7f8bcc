"""Hooks on a package made for the test: verified whole, applied whole, undone exactly."""

from __future__ import annotations

import importlib
import sys
import textwrap

import pytest

from vllm_moe_lora import patching
from vllm_moe_lora.patching import Hook
from vllm_moe_lora.sources import target_text


@pytest.fixture
def victim(tmp_path, monkeypatch):
    """A package with what hooks meet: methods, inheritance, class and static methods, copies."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "base.py").write_text(
        textwrap.dedent(
            '''
            def free(x):
                return x + 1


            class Base:
                def inherited(self):
                    """Text."""
                    return "base"

                @classmethod
                def made(cls, x):
                    return (cls.__name__, x)

                @staticmethod
                def still(x):
                    return x
            '''
        )
    )
    (folder / "user.py").write_text(
        "from victim.base import Base, free\n\n\nclass User(Base):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    patching.revert()
    for name in [n for n in sys.modules if n.split(".")[0] == "victim"]:
        del sys.modules[name]


def hook(target, make, feature="f", **more):
    given = {"releases": ">=1", "why": "w", "upstream": "", "until": "u", **more}
    return Hook(feature=feature, target=target, make=make, **given)


def louder(original):
    return lambda *args: ("new", original(*args))


def hashes_of(tree, *targets):
    return {t: {patching.digest(target_text(tree, t))} for t in targets}


def apply(hooks, hashes=None, version="1.0", platform="cpu", **more):
    return patching.apply(hooks, version=version, platform=platform, hashes=hashes, **more)


def test_function_and_its_copies(victim):
    status = apply([hook("victim.base:free", louder, also=("victim.user:free",))])
    base, user = (importlib.import_module(f"victim.{n}") for n in ("base", "user"))
    assert status.on == ["f"]
    assert base.free(1) == user.free(1) == ("new", 2)
    assert patching.revert() == 2
    assert base.free(1) == user.free(1) == 2


def test_inherited_method_leaves_no_trace(victim):
    user = importlib.import_module("victim.user").User
    apply([hook("victim.user:User.inherited", louder)])
    assert user().inherited() == ("new", "base")
    assert importlib.import_module("victim.base").Base().inherited() == "base"
    patching.revert()
    assert "inherited" not in vars(user)
    assert user().inherited() == "base"


def test_class_and_static_methods_come_back_as_they_were(victim):
    base = importlib.import_module("victim.base").Base
    before = dict(vars(base))
    apply(
        [
            hook("victim.base:Base.made", lambda o: classmethod(lambda cls, x: ("new", o(x)))),
            hook("victim.base:Base.still", louder),
        ]
    )
    assert base.made(1) == base().made(1) == ("new", ("Base", 1))
    assert base.still(1) == base().still(1) == ("new", 1)
    patching.revert()
    assert all(vars(base)[name] is before[name] for name in ("made", "still"))


def test_applying_twice_is_applying_once(victim):
    hooks = [hook("victim.base:free", louder)]
    first, second = apply(hooks), apply(hooks)
    assert first.features == second.features == {"f": "on"}
    assert importlib.import_module("victim.base").free(1) == ("new", 2)
    assert patching.revert() == 1


def test_hash_from_the_tree_is_the_hash_of_the_import(victim):
    for target in (
        "victim.base:free",
        "victim.base:Base.made",
        "victim.base:Base.still",
        "victim.user:User.inherited",
        "victim.user:free",
    ):
        spot = patching._Spot.find(target)
        assert patching.source_text(spot.get()) == target_text(victim, target)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (hook("victim.base:free", louder), "victim.base:free"),  # not among the known hashes
        (hook("victim.base:gone", louder), "victim.base:gone"),
        (hook("victim.nowhere:gone", louder), "victim.nowhere"),
        (hook("victim.base:free", louder, releases=">=2"), ">=2"),
        (hook("victim.base:free", louder, platforms=("cuda",)), "not needed on cpu"),
    ],
)
def test_one_hook_that_does_not_fit_keeps_its_feature_off(victim, wrong, word):
    good = hook("victim.base:Base.still", louder)
    other = hook("victim.base:Base.inherited", louder, feature="other")
    hashes = hashes_of(victim, good.target, other.target)
    status = apply([good, wrong, other], hashes)
    assert status.on == ["other"]
    assert word in status.off["f"]
    base = importlib.import_module("victim.base")
    assert base.Base.still(1) == 1
    assert base.free(1) == 2
    assert base.Base().inherited() == ("new", "base")


def test_changed_source_is_noticed(victim):
    target = "victim.base:free"
    known = hashes_of(victim, target)
    file = victim / "victim" / "base.py"
    file.write_text(file.read_text().replace("x + 1", "x + 2"))
    status = apply([hook(target, louder)], known)
    assert target in status.off["f"]
    assert importlib.import_module("victim.base").free(1) == 3


def test_a_copy_that_somebody_replaced_is_left_alone(victim):
    user = importlib.import_module("victim.user")
    user.free = lambda x: "theirs"
    status = apply([hook("victim.base:free", louder, also=("victim.user:free",))])
    assert "something else replaced it" in status.off["f"]
    assert user.free(1) == "theirs"


def test_two_hooks_on_one_target_are_a_mistake(victim):
    with pytest.raises(ValueError, match="two hooks"):
        apply([hook("victim.base:free", louder), hook("victim.base:free", louder, feature="g")])


def test_out_of_tree_platforms_keep_their_layers(victim):
    hooks = [
        hook("victim.base:free", louder, feature="layer", layers=True),
        hook("victim.base:Base.still", louder, feature="loader"),
    ]
    assert apply(hooks, out_of_tree=True).on == ["loader"]
