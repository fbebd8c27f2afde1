"""Which rows of which stored tensor a parameter is made of, and rules that say so by its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from attrs import frozen

from megafn.pure.config.records import ModelConfig

Shape = tuple[int, ...]


@frozen(kw_only=True)
class StoredSlice:
    """Some rows of a whole parameter, and where they lie in a stored tensor.

    start, rows: the rows of the parameter (its dimension 0).
    tensor: the name of the stored tensor.
    at: the first of these rows in the stored tensor, along its dimension 0, or 1 if `transposed`.
    transposed: stored as [in, out], as GPT-2 does.
    """

    start: int
    rows: int
    tensor: str
    at: int = 0
    transposed: bool = False


Slices = tuple[StoredSlice, ...]


@frozen(kw_only=True)
class NamedParameter:
    """A parameter of the whole model: what a rule makes slices for.

    layer: its number, as text; "" outside of layers.
    kind: "weight" or "bias".
    """

    layer: str
    kind: str
    shape: Shape
    model: ModelConfig

    def stored(self, template: str) -> str:
        """The stored tensor of this layer and kind: the template has "{layer}" for its number."""
        return f"{template.format(layer=self.layer)}.{self.kind}"


# (a parameter) -> the slices that make it.
SliceRule = Callable[[NamedParameter], Slices]

# (name in the whole model, its shape, model) -> the slices, or () if it is not stored.
SliceFunction = Callable[[str, Shape, ModelConfig], Slices]

_LAYER = re.compile(r"(?P<stack>(?:en|de)coder\.layers)\.(?P<layer>\d+)\.(?P<rest>.*)")


def slices_by_name(rules: Mapping[str, SliceRule]) -> SliceFunction:
    """Slices by a table of rules.

    Its keys are names in the whole model without ".weight" or ".bias", and "*" for a layer's
    number: "decoder.layers.*.mlp.linear_fc1".
    """

    def slices(name: str, shape: Shape, model: ModelConfig) -> Slices:
        module, _, kind = name.rpartition(".")
        layer = ""
        in_layer = _LAYER.fullmatch(module)
        if in_layer:
            layer = in_layer["layer"]
            module = f"{in_layer['stack']}.*.{in_layer['rest']}"
        if module not in rules or kind not in ("weight", "bias"):
            return ()
        return rules[module](NamedParameter(layer=layer, kind=kind, shape=shape, model=model))

    return slices


# ------------------------------------------------------------------------------------ the rules


def renamed(template: str, *, transposed: bool = False) -> SliceRule:
    """The parameter is one stored tensor; transposed: weights, which have two dimensions, are."""

    def rule(parameter: NamedParameter) -> Slices:
        return (
            StoredSlice(
                start=0,
                rows=parameter.shape[0],
                tensor=parameter.stored(template),
                transposed=transposed and len(parameter.shape) == 2,
            ),
        )

    return rule


def stacked(*templates: str) -> SliceRule:
    """The parameter is several stored tensors of one size, one after the other (gate and up)."""

    def rule(parameter: NamedParameter) -> Slices:
        rows = parameter.shape[0] // len(templates)
        return tuple(
            StoredSlice(start=number * rows, rows=rows, tensor=parameter.stored(template))
            for number, template in enumerate(templates)
        )

    return rule


def query_key_value(query: str, key: str, value: str) -> SliceRule:
    """The parameter is [group, (its queries, key, value), head size]; they are stored apart."""

    def rule(parameter: NamedParameter) -> Slices:
        return _by_group(
            parameter.model,
            query=(parameter.stored(query), 0),
            key=(parameter.stored(key), 0),
            value=(parameter.stored(value), 0),
        )

    return rule


def fused_query_key_value(template: str, *, transposed: bool = False) -> SliceRule:
    """The parameter is [group, (its queries, key, value), head size].

    It is stored in one tensor: all queries, then all keys, then all values.
    """

    def rule(parameter: NamedParameter) -> Slices:
        model = parameter.model
        tensor = parameter.stored(template)
        queries = model.num_attention_heads * model.head_size
        keys = model.query_groups * model.head_size
        return _by_group(
            model,
            query=(tensor, 0),
            key=(tensor, queries),
            value=(tensor, queries + keys),
            transposed=transposed and len(parameter.shape) == 2,
        )

    return rule


def key_value(key: str, value: str) -> SliceRule:
    """The parameter is [head, (key, value), head size]; they are stored apart."""

    def rule(parameter: NamedParameter) -> Slices:
        model = parameter.model
        size = model.head_size
        slices = []
        for head in range(model.num_attention_heads):
            for number, template in enumerate((key, value)):
                slices.append(
                    StoredSlice(
                        start=(2 * head + number) * size,
                        rows=size,
                        tensor=parameter.stored(template),
                        at=head * size,
                    )
                )
        return tuple(slices)

    return rule


def _by_group(
    model: ModelConfig,
    query: tuple[str, int],
    key: tuple[str, int],
    value: tuple[str, int],
    *,
    transposed: bool = False,
) -> Slices:
    """Slices of queries, keys and values, each given as (stored tensor, its first row there)."""
    size = model.head_size
    queries = model.num_attention_heads // model.query_groups * size
    slices = []
    start = 0
    for group in range(model.query_groups):
        for (tensor, first), rows in ((query, queries), (key, size), (value, size)):
            slices.append(
                StoredSlice(
                    start=start,
                    rows=rows,
                    tensor=tensor,
                    at=first + group * rows,
                    transposed=transposed,
                )
            )
            start += rows
    return tuple(slices)
