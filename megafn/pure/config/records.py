"""The config of a run as frozen values: a record for each section, `TrainConfig` for the whole.

`serialization` reads and writes them, `validate` says whether they can run. None stands for what
follows from other fields, or for "off"; the comments say which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen

from megafn.pure.config.family_record import FamilyRecord
from megafn.pure.config.problems import ConfigError

# Types of the fields that hold functions. No file holds a function: set these fields in code.
# `Any` stands for types of torch and of `megafn.runtime`, which `megafn.pure` does not import.

# (name in the whole model, this rank's part of the parameter) -> whether it is chosen. The name is
# the same in every layout.
ParameterCondition = Callable[[str, Any], bool]

# (config) -> a `megafn.Step`, or an object with the three methods of accelerate's train steps.
StepFunction = Callable[["TrainConfig"], Any]

# (config, pg, *, pre_process, post_process, vp_stage) -> the module of one model chunk, as
# `megafn.build_chunk`.
ModelFunction = Callable[..., Any]

# (a function without arguments that builds the chunk) -> the chunk, prepared: for example with some
# layers frozen, or with adapters.
PrepareModel = Callable[[Callable[[], Any]], Any]

# Of corpora: a source, several, or (weight, source) pairs.
Sources = str | tuple[str, ...] | tuple[tuple[float, str], ...]


@frozen(kw_only=True)
class RopeScaling:
    """Rotary frequencies stretched for longer sequences, as Llama 3.1 does (rope_type "llama3").

    A frequency that makes fewer than `low_freq_factor` turns over the original length is divided by
    `factor`, one that makes more than `high_freq_factor` stays as it is, and between the two the
    division sets in linearly.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # Tokens: the length that the model was first trained on.
    original_max_position_embeddings: int = 8192


# Functions of a model are cached, and a planner calls them for thousands of layouts.
@frozen(kw_only=True, cache_hash=True)
class ModelConfig:
    """The architecture. Lengths are in tokens.

    family: what the model learns, and so its layers, its data and its loss. "gpt": a decoder that
        predicts the next token. "bert": an encoder that predicts masked tokens, or labels. "t5": an
        encoder and a decoder that predicts masked spans, or any second sequence. Or a
        `megafn.Family`: a record of functions, see docs/extending.md.

    Some fields are left None where they follow from others: the properties below give their values.
    """

    family: str | FamilyRecord = "gpt"

    # ---- Sizes. For T5, num_layers and seq_length are those of the encoder.
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    seq_length: int
    # The true number of token ids; padding for tensor parallelism is not part of it.
    vocab_size: int = 256
    # Key and value heads (grouped-query attention, arXiv 2305.13245). None: one per query head.
    num_query_groups: int | None = None
    # Width of a head. None: hidden_size / num_attention_heads.
    kv_channels: int | None = None
    # Inner width of the MLP. None: 4 * hidden_size.
    ffn_hidden_size: int | None = None

    # ---- Positions
    # Rows of a learned position table. None: the longest sequence.
    max_position_embeddings: int | None = None
    position_embedding: str = "learned_absolute"  # or "rope", "none"; "relative": T5 only
    rotary_base: float = 10_000.0
    rotary_percent: float = 1.0
    # None: the frequencies that follow from rotary_base.
    rope_scaling: RopeScaling | None = None
    # GPT only: numbers, from 0, of layers without rotary positions (SmolLM3).
    layers_without_rope: tuple[int, ...] = ()

    # ---- Attention
    # GPT only: a token attends to this many tokens, itself included (Mistral). None: to all before.
    sliding_window: int | None = None
    # The scores are multiplied by it. None: head_size ** -0.5.
    softmax_scale: float | None = None

    # ---- Layers
    # "gelu", "gelu_tanh" (GPT-2), "relu", and the gated "swiglu", "geglu", "geglu_tanh" (T5 1.1).
    activation: str = "gelu"
    normalization: str = "LayerNorm"  # or "RMSNorm"
    norm_epsilon: float = 1e-5
    qk_layernorm: bool = False
    add_bias_linear: bool = True
    # A bias on query, key and value, when add_bias_linear is off.
    add_qkv_bias: bool = False
    # GPT only: x + attention(norm(x)) + MLP(norm(x)), each with its own norm (GPT-NeoX).
    parallel_residual: bool = False
    # The output layer shares the word embeddings' table.
    tie_word_embeddings: bool = True

    # ---- Dropout and initial values
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = 0.02

    # ---- BERT only
    # Rows of the token type table, 2 for pairs of sentences; 0: no table.
    num_tokentypes: int = 0
    # Predict the order of two sentences too.
    bert_binary_head: bool = False
    # Fine-tuning: a head with this many labels replaces the masked-token head. None: it does not.
    num_labels: int | None = None
    # "single_label_classification", "multi_label_classification" or "regression". None: regression
    # if num_labels is 1, multi-label if a batch's labels are floats, else single-label.
    problem_type: str | None = None

    # ---- T5 only
    num_decoder_layers: int | None = None  # None: num_layers
    decoder_seq_length: int | None = None  # None: seq_length
    # Put before the labels, which are shifted right to become the decoder's input.
    decoder_start_token_id: int = 0
    # Buckets of distances, each with a learned bias per head (arXiv 1910.10683).
    relative_attention_num_buckets: int = 32
    # All longer distances share the last bucket.
    relative_attention_max_distance: int = 128
    # The decoder's output times hidden_size ** -0.5 enters the output layer (T5 1.0).
    scale_decoder_outputs: bool = False
    # A tied output layer has a bias of its own, as in megatron-core; in transformers it has none.
    output_layer_bias: bool = True

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        if self.kv_channels is not None:
            return self.kv_channels
        return self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Heads of keys and values."""
        if self.num_query_groups is not None:
            return self.num_query_groups
        return self.num_attention_heads

    @property
    def position_rows(self) -> int:
        """Rows of a learned position table."""
        if self.max_position_embeddings is not None:
            return self.max_position_embeddings
        return max(self.seq_length, self.decoder_length)

    @property
    def decoder_layers(self) -> int:
        return self.num_decoder_layers if self.num_decoder_layers is not None else self.num_layers

    @property
    def decoder_length(self) -> int:
        """Length of the decoder's input (T5)."""
        if self.decoder_seq_length is not None:
            return self.decoder_seq_length
        return self.seq_length

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections of its input (arXiv 2002.05202)."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")


