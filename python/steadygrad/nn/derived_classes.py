"""Subclasses made at run time whose instances can be copied and pickled: their bases are what is written down."""

from __future__ import annotations

from collections.abc import Callable
from types import new_class
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

Kind = type[nn.Module]

# A derived class lives as long as its instances, and its key, with the bases in it, no longer than that.
_CLASSES: WeakValueDictionary[tuple[object, ...], Kind] = WeakValueDictionary()
# What stands for a forward that can be found again; it is not written down.
TRANSIENT = "_fusion"


def derived_class(
    name: str,
    bases: tuple[Kind, ...],
    members: Callable[..., dict[str, object]],
    again: Callable[..., Kind],
    finish: Callable[[nn.Module], None] | None = None,
) -> Kind:
    """The subclass of `bases` with these members, the same one for the same arguments.

    Args:
        name: of the class.
        bases: classes that can be imported.
        members: takes the bases; gives what the class has of its own.
        again: a function that can be imported; takes the bases, returns this class.
        finish: called with every instance that was copied or unpickled.
    """
    key = (name, bases, members)
    known = _CLASSES.get(key)
    if known is not None:
        return known

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced = super(derived, self).__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or getattr(reduced[0], "__name__", "") != "__newobj__":
            return reduced
        state = reduced[2]
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key != TRANSIENT}
        return (_new, (again, bases), state, *reduced[3:])

    def __setstate__(self: nn.Module, state: Any) -> None:
        inherited: Any = super(derived, self)
        inherited.__setstate__(state)
        if finish is not None:
            finish(self)

    namespace = {
        "__doc__": bases[0].__doc__,
        "__module__": bases[0].__module__,
        "__reduce_ex__": __reduce_ex__,
        "__setstate__": __setstate__,
        **members(*bases),
    }
    derived: Kind = new_class(name, bases, exec_body=lambda body: body.update(namespace))
    _CLASSES[key] = derived
    return derived


def _new(again: Callable[..., Kind], bases: tuple[Kind, ...]) -> nn.Module:
    kind = again(*bases)
    return kind.__new__(kind)
