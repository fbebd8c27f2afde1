"""Everything a run is decided by, as frozen values. `dicts` reads and writes them, `validate` judges them."""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from megafn.pure.config.family_record import FamilyRecord


@frozen(kw_only=True)
class ModelConfig:
    """The architecture. Lengths are in tokens; a field left None follows from the others (see the properties)."""

    family: str | FamilyRecord = "gpt"  # "gpt", "bert", "t5", or a `Family`
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    seq_length: int
    vocab_size: int = 256  # the true number of token ids; padding for tp is not part of it
    num_query_groups: int | None = (
        None  # key and value heads of grouped-query attention; None: one per head
    )
    kv_channels: int | None = None  # width of a head; None: hidden_size / num_attention_heads
    ffn_hidden_size: int | None = None  # None: 4 * hidden_size
    max_position_embeddings: int | None = (
        None  # rows of a learned position table; None: the longest sequence
    )
    position_embedding: str = "learned_absolute"  # or "rope", "none", and T5's "relative"
    rotary_base: float = 10_000.0
    rotary_percent: float = 1.0
    activation: str = "gelu"  # or "gelu_tanh" (GPT-2), "relu", and the gated "swiglu", "geglu", "geglu_tanh" (T5 1.1)
    normalization: str = "LayerNorm"  # or "RMSNorm"
    norm_epsilon: float = 1e-5
    qk_layernorm: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = (
        False  # a bias on query, key and value alone (where add_bias_linear is off)
    )
    tie_word_embeddings: bool = True  # the output layer shares the word embeddings' table
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = 0.02
    # BERT's alone.
    num_tokentypes: int = 0  # rows of the token type table, 2 for pairs of sentences; 0: none
    bert_binary_head: bool = False  # the order of two sentences is predicted too
    num_labels: int | None = (
        None  # fine-tuning: a head of so many labels stands in place of the masked-token head
    )
    problem_type: str | None = (
        None  # "single_label_classification", "multi_label_classification", "regression"; None: by labels
    )
    # T5's alone: num_layers and seq_length are its encoder's.
    num_decoder_layers: int | None = None  # None: num_layers
    decoder_seq_length: int | None = None  # None: seq_length
    decoder_start_token_id: int = 0  # put before labels that are shifted right into decoder inputs
    relative_attention_num_buckets: int = (
        32  # of distances, each with a learned bias per head (arXiv 1910.10683)
    )
    relative_attention_max_distance: int = 128  # from which on distances share a bucket

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size if self.ffn_hidden_size is not None else 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        return (
            self.kv_channels
            if self.kv_channels is not None
            else self.hidden_size // self.num_attention_heads
        )

    @property
    def query_groups(self) -> int:
        return (
            self.num_query_groups if self.num_query_groups is not None else self.num_attention_heads
        )

    @property
    def position_rows(self) -> int:
        longest = max(self.seq_length, self.decoder_length)
        return self.max_position_embeddings if self.max_position_embeddings is not None else longest

    @property
    def decoder_layers(self) -> int:
        return self.num_decoder_layers if self.num_decoder_layers is not None else self.num_layers

    @property
    def decoder_length(self) -> int:
        return self.decoder_seq_length if self.decoder_seq_length is not None else self.seq_length

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu", "geglu_tanh")


@frozen(kw_only=True)
class ParallelConfig:
    """How the model is cut. The data-parallel size is no field: it follows from the world size."""

    tp: int = 1  # tensor parallel
    pp: int = 1  # pipeline parallel
    vpp: int = 1  # model chunks per pipeline stage (interleaving)
    cp: int = 1  # context parallel: the sequence is cut
    ep: int = 1  # expert parallel (refused until experts are built)
    sequence_parallel: bool = False
    order: str = "tp-cp-ep-dp-pp"  # the axis named first changes fastest with the rank
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    pipeline_model_parallel_split_rank: int | None = (
        None  # T5: the stage at which the decoder begins; None: pp // 2
    )


@frozen(kw_only=True)
class RecomputeConfig:
    """Which activations the backward pass computes again instead of keeping them (arXiv 2205.05198)."""

    granularity: str | None = None  # None, "selective" (core attention) or "full" (whole layers)
    method: str = "uniform"  # for "full": "uniform" or "block"
    num_layers: int = (
        1  # for "full": layers per recomputed chunk (uniform), or layers recomputed (block)
    )


@frozen(kw_only=True)
class PrecisionConfig:
    """Number formats. fp16 scales its loss and runs on CUDA alone."""

    dtype: str = "fp32"  # or "bf16", "fp16"; weights are updated in fp32 whatever it says
    initial_loss_scale: float = 2.0**32
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000
    hysteresis: int = 2


@frozen(kw_only=True)
class OptimizerConfig:
    """Which update follows from the gradients, and what is done to them before it."""

    name: str = "adam"  # AdamW (weight decay is decoupled), or "sgd"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9  # of sgd
    clip_grad: float = 1.0  # global L2 norm; 0 is off
    spike_factor: float | None = (
        None  # an update whose norm is so many times the median of the last 32 is left out; None: none is
    )
    use_distributed_optimizer: bool = (
        False  # optimizer state cut over data parallel ranks (ZeRO 1, arXiv 1910.02054)
    )
    # (name in the whole model, parameter: this process's part of it) -> bool; the name is the same in every layout
    no_weight_decay_cond: Callable | None = (
        None  # which parameters are not decayed; None: biases and other vectors
    )
    lr_scale_cond: Callable | None = None  # which parameters learn at lr * lr_mult
    lr_mult: float = 1.0