@frozen(kw_only=True)
class ParallelConfig:
    """How the model is cut.

    The data-parallel size is not a field: it is world_size / (tp * pp * cp).
    """

    tp: int = 1  # tensor parallel
    pp: int = 1  # pipeline parallel
    vpp: int = 1  # model chunks per pipeline stage (interleaving)
    cp: int = 1  # context parallel: the sequence is cut
    ep: int = 1  # expert parallel (not built yet: above 1 is an error)
    # Norms and dropout work on 1 / tp of the sequence.
    sequence_parallel: bool = False
    # Axes of the grid of ranks; along the first, neighbours have consecutive ranks.
    order: str = "tp-cp-ep-dp-pp"

    # Layers of the outer stages. None: as many as each of the others.
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    # T5 only: the first stage of the decoder. None: pp // 2.
    pipeline_model_parallel_split_rank: int | None = None


@frozen(kw_only=True)
class RecomputeConfig:
    """Activations that the backward pass recomputes instead of keeping them (arXiv 2205.05198)."""

    # None: keep all; "selective": recompute core attention; "full": recompute whole layers.
    granularity: str | None = None
    # With "full": "uniform" chunks of num_layers, or "block", the first num_layers of each chunk.
    method: str = "uniform"
    num_layers: int = 1


@frozen(kw_only=True)
class PrecisionConfig:
    """Number formats. The optimizer updates fp32 weights, whatever the dtype."""

    # Of weights and activations: "fp32", "bf16", or "fp16" (CUDA only).
    dtype: str = "fp32"

    # ---- fp16 only: dynamic loss scaling (arXiv 1710.03740).
    initial_loss_scale: float = 2.0**32
    min_loss_scale: float = 1.0
    # Iterations without an overflow until the scale doubles.
    loss_scale_window: int = 1000
    # Iterations with an overflow until the scale halves.
    hysteresis: int = 2


