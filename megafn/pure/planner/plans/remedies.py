"""What would make a layout fit that needs too much memory, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from attrs import frozen

from megafn.pure.config.problems import Problem
from megafn.pure.config.records import RecomputeConfig
from megafn.pure.planner.machine import Machine
from megafn.pure.planner.plans.table import in_unit, layout_in_words, usable_in_words
from megafn.pure.planner.records import Layout
from megafn.pure.planner.search.cost_model import CostModel, devices_that_fit, leanest

# What may be changed of a layout, a value for each of _ASPECTS.
Values = tuple[Any, ...]

# A change that saves a smaller share of the memory is not worth its words.
_WORTHWHILE = 0.02


# --------------------------------------------------------------------- changes and their words


@frozen
class _Aspect:
    """One thing to change: how it is read, and a change from one value to another in words."""

    read: Callable[[Layout], Any]
    phrase: Callable[[Any, Any], str]


def _degree(field: str) -> Callable[[int, int], str]:
    return lambda before, after: f"{'raise' if after > before else 'lower'} {field} to {after}"


def _switch(field: str) -> Callable[[bool, bool], str]:
    return lambda before, after: f"set {field}" if after else f"leave {field} out"


def _recomputation(before: RecomputeConfig, after: RecomputeConfig) -> str:
    if after.granularity == "selective":
        return "recompute core attention"
    if after.granularity is None:
        return "recompute nothing"
    if after.method == "block":
        return f"recompute {after.num_layers} layers of each chunk"
    return "recompute whole layers"


# Those that cost the least time first.
_ASPECTS = (
    _Aspect(lambda layout: layout.pp, _degree("pp")),
    _Aspect(lambda layout: layout.tp, _degree("tp")),
    _Aspect(lambda layout: layout.use_distributed_optimizer, _switch("use_distributed_optimizer")),
    _Aspect(lambda layout: layout.sequence_parallel, _switch("sequence_parallel")),
    _Aspect(lambda layout: layout.micro_batch_size, _degree("micro_batch_size")),
    _Aspect(lambda layout: layout.recompute, _recomputation),
    _Aspect(lambda layout: layout.cp, _degree("cp")),
    _Aspect(lambda layout: layout.vpp, _degree("vpp")),
)


def _values_of(layout: Layout) -> Values:
    return tuple(aspect.read(layout) for aspect in _ASPECTS)


def joined(phrases: Sequence[str], conjunction: str) -> str:
    """Phrases as one, a verb that repeats said once.

    >>> joined(["raise pp to 2", "raise tp to 4", "recompute"], "or")
    'raise pp to 2 or tp to 4, or recompute'
    >>> joined(["raise pp"], "and"), joined([], "and")
    ('raise pp', '')
    """
    objects: dict[str, list[str]] = {}
    for phrase in phrases:
        verb, _, rest = phrase.partition(" ")
        objects.setdefault(verb, []).append(rest)
    parts = [f"{verb} {_listed(rests, conjunction)}".rstrip() for verb, rests in objects.items()]
    if len(parts) <= 1:
        return "".join(parts)
    return f"{', '.join(parts[:-1])}, {conjunction} {parts[-1]}"


def _listed(words: Sequence[str], conjunction: str) -> str:
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


# --------------------------------------------------------------------- the layouts around one


@frozen(kw_only=True)
class Neighbours:
    """The layouts of a config, found by what they have changed."""

    costs: CostModel
    layouts: Mapping[Values, Layout]
    # For each aspect all its values, in the order of the search.
    choices: tuple[tuple[Any, ...], ...]

    def needed(self, values: Values) -> float:
        """Bytes that a layout needs on its fullest stage."""
        return self.costs.needed(self.layouts[values])

    def seconds(self, values: Values) -> float:
        """Of a step."""
        return self.costs.seconds(self.layouts[values])

    def fits(self, values: Values) -> bool:
        return self.costs.fits(self.layouts[values])


def neighbours_among(layouts: Sequence[Layout], costs: CostModel) -> Neighbours:
    by_values: dict[Values, Layout] = {}
    for layout in layouts:
        # Of layouts that differ in their outer stages only, the first.
        by_values.setdefault(_values_of(layout), layout)
    choices = (tuple(dict.fromkeys(column)) for column in zip(*by_values, strict=True))
    return Neighbours(
        costs=costs,
        layouts=by_values,
        choices=tuple(_ordered(values) for values in choices),
    )


def _ordered(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(sorted(values)) if all(isinstance(value, int) for value in values) else values


def one_change(layout: Layout, needed: float, neighbours: Neighbours) -> tuple[bool, str]:
    """Whether one change makes a layout fit, and the changes that do, or else those that help."""
    before = _values_of(layout)
    # By the seconds of a step, the changes that are enough.
    enough: list[tuple[float, str]] = []
    helpful = []
    for position, aspect in enumerate(_ASPECTS):
        changed = _changed(before, position, neighbours)
        fitting = next(filter(neighbours.fits, changed), None)
        if fitting is not None:
            phrase = aspect.phrase(before[position], fitting[position])
            enough.append((neighbours.seconds(fitting), phrase))
        elif changed:
            best = min(changed, key=neighbours.needed)
            if neighbours.needed(best) < (1 - _WORTHWHILE) * needed:
                helpful.append(aspect.phrase(before[position], best[position]))
    if not enough:
        return False, joined(helpful, "or")
    _, fastest = min(enough, key=itemgetter(0))
    changes = joined([phrase for _, phrase in enough], "or")
    return True, changes if len(enough) == 1 else f"{changes} (the fastest: {fastest})"


def _changed(before: Values, position: int, neighbours: Neighbours) -> list[Values]:
    """The layouts with another value of one aspect, the nearest values first."""
    choices = neighbours.choices[position]
    here = choices.index(before[position]) if before[position] in choices else 0
    nearest = sorted(choices, key=lambda value: abs(choices.index(value) - here))
    changed = [(*before[:position], value, *before[position + 1 :]) for value in nearest]
    return [values for values in changed if values != before and values in neighbours.layouts]


def fewest_changes(
    layout: Layout, neighbours: Neighbours, seconds: Callable[[Layout], float]
) -> str:
    """The changes to the nearest layout that fits, the fastest of several; "" if none fits."""
    before = _values_of(layout)
    by_distance: dict[int, list[Values]] = {}
    for values in neighbours.layouts:
        distance = sum(after != now for after, now in zip(values, before, strict=True))
        by_distance.setdefault(distance, []).append(values)
    for distance in sorted(by_distance):
        fitting = list(filter(neighbours.fits, by_distance[distance]))
        if fitting:
            best = min(fitting, key=lambda values: seconds(neighbours.layouts[values]))
            return joined(_phrases(before, best), "and")
    return ""


def _phrases(before: Values, after: Values) -> list[str]:
    return [
        aspect.phrase(now, then)
        for aspect, now, then in zip(_ASPECTS, before, after, strict=True)
        if now != then
    ]


# ------------------------------------------------------------------------------------ sentences


def memory_problem(
    layout: Layout, stage: int, needed: float, machine: Machine, remedy: str
) -> Problem:
    """By how much a stage does not fit, and what would help."""
    # As in the table of a plan.
    amount = in_unit(needed, "GB")
    if amount == in_unit(machine.usable_bytes, "GB"):
        amount = f"{needed / 1e9:,.3f}"
    return Problem(
        "parallel.pp",
        layout.pp,
        f"stage {stage} needs {amount} GB of {usable_in_words(machine)}; {remedy}",
    )


def nothing_fits(costs: CostModel, layouts: Sequence[Layout], world_size: int) -> str:
    """By how much the model does not fit on so many devices, and what would help."""
    machine = costs.machine
    layout = min(leanest(layouts) or layouts, key=costs.needed)
    devices = devices_that_fit(costs, world_size)
    more = "choose a machine with more memory, or a smaller model"
    if devices is not None:
        more = f"use {devices:,} devices, or choose a machine with more memory"
    return (
        f"no layout on {world_size:,} x {machine.name} fits: a stage needs at least "
        f"{in_unit(costs.needed(layout), 'GB')} GB of {usable_in_words(machine)}, with "
        f"{layout_in_words(layout)}; {more}"
    )
