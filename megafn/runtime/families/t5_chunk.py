"""A stage of an encoder-decoder: over a pipeline each of its halves has stages of its own."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.relative_pos_embedding import RelativePositionEmbedding
from megatron.core.tensor_parallel.mappings import scatter_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

from megafn.pure.config.records import TrainConfig, split_rank
from megafn.runtime.model.chunk import Chunk
from megafn.runtime.model.layers import Norm, layer_spec
from megafn.runtime.model.tied_embeddings import mark_copy
from megafn.runtime.parallel.groups import ProcessGroups


class EncoderDecoderChunk(Chunk):
    """A pipeline stage of T5: layers of the encoder before the split rank, of the decoder from it on; of both without a pipeline.

    tokens [batch, s], decoder_tokens [batch, t] -> logits [t, batch, padded vocabulary / tp] on the last stage. Masks are
    bool, True = hidden: attention_mask [batch or 1, 1, s or 1, s], decoder_attention_mask [batch or 1, 1, t, t] with
    causality in it (None: causal alone), cross_attention_mask [batch or 1, 1, t or 1, s].

    One tensor travels between stages: the encoder's hidden state [s, batch, hidden], and from the split rank on the
    encoder's output and the decoder's hidden state, one behind the other [s + t, batch, hidden], so that each decoder
    stage attends to the encoder's output and its gradients flow back the same way. Where the schedule sends one shape
    alone, encoder stages pad to it.
    """

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
        self.split = split_rank(
            config.parallel, config.model
        )  # the decoder begins with an embedding of its own
        super().__init__(
            config,
            mcore,
            pg,
            pre_process=pre_process or pg.place.pp == self.split,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.received = None

    def add_blocks(self, config: TrainConfig, pg: ProcessGroups) -> None:
        model, stages, split = config.model, config.parallel.pp, self.split
        self.encoder = self.decoder = self.encoder_relative_pos_emb = (
            self.decoder_relative_pos_emb
        ) = None
        if split is None or pg.place.pp < split:
            self.encoder = self._half(
                config, pg, model.num_layers, split or stages, AttnMaskType.arbitrary
            )
            self.encoder_relative_pos_emb = self._relative(config, both_ways=True)
        if split is None or pg.place.pp >= split:
            self.decoder = self._half(
                config, pg, model.decoder_layers, stages - (split or 0), AttnMaskType.causal
            )
            self.decoder_relative_pos_emb = self._relative(config, both_ways=False)

    def _half(
        self, config: TrainConfig, pg: ProcessGroups, layers: int, stages: int, mask: AttnMaskType
    ) -> TransformerBlock:
        """This stage's layers of one half, which is a pipeline of its own: its rank and size number the layers."""
        mcore, collection = copy.copy(self.config), copy.copy(pg.collection)
        mcore.num_layers, mcore.pipeline_model_parallel_size, collection.pp = (
            layers,
            stages,
            pg.half,
        )
        layer = layer_spec(config, pg, mask, cross=mask == AttnMaskType.causal)
        return TransformerBlock(
            mcore,
            TransformerBlockSubmodules(layer_specs=[layer] * (layers // stages), layer_norm=Norm),
            pre_process=pg.half.rank() == 0,
            post_process=pg.half.rank() == stages - 1,
            pg_collection=collection,
        )

    def _relative(
        self, config: TrainConfig, *, both_ways: bool
    ) -> RelativePositionEmbedding | None:
        """The table of one half's relative positions, which every layer of it reads: each stage has a copy."""
        model = config.model
        return (
            RelativePositionEmbedding(
                both_ways,
                self.config.init_method,
                model.num_attention_heads,
                model.relative_attention_num_buckets,
                model.relative_attention_max_distance,
            )
            if model.position_embedding == "relative"
            else None
        )

    def add_head(self, config: TrainConfig, *, bias: bool = False) -> None:
        super().add_head(config, bias=self.tied)  # as in megatron-core's T5LMHead

    def share_tables(self, pg: ProcessGroups) -> None:
        if self.split is None:
            return super().share_tables(pg)
        # what megatron-core's gradient sum over `embd` asks for: the two embeddings are one, whatever the output layer is
        self.share_embeddings_and_output_weights = True
        if self.pre_process:
            mark_copy(self.embedding.word_embeddings.weight, original=pg.place.pp == 0)
        elif self.post_process and self.tied:
            mark_copy(self.output_layer.weight, original=False)
        if self.position_embeddings is not None:
            mark_copy(self.position_embeddings.weight, original=pg.place.pp == 0)
        for relative in (self.encoder_relative_pos_emb, self.decoder_relative_pos_emb):
            if relative is not None and pg.half.size() > 1:
                mark_copy(
                    relative.relative_attention_bias.weight,
                    original=pg.half.rank() == 0,
                    group=pg.half,
                )

    @property
    def position_embeddings(self) -> torch.nn.Embedding | None:
        """Where megatron-core's gradient sum over `pos_embd` looks for the position table."""
        return (
            self.embedding.position_embeddings
            if self.pre_process and self.position_rows is not None
            else None
        )

    def set_input_tensor(self, input_tensor):
        """The schedule hands over what the previous stage sent, [s (+ t) (/ tp), batch, hidden]."""
        self.received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def _run(self, block, tokens, received, hidden, relative, **context):
        """A half's layers here, on what they received or on the embedding of tokens; hidden: their mask."""
        embedded, length = None, tokens.size(1)
        if block.pre_process:
            embedded = self._embedded(tokens)
        else:
            block.set_input_tensor(received)
        if (
            relative is not None
        ):  # as a mask to add: megatron-core hands that through a recomputation with its gradient
            bias = relative(length, length).permute(0, 2, 3, 1)  # heads last: tp cuts them
            bias = scatter_to_tensor_model_parallel_region(bias, self.tp_group).permute(0, 3, 1, 2)
            if not relative.bidirectional and hidden is None:
                hidden = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
            hidden = (
                bias if hidden is None else bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
            )
        return block(embedded, hidden, rotary_pos_emb=self._angles(tokens, None), **context)

    def forward(
        self,
        tokens,
        decoder_tokens,
        attention_mask=None,
        decoder_attention_mask=None,
        cross_attention_mask=None,
    ):
        parts = self.tp_group.size() if self.config.sequence_parallel else 1
        length, decoder_length = tokens.size(1) // parts, decoder_tokens.size(1) // parts
        memory, received = (
            (None, None)
            if self.received is None
            else (self.received[:length], self.received[length:])
        )
        if self.encoder is not None:
            memory = self._run(
                self.encoder, tokens, memory, attention_mask, self.encoder_relative_pos_emb
            )
        if self.decoder is None:
            return (
                memory
                if self.config.variable_seq_lengths
                else F.pad(memory, (0, 0, 0, 0, 0, decoder_length))
            )
        hidden = self._run(
            self.decoder,
            decoder_tokens,
            received,
            decoder_attention_mask,
            self.decoder_relative_pos_emb,
            context=memory,
            context_mask=cross_attention_mask,
        )
        return self.head(hidden) if self.post_process else torch.cat([memory, hidden])
