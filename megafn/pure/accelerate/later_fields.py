"""The plugin's fields that accelerate added after 0.27, up to 1.15.

Those that megafn has become arguments of Megatron-LM (`megatron_names`). The others are accepted if
they are off, or ask for what megafn does anyway, and refused by name if not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from megafn.pure.config.problems import Problem


@frozen(kw_only=True)
class LaterField:
    """A field of a later version of accelerate.

    kind: type of its variable MEGATRON_LM_*, or None if it has none.
    default: accelerate's; an object that holds it does not say whether the user set it.
    argument: Megatron-LM's argument that it becomes, or "" if megafn has none.
    done_anyway: values that ask for what megafn does, besides None and False.
    remedy: what to do about any other value.
    """

    kind: type | None = bool
    default: Any = False
    argument: str = ""
    done_anyway: tuple[Any, ...] = ()
    remedy: str = "megafn does not have it; leave it out"


def _forwarded(name: str, kind: type, default: Any) -> LaterField:
    return LaterField(kind=kind, default=default, argument=name)


_STATE = "checkpoints hold the whole state, the optimizer's too; leave it out"
_OWN_STEP = (
    "write it as a function of a megafn.Step, attrs.evolve(megafn.step_fn(family), {}=...), "
    "and give that as custom_train_step_class"
)

LATER_FIELDS: Mapping[str, LaterField] = {
    "use_custom_fsdp": LaterField(
        remedy="megafn shards the optimizer, not the weights; set use_distributed_optimizer"
    ),
    "no_load_optim": LaterField(remedy=_STATE),
    "no_save_optim": LaterField(remedy=_STATE),
    "optimizer_cpu_offload": LaterField(),
    "overlap_cpu_optimizer_d2h_h2d": LaterField(),
    "use_precision_aware_optimizer": LaterField(),
    "attention_backend": LaterField(
        default=True,
        done_anyway=(True,),
        remedy="torch chooses the kernel of attention; leave it out",
    ),
    "attention_softmax_in_fp32": LaterField(default=True, done_anyway=(True,)),
    "calculate_per_token_loss": LaterField(default=True, done_anyway=(True,)),
    "expert_tensor_parallel_size": LaterField(
        kind=int, default=1, done_anyway=(1,), remedy="experts are not built; leave it out"
    ),
    "eod_mask_loss": _forwarded("eod_mask_loss", bool, False),
    "decoder_last_pipeline_num_layers": _forwarded("decoder_last_pipeline_num_layers", int, None),
    "recompute_granularity": _forwarded("recompute_granularity", str, "full"),
    "recompute_method": _forwarded("recompute_method", str, "uniform"),
    "recompute_num_layers": _forwarded("recompute_num_layers", int, 1),
    "expert_model_parallel_size": _forwarded("expert_model_parallel_size", int, 1),
    "context_parallel_size": _forwarded("context_parallel_size", int, 2),
    "attention_dropout": _forwarded("attention_dropout", float, 0.0),
    "hidden_dropout": _forwarded("hidden_dropout", float, 0.0),
    "use_rotary_position_embeddings": _forwarded("use_rotary_position_embeddings", bool, True),
    "custom_megatron_datasets_provider_function": LaterField(
        kind=None, default=None, remedy="give data = DataConfig(...), or batches to megafn.train"
    ),
    "custom_get_batch_function": LaterField(
        kind=None, default=None, remedy=_OWN_STEP.format("batch")
    ),
    "custom_loss_function": LaterField(kind=None, default=None, remedy=_OWN_STEP.format("loss")),
}


def later_field_problem(name: str, value: Any, *, field: str) -> Problem | None:
    """Why a value of the later field `name` is refused, by the name `field`, or None."""
    later = LATER_FIELDS[name]
    accepted = value is None or value is False or value in later.done_anyway
    if later.argument or accepted:
        return None
    return Problem(field, value, later.remedy)


def megatron_argument(name: str, value: Any) -> dict[str, Any]:
    """A later field as an argument of Megatron-LM, {} if it asks for nothing."""
    argument = LATER_FIELDS[name].argument
    if not argument or value is None or value is False:
        return {}
    return {argument: value}
