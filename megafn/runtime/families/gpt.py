"""GPT: next-token prediction by one stack of causal layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.transformer.enums import AttnMaskType

from megafn.pure.config.records import ModelConfig, TrainConfig, data_of
from megafn.pure.families.gpt import GPT_SPEC
from megafn.runtime.families.batch_checks import (
    Raw,
    as_tensor,
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
from megafn.runtime.families.family import DatasetAndConfig, Family, FamilyData, dataset_settings
from megafn.runtime.families.step import Batch, Step
from megafn.runtime.model.chunk import Chunk, ChunkFunctions, ChunkPlan
from megafn.runtime.model.key_value_cache import KeyValueCache
from megafn.runtime.model.layers import Attention, layer_spec
from megafn.runtime.model.losses import IGNORE, token_loss
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

# ------------------------------------------------------------------------------------ its step

_KEYS = "'tokens' and 'labels', 'input_ids', or 'text'"


def gpt_batch(raw: Mapping[str, Any], config: TrainConfig, pg: ProcessGroups) -> Batch:
    """A micro-batch of next-token prediction from one of three kinds of raw batch.

    - tokens, labels, loss_mask, position_ids [b, s] (attention_mask bool [b, 1, s, s], True =
      hidden): as megatron-core's dataset gives them.
    - input_ids [b, s], with attention_mask [b, s] (1 = real), labels [b, s] (-100: no loss; not
      shifted) and position_ids if given: as a Hugging Face collator gives them. The last position
      has no label, and neither has padding.
    - text [b, s + 1]: inputs are all but the last token, labels all but the first.
    Raises ValueError on other keys, shapes and dtypes, on ids outside the vocabulary and positions
    outside a learned table.
    """
    check_mapping(raw, _KEYS)
    if "tokens" in raw and "labels" in raw:
        batch = _from_dataset(raw)
    elif "text" in raw:
        batch = _from_text(raw)
    elif "input_ids" in raw:
        batch = _from_collator(raw)
    else:
        raise unknown_keys(raw, _KEYS)
    tokens = batch["tokens"]
    positions = _positions(raw, tokens)
    if positions is not None:
        batch["position_ids"] = positions
    check_ids("batch['tokens']", tokens, config.model.vocab_size)
    check_labels(batch["labels"], config.model.vocab_size)
    check_length(tokens.size(1), positions, config)
    return on_device(batch, pg)


def _from_dataset(raw: Raw) -> dict[str, torch.Tensor]:
    """From megatron-core's keys: tokens and labels, already shifted."""
    tokens = integers(raw, "tokens")
    labels = integers(raw, "labels", tokens.shape)
    loss_mask = (labels != IGNORE).long()
    if given(raw, "loss_mask"):
        loss_mask = zeros_and_ones(raw, "loss_mask", tokens.shape) * loss_mask
    batch = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask}
    if given(raw, "attention_mask"):
        batch["attention_mask"] = _hidden_positions(raw, tokens.shape)
    return batch


def _from_text(raw: Raw) -> dict[str, torch.Tensor]:
    """From one sequence that is one token longer than the inputs."""
    text = integers(raw, "text")
    if given(raw, "attention_mask"):
        raise ValueError(
            "batch['attention_mask'] beside 'text': it goes with 'input_ids', or with 'tokens' and "
            "'labels'; leave it out or rename the tokens."
        )
    if text.size(1) < 2:
        raise ValueError(
            f"batch['text'] of shape {list(text.shape)}: expected [batch, sequence + 1], "
            "with at least two tokens in each sequence."
        )
    labels = text[:, 1:].contiguous()
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": labels,
        "loss_mask": torch.ones_like(labels),
    }


def _from_collator(raw: Raw) -> dict[str, torch.Tensor]:
    """From Hugging Face's keys: labels are the inputs, shifted here."""
    tokens = integers(raw, "input_ids")
    real = real_tokens(raw, "attention_mask", tokens)
    if given(raw, "labels"):
        labels = integers(raw, "labels", tokens.shape)
    else:
        labels = tokens.masked_fill(~real, IGNORE)
    # the label of a position is the next token, and padding predicts nothing
    no_label = torch.full_like(labels[:, :1], IGNORE)
    labels = torch.cat([labels[:, 1:], no_label], dim=1)
    labels = labels.masked_fill(~real, IGNORE)
    batch = {"tokens": tokens, "labels": labels, "loss_mask": (labels != IGNORE).long()}
    mask = causal_and_padding_mask(real)
    if mask is not None:
        batch["attention_mask"] = mask
    return batch


