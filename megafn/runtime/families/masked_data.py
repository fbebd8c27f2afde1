"""Datasets of masked tokens, megatron-core's, over documents of sentences: BERT's masked tokens and T5's span corruption."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.bert_dataset import (
    BERTMaskedWordPieceDataset,
    BERTMaskedWordPieceDatasetConfig,
)
from megatron.core.datasets.t5_dataset import (
    T5MaskedWordPieceDataset,
    T5MaskedWordPieceDatasetConfig,
)

from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import ModelConfig, TrainConfig
from megafn.runtime.text.tokenizer import Tokenizer


def sentences_wanted(model: ModelConfig) -> int:
    """Sentences that a document must have to be read: 2 where their order is predicted. 0: documents are one run of tokens."""
    return 0 if model.family == "gpt" else 2 if model.bert_binary_head else 1


class SampleIndex:
    """Before a masked dataset of megatron-core: its order of samples, made in memory by each rank.

    megatron-core writes it into a cache folder, on global rank 0 alone and not atomically, while the others read it.
    The same order: samples are runs of sentences of one document, all epochs shuffled together.
    """

    def _build_sample_index(
        self, sequence_length: int, min_sentences_per_sample: int
    ) -> np.ndarray:
        documents = self.dataset.document_indices[np.append(self.indices, self.indices[-1] + 1)]
        epochs, samples = (1, 2**62) if self.num_samples is None else (2**31 - 2, self.num_samples)
        return helpers.build_mapping(
            documents,
            self.dataset.sequence_lengths,
            epochs,
            samples,
            sequence_length,
            self.config.short_sequence_probability,
            self.config.random_seed % 2**31,
            False,
            min_sentences_per_sample,
        )


class BertDataset(SampleIndex, BERTMaskedWordPieceDataset):
    """Samples as tensors [sequence]: text, types, labels, loss_mask, padding_mask (1 = real), and is_random, truncated [].

    megatron-core marks padding by the pad id, in the mask and the types too, which is right where that is 0 alone; here
    it is -1, which no token has, and put right afterwards.
    """

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = {key: torch.as_tensor(value) for key, value in super().__getitem__(index).items()}
        row["padding_mask"] = (row["padding_mask"] == 1).long()
        return row | {"types": row["types"] * row["padding_mask"]}


def masked_settings(
    config: TrainConfig, tokenizer: Tokenizer, wanted: tuple[str, ...]
) -> dict[str, Any]:
    """Arguments that the configs of megatron-core's masked datasets share; raises ConfigError where the tokenizer has not what is wanted."""
    data = config.data
    missing = [name for name in wanted if getattr(tokenizer, name) in (None, ())]
    if missing:
        raise ConfigError(
            f"data.tokenizer = {data.tokenizer!r} has no {', '.join(missing)}, which data for {config.model.family} want; "
            "add these special tokens to it, or choose another"
        )
    return dict(
        random_seed=config.seed,
        sequence_length=config.model.seq_length,
        tokenizer=attrs.evolve(tokenizer, pad=-1),
        blend=(["megafn"], None),
        split="1",
        path_to_cache="",  # as `gpt_data`
        masking_probability=data.mask_prob,
        short_sequence_probability=data.short_seq_prob,
        masking_do_full_word=True,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
    )


def bert_data(config: TrainConfig, tokenizer: Tokenizer) -> tuple[type, Any]:
    """The dataset class for masked tokens, and its config: as Megatron-LM's pretrain_bert, runs of up to three tokens or words."""
    return BertDataset, BERTMaskedWordPieceDatasetConfig(
        **masked_settings(config, tokenizer, ("cls", "sep", "mask")),
        masking_max_ngram=3,
        masking_use_geometric_distribution=False,
        classification_head=config.model.bert_binary_head,
    )


class T5Dataset(SampleIndex, T5MaskedWordPieceDataset):
    """Samples as tensors: text_enc, enc_mask [seq_length], text_dec, labels, loss_mask, dec_mask [decoder_seq_length], 1 = real; truncated []."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: torch.as_tensor(value) for key, value in super().__getitem__(index).items()}


def t5_data(config: TrainConfig, tokenizer: Tokenizer) -> tuple[type, Any]:
    """The dataset class for span corruption, and its config: as Megatron-LM's pretrain_t5, spans of geometric length, 10 tokens or words at most.

    The encoder reads a run of sentences in which each span is one sentinel; the decoder begins with bos (padding, where a
    tokenizer has none, as T5's own) and writes each sentinel and its span, then eos. Raises ConfigError where the most
    spans that a sample may have are more than the tokenizer's sentinels, or do not fit into decoder_seq_length.
    """
    model, data = config.model, config.data
    begin = tokenizer.pad if tokenizer.bos is None and tokenizer.pad >= 0 else tokenizer.bos
    settings = masked_settings(
        config, attrs.evolve(tokenizer, bos=begin), ("bos", "eos", "additional_special_tokens_ids")
    )
    most, sentinels = (
        int(data.mask_prob * (model.seq_length - 2)),
        len(tokenizer.additional_special_tokens_ids),
    )
    lower = f"lower model.seq_length = {model.seq_length} or data.mask_prob = {data.mask_prob}"
    if most > sentinels:
        raise ConfigError(
            f"data.tokenizer = {data.tokenizer!r} has {sentinels} sentinels, and a sample may have {most} spans; {lower}, or choose a tokenizer with more"
        )
    if model.decoder_length < 2 * most + 1:
        raise ConfigError(
            f"model.decoder_seq_length = {model.decoder_length}: up to {most} spans of a sample are written; give {2 * most + 1} or more, or {lower}"
        )
    return T5Dataset, T5MaskedWordPieceDatasetConfig(
        **settings,
        masking_max_ngram=10,
        masking_use_geometric_distribution=True,
        sequence_length_decoder=model.decoder_length,
    )
