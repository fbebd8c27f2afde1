"""What users add to a model or freeze in it: replicas made alike, and checks that fail early.

`setup` calls `start_alike`, `check_frozen` and `connect_frozen_parts`; `train_step` the others, in
the first step of a process only, or until each gradient was something else than zero.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlock

from megafn.pure.config.problems import ConfigError, Problem, config_error
from megafn.pure.config.records import TrainConfig
from megafn.runtime.model.lora import Adapters, chunks_adapters
from megafn.runtime.model.state import State, UnprovenReplicas
from megafn.runtime.model.weights import LocalParameter, local_parameters
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.object_collectives import gather_from_all_ranks

# ----------------------------------------------------------------------------------- in `setup`


@torch.no_grad()
def start_alike(chunk: torch.nn.Module, config: TrainConfig, pg: ProcessGroups) -> None:
    """Give every replica of a parameter the values of the first rank that holds it.

    Replicas are the ranks of dp and cp, and those of tp if the parameter is not cut. A module that
    draws its own random numbers would otherwise start, and stay, different on each of them.
    """
    for part in local_parameters(chunk, config.model, pg):
        values = part.parameter.detach()
        contiguous = values.contiguous()
        _broadcast_from_first(contiguous, pg.dp_cp)
        if part.dim is None:
            _broadcast_from_first(contiguous, pg.tp)
        if contiguous is not values:
            values.copy_(contiguous)


def _broadcast_from_first(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.broadcast(tensor, src=dist.get_process_group_ranks(group)[0], group=group)


@frozen(kw_only=True)
class _Trainable:
    """What one rank trains."""

    stage: int
    count: int
    digest: str  # of names and whether they are trained
    problem: str | None
    adapters: tuple[Adapters, ...]  # of its chunks


def check_frozen(chunks: Sequence[torch.nn.Module], config: TrainConfig, pg: ProcessGroups) -> None:
    """Raise ConfigError, on every rank, if what is frozen differs between copies, or all is frozen.

    Or if `lora` names a module that no stage has.
    The copies of a table on several stages, and the replicas of a stage, exchange gradients: if
    only some of them did, they would wait for the others. A stage may be frozen as a whole.
    """
    trained: dict[tuple[str, int], bool] = {}
    for chunk in chunks:
        for part in local_parameters(chunk, config.model, pg):
            key = (part.name, pg.place.pp)
            trained[key] = trained.get(key, False) or part.parameter.requires_grad
    own = _Trainable(
        stage=pg.place.pp,
        count=sum(trained.values()),
        digest=hashlib.sha256(repr(sorted(trained.items())).encode()).hexdigest(),
        problem=_half_frozen_table(trained, pg),
        adapters=chunks_adapters(chunks),
    )
    if pg.is_dry_run:
        # What is trained elsewhere is not known, and other stages may have what this one lacks.
        return
    every_rank = gather_from_all_ranks(own, pg)
    problems = [rank.problem for rank in every_rank if rank.problem is not None]
    if problems:
        raise ConfigError(problems[0])
    _check_adapters([adapters for rank in every_rank for adapters in rank.adapters])
    if not any(rank.count for rank in every_rank):
        raise ConfigError(
            "prepare_model or model function: no parameter of the model is trainable; leave "
            "requires_grad = True on those that are to be trained."
        )
    _check_replicas(every_rank)


def _check_adapters(adapters: Sequence[Adapters]) -> None:
    """Raise ConfigError if `lora` was given a name that no chunk has, or other settings on one."""
    if len({of_chunk.lora for of_chunk in adapters}) > 1:
        raise ConfigError(
            "prepare_model: chunks of one model have adapters of different settings; give each "
            "the same mf.lora(...)."
        )
    matched = {name for of_chunk in adapters for name in of_chunk.matched}
    for of_chunk in adapters:
        lora = of_chunk.lora
        for field, names in (("modules", lora.modules), ("train_modules", lora.train_modules)):
            unmatched = [name for name in names if name not in matched]
            if unmatched:
                raise config_error(
                    [
                        Problem(
                            f"lora.{field}",
                            unmatched[0],
                            "no module of the model has this name; give the last parts of its "
                            'path, such as "linear_qkv" or "mlp.linear_fc1"',
                        )
                    ]
                )


def _half_frozen_table(trained: dict[tuple[str, int], bool], pg: ProcessGroups) -> str | None:
    """The problem of a table that several stages hold and only some of them train, or None."""
    if pg.pp.size() == 1:
        return None
    stages = [trained] * pg.pp.size()
    dist.all_gather_object(stages, trained, group=pg.pp)
    holders: dict[str, dict[int, bool]] = {}
    for stage in stages:
        for (name, number), is_trained in stage.items():
            holders.setdefault(name, {})[number] = is_trained
    for name, copies in holders.items():
        frozen_on = [stage for stage, is_trained in copies.items() if not is_trained]
        trained_on = [stage for stage, is_trained in copies.items() if is_trained]
        if frozen_on and trained_on:
            return (
                f"prepare_model or model function: {name} is frozen on pipeline stages {frozen_on} "
                f"and trainable on stages {trained_on}, which hold copies of one table; freeze "
                "every copy or none."
            )
    return None


def _check_replicas(every_rank: Sequence[_Trainable]) -> None:
    first_of_stage: dict[int, int] = {}
    for rank, own in enumerate(every_rank):
        first = first_of_stage.setdefault(own.stage, rank)
        if own.digest != every_rank[first].digest:
            raise ConfigError(
                f"prepare_model or model function: ranks {first} and {rank} hold replicas of "
                f"pipeline stage {own.stage} whose parameters or requires_grad differ; build and "
                "freeze the same on both."
            )


def connect_frozen_parts(chunk: torch.nn.Module, config: TrainConfig, *, is_last: bool) -> None:
    """Let gradients flow to where they are needed, if nothing before a module is trained.

    megatron-core recomputes layers through an autograd function whose only differentiable inputs
    are activations: if none of them needs a gradient, the layers' parameters get none. And a stage
    whose output needs no gradient cannot run the backward pass that its schedule asks for.
    """
    if config.recompute.granularity == "full":
        for module in chunk.modules():
            if isinstance(module, TransformerBlock):
                module.register_forward_pre_hook(_input_needs_gradient)
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear) and _loses_gradient_of_bias(module):
            module.skip_bias_add = True
            module.register_forward_hook(_add_bias)
    if not is_last:
        chunk.register_forward_hook(_output_needs_gradient)


def _input_needs_gradient(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, *others = inputs if inputs else (None,)
    if not torch.is_grad_enabled() or not isinstance(hidden, torch.Tensor) or hidden.requires_grad:
        return inputs
    return (hidden.detach().requires_grad_(), *others)


def _loses_gradient_of_bias(layer: ColumnParallelLinear) -> bool:
    """Whether megatron-core's function for a frozen weight, which ignores the bias, may be used.

    A tied output layer has no weight of its own: it gets the word table, which may be frozen.
    """
    if layer.bias is None or layer.skip_bias_add or not layer.bias.requires_grad:
        return False
    if layer.weight is not None and layer.weight.requires_grad:
        return False
    if layer.gather_output:  # the output is whole here, and the bias is a part
        raise ConfigError(
            "prepare_model or model function: a ColumnParallelLinear with gather_output has a "
            "trainable bias on a frozen weight, which megatron-core gives no gradient; freeze both "
            "or none."
        )
    return True


def _add_bias(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    values, bias = output
    return output if bias is None else (values + bias, None)


def _output_needs_gradient(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    if not torch.is_grad_enabled() or not isinstance(output, torch.Tensor) or output.requires_grad:
        return output
    # a clone, because the schedule frees its output and the gradient of a leaf has the leaf's shape
    return output.detach().requires_grad_().clone()


# --------------------------------------------------------------------------- in the first step


@contextlib.contextmanager
def watch_gradients(state: State, *, first: bool) -> Iterator[set[str]]:
    """Collects the names of parameters that receive a gradient, in the first step."""
    received: set[str] = set()
    handles = []
    if first:
        for part in _trained(state):
            hook = _NoteName(part.name, received)
            handles.append(part.parameter.register_hook(hook))
    try:
        yield received
    finally:
        for handle in handles:
            handle.remove()


class _NoteName:
    """A gradient hook that notes its parameter's name; the gradient stays as it is."""

    def __init__(self, name: str, received: set[str]):
        self.name = name
        self.received = received

    def __call__(self, gradient: torch.Tensor) -> None:
        self.received.add(self.name)


