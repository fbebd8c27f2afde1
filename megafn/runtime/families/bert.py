"""BERT: masked-language modelling with and without sentence order, and fine-tuning on labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from attrs import frozen
from megatron.core.datasets.bert_dataset import (
    BERTMaskedWordPieceDataset,
    BERTMaskedWordPieceDatasetConfig,
)
from megatron.core.models.bert.pooler import Pooler
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import get_linear_layer

from megafn.pure.config.records import ModelConfig, TrainConfig
from megafn.pure.families.bert import BERT_SPEC
from megafn.runtime.families.batch_checks import (
    Raw,
    as_tensor,
    check_ids,
    check_labels,
    check_length,
    check_mapping,
    given,
    integers,
    on_device,
    padding_mask,
    real_tokens,
    unknown_keys,
    zeros_and_ones,
)
from megafn.runtime.families.family import DatasetAndConfig, Family, FamilyData, TrainStepCalls
from megafn.runtime.families.masked_data import masked_settings, sample_index
from megafn.runtime.families.step import Batch, Step
from megafn.runtime.model.chunk import Chunk, ChunkFunctions, ChunkPlan
from megafn.runtime.model.layers import Norm, layer_spec
from megafn.runtime.model.losses import IGNORE, Loss, cross_entropy, token_loss
from megafn.runtime.model.parts import (
    one_stack_block,
    one_stack_hidden,
    output_layer,
    tie_word_tables,
    token_embedding,
    vocabulary_logits,
)
from megafn.runtime.parallel.groups import ProcessGroups
from megafn.runtime.text.tokenizer import Tokenizer

# ----------------------------------------------------------------------------- its raw batches

_KEYS = "'input_ids', or 'text', 'labels' and 'loss_mask'"
_LABEL_KEYS = {"labels", "classes", "flags", "targets"}

# What the last chunk returns, see `bert_chunk_forward`.
Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def bert_batch(raw: Mapping[str, Any], config: TrainConfig, pg: ProcessGroups) -> Batch:
    """A micro-batch of masked tokens, or of labelled sequences, from one of two kinds of raw batch.

    - text, types, labels, loss_mask, padding_mask (1 = real) [b, s], is_random [b]: as
      megatron-core's dataset gives them.
    - input_ids [b, s], with attention_mask (1 = real), token_type_ids, position_ids [b, s] and
      labels if given: as a Hugging Face collator gives them. Labels are [b, s], not shifted (-100:
      no loss), and with a binary head next_sentence_label [b] (1: in the wrong order; -1 or -100:
      no loss); or, with num_labels, [b] or [b, num_labels].
    Raises ValueError on other keys, shapes and dtypes, and on ids outside the vocabulary, the
    tables or the labels.
    """
    check_mapping(raw, _KEYS)
    if "text" in raw:
        return _from_keys(raw, _MEGATRON_KEYS, config, pg)
    if "input_ids" in raw:
        return _from_keys(raw, _HUGGING_FACE_KEYS, config, pg)
    raise unknown_keys(raw, _KEYS)


@frozen(kw_only=True)
class _RawKeys:
    """Under which keys a raw batch has its tensors."""

    tokens: str
    mask: str
    types: str
    order: str


_MEGATRON_KEYS = _RawKeys(tokens="text", mask="padding_mask", types="types", order="is_random")
_HUGGING_FACE_KEYS = _RawKeys(
    tokens="input_ids", mask="attention_mask", types="token_type_ids", order="next_sentence_label"
)


def _from_keys(raw: Raw, keys: _RawKeys, config: TrainConfig, pg: ProcessGroups) -> Batch:
    model = config.model
    tokens = integers(raw, keys.tokens)
    real = real_tokens(raw, keys.mask, tokens)
    batch = {"tokens": tokens}
    mask = padding_mask(real)
    if mask is not None:
        batch["attention_mask"] = mask
    types = _token_types(raw, keys.types, real, model.num_tokentypes)
    if model.num_tokentypes:
        batch["tokentype_ids"] = types
    if given(raw, "position_ids"):
        batch["position_ids"] = integers(raw, "position_ids", tokens.shape)
    if model.num_labels is not None:
        batch |= _class_labels(raw, model.problem_type, model.num_labels, tokens.size(0))
    else:
        labels = _token_labels(raw, tokens)
        check_labels(labels, model.vocab_size)
        batch |= {"labels": labels, "loss_mask": (labels != IGNORE).long()}
    if model.num_labels is None and model.bert_binary_head:
        batch["is_random"] = _sentence_order(raw, keys.order, tokens.size(0))
    check_ids(f"batch[{keys.tokens!r}]", tokens, model.vocab_size)
    check_length(tokens.size(1), batch.get("position_ids"), config)
    return on_device(batch, pg)


def _token_types(raw: Raw, key: str, real: torch.Tensor, rows: int) -> torch.Tensor:
    """raw[key] like the tokens, 0 for padding; rows: of their table, 0 if there is none."""
    types = torch.zeros_like(real, dtype=torch.long)
    if given(raw, key):
        types = integers(raw, key, real.shape).masked_fill(~real, 0)
    if types.device.type != "cpu":
        return types
    low, high = (int(bound) for bound in types.aminmax())
    if low < 0 or high >= max(1, rows):
        raise ValueError(
            f"batch[{key!r}] from {low} to {high}: the table of token types has "
            f"model.num_tokentypes = {rows} rows; raise it (2 for pairs of sentences), or leave "
            "the types out."
        )
    return types


def _token_labels(raw: Raw, tokens: torch.Tensor) -> torch.Tensor:
    """What each position predicts, -100 if there is no loss."""
    if not given(raw, "labels"):
        labels = torch.full_like(tokens, IGNORE)
    else:
        labels = integers(raw, "labels", tokens.shape)
    if given(raw, "loss_mask"):
        no_loss = zeros_and_ones(raw, "loss_mask", tokens.shape) == 0
        labels = labels.masked_fill(no_loss, IGNORE)
    return labels


def _sentence_order(raw: Raw, key: str, rows: int) -> torch.Tensor:
    """raw[key] as int64 [batch]: 0 or 1, or -100 if nothing is known."""
    if not given(raw, key):
        if given(raw, "labels"):
            raise ValueError(
                f"batch keys = {sorted(map(str, raw))}: expected {key!r} [batch] for the binary "
                "head; give it, or leave model.bert_binary_head out."
            )
        return torch.full((rows,), IGNORE)
    expected = f"0, 1 or -1 (no loss) of shape [{rows}]"
    order = as_tensor(raw, key, expected)
    fits = order.numel() == rows and not order.is_floating_point()
    if fits and order.device.type == "cpu":
        fits = all(value in (0, 1, -1, IGNORE) for value in order.flatten().tolist())
    if not fits:
        raise ValueError(
            f"batch[{key!r}] = {order.dtype} of shape {list(order.shape)}: expected {expected}."
        )
    order = order.reshape(rows).long()
    return order.masked_fill(order < 0, IGNORE)


def _class_labels(
    raw: Raw, problem_type: str | None, count: int, rows: int
) -> dict[str, torch.Tensor]:
    """Labels of whole sequences, flat, under the key of their loss.

    "targets" (values), "classes" (one of each) or "flags" (several); none if no labels are given.
    """
    if not given(raw, "labels"):
        return {}
    labels = as_tensor(raw, "labels", f"numbers of shape [{rows}] or [{rows}, {count}]")
    kind = problem_type or _problem_type(labels, count)
    labels_a_row = 1 if kind == "single_label_classification" else count
    if labels.numel() != rows * labels_a_row or labels.shape[:1] != (rows,):
        raise ValueError(
            f"batch['labels'] of shape {list(labels.shape)}: expected {labels_a_row} for each of "
            f"{rows} rows, for {kind} with {count} labels."
        )
    labels = labels.flatten()
    if kind == "regression":
        return {"targets": labels.float()}
    if kind == "multi_label_classification":
        return {"flags": _flags(labels)}
    return {"classes": _classes(labels, count)}


def _problem_type(labels: torch.Tensor, count: int) -> str:
    """The kind of loss that follows from labels, as in transformers."""
    if count == 1:
        return "regression"
    if labels.is_floating_point():
        return "multi_label_classification"
    return "single_label_classification"


def _flags(labels: torch.Tensor) -> torch.Tensor:
    if labels.device.type == "cpu" and not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError(
            f"batch['labels'] from {labels.min()} to {labels.max()}: expected values from 0 to 1 "
            "for multi_label_classification."
        )
    return labels.float()


def _classes(labels: torch.Tensor, count: int) -> torch.Tensor:
    fits = not labels.is_floating_point()
    if fits and labels.device.type == "cpu":
        fits = bool(((labels == IGNORE) | (labels >= 0) & (labels < count)).all())
    if not fits:
        raise ValueError(
            f"batch['labels'] = {labels.dtype} from {labels.min()} to {labels.max()}: expected "
            f"integers 0 to {count - 1}, or -100 (no loss), for single_label_classification."
        )
    return labels.long()


# -------------------------------------------------------------------------- forward and losses


def bert_forward(model: torch.nn.Module, batch: Batch) -> Output:
    """What `bert_chunk_forward` returns."""
    return model(
        batch["tokens"],
        batch.get("position_ids"),
        batch.get("attention_mask"),
        batch.get("tokentype_ids"),
    )


def weigh_sentence_pairs(micro_batches: Sequence[Batch], pg: ProcessGroups) -> Sequence[Batch]:
    """For the loss of sentence order: the global batch's masked tokens for each counted pair.

    Raises ValueError, on every rank, if there are no labels at all.
    """
    first = micro_batches[0]
    if not _LABEL_KEYS & first.keys():
        raise ValueError(
            "batch['labels'] is missing: labels are what a model with num_labels is trained on."
        )
    if "is_random" not in first:
        return micro_batches
    tokens = [batch["loss_mask"].sum() for batch in micro_batches]
    pairs = [(batch["is_random"] >= 0).sum() for batch in micro_batches]
    counts = torch.stack([torch.stack(tokens).sum(), torch.stack(pairs).sum()])
    dist.all_reduce(counts, group=pg.dp)
    weight = counts[0] / counts[1].clamp(min=1)
    return [{**batch, "tokens_per_pair": weight} for batch in micro_batches]


def bert_loss(output: Output, batch: Batch, pg: ProcessGroups) -> Loss:
    """Mean loss of masked tokens plus mean loss of sentence order; or the mean loss of labels.

    Both means are over the whole global batch. Everything is divided by the number of masked
    tokens, so a sentence pair's loss is weighed by their number over that of pairs. Labels:
    cross-entropy of one class, binary cross-entropy of several (the mean over num_labels), or mean
    squared error, as transformers' MegatronBertForSequenceClassification, counted by sequences.
    """
    if isinstance(output, tuple):
        logits, order = output
        return _masked_and_order_loss(logits, order, batch, pg)
    if "labels" not in batch:
        return _label_loss(output, batch, pg)
    return token_loss(output, batch, pg)


def _has_first_position(pg: ProcessGroups) -> int:
    """1 on the context-parallel rank that holds the first position of each sequence, else 0."""
    return int(pg.place.cp == 0)


def _masked_and_order_loss(
    logits: torch.Tensor, order: torch.Tensor, batch: Batch, pg: ProcessGroups
) -> Loss:
    masked = token_loss(logits, batch, pg)
    pairs = F.cross_entropy(order.float(), batch["is_random"], ignore_index=IGNORE, reduction="sum")
    weighed = pairs * batch["tokens_per_pair"] * _has_first_position(pg)
    return Loss(
        sum=masked.sum + weighed,
        count=masked.count,
        report={"lm_loss": masked.sum, "sop_loss": weighed},
    )


def _label_loss(output: torch.Tensor, batch: Batch, pg: ProcessGroups) -> Loss:
    """The loss of logits [batch, num_labels], by the kind of labels that the batch has."""
    here = _has_first_position(pg)
    logits = output.float()
    rows, count = logits.shape
    if "classes" in batch:
        classes = batch["classes"]
        losses = F.cross_entropy(logits, classes, ignore_index=IGNORE, reduction="none")
        return Loss(sum=losses.sum() * here, count=(classes != IGNORE).sum() * here)
    if "flags" in batch:
        flags = batch["flags"].view(rows, count)
        losses = F.binary_cross_entropy_with_logits(logits, flags, reduction="none")
    else:
        losses = F.mse_loss(logits, batch["targets"].view(rows, count), reduction="none")
    return Loss(sum=losses.mean(1).sum() * here, count=rows * here)


# ----------------------------------------------------------------------------------- its chunk


class MaskedHead(torch.nn.Module):
    """Before BERT's output layer: linear, GELU, norm.

    megatron-core's BertLMHead, whose norm refuses sequence parallelism.
    """

    def __init__(self, mcore: TransformerConfig):
        super().__init__()
        self.dense = get_linear_layer(mcore.hidden_size, mcore.hidden_size, mcore.init_method)
        self.layer_norm = Norm(mcore, mcore.hidden_size, mcore.layernorm_epsilon)
        for parameter in self.dense.parameters():
            parameter.sequence_parallel = mcore.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer_norm(F.gelu(self.dense(hidden)))


def bert_modules(plan: ChunkPlan) -> dict[str, torch.nn.Module | None]:
    """Embedding, layers that attend in both directions, and heads.

    The masked-token head, with a binary head beside it for sentence order; or in their place a head
    of num_labels.
    """
    layer = layer_spec(plan.config, plan.pg, AttnMaskType.padding)
    modules: dict[str, torch.nn.Module | None] = {}
    if plan.pre_process:
        modules["embedding"] = token_embedding(plan)
    modules["encoder"] = one_stack_block(plan, layer)
    if plan.post_process:
        modules |= _heads(plan)
    return modules


def _heads(plan: ChunkPlan) -> dict[str, torch.nn.Module | None]:
    model = plan.config.model
    mcore = plan.mcore
    heads: dict[str, torch.nn.Module | None] = {
        "pooler": None,
        "binary_head": None,
        "classification_head": None,
    }
    if model.num_labels is None:
        heads["lm_head"] = MaskedHead(mcore)
        heads["output_layer"] = output_layer(plan, beside_embedding=plan.pre_process, bias=True)
    if model.bert_binary_head or model.num_labels is not None:
        heads["pooler"] = Pooler(model.hidden_size, mcore.init_method, mcore)
    if model.bert_binary_head:
        heads["binary_head"] = get_linear_layer(model.hidden_size, 2, mcore.init_method)
    if model.num_labels is not None:
        heads["classification_head"] = get_linear_layer(
            model.hidden_size, model.num_labels, mcore.init_method
        )
    return heads


def bert_receive(chunk: Chunk, hidden: torch.Tensor | None) -> None:
    chunk.encoder.set_input_tensor(hidden)


def bert_chunk_forward(
    chunk: Chunk,
    tokens: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    tokentype_ids: torch.Tensor | None = None,
) -> Output:
    """tokens, position_ids, tokentype_ids [batch, sequence / cp] -> on the last stage, one of:

    - logits [sequence / cp, batch, padded vocabulary / tp];
    - with a binary head the tuple of these and logits of the order [batch, 2];
    - with num_labels, logits of labels [batch, num_labels].
    On earlier stages the hidden state. What is predicted of a whole sequence comes from its first
    position, so it is meaningful only on the first cp rank.
    """
    hidden = one_stack_hidden(
        chunk, chunk.encoder, tokens, position_ids, attention_mask, tokentype_ids
    )
    if not chunk.post_process:
        return hidden
    if chunk.classification_head is not None:
        pooled = _pooled(chunk, hidden)
        dropped = F.dropout(pooled, chunk.config.hidden_dropout, chunk.training)
        return chunk.classification_head(dropped)
    if chunk.binary_head is None:
        return vocabulary_logits(chunk, chunk.lm_head(hidden))
    pooled = _pooled(chunk, hidden)
    return vocabulary_logits(chunk, chunk.lm_head(hidden)), chunk.binary_head(pooled)


def _pooled(chunk: Chunk, hidden: torch.Tensor) -> torch.Tensor:
    """The pooler's output [batch, hidden] for the first position of each sequence."""
    first = hidden[:1]
    if chunk.config.sequence_parallel:
        # each tp rank's first position, and the pooler takes the first of these
        first = gather_from_sequence_parallel_region(
            first, tensor_parallel_output_grad=False, group=chunk.tp_group
        )
    return chunk.pooler(first, 0)


