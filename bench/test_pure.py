"""The pure functions, at the size of a cluster: what a launcher or a planner pays for asking."""

import pickle

import attrs

import megafn as mf
from cluster_listings import Cluster, listing_of
from megafn.pure.checkpoint.write_plan import boxes_by_rank, plan_writes

PARALLEL = mf.ParallelConfig(tp=8, pp=8, vpp=2)
CONFIG = mf.TrainConfig(
    model=mf.ModelConfig(
        num_layers=96, hidden_size=12288, num_attention_heads=96, seq_length=2048, vocab_size=51200
    ),
    parallel=PARALLEL,
    schedule=mf.ScheduleConfig(lr=6e-5, warmup_fraction=0.01),
    micro_batch_size=1,
    global_batch_size=1536,
    train_iters=95_000,
)

LLAMA_405B = mf.TrainConfig(
    model=mf.ModelConfig(
        num_layers=126,
        hidden_size=16384,
        num_attention_heads=128,
        num_query_groups=8,
        ffn_hidden_size=53248,
        seq_length=8192,
        vocab_size=128256,
        position_embedding="rope",
        activation="swiglu",
        normalization="RMSNorm",
        add_bias_linear=False,
        tie_word_embeddings=False,
    ),
    precision=mf.PrecisionConfig(dtype="bf16"),
    micro_batch_size=1,
    global_batch_size=2048,
    train_iters=1000,
)


def test_build_groups_of_1024_ranks(benchmark):
    groups = benchmark(mf.build_groups, PARALLEL, 1024)
    assert len(groups.dp) == 64 and groups.dp_size == 16


def test_build_groups_of_131072_ranks(benchmark):
    groups = benchmark(mf.build_groups, PARALLEL, 131_072)
    assert len(groups.dp) == 64 and groups.dp_size == 2048


def test_plan_a_checkpoint_of_405b_on_16384_ranks(benchmark):
    """What rank zero does with the reports of all ranks."""
    cluster = Cluster(dp=128, is_distributed=True)
    reports = [pickle.dumps(listing_of(cluster, rank)) for rank in range(cluster.world_size)]

    def plan():
        writes = plan_writes([pickle.loads(report) for report in reports])
        return boxes_by_rank(writes, cluster.world_size)

    assert len(benchmark.pedantic(plan, rounds=3)) == 16_384


def test_validate_a_config_that_fits(benchmark):
    assert benchmark(mf.validate, CONFIG, 1024) == ()


def test_validate_a_config_that_does_not(benchmark):
    astray = attrs.evolve(CONFIG, parallel=attrs.evolve(PARALLEL, tp=7), global_batch_size=1000)
    assert benchmark(mf.validate, astray, 1024)


def test_make_schedule(benchmark):
    assert callable(benchmark(mf.make_schedule, CONFIG))


def test_call_a_schedule(benchmark):
    assert 0 < benchmark(mf.make_schedule(CONFIG), 1536 * 50_000).lr < 6e-5


def test_sample_indices_of_one_rank(benchmark):
    share = benchmark(
        mf.sample_indices,
        1536 * 50_000,
        style="cyclic",
        seed=1,
        num_samples=10_000_000,
        global_batch_size=1536,
        micro_batch_size=1,
        dp_rank=3,
        dp=16,
    )
    assert len(share) == 96


def test_sample_indices_among_10_to_the_12(benchmark):
    share = benchmark(
        mf.sample_indices,
        10**12 - 1536,
        style="cyclic",
        seed=1,
        num_samples=10**12,
        global_batch_size=1536,
        micro_batch_size=1,
        dp_rank=3,
        dp=16,
    )
    assert len(share) == 96


def test_pipeline_order_of_interleaved_stages(benchmark):
    assert len(benchmark(mf.pipeline_order, pp=8, vpp=2, num_micro_batches=96)) == 8


def test_rank_all_layouts_of_llama_405b_on_16384_devices(benchmark):
    ranking = benchmark(mf.rank_plans, LLAMA_405B, mf.MACHINES["h100"], 16384)
    layouts = len(ranking.plans) + len(ranking.refused)
    assert layouts > 10_000
    # The goal is a second, for all of them.
    benchmark.extra_info["layouts"] = layouts
