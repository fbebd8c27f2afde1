"""A family of models, complete in one record of functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import frozen
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset

from megafn.pure.config.records import ModelConfig, ParallelConfig, TrainConfig
from megafn.pure.families.family_spec import FamilySpec
from megafn.runtime.families.step import Batch, Step
from megafn.runtime.model.chunk import ChunkFunctions
from megafn.runtime.model.losses import cross_entropy
from megafn.runtime.text.tokenizer import Tokenizer

# megatron-core's dataset class of a family's samples, and its config.
DatasetAndConfig = tuple[type[MegatronDataset], BlendedMegatronDatasetConfig]


@frozen(kw_only=True)
class FamilyData:
    """Which of megatron-core's datasets reads a family's samples.

    dataset(config, tokenizer) -> (dataset class, its config). Raises ConfigError if the tokenizer
        lacks a special token that the samples need.
    sentences(model): how many sentences a document needs to be read; 0 if documents are runs of
        tokens that are not split into sentences.
    """

    dataset: Callable[[TrainConfig, Tokenizer], DatasetAndConfig]
    sentences: Callable[[ModelConfig], int]


def dataset_settings(config: TrainConfig) -> dict[str, Any]:
    """Arguments that the configs of all of megatron-core's datasets have in common."""
    return dict(
        random_seed=config.seed,
        sequence_length=config.model.seq_length,
        # not used: `build_dataset` is given the corpora, and the documents of the split
        blend=(["megafn"], None),
        split="1",
        # "" (None means a folder beside the data): each rank builds the indices in memory. In a
        # cache folder megatron-core writes them on global rank 0 only, not atomically, and the
        # others wait at a barrier: a second host has no files, a second run reads half of one, and
        # an error on rank 0 hangs the rest.
        path_to_cache="",
    )


def next_token_batch(batch: dict[str, torch.Tensor]) -> Batch:
    """Adds "tokens" and "labels" to a batch with "text" [batch, sequence + 1], or the reverse."""
    if "text" in batch and "tokens" not in batch:
        # before the rest: the micro-batch's shape is that of its inputs
        text = batch["text"]
        return {"tokens": text[:, :-1], "labels": text[:, 1:]} | batch
    if "tokens" in batch and "labels" in batch:
        last = batch["labels"][:, -1:]
        return batch | {"text": torch.cat([batch["tokens"], last], dim=1)}
    return batch


def call_for_token_losses(
    model: torch.nn.Module,
    chunk: Any,
    *inputs: Any,
    labels: torch.Tensor | None = None,
    **named: Any,
) -> tuple[Any, Any]:
    """model(*inputs, labels=labels): losses [batch, sequence] if labels are given, else logits."""
    output = model(*inputs, **named)
    if labels is None or not getattr(chunk, "post_process", True):
        return output, output
    return output, cross_entropy(output, labels, chunk.pg_collection)


def example_of_tokens(model: ModelConfig, rows: int) -> dict[str, torch.Tensor]:
    """A raw micro-batch with the keys of megatron-core's GPT dataset: every token is 0."""
    tokens = torch.zeros(rows, model.seq_length, dtype=torch.long)
    return {
        "tokens": tokens,
        "labels": tokens,
        "loss_mask": torch.ones(rows, model.seq_length),
        "position_ids": torch.arange(model.seq_length).expand(rows, -1),
    }


@frozen(kw_only=True)
class TrainStepCalls:
    """How accelerate's train steps, written for Megatron-LM, read batches and call the model.

    batch(batch): gives tensors the names that the train steps know.
    call(model, chunk, *inputs, **named) -> (the model's output, what the train step gets): `chunk`
        is the module inside the wrapper `model`, and losses are made of logits if labels are given.
    """

    batch: Callable[[dict[str, torch.Tensor]], Batch] = next_token_batch
    call: Callable[..., tuple[Any, Any]] = call_for_token_losses


@frozen(kw_only=True)
class EncoderDecoder:
    """How `megafn.generate` runs a family whose encoder reads the prompts and whose decoder writes.

    Each pipeline stage has one chunk, of one half or, without a pipeline, of both.
    first_decoder_stage(parallel): the stage at which the decoder begins; 0 without a pipeline.
    encode(chunk, tokens, mask): this chunk's share of the encoder, see `families.t5.t5_encode`.
    decode(chunk, tokens, position_ids, mask, cache, memory, memory_mask): its share of the decoder,
        see `families.t5.t5_decode`.
    """

    first_decoder_stage: Callable[[ParallelConfig], int]
    encode: Callable[..., torch.Tensor]
    decode: Callable[..., torch.Tensor]


@frozen(kw_only=True)
class Family:
    """A family of models: what distinguishes it from others, and nothing else knows its name.

    To add one, write these functions, or change a built-in family with `attrs.evolve`, and give the
    record to `ModelConfig(family=...)`; nothing is registered.

    spec: the pure half, rules and numbers that need no torch.
    step: batch, forward and loss of a micro-batch.
    chunk: what a model chunk is built of and computes.
    data: how corpora are read; None if the family is trained on batches only.
    train_step_calls: how accelerate's train steps read batches and call the model.
    reads_tokens_only: `megafn.logits` can run it on token ids; its step takes {"input_ids"}.
    predicts_next_token: `megafn.generate` continues prompts with it.
    encoder_decoder: how `megafn.generate` answers prompts with it; None: it does not.
    example(model, rows): a raw micro-batch that `step.batch` reads, of whole sequences without
        padding, for a dry run that is given none.
    """

    spec: FamilySpec
    step: Step
    chunk: ChunkFunctions
    data: FamilyData | None = None
    train_step_calls: TrainStepCalls = TrainStepCalls()
    reads_tokens_only: bool = True
    predicts_next_token: bool = False
    encoder_decoder: EncoderDecoder | None = None
    example: Callable[[ModelConfig, int], Mapping[str, torch.Tensor]] = example_of_tokens

    @property
    def name(self) -> str:
        """What stands in configs and checkpoints."""
        return self.spec.name
