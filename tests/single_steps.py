"""One step of one process, held to what others compute: model, batches and the comparison."""

import torch

import megafn as mf

# Of the largest value of a tensor.
TOLERANCE = 1e-5


def noisy(config, pg, **flags):
    """The built-in model with all weights moved.

    A bias of zero, or a norm of one, would hide an error.
    """
    stage = mf.build_chunk(config, pg, **flags)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter += torch.empty(parameter.shape).normal_(0, 0.1, generator=draw)
    return stage


def halves(batch):
    """The same rows as two micro-batches."""
    return [
        {key: value[:2] for key, value in batch.items()},
        {key: value[2:] for key, value in batch.items()},
    ]


def assert_close(name, ours, theirs):
    apart, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert ours.shape == theirs.shape and size > 0 and apart < TOLERANCE * size, (
        f"{name}: {apart} apart, of {size}"
    )
