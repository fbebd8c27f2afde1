"""One step of every rank on real tensors, and of some ranks dry, by the same instruments.

The functions run in the pool's workers.
"""

import time

import attrs
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megafn as mf
from combinations import DATA
from equivalence import share
from megafn.runtime.dry_run.count import counting


class LetGlooLetGo(TorchDispatchMode):
    """Waits after each collective until gloo's threads no longer hold its tensors.

    They let go of them when they are scheduled, perhaps late: then more is alive than what the step
    itself keeps.
    """

    def __init__(self):
        super().__init__()
        self.held = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.wait()
        storages = []
        if operation.namespace == "c10d":
            # The reference keeps the address that of this storage; it is one of those counted.
            storages = [tensor.untyped_storage() for tensor in tensors(args)]
        self.held = [(storage, uses(storage)) for storage in storages]
        return operation(*args, **(kwargs or {}))

    def wait(self):
        # A message whose handle is kept is held for longer.
        end = time.monotonic() + 0.02
        while any(uses(storage) > before for storage, before in self.held):
            if time.monotonic() > end:
                break
            time.sleep(0.0001)
        self.held = []


def uses(storage):
    return torch._C._storage_Use_Count(storage._cdata)


def tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


@attrs.frozen(kw_only=True)
class Counted:
    """What one rank counted in one step."""

    memory: object
    messages: dict
    flops: int
    matmuls: int


def counted(case, batch, pg):
    """What this rank counts in a real step, the last one if the case has several."""
    with LetGlooLetGo(), counting() as counter:
        state = mf.setup(case.config, pg, model=case.model)
        for _ in range(case.steps):
            counter.start_step(state)
            state, _ = mf.train_step(state, batch, case.step)
            counter.end_step(state)
        return Counted(
            memory=counter.memory(),
            messages=counter.messages(pg),
            flops=counter.flops,
            matmuls=counter.matmuls,
        )


def real_and_dry(cases):
    """For each case what this rank counted in a real step and in a dry run, or None.

    None if the rank is not among those compared: one of each pipeline stage, since those beside it
    do the same. The dry run happens among the process groups of the real one.
    """
    return [_real_and_dry(case) for case in cases]


def _real_and_dry(case):
    world_size = mf.world_size()
    groups = mf.build_groups(case.config.parallel, world_size, model=case.config.model)
    with mf.init_groups(groups, timeout_seconds=60) as pg:
        batch = share(DATA[case.data](case.config, 0), case.config, pg)
        real = counted(case, batch, pg)
        if pg.rank not in groups.pp[0]:
            return None
        dry = mf.dry_run(
            case.config, world_size, pg.rank, step=case.step, model=case.model, batch=batch
        )
    return real, Counted(
        memory=dry.memory, messages=dry.messages, flops=dry.flops, matmuls=dry.matmuls
    )


# Of all that is alive.
BYTES = 0.01


def assert_counted_alike(real, dry):
    """Raises AssertionError unless bytes agree within `BYTES`, and all else exactly."""
    assert real.messages == dry.messages
    assert (real.flops, real.matmuls) == (dry.flops, dry.matmuls)
    for moment in ("setup", "peak"):
        expected = getattr(real.memory, moment)
        found = getattr(dry.memory, moment)
        for kind in (*attrs.fields_dict(type(expected)), "total"):
            apart = abs(getattr(expected, kind) - getattr(found, kind))
            assert apart <= BYTES * expected.total, (moment, kind, expected, found)
    apart = abs(real.memory.cpu_only - dry.memory.cpu_only)
    assert apart <= BYTES * real.memory.peak.total, (real.memory, dry.memory)
