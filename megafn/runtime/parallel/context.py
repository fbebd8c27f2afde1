"""Context parallelism: which positions of a sequence a rank holds."""

from __future__ import annotations

import torch


def cp_positions(
    sequence: int, cp: int, rank: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Positions [sequence / cp] of the sequence that a context-parallel rank holds.

    The sequence is cut into 2 cp equal chunks, of which a rank holds number `rank` and number
    2 cp - 1 - rank. So every rank gets an early and a late chunk and causal attention costs each
    the same (the zig-zag order of arXiv 2404.14219 and of megatron-core). Raises ValueError if
    2 cp does not divide the sequence.

    >>> cp_positions(8, cp=2, rank=0)
    tensor([0, 1, 6, 7])
    """
    if cp == 1:
        return torch.arange(sequence, device=device)
    if sequence % (2 * cp):
        raise ValueError(
            f"sequence length = {sequence}: must be a multiple of 2 * cp = {2 * cp}, "
            "since context parallelism cuts it into so many equal chunks; pad it."
        )
    chunk = sequence // (2 * cp)
    early = rank * chunk
    late = (2 * cp - 1 - rank) * chunk
    return torch.cat(
        [
            torch.arange(early, early + chunk, device=device),
            torch.arange(late, late + chunk, device=device),
        ]
    )
