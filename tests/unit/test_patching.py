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
            import functools
            import typing


            def cached(function):
                @functools.wraps(function)
                def wrapper(*args):
                    return function(*args)

                return wrapper


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

                @property
                def width(self):
                    return 3

                @width.setter
                def width(self, value):
                    raise AttributeError

                @typing.overload
                def twice(self, x: int) -> int: ...
                @typing.overload
                def twice(self, x: str) -> str: ...
                def twice(self, x):
                    return 2 * x

                @cached
                def wrapped(self):
                    return "wrapped"  # a comment ends the body
                    # like this one


            LIST = ["a"]
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


def test_a_feature_the_user_does_not_want(victim):
    hooks = [hook("victim.base:free", louder), hook("victim.user:free", louder, feature="g")]
    status = apply(hooks, disabled={"f"})
    assert status.on == ["g"]
    assert not status.refused
    assert importlib.import_module("victim.base").free(1) == 2
    with pytest.raises(ValueError, match=r"there is no feature h\. .*there are: f, g"):
        apply(hooks, disabled={"h", "f"})


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
        "victim.base:Base.width",
        "victim.base:Base.wrapped",
        "victim.base:Base.twice",
        "victim.base:Base",
    ):
        binding = patching._Binding.find(target)
        assert patching.source_text(binding.get()) == target_text(victim, target)


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
    assert "other code replaced it" in status.off["f"]
    assert user.free(1) == "theirs"


def test_two_hooks_on_one_target_are_a_mistake(victim):
    with pytest.raises(ValueError, match="two hooks"):
        apply([hook("victim.base:free", louder), hook("victim.base:free", louder, feature="g")])


def test_two_hooks_on_one_target_are_for_two_platforms(victim):
    """Each platform gets its own, and all of each feature."""
    hooks = [
        hook("victim.base:free", louder, platforms=("cpu",)),
        hook("victim.base:Base.still", louder, feature="g", platforms=("cuda",)),
        hook("victim.base:free", lambda original: lambda x: "g", feature="g", platforms=("cuda",)),
    ]
    base = importlib.import_module("victim.base")
    quiet = base.free(1)
    status = apply(hooks)
    assert status.on == ["f"]
    assert status.not_needed == {"g"}
    assert base.free(1) not in (quiet, "g")
    patching.revert()
    assert apply(hooks, platform="cuda").on == ["g"]
    assert base.free(1) == "g"


def test_out_of_tree_platforms_keep_their_layers_and_kernels(victim):
    """Also one that calls its device as one of vLLM's own platforms does."""
    hooks = [
        hook("victim.base:free", louder, feature="layer", layers=True),
        hook("victim.base:Base.made", louder, feature="kernel", platforms=("cpu",)),
        hook("victim.base:Base.still", louder, feature="loader"),
    ]
    status = apply(hooks, out_of_tree=True)
    assert status.on == ["loader"]
    assert status.not_needed == {"layer", "kernel"}
    assert status.refused == {}


def test_property_is_replaced_and_comes_back(victim):
    base = importlib.import_module("victim.base").Base
    held = vars(base)["width"]
    wide = hook("victim.base:Base.width", lambda o: property(lambda self: 10 * o.fget(self)))
    known = hashes_of(victim, wide.target)
    assert apply([wide], known).on == ["f"]
    assert base().width == 30
    assert apply([wide], known).on == ["f"], "applied twice"
    assert base().width == 30
    patching.revert()
    assert vars(base)["width"] is held


def test_plain_data_needs_no_hash_and_comes_back(victim):
    base = importlib.import_module("victim.base")
    held = base.LIST
    longer = hook("victim.base:LIST", lambda o: [*o, "b"], hashed=False)
    assert apply([longer], {}).on == apply([longer], {}).on == ["f"]
    assert base.LIST == ["a", "b"]
    patching.revert()
    assert base.LIST is held


def test_inherited_static_method_stays_static(victim):
    user = importlib.import_module("victim.user").User
    apply([hook("victim.user:User.still", louder)])
    assert user.still(1) == user().still(1) == ("new", 1)
    patching.revert()
    assert "still" not in vars(user)


