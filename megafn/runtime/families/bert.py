"""BERT: masked-language modelling with and without sentence order, and fine-tuning; its heads and its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.bert.pooler import Pooler
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import get_linear_layer

from megafn.pure.config.records import TrainConfig
from megafn.runtime.families.step import (
    Batch,
    as_tensor,
    check_ids,
    check_length,
    integers,
    zeros_and_ones,
)
from megafn.runtime.model.chunk import Chunk
from megafn.runtime.model.layers import Norm
from megafn.runtime.model.losses import IGNORE, Loss, token_loss
from megafn.runtime.parallel.groups import ProcessGroups


class MaskedHead(torch.nn.Module):
    """What stands before BERT's output layer: linear, GELU, norm. megatron-core's BertLMHead, whose norm refuses sequence parallelism."""

    def __init__(self, mcore: TransformerConfig):
        super().__init__()
        self.dense = get_linear_layer(mcore.hidden_size, mcore.hidden_size, mcore.init_method)
        self.layer_norm = Norm(mcore, mcore.hidden_size, mcore.layernorm_epsilon)
        for parameter in self.dense.parameters():
            parameter.sequence_parallel = mcore.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer_norm(F.gelu(self.dense(hidden)))


class BertChunk(Chunk):
    """A stage of BERT: attention in both directions; behind the block the masked-token head, with a binary head beside it
    for sentence order, or in their place a head of num_labels.

    Puts out, on the last stage, logits [sequence / cp, batch, padded vocabulary / tp]; with a binary head the tuple of
    these and logits of the order [batch, 2]; or logits of labels [batch, num_labels]. Those of a whole sequence come from
    its first position, so on the first cp rank alone they mean something.
    """

    block, mask = "encoder", AttnMaskType.padding

    def add_head(self, config: TrainConfig, *, bias: bool = True) -> None:
        model, mcore = config.model, self.config
        self.pooler = self.binary_head = self.classification_head = None
        if model.num_labels is None:
            self.lm_head = MaskedHead(mcore)
            super().add_head(config, bias=bias)
        if model.bert_binary_head or model.num_labels is not None:
            self.pooler = Pooler(model.hidden_size, mcore.init_method, mcore)
        if model.bert_binary_head:
            self.binary_head = get_linear_layer(model.hidden_size, 2, mcore.init_method)
        if model.num_labels is not None:
            self.classification_head = get_linear_layer(
                model.hidden_size, model.num_labels, mcore.init_method
            )

    def head(self, hidden: torch.Tensor) -> Any:
        if self.pooler is not None:
            first = hidden[:1]
            if (
                self.config.sequence_parallel
            ):  # each tp rank's first position, and of these the first
                first = gather_from_sequence_parallel_region(
                    first, tensor_parallel_output_grad=False, group=self.tp_group
                )
            pooled = self.pooler(first, 0)
        if self.classification_head is not None:
            return self.classification_head(
                F.dropout(pooled, self.config.hidden_dropout, self.training)
            )
        logits = super().head(self.lm_head(hidden))
        return logits if self.binary_head is None else (logits, self.binary_head(pooled))


def hide_padding(real: torch.Tensor) -> torch.Tensor | None:
    """From bools [batch, sequence], True = real, to a mask [batch, 1, 1, sequence], True = hidden; None where nothing is padded."""
    if real.all():
        return None
    return (~real & real.any(1, keepdim=True))[
        :, None, None
    ]  # a row without anything real sees itself: no mean over nothing


def bert_batch(raw: Mapping[str, Any], config: TrainConfig, pg: ProcessGroups) -> Batch:
    """A micro-batch of masked tokens, or of sequences with a label each, from one of two kinds of raw batch.

    - text, types, labels, loss_mask, padding_mask (1 = real) [b, s], is_random [b]: as megatron-core's dataset gives them.
    - input_ids [b, s], with attention_mask (1 = real), token_type_ids, position_ids [b, s] and labels where given: as a
      Hugging Face collator gives them. Labels are [b, s], not shifted (-100: no loss), and with a binary head
      next_sentence_label [b] (1: in the wrong order; -1 or -100: no loss); or, with num_labels, [b] or [b, num_labels].
    Raises ValueError on other keys, shapes and dtypes, and on ids outside the vocabulary, the tables or the labels.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"batch = {type(raw).__name__}: a mapping with 'input_ids', or with 'text', 'labels' and 'loss_mask', is wanted."
        )
    model, ours = config.model, "text" in raw
    if not ours and "input_ids" not in raw:
        raise ValueError(
            f"batch keys = {sorted(map(str, raw))}: 'input_ids', or 'text', 'labels' and 'loss_mask', are wanted."
        )
    names = (
        ("text", "padding_mask", "types", "is_random")
        if ours
        else ("input_ids", "attention_mask", "token_type_ids", "next_sentence_label")
    )
    tokens = integers(raw, names[0])
    rows, shape = tokens.size(0), tokens.shape
    real = (
        zeros_and_ones(raw, names[1], shape).bool()
        if raw.get(names[1]) is not None
        else torch.ones_like(tokens, dtype=torch.bool)
    )
    batch: dict[str, torch.Tensor] = {"tokens": tokens}
    if (hidden := hide_padding(real)) is not None:
        batch["attention_mask"] = hidden
    types = (
        integers(raw, names[2], shape)
        if raw.get(names[2]) is not None
        else torch.zeros_like(tokens)
    )
    types = types.masked_fill(~real, 0)
    if types.device.type == "cpu" and not 0 <= types.min() <= types.max() < max(
        1, model.num_tokentypes
    ):
        raise ValueError(
            f"batch[{names[2]!r}] from {types.min()} to {types.max()}: the table of token types has model.num_tokentypes = "
            f"{model.num_tokentypes} rows; raise it (2 for pairs of sentences), or leave the types out."
        )
    if model.num_tokentypes:
        batch["tokentype_ids"] = types
    if raw.get("position_ids") is not None:
        batch["position_ids"] = integers(raw, "position_ids", shape)
    if model.num_labels is not None:
        batch |= _class_labels(raw, model, rows)
    else:
        labels = (
            integers(raw, "labels", shape)
            if raw.get("labels") is not None
            else torch.full_like(tokens, IGNORE)
        )
        if raw.get("loss_mask") is not None:
            labels = labels.masked_fill(zeros_and_ones(raw, "loss_mask", shape) == 0, IGNORE)
        batch |= {"labels": labels, "loss_mask": (labels != IGNORE).long()}
        check_ids("batch['labels']", labels.masked_fill(labels == IGNORE, 0), model.vocab_size)
        if model.bert_binary_head:
            batch["is_random"] = _order(raw, names[3], rows)
    check_ids(f"batch[{names[0]!r}]", tokens, model.vocab_size)
    check_length(tokens.size(1), batch.get("position_ids"), config)
    return {key: value.to(pg.device, non_blocking=True) for key, value in batch.items()}


