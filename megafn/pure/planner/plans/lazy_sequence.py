"""A sequence whose items are built when they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

from attrs import frozen

Item = TypeVar("Item")
Context = TypeVar("Context")
Seed = TypeVar("Seed")


@frozen(kw_only=True, repr=False)
class LazySequence(Sequence[Item], Generic[Item, Context, Seed]):
    """As a tuple of `build(context, seed)` for each seed.

    A ranking has tens of thousands of plans, of which a few are read.

    >>> powers = LazySequence(build=pow, seeds=(2, 3), context=3)
    >>> powers[1], len(powers), list(powers[:1])
    (27, 2, [9])
    """

    build: Callable[[Context, Seed], Item]
    # What all items have in common.
    context: Context
    seeds: tuple[Seed, ...]
    # The message of IndexError if there are no items.
    if_empty: str = "there are no items"

    def __len__(self) -> int:
        return len(self.seeds)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> LazySequence[Item, Context, Seed]: ...

    def __getitem__(self, index: int | slice) -> Item | LazySequence[Item, Context, Seed]:
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