def _hidden_positions(raw: Raw, shape: torch.Size) -> torch.Tensor:
    """raw["attention_mask"], bool [batch or 1, 1, sequence or 1, sequence], True = hidden."""
    rows, sequence = shape
    expected = "bools [batch or 1, 1, sequence or 1, sequence], True = hidden"
    mask = as_tensor(raw, "attention_mask", expected)
    is_mask = mask.dim() == 4 and mask.dtype == torch.bool
    if not is_mask or not (
        mask.size(0) in (1, rows)
        and mask.size(1) == 1
        and mask.size(2) in (1, sequence)
        and mask.size(3) == sequence
    ):
        raise ValueError(
            f"batch['attention_mask'] = {mask.dtype} of shape {list(mask.shape)}: expected "
            f"{expected}, beside tokens of shape {list(shape)}; for a mask [batch, sequence] of "
            "1 = real, name the tokens 'input_ids'."
        )
    return mask


def _positions(raw: Raw, tokens: torch.Tensor) -> torch.Tensor | None:
    """raw["position_ids"] like the tokens; None if they are the tokens' places anyway."""
    if not given(raw, "position_ids"):
        return None
    positions = integers(raw, "position_ids", tokens.shape)
    if positions.device.type == "cpu" and (positions == torch.arange(tokens.size(1))).all():
        return None
    return positions


def gpt_forward(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [sequence / cp, batch, vocabulary / tp] on the last stage."""
    return model(batch["tokens"], batch.get("position_ids"), batch.get("attention_mask"))


# ----------------------------------------------------------------------------------- its chunk


def gpt_modules(
    plan: ChunkPlan,
    *,
    mask: AttnMaskType = AttnMaskType.causal,
    attention: Callable[..., torch.nn.Module] = Attention,
) -> dict[str, torch.nn.Module | None]:
    """Embedding on the first chunk, causal layers, the output layer on the last chunk.

    mask: AttnMaskType.padding for layers that attend in both directions. attention: builds the core
    attention, see `layer_spec`.
    """
    layer = layer_spec(plan.config, plan.pg, mask, attention=attention)
    modules: dict[str, torch.nn.Module | None] = {}
    if plan.pre_process:
        modules["embedding"] = token_embedding(plan)
    modules["decoder"] = one_stack_block(plan, layer)
    if plan.post_process:
        modules["output_layer"] = output_layer(plan, beside_embedding=plan.pre_process)
    return modules


def gpt_receive(chunk: Chunk, hidden: torch.Tensor | None) -> None:
    chunk.decoder.set_input_tensor(hidden)


def gpt_chunk_forward(
    chunk: Chunk,
    tokens: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    cache: KeyValueCache | None = None,
) -> torch.Tensor:
    """tokens, position_ids [batch, sequence / cp] -> logits, on the last stage.

    Logits [sequence / cp, batch, padded vocabulary / tp]; on earlier stages the hidden state.
    attention_mask: bool [batch or 1, 1, sequence / cp or 1, sequence], True = hidden.
    cache: keys and values of the tokens before these, when generating; then the tokens are whole,
    not cut over cp, and logits are of the last position only, unless under sequence parallelism,
    which cuts positions.
    """
    hidden = one_stack_hidden(
        chunk, chunk.decoder, tokens, position_ids, attention_mask, cache=cache
    )
    if cache is not None and chunk.post_process and not chunk.config.sequence_parallel:
        hidden = hidden[-1:]
    return vocabulary_logits(chunk, hidden) if chunk.post_process else hidden


# ------------------------------------------------------------------------------------ its data


def gpt_data(config: TrainConfig, tokenizer: Tokenizer) -> DatasetAndConfig:
    """megatron-core's dataset class for next-token prediction, and its config."""
    data = data_of(config)
    return GPTDataset, GPTDatasetConfig(
        **dataset_settings(config),
        # nothing is padded; or it would lose the tokens of the pad's id
        tokenizer=attrs.evolve(tokenizer, pad=-1),
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=data.reset_attention_mask,
    )


def no_sentences(model: ModelConfig) -> int:
    """Documents are runs of tokens."""
    return 0


GPT = Family(
    spec=GPT_SPEC,
    step=Step(batch=gpt_batch, forward=gpt_forward, loss=token_loss),
    chunk=ChunkFunctions(
        modules=gpt_modules,
        tie_tables=tie_word_tables,
        receive=gpt_receive,
        forward=gpt_chunk_forward,
    ),
    data=FamilyData(dataset=gpt_data, sentences=no_sentences),
    predicts_next_token=True,
)
