"""The families of models as data: what a micro-batch of each goes through, and which module a stage of it is."""
from __future__ import annotations

from attrs import frozen

from megafn.pure.config import ConfigError, TrainConfig
from megafn.runtime.bert import BertStage, bert_batch, bert_forward, bert_loss, bert_whole
from megafn.runtime.encoder_decoder import EncoderDecoderStage
from megafn.runtime.groups import ProcessGroups
from megafn.runtime.layers import transformer_config
from megafn.runtime.losses import token_loss
from megafn.runtime.models import Stage
from megafn.runtime.steps import Step, gpt_batch, gpt_forward
from megafn.runtime.t5 import t5_batch, t5_forward
from megafn.runtime.weights import initialize_weights


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


def build_stage(config: TrainConfig, pg: ProcessGroups, *, pre_process: bool, post_process: bool, vp_stage: int | None) -> Stage:
    """The built-in model function: one chunk of the family's model, initialised by (config.seed, parameter name).

    A user's own model function takes the same arguments and returns a module with what megatron-core's schedules
    ask of it (`config`, `set_input_tensor`, `model_type`, ...); wrapping this one is the easy way.
    """
    mcore = transformer_config(config, pg)
    mcore.init_method = mcore.output_layer_init_method = mcore.embedding_init_method = lambda weight: weight   # ours follows
    stage = _family(config.model.family).stage(config, mcore, pg, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
    stage.to(device=pg.device, dtype=mcore.params_dtype)
    initialize_weights(stage, config.model, pg, config.seed)
    return stage
