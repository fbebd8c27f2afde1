"""The bytes that the planner says kernels move are those of the operations that torch dispatches.

A training step runs on one CPU process, for two lengths and two depths; differences give the bytes
of one more token in one more layer.
"""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import megafn as mf
from megafn.pure.planner.implementation import IMPLEMENTATIONS
from megafn.pure.planner.records import Layout
from megafn.pure.planner.time.kernels import cross_attention_elements, elementwise_elements
from megafn.pure.planner.time.model_dimensions import model_dimensions

MEGAFN = IMPLEMENTATIONS["megafn"]
HIDDEN = 64
ELEMENT = 2
# What does not move bytes of its own: products and attention are priced apart.
APART = ("mm", "scaled_dot_product")
IN_PLACE = ("_.", "_out")


class Moved(TorchDispatchMode):
    """Bytes of the tensors that each operation reads and writes, unless it returns a view."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        inputs = tensors((args, kwargs))
        outputs = tensors(result)
        name = str(operation)
        stored = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        is_view = all(tensor.untyped_storage().data_ptr() in stored for tensor in outputs)
        in_place = any(mark in name for mark in IN_PLACE)
        if outputs and (in_place or not is_view) and not any(part in name for part in APART):
            moved = inputs + outputs
            self.bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in moved)
        return result


def tensors(tree):
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def config_of(layers, length, **model):
    return mf.TrainConfig(
        model=mf.ModelConfig(
            num_layers=layers,
            hidden_size=HIDDEN,
            num_attention_heads=4,
            seq_length=length,
            vocab_size=64,
            **model,
        ),
        precision=mf.PrecisionConfig(dtype="bf16"),
        micro_batch_size=1,
        global_batch_size=1,
        train_iters=1,
    )


def batch_of(family, length):
    rows = torch.zeros(1, length, dtype=torch.long)
    if family == "gpt":
        return {"tokens": rows, "labels": rows}
    ones = torch.ones_like(rows)
    texts = {"text_enc": rows, "text_dec": rows, "labels": rows, "loss_mask": ones.float()}
    return texts | {"enc_mask": ones, "dec_mask": ones}


def bytes_of_a_step(config):
    family = config.model.family
    batch = [batch_of(family, config.model.seq_length)]
    with mf.init_groups(mf.build_groups(config.parallel, 1, model=config.model)) as pg:
        state = mf.setup(config, pg)
        with Moved() as moved:
            mf.train_step(state, batch, mf.step_fn(family))
    return sum(moved.bytes.values())


def elements_of_a_layer(config_of_depth):
    """Elements for each token, measured: of one layer more and one token more."""
    of_layers = {
        length: bytes_of_a_step(config_of_depth(2, length))
        - bytes_of_a_step(config_of_depth(1, length))
        for length in (128, 256)
    }
    return (of_layers[256] - of_layers[128]) / 128 / ELEMENT


@pytest.mark.parametrize(
    "model, tolerance",
    [
        (dict(), 0.01),
        (dict(activation="relu"), 0.01),
        (dict(activation="swiglu", add_bias_linear=False), 0.01),
        # rotations of heads this narrow read and write their angles too
        (dict(position_embedding="rope"), 0.08),
    ],
    ids=["gelu", "relu", "swiglu", "rope"],
)
def test_a_layer_moves_the_elements_that_the_planner_says(model, tolerance):
    model = dict(position_embedding="none") | model
    measured = elements_of_a_layer(partial(config_of, **model))
    shape = model_dimensions(config_of(1, 128, **model).model)
    computed = sum(elementwise_elements(shape, Layout(), MEGAFN))
    assert computed == pytest.approx(measured, rel=tolerance)


def test_a_decoder_layer_of_t5_moves_those_of_cross_attention_too():
    def config_of_depth(layers, length):
        return config_of(
            1, length, family="t5", num_decoder_layers=layers, max_position_embeddings=256
        )

    shape = model_dimensions(config_of_depth(1, 128).model)
    computed = sum(elementwise_elements(shape, Layout(), MEGAFN))
    computed += sum(cross_attention_elements(shape, Layout()))
    assert computed == pytest.approx(elements_of_a_layer(config_of_depth), rel=0.01)
