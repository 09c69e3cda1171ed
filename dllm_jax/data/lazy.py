"""Sequences whose items are made when they are asked for, and not held."""

from collections.abc import Sequence
from typing import Generic, TypeVar, overload

T = TypeVar("T")


class Lazy(Sequence[T], Generic[T]):
    """A sequence of which a subclass says how long it is and what stands at a place."""

    def item(self, place: int) -> T:
        """Makes the item at a place, which counts from 0."""
        raise NotImplementedError

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        places = range(len(self))[place]
        return self.item(places) if isinstance(places, int) else [self.item(each) for each in places]
