"""Context parallelism: which positions of a sequence a rank holds."""

from __future__ import annotations

import torch


def cp_positions(
    sequence: int, cp: int, rank: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Positions [sequence / cp] of the sequence that a context-parallel rank holds: chunks rank and 2 cp - 1 - rank.

    Of 2 cp equal chunks every rank gets an early and a late one, so that causal work is even (arXiv 2404.14219's
    and megatron-core's zig-zag order). Raises ValueError where 2 cp does not divide the sequence.
    """
    if sequence % (2 * cp) and cp > 1:
        raise ValueError(
            f"sequence length = {sequence}: cp = {cp} cuts a sequence into {2 * cp} equal chunks; pad it to a multiple of {2 * cp}."
        )
    if cp == 1:
        return torch.arange(sequence, device=device)
    chunk = sequence // (2 * cp)
    return torch.cat(
        [torch.arange(c * chunk, (c + 1) * chunk, device=device) for c in (rank, 2 * cp - 1 - rank)]
    )