@frozen(kw_only=True)
class ScheduleConfig:
    """Learning rate and weight decay over the run; see `make_schedule`. At most one of each `*_iters`, `*_samples`, `*_fraction`."""

    lr: float = 1e-3  # the peak
    min_lr: float = 0.0
    init_lr: float = 0.0  # where warm-up starts
    decay: str = "cosine"  # "constant", "linear", "cosine", "inverse-square-root", "wsd"
    decay_iters: int | None = None  # None: the whole run
    decay_samples: int | None = None
    warmup_iters: int | None = None
    warmup_samples: int | None = None
    warmup_fraction: float | None = None  # of the decay length
    wsd_decay_style: str = "exponential"  # "linear", "cosine", "exponential", "minus_sqrt"
    wsd_decay_iters: int | None = None  # None: the last 10% of the decay length
    wsd_decay_samples: int | None = None
    weight_decay: float = 0.01
    weight_decay_incr_style: str = (
        "constant"  # or "linear", "cosine", from start_weight_decay to end_weight_decay
    )
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None


@frozen(kw_only=True)
class DataConfig:
    """Corpora. A source is a text file, or the prefix of an indexed dataset (`prefix.bin`, `prefix.idx`).

    A source, several of them, or a blend of (weight, source) pairs. Where `valid` or `test` is None,
    every document of `train` is cut by the weights of `split`.
    """

    train: str | tuple[str, ...] | tuple[tuple[float, str], ...]
    valid: str | tuple[str, ...] | tuple[tuple[float, str], ...] | None = None
    test: str | tuple[str, ...] | tuple[tuple[float, str], ...] | None = None
    split: tuple[float, ...] = (949.0, 50.0, 1.0)  # train, valid, test
    tokenizer: str = "bytes"  # or the path of a Hugging Face tokenizer.json
    sampler: str = "single"  # in order, once; or "cyclic": shuffled anew each epoch, endless
    reset_position_ids: bool = False  # positions start anew behind each end of document
    reset_attention_mask: bool = False  # no attention across an end of document
    eod_mask_loss: bool = False  # no loss at an end of document
    mask_prob: float = 0.15  # BERT and T5: share of the tokens that are to be predicted
    short_seq_prob: float = (
        0.1  # BERT and T5: share of the samples that are meant to be shorter than seq_length
    )
    cache: str | None = None  # folder of the indexed form of texts; None: the user's cache folder
    prefetch: int = 2  # global batches read ahead by a thread; 0: none


@frozen(kw_only=True)
class LogConfig:
    """What rank zero writes; nothing where a field is None."""

    progress: bool = True
    tensorboard_dir: str | None = None
    jsonl: str | None = None  # a file of one JSON object a step
    interval: int = 1  # iterations between records
    everything: bool = (
        False  # `Metrics.details` too: norms, zeros, TFLOP/s, memory, timers; costs a little time
    )
    peak_tflops: float | None = (
        None  # of one device, for the share of it that is used; None: the device's, where known
    )


@frozen(kw_only=True)
class CheckpointConfig:
    """Where `train` saves the run, when, and what it keeps. Nothing is saved where `directory` is None."""

    directory: str | None = None  # one for each run, shared by all hosts
    interval: int | None = (
        None  # iterations between checkpoints; None: only after the last one, and on a signal
    )
    keep_last: int = 2  # how many of the newest are kept; 0: all
    keep_every: int | None = None  # those of every so many iterations are kept for ever
    resume: bool = (
        True  # go on from the newest; False: a directory that holds checkpoints is refused
    )
    asynchronous: bool = False  # copied at once, written by a thread while training goes on
    on_damage: str = "raise"  # or "previous": go on from the one before a damaged one


@frozen(kw_only=True)
class TrainConfig:
    """A whole run. Batch sizes are in sequences; `global_batch_size` = micro_batch_size * dp * number of micro-batches."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    data: DataConfig | None = None  # None: `train` is given `batches`
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    micro_batch_size: int
    global_batch_size: int
    train_iters: int | None = None  # the horizon: exactly one of these two
    train_samples: int | None = None
    eval_interval: int | None = None  # iterations between evaluations; None: only after the last
    eval_iters: int = 10  # global batches of an evaluation
    consumed_samples: tuple[int, int, int] = (
        0,
        0,
        0,
    )  # of train, valid and test: read before this run, which goes on behind them
    return_logits: str | None = (
        None  # in `Metrics.logits`, on the "last_stage" or "every_stage" of the pipeline
    )
    # Functions of one's own, which `train` and `setup` use where they are not given others; no file holds them.
    step_function: Callable | None = (
        None  # (config) -> Step, or an object with the three methods of accelerate's train steps
    )
    model_function: Callable | None = (
        None  # builds one model chunk: takes and returns what `build_chunk` does
    )
    prepare_model: Callable | None = (
        None  # (a function without arguments that builds the chunk) -> the chunk, made ready
    )
    seed: int = 1234
    stop_after_skipped: int = (
        10  # updates left out in a row, for NaN, infinity or a spike, that end the run; 0: none do
    )
    timeout_seconds: float = 600.0  # a collective that takes longer ends the run

    @property
    def iterations(self) -> int:
        """Number of global batches of the run; samples that do not fill one are not trained on."""
        if self.train_iters is not None:
            return self.train_iters
        return (self.train_samples or 0) // self.global_batch_size


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary's size rounded up to a multiple of tp.

    >>> padded_vocab_size(50257, 4)
    50260
    """
    return -(-vocab_size // tp) * tp


def num_micro_batches(config: TrainConfig, dp: int) -> int:
    """Micro-batches that each data-parallel rank runs per iteration.

    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> num_micro_batches(TrainConfig(model=model, micro_batch_size=2, global_batch_size=16, train_iters=9), dp=2)
    4
    """
    return config.global_batch_size // (config.micro_batch_size * dp)