def test_class_method_made_into_a_function_is_refused(victim):
    status = apply([hook("victim.base:Base.made", louder)])
    assert "classmethod" in status.off["f"]
    assert importlib.import_module("victim.base").Base.made(1) == ("Base", 1)


def test_a_replacement_that_cannot_be_made_changes_nothing(victim):
    def broken(original):
        raise KeyError("upstream moved it")

    hooks = [
        hook("victim.base:free", louder),
        hook("victim.base:Base.still", broken),
        hook("victim.base:Base.inherited", louder, feature="other"),
    ]
    status = apply(hooks)
    base = importlib.import_module("victim.base")
    assert base.free(1) == 2, "half applied"
    assert "victim.base:Base.still" in status.off["f"]
    assert "upstream moved it" in status.off["f"]
    assert status.on == ["other"]
    assert patching.revert() == 1


def test_a_name_that_cannot_be_set_takes_its_feature_back(victim, monkeypatch):
    put = patching._Binding.put

    def fails_on_still(self, value):
        if self.name == "still":
            raise TypeError("read-only")
        put(self, value)

    monkeypatch.setattr(patching._Binding, "put", fails_on_still)
    status = apply([hook("victim.base:free", louder), hook("victim.base:Base.still", louder)])
    assert importlib.import_module("victim.base").free(1) == 2, "half applied"
    assert "read-only" in status.off["f"]
    assert patching.revert() == 0


def test_a_hook_that_steps_aside_leaves_no_mark(victim):
    base = importlib.import_module("victim.base")
    free = base.free
    assert apply([hook("victim.base:free", lambda original: original)]).on == ["f"]
    assert base.free is free
    assert not hasattr(free, patching.MARK)


def test_a_module_that_cannot_be_imported_keeps_its_feature_off(victim):
    (victim / "victim" / "broken.py").write_text("raise RuntimeError('no such device')\n")
    status = apply([hook("victim.broken:f", louder), hook("victim.base:free", louder, feature="g")])
    assert "victim.broken" in status.off["f"]
    assert "no such device" in status.off["f"]
    assert status.on == ["g"]


def test_what_somebody_wrapped_after_us_counts_as_applied(victim):
    base = importlib.import_module("victim.base")
    hooks = [hook("victim.base:free", louder)]
    known = hashes_of(victim, hooks[0].target)
    apply(hooks, known)
    ours = base.free
    base.free = lambda x: ("theirs", ours(x))
    assert apply(hooks, known).on == ["f"]
    assert base.free(1) == ("theirs", ("new", 2))


def test_the_reason_names_symbol_both_hashes_and_release(victim):
    target = "victim.base:free"
    found = patching.digest(target_text(victim, target))
    why = apply([hook(target, louder)], {target: {"0123456789abcdef"}}, version="7.1").off["f"]
    for word in (target, found, "0123456789abcdef", "7.1"):
        assert word in why


def test_allow_unverified_applies_and_tells(victim):
    target = "victim.base:free"
    one = hook(target, louder, releases=">=2")
    status = apply([one], {target: {"0123456789abcdef"}}, allow_unverified=True)
    assert status.on == ["f"]
    assert importlib.import_module("victim.base").free(1) == ("new", 2)
    assert any(target in text and "0123456789abcdef" in text for text in status.unverified)
    assert any(">=2" in text for text in status.unverified)


def test_allow_unverified_does_not_invent_targets(victim):
    status = apply([hook("victim.base:gone", louder)], {}, allow_unverified=True)
    assert "victim.base:gone" in status.off["f"]


def test_a_release_that_is_no_version_is_outside_every_range(victim):
    assert "dev" in apply([hook("victim.base:free", louder)], version="dev").off["f"]


def test_not_needed_here_is_no_refusal(victim):
    hooks = [
        hook("victim.base:free", louder, platforms=("cuda",)),
        hook("victim.base:Base.still", louder, feature="layer", layers=True),
        hook("victim.base:gone", louder, feature="bad"),
    ]
    status = apply(hooks, out_of_tree=True)
    assert sorted(status.off) == ["bad", "f", "layer"]
    assert list(status.refused) == ["bad"]
