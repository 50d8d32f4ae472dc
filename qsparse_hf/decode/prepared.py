"""Classes that modules take on for decoding, and give back."""

from functools import cache
from typing import ClassVar, SupportsIndex, cast


class Prepared:
    """Marks the classes of prepared modules; `unprepared` is the class that `restore` gives back."""

    unprepared: ClassVar[type]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        # Pickle finds classes by name, and this one is made at run time.
        _, _, *rest = cast("tuple", super().__reduce_ex__(protocol))
        return _new_prepared, (Prepared.mixin_of(type(self)), self.unprepared), *rest

    @staticmethod
    def mixin_of(prepared: type) -> type:
        return prepared.__bases__[0]


@cache
def prepared_class(mixin: type, unprepared: type) -> type:
    """A class of `mixin` and `unprepared`. Keeps the dense class name: FSDP and `device_map` match layers by it."""
    names = {"unprepared": unprepared, "__module__": unprepared.__module__, "__qualname__": unprepared.__qualname__}
    return type(unprepared.__name__, (mixin, unprepared), names)


def _new_prepared(mixin: type, unprepared: type) -> object:
    made = prepared_class(mixin, unprepared)
    return object.__new__(made)
