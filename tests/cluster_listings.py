"""What the ranks of Llama 3 405B on a cluster hold, as they would report it when they save.

Made without tensors, from the shapes of the layers and the way in which megatron-core's distributed
optimizer cuts what a rank holds.
"""

from math import prod

from attrs import frozen

from megafn.pure.checkpoint.boxes import boxes, in_whole
from megafn.pure.checkpoint.write_plan import Listing

HIDDEN = 16_384
FFN = 53_248
HEAD = 128
QUERIES = 128
GROUPS = 8
VOCABULARY = 128_256
LAYERS = 126

KINDS = ("parameter", "exp_avg", "exp_avg_sq")
FP32 = 4


@frozen(kw_only=True)
class Parameter:
    name: str
    shape: tuple  # of the whole
    dim: int | None  # cut over tp along it
    stride: int = 1


@frozen(kw_only=True)
class Cluster:
    """tp changes fastest with the rank, then dp, then pp."""

    tp: int = 8
    dp: int
    pp: int = 16
    is_distributed: bool  # the optimizer

    @property
    def world_size(self):
        return self.tp * self.dp * self.pp


def parameters(stage, pp):
    """Those of a pipeline stage: the first and the last have fewer layers."""
    yield from [
        Parameter(name="embedding.word_embeddings.weight", shape=(VOCABULARY, HIDDEN), dim=0)
    ] * (stage == 0)
    per_stage = -(-LAYERS // pp)
    spare = per_stage * pp - LAYERS
    first = max(0, stage * per_stage - spare // 2)
    last = min(LAYERS, (stage + 1) * per_stage - spare // 2)
    for number in range(first, last):
        yield from layer(f"decoder.layers.{number}")
    if stage == pp - 1:
        yield Parameter(name="decoder.final_layernorm.weight", shape=(HIDDEN,), dim=None)
        yield Parameter(name="output_layer.weight", shape=(VOCABULARY, HIDDEN), dim=0)


def layer(name):
    attention = (QUERIES + 2 * GROUPS) * HEAD
    for norm in ("input_layernorm", "pre_mlp_layernorm"):
        yield Parameter(name=f"{name}.{norm}.weight", shape=(HIDDEN,), dim=None)
    for module, shape, dim, stride in (
        ("self_attention.linear_qkv", (attention, HIDDEN), 0, 1),
        ("self_attention.linear_proj", (HIDDEN, QUERIES * HEAD), 1, 1),
        ("mlp.linear_fc1", (2 * FFN, HIDDEN), 0, 2),
        ("mlp.linear_fc2", (HIDDEN, FFN), 1, 1),
    ):
        yield Parameter(name=f"{name}.{module}.weight", shape=shape, dim=dim, stride=stride)


def listing_of(cluster, rank):
    """What a rank reports."""
    rest, tp_rank = divmod(rank, cluster.tp)
    stage, dp_rank = divmod(rest, cluster.dp)
    held = list(parameters(stage, cluster.pp))
    sizes = [prod(local_shape(parameter, cluster.tp)) for parameter in held]
    start = 0
    end = sum(sizes)
    if cluster.is_distributed:
        shard = -(-end // cluster.dp)
        start = dp_rank * shard
        end = min(end, start + shard)
    holdings = []
    begin = 0
    for parameter, size in zip(held, sizes, strict=True):
        low = max(start - begin, 0)
        high = min(end - begin, size)
        begin += size
        if low < high:
            holdings.extend(holdings_of(parameter, low, high, cluster.tp, tp_rank))
    return Listing(stage=stage, holdings=tuple(holdings))


def local_shape(parameter, tp):
    shape = list(parameter.shape)
    if parameter.dim is not None:
        shape[parameter.dim] //= tp
    return tuple(shape)


def holdings_of(parameter, start, end, tp, tp_rank):
    local = local_shape(parameter, tp)
    places = []
    for box in boxes(local, start, end):
        for place, _ in in_whole(
            box,
            local,
            parameter.shape,
            parameter.dim,
            stride=parameter.stride,
            tp=tp,
            tp_rank=tp_rank,
        ):
            places.append(place)
    for kind in KINDS:
        for place in places:
            yield f"{kind}/{parameter.name}", parameter.shape, place, FP32 * prod(place[1])