def check_first_gradients(state: State, received: set[str]) -> UnprovenReplicas | None:
    """Compare, in the first step, gradients of what counts as replicated over tp; report silence.

    Raises ConfigError on every rank, before the update, if a parameter that is not cut over tp has
    other gradients on other tp ranks. Warns on rank zero of trainable parameters that no rank has a
    gradient for. Returns what `check_unproven` is to compare in the next step.
    """
    pg = state.pg
    silent = sorted({part.name for part in _trained(state)} - received)
    compared = _compare_over_tp(_replicated(state), pg)
    every_rank = gather_from_all_ranks((compared, silent), pg)
    _refuse_different([of_rank for of_rank, _ in every_rank])
    if any(names for _, names in every_rank):
        _report_silent(silent, received, pg)
    if not any(of_rank.zero for of_rank, _ in every_rank):
        return None
    return UnprovenReplicas(names=frozenset(compared.zero), steps_left=_STEPS_TO_COMPARE)


# An adapter's first matrix has a gradient once its second one was updated, which a warm-up delays;
# what has none for so long is left alone, so that it does not cost time in every step.
_STEPS_TO_COMPARE = 100


def check_unproven(state: State, unproven: UnprovenReplicas) -> UnprovenReplicas | None:
    """`check_first_gradients` of parameters whose gradients were zero until now.

    Raises ConfigError in the same way. Returns those that are still zero.
    """
    pg = state.pg
    parts = [part for part in _replicated(state) if part.name in unproven.names]
    compared = _compare_over_tp(parts, pg)
    counts = torch.tensor([len(compared.different), len(compared.zero)], device=pg.device)
    dist.all_reduce(counts, group=pg.world)
    different, zero = counts.tolist()
    if different:
        _refuse_different(gather_from_all_ranks(compared, pg))
    steps_left = unproven.steps_left - 1
    if not zero or steps_left == 0:
        return None
    return UnprovenReplicas(names=frozenset(compared.zero), steps_left=steps_left)


