"""Every layout in which a config can run on so many devices.

What a layout must satisfy is not written here: the rules of `validate` are applied, each as soon as
all the fields that it reads are chosen. So a rule of a custom family counts too, and a search
returns what `validate` accepts, no more and no less.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from math import isqrt
from operator import itemgetter
from typing import Any

from attrs import field, frozen

from megafn.pure.config.field_types import all_fields
from megafn.pure.config.problems import Problem, config_error
from megafn.pure.config.records import RecomputeConfig, TrainConfig
from megafn.pure.config.rule import Rule
from megafn.pure.planner.records import Layout
from megafn.pure.validation.validate import problems_in_any_layout, rules_of

# What is chosen, in the order in which it is.
SEARCHED = (
    "parallel.tp",
    "parallel.cp",
    "parallel.pp",
    "parallel.vpp",
    "parallel.num_layers_in_first_pipeline_stage",
    "parallel.num_layers_in_last_pipeline_stage",
    "micro_batch_size",
    "parallel.sequence_parallel",
    "optimizer.use_distributed_optimizer",
    "recompute.granularity",
    "recompute.method",
    "recompute.num_layers",
)

_PP, _FIRST, _LAST = (
    SEARCHED.index(f"parallel.{name}")
    for name in (
        "pp",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
    )
)

# Values of the first fields of SEARCHED.
Chosen = tuple[Any, ...]

# vpp, layers of the first stage, layers of the last one.
Cut = tuple[int, int | None, int | None]


@frozen(kw_only=True)
class RefusedChoice:
    """Values that a rule refuses, with what was chosen before them."""

    layout: Layout
    problem: Problem


@frozen(kw_only=True)
class Layouts:
    """What a search has found."""

    # Simpler ones first: small degrees before large ones, features off before on.
    accepted: tuple[Layout, ...]
    # For each combination of values that a rule refuses, the first layout that met it.
    refused: tuple[RefusedChoice, ...]


def search_layouts(
    config: TrainConfig, world_size: int, *, largest_tp: int, largest_cp: int
) -> Layouts:
    """All layouts of a config on `world_size` devices that `validate` accepts.

    tp and cp are at most `largest_tp` and `largest_cp`. These, pp and the micro-batch size are any
    that divide what they cut, vpp any that divides a stage. If the stages cannot hold equally many
    layers, the outer ones hold fewer. Of recomputation: none, selective, full, and what the config
    has.

    Raises ConfigError with the problems that the config has in any layout.

    >>> from megafn.pure.config.records import ModelConfig
    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=2, seq_length=31)
    >>> config = TrainConfig(model=model, micro_batch_size=1, global_batch_size=2, train_iters=9)
    >>> found = search_layouts(config, 2, largest_tp=2, largest_cp=2)
    >>> sorted({(layout.tp, layout.pp, layout.dp) for layout in found.accepted})
    [(1, 1, 2), (1, 2, 1), (2, 1, 1)]
    >>> print(found.refused[0].problem)
    model.seq_length = 31: cp = 2 (into 2 * cp pieces) cuts it; choose a multiple of 4
    """
    problems = problems_in_any_layout(config, world_size, SEARCHED)
    if problems:
        raise config_error(problems)

    space = _Space(
        config=config,
        world_size=world_size,
        largest_tp=largest_tp,
        largest_cp=largest_cp,
        recomputations=_recomputations(config),
    )
    tests = _tests(config, world_size)
    refused: list[RefusedChoice] = []
    found: list[Chosen] = [()]
    for choices in _CHOICES:
        longer = [(*chosen, *values) for chosen in found for values in choices(space, chosen)]
        width = len(longer[0]) if longer else 0
        for test in tests:
            if test.last_field < width:
                longer = _accepted(test, longer, space, refused)
        tests = [test for test in tests if test.last_field >= width]
        found = longer
    return Layouts(
        accepted=tuple(_layout(chosen, space) for chosen in found),
        refused=tuple(refused),
    )


# ------------------------------------------------------------------------------------- choices


@frozen(kw_only=True)
class _Space:
    """What is searched."""

    config: TrainConfig
    world_size: int
    largest_tp: int
    largest_cp: int
    # By their fields; the same records in all layouts.
    recomputations: Mapping[Chosen, RecomputeConfig]
    # By pp.
    cuts: dict[int, list[Cut]] = field(factory=dict)


def _recomputations(config: TrainConfig) -> dict[Chosen, RecomputeConfig]:
    """The usual ones, and the config's own."""
    none = RecomputeConfig()
    selective = RecomputeConfig(granularity="selective")
    full = RecomputeConfig(granularity="full")
    return {
        (recompute.granularity, recompute.method, recompute.num_layers): recompute
        for recompute in (none, selective, full, config.recompute)
    }


