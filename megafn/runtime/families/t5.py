"""T5: an encoder and a decoder, for span corruption or any other pair of sequences.

Over a pipeline each half has stages of its own. One tensor travels between stages: the encoder's
hidden state [s, batch, hidden]; from the stage at which the decoder begins on, the encoder's output
and the decoder's hidden state, one after the other [s + t, batch, hidden], so that each decoder
stage attends to the encoder's output and its gradients flow back the same way. If the schedule
sends only one shape, encoder stages pad to it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from attrs import frozen
from megatron.core.datasets.t5_dataset import (
    T5MaskedWordPieceDataset,
    T5MaskedWordPieceDatasetConfig,
)
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.tensor_parallel.mappings import scatter_to_tensor_model_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import ModelConfig, ParallelConfig, TrainConfig, data_of
from megafn.pure.families.t5 import T5_SPEC, decoder_stage
from megafn.runtime.families.batch_checks import (
    Raw,
    causal_and_padding_mask,
    check_ids,
    check_labels,
    check_length,
    check_mapping,
    given,
    integers,
    on_device,
    real_tokens,
    unknown_keys,
    zeros_and_ones,
)
from megafn.runtime.families.family import (
    DatasetAndConfig,
    EncoderDecoder,
    Family,
    FamilyData,
    TrainStepCalls,
)
from megafn.runtime.families.masked_data import (
    masked_settings,
    sample_index,
    sentinels_in_vocabulary,
)
from megafn.runtime.families.step import Batch, Step
from megafn.runtime.model.chunk import Chunk, ChunkFunctions, ChunkPlan
from megafn.runtime.model.key_value_cache import EncoderMemory, KeyValueCache
from megafn.runtime.model.layers import Norm, layer_spec
from megafn.runtime.model.losses import IGNORE, cross_entropy, token_loss
from megafn.runtime.model.parts import (
    embed,
    output_layer,
    rotary_angles,
    tie_word_tables,
    token_embedding,
    vocabulary_logits,
)
from megafn.runtime.model.tied_embeddings import mark_copy
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.text.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------ its step

_KEYS = "'text_enc', 'text_dec' and 'labels', or 'input_ids' and 'labels'"


def t5_batch(raw: Mapping[str, Any], config: TrainConfig, pg: ProcessGroups) -> Batch:
    """A micro-batch of an encoder-decoder from one of two kinds of raw batch.

    s tokens to read, t to write; masks are 1 = real.
    - text_enc [b, s], text_dec, labels, loss_mask [b, t], enc_mask [b, s], dec_mask [b, t]: as
      megatron-core's dataset gives them.
    - input_ids [b, s], labels [b, t] (-100: no loss), and if given attention_mask [b, s],
      decoder_attention_mask [b, t] and decoder_input_ids [b, t]; without these the labels shifted
      right, after config.model.decoder_start_token_id, which stands for -100 too: as a Hugging Face
      collator gives them. Padding of the decoder predicts nothing.
    Labels are not shifted: that of a position is what it predicts. Raises ValueError on other keys,
    shapes and dtypes, on ids outside the vocabulary, and on a row whose encoder tokens are all
    padding.
    """
    check_mapping(raw, _KEYS)
    if "text_enc" in raw and "text_dec" in raw and given(raw, "labels"):
        return _from_keys(raw, _MEGATRON_KEYS, config, pg)
    if "input_ids" in raw and given(raw, "labels"):
        return _from_keys(raw, _HUGGING_FACE_KEYS, config, pg)
    raise unknown_keys(raw, _KEYS)


@frozen(kw_only=True)
class _RawKeys:
    """Under which keys a raw batch has its tensors."""

    tokens: str
    mask: str
    decoder_tokens: str
    decoder_mask: str


_MEGATRON_KEYS = _RawKeys(
    tokens="text_enc", mask="enc_mask", decoder_tokens="text_dec", decoder_mask="dec_mask"
)
_HUGGING_FACE_KEYS = _RawKeys(
    tokens="input_ids",
    mask="attention_mask",
    decoder_tokens="decoder_input_ids",
    decoder_mask="decoder_attention_mask",
)


def _from_keys(raw: Raw, keys: _RawKeys, config: TrainConfig, pg: ProcessGroups) -> Batch:
    model = config.model
    tokens = integers(raw, keys.tokens)
    labels = integers(raw, "labels")
    if labels.size(0) != tokens.size(0):
        raise ValueError(
            f"batch['labels'] of shape {list(labels.shape)}: expected {tokens.size(0)} rows, "
            f"as batch[{keys.tokens!r}] has."
        )
    real = real_tokens(raw, keys.mask, tokens)
    decoder_real = real_tokens(raw, keys.decoder_mask, labels)
    if given(raw, "loss_mask"):
        no_loss = zeros_and_ones(raw, "loss_mask", labels.shape) == 0
        labels = labels.masked_fill(no_loss, IGNORE)
    if given(raw, keys.decoder_tokens):
        decoder_tokens = integers(raw, keys.decoder_tokens, labels.shape)
    else:
        decoder_tokens = _shifted_right(labels, model.decoder_start_token_id)
    labels = labels.masked_fill(~decoder_real, IGNORE)
    check_ids(f"batch[{keys.tokens!r}]", tokens, model.vocab_size)
    check_labels(labels, model.vocab_size)
    check_ids(f"batch[{keys.decoder_tokens!r}]", decoder_tokens, model.vocab_size)
    _check_something_to_read(keys.mask, real)
    check_length(tokens.size(1), None, config)
    check_length(labels.size(1), None, config)
    batch = {
        "tokens": tokens,
        "decoder_tokens": decoder_tokens,
        "labels": labels,
        "loss_mask": (labels != IGNORE).long(),
        **_masks(real, decoder_real),
    }
    return on_device(batch, pg)


def _shifted_right(labels: torch.Tensor, start: int) -> torch.Tensor:
    """Decoder inputs: for each label the one before it; `start` for the first, and for -100."""
    first = torch.full_like(labels[:, :1], IGNORE)
    shifted = torch.cat([first, labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORE, start)


def _check_something_to_read(mask_key: str, real: torch.Tensor) -> None:
    if real.device.type != "cpu":
        return
    empty_rows = (~real.any(1)).nonzero()
    if empty_rows.numel():
        raise ValueError(
            f"batch[{mask_key!r}] hides every token of row {int(empty_rows[0])}: expected at least "
            "one real token."
        )


def _masks(real: torch.Tensor, decoder_real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Masks for the layers, True = hidden; none that would hide nothing but the future."""
    masks = {}
    if not real.all():
        hidden = ~real[:, None, None]
        masks["attention_mask"] = hidden
        masks["cross_attention_mask"] = hidden
    decoder_mask = causal_and_padding_mask(decoder_real)
    if decoder_mask is not None:
        masks["decoder_attention_mask"] = decoder_mask
    return masks