def _order(raw: Mapping[str, Any], key: str, rows: int) -> torch.Tensor:
    """raw[key] as int64 [batch]: 0 or 1, or -100 where nothing is known."""
    if raw.get(key) is None:
        if raw.get("labels") is not None:
            raise ValueError(
                f"batch keys = {sorted(map(str, raw))}: {key!r} [batch] is wanted for the binary head; give it, or leave model.bert_binary_head out."
            )
        return torch.full((rows,), IGNORE)
    wanted = f"0, 1 or -1 (no loss) of shape [{rows}]"
    order = as_tensor(raw, key, wanted)
    if (
        order.numel() != rows
        or order.is_floating_point()
        or order.device.type == "cpu"
        and not all(value in (0, 1, -1, IGNORE) for value in order.flatten().tolist())
    ):
        raise ValueError(
            f"batch[{key!r}] = {order.dtype} of shape {list(order.shape)}: {wanted} are wanted."
        )
    order = order.reshape(rows).long()
    return order.masked_fill(order < 0, IGNORE)


def _class_labels(raw: Mapping[str, Any], model: Any, rows: int) -> Batch:
    """Labels of whole sequences, flat, under the key of their loss: "targets" (values), "classes" (one of each), "flags" (several)."""
    n = model.num_labels
    if raw.get("labels") is None:
        return {}
    labels = as_tensor(raw, "labels", f"numbers of shape [{rows}] or [{rows}, {n}]")
    kind = model.problem_type or (
        "regression"
        if n == 1
        else "multi_label_classification"
        if labels.is_floating_point()
        else "single_label_classification"
    )
    count = rows if kind == "single_label_classification" else rows * n
    if labels.numel() != count or labels.shape[:1] != (rows,):
        raise ValueError(
            f"batch['labels'] of shape {list(labels.shape)}: {kind} of {n} labels wants {count // rows} for each of {rows} rows."
        )
    labels = labels.flatten()
    if kind == "regression":
        return {"targets": labels.float()}
    if kind == "multi_label_classification":
        if labels.device.type == "cpu" and not ((labels >= 0) & (labels <= 1)).all():
            raise ValueError(
                f"batch['labels'] from {labels.min()} to {labels.max()}: {kind} wants values from 0 to 1."
            )
        return {"flags": labels.float()}
    if (
        labels.is_floating_point()
        or labels.device.type == "cpu"
        and not ((labels == IGNORE) | (labels >= 0) & (labels < n)).all()
    ):
        raise ValueError(
            f"batch['labels'] = {labels.dtype} from {labels.min()} to {labels.max()}: {kind} wants integers 0 to {n - 1}, or -100 (no loss)."
        )
    return {"classes": labels.long()}


