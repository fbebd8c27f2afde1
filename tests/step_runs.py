"""What one rank sees of train steps; the functions run in the pool's workers."""

import attrs
import pytest
import torch

import megafn as mf
from equivalence import local_parts, share, uneven


def metrics_of(config, step):
    """(metrics of each step as a dict, times apart; the first state's fields before and after)."""
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = first = mf.setup(config, pg)
        fields, seen = attrs.asdict(first, recurse=False), []
        for iteration in range(config.train_iters):
            state, metrics = mf.train_step(
                state, share(uneven(config, iteration), config, pg), step
            )
            seen.append(
                {
                    key: value
                    for key, value in attrs.asdict(metrics).items()
                    if key not in ("seconds", "tokens_per_second")
                }
            )
        assert all(
            value is fields[key] for key, value in attrs.asdict(first, recurse=False).items()
        ), "the old record changed"
        assert (first.iteration, first.consumed_samples) == (0, 0) and (
            state.iteration,
            state.consumed_samples,
        ) == (4, 64)
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            state.iteration = 7
        return seen


def refused(config, batch, step):
    """What this rank raises on a bad global batch, whether weights moved, and loss and grad norm of
    a good step after it."""
    with mf.init_groups(
        mf.build_groups(config.parallel, mf.world_size()), timeout_seconds=20
    ) as pg:
        state = mf.setup(config, pg)
        before = local_parts(state)
        with pytest.raises((ValueError, TypeError)) as told:
            mf.train_step(state, share(batch, config, pg), step)
        moved = not all(
            torch.equal(a, b)
            for (_, a, *_), (_, b, *_) in zip(before, local_parts(state), strict=True)
        )
        state, metrics = mf.train_step(
            state, share(uneven(config, 0), config, pg), mf.step_fn("gpt")
        )
        return str(told.value), moved, (metrics.loss, metrics.grad_norm)
