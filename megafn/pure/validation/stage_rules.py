"""How layers are cut into pipeline stages: remedies where they cannot be, as rules of `validate` use them.

megatron-core 0.16.1's: `get_num_layers_to_build`, `get_transformer_layer_offset`, and of T5 each half by itself.
"""

from __future__ import annotations

from typing import Any


def layers_fit(
    layers: int,
    pp: int,
    vpp: int,
    first: int | None,
    last: int | None,
    family: str,
    decoder: int | None,
    split: int | None,
) -> str | None:
    """Stages (pp) of equal chunks (vpp), where first and last stage may be given; a chunk has one layer at least."""
    if family == "t5":
        return (
            half_fits("encoder", layers, pp, split)
            or decoder is None
            and half_fits("decoder", layers, pp, split)
            or None
        )
    if pp == 1:
        stray = {first, last} - {None, layers}
        return (
            "with pp = 1 the one stage holds them all; leave num_layers_in_first_ and _last_pipeline_stage out"
            if stray
            else None
        )
    middle = pp - (first is not None) - (last is not None)
    left, share = layers - (first or 0) - (last or 0), middle * vpp
    if not middle:
        if left:
            return f"first and last stage hold {first + last}; leave one of the two out or choose their sum"
        if vpp > 1:  # a division by zero in get_transformer_layer_offset
            return "megatron-core cannot interleave two stages that are both given; leave num_layers_in_last_pipeline_stage out"
    elif left < share or left % share:
        chunks = f" of vpp = {vpp} chunks each" if vpp > 1 else ""
        rest = (
            f"{left} of them are left for {middle} stages"
            if left != layers
            else f"they are cut into pp = {pp} stages"
        )
        return f"{rest}{chunks}, which takes a multiple of {share}; change num_layers, pp, vpp or what first and last stage hold"


def _split(pp: int, split: int | None) -> int | None:
    """T5's split rank, where it is one."""
    at = pp // 2 if split is None else split
    return at if 0 < at < pp else None


def split_fits(split: int | None, family: str, pp: int) -> str | None:
    """The stage at which T5's decoder begins, where it is given."""
    if family == "t5" and split is not None and _split(pp, split) is None:
        return (
            f"encoder and decoder have a stage each at least; give 1 to pp - 1 = {pp - 1}"
            if pp > 1
            else "with pp = 1 the one stage holds both encoder and decoder; leave it out or raise pp"
        )


def half_fits(half: str, layers: int, pp: int, split: int | None) -> str | None:
    """Layers of T5's encoder or decoder over the stages that it has."""
    if pp == 1 or (at := _split(pp, split)) is None:
        return None
    stages = at if half == "encoder" else pp - at
    if layers % stages:
        return (
            f"the {half} has {stages} of pp = {pp} stages (decoder from pipeline_model_parallel_split_rank = {at} on), which must "
            f"divide its {layers} layers; choose a multiple of {stages}, another pp or another split rank"
        )


def _chunks(
    layers: int,
    pp: int,
    vpp: int,
    first: int | None,
    last: int | None,
    family: str,
    decoder: int | None,
    split: int | None,
) -> set[int]:
    """The numbers of layers that a chunk has, where `layers_fit` and `half_fits` have no objection."""
    if family == "t5":
        decoder, at = layers if decoder is None else decoder, _split(pp, split)
        return {layers, decoder} if pp == 1 or at is None else {layers // at, decoder // (pp - at)}
    middle = pp - (first is not None) - (last is not None)
    inner = {(layers - (first or 0) - (last or 0)) // middle} if middle > 0 else set()
    return {size // vpp for size in {first, last} - {None} | inner}


def recomputed_fit(count: int, granularity: str | None, method: str, *cut: Any) -> str | None:
    """Layers that are recomputed at once (uniform), or at all (block), of each chunk; `cut` as in `layers_fit`."""
    _, pp, *_, family, decoder, split = cut
    if (
        granularity != "full"
        or layers_fit(*cut)
        or family == "t5"
        and decoder
        and half_fits("decoder", decoder, pp, split)
    ):
        return None
    sizes = _chunks(*cut)
    if count > max(sizes):
        return f"no stage's chunk has more than {max(sizes)} layers; give that at most"
    if method == "uniform" and any(
        size % count for size in sizes
    ):  # an index out of range in megatron-core
        return f"it must divide the layers of each stage's chunk, {' and '.join(map(str, sorted(sizes)))}; give a common divisor"