def t5_forward(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [t, batch, vocabulary / tp] on the last stage."""
    return model(
        batch["tokens"],
        batch["decoder_tokens"],
        batch.get("attention_mask"),
        batch.get("decoder_attention_mask"),
        batch.get("cross_attention_mask"),
    )


# --------------------------------------------------------------------------- building its chunk


def t5_modules(plan: ChunkPlan) -> dict[str, torch.nn.Module | None]:
    """Layers of the encoder on its stages, of the decoder on its own; without a pipeline both.

    The first stage of each half begins with an embedding.
    """
    split = decoder_stage(plan.config.parallel)
    stage = plan.pg.place.pp
    has_embedding = plan.pre_process or stage == split
    modules: dict[str, torch.nn.Module | None] = {}
    if has_embedding:
        modules["embedding"] = token_embedding(plan)
    modules |= _encoder(plan) if split is None or stage < split else _no_half("encoder")
    modules |= _decoder(plan) if split is None or stage >= split else _no_half("decoder")
    if plan.post_process:
        # a bias if tied, as in megatron-core's T5LMHead, unless the config leaves it out
        bias = plan.ties_output and plan.config.model.output_layer_bias
        modules["output_layer"] = output_layer(plan, beside_embedding=has_embedding, bias=bias)
    return modules


def _encoder(plan: ChunkPlan) -> dict[str, torch.nn.Module | None]:
    layer = layer_spec(plan.config, plan.pg, AttnMaskType.arbitrary)
    split = decoder_stage(plan.config.parallel)
    stages = 1 if split is None else split
    return {
        "encoder": _half_block(plan, plan.config.model.num_layers, stages, layer),
        "encoder_relative_pos_emb": _relative_positions(plan, both_ways=True),
    }


def _decoder(plan: ChunkPlan) -> dict[str, torch.nn.Module | None]:
    layer = layer_spec(plan.config, plan.pg, AttnMaskType.causal, cross=True)
    split = decoder_stage(plan.config.parallel)
    stages = 1 if split is None else plan.config.parallel.pp - split
    return {
        "decoder": _half_block(plan, plan.config.model.decoder_layers, stages, layer),
        "decoder_relative_pos_emb": _relative_positions(plan, both_ways=False),
    }


def _no_half(half: str) -> dict[str, None]:
    return {half: None, f"{half}_relative_pos_emb": None}


def _half_block(plan: ChunkPlan, layers: int, stages: int, layer: ModuleSpec) -> TransformerBlock:
    """This stage's layers of one half.

    To megatron-core a half is a pipeline of its own, whose rank and size number the layers.
    """
    half = plan.pg.half
    mcore = copy.copy(plan.mcore)
    mcore.num_layers = layers
    mcore.pipeline_model_parallel_size = stages
    collection = copy.copy(plan.pg.collection)
    collection.pp = half
    return TransformerBlock(
        mcore,
        TransformerBlockSubmodules(layer_specs=[layer] * (layers // stages), layer_norm=Norm),
        pre_process=half.rank() == 0,
        post_process=half.rank() == stages - 1,
        pg_collection=collection,
    )


def _relative_positions(plan: ChunkPlan, *, both_ways: bool) -> RelativePositionEmbedding | None:
    """The table of one half's relative positions. Each layer reads it: every stage has a copy."""
    model = plan.config.model
    if model.position_embedding != "relative":
        return None
    return RelativePositionEmbedding(
        both_ways,
        plan.mcore.init_method,
        model.num_attention_heads,
        model.relative_attention_num_buckets,
        model.relative_attention_max_distance,
    )


def t5_tie_tables(chunk: Chunk) -> None:
    """Marks the copies of word, position and relative-position tables that several stages hold."""
    pg = chunk.plan.pg
    if decoder_stage(chunk.plan.config.parallel) is None:
        tie_word_tables(chunk)
        return
    first_stage = pg.place.pp == 0
    # what megatron-core's gradient sum over `embd` asks for: the two embeddings are one, whatever
    # the output layer is
    chunk.share_embeddings_and_output_weights = True
    if chunk.pre_process:
        mark_copy(chunk.embedding.word_embeddings.weight, original=first_stage)
    elif chunk.post_process and chunk.plan.ties_output:
        mark_copy(chunk.output_layer.weight, original=False)
    if chunk.position_embeddings is not None:
        mark_copy(chunk.position_embeddings.weight, original=first_stage)
    for relative in (chunk.encoder_relative_pos_emb, chunk.decoder_relative_pos_emb):
        if relative is not None and pg.half.size() > 1:
            mark_copy(
                relative.relative_attention_bias.weight,
                original=pg.half.rank() == 0,
                group=pg.half,
            )


# -------------------------------------------------------------------------- computing its chunk


def t5_receive(chunk: Chunk, hidden: torch.Tensor | None) -> None:
    """Keeps what the previous stage sent, [s (+ t) (/ tp), batch, hidden], for both halves."""
    chunk.received = hidden


def t5_chunk_forward(
    chunk: Chunk,
    tokens: torch.Tensor,
    decoder_tokens: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    decoder_attention_mask: torch.Tensor | None = None,
    cross_attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """tokens [batch, s], decoder_tokens [batch, t] -> on the last stage, logits.

    Logits [t, batch, padded vocabulary / tp]; on earlier stages what the next one receives.
    Masks are bool, True = hidden: attention_mask [batch or 1, 1, s or 1, s], decoder_attention_mask
    [batch or 1, 1, t, t] with causality in it (None: only causal), cross_attention_mask
    [batch or 1, 1, t or 1, s].
    """
    cut = chunk.tp_group.size() if chunk.config.sequence_parallel else 1
    length = tokens.size(1) // cut
    memory = None
    received = None
    if chunk.received is not None:
        memory = chunk.received[:length]
        received = chunk.received[length:]
    if chunk.encoder is not None:
        relative = chunk.encoder_relative_pos_emb
        memory = _run_half(chunk, chunk.encoder, tokens, memory, attention_mask, relative)
    assert memory is not None  # a stage without an encoder received its output
    if chunk.decoder is None:
        if chunk.config.variable_seq_lengths:
            return memory
        decoder_length = decoder_tokens.size(1) // cut
        return F.pad(memory, (0, 0, 0, 0, 0, decoder_length))
    hidden = _run_half(
        chunk,
        chunk.decoder,
        decoder_tokens,
        received,
        decoder_attention_mask,
        chunk.decoder_relative_pos_emb,
        context=memory,
        context_mask=cross_attention_mask,
    )
    if not chunk.post_process:
        return torch.cat([memory, hidden])
    return _decoder_logits(chunk, hidden)


def t5_encode(
    chunk: Chunk, tokens: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """tokens [batch, s] -> the hidden state [s (/ tp), batch, hidden] after the encoder here.

    attention_mask: bool [batch or 1, 1, 1, s], True = hidden.
    """
    model = chunk.plan.config.model
    position_ids = torch.arange(tokens.size(1), device=tokens.device)
    if model.position_embedding == "learned_absolute":
        # padding, for sequence parallelism, may exceed the table
        position_ids = position_ids.clamp(max=model.position_rows - 1)
    return _run_half(
        chunk,
        chunk.encoder,
        tokens,
        chunk.received,
        attention_mask,
        chunk.encoder_relative_pos_emb,
        position_ids=position_ids.expand_as(tokens),
    )


def t5_decode(
    chunk: Chunk,
    tokens: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: KeyValueCache,
    memory: EncoderMemory,
    memory_mask: torch.Tensor | None,
) -> torch.Tensor:
    """New decoder tokens [batch, t] -> on the last stage, logits, as `gpt_chunk_forward` with a
    cache; on earlier stages the hidden state [t (/ tp), batch, hidden].

    attention_mask: bool [batch or 1, 1, t, tokens until now], True = hidden. memory_mask: bool
    [batch or 1, 1, 1, s].
    """
    hidden = _run_half(
        chunk,
        chunk.decoder,
        tokens,
        chunk.received,
        attention_mask,
        chunk.decoder_relative_pos_emb,
        position_ids=position_ids,
        cache=cache,
        context=memory,
        context_mask=memory_mask,
    )
    if not chunk.post_process:
        return hidden
    if not chunk.config.sequence_parallel:
        hidden = hidden[-1:]
    return _decoder_logits(chunk, hidden)


def _decoder_logits(chunk: Chunk, hidden: torch.Tensor) -> torch.Tensor:
    model = chunk.plan.config.model
    if model.scale_decoder_outputs:
        hidden = hidden * model.hidden_size**-0.5
    return vocabulary_logits(chunk, hidden)


def _run_half(
    chunk: Chunk,
    block: TransformerBlock,
    tokens: torch.Tensor,
    received: torch.Tensor | None,
    mask: torch.Tensor | None,
    relative: RelativePositionEmbedding | None,
    position_ids: torch.Tensor | None = None,
    cache: KeyValueCache | None = None,
    **context: torch.Tensor | EncoderMemory | None,
) -> torch.Tensor:
    """A half's layers here, on what they received or on the embedding of tokens.

    cache: keys and values of the tokens before these, when generating.
    """
    embedded = None
    if block.pre_process:
        embedded = embed(chunk, tokens, position_ids)
    else:
        block.set_input_tensor(received)
    if relative is not None:
        first = 0 if cache is None else cache.start
        keys = tokens.size(1) if cache is None else cache.start + cache.new
        mask = _with_relative_bias(chunk, relative, first, tokens.size(1), keys, mask)
    angles = rotary_angles(chunk, tokens, position_ids)
    return block(embedded, mask, rotary_pos_emb=angles, packed_seq_params=cache, **context)


def _with_relative_bias(
    chunk: Chunk,
    relative: RelativePositionEmbedding,
    first: int,
    queries: int,
    keys: int,
    hidden: torch.Tensor | None,
) -> torch.Tensor:
    """Biases of relative positions as a mask to add, [batch or 1, heads / tp, queries, keys].

    Of queries at positions `first`, first + 1, ... to keys from 0 on. As a mask, because
    megatron-core passes that through a recomputation with its gradient.
    """
    bias = _relative_bias(relative, first, queries, keys)
    bias = scatter_to_tensor_model_parallel_region(bias, chunk.tp_group).permute(0, 3, 1, 2)
    if hidden is None and not relative.bidirectional:
        rectangle = torch.ones(queries, keys, dtype=torch.bool, device=bias.device)
        hidden = rectangle.triu(first + 1)
    if hidden is None:
        return bias
    return bias.masked_fill(hidden, torch.finfo(bias.dtype).min)


def _relative_bias(
    relative: RelativePositionEmbedding, first: int, queries: int, keys: int
) -> torch.Tensor:
    """Biases [1, queries, keys, heads]: heads last, for tp cuts them.

    megatron-core's own function has queries from position 0 on.
    """
    table = relative.relative_attention_bias
    query_positions = torch.arange(first, first + queries, device=table.weight.device)
    key_positions = torch.arange(keys, device=table.weight.device)
    buckets = relative._relative_position_bucket(
        key_positions - query_positions[:, None],
        bidirectional=relative.bidirectional,
        num_buckets=relative.relative_attention_num_buckets,
        max_distance=relative.relative_attention_max_distance,
    )
    return table(buckets)[None]


# ------------------------------------------------------------------------------------ its data


class T5Dataset(T5MaskedWordPieceDataset):
    """Samples as tensors, 1 = real in masks.

    text_enc, enc_mask [seq_length], text_dec, labels, loss_mask, dec_mask [decoder_seq_length];
    truncated [].
    """

    def _build_sample_index(self, sequence_length: int, sentences: int) -> np.ndarray:
        return sample_index(self, sequence_length, sentences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: torch.as_tensor(value) for key, value in super().__getitem__(index).items()}


def t5_data(config: TrainConfig, tokenizer: Tokenizer) -> DatasetAndConfig:
    """The dataset class for span corruption, and its config.

    As Megatron-LM's pretrain_t5, spans of geometric length, at most 10 tokens or words. The encoder
    reads a run of sentences in which each span is one sentinel; the decoder begins with bos
    (padding, if a tokenizer has none, like T5's own) and writes each sentinel and its span, then
    eos. Raises ConfigError if a sample may have more spans than the tokenizer has sentinels, or
    than fit into decoder_seq_length.
    """
    begin = tokenizer.bos
    if begin is None and tokenizer.pad >= 0:
        begin = tokenizer.pad
    settings = masked_settings(
        config,
        attrs.evolve(tokenizer, bos=begin),
        ("bos", "eos", "additional_special_tokens_ids"),
    )
    _check_spans(config, sentinels=len(sentinels_in_vocabulary(config, tokenizer)))
    return T5Dataset, T5MaskedWordPieceDatasetConfig(
        **settings,
        masking_max_ngram=10,
        masking_use_geometric_distribution=True,
        sequence_length_decoder=config.model.decoder_length,
    )


def _check_spans(config: TrainConfig, sentinels: int) -> None:
    model = config.model
    data = data_of(config)
    spans = int(data.mask_prob * (model.seq_length - 2))
    lower = f"lower model.seq_length = {model.seq_length} or data.mask_prob = {data.mask_prob}"
    if spans > sentinels:
        raise ConfigError(
            f"data.tokenizer = {data.tokenizer!r} has {sentinels} sentinels, and a sample may have "
            f"{spans} spans; {lower}, or choose a tokenizer with more (ids of model.vocab_size = "
            f"{model.vocab_size} and above do not count)"
        )
    if model.decoder_length < 2 * spans + 1:
        raise ConfigError(
            f"model.decoder_seq_length = {model.decoder_length}: up to {spans} spans of a sample "
            f"are written; give {2 * spans + 1} or more, or {lower}"
        )


def one_sentence(model: ModelConfig) -> int:
    """Documents are split into sentences, and one is enough."""
    return 1


# --------------------------------------------------------------- as accelerate's train steps call


def _train_step_batch(batch: dict[str, torch.Tensor]) -> Batch:
    """Indexed data with Megatron-LM's masks [batch, queries, keys], 1 = real; or Hugging Face's."""
    if "text_enc" in batch and "text_dec" in batch:
        sequences = {"tokens": batch["text_enc"], "decoder_tokens": batch["text_dec"]}
        return {**sequences, **batch, **_megatron_masks(batch)}
    if "input_ids" not in batch or "labels" not in batch:
        return batch
    tokens = batch["input_ids"]
    batch.setdefault("attention_mask", torch.ones_like(tokens))
    decoder_tokens = batch.get("decoder_input_ids")
    if decoder_tokens is None:
        decoder_tokens = _shifted_right(batch["labels"], start=0)
    return {"tokens": tokens, "decoder_tokens": decoder_tokens, **batch}


def _megatron_masks(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks [batch, queries, keys] of those of tokens, [batch, sequence]."""
    real = batch["enc_mask"]
    decoder_real = batch["dec_mask"]
    if real.dim() != 2:
        return {}
    return {
        "enc_mask": real[:, :, None] * real[:, None],
        "dec_mask": (decoder_real[:, :, None] * decoder_real[:, None]).tril(),
        "enc_dec_mask": decoder_real[:, :, None] * real[:, None],
    }


def _call_from_train_step(
    model: torch.nn.Module,
    chunk: Any,
    tokens: torch.Tensor,
    decoder_tokens: torch.Tensor,
    enc_mask: torch.Tensor | None = None,
    dec_mask: torch.Tensor | None = None,
    enc_dec_mask: torch.Tensor | None = None,
    tokentype_ids: torch.Tensor | None = None,
    lm_labels: torch.Tensor | None = None,
) -> tuple[Any, Any]:
    """As Megatron-LM's T5 is called; losses [batch, sequence] if there are labels, else logits.

    Masks are bool, True = hidden.
    """
    if tokentype_ids is not None:
        raise ValueError("tokentype_ids: a T5 has no table of token types; give None.")
    output = model(
        tokens,
        decoder_tokens,
        _hidden("enc_mask", enc_mask),
        _hidden("dec_mask", dec_mask),
        _hidden("enc_dec_mask", enc_dec_mask),
    )
    if lm_labels is None or not getattr(chunk, "post_process", True):
        return output, output
    return output, cross_entropy(output, lm_labels, chunk.pg_collection)


def _hidden(name: str, mask: torch.Tensor | None) -> torch.Tensor | None:
    """A train step's mask [batch or 1, queries, keys] with an axis for the heads.

    Padding that may see nothing sees everything, or its softmax would be over nothing; nobody else
    sees it.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.dim() not in (3, 4):
        raise ValueError(
            f"{name}: expected bools [batch or 1, queries, keys], True = hidden, "
            f"got {mask.dtype} {list(mask.shape)}; compare a mask of 1 = real with < 0.5."
        )
    if mask.dim() == 3:
        mask = mask[:, None]
    return mask & ~mask.all(-1, keepdim=True)


def _first_decoder_stage(parallel: ParallelConfig) -> int:
    stage = decoder_stage(parallel)
    return 0 if stage is None else stage


def t5_example(model: ModelConfig, rows: int) -> dict[str, torch.Tensor]:
    """A raw micro-batch with the keys of megatron-core's dataset."""
    tokens = torch.zeros(rows, model.seq_length, dtype=torch.long)
    decoder_tokens = torch.zeros(rows, model.decoder_length, dtype=torch.long)
    return {
        "text_enc": tokens,
        "text_dec": decoder_tokens,
        "labels": decoder_tokens,
        "loss_mask": torch.ones_like(decoder_tokens),
        "enc_mask": torch.ones_like(tokens),
        "dec_mask": torch.ones_like(decoder_tokens),
    }


T5 = Family(
    spec=T5_SPEC,
    step=Step(batch=t5_batch, forward=t5_forward, loss=token_loss),
    chunk=ChunkFunctions(
        modules=t5_modules,
        tie_tables=t5_tie_tables,
        receive=t5_receive,
        forward=t5_chunk_forward,
    ),
    data=FamilyData(dataset=t5_data, sentences=one_sentence),
    train_step_calls=TrainStepCalls(batch=_train_step_batch, call=_call_from_train_step),
    reads_tokens_only=False,
    encoder_decoder=EncoderDecoder(
        first_decoder_stage=_first_decoder_stage, encode=t5_encode, decode=t5_decode
    ),
    example=t5_example,
)