def _refuse_different(every_rank: Sequence[Compared]) -> None:
    different = sorted({name for of_rank in every_rank for name in of_rank.different})
    if different:
        raise ConfigError(
            f"prepare_model or model function: the gradient of {', '.join(different[:8])} differs "
            "between tensor-parallel ranks, but nothing says that the parameter is cut; set "
            "tensor_model_parallel = True and partition_dim on a parameter that is cut over tp, or "
            "sequence_parallel = True on one whose gradients are to be summed over tp "
            "(docs/extending.md)."
        )


def _report_silent(silent: Sequence[str], received: set[str], pg: ProcessGroups) -> None:
    ranks = gather_from_all_ranks((silent, received), pg)
    names = {name for silent_there, _ in ranks for name in silent_there}
    names -= {name for _, received_there in ranks for name in received_there}
    if names and pg.is_rank_zero:
        shown = ", ".join(sorted(names)[:8])
        warnings.warn(
            f"{len(names)} trainable parameters received no gradient in the first step: {shown}; "
            "freeze what is unused (requires_grad = False), or check that the model uses it.",
            stacklevel=4,
        )


# Replicas of one computation differ by rounding only, parts of a sum by about their own size. The
# second number is of the norm of all these gradients: one that is zero but for rounding may differ.
_TOLERANCES = {torch.float32: (1e-3, 1e-6)}
_HALF_PRECISION_TOLERANCES = (3e-2, 1e-3)


@frozen(kw_only=True)
class Compared:
    """Names of parameters by what the comparison of their gradients over tp found."""

    different: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()  # on every tp rank, or not finite: neither equal nor different


@torch.no_grad()
def _compare_over_tp(parts: Sequence[LocalParameter], pg: ProcessGroups) -> Compared:
    """Compare the gradients of parameters that count as replicated over tp.

    Each gradient is compared by its norm and by its product with a fixed vector, in one all-reduce.
    """
    if pg.tp.size() == 1 or not parts:
        return Compared()
    numbers = torch.stack([_checksums(part.parameter) for part in parts])
    extremes = torch.cat([numbers, -numbers])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=pg.tp)
    largest, negated_smallest = extremes.chunk(2)
    apart = (largest + negated_smallest).max(dim=1).values
    norms = largest[:, 0]
    relative, of_all = _TOLERANCES.get(parts[0].parameter.dtype, _HALF_PRECISION_TOLERANCES)
    allowed = relative * norms + of_all * norms.square().sum().sqrt()
    # a NaN or an infinity is left to the guarded update
    is_finite = torch.isfinite(apart)
    is_different = (apart > allowed) & is_finite
    is_zero = (norms == 0) | ~is_finite
    flags = torch.stack([is_different, is_zero]).tolist()
    return Compared(
        different=_names_where(flags[0], parts),
        zero=_names_where(flags[1], parts),
    )


def _names_where(flags: Sequence[bool], parts: Sequence[LocalParameter]) -> tuple[str, ...]:
    return tuple(part.name for part, flag in zip(parts, flags, strict=True) if flag)


def _checksums(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Norm, and product with a fixed vector of entries of about one; float64 [2]."""
    gradient = parameter.main_grad.reshape(-1).double()  # type: ignore[attr-defined]
    places = torch.arange(gradient.numel(), device=gradient.device, dtype=torch.float64)
    return torch.stack([gradient.norm(), gradient @ torch.cos(places * places)])


def _replicated(state: State) -> list[LocalParameter]:
    """The trained parameters of which every tp rank is to hold the same."""
    return [part for part in _trained(state) if part.dim is None]


def _trained(state: State) -> Iterator[LocalParameter]:
    for chunk in state.chunks:
        for part in local_parameters(chunk, state.config.model, state.pg):
            if part.parameter.requires_grad:
                yield part
