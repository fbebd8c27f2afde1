"""How one stack of layers is cut into pipeline stages, and which layers a stage recomputes.

What must fit is megatron-core 0.16.1's: `get_num_layers_to_build`, `get_transformer_layer_offset`.
"""

from __future__ import annotations

from megafn.pure.config.records import ModelConfig, ParallelConfig
from megafn.pure.config.rule import Rule, rule
from megafn.pure.families.family_spec import StageLayout

# What decides how one stack is cut, in the order in which the functions below take the values.
CUT = (
    "model.num_layers",
    "parallel.pp",
    "parallel.vpp",
    "parallel.num_layers_in_first_pipeline_stage",
    "parallel.num_layers_in_last_pipeline_stage",
)
RECOMPUTE = ("recompute.num_layers", "recompute.granularity", "recompute.method")


def one_stack_layout(parallel: ParallelConfig, model: ModelConfig | None = None) -> StageLayout:
    """One stack over all stages: tables on the first one, the word table on the last one too.

    >>> one_stack_layout(ParallelConfig(pp=4))
    StageLayout(stacks=(range(0, 4),), word_tables=(0, 3), position_tables=(0,))
    """
    last = parallel.pp - 1
    return StageLayout(
        stacks=(range(parallel.pp),),
        word_tables=(0, last) if last > 0 else (0,),
        position_tables=(0,),
    )


def layers_problem(
    layers: int, pp: int, vpp: int, first: int | None, last: int | None
) -> str | None:
    """Why `layers` cannot be cut into pp stages of vpp chunks; first and last may be given."""
    if pp == 1:
        return _single_stage_problem(layers, first, last)
    given = (first or 0) + (last or 0)
    left = layers - given
    middle_stages = pp - (first is not None) - (last is not None)
    if middle_stages == 0:
        return _two_given_stages_problem(left, given, vpp)
    chunks = middle_stages * vpp
    if left >= chunks and left % chunks == 0:
        return None
    if given:
        rest = f"{left} of them are left for {middle_stages} stages"
    else:
        rest = f"they are cut into pp = {pp} stages"
    of_chunks = f" of vpp = {vpp} chunks each" if vpp > 1 else ""
    return (
        f"{rest}{of_chunks}, which takes a multiple of {chunks}; "
        "change num_layers, pp, vpp or the numbers given for the first and last stage"
    )


def _single_stage_problem(layers: int, first: int | None, last: int | None) -> str | None:
    if {first, last} <= {None, layers}:
        return None
    return (
        "with pp = 1 the only stage holds all of them; "
        "leave num_layers_in_first_ and _last_pipeline_stage out"
    )


def _two_given_stages_problem(left: int, given: int, vpp: int) -> str | None:
    if left:
        return (
            f"first and last stage hold {given}; "
            "leave one of the two out or make num_layers their sum"
        )
    if vpp > 1:  # a division by zero in get_transformer_layer_offset
        return (
            "megatron-core cannot interleave two stages that are both given; "
            "leave num_layers_in_last_pipeline_stage out"
        )
    return None


def chunk_sizes(layers: int, pp: int, vpp: int, first: int | None, last: int | None) -> set[int]:
    """The numbers of layers that model chunks have, if there is no `layers_problem`."""
    stages = {size for size in (first, last) if size is not None}
    middle_stages = pp - (first is not None) - (last is not None)
    if middle_stages > 0:
        left = layers - (first or 0) - (last or 0)
        stages.add(left // middle_stages)
    return {size // vpp for size in stages}


def recompute_problem(
    count: int, granularity: str | None, method: str, sizes: set[int]
) -> str | None:
    """Why `count` layers of each chunk cannot be recomputed, at once (uniform) or at all (block).

    sizes: the numbers of layers that chunks have.
    """
    if granularity != "full":
        return None
    largest = max(sizes)
    if count > largest:
        return f"no model chunk has more than {largest} layers; give at most {largest}"
    if method == "uniform" and any(size % count for size in sizes):
        # an index out of range in megatron-core
        counts = " and ".join(str(size) for size in sorted(sizes))
        return f"must divide the layers of each model chunk, {counts}; give a common divisor"
    return None


layers_fit_into_stages = Rule(fields=CUT, remedy=layers_problem)


@rule(*RECOMPUTE, *CUT)
def recomputed_layers_fit(
    count: int,
    granularity: str | None,
    method: str,
    layers: int,
    pp: int,
    vpp: int,
    first: int | None,
    last: int | None,
) -> str | None:
    if layers_problem(layers, pp, vpp, first, last):
        return None
    sizes = chunk_sizes(layers, pp, vpp, first, last)
    return recompute_problem(count, granularity, method, sizes)


def _given_stage_holds_whole_chunks(layers: int | None, vpp: int, pp: int) -> str | None:
    if layers and pp > 1 and layers % vpp:
        return f"vpp = {vpp} must divide it; choose a multiple of {vpp}"
    return None


given_stages_hold_whole_chunks = tuple(
    Rule(
        fields=(f"parallel.num_layers_in_{end}_pipeline_stage", "parallel.vpp", "parallel.pp"),
        remedy=_given_stage_holds_whole_chunks,
    )
    for end in ("first", "last")
)

ONE_STACK_RULES = (
    layers_fit_into_stages,
    *given_stages_hold_whole_chunks,
    recomputed_layers_fit,
)
