"""Rotary frequencies and sliding windows are those of the models that brought them."""

from itertools import product
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType

import megafn as mf
from equivalence import tiny
from megafn.runtime.model import layers
from megafn.runtime.model.layers import Attention
from megafn.runtime.model.rotary import rotary_angles_at, rotary_frequencies


def rotary_model(**changes):
    return tiny(position_embedding="rope", **changes).model


@pytest.mark.parametrize("width, percent, base", [(128, 1.0, 1e4), (64, 0.25, 5e5), (12, 0.5, 500)])
def test_angles_are_those_of_megatron_core(width, percent, base):
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    model = rotary_model(kv_channels=width, rotary_percent=percent, rotary_base=base)
    with mf.init_groups(mf.build_groups(mf.ParallelConfig(), 1)) as pg:
        theirs = RotaryEmbedding(
            width, percent, rotary_base=base, use_cpu_initialization=True, cp_group=pg.cp
        )
    frequencies = rotary_frequencies(model)
    assert torch.equal(frequencies, theirs.inv_freq)
    angles = rotary_angles_at(torch.arange(40), model)
    assert torch.equal(angles[:, 0, 0, : len(frequencies)], theirs.get_freqs_non_repeated(40))
    positions = torch.tensor([[0, 3, 7], [5, 5, 39]])
    given = rotary_angles_at(positions, model)
    assert given.shape == (3, 2, 1, 2 * len(frequencies))
    for row in (0, 1):
        assert torch.equal(given[:, row], angles[positions[row], 0])


def test_scaled_frequencies_are_those_of_transformers():
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    changed = 0
    for factor, low, high, length, base in product(
        (8.0, 32.0), (1.0, 2.0), (4.0, 8.0), (64, 8192), (500.0, 5e5)
    ):
        scaling = dict(
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position_embeddings=length,
        )
        theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](
            LlamaConfig(
                head_dim=64,
                max_position_embeddings=131072,
                rope_parameters=dict(rope_type="llama3", rope_theta=base, **scaling),
            ),
            "cpu",
        )
        plain = rotary_model(kv_channels=64, rotary_base=base)
        ours = rotary_model(
            kv_channels=64, rotary_base=base, rope_scaling=mf.RopeScaling(**scaling)
        )
        assert torch.equal(rotary_frequencies(ours), theirs), scaling
        changed += not torch.equal(rotary_frequencies(plain), theirs)
    assert changed == 32


def attention(window, dropout=0.0, mask=AttnMaskType.causal):
    """Core attention of one process."""
    config = tiny(sliding_window=window, attention_dropout=dropout)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        return Attention(mf.transformer_config(config, pg), 1, mask, "self", pg_collection=pg)


def hidden_outside(length, window):
    age = torch.arange(length)[:, None] - torch.arange(length)
    return (age < 0) | (age >= window)


@pytest.mark.parametrize("masked", ["no mask", "mask of keys", "mask of pairs"])
@pytest.mark.parametrize("window", [1, 100, 150, 599])
def test_blocks_of_a_window_are_the_whole_band(window, masked):
    """Also of queries that begin in the middle, as chunks of context parallelism do."""
    draw = torch.Generator().manual_seed(1)
    length = 600
    query, key, value = torch.randn(3, length, 2, 4, 8, generator=draw, dtype=torch.float64)
    hidden = hidden_outside(length, window)
    mask = None
    if masked != "no mask":
        rows = length if masked == "mask of pairs" else 1
        mask = torch.rand(2, 1, rows, length, generator=draw) < 0.2
        if rows > 1:  # such a mask hides what follows
            mask = mask | hidden_outside(length, length)
        hidden = hidden | mask
    module = attention(window)
    ours = module(query, key, value, mask).view(length, 2, 4, 8)
    by_heads = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
    expected = F.scaled_dot_product_attention(*by_heads, ~hidden)
    torch.testing.assert_close(ours.permute(1, 2, 0, 3), expected)

    first = 170
    visible = None if mask is None else ~(mask if mask.size(2) == 1 else mask[:, :, first:400])
    query, key, value = by_heads
    chunk = module._attend_from(query[:, :, first:400], key, value, visible, first)
    torch.testing.assert_close(chunk, expected[:, :, first:400])


def test_a_window_costs_what_it_covers_and_no_band_is_built_without_need():
    query, key, value = torch.randn(3, 600, 2, 4, 8)
    sizes = []
    attend = F.scaled_dot_product_attention

    def watched(query, key, value, mask, *arguments, **named):
        sizes.append((query.size(2), key.size(2), None if mask is None else tuple(mask.shape)))
        return attend(query, key, value, mask, *arguments, **named)

    with mock.patch.object(layers.F, "scaled_dot_product_attention", watched):
        attention(None)(query, key, value, None)
        attention(600)(query, key, value, None)
        assert sizes == [(600, 600, None)] * 2
        sizes.clear()
        attention(200)(query, key, value, None)
        assert sizes == [(200, 200, (200, 200)), (200, 399, (200, 399)), (200, 399, (200, 399))]


def test_a_window_is_refused_where_layers_see_what_follows():
    with pytest.raises(ValueError, match="model.sliding_window = 5: needs causal layers"):
        attention(5, mask=AttnMaskType.padding)


def test_a_window_lowers_the_operations_of_attention():
    model = tiny(sliding_window=10).model
    whole = mf.training_flops(tiny().model, 3)
    hidden_keys = model.seq_length - 10
    saved = 4 * hidden_keys * model.num_attention_heads * model.head_size
    assert mf.training_flops(model, 3) == whole - 3 * 3 * model.seq_length * 4 * saved
    assert mf.training_flops(tiny(sliding_window=32).model, 3) == whole
    assert mf.training_flops(tiny(parallel_residual=True).model, 3) == whole