@frozen(kw_only=True)
class OptimizerConfig:
    """The update that follows from the gradients, and what happens to them before."""

    # "adam" (AdamW: weight decay is decoupled, arXiv 1711.05101) or "sgd".
    name: str = "adam"

    # ---- "adam" only
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    # ---- "sgd" only
    momentum: float = 0.9

    # ---- Gradients and state
    # Gradients are scaled down to this global L2 norm; 0: off.
    clip_grad: float = 1.0
    # An update is left out if its norm is more than this many times the median of the last 32.
    # None: off.
    spike_factor: float | None = None
    # Optimizer state is cut over the data-parallel ranks (ZeRO 1, arXiv 1910.02054).
    use_distributed_optimizer: bool = False

    # ---- Groups of parameters
    # Those without weight decay. None: biases and other vectors.
    no_weight_decay_cond: ParameterCondition | None = None
    # Those that learn at lr * lr_mult. None: none of them.
    lr_scale_cond: ParameterCondition | None = None
    lr_mult: float = 1.0


@frozen(kw_only=True)
class ScheduleConfig:
    """Learning rate and weight decay over the run; see `make_schedule`.

    Lengths are in iterations or samples: give at most one of each `*_iters`, `*_samples`,
    `*_fraction`.
    """

    # ---- Learning rate
    lr: float = 1e-3  # at the peak
    min_lr: float = 0.0  # at the end of the decay
    init_lr: float = 0.0  # at the start of the warm-up

    # ---- Decay
    # "constant", "linear", "cosine", "inverse-square-root" or "wsd" (warm-up, stable, decay).
    decay: str = "cosine"
    # Warm-up included. None: the whole run.
    decay_iters: int | None = None
    decay_samples: int | None = None

    # ---- Linear warm-up. None of the three: none.
    warmup_iters: int | None = None
    warmup_samples: int | None = None
    warmup_fraction: float | None = None  # of the decay length

    # ---- "wsd" only: its last part
    # "linear", "cosine", "exponential" or "minus_sqrt".
    wsd_decay_style: str = "exponential"
    # None: the last 10% of the decay length.
    wsd_decay_iters: int | None = None
    wsd_decay_samples: int | None = None

    # ---- Weight decay
    weight_decay: float = 0.01
    # "constant", or "linear" or "cosine" from start_weight_decay to end_weight_decay.
    weight_decay_incr_style: str = "constant"
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None


@frozen(kw_only=True)
class DataConfig:
    """Corpora: a source, several of them, or a blend of (weight, source) pairs.

    A source is a text file (plain, or one JSON object a line; possibly compressed by gzip), or the
    prefix of an indexed dataset (`prefix.bin`, `prefix.idx`). If `valid` or `test` is None, each
    document of `train` is divided by the weights of `split`.
    """

    train: Sources
    valid: Sources | None = None
    test: Sources | None = None
    # Weights of train, valid and test.
    split: tuple[float, ...] = (949.0, 50.0, 1.0)
    # "bytes", or the path of a Hugging Face tokenizer.json.
    tokenizer: str = "bytes"
    # The token of a tokenizer.json that ends a document. None: the first usual name that it has.
    eod_token: str | None = None
    # The key of the text in files of one JSON object a line.
    json_key: str = "text"
    # "single": in order, once; "cyclic": shuffled anew in each epoch, without end.
    sampler: str = "single"

    # ---- GPT only: what happens at an end-of-document token
    reset_position_ids: bool = False  # positions start again after it
    reset_attention_mask: bool = False  # no attention to what is before it
    eod_mask_loss: bool = False  # no loss at its position

    # ---- BERT and T5 only
    # Share of the tokens to predict.
    mask_prob: float = 0.15
    # Share of the samples that are meant to be shorter than seq_length.
    short_seq_prob: float = 0.1

    # ---- Reading
    # Folder for the indexed form of texts. None: the user's cache folder.
    cache: str | None = None
    # Global batches that a thread reads ahead; 0: none.
    prefetch: int = 2


