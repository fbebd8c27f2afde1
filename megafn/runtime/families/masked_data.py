"""What BERT's and T5's datasets share: masked tokens in documents of sentences."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.masked_dataset import MaskedWordPieceDataset

from megafn.pure.config.family_record import family_name
from megafn.pure.config.problems import ConfigError
from megafn.pure.config.records import TrainConfig, data_of
from megafn.runtime.families.family import dataset_settings
from megafn.runtime.text.tokenizer import Tokenizer

_ALL = 2**62  # samples: as many as one epoch has
_ENDLESS = 2**31 - 2  # epochs


def sample_index(
    dataset: MaskedWordPieceDataset, sequence_length: int, sentences: int
) -> np.ndarray:
    """The order of a masked dataset's samples, in memory, on each rank.

    megatron-core writes it into a cache folder, on global rank 0 only and not atomically, while the
    others read it. The order is the same: samples are runs of sentences of one document, all epochs
    shuffled together.
    """
    ends = np.append(dataset.indices, dataset.indices[-1] + 1)
    documents = dataset.dataset.document_indices[ends]
    epochs = _ENDLESS
    samples = dataset.num_samples
    if samples is None:
        epochs = 1
        samples = _ALL
    return helpers.build_mapping(
        documents,
        dataset.dataset.sequence_lengths,
        epochs,
        samples,
        sequence_length,
        dataset.config.short_sequence_probability,
        dataset.config.random_seed % 2**31,
        False,
        sentences,
    )


def masked_settings(
    config: TrainConfig, tokenizer: Tokenizer, special_tokens: tuple[str, ...]
) -> dict[str, Any]:
    """Arguments that the configs of megatron-core's masked datasets share.

    Raises ConfigError if the tokenizer lacks one of the special tokens, or the model's vocabulary
    does.
    """
    data = data_of(config)
    missing = [name for name in special_tokens if getattr(tokenizer, name) in (None, ())]
    if missing:
        raise ConfigError(
            f"data.tokenizer = {data.tokenizer!r} has no {', '.join(missing)}, which data for "
            f"{family_name(config.model.family)} need; add these special tokens to it, or choose "
            "another"
        )
    vocab_size = config.model.vocab_size
    _check_special_ids(config, tokenizer, special_tokens)
    return dict(
        **dataset_settings(config),
        # megatron-core marks padding by the pad id, in masks and token types too, which is right
        # only if that is 0; here it is -1, which no token has
        tokenizer=attrs.evolve(
            tokenizer,
            pad=-1,
            # random tokens and sentinels are drawn from these
            inv_vocab={i: token for i, token in tokenizer.inv_vocab.items() if i < vocab_size},
            additional_special_tokens_ids=sentinels_in_vocabulary(config, tokenizer),
        ),
        masking_probability=data.mask_prob,
        short_sequence_probability=data.short_seq_prob,
        masking_do_full_word=True,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
    )


def sentinels_in_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokenizer's sentinels that the model's vocabulary has."""
    sentinels = tokenizer.additional_special_tokens_ids
    return tuple(i for i in sentinels if i < config.model.vocab_size)


def _check_special_ids(
    config: TrainConfig, tokenizer: Tokenizer, special_tokens: tuple[str, ...]
) -> None:
    vocab_size = config.model.vocab_size
    for name in special_tokens:
        token_id = getattr(tokenizer, name)
        if isinstance(token_id, int) and token_id >= vocab_size:
            raise ConfigError(
                f"model.vocab_size = {vocab_size}: the {name} of data.tokenizer = "
                f"{tokenizer.name!r} is id {token_id}; give {tokenizer.vocab_size}, or "
                "another tokenizer"
            )
