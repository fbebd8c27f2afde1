"""T5: every layout trains as the single process does; and that one computes what megatron-core's and transformers' T5 do."""
from functools import cache

import attrs
import pytest
import torch
from equivalence import assert_equal, run_layout, tiny

import megafn as mf

SP, DIST = dict(sequence_parallel=True), dict(use_distributed_optimizer=True)
T5 = dict(family="t5", num_layers=4, num_decoder_layers=4, seq_length=24, decoder_seq_length=16, global_batch_size=16)


def pairs(config, iteration):
    """One global batch of sequence pairs as Hugging Face rows: uneven masks on both sides, labels that don't count."""
    draw = torch.Generator().manual_seed(300 + iteration)
    model, rows = config.model, []
    for row in range(config.global_batch_size):
        turn = row // 2 + iteration
        read = [model.seq_length, model.seq_length // 3, 1, model.seq_length - 1][turn % 4]
        write = [1, model.decoder_length, 3, model.decoder_length // 2][(turn + row) % 4]
        ids = torch.randint(0, model.vocab_size, (model.seq_length,), generator=draw)
        labels = torch.randint(0, model.vocab_size, (model.decoder_length,), generator=draw)
        mask, decoder_mask = torch.arange(model.seq_length) < read, torch.arange(model.decoder_length) < write
        if row % 3 == 0:
            mask = mask.flip(0)                                 # padded on the left
        rows.append({"input_ids": ids, "attention_mask": mask.long(), "labels": labels.where(decoder_mask, torch.tensor(-100)),
                     "decoder_attention_mask": decoder_mask.long()})
    return rows


@pytest.fixture(scope="session")
def single(pool):
    """The single process's run of a config, made once a session."""
    return cache(lambda config, data: pool(1, run_layout, config, data)[0])


def obeys(pool, single, processes, base, layout, data=pairs, **tolerances):
    base = T5 | base
    results = pool(processes, run_layout, tiny(**base | layout), data)
    assert_equal(single(tiny(**base), data), results, **tolerances)


LAYOUTS = {                                                     # name: (processes, layout)
    "tp2": (2, dict(tp=2)),
    "tp2-sp": (2, dict(tp=2, **SP)),
    "dp2-dist": (2, DIST),
    "tp2-dp2-dist": (4, dict(tp=2, **DIST)),
    "pp2": (2, dict(pp=2)),
    "pp4": (4, dict(pp=4)),
    "pp2-tp2-sp": (4, dict(pp=2, tp=2, **SP)),
    "pp2-dp2-dist": (4, dict(pp=2, **DIST)),
    "pp4-dp2-dist": (8, dict(pp=4, **DIST)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_the_single_process_does(name, pool, single):
    processes, layout = LAYOUTS[name]
    obeys(pool, single, processes, {}, layout)


LLAMA = dict(position_embedding="rope", activation="swiglu", normalization="RMSNorm", ffn_hidden_size=48, add_bias_linear=False)
RELATIVE = dict(position_embedding="relative", relative_attention_num_buckets=8, relative_attention_max_distance=12)
UNTIED = dict(tie_word_embeddings=False)
SHAPES = {
    "untied": UNTIED,
    "rope": LLAMA,
    "rope-untied": LLAMA | UNTIED,
    "relative": RELATIVE | dict(normalization="RMSNorm", activation="relu", add_bias_linear=False),
    "relative-untied": RELATIVE | UNTIED | dict(activation="geglu_tanh"),
    "no-positions": dict(position_embedding="none"),
    "qk-layernorm": dict(qk_layernorm=True, position_embedding="rope"),
    "unequal-halves": dict(num_layers=2, num_decoder_layers=3),
    "longer-decoder": dict(seq_length=12, decoder_seq_length=20, max_position_embeddings=28),
    "no-lengths": dict(decoder_seq_length=None, num_decoder_layers=None),
}
SPLITS = [(4, 1), (4, 2), (4, 3), (2, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["tp2-pp2-sp", "pp4-split1-dp2-dist"])
def test_every_model_shape_obeys_the_law(shape, layout, pool, single):
    processes, made = (4, dict(tp=2, pp=2, **SP)) if layout == "tp2-pp2-sp" else \
        (8, dict(pp=4, pipeline_model_parallel_split_rank=1, **DIST))
    base = {key: value for key, value in SHAPES[shape].items()}
    if layout != "tp2-pp2-sp" and shape != "unequal-halves":
        base["num_decoder_layers"] = 3
    if shape == "no-lengths" and layout != "tp2-pp2-sp":
        base["num_layers"] = 3
    obeys(pool, single, processes, base, made)
