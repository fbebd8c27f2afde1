"""The families of models as data: what a micro-batch of each goes through, and which module a stage of it is."""

from __future__ import annotations

from attrs import frozen

from megafn.pure.config.problems import ConfigError
from megafn.runtime.families.bert import (
    BertChunk,
    bert_batch,
    bert_forward,
    bert_loss,
    weigh_sentence_pairs,
)
from megafn.runtime.families.gpt import gpt_batch, gpt_forward
from megafn.runtime.families.step import Step
from megafn.runtime.families.t5 import t5_batch, t5_forward
from megafn.runtime.families.t5_chunk import EncoderDecoderChunk
from megafn.runtime.model.chunk import Chunk
from megafn.runtime.model.losses import token_loss


@frozen(kw_only=True)
class Family:
    """A family's step, and the module of its model chunks, built as `Chunk` is."""

    step: Step
    stage: type[Chunk]


FAMILIES = {
    "gpt": Family(step=Step(batch=gpt_batch, forward=gpt_forward, loss=token_loss), stage=Chunk),
    "bert": Family(
        step=Step(
            batch=bert_batch,
            forward=bert_forward,
            loss=bert_loss,
            prepare_global_batch=weigh_sentence_pairs,
        ),
        stage=BertChunk,
    ),
    "t5": Family(
        step=Step(batch=t5_batch, forward=t5_forward, loss=token_loss), stage=EncoderDecoderChunk
    ),
}


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ConfigError(
            f"model.family = {name!r}: choose one of {', '.join(map(repr, FAMILIES))}, or pass a Step of your own."
        )
    return FAMILIES[name]


def step_fn(family: str) -> Step:
    """The built-in functions of a family. Raises ConfigError for a family that is not there.

    >>> step_fn("gpt").loss.__name__
    'token_loss'
    """
    return _family(family).step
