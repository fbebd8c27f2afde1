"""megatron-core without CUDA: the one seam in which a CPU differs from a GPU."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron.core.tensor_parallel.layers as mcore_layers
import megatron.core.tensor_parallel.random as mcore_random
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from megafn.runtime.parallel.exchanged import Exchange, exchanged

_GRAD = torch.Tensor.grad.__get__

# The name of gloo's watching threads as /proc gives it.
_GLOO_THREAD = "gloo_tcp_loop\n"
_LEAST_PRIORITY = 19


class _CudaMeansCpu(TorchFunctionMode):
    """Answers requests for a CUDA device with the CPU (megatron-core writes `device="cuda"`)."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0]

        # megatron-core's optimizer compares type names with those of CUDA tensors.
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(*args).replace("torch.", "torch.cuda.", 1)

        # The distributed optimizer's shards are views whose gradient is set by hand; torch warns
        # that it may be missing.
        if function == _GRAD and not args[0].is_leaf:
            with warnings.catch_warnings(action="ignore"):
                return function(*args)

        device = kwargs.get("device")
        if device is not None and (isinstance(device, int) or "cuda" in str(device)):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            # Pinned memory needs CUDA.
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Run megatron-core on this machine's CPU until the `with` is left; does nothing with CUDA.

    CPU runs are for tests, teaching and planning: gloo carries the messages, the mathematics is
    the same. Leaves nothing behind: what it changes in `torch.cuda` is restored.
    """
    if torch.cuda.is_available():
        yield
        return
    with exchanged(_answers_of_a_cpu()), _CudaMeansCpu():
        yield


@contextlib.contextmanager
def device_requests_not_answered() -> Iterator[None]:
    """Inside `megatron_on_cpu`: requests for a CUDA device are not answered with the CPU.

    Answering looks at every call of a torch function, which costs a tenth of the time to generate
    a token. The layers' forward passes make no such requests.
    """
    with torch._C.DisableTorchFunction():
        yield


def _answers_of_a_cpu() -> list[Exchange]:
    """What stands in place of functions of CUDA while megatron-core runs on a CPU."""
    cpu = torch.device("cpu")

    def get_rng_state(*_, **__):
        return torch.get_rng_state()

    def set_rng_state(state, *_, **__):
        torch.set_rng_state(state)

    def synchronize(*_, **__):
        return None

    return [
        (torch.cuda, "current_device", lambda: cpu),
        (torch.cuda, "synchronize", synchronize),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", get_rng_state),
        (torch.cuda, "set_rng_state", set_rng_state),
        (mcore_random, "_get_cuda_rng_state", get_rng_state),
        (mcore_random, "_set_cuda_rng_state", set_rng_state),
        # It warns if the CPU's random state has changed, which dropout is meant to do here.
        (logging.getLogger(mcore_random.__name__), "disabled", True),
        # It warns once that an environment variable of CUDA's is not set.
        (mcore_layers.linear_with_grad_accumulation_and_async_allreduce, "warned", True),
    ]


def device() -> torch.device:
    """This process's device: the GPU with the number LOCAL_RANK, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Use the CPU until the `with` is left, also on a machine with GPUs."""

    def manual_seed_all(_seed: int) -> None:
        """torch.manual_seed calls it, and would seed the GPUs that the process may be using."""

    answers = [
        (torch.cuda, "is_available", lambda: False),
        (torch.cuda, "manual_seed_all", manual_seed_all),
    ]
    with exchanged(answers):
        yield


def has_values_at_hand(tensor: torch.Tensor) -> bool:
    """Whether looking at values costs nothing: not on a GPU, where it would wait for the device.

    Nor on a fake tensor, of a dry run, which has none.
    """
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)


def backend() -> str:
    """NCCL between GPUs, gloo between CPUs."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def hold_gloo_back() -> None:
    """Give gloo's watching threads the least priority (Linux; does nothing elsewhere).

    Such a thread does not wait for a connection's lock: it asks for it again and again (gloo's
    `Pair::handleEvents`). If there are more processes than cores, this keeps the lock's owner from
    running; `make bench` prints how much longer an all_reduce takes. (As SCHED_IDLE the threads
    would give way at once, but starve while other work keeps the cores busy.)
    """
    for name in Path("/proc/self/task").glob("*/comm"):
        # A thread may have ended meanwhile.
        with contextlib.suppress(OSError):
            if name.read_text() == _GLOO_THREAD:
                os.setpriority(os.PRIO_PROCESS, int(name.parent.name), _LEAST_PRIORITY)
