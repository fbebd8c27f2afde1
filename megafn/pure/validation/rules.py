"""What `validate` holds a config to, as data: choices, ranges, fields without effect, and rules between fields.

Fields are dotted paths, several in one string. What layers, stages and batches must satisfy is megatron-core 0.16.1's:
`TransformerConfig`, `get_num_layers_to_build`, `get_transformer_layer_offset`, its schedules and optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf, lcm
from typing import Any

from megafn.pure.layout import AXES
from megafn.pure.optimizers import OPTIMIZERS, readers, refusal, refused_fields
from megafn.pure.schedule import DECAYS, WEIGHT_DECAY_INCR_STYLES, WSD_DECAY_STYLES
from megafn.pure.validation.stage_rules import half_fits, layers_fit, recomputed_fit, split_fits

# What a string may be.
CHOICES = {
    "model.family": ("gpt", "bert", "t5"),
    "model.position_embedding": ("learned_absolute", "rope", "relative", "none"),
    "model.activation": ("gelu", "gelu_tanh", "relu", "swiglu", "geglu", "geglu_tanh"),
    "model.normalization": ("LayerNorm", "RMSNorm"),
    "model.problem_type": (
        "single_label_classification",
        "multi_label_classification",
        "regression",
    ),
    "recompute.granularity": ("selective", "full"),
    "recompute.method": ("uniform", "block"),
    "precision.dtype": ("fp32", "bf16", "fp16"),
    "optimizer.name": tuple(OPTIMIZERS),
    "schedule.decay": DECAYS,
    "schedule.wsd_decay_style": WSD_DECAY_STYLES,
    "schedule.weight_decay_incr_style": WEIGHT_DECAY_INCR_STYLES,
    "data.sampler": ("single", "cyclic"),
    "checkpoint.on_damage": ("raise", "previous"),
    "return_logits": ("last_stage", "every_stage"),
}


def _sources(sources: Any) -> bool:
    blend = sources if isinstance(sources, tuple) else (sources,)
    pairs = [source if isinstance(source, tuple) else (1.0, source) for source in blend]
    return bool(pairs) and all(source and 0 < weight < inf for weight, source in pairs)


# (fields, whether a value is fine, remedy)
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "model.num_layers model.hidden_size model.num_attention_heads model.seq_length model.vocab_size model.num_query_groups "
        "model.kv_channels model.ffn_hidden_size model.max_position_embeddings model.num_decoder_layers model.decoder_seq_length model.num_labels "
        "parallel.tp parallel.pp parallel.vpp parallel.cp parallel.ep parallel.num_layers_in_first_pipeline_stage "
        "parallel.num_layers_in_last_pipeline_stage recompute.num_layers precision.loss_scale_window precision.hysteresis "
        "log.interval checkpoint.interval checkpoint.keep_every micro_batch_size global_batch_size train_iters train_samples eval_interval world_size",
        lambda value: value >= 1,
        "give 1 or more",
    ),
    (
        "schedule.decay_iters schedule.decay_samples schedule.warmup_iters schedule.warmup_samples schedule.wsd_decay_iters "
        "schedule.wsd_decay_samples data.prefetch checkpoint.keep_last stop_after_skipped eval_iters model.num_tokentypes "
        "model.decoder_start_token_id",
        lambda value: value >= 0,
        "give 0 or more",
    ),
    (
        "model.rotary_base model.norm_epsilon optimizer.eps log.peak_tflops precision.initial_loss_scale precision.min_loss_scale "
        "timeout_seconds",
        lambda value: 0 < value < inf,
        "give a finite number above 0",
    ),
    (
        "consumed_samples",
        lambda samples: min(samples) >= 0,
        "give three numbers, 0 or more: of train, valid and test",
    ),
    (
        "model.init_method_std optimizer.clip_grad optimizer.lr_mult schedule.lr schedule.min_lr schedule.init_lr schedule.weight_decay "
        "schedule.start_weight_decay schedule.end_weight_decay",
        lambda value: 0 <= value < inf,
        "give a finite number, 0 or more",
    ),
    (
        "model.hidden_dropout model.attention_dropout optimizer.beta1 optimizer.beta2 optimizer.momentum schedule.warmup_fraction",
        lambda value: 0 <= value < 1,
        "give 0 or more, and less than 1",
    ),
    (
        "optimizer.spike_factor",
        lambda value: 1 < value < inf,
        "give a finite number above 1, or leave it out",
    ),
    ("data.mask_prob", lambda value: 0 < value < 1, "give more than 0 and less than 1"),
    ("data.short_seq_prob", lambda value: 0 <= value <= 1, "give 0 to 1"),
    (
        "model.relative_attention_num_buckets",
        lambda value: value >= 4,
        "give 4 or more: two for each direction",
    ),
    ("model.rotary_percent", lambda value: 0 < value <= 1, "give more than 0, and 1 at most"),
    ("seed", lambda value: 0 <= value < 2**32, "give 0 to 2**32 - 1, the seeds that numpy takes"),
    (
        "data.train data.valid data.test",
        _sources,
        "name at least one source, none of them empty, each weight finite and above 0",
    ),
    (
        "data.split",
        lambda split: (
            len(split) == 3 and all(0 <= weight < inf for weight in split) and split[0] > 0
        ),
        "give three finite weights, for train, valid and test: 0 or more, and that of train above 0",
    ),
    (
        "data.tokenizer data.cache log.tensorboard_dir log.jsonl checkpoint.directory",
        bool,
        "give a name that is not empty",
    ),
)

# (fields, the one that decides whether they are read, its values for which they are); else they must be as by default.
DEAD: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("model.rotary_base model.rotary_percent", "model.position_embedding", ("rope",)),
    (
        "model.num_tokentypes model.bert_binary_head model.num_labels model.problem_type",
        "model.family",
        ("bert",),
    ),
    ("data.mask_prob data.short_seq_prob", "model.family", ("bert", "t5")),
    (
        "data.reset_position_ids data.reset_attention_mask data.eod_mask_loss",
        "model.family",
        ("gpt",),
    ),
    (
        "model.num_decoder_layers model.decoder_seq_length model.decoder_start_token_id parallel.pipeline_model_parallel_split_rank",
        "model.family",
        ("t5",),
    ),
    (
        "model.relative_attention_num_buckets model.relative_attention_max_distance",
        "model.position_embedding",
        ("relative",),
    ),
    ("data.reset_position_ids", "model.position_embedding", ("learned_absolute",)),
    *((f"optimizer.{name}", "optimizer.name", names) for name, names in readers().items()),
    (
        "precision.initial_loss_scale precision.min_loss_scale precision.loss_scale_window precision.hysteresis",
        "precision.dtype",
        ("fp16",),
    ),
    ("recompute.method recompute.num_layers", "recompute.granularity", ("full",)),
)


def _head_size(hidden: int, heads: int, kv_channels: int | None) -> int | None:
    return kv_channels if kv_channels is not None else None if hidden % heads else hidden // heads


def _even_head(embedding: str, *sizes: Any) -> str | None:
    if embedding == "rope" and (head := _head_size(*sizes)) and head % 2:
        return (
            f"it turns a head's channels in pairs, and a head has {head}; give an even kv_channels"
        )


def _rotary_percent(percent: float, embedding: str, *sizes: Any) -> str | None:
    if (
        embedding == "rope"
        and (head := _head_size(*sizes))
        and not head % 2
        and ((width := int(head * percent)) % 2 or not width)
    ):
        return f"it turns {width} of a head's {head} channels, and that must be even and not 0; choose an even number / {head}"


def _sequence(length: int, tp: int, cp: int, sequence_parallel: bool) -> str | None:
    share = lcm(2 * cp if cp > 1 else 1, tp * cp if sequence_parallel else 1)
    if length % share:
        over = [f"cp = {cp} (into 2 * cp pieces)"] * (cp > 1) + [
            f"sequence_parallel (tp = {tp})"
        ] * sequence_parallel
        return f"{' and '.join(over)} cut it; choose a multiple of {share}"


def _problem_type(kind: str | None, labels: int | None, family: str) -> str | None:
    if family == "bert" and kind is not None and labels is None:
        return "it says what num_labels mean; give num_labels or leave it out"
    if family == "bert" and kind == "single_label_classification" and labels == 1:
        return "one label alone is no choice; raise num_labels, or choose regression or multi_label_classification"


def _rows(name: str, rows: int | None, embedding: str, length: int | None) -> str | None:
    if embedding == "learned_absolute" and rows and length and rows < length:
        return f"it must reach {name.partition('.')[2]} = {length}; raise it or shorten that"


def _order(order: str, tp: int, pp: int, cp: int, ep: int, world_size: int) -> str | None:
    """As `build_groups`: each axis once; one of size 1 may be left out."""
    sizes = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "dp": world_size // (tp * pp * cp)}
    axes = order.lower().split("-")
    if (
        len(set(axes)) < len(axes)
        or set(axes) - set(AXES)
        or any(sizes[axis] > 1 for axis in set(AXES) - set(axes))
    ):
        return f"name each of {', '.join(AXES)} once, the fastest first, as in {'-'.join(AXES)}"


def _world(world_size: int, tp: int, pp: int, cp: int) -> str | None:
    if world_size % (size := tp * pp * cp):
        return f"tp * pp * cp = {size} must divide it; start a multiple of {size} processes or change tp, pp or cp"


def _batch(
    batch: int, micro: int, world_size: int, tp: int, pp: int, cp: int, vpp: int
) -> str | None:
    unknown = _world(world_size, tp, pp, cp)  # what is known of dp is judged
    dp = 1 if unknown else world_size // (tp * pp * cp)
    count, rest = divmod(batch, micro * dp)
    if rest:
        factors = (
            f"micro_batch_size = {micro}" if unknown else f"micro_batch_size * dp = {micro} * {dp}"
        )
        return f"{factors} must divide it; choose a multiple of {micro * dp}"
    if vpp > 1 and count % pp:
        return (
            f"these are {count} micro-batches and interleaving (vpp = {vpp}) runs groups of pp = {pp}; choose a multiple of "
            f"micro_batch_size * dp * pp = {micro * dp * pp}"
        )


def _no_valid(split: tuple[float, ...], valid: Any, iters: int) -> str | None:
    if valid is None and iters and not split[1]:
        return "no text is left for evaluations; give the second weight or data.valid, or set eval_iters to 0"


def _consumed(
    samples: tuple[int, int, int], batch: int, iters: int | None, horizon: int | None
) -> str | None:
    horizon = iters * batch if iters is not None else horizon
    if samples[0] % batch:
        return f"a run goes on behind a whole global batch; choose for train a multiple of global_batch_size = {batch}"
    if horizon is not None and samples[0] > horizon:
        return f"the run ends at {horizon} samples of train; give that at most, or lengthen the run"


# (fields, the blamed one first; from their values a remedy, or nothing)
RULES: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("world_size parallel.tp parallel.pp parallel.cp", _world),
    ("parallel.order parallel.tp parallel.pp parallel.cp parallel.ep world_size", _order),
    ("parallel.ep", lambda ep: ep > 1 and "experts are not built; set ep to 1"),
    (
        "parallel.vpp parallel.pp",
        lambda vpp, pp: (
            vpp > 1 and pp == 1 and "interleaving needs pp of 2 or more; raise pp or set vpp to 1"
        ),
    ),
    (
        "parallel.sequence_parallel parallel.tp",
        lambda on, tp: on and tp == 1 and "it has no effect with tp = 1; raise tp or leave it out",
    ),
    (
        "model.num_attention_heads parallel.tp",
        lambda heads, tp: heads % tp and f"tp = {tp} must divide it; choose a multiple of {tp}",
    ),
    (
        "model.num_query_groups parallel.tp",  # fewer groups than tp: megatron-core asks a global for the rank
        lambda groups, tp: (
            groups
            and groups % tp
            and f"tp = {tp} must divide it; choose a multiple of {tp} or a smaller tp"
        ),
    ),
    (
        "model.num_query_groups model.num_attention_heads",
        lambda groups, heads: (
            groups
            and heads % groups
            and f"it must divide num_attention_heads = {heads}; choose a divisor"
        ),
    ),
    (
        "model.hidden_size model.num_attention_heads model.kv_channels",
        lambda hidden, heads, kv: (
            kv is None
            and hidden % heads
            and f"num_attention_heads = {heads} must divide it; choose a multiple of {heads} or give kv_channels, the width of a head"
        ),
    ),
    (
        "model.ffn_hidden_size model.hidden_size parallel.tp",
        lambda ffn, hidden, tp: (
            (ffn or 4 * hidden) % tp
            and f"tp = {tp} must divide it{'' if ffn else f', and it stands for 4 * hidden_size = {4 * hidden}'}; choose a multiple of {tp}"
        ),
    ),
    (
        "model.num_layers parallel.pp parallel.vpp parallel.num_layers_in_first_pipeline_stage "
        "parallel.num_layers_in_last_pipeline_stage model.family model.num_decoder_layers parallel.pipeline_model_parallel_split_rank",
        layers_fit,
    ),
    (
        "model.num_decoder_layers model.family parallel.pp parallel.pipeline_model_parallel_split_rank",
        lambda layers, family, pp, split: (
            family == "t5" and layers is not None and half_fits("decoder", layers, pp, split)
        ),
    ),
    ("parallel.pipeline_model_parallel_split_rank model.family parallel.pp", split_fits),
    (
        "parallel.vpp model.family",
        lambda vpp, family: (
            family == "t5"
            and vpp > 1
            and "megatron-core's interleaved schedule has no place for a second embedding, where T5's decoder begins; set it to 1"
        ),
    ),
    (
        "parallel.cp model.family",
        lambda cp, family: (
            family == "t5"
            and cp > 1
            and "context parallelism is not built for T5, whose two sequences it would cut; set it to 1"
        ),
    ),
    *(
        (
            f"parallel.num_layers_in_{end}_pipeline_stage model.family",
            lambda layers, family: (
                family == "t5"
                and layers is not None
                and "a T5's stages are balanced by pipeline_model_parallel_split_rank; set that and leave this out"
            ),
        )
        for end in ("first", "last")
    ),
    (
        "model.num_query_groups model.family model.num_attention_heads",
        lambda groups, family, heads: (
            family == "t5"
            and groups not in (None, heads)
            and "megatron-core's cross-attention has no grouped queries; leave it out"
        ),
    ),
    (
        "model.position_embedding model.family",
        lambda embedding, family: (
            embedding == "relative"
            and family != "t5"
            and "relative positions are T5's; choose learned_absolute, rope or none"
        ),
    ),
    (
        "model.relative_attention_max_distance model.relative_attention_num_buckets model.position_embedding",
        lambda distance, buckets, embedding: (
            embedding == "relative"
            and distance <= buckets // 2
            and f"half of the {buckets} buckets are for single distances; give more than {buckets // 2}"
        ),
    ),
    *(
        (
            f"parallel.num_layers_in_{end}_pipeline_stage parallel.vpp parallel.pp",
            lambda layers, vpp, pp: (
                layers
                and pp > 1
                and layers % vpp
                and f"vpp = {vpp} must divide it; choose a multiple of {vpp}"
            ),
        )
        for end in ("first", "last")
    ),
    ("model.seq_length parallel.tp parallel.cp parallel.sequence_parallel", _sequence),
    (
        "model.decoder_seq_length parallel.tp parallel.cp parallel.sequence_parallel",
        lambda length, *cut: length and _sequence(length, *cut),
    ),
    *(
        ("model.max_position_embeddings model.position_embedding " + length, partial(_rows, length))
        for length in ("model.seq_length", "model.decoder_seq_length")
    ),
    (
        "model.decoder_start_token_id model.family model.vocab_size",
        lambda token, family, size: (
            family == "t5"
            and token >= size
            and f"it is no token of vocab_size = {size}; give 0 to {size - 1}"
        ),
    ),
    (
        "model.position_embedding model.hidden_size model.num_attention_heads model.kv_channels",
        _even_head,
    ),
    (
        "model.rotary_percent model.position_embedding model.hidden_size model.num_attention_heads model.kv_channels",
        _rotary_percent,
    ),
    (
        "model.bert_binary_head model.num_labels",
        lambda binary, labels: (
            binary
            and labels is not None
            and f"the head of num_labels = {labels} stands in its place; leave one of the two out"
        ),
    ),
    ("model.problem_type model.num_labels model.family", _problem_type),
    (
        "model.tie_word_embeddings model.num_labels",
        lambda tied, labels: (
            not tied
            and labels is not None
            and f"the head of num_labels = {labels} stands in place of the output layer; leave it out"
        ),
    ),
    (
        "model.seq_length model.family data",
        lambda length, family, data: (
            family == "bert"
            and data is not None
            and length < 8
            and "three tokens of it mark the two sentences; give 8 or more"
        ),
    ),
    (
        "model.seq_length model.family data",
        lambda length, family, data: (
            family == "t5"
            and data is not None
            and length < 8
            and "two tokens of it are kept free, and of the rest spans are taken; give 8 or more"
        ),
    ),
    (
        "data model.num_labels model.family",
        lambda data, labels, family: (
            family == "bert"
            and data is not None
            and labels is not None
            and "corpora have no labels for num_labels; leave it out and pass batches"
        ),
    ),
    (
        "global_batch_size micro_batch_size world_size parallel.tp parallel.pp parallel.cp parallel.vpp",
        _batch,
    ),
    (
        "train_samples global_batch_size",
        lambda samples, batch: (
            samples
            and samples < batch
            and f"it does not fill one global batch; give global_batch_size = {batch} or more"
        ),
    ),
    (
        "recompute.num_layers recompute.granularity recompute.method model.num_layers parallel.pp parallel.vpp "
        "parallel.num_layers_in_first_pipeline_stage parallel.num_layers_in_last_pipeline_stage "
        "model.family model.num_decoder_layers parallel.pipeline_model_parallel_split_rank",
        recomputed_fit,
    ),
    (
        "precision.dtype cuda",
        lambda dtype, cuda: (
            dtype == "fp16" and cuda is False and "fp16 runs on CUDA alone; choose bf16 or fp32"
        ),
    ),
    (
        "precision.min_loss_scale precision.initial_loss_scale precision.dtype",
        lambda least, first, dtype: (
            dtype == "fp16" and least > first and f"choose initial_loss_scale = {first} at most"
        ),
    ),
    *((f"optimizer.{name} optimizer.name", partial(refusal, name)) for name in refused_fields()),
    (
        "optimizer.lr_mult optimizer.lr_scale_cond",
        lambda mult, cond: (
            mult != 1
            and cond is None
            and "nothing says which parameters it is for; give lr_scale_cond or leave it out"
        ),
    ),
    (
        "optimizer.lr_scale_cond optimizer.lr_mult",
        lambda cond, mult: (
            cond is not None
            and mult == 1
            and "it has no effect with lr_mult = 1; give another lr_mult or leave it out"
        ),
    ),
    (
        "log.peak_tflops log.everything",
        lambda peak, everything: (
            peak is not None
            and not everything
            and "it has no effect without log.everything; set that or leave it out"
        ),
    ),
    *(
        (
            f"checkpoint.{name} checkpoint.directory",
            lambda value, directory, default=default: (
                value != default
                and directory is None
                and "it has no effect without checkpoint.directory; set that or leave it out"
            ),
        )
        for name, default in (
            ("interval", None),
            ("keep_last", 2),
            ("keep_every", None),
            ("resume", True),
            ("asynchronous", False),
            ("on_damage", "raise"),
        )
    ),
    (
        "checkpoint.keep_every checkpoint.interval",
        lambda every, interval: (
            every
            and (interval is None or every % interval)
            and f"checkpoints are written every interval = {interval} iterations; choose a multiple of that"
        ),
    ),
    ("consumed_samples global_batch_size train_iters train_samples", _consumed),
    (
        "eval_interval eval_iters",
        lambda interval, iters: (
            interval
            and not iters
            and "eval_iters = 0 leaves nothing to evaluate; leave it out or raise eval_iters"
        ),
    ),
    ("data.split data.valid eval_iters", _no_valid),
)
