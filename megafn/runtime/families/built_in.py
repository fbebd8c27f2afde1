"""The families of models as data: what a micro-batch of each goes through, and which module a stage of it is."""
from __future__ import annotations

from attrs import frozen

from megafn.pure.config.problems import ConfigError
from megafn.runtime.families.bert import BertStage, bert_batch, bert_forward, bert_loss, bert_whole
from megafn.runtime.families.gpt import gpt_batch, gpt_forward
from megafn.runtime.families.step import Step
from megafn.runtime.families.t5 import t5_batch, t5_forward
from megafn.runtime.families.t5_chunk import EncoderDecoderStage
from megafn.runtime.model.chunk import Stage
from megafn.runtime.model.losses import token_loss


@frozen(kw_only=True)
class Family:
    """A family's step, and the module of its model chunks, built as `Stage` is."""

    step: Step
    stage: type[Stage]


FAMILIES = {
    "gpt": Family(step=Step(batch=gpt_batch, forward=gpt_forward, loss=token_loss), stage=Stage),
    "bert": Family(step=Step(batch=bert_batch, forward=bert_forward, loss=bert_loss, whole=bert_whole), stage=BertStage),
    "t5": Family(step=Step(batch=t5_batch, forward=t5_forward, loss=token_loss), stage=EncoderDecoderStage),
}


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ConfigError(f"model.family = {name!r}: choose one of {', '.join(map(repr, FAMILIES))}, or pass a Step of your own.")
    return FAMILIES[name]


def step_fn(family: str) -> Step:
    """The built-in functions of a family. Raises ConfigError for a family that is not there.

    >>> step_fn("gpt").loss.__name__
    'token_loss'
    """
    return _family(family).step


