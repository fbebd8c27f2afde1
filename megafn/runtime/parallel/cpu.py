"""megatron-core where there is no CUDA: the one seam in which a CPU differs from a GPU."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

_GRAD = torch.Tensor.grad.__get__


class _CudaMeansCpu(TorchFunctionMode):
    """Answers requests for a CUDA device with the CPU (megatron-core writes `device="cuda"` out)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(*args).replace(
                "torch.", "torch.cuda.", 1
            )  # the optimizer compares type names
        if (
            function == _GRAD and not args[0].is_leaf
        ):  # the distributed optimizer's shards are views;
            with warnings.catch_warnings(
                action="ignore"
            ):  # their gradient is set by hand, torch doubts it
                return function(*args)
        device = kwargs.get("device")
        if device is not None and (isinstance(device, int) or "cuda" in str(device)):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # pinned memory is CUDA's
        return function(*args, **kwargs)


@contextlib.contextmanager
def megatron_on_cpu():
    """Run megatron-core on this machine's CPU for the length of a `with`; does nothing where CUDA is.

    CPU runs are for tests, teaching and planning: gloo carries the messages, the mathematics is the same.
    Leaves nothing behind: what it changes in `torch.cuda` is put back.
    """
    if torch.cuda.is_available():
        yield
        return
    import megatron.core.tensor_parallel.layers as mcore_layers
    import megatron.core.tensor_parallel.random as mcore_random

    cpu = torch.device("cpu")
    answers = (
        (torch.cuda, "current_device", lambda: cpu),
        (torch.cuda, "synchronize", lambda *_, **__: None),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
        (mcore_random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        (mcore_random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
        (
            logging.getLogger(mcore_random.__name__),
            "disabled",
            True,
        ),  # dropout does change the CPU's random state here
        (
            mcore_layers.linear_with_grad_accumulation_and_async_allreduce,
            "warned",
            True,
        ),  # of a CUDA variable
    )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in answers]
    try:
        for owner, name, answer in answers:
            setattr(owner, name, answer)
        with _CudaMeansCpu():
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def device() -> torch.device:
    """This process's device: the GPU that LOCAL_RANK numbers, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def backend() -> str:
    """NCCL between GPUs, gloo between CPUs."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def hold_gloo_back() -> None:
    """Give the threads in which gloo watches its connections the least priority (Linux; elsewhere nothing happens).

    Such a thread does not wait for a connection's lock, it asks for it again and again (gloo's `Pair::handleEvents`). Where processes
    outnumber cores it so keeps the lock's owner from running; `make bench` prints how much longer an all_reduce took. (As SCHED_IDLE they
    would give way at once, but starve where other work keeps the cores busy.)
    """
    for name in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            if name.read_text() == "gloo_tcp_loop\n":
                os.setpriority(os.PRIO_PROCESS, int(name.parent.name), 19)
