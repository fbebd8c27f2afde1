"""How many messages a step sends over each axis: the table in docs/parallelism.md, in code."""

from collections import Counter, defaultdict

import pytest

import megafn as mf
from equivalence import share, short, uneven
from megafn.pure.layout import GROUP_KINDS
from megafn.runtime.dry_run.count import counting
from megafn.runtime.dry_run.records import Messages

FULL = mf.RecomputeConfig(granularity="full", method="uniform", num_layers=1)
LAYOUTS = {
    "tp2-pp2": dict(tp=2, pp=2),
    "tp2-pp2-sp-untied": dict(tp=2, pp=2, sequence_parallel=True, tie_word_embeddings=False),
    "tp2-cp2-sp": dict(tp=2, cp=2, sequence_parallel=True),
    "tp2-cp2-full": dict(tp=2, cp=2, recompute=FULL),
    "pp4-vpp2": dict(pp=4, vpp=2, num_layers=8),
    "cp2-dp2-dist": dict(cp=2, use_distributed_optimizer=True),
    "pp2-dp2": dict(pp=2),
}
FLOAT = 4  # bytes


def messages_of(layouts):
    """For each layout what this rank sends in its second step, and what it should send."""
    return [
        messages_of_layout(short(vocab_size=96, global_batch_size=8, **layout))
        for layout in layouts
    ]


def messages_of_layout(config):
    groups = mf.build_groups(config.parallel, mf.world_size())
    with mf.init_groups(groups, timeout_seconds=60) as pg:
        state = mf.setup(config, pg)
        step = mf.step_fn("gpt")
        # the first step compares parameters and names of reports, once
        state, _ = mf.train_step(state, share(uneven(config, 0), config, pg), step)
        batch = share(uneven(config, 1), config, pg)
        with counting() as counter:
            counter.start_step(state)
            state, _ = mf.train_step(state, batch, step)
            counter.end_step(state)
        expected = expected_messages(state, len(batch))
        sent = {kind: found for kind, found in counter.messages(pg).items() if found.count > 0}
        return sent, sums_by_kind(expected, pg)


def sums_by_kind(messages, pg):
    """The messages over groups of several ranks.

    Groups of the same ranks are one, which has the name of the first of them.
    """
    names = {}
    for kind in GROUP_KINDS:
        names.setdefault(mf.group_of(pg.groups, kind.name, pg.rank), kind.name)
    counts = Counter()
    sizes = defaultdict(Counter)
    for (kind, collective, size), count in messages.items():
        ranks = mf.group_of(pg.groups, kind, pg.rank)
        if count > 0 and len(ranks) > 1:
            counts[names[ranks]] += count
            sizes[names[ranks]][collective] += count * size
    return {
        name: Messages(count=count, bytes=sizes[name].total(), by_collective=dict(sizes[name]))
        for name, count in counts.items()
    }


def expected_messages(state, micro_batches):
    """The table, with sizes: counts of (group, collective, bytes)."""
    expected = Counter()
    per_micro_batch = tensor_parallel(state) + context_parallel(state) + pipeline_parallel(state)
    for key, count in per_micro_batch.items():
        expected[key] += count * micro_batches
    return expected + once_a_step(state)


def forward_passes(state):
    return 2 if state.config.recompute.granularity == "full" else 1


def layers_of_stage(state):
    return state.config.model.num_layers // state.config.parallel.pp


def hidden_bytes(state):
    """Of a hidden state that is not cut over tp."""
    config = state.config
    tokens = config.model.seq_length // config.parallel.cp * config.micro_batch_size
    return tokens * config.model.hidden_size * FLOAT


def tensor_parallel(state):
    layers = layers_of_stage(state)
    hidden = hidden_bytes(state)
    pg = state.pg
    messages = Counter()
    messages["tp", "all_reduce", hidden] += pg.is_first_stage
    if state.config.parallel.sequence_parallel:
        messages["tp", "all_gather", hidden] += layers * (2 * forward_passes(state) + 4)
        messages["tp", "reduce_scatter", hidden] += layers * (2 * forward_passes(state) + 2)
        messages["tp", "all_gather", hidden] += pg.is_first_stage + 2 * pg.is_last_stage
        messages["tp", "reduce_scatter", hidden] += pg.is_last_stage
    else:
        messages["tp", "all_reduce", hidden] += layers * (2 * forward_passes(state) + 2)
        messages["tp", "all_reduce", hidden] += pg.is_last_stage
    three_numbers_a_token = 3 * hidden // state.config.model.hidden_size * pg.tp.size()
    messages["tp", "all_gather", three_numbers_a_token] += pg.is_last_stage
    return messages


def context_parallel(state):
    layers = layers_of_stage(state)
    parallel = state.config.parallel
    keys_and_values = 2 * hidden_bytes(state) * parallel.cp // parallel.tp
    messages = Counter()
    messages["cp", "all_gather", keys_and_values] += layers * forward_passes(state)
    messages["cp", "reduce_scatter", keys_and_values] += layers
    return messages


def pipeline_parallel(state):
    parallel = state.config.parallel
    size = hidden_bytes(state) // (parallel.tp if parallel.sequence_parallel else 1)
    messages = Counter()
    for number in range(parallel.vpp):
        is_first = state.pg.is_first_stage and number == 0
        is_last = state.pg.is_last_stage and number == parallel.vpp - 1
        # to the next chunk and from the one before; gradients the other way
        for has_neighbour in (not is_last, not is_first):
            messages["pp", "send", size] += has_neighbour
            messages["pp", "recv", size] += has_neighbour
    return messages


def once_a_step(state):
    config = state.config
    pg = state.pg
    hidden = config.model.hidden_size
    messages = Counter()
    messages["world", "all_reduce", 4 * 8] += 1
    messages["pp", "broadcast", FLOAT] += 1
    messages["dp_cp", "all_reduce", FLOAT] += 1
    for chunk in state.chunks:
        for buffer in chunk.buffers:
            size = buffer.grad_data.nbytes
            if config.optimizer.use_distributed_optimizer:
                messages["dp_cp", "reduce_scatter", size] += 1
                messages["dp_cp", "all_gather", size] += 1
            else:
                messages["dp_cp", "all_reduce", size] += 1
    if config.model.tie_word_embeddings and (pg.is_first_stage or pg.is_last_stage):
        table = config.model.vocab_size // config.parallel.tp * hidden * FLOAT
        messages["embd", "all_reduce", table] += 1
    if config.parallel.sequence_parallel:
        # two norms with scale and bias, and two biases, in each layer; and the last norm
        vectors = 6 * layers_of_stage(state) + 2 * pg.is_last_stage
        messages["tp", "all_reduce", vectors * hidden * FLOAT] += 1
    return messages


@pytest.mark.timeout(200)
def test_a_step_sends_the_messages_of_the_table(pool):
    for of_rank in pool(4, messages_of, list(LAYOUTS.values())):
        for name, (sent, expected) in zip(LAYOUTS, of_rank, strict=True):
            assert sent == expected, name
