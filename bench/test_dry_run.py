"""A dry run of models of real size, each on one core without their memory."""

import attrs

import megafn as mf
from test_pure import CONFIG, LLAMA_405B

GPT_3 = attrs.evolve(
    CONFIG,
    parallel=mf.ParallelConfig(tp=8, pp=8, sequence_parallel=True),
    optimizer=mf.OptimizerConfig(use_distributed_optimizer=True),
    precision=mf.PrecisionConfig(dtype="bf16"),
    global_batch_size=256,
)


def test_gpt_3_on_1024_ranks(benchmark):
    """The goal is 60 s."""
    report = benchmark.pedantic(mf.dry_run, args=(GPT_3, 1024), rounds=1)
    assert 2.5e9 < report.num_parameters < 3.0e9
    assert report.memory.peak.total < 60e9
    assert report.messages["tp"].bytes > report.messages["pp"].bytes > 0


def test_llama_3_405b_on_16384_ranks(benchmark):
    parallel = mf.ParallelConfig(
        tp=8,
        pp=16,
        sequence_parallel=True,
        num_layers_in_first_pipeline_stage=7,
        num_layers_in_last_pipeline_stage=7,
    )
    config = attrs.evolve(
        LLAMA_405B,
        parallel=parallel,
        optimizer=mf.OptimizerConfig(use_distributed_optimizer=True),
    )
    report = benchmark.pedantic(mf.dry_run, args=(config, 16384), rounds=1)
    assert report.num_parameters > 3e9
