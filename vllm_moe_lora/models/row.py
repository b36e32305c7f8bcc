"""One row of the table of model classes, and how a class finds its row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..patching import contains


@dataclass(frozen=True)
class Row:
    """What vLLM's LoRA manager must know about a model class, and the class does not say.

    Attributes:
        targets: the class, "package.module:Class"; several where releases or platforms have it in
            several modules.
        releases: PEP 440 specifier of the vLLM releases whose class was read.
        known: "engine" if an engine served adapters on it here and was compared with merged
            weights; "source" if its code was read, and never run.
        extends: upstream's class declares LoRA itself; the row adds to what it says.
        packed: merged module -> its parts, in the order of their rows. It is added to what the
            class says, and replaces what the class says about the same module.
        packed_if: a name in the text model's config -> like ``packed``, where this entry of the
            config is set.
        language_model, connector, tower: the modules of a multimodal class, as its own
            `get_mm_mapping` would name them; "" for a text model. Some have several towers.
        config: where the config is, seen from the model, if the model has no ``config``.
        cast_inputs: ends of names of modules that the model calls in fp32, whatever its dtype. LoRA
            on them is computed in the adapters' dtype.
        whole_batches: the class of modules that give their experts and gates the rows of text and
            those of images apart, so that LoRA takes the adapters of other rows; "" if there is
            none. `repair.whole_batches` changes them.
        renamed: parts of such a module -> the name in it that they get. vLLM's manager takes only
            routed experts that are called "experts". `repair.rename` does it.
        ignored: end of a module's name -> why LoRA there would be ignored. An adapter with LoRA on
            it is refused with this reason.
        ignored_if: a name in the text model's config -> like ``ignored``, where it is set.
        ignored_on: a device type ("rocm") -> like ``ignored``, on such a device only.
        not_sharded: ends of names of modules whose LoRA is not known to be right under tensor
            parallelism. Refused there.
        refused: why no adapter can be served on the class; "" if adapters can.
        upstream: link to the issue or the change in vLLM; "" if there is none.
        until: the event after which the row can be deleted.
    """

    targets: tuple[str, ...]
    releases: str
    known: str
    extends: bool = False
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    packed_if: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    language_model: str = ""
    connector: str = ""
    tower: str | tuple[str, ...] = ""
    config: str = ""
    cast_inputs: tuple[str, ...] = ()
    whole_batches: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    ignored_if: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    ignored_on: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    not_sharded: tuple[str, ...] = ()
    refused: str = ""
    upstream: str = ""
    until: str = "upstream's class declares LoRA with this data"

    @property
    def name(self) -> str:
        """The name of the class, or of the first one."""
        return self.names[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its classes, each once."""
        return tuple(dict.fromkeys(target.partition(":")[2] for target in self.targets))

    def made_for(self, release: str) -> bool:
        """Return whether `releases` contains ``release`` (such as "0.32.0")."""
        return contains(self.releases, release)


def target_of(kind: type[object]) -> str:
    """How `Row.targets` names a class."""
    return f"{kind.__module__}:{kind.__qualname__}"


def ends_of(name: str) -> Iterator[str]:
    """The ends of a module's dotted name, from the whole name to its last word."""
    words = name.split(".")
    return (".".join(words[i:]) for i in range(len(words)))
