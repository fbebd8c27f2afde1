"""The built-in optimizers as data: which fields of `OptimizerConfig` each reads and refuses.

`validate` derives its choices and its refusals from this table; runtime.model.optimizer holds the
function that builds each. A custom optimizer needs no entry: pass a function to `setup` or `train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from megafn.pure.config.problems import Problem
from megafn.pure.config.records import OptimizerConfig


@frozen(kw_only=True)
class OptimizerRules:
    """What one built-in optimizer does with the fields of `OptimizerConfig`.

    `fields`: the fields that not every optimizer reads, and this one does. `refuses`: fields that
    must be False (or 0, or None) with this optimizer, each with the remedy.
    """

    name: str
    fields: tuple[str, ...]
    refuses: Mapping[str, str] = field(factory=dict)

    def problems(self, config: OptimizerConfig) -> tuple[Problem, ...]:
        """The fields set in a config that this optimizer refuses.

        >>> print(*OPTIMIZERS["sgd"].problems(OptimizerConfig(use_distributed_optimizer=True)))
        optimizer.use_distributed_optimizer = True: megatron-core's distributed optimizer shards \
Adam only; leave it out or choose adam
        """
        return tuple(
            Problem(f"optimizer.{name}", getattr(config, name), remedy)
            for name, remedy in self.refuses.items()
            if getattr(config, name)
        )


OPTIMIZERS: Mapping[str, OptimizerRules] = {
    "adam": OptimizerRules(name="adam", fields=("beta1", "beta2", "eps")),
    "sgd": OptimizerRules(
        name="sgd",
        fields=("momentum",),
        refuses={
            "use_distributed_optimizer": (
                "megatron-core's distributed optimizer shards Adam only; "
                "leave it out or choose adam"
            )
        },
    ),
}


def readers() -> Mapping[str, tuple[str, ...]]:
    """The optimizers that read a field, for each field that not all of them read.

    >>> readers()["momentum"]
    ('sgd',)
    """
    readers: dict[str, tuple[str, ...]] = {}
    for rules in OPTIMIZERS.values():
        for field_name in rules.fields:
            readers[field_name] = (*readers.get(field_name, ()), rules.name)
    return readers


def refused_fields() -> tuple[str, ...]:
    """The fields that some optimizer refuses.

    >>> refused_fields()
    ('use_distributed_optimizer',)
    """
    return tuple(sorted({name for rules in OPTIMIZERS.values() for name in rules.refuses}))


def refusal(field_name: str, value: Any, optimizer: str) -> str | None:
    """The remedy if an optimizer refuses a field's value, else None.

    >>> refusal("use_distributed_optimizer", True, "adam")
    """
    return OPTIMIZERS[optimizer].refuses.get(field_name) if value else None
