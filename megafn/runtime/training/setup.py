"""Model chunks and optimizer of this process, from a config."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.utils import get_model_config

from megafn.pure.config.problems import ConfigError, Problem, config_error
from megafn.pure.config.records import TrainConfig
from megafn.pure.layout import build_groups
from megafn.pure.schedule import make_schedule
from megafn.pure.validation.validate import check
from megafn.runtime.families.build import build_chunk
from megafn.runtime.model.layers import check_parallel_layers
from megafn.runtime.model.optimizer import build_optimizer, complete_groups
from megafn.runtime.model.state import State
from megafn.runtime.model.weights import initialize_added_weights
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.megatron_context import megatron_context
from megafn.runtime.parallel.object_collectives import errors_on_all_ranks
from megafn.runtime.training.arguments import ModelFunction, OptimizerFunction
from megafn.runtime.training.gradients import finalize_grads
from megafn.runtime.training.model_checks import (
    check_frozen,
    connect_frozen_parts,
    start_alike,
)


def setup(
    config: TrainConfig,
    pg: ProcessGroups,
    *,
    model: ModelFunction | None = None,
    optimizer: OptimizerFunction | None = None,
    for_training: bool = True,
) -> State:
    """Model chunks, optimizer and schedule of this process, after config.consumed_samples.

    model: builds one chunk; None: config.model_function, or `build_chunk`. config.prepare_model, if
    set, gets that as a function without arguments. optimizer: (config, chunks, pg) -> megatron-core
    optimizer, the chunks wrapped in DistributedDataParallel; None: the one that
    config.optimizer.name names.
    for_training: if False, every parameter is frozen, so that there is memory for the weights only:
    no gradients, and nothing that an optimizer keeps. Such a state can be loaded, evaluated,
    exported and can generate; `train_step` cannot use it.
    Raises ConfigError if the config does not fit the layout, the groups are of another one, nothing
    is trainable, only some copies of a shared table are frozen, or checkpoint.pretrained is set,
    which `train` reads. What the model function or prepare_model raises on one rank is raised on
    every rank.
    """
    pretrained = config.checkpoint.pretrained
    if pretrained is not None:
        remedy = (
            "train reads it, setup does not; set it to None here and call "
            f"mf.from_pretrained(mf.setup(config, pg), {pretrained!r})"
        )
        raise config_error([Problem("checkpoint.pretrained", pretrained, remedy)])
    return build_state(config, pg, model=model, optimizer=optimizer, for_training=for_training)


def build_state(
    config: TrainConfig,
    pg: ProcessGroups,
    *,
    model: ModelFunction | None = None,
    optimizer: OptimizerFunction | None = None,
    for_training: bool = True,
) -> State:
    """`setup` for callers that read checkpoint.pretrained themselves."""
    check(config, pg.world_size, cuda=pg.device.type == "cuda" or pg.is_dry_run)
    _check_groups(config, pg)
    build = model or config.model_function or build_chunk
    with megatron_context(pg, config.seed, "setup"):
        with errors_on_all_ranks(pg):
            modules = [_build_chunk(build, config, pg, i) for i in range(config.parallel.vpp)]
        if for_training:
            check_frozen(modules, config, pg)
        else:
            for module in modules:
                module.requires_grad_(False)
        for i, module in enumerate(modules):
            initialize_added_weights(module, config.model, pg, config.seed)
            start_alike(module, config, pg)
            is_last = pg.is_last_stage and i == config.parallel.vpp - 1
            connect_frozen_parts(module, config, is_last=is_last)
        chunks = [_with_gradient_buffers(module, config, pg) for module in modules]
        build_its_optimizer = (optimizer or build_optimizer) if for_training else _no_optimizer
        made = build_its_optimizer(config, chunks, pg)
        _check_optimizer(made)
        complete_groups(made, pg)
    if for_training:
        _connect(chunks, made, config)
    consumed = config.consumed_samples[0]
    return State(
        config=config,
        pg=pg,
        chunks=tuple(chunks),
        optimizer=made,
        schedule=make_schedule(config),
        iteration=consumed // config.global_batch_size,
        consumed_samples=consumed,
        for_training=for_training,
    )


def _check_groups(config: TrainConfig, pg: ProcessGroups) -> None:
    if pg.groups == build_groups(config.parallel, pg.world_size, model=config.model):
        return
    raise ConfigError(
        "pg: its groups are those of another layout or model; make them from "
        "mf.build_groups(config.parallel, world_size, model=config.model)."
    )


def _build_chunk(
    build: ModelFunction, config: TrainConfig, pg: ProcessGroups, i: int
) -> torch.nn.Module:
    """Chunk number i of this pipeline stage, checked."""
    if isinstance(build, torch.nn.Module) or not callable(build):
        raise ConfigError(
            f"model = {type(build).__name__}: must be a function that builds one model chunk; give "
            "one with the arguments of mf.build_chunk"
        )
    vpp = config.parallel.vpp
    provider = partial(
        build,
        config,
        pg,
        pre_process=pg.is_first_stage and i == 0,
        post_process=pg.is_last_stage and i == vpp - 1,
        vp_stage=i if vpp > 1 else None,
    )
    chunk = provider() if config.prepare_model is None else config.prepare_model(provider)
    if not isinstance(chunk, torch.nn.Module):
        raise ConfigError(
            f"model function or prepare_model: it returned a {type(chunk).__name__}; "
            "return the module of one model chunk"
        )
    try:
        get_model_config(chunk)
    except RuntimeError as error:
        raise ConfigError(
            f"model function or prepare_model: the {type(chunk).__name__} that it returned has no "
            "config; set its attribute config to a megatron-core TransformerConfig, or change what "
            "mf.build_chunk returns"
        ) from error
    check_parallel_layers(chunk, pg)
    return chunk


def _with_gradient_buffers(
    chunk: torch.nn.Module, config: TrainConfig, pg: ProcessGroups
) -> DistributedDataParallel:
    """A chunk in megatron-core's DistributedDataParallel, which sums fp32 gradients over dp."""
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
        grad_reduce_in_fp32=True,
    )
    return DistributedDataParallel(get_model_config(chunk), ddp, chunk, pg_collection=pg.collection)


def _no_optimizer(
    config: TrainConfig, chunks: Sequence[torch.nn.Module], pg: ProcessGroups
) -> MegatronOptimizer:
    """The one of a process of which nothing is trained."""
    return ChainedOptimizer([])


def _check_optimizer(optimizer: object) -> None:
    if not isinstance(optimizer, MegatronOptimizer):
        raise ConfigError(
            f"optimizer: it returned a {type(optimizer).__name__}; return a megatron-core "
            "optimizer, for example FP32Optimizer(torch_optimizer, mcore_config, init_state)"
        )


def _connect(
    chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, config: TrainConfig
) -> None:
    """Tell megatron-core's schedules what to do after the backward pass, and how to scale a loss.

    Only fp16 scales its loss. Elsewhere the model does not learn of its optimizer: it would never
    be freed.
    """
    for chunk in chunks:
        mcore = get_model_config(chunk)
        mcore.finalize_model_grads_func = finalize_grads
        if config.precision.dtype == "fp16":
            mcore.grad_scale_func = optimizer.scale_loss