def _tensor_parallel(space: _Space, chosen: Chosen) -> Iterable[Chosen]:
    return [(tp,) for tp in divisors(space.world_size) if tp <= space.largest_tp]


def _context_parallel(space: _Space, chosen: Chosen) -> Iterable[Chosen]:
    (tp,) = chosen
    return [(cp,) for cp in divisors(space.world_size // tp) if cp <= space.largest_cp]


def _pipeline(space: _Space, chosen: Chosen) -> Iterable[Chosen]:
    tp, cp = chosen
    for pp in divisors(space.world_size // (tp * cp)):
        if pp not in space.cuts:
            space.cuts[pp] = _cuts(space.config, pp)
        for cut in space.cuts[pp]:
            yield (pp, *cut)


def _cuts(config: TrainConfig, pp: int) -> list[Cut]:
    """How the layers may be cut into pp stages; the rules decide which of them can run."""
    layers = config.model.num_layers
    # Equal stages are tried even if there are none, so that a rule says why.
    cuts: list[Cut] = [(1, None, None)]
    if pp == 1:
        return cuts
    for vpp in range(1, -(-layers // pp) + 1):
        cut = _balanced_cut(layers, pp, vpp)
        if cut is not None and cut not in cuts:
            cuts.append(cut)
    parallel = config.parallel
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    given = (parallel.vpp, first, last)
    if pp == parallel.pp and (first or last) and given not in cuts:
        cuts.append(given)
    return cuts


def _balanced_cut(layers: int, pp: int, vpp: int) -> Cut | None:
    """A cut into stages of vpp equal chunks; what the stages have too much, the outer ones lack.

    >>> _balanced_cut(128, 16, 2), _balanced_cut(126, 16, 1), _balanced_cut(126, 16, 2)
    ((2, None, None), (1, 7, 7), (2, None, 6))
    """
    if layers % vpp:
        return None
    middle = vpp * -(-layers // (pp * vpp))
    lacking = (middle * pp - layers) // vpp
    # The last stage has the output layer too.
    first = middle - vpp * (lacking // 2)
    last = middle - vpp * (lacking - lacking // 2)
    if last < 1:
        return None
    return vpp, _if_other_than(middle, first), _if_other_than(middle, last)


def _if_other_than(middle: int, layers: int) -> int | None:
    return None if layers == middle else layers


def _micro_batch(space: _Space, chosen: Chosen) -> Iterable[Chosen]:
    tp, cp, pp, *_ = chosen
    dp = space.world_size // (tp * cp * pp)
    batch = space.config.global_batch_size
    if batch % dp:
        # No size fits, and the rule says why.
        return [(1,)]
    return [(size,) for size in divisors(batch // dp)]


def _sequence_parallel(space: _Space, chosen: Chosen) -> Iterable[Chosen]:
    tp = chosen[0]
    return [(False,), (True,)] if tp > 1 else [(False,)]


def _distributed_optimizer(space: _Space, chosen: Chosen) -> Iterable[Chosen]:
    return [(False,), (True,)]


def _recomputation(space: _Space, chosen: Chosen) -> Iterable[Chosen]:
    return space.recomputations


# In the order of SEARCHED: values for the next fields, after those that are chosen.
_CHOICES: tuple[Callable[[_Space, Chosen], Iterable[Chosen]], ...] = (
    _tensor_parallel,
    _context_parallel,
    _pipeline,
    _micro_batch,
    _sequence_parallel,
    _distributed_optimizer,
    _recomputation,
)


@functools.cache
def divisors(number: int) -> tuple[int, ...]:
    """The divisors of a number, ascending; beyond 2**32, those of which one factor is below 2**16.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    factors = range(1, min(isqrt(number), 2**16) + 1)
    small = [factor for factor in factors if number % factor == 0]
    large = [number // factor for factor in reversed(small) if factor * factor != number]
    return (*small, *large)


# --------------------------------------------------------------------------------------- rules


@frozen(kw_only=True)
class _Test:
    """A rule that reads fields of the search."""

    rule: Rule
    # (which field of SEARCHED, or None; the value of a field that is not searched)
    sources: tuple[tuple[int | None, Any], ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """The fields of SEARCHED that it reads."""
        return tuple(position for position, _ in self.sources if position is not None)

    @property
    def last_field(self) -> int:
        return max(self.positions)

    def remedy(self, chosen: Chosen) -> str | None:
        values = [
            value if position is None else chosen[position] for position, value in self.sources
        ]
        return self.rule.remedy(*values)


def _tests(config: TrainConfig, world_size: int) -> list[_Test]:
    """The rules that read fields of the search, with the values of the fields that it leaves."""
    values = {path: value for path, value, _ in all_fields(config)}
    values |= {"world_size": world_size, "cuda": None}
    position_of = {path: position for position, path in enumerate(SEARCHED)}
    tests = []
    for rule in rules_of(config):
        sources = tuple((position_of.get(path), values.get(path)) for path in rule.fields)
        test = _Test(rule=rule, sources=sources)
        # As in `validate`: a rule about a section that is not there is left out.
        if test.positions and values.keys() >= set(rule.fields):
            tests.append(test)
    return tests


def _accepted(
    test: _Test, candidates: list[Chosen], space: _Space, refused: list[RefusedChoice]
) -> list[Chosen]:
    """The candidates that pass; of those that do not, the first for each value goes to `refused`.

    A rule looks at few fields, so it is asked once for each combination of their values.
    """
    read = itemgetter(*test.positions)
    remedies: dict[Any, str | None] = {}
    accepted = []
    first_refused: dict[Chosen, str] = {}
    for chosen in candidates:
        key = read(chosen)
        if key not in remedies:
            remedies[key] = remedy = test.remedy(chosen)
            if remedy:
                first_refused[chosen] = remedy
        if not remedies[key]:
            accepted.append(chosen)

    for chosen, remedy in first_refused.items():
        if not _is_replaced(test, chosen, accepted):
            refused.append(_refusal(test, chosen, remedy, space))
    return accepted


def _is_replaced(test: _Test, chosen: Chosen, accepted: list[Chosen]) -> bool:
    """Whether equal and unequal stages were both tried, and nothing is to be said of these.

    Unequal ones are tried because the layers may not allow equal ones. If neither can run, the
    reason is that of the equal ones.
    """
    if _is_uneven(chosen) or _LAST not in test.positions:
        return _is_uneven(chosen)
    return any(other[_PP] == chosen[_PP] and _is_uneven(other) for other in accepted)


def _is_uneven(chosen: Chosen) -> bool:
    """Whether the outer stages hold other numbers of layers than the rest."""
    return any(chosen[_FIRST : _LAST + 1])


def _refusal(test: _Test, chosen: Chosen, remedy: str, space: _Space) -> RefusedChoice:
    position, value = test.sources[0]
    if position is not None:
        value = chosen[position]
    problem = Problem(test.rule.fields[0], value, remedy)
    return RefusedChoice(layout=_layout(chosen, space), problem=problem)


def _layout(chosen: Chosen, space: _Space) -> Layout:
    """The layout of these values; what is not chosen yet has its simplest value."""
    tp, cp, pp, vpp, first, last, micro, sequence, distributed, *recompute = (
        *chosen,
        *_SIMPLEST[len(chosen) :],
    )
    dp = space.world_size // (tp * cp * pp)
    return Layout(
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cp,
        dp=dp,
        micro_batch_size=micro,
        num_micro_batches=space.config.global_batch_size // (micro * dp),
        sequence_parallel=sequence,
        use_distributed_optimizer=distributed,
        recompute=space.recomputations[tuple(recompute)],
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )


_SIMPLEST: Chosen = (1, 1, 1, 1, None, None, 1, False, False, None, "uniform", 1)