def bert_forward(model: torch.nn.Module, batch: Batch) -> Any:
    """What `BertChunk` puts out."""
    return model(
        batch["tokens"],
        batch.get("position_ids"),
        batch.get("attention_mask"),
        batch.get("tokentype_ids"),
    )


def weigh_sentence_pairs(micro_batches: Sequence[Batch], pg: ProcessGroups) -> Sequence[Batch]:
    """Where the order of sentences is learned: how many masked tokens the global batch has for each sentence pair that counts.

    Raises ValueError, on every rank, where a model with num_labels is given none.
    """
    if not {"labels", "classes", "flags", "targets"} & micro_batches[0].keys():
        raise ValueError(
            "batch['labels'] is missing: labels are what a model with num_labels is trained on."
        )
    if "is_random" not in micro_batches[0]:
        return micro_batches
    counts = torch.stack(
        [
            torch.stack((batch["loss_mask"].sum(), (batch["is_random"] >= 0).sum()))
            for batch in micro_batches
        ]
    ).sum(0)
    dist.all_reduce(counts, group=pg.dp)
    weight = counts[0] / counts[1].clamp(min=1)
    return [{**batch, "tokens_per_pair": weight} for batch in micro_batches]


def bert_loss(output: Any, batch: Batch, pg: ProcessGroups) -> Loss:
    """Mean loss of masked tokens plus mean loss of sentence order; or the mean loss of labels, counted by sequences.

    Both means are over the whole global batch. Everything is divided by the number of masked tokens, so a sentence
    pair's loss is weighed by their number over that of pairs. Labels: cross-entropy of one class, binary cross-entropy
    of several (the mean over num_labels), or mean squared error, as transformers' MegatronBertForSequenceClassification.
    """
    here = int(pg.place.cp == 0)  # elsewhere the first position is not the sequence's
    if "labels" in batch:
        logits, order = output if isinstance(output, tuple) else (output, None)
        loss = token_loss(logits, batch, pg)
        if order is None:
            return loss
        pairs = (
            F.cross_entropy(order.float(), batch["is_random"], ignore_index=IGNORE, reduction="sum")
            * batch["tokens_per_pair"]
            * here
        )
        return Loss(
            sum=loss.sum + pairs, count=loss.count, report={"lm_loss": loss.sum, "sop_loss": pairs}
        )
    rows, n = output.shape
    if "classes" in batch:
        losses = F.cross_entropy(
            output.float(), batch["classes"], ignore_index=IGNORE, reduction="none"
        )
        return Loss(sum=losses.sum() * here, count=(batch["classes"] != IGNORE).sum() * here)
    if "flags" in batch:
        losses = F.binary_cross_entropy_with_logits(
            output.float(), batch["flags"].view(rows, n), reduction="none"
        )
    else:
        losses = F.mse_loss(output.float(), batch["targets"].view(rows, n), reduction="none")
    return Loss(sum=losses.mean(1).sum() * here, count=rows * here)
