"""The one torch module of megafn's models: a chunk of a pipeline stage, of any family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from megatron.core.enums import ModelType
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer import TransformerConfig

from megafn.pure.config.records import TrainConfig
from megafn.runtime.parallel.groups import ProcessGroups


@frozen(kw_only=True)
class ChunkPlan:
    """What a chunk is built from: config, process groups, and which part of the model it is."""

    config: TrainConfig
    mcore: TransformerConfig
    pg: ProcessGroups
    pre_process: bool  # the first chunk of the model, which embeds tokens
    post_process: bool  # the last chunk, which ends with the output layer or another head
    vp_stage: int | None  # number of the chunk in its stage; None without interleaving

    @property
    def ties_output(self) -> bool:
        """Whether the output layer is the word table."""
        model = self.config.model
        return model.tie_word_embeddings and model.num_labels is None


@frozen(kw_only=True)
class ChunkFunctions:
    """What a family's chunk consists of and computes; each function can be exchanged.

    modules(plan) -> {attribute name: module or None}: the chunk's modules, in the order of their
        parameters. A chunk that embeds tokens calls that module "embedding", one that ends in an
        output layer calls it "output_layer".
    tie_tables(chunk): marks the tables that other stages hold a copy of, once modules are there.
    receive(chunk, hidden): takes what the previous stage sent, [sequence (/ tp), batch, hidden].
    forward(chunk, *inputs): logits or what the loss reads on the last stage, else the hidden state
        for the next one.
    """

    modules: Callable[[ChunkPlan], Mapping[str, torch.nn.Module | None]]
    tie_tables: Callable[[Chunk], None]
    receive: Callable[[Chunk, torch.Tensor | None], None]
    forward: Callable[..., Any]


class Chunk(LanguageModule):
    """A chunk of a model: its parameters, and its family's functions, which compute with them.

    megatron-core's schedules, gradient sums and optimizer ask for the attributes and methods of a
    LanguageModule.
    """

    def __init__(self, plan: ChunkPlan, functions: ChunkFunctions):
        super().__init__(plan.mcore, pg_collection=plan.pg.collection)
        self.plan = plan
        self.functions = functions
        self.received: torch.Tensor | None = None  # from the previous stage, for `forward`
        modules = functions.modules(plan)
        for name, module in modules.items():
            setattr(self, name, module)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = modules.get("embedding") is not None
        self.post_process = plan.post_process
        self.vp_stage = plan.vp_stage
        self.share_embeddings_and_output_weights = plan.ties_output
        functions.tie_tables(self)

    @property
    def position_embeddings(self) -> torch.nn.Embedding | None:
        """Where megatron-core's gradient sum over `pos_embd` looks for a learned position table."""
        learned = self.plan.config.model.position_embedding == "learned_absolute"
        return self.embedding.position_embeddings if self.pre_process and learned else None

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The modules, whose names are the family's."""

    def _set_attention_backend(self) -> None:
        """Not megatron-core's, which writes Transformer Engine's environment variables."""

    def set_input_tensor(self, input_tensor: Any) -> None:
        """The schedule passes what the previous stage sent."""
        hidden = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.functions.receive(self, hidden)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.functions.forward(self, *inputs, **named)