@frozen(kw_only=True)
class LogConfig:
    """What rank 0 writes. None: not written."""

    progress: bool = True
    tensorboard_dir: str | None = None
    # A file, one JSON object a line.
    jsonl: str | None = None
    # Iterations between records.
    interval: int = 1
    # `Metrics.details` too: norms, zeros, TFLOP/s, memory, timers. Costs a little time.
    everything: bool = False
    # Peak of one device, for the share of it that is used (MFU). None: the device's own, if known.
    peak_tflops: float | None = None


@frozen(kw_only=True)
class CheckpointConfig:
    """Where and when `train` saves the run, and which checkpoints it keeps."""

    # One folder for each run, shared by all hosts. None: nothing is saved.
    directory: str | None = None
    # Iterations between checkpoints. None: only after the last iteration, and on a signal.
    interval: int | None = None
    # How many of the newest to keep; 0: all.
    keep_last: int = 2
    # Checkpoints at multiples of this many iterations are kept for ever. None: off.
    keep_every: int | None = None
    # Resume from the newest, or start fresh if there is none. "must": an error if there is none.
    # False: an error if the folder holds checkpoints.
    resume: bool | str = True
    # The state is copied, and a thread writes it while training continues.
    asynchronous: bool = False
    # "raise", or "previous": resume from the one before a damaged checkpoint.
    on_damage: str = "raise"
    # Weights to start from, unless `directory` holds a checkpoint to resume from: a Hugging Face
    # directory, a checkpoint of another run, or one of Megatron-LM. None: random ones.
    pretrained: str | None = None


@frozen(kw_only=True)
class TrainConfig:
    """A whole run. Batch sizes are in sequences."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    # None: `train` is given `batches`.
    data: DataConfig | None = None
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    # ---- Batches: global_batch_size = micro_batch_size * dp * number of micro-batches
    micro_batch_size: int
    global_batch_size: int

    # ---- Length of the run: exactly one of these two
    train_iters: int | None = None
    train_samples: int | None = None

    # ---- Evaluation
    # Iterations between evaluations. None: only after the last.
    eval_interval: int | None = None
    # Global batches of an evaluation.
    eval_iters: int = 10

    # ---- Start and results
    # Samples of train, valid and test that were read before this run, which starts after them.
    consumed_samples: tuple[int, int, int] = (0, 0, 0)
    # "last_stage" or "every_stage" of the pipeline: where `Metrics.logits` is set. None: nowhere.
    return_logits: str | None = None

    # ---- Custom functions, used unless `train` or `setup` is given others. None: built-in ones.
    step_function: StepFunction | None = None
    model_function: ModelFunction | None = None
    prepare_model: PrepareModel | None = None

    # ---- Reproducing and ending
    # Of initial weights, dropout and the order of samples.
    seed: int = 1234
    # The run ends after this many updates left out in a row (NaN, infinity, a spike); 0: never.
    stop_after_skipped: int = 10
    # A collective that takes longer ends the run.
    timeout_seconds: float = 600.0

    @property
    def iterations(self) -> int:
        """Number of global batches of the run; samples that do not fill one are not trained on."""
        if self.train_iters is not None:
            return self.train_iters
        return (self.train_samples or 0) // self.global_batch_size


def data_of(config: TrainConfig) -> DataConfig:
    """The corpora of a config. Raises ConfigError if it has none.

    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, micro_batch_size=2, global_batch_size=16, train_iters=9)
    >>> data_of(config)
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: data = None: give a DataConfig, or pass batches
    """
    if config.data is None:
        raise ConfigError("data = None: give a DataConfig, or pass batches")
    return config.data


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary's size rounded up to a multiple of tp.

    >>> padded_vocab_size(50257, 4)
    50260
    """
    return -(-vocab_size // tp) * tp


def num_micro_batches(config: TrainConfig, dp: int) -> int:
    """Micro-batches that each data-parallel rank runs per iteration.

    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> config = TrainConfig(model=model, micro_batch_size=2, global_batch_size=16, train_iters=9)
    >>> num_micro_batches(config, dp=2)
    4
    """
    return config.global_batch_size // (config.micro_batch_size * dp)
