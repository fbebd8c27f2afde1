"""One step of every rank on real tensors, and of some ranks dry, by the same instruments.

The functions run in the pool's workers.
"""

import time

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


def counted(config, batch, pg, *, step, model=None, steps=1):
    """(memory, messages by kind, FLOP, matmuls) of the last of some real steps of this rank."""
    with LetGlooLetGo(), counting() as counter:
        state = mf.setup(config, pg, model=model)
        for _ in range(steps):
            counter.start_step(state)
            state, _ = mf.train_step(state, batch, step)
            counter.end_step(state)
        return counter.memory(), counter.messages(pg), counter.flops, counter.matmuls


def real_and_dry(cases):
    """For each case what this rank counted in a real step and in a dry run, or None if it is not
    among those that are compared.

    The dry run happens among the process groups of the real one.
    """
    return [_real_and_dry(**case) for case in cases]


def _real_and_dry(config, data, *, step, model=None, ranks=None, steps=1):
    world_size = mf.world_size()
    groups = mf.build_groups(config.parallel, world_size, model=config.model)
    with mf.init_groups(groups, timeout_seconds=60) as pg:
        batch = share(DATA[data](config, 0), config, pg)
        real = counted(config, batch, pg, step=step, model=model, steps=steps)
        # One rank of each pipeline stage: those beside it do the same.
        if pg.rank not in (groups.pp[0] if ranks is None else ranks):
            return None
        dry = mf.dry_run(config, world_size, pg.rank, step=step, model=model, batch=batch)
        return real, (dry.memory, dry.messages, dry.flops, dry.matmuls)