# ------------------------------------------------------------------------------------ its data


class BertDataset(BERTMaskedWordPieceDataset):
    """Samples as tensors: text, types, labels, loss_mask, padding_mask (1 = real) [sequence].

    And is_random, truncated [].
    """

    def _build_sample_index(self, sequence_length: int, sentences: int) -> np.ndarray:
        return sample_index(self, sequence_length, sentences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = {key: torch.as_tensor(value) for key, value in super().__getitem__(index).items()}
        # padding is marked by -1, see `masked_settings`
        real = (row["padding_mask"] == 1).long()
        return row | {"padding_mask": real, "types": row["types"] * real}


def bert_data(config: TrainConfig, tokenizer: Tokenizer) -> DatasetAndConfig:
    """The dataset class for masked tokens, and its config.

    As Megatron-LM's pretrain_bert, runs of up to three tokens or words.
    """
    return BertDataset, BERTMaskedWordPieceDatasetConfig(
        **masked_settings(config, tokenizer, ("cls", "sep", "mask")),
        masking_max_ngram=3,
        masking_use_geometric_distribution=False,
        classification_head=config.model.bert_binary_head,
    )


def bert_sentences(model: ModelConfig) -> int:
    """Two if their order is predicted."""
    return 2 if model.bert_binary_head else 1


# --------------------------------------------------------------- as accelerate's train steps call


def _train_step_batch(batch: dict[str, torch.Tensor]) -> Batch:
    if "text" in batch:
        batch["tokens"] = batch["text"]
    return batch


def _call_from_train_step(
    model: torch.nn.Module,
    chunk: Any,
    tokens: torch.Tensor,
    real: torch.Tensor | None = None,
    *,
    tokentype_ids: torch.Tensor | None = None,
    lm_labels: torch.Tensor | None = None,
) -> tuple[Any, Any]:
    """model(tokens, padding_mask, tokentype_ids=, lm_labels=), as Megatron-LM's BERT is called.

    With labels: (losses [batch, sequence], logits of the order or None).
    """
    mask = None if real is None else padding_mask(real > 0.5)
    output = model(tokens, None, mask, tokentype_ids)
    if lm_labels is None or not getattr(chunk, "post_process", True):
        return output, output
    logits, order = output if isinstance(output, tuple) else (output, None)
    return output, (cross_entropy(logits, lm_labels, chunk.pg_collection), order)


def bert_example(model: ModelConfig, rows: int) -> dict[str, torch.Tensor]:
    """A raw micro-batch with the keys of megatron-core's dataset, or with labels of sequences."""
    tokens = torch.zeros(rows, model.seq_length, dtype=torch.long)
    ones = torch.ones_like(tokens)
    batch = {"text": tokens, "types": tokens, "padding_mask": ones}
    count = model.num_labels
    if count is None:
        order = torch.zeros(rows, dtype=torch.long)
        return batch | {"labels": tokens, "loss_mask": ones, "is_random": order}
    # of several labels without a problem_type, one class for each sequence, as in transformers
    one_class = model.problem_type is None and count > 1
    if one_class or model.problem_type == "single_label_classification":
        return batch | {"labels": torch.zeros(rows, dtype=torch.long)}
    return batch | {"labels": torch.zeros(rows, count)}


BERT = Family(
    spec=BERT_SPEC,
    step=Step(
        batch=bert_batch,
        forward=bert_forward,
        loss=bert_loss,
        prepare_global_batch=weigh_sentence_pairs,
    ),
    chunk=ChunkFunctions(
        modules=bert_modules,
        tie_tables=tie_word_tables,
        receive=bert_receive,
        forward=bert_chunk_forward,
    ),
    data=FamilyData(dataset=bert_data, sentences=bert_sentences),
    train_step_calls=TrainStepCalls(batch=_train_step_batch, call=_call_from_train_step),
    example=bert_example,
)
