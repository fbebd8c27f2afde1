"""What `validate` requires of a config of any family: choices, ranges, rules between fields.

Fields are dotted paths, several in one string. What only one family requires is in its spec
(`pure.families`). What layers, stages and batches must satisfy is megatron-core 0.16.1's:
`TransformerConfig`, its schedules and optimizers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

from megafn.pure.config.field_types import default_of
from megafn.pure.config.records import CheckpointConfig, DataConfig, ParameterCondition, Sources
from megafn.pure.config.rule import Rule, rule
from megafn.pure.config.sequence_unit import sequence_unit
from megafn.pure.layout import order_problem, world_size_problem
from megafn.pure.optimizers import OPTIMIZERS, readers, refusal, refused_fields
from megafn.pure.schedule import DECAYS, WEIGHT_DECAY_INCR_STYLES, WSD_DECAY_STYLES

_DEFAULT_SPLIT: tuple[float, ...] = default_of(DataConfig, "split")

# What a string may be.
CHOICES = {
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


# ------------------------------------------------------------------------------------- ranges


def _sources_are_named(sources: Sources) -> bool:
    blend = sources if isinstance(sources, tuple) else (sources,)
    pairs = [source if isinstance(source, tuple) else (1.0, source) for source in blend]
    return bool(pairs) and all(source and 0 < weight < inf for weight, source in pairs)


def _is_split(split: tuple[float, ...]) -> bool:
    finite = all(0 <= weight < inf for weight in split)
    return len(split) == 3 and finite and split[0] > 0


def _is_expanded(path: str) -> bool:
    return not path.startswith("~") and re.search(r"\$(\w|\{)", path) is None


# (fields, whether a value is in the range, what is required)
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "model.num_layers model.hidden_size model.num_attention_heads model.seq_length "
        "model.vocab_size model.num_query_groups model.kv_channels model.ffn_hidden_size "
        "model.max_position_embeddings model.num_decoder_layers model.decoder_seq_length "
        "model.num_labels model.sliding_window "
        "model.rope_scaling.original_max_position_embeddings "
        "parallel.tp parallel.pp parallel.vpp parallel.cp parallel.ep "
        "parallel.num_layers_in_first_pipeline_stage parallel.num_layers_in_last_pipeline_stage "
        "recompute.num_layers precision.loss_scale_window precision.hysteresis log.interval "
        "checkpoint.interval checkpoint.keep_every micro_batch_size global_batch_size "
        "train_iters train_samples eval_interval world_size",
        lambda value: value >= 1,
        "must be at least 1",
    ),
    (
        "model.num_tokentypes model.decoder_start_token_id "
        "schedule.decay_iters schedule.decay_samples schedule.warmup_iters "
        "schedule.warmup_samples schedule.wsd_decay_iters schedule.wsd_decay_samples "
        "data.prefetch checkpoint.keep_last stop_after_skipped eval_iters",
        lambda value: value >= 0,
        "must be at least 0",
    ),
    (
        "model.rotary_base model.softmax_scale model.rope_scaling.low_freq_factor "
        "model.rope_scaling.high_freq_factor model.norm_epsilon optimizer.eps log.peak_tflops "
        "precision.initial_loss_scale precision.min_loss_scale timeout_seconds",
        lambda value: 0 < value < inf,
        "must be finite and above 0",
    ),
    (
        "consumed_samples",
        lambda samples: min(samples) >= 0,
        "must be three numbers of at least 0: samples of train, valid and test",
    ),
    (
        "model.init_method_std optimizer.clip_grad optimizer.lr_mult schedule.lr schedule.min_lr "
        "schedule.init_lr schedule.weight_decay schedule.start_weight_decay "
        "schedule.end_weight_decay",
        lambda value: 0 <= value < inf,
        "must be finite and at least 0",
    ),
    (
        "model.hidden_dropout model.attention_dropout optimizer.beta1 optimizer.beta2 "
        "optimizer.momentum schedule.warmup_fraction",
        lambda value: 0 <= value < 1,
        "must be at least 0 and less than 1",
    ),
    (
        "optimizer.spike_factor",
        lambda value: 1 < value < inf,
        "must be finite and above 1; change it or leave it out",
    ),
    ("data.mask_prob", lambda value: 0 < value < 1, "must be above 0 and less than 1"),
    ("data.short_seq_prob", lambda value: 0 <= value <= 1, "must be between 0 and 1"),
    (
        "model.relative_attention_num_buckets",
        lambda value: value >= 4,
        "must be at least 4, two for each direction",
    ),
    ("model.rotary_percent", lambda value: 0 < value <= 1, "must be above 0 and at most 1"),
    (
        "model.rope_scaling.factor",
        lambda value: 1 <= value < inf,
        "must be finite and at least 1",
    ),
    (
        "seed",
        lambda value: 0 <= value < 2**32,
        "must be between 0 and 2**32 - 1, the seeds that numpy takes",
    ),
    (
        "data.train data.valid data.test",
        _sources_are_named,
        "must name at least one source, none of them empty, each weight finite and above 0",
    ),
    (
        "data.split",
        _is_split,
        "must be three finite weights of at least 0, for train (above 0), valid and test",
    ),
    (
        "data.tokenizer data.eod_token data.json_key data.cache log.tensorboard_dir log.jsonl "
        "checkpoint.directory",
        bool,
        "must not be empty",
    ),
    (
        "data.cache log.tensorboard_dir log.jsonl checkpoint.directory",
        _is_expanded,
        "must not begin with ~ or hold a $VARIABLE, which only a shell expands; write the path out",
    ),
    (
        "checkpoint.resume",
        lambda value: isinstance(value, bool) or value == "must",
        'must be true, false or "must"',
    ),
)


# ----------------------------------------------------------------------- fields without effect

# (fields, the one that decides whether they are read, its values for which they are); for its other
# values they must be left at their defaults. Likewise for the fields that only some families read.
DEAD: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "model.rotary_base model.rotary_percent model.rope_scaling model.layers_without_rope",
        "model.position_embedding",
        ("rope",),
    ),
    (
        "model.relative_attention_num_buckets model.relative_attention_max_distance",
        "model.position_embedding",
        ("relative",),
    ),
    ("data.reset_position_ids", "model.position_embedding", ("learned_absolute",)),
    *((f"optimizer.{name}", "optimizer.name", names) for name, names in readers().items()),
    (
        "precision.initial_loss_scale precision.min_loss_scale "
        "precision.loss_scale_window precision.hysteresis",
        "precision.dtype",
        ("fp16",),
    ),
    ("recompute.method recompute.num_layers", "recompute.granularity", ("full",)),
    (
        "schedule.min_lr",
        "schedule.decay",
        tuple(decay for decay in DECAYS if decay != "constant"),
    ),
    ("schedule.wsd_decay_style", "schedule.decay", ("wsd",)),
    ("schedule.weight_decay", "schedule.weight_decay_incr_style", ("constant",)),
)


# ------------------------------------------------------------------------- rules: the layout


world_size_fits = Rule(
    fields=("world_size", "parallel.tp", "parallel.pp", "parallel.cp"),
    remedy=world_size_problem,
)


@rule("parallel.order", "parallel.tp", "parallel.pp", "parallel.cp", "parallel.ep", "world_size")
def order_names_each_axis(
    order: str, tp: int, pp: int, cp: int, ep: int, world_size: int
) -> str | None:
    sizes = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "dp": world_size // (tp * pp * cp)}
    return order_problem(order, sizes)


@rule("parallel.ep")
def no_expert_parallelism(ep: int) -> str | None:
    return "experts are not built; set ep to 1" if ep > 1 else None


@rule("parallel.vpp", "parallel.pp")
def interleaving_needs_a_pipeline(vpp: int, pp: int) -> str | None:
    if vpp > 1 and pp == 1:
        return "interleaving needs pp of at least 2; raise pp or set vpp to 1"
    return None


@rule("parallel.sequence_parallel", "parallel.tp")
def sequence_parallelism_needs_tp(sequence_parallel: bool, tp: int) -> str | None:
    if sequence_parallel and tp == 1:
        return "has no effect with tp = 1; raise tp or leave it out"
    return None


# ------------------------------------------------------------------------- rules: the model


@rule("model.num_attention_heads", "parallel.tp")
def heads_can_be_cut(heads: int, tp: int) -> str | None:
    if heads % tp:
        return f"tp = {tp} must divide it; choose a multiple of {tp}"
    return None


@rule("model.num_query_groups", "parallel.tp")
def query_groups_can_be_cut(groups: int | None, tp: int) -> str | None:
    """With fewer groups than tp, megatron-core would ask a global for the rank."""
    if groups and groups % tp:
        return f"tp = {tp} must divide it; choose a multiple of {tp} or a smaller tp"
    return None


@rule("model.num_query_groups", "model.num_attention_heads")
def query_groups_divide_heads(groups: int | None, heads: int) -> str | None:
    if groups and heads % groups:
        return f"must divide num_attention_heads = {heads}; choose a divisor"
    return None


@rule("model.hidden_size", "model.num_attention_heads", "model.kv_channels")
def heads_divide_the_hidden_size(hidden: int, heads: int, kv_channels: int | None) -> str | None:
    if kv_channels is None and hidden % heads:
        return (
            f"num_attention_heads = {heads} must divide it; choose a multiple of {heads} "
            "or give kv_channels, the width of a head"
        )
    return None


@rule("model.ffn_hidden_size", "model.hidden_size", "parallel.tp")
def mlp_can_be_cut(ffn: int | None, hidden: int, tp: int) -> str | None:
    if (ffn or 4 * hidden) % tp == 0:
        return None
    default = "" if ffn else f", and it defaults to 4 * hidden_size = {4 * hidden}"
    return f"tp = {tp} must divide it{default}; choose a multiple of {tp}"


@rule(
    "model.relative_attention_max_distance",
    "model.relative_attention_num_buckets",
    "model.position_embedding",
)
def distances_reach_beyond_single_buckets(
    distance: int, buckets: int, embedding: str
) -> str | None:
    if embedding == "relative" and distance <= buckets // 2:
        return (
            f"half of the {buckets} buckets are for single distances; must be above {buckets // 2}"
        )
    return None


@rule("model.seq_length", "parallel.tp", "parallel.cp", "parallel.sequence_parallel")
def sequence_can_be_cut(length: int, tp: int, cp: int, sequence_parallel: bool) -> str | None:
    unit = sequence_unit(tp, cp, sequence_parallel)
    if length % unit == 0:
        return None
    cuts = []
    if cp > 1:
        cuts.append(f"cp = {cp} (into 2 * cp pieces)")
    if sequence_parallel:
        cuts.append(f"sequence_parallel (tp = {tp})")
    verb = "cuts" if len(cuts) == 1 else "cut"
    return f"{' and '.join(cuts)} {verb} it; choose a multiple of {unit}"


@rule("model.max_position_embeddings", "model.position_embedding", "model.seq_length")
def position_table_reaches(rows: int | None, embedding: str, length: int) -> str | None:
    if embedding == "learned_absolute" and rows and rows < length:
        return f"must be at least seq_length = {length}; raise it or shorten that"
    return None


HEAD_SIZE = ("model.hidden_size", "model.num_attention_heads", "model.kv_channels")


def _head_size(hidden: int, heads: int, kv_channels: int | None) -> int | None:
    """The width of a head, or None if the heads do not divide the hidden size."""
    if kv_channels is not None:
        return kv_channels
    return None if hidden % heads else hidden // heads


@rule("model.position_embedding", *HEAD_SIZE)
def rotary_heads_are_even(
    embedding: str, hidden: int, heads: int, kv_channels: int | None
) -> str | None:
    head = _head_size(hidden, heads, kv_channels)
    if embedding == "rope" and head and head % 2:
        return (
            f"rotates channels of a head in pairs, and a head has {head}; give an even kv_channels"
        )
    return None


@rule("model.rotary_percent", "model.position_embedding", *HEAD_SIZE)
def rotary_width_is_even(
    percent: float, embedding: str, hidden: int, heads: int, kv_channels: int | None
) -> str | None:
    head = _head_size(hidden, heads, kv_channels)
    if embedding != "rope" or not head or head % 2:
        return None
    width = int(head * percent)
    if width and width % 2 == 0:
        return None
    return (
        f"rotates {width} of a head's {head} channels, which must be even and above 0; "
        f"choose an even number / {head}"
    )


@rule("model.rope_scaling.high_freq_factor", "model.rope_scaling.low_freq_factor")
def scaled_frequencies_lie_between(high: float, low: float) -> str | None:
    if high <= low:
        return f"must be above low_freq_factor = {low}; raise it or lower that"
    return None


# ------------------------------------------------------- rules: batches, data and the run


@rule(
    "global_batch_size",
    "micro_batch_size",
    "world_size",
    "parallel.tp",
    "parallel.pp",
    "parallel.cp",
    "parallel.vpp",
)
def batch_can_be_cut(
    batch: int, micro: int, world_size: int, tp: int, pp: int, cp: int, vpp: int
) -> str | None:
    if world_size_problem(world_size, tp, pp, cp):
        # dp is unknown; micro_batch_size must divide the batch whatever it is
        dp = 1
        factors = f"micro_batch_size = {micro}"
    else:
        dp = world_size // (tp * pp * cp)
        factors = f"micro_batch_size * dp = {micro} * {dp}"
    unit = micro * dp
    micro_batches = batch // unit
    if batch % unit:
        return f"{factors} must divide it; choose a multiple of {unit}"
    if vpp > 1 and micro_batches % pp:
        return (
            f"these are {micro_batches} micro-batches and interleaving (vpp = {vpp}) runs groups "
            f"of pp = {pp}; choose a multiple of micro_batch_size * dp * pp = {unit * pp}"
        )
    return None


@rule("train_samples", "global_batch_size")
def samples_fill_a_batch(samples: int | None, batch: int) -> str | None:
    if samples and samples < batch:
        return f"does not fill one global batch; must be at least global_batch_size = {batch}"
    return None


@rule("consumed_samples", "global_batch_size", "train_iters", "train_samples")
def run_can_continue_after(
    samples: tuple[int, int, int], batch: int, iterations: int | None, train_samples: int | None
) -> str | None:
    end = train_samples if iterations is None else iterations * batch
    train = samples[0]
    if train % batch:
        return (
            "a run continues after a whole global batch; "
            f"choose for train a multiple of global_batch_size = {batch}"
        )
    if end is not None and train > end:
        return f"the run ends after {end} samples of train; give at most {end}, or lengthen the run"
    return None


@rule("eval_interval", "eval_iters")
def evaluations_have_iterations(interval: int | None, iterations: int) -> str | None:
    if interval and not iterations:
        return "eval_iters = 0 leaves nothing to evaluate; leave it out or raise eval_iters"
    return None


@rule("data.eod_token", "data.tokenizer")
def bytes_have_their_own_eod(eod_token: str | None, tokenizer: str) -> str | None:
    if eod_token is not None and tokenizer == "bytes":
        return (
            'the tokenizer "bytes" ends documents with NUL; leave it out, or name a tokenizer.json'
        )
    return None


@rule("data.split", "data.valid", "eval_iters")
def evaluations_have_text(
    split: tuple[float, ...], valid: Sources | None, iterations: int
) -> str | None:
    if valid is None and iterations and not split[1]:
        return (
            "no text is left for evaluations; "
            "give the second weight or data.valid, or set eval_iters to 0"
        )
    return None


@rule("data.valid", "eval_iters")
def valid_text_is_read(valid: Sources | None, iterations: int) -> str | None:
    if valid is not None and not iterations:
        return "has no effect with eval_iters = 0; leave it out or raise eval_iters"
    return None


@rule("data.split", "data.valid", "data.test")
def split_divides_something(
    split: tuple[float, ...], valid: Sources | None, test: Sources | None
) -> str | None:
    if split != _DEFAULT_SPLIT and valid is not None and test is not None:
        return "has no effect beside data.valid and data.test; leave it or one of them out"
    return None


# ------------------------------------------------------------------ rules: the schedule


def _decay_is_read(length: int | None, decay: str, warmup_fraction: float | None) -> str | None:
    if length is not None and decay == "constant" and not warmup_fraction:
        return (
            "has no effect with schedule.decay = 'constant' and no warmup_fraction; "
            "leave it out or choose another decay"
        )
    return None


decay_lengths_are_read = tuple(
    Rule(
        fields=(f"schedule.{name}", "schedule.decay", "schedule.warmup_fraction"),
        remedy=_decay_is_read,
    )
    for name in ("decay_iters", "decay_samples")
)


@rule(
    "schedule.init_lr",
    "schedule.warmup_iters",
    "schedule.warmup_samples",
    "schedule.warmup_fraction",
)
def init_lr_has_a_warmup(init_lr: float, *warmups: float | None) -> str | None:
    if init_lr and not any(warmups):
        return "has no effect without a warm-up; give warmup_iters or leave it out"
    return None


# --------------------------------------------------------- rules: precision and optimizer


@rule("precision.dtype", "cuda")
def fp16_needs_cuda(dtype: str, cuda: bool | None) -> str | None:
    if dtype == "fp16" and cuda is False:
        return "fp16 runs on CUDA only; choose bf16 or fp32"
    return None


@rule("precision.min_loss_scale", "precision.initial_loss_scale", "precision.dtype")
def loss_scale_can_fall(least: float, first: float, dtype: str) -> str | None:
    if dtype == "fp16" and least > first:
        return f"must be at most initial_loss_scale = {first}"
    return None


optimizers_refuse_fields = tuple(
    Rule(
        fields=(f"optimizer.{name}", "optimizer.name"),
        remedy=partial(refusal, name),
    )
    for name in refused_fields()
)


@rule("optimizer.lr_mult", "optimizer.lr_scale_cond")
def lr_mult_has_parameters(mult: float, condition: ParameterCondition | None) -> str | None:
    if mult != 1 and condition is None:
        return "nothing says which parameters it is for; give lr_scale_cond or leave it out"
    return None


@rule("optimizer.lr_scale_cond", "optimizer.lr_mult")
def lr_scale_cond_has_a_factor(condition: ParameterCondition | None, mult: float) -> str | None:
    if condition is not None and mult == 1:
        return "it has no effect with lr_mult = 1; give another lr_mult or leave it out"
    return None


# --------------------------------------------------------- rules: logs and checkpoints


@rule("log.peak_tflops", "log.everything")
def peak_is_shown(peak: float | None, everything: bool) -> str | None:
    if peak is not None and not everything:
        return "has no effect without log.everything; set that or leave it out"
    return None


def _without_directory(default: Any) -> Callable[[Any, str | None], str | None]:
    """The remedy for a field of `checkpoint` that is not at its default, without a directory."""

    def remedy(value: Any, directory: str | None) -> str | None:
        if value != default and directory is None:
            return "has no effect without checkpoint.directory; set that or leave it out"
        return None

    return remedy


checkpoint_fields_need_a_directory = tuple(
    Rule(
        fields=(f"checkpoint.{name}", "checkpoint.directory"),
        remedy=_without_directory(default_of(CheckpointConfig, name)),
    )
    for name in ("interval", "keep_last", "keep_every", "resume", "asynchronous", "on_damage")
)


@rule("checkpoint.keep_every", "checkpoint.interval")
def kept_checkpoints_are_written(every: int | None, interval: int | None) -> str | None:
    if every and (interval is None or every % interval):
        return (
            f"checkpoints are written every interval = {interval} iterations; "
            "choose a multiple of that"
        )
    return None


@rule("checkpoint.keep_every", "checkpoint.keep_last")
def some_checkpoints_are_deleted(every: int | None, last: int) -> str | None:
    if every and last == 0:
        return "has no effect with keep_last = 0, which keeps all; leave one of the two out"
    return None


@rule("checkpoint.on_damage", "checkpoint.resume", "checkpoint.directory")
def damage_is_met(on_damage: str, resume: bool | str, directory: str | None) -> str | None:
    if on_damage != "raise" and not resume and directory is not None:
        return "has no effect with resume = False; leave it out or resume"
    return None


@rule("checkpoint.asynchronous", "checkpoint.interval", "checkpoint.directory")
def something_is_written_during_the_run(
    asynchronous: bool, interval: int | None, directory: str | None
) -> str | None:
    if asynchronous and interval is None and directory is not None:
        return "has no effect without checkpoint.interval; give that or leave it out"
    return None


RULES: tuple[Rule, ...] = (
    world_size_fits,
    order_names_each_axis,
    no_expert_parallelism,
    interleaving_needs_a_pipeline,
    sequence_parallelism_needs_tp,
    heads_can_be_cut,
    query_groups_can_be_cut,
    query_groups_divide_heads,
    heads_divide_the_hidden_size,
    mlp_can_be_cut,
    distances_reach_beyond_single_buckets,
    sequence_can_be_cut,
    position_table_reaches,
    rotary_heads_are_even,
    rotary_width_is_even,
    scaled_frequencies_lie_between,
    batch_can_be_cut,
    samples_fill_a_batch,
    fp16_needs_cuda,
    loss_scale_can_fall,
    *optimizers_refuse_fields,
    lr_mult_has_parameters,
    lr_scale_cond_has_a_factor,
    peak_is_shown,
    *checkpoint_fields_need_a_directory,
    kept_checkpoints_are_written,
    some_checkpoints_are_deleted,
    damage_is_met,
    something_is_written_during_the_run,
    run_can_continue_after,
    evaluations_have_iterations,
    bytes_have_their_own_eod,
    evaluations_have_text,
    valid_text_is_read,
    split_divides_something,
    *decay_lengths_are_read,
    init_lr_has_a_warmup,
)
