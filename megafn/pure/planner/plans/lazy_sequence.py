"""A sequence whose items are built when they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

from attrs import frozen

Item = TypeVar("Item")


@frozen(kw_only=True, repr=False)
class LazySequence(Sequence[Item]):
    """As a tuple of `build(context, seed)` for each seed.

    A ranking has tens of thousands of plans, of which a few are read.

    >>> powers = LazySequence(build=pow, seeds=(2, 3), context=3)
    >>> powers[1], len(powers), list(powers[:1])
    (27, 2, [9])
    """

    build: Callable[[Any, Any], Item]
    # What all items have in common.
    context: Any
    seeds: tuple[Any, ...]
    # Said of an index, if there is no item at all.
    if_empty: str = "there are no items"

    def __len__(self) -> int:
        return len(self.seeds)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> LazySequence[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | LazySequence[Item]:
        if isinstance(index, slice):
            return LazySequence(
                build=self.build,
                context=self.context,
                seeds=self.seeds[index],
                if_empty=self.if_empty,
            )
        if not self.seeds:
            raise IndexError(self.if_empty)
        return self.build(self.context, self.seeds[index])

    def __repr__(self) -> str:
        return f"<{len(self)} items, built when read>"
