"""Model chunks and optimizer of this process, from a config."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.utils import get_model_config

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig
from megafn.pure.layout import build_groups
from megafn.pure.schedule import make_schedule
from megafn.pure.validation.validate import check
from megafn.runtime.families.build import build_chunk
from megafn.runtime.model.layers import check_parallel_layers
from megafn.runtime.model.optimizer import build_optimizer
from megafn.runtime.model.state import State
from megafn.runtime.model.tied_embeddings import finalize_grads
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.parallel.megatron_context import megatron_context


def setup(config: TrainConfig, pg: ProcessGroups, *, model: Callable | None = None) -> State:
    """Model chunks, optimizer and schedule of this process, at iteration 0 (or behind config.consumed_samples).

    model(config, pg, *, pre_process, post_process, vp_stage) -> module builds one chunk; None: config.model_function,
    or `build_chunk`. config.prepare_model, where given, is handed that as a function without arguments.
    Raises ConfigError where the config does not fit the layout, and where the groups are of another one.
    """
    check(config, pg.world_size, cuda=pg.device.type == "cuda")
    if pg.groups != build_groups(config.parallel, pg.world_size, model=config.model):
        raise ConfigError(
            "pg: its groups are those of another layout or model; make them from "
            "mf.build_groups(config.parallel, world_size, model=config.model)."
        )
    vpp, build = config.parallel.vpp, model or config.model_function or build_chunk
    with megatron_context(pg, config.seed, "setup"):
        chunks = []
        for i in range(vpp):
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
                    f"model function or prepare_model: it returned a {type(chunk).__name__}; return the module of one model chunk"
                )
            check_parallel_layers(chunk, pg)
            chunks.append(chunk)
        chunks = [
            DistributedDataParallel(
                get_model_config(chunk),
                DistributedDataParallelConfig(
                    use_distributed_optimizer=config.optimizer.use_distributed_optimizer,
                    grad_reduce_in_fp32=True,
                ),
                chunk,
                pg_collection=pg.collection,
            )
            for chunk in chunks
        ]
        optimizer = build_optimizer(config, chunks, pg)
        for chunk in chunks:
            mcore = get_model_config(chunk)
            mcore.finalize_model_grads_func = finalize_grads
            if (
                config.precision.dtype == "fp16"
            ):  # elsewhere the scale is 1, and a model that knows its optimizer is never freed
                mcore.grad_scale_func = optimizer.scale_loss
    consumed = config.consumed_samples[0]
    return State(
        config=config,
        pg=pg,
        chunks=tuple(chunks),
        optimizer=optimizer,
        schedule=make_schedule(config),
        iteration=consumed // config.global_batch_size,
        consumed_samples=consumed,
    )
