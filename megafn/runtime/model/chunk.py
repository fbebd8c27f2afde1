"""One stage of a model, composed from megatron-core's pieces; each is handed its process groups."""

from __future__ import annotations

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlock

from megafn.pure.config.records import TrainConfig, padded_vocab_size
from megafn.runtime.model.layers import block_spec
from megafn.runtime.parallel.context import cp_positions
from megafn.runtime.parallel.groups import ProcessGroups


class _HidePadding(torch.autograd.Function):
    """Columns that only pad the vocabulary get the dtype's minimum, in place; their gradient is zero."""

    @staticmethod
    def forward(context, logits, count):
        context.count = count
        context.mark_dirty(logits)
        logits[..., logits.size(-1) - count :] = torch.finfo(logits.dtype).min
        return logits

    @staticmethod
    def backward(context, gradient):
        padding = gradient[..., gradient.size(-1) - context.count :]
        if padding.any():  # never from a softmax; a copy, for another may read this gradient
            gradient = gradient.clone()
            gradient[..., gradient.size(-1) - context.count :] = 0
        return gradient, None


class Chunk(LanguageModule):
    """A pipeline stage's chunk of a model: embedding on the first, a block of layers, the output layer on the last.

    tokens, position_ids [batch, sequence / cp] -> logits [sequence / cp, batch, padded vocabulary / tp] on the last
    stage, the hidden state elsewhere. attention_mask: bool [batch or 1, 1, sequence / cp or 1, sequence], True = hidden.
    A family that differs changes the block's name in the whole model, its mask, or one of the methods that build the stage.
    """

    block, mask = "decoder", AttnMaskType.causal

    def __init__(
        self,
        config: TrainConfig,
        mcore: TransformerConfig,
        pg: ProcessGroups,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ):
        super().__init__(mcore, pg_collection=pg.collection)
        model, tp = config.model, config.parallel.tp
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = self.tied = (
            model.tie_word_embeddings and model.num_labels is None
        )
        self.place, self.position_rows = (
            pg.place,
            model.position_rows if model.position_embedding == "learned_absolute" else None,
        )
        self.vocabulary = vocabulary = padded_vocab_size(model.vocab_size, tp)
        here = min(max(model.vocab_size - pg.place.tp * (vocabulary // tp), 0), vocabulary // tp)
        self.padding = vocabulary // tp - here  # columns of this tp rank that are no token
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                mcore,
                vocabulary,
                model.position_rows,
                model.position_embedding,
                num_tokentypes=model.num_tokentypes,
                tp_group=pg.tp,
            )
        self.rotary = None
        if model.position_embedding == "rope":
            self.rotary = RotaryEmbedding(
                model.head_size,
                model.rotary_percent,
                rotary_base=model.rotary_base,
                use_cpu_initialization=pg.device.type == "cpu",
                cp_group=pg.cp,
            )
        self.add_blocks(config, pg)
        if post_process:
            self.add_head(config)
        self.share_tables(pg)

    def add_blocks(self, config: TrainConfig, pg: ProcessGroups) -> None:
        """The layers of this stage."""
        setattr(
            self,
            self.block,
            TransformerBlock(
                self.config,
                block_spec(config, self.config, pg, self.vp_stage, self.mask),
                pre_process=self.pre_process,
                post_process=self.post_process,
                pg_collection=pg.collection,
                vp_stage=self.vp_stage,
            ),
        )

    def add_head(self, config: TrainConfig, *, bias: bool = False) -> None:
        """The modules behind the block."""
        self.output_layer = ColumnParallelLinear(
            config.model.hidden_size,
            self.vocabulary,
            config=self.config,
            init_method=self.config.init_method,
            bias=bias,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process and config.model.tie_word_embeddings,
            tp_group=self.tp_group,
        )

    def share_tables(self, pg: ProcessGroups) -> None:
        """Tie the tables that other stages hold too."""
        if self.pre_process and not self.post_process or hasattr(self, "output_layer"):
            self.setup_embeddings_and_output_layer()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits from the block's last hidden state [sequence / cp (/ tp), batch, hidden]."""
        shared = self.shared_embedding_or_output_weight() if self.tied else None
        logits, _ = self.output_layer(hidden, weight=shared)
        return _HidePadding.apply(logits, self.padding) if self.padding else logits

    def _set_attention_backend(self):
        """megatron-core would write Transformer Engine's environment variables, which outlive the layout; it is not used here."""

    def set_input_tensor(self, input_tensor):
        """The schedule hands over the previous stage's hidden state [sequence / cp (/ tp), batch, hidden]."""
        getattr(self, self.block).set_input_tensor(
            input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        )

    def _angles(self, tokens, position_ids):
        """Rotary angles [sequence / cp, 1, 1, width] of the tokens' places, or [sequence / cp, batch, 1, width] of positions given."""
        if self.rotary is None:
            return None
        cp = self.cp_group.size()
        angles = self.rotary.get_emb(tokens.size(1) * cp)
        if position_ids is not None:
            angles = position_ids.t()[..., None] * self.rotary.inv_freq
            return torch.cat((angles, angles), dim=-1)[:, :, None]
        return (
            angles[cp_positions(angles.size(0), cp, self.place.cp, angles.device)]
            if cp > 1
            else angles
        )

    def _embedded(self, tokens, position_ids=None, tokentype_ids=None):
        """The embedding [sequence / cp (/ tp), batch, hidden] of tokens at the positions given, or at their places."""
        cp = self.cp_group.size()
        sequence = tokens.size(1) * cp
        if self.position_rows is not None and sequence > self.position_rows:
            raise ValueError(
                f"sequence length = {sequence}: the position table has {self.position_rows} rows; "
                f"raise model.max_position_embeddings or shorten the sequence."
            )
        if position_ids is None:
            position_ids = cp_positions(sequence, cp, self.place.cp, tokens.device).expand_as(
                tokens
            )
        return self.embedding(tokens, position_ids, tokentype_ids)

    def forward(self, tokens, position_ids=None, attention_mask=None, tokentype_ids=None):
        rotary = self._angles(tokens, position_ids)
        hidden = self._embedded(tokens, position_ids, tokentype_ids) if self.pre_process else None
        hidden = getattr(self, self.block)(hidden, attention_mask, rotary_pos_emb=rotary)
        return self.head(hidden) if self.post_process else hidden
