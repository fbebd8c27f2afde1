"""Published results of training runs, as configs: what the planner's times are compared with.

They stand in published.csv. A row names its source and the place there; `assumed` lists the columns
that the source does not state. docs/planner-accuracy.md has all of them with their errors.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType

import attrs
from attrs import frozen

from megafn.pure.config.records import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    TrainConfig,
)
from megafn.pure.flops import training_flops
from megafn.pure.planner.implementation import (
    IMPLEMENTATIONS,
    MEGATRON_2021,
    MEGATRON_FP8,
    Implementation,
)
from megafn.pure.planner.layout import layout_of
from megafn.pure.planner.machine import MACHINES, Machine
from megafn.pure.planner.records import Layout


@frozen
class Source:
    """Where rows come from."""

    # As a sentence names it, and where to find it.
    title: str
    reference: str


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "table-1": Source(
            "table 1 of arXiv 2104.04473", "NVIDIA/Megatron-LM, images/cases_april2021.png"
        ),
        "readme": Source("Megatron-LM's README of 2021", "NVIDIA/Megatron-LM, commit f2e5db402c^"),
        "seqsel": Source(
            "table 5 of arXiv 2205.05198", "as quoted in calculon-ai/calculon, llm/validation.py"
        ),
        "vtrain": Source(
            "vTrain's sweeps",
            "VIA-Research/vTrain, data/ground_truth_multi.csv, commit f8dda847 (MIT)",
        ),
        "h100-table": Source(
            "Megatron-LM's H100 table", "NVIDIA/Megatron-LM, images/model_table.png, d98e8a64"
        ),
        "ci": Source(
            "Megatron-LM's CI", "NVIDIA/Megatron-LM, tests/functional_tests, commit d98e8a64"
        ),
        "ci-tiny": Source(
            "tiny models of Megatron-LM's CI",
            "NVIDIA/Megatron-LM, tests/functional_tests, d98e8a64",
        ),
        "nemo-fp8": Source(
            "NeMo 24.07 in fp8",
            "NVIDIA/NeMo, docs/source/performance/performance_summary.md, commit d31653f792^",
        ),
        "bridge-fp8": Source(
            "Megatron-Bridge in fp8",
            "NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary-archive.md, commit 067f987d",
        ),
    }
)

_MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "a100": MACHINES["a100"],
        # four network cards of 200 Gb/s a node
        "a100-4-cards": attrs.evolve(MACHINES["a100"], network_bandwidth=12.5e9),
        "h100": MACHINES["h100"],
        "gb200": attrs.evolve(
            MACHINES["b200"], name="gb200", peak_flops=2500e12, best_matmul_flops=1940e12
        ),
    }
)
_IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {
        "megatron": IMPLEMENTATIONS["megatron"],
        "megatron-2021": MEGATRON_2021,
        "megatron-fp8": MEGATRON_FP8,
    }
)


@frozen(kw_only=True)
class PublishedRow:
    """One measured run."""

    name: str
    # A key of `SOURCES`.
    source: str
    # Where in the source it stands.
    place: str
    config: TrainConfig
    layout: Layout
    machine: Machine
    implementation: Implementation
    # Of one step, measured.
    seconds: float
    # Of the rank that reports them, on the last stage: allocated before a step, and at its peak.
    state_bytes: float | None
    peak_bytes: float | None
    # Settings that the source does not state.
    assumed: tuple[str, ...]


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """All of them, in the order of the file."""
    file = resources.files("megafn.pure.planner.published").joinpath("published.csv")
    lines = file.read_text(encoding="utf-8").splitlines()
    return tuple(_row(cells) for cells in csv.DictReader(lines))


def _row(cells: Mapping[str, str]) -> PublishedRow:
    config = _config(cells)
    parallel = config.parallel
    world_size = parallel.tp * parallel.pp * parallel.cp * int(cells["dp"])
    return PublishedRow(
        name=cells["row"],
        source=cells["source"],
        place=cells["place"],
        config=config,
        layout=layout_of(config, world_size),
        machine=_MACHINES[cells["machine"]],
        implementation=_IMPLEMENTATIONS[cells["implementation"]],
        seconds=_seconds(cells, config, world_size),
        state_bytes=_number(cells["state_bytes"]),
        peak_bytes=_number(cells["peak_bytes"]),
        assumed=tuple(cells["assumed"].split()),
    )


def _number(cell: str) -> float | None:
    return float(cell) if cell else None


def _config(cells: Mapping[str, str]) -> TrainConfig:
    gated = cells["gated"] == "1"
    outer = int(cells["outer_stage_layers"]) if cells["outer_stage_layers"] else None
    model = ModelConfig(
        num_layers=int(cells["layers"]),
        hidden_size=int(cells["hidden"]),
        num_attention_heads=int(cells["heads"]),
        num_query_groups=int(cells["groups"]),
        ffn_hidden_size=int(cells["ffn"]),
        vocab_size=int(cells["vocab"]),
        seq_length=int(cells["sequence"]),
        # models with a gated MLP are Llamas, the others GPTs
        activation="swiglu" if gated else "gelu",
        normalization="RMSNorm" if gated else "LayerNorm",
        position_embedding="rope" if gated else "learned_absolute",
        add_bias_linear=not gated,
        hidden_dropout=float(cells["dropout"]),
        attention_dropout=float(cells["dropout"]),
        tie_word_embeddings=cells["tied"] == "1",
    )
    return TrainConfig(
        model=model,
        parallel=ParallelConfig(
            tp=int(cells["tp"]),
            pp=int(cells["pp"]),
            vpp=int(cells["vpp"]),
            cp=int(cells["cp"]),
            sequence_parallel=cells["sequence_parallel"] == "1",
            num_layers_in_first_pipeline_stage=outer,
            num_layers_in_last_pipeline_stage=outer,
        ),
        optimizer=OptimizerConfig(use_distributed_optimizer=cells["distributed_optimizer"] == "1"),
        precision=PrecisionConfig(dtype="bf16"),
        recompute=RecomputeConfig(granularity=cells["recompute"] or None),
        micro_batch_size=int(cells["micro_batch"]),
        global_batch_size=int(cells["global_batch"]),
        train_iters=1,
    )


def _seconds(cells: Mapping[str, str], config: TrainConfig, world_size: int) -> float:
    """Of one step, from whichever figure the source gives for each device."""
    reported = float(cells["reported"])
    if cells["unit"] == "seconds":
        return reported
    tokens = config.global_batch_size * config.model.seq_length
    if cells["unit"] == "tokens/s":
        return tokens / (reported * world_size)
    return _flops(cells["unit"], config) / (reported * 1e12 * world_size)


def _flops(unit: str, config: TrainConfig) -> float:
    if unit == "TFLOP/s, recomputation counted":
        return _flops_with_recomputation(config)
    return training_flops(config.model, config.global_batch_size) or 0.0


def _flops_with_recomputation(config: TrainConfig) -> float:
    """Equation 3 of arXiv 2104.04473: with one more forward pass of the layers."""
    model = config.model
    hidden = model.hidden_size
    layers = model.num_layers
    length = model.seq_length
    factor = 1 + length / (6 * hidden) + model.vocab_size / (16 * layers * hidden)
    return 96 * config.global_batch_size * length * layers * hidden**2 * factor
