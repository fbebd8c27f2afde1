"""One architecture of transformers: its config.json, and where its files keep each parameter."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import attrs
from attrs import frozen

from megafn.pure.config.family_record import family_name
from megafn.pure.config.problems import Problem, config_error
from megafn.pure.config.records import ModelConfig
from megafn.pure.families.built_in import parameter_shapes
from megafn.pure.pretrained.config_reader import ConfigJson, ConfigReader
from megafn.pure.pretrained.stored_slice import Shape, SliceFunction, Slices

# Keys of config.json that belong to a tokenizer, not to the model.
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Fields that decide how a model is trained, not what it computes: config.json need not have them.
_OF_TRAINING = ("hidden_dropout", "attention_dropout", "init_method_std", "problem_type")


@frozen(kw_only=True)
class Architecture:
    """A class of transformers that megafn's layers can compute, as functions.

    name: as in the `architectures` of config.json: "LlamaForCausalLM".
    model_type: as in config.json: "llama".
    family: of the models that it expresses.
    base_model: the class without a head, whose files can be read too: "LlamaModel".
    base_prefix: what the names of a base model's files lack: "model.".
    fields(reader): fields of `ModelConfig` from a config.json. Problems are noted in the reader.
    config(model): a config.json, whether or not it expresses all of the model.
    slice_function(name, shape, model): where a parameter of the whole model lies; () if nowhere.
    heads: prefixes of stored tensors that make predictions of the last hidden state. A file may
        lack them or have others, as a base model does.
    buffers: regular expressions for stored tensors that may be left unread, such as masks and
        rotary frequencies in old files.
    copies(model): stored tensors that a file may have as well -> the one whose content they repeat,
        as a tied output layer does.
    stand_ins: stored tensors that a file may leave out -> the one whose content they have then.
    spellings: other names of stored tensors -> the name here.
    """

    name: str
    model_type: str
    family: str = "gpt"
    base_model: str
    base_prefix: str
    fields: Callable[[ConfigReader], dict[str, Any]]
    config: Callable[[ModelConfig], dict[str, Any]]
    slice_function: SliceFunction
    heads: tuple[str, ...] = ("lm_head.",)
    buffers: tuple[str, ...] = ()
    copies: Callable[[ModelConfig], dict[str, str]]
    stand_ins: dict[str, str] = attrs.field(factory=dict)
    spellings: dict[str, str] = attrs.field(factory=dict)

    def read_config(self, config: ConfigJson) -> tuple[dict[str, Any], list[Problem]]:
        """The fields of `ModelConfig` that config.json gives, and all that is wrong with it.

        `seq_length` is the number of positions. The fields hold only if there is no problem.
        """
        reader = ConfigReader(config=config)
        _refuse_what_no_architecture_has(reader)
        fields = self.fields(reader)
        return fields, reader.problems

    def write_config(self, model: ModelConfig) -> dict[str, Any]:
        """The config.json of a model. Raises ConfigError naming each field that it cannot express.

        Sequence lengths are replaced by the number of positions.
        """
        problems = self.problems_of(model)
        if problems:
            raise config_error(problems)
        return self._whole_config(model)

    def problems_of(self, model: ModelConfig) -> list[Problem]:
        """Which fields of the model this architecture does not have, or not with these values.

        The config is written and read again: what comes back different is not expressed. Dropout
        and initial values are not compared.
        """
        if family_name(model.family) != self.family:
            return [self._unexpressed(model, "family", self.family)]
        fields, problems = self.read_config(self._whole_config(model))
        written = canonical(ModelConfig(**fields))
        different = [
            self._unexpressed(model, name, getattr(written, name))
            for name in different_fields(model, written)
        ]
        return different or problems

    def _unexpressed(self, model: ModelConfig, name: str, possible: Any) -> Problem:
        remedy = f"{self.name} of transformers has {possible!r} there; set it to that"
        return Problem(f"model.{name}", getattr(model, name), remedy)

    def _whole_config(self, model: ModelConfig) -> dict[str, Any]:
        named = {"architectures": [self.name], "model_type": self.model_type}
        # no special ids: the defaults of transformers may lie outside of the vocabulary
        return named | dict.fromkeys(SPECIAL_IDS) | self.config(model)

    def slices(self, name: str, shape: Shape, model: ModelConfig) -> Slices:
        """The rows of stored tensors that make a parameter of the whole model; () if none do.

        The names are those of the model with its head: a base model's lack `base_prefix`.
        """
        return self.slice_function(name, shape, model)

    def tensors(self, model: ModelConfig) -> dict[str, Shape]:
        """Every tensor that a file of this model has, with its shape, in the model's order."""
        rows: dict[str, int] = {}
        others: dict[str, Shape] = {}
        transposed: dict[str, bool] = {}
        for name, shape in parameter_shapes(model).items():
            for piece in self.slices(name, shape, model):
                rows[piece.tensor] = max(rows.get(piece.tensor, 0), piece.at + piece.rows)
                others[piece.tensor] = shape[1:]
                transposed[piece.tensor] = piece.transposed
        return {
            name: (*others[name], count) if transposed[name] else (count, *others[name])
            for name, count in rows.items()
        }

    def full_name(self, stored: str) -> str:
        """The name here of a tensor in a file: with the prefix that a base model's files lack.

        So the files of GPT2Model, and GPT-2's own, have "wte.weight" for "transformer.wte.weight".
        """
        if stored in self.spellings:
            return self.spellings[stored]
        if stored.startswith((self.base_prefix, *self.heads)):
            return stored
        return self.base_prefix + stored

    # The methods below take full names.

    def is_head(self, tensor: str) -> bool:
        """Whether a stored tensor belongs to a head, which a file may lack or have another of."""
        return tensor.startswith(self.heads)

    def is_buffer(self, tensor: str) -> bool:
        """Whether a stored tensor may be left unread, such as a causal mask."""
        return any(re.search(pattern, tensor) for pattern in self.buffers)

    def copy_of(self, tensor: str, model: ModelConfig) -> str | None:
        """The stored tensor whose content this one repeats; None if it is not a copy."""
        return self.copies(model).get(tensor)


def tied_to(embedding: str, output_layer: str) -> Callable[[ModelConfig], dict[str, str]]:
    """For `Architecture.copies`: a tied output layer repeats the word table."""

    def copies(model: ModelConfig) -> dict[str, str]:
        return {output_layer: embedding} if model.tie_word_embeddings else {}

    return copies


def _refuse_what_no_architecture_has(reader: ConfigReader) -> None:
    if reader.get("quantization_config") is not None:
        reader.refuse(
            "quantization_config",
            reader.get("quantization_config"),
            "quantized weights cannot be trained; give the model that was quantized",
        )


def different_fields(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Names of the fields in which two models differ in what they compute, or in their parameters.

    Dropout and initial values are not compared, nor are lengths of sequences beside the number of
    positions.

    >>> model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=32)
    >>> different_fields(model, attrs.evolve(model, kv_channels=16, activation="relu"))
    ['activation']
    """
    ours = canonical(one)
    theirs = canonical(other)
    return [
        attribute.name
        for attribute in attrs.fields(ModelConfig)
        if attribute.name not in _OF_TRAINING
        and getattr(ours, attribute.name) != getattr(theirs, attribute.name)
    ]


def canonical(model: ModelConfig) -> ModelConfig:
    """The same model with derived fields written out, and fields that nothing reads left out.

    Two models that compute the same from the same weights have one canonical config. Sequence
    lengths are the number of positions.
    """
    positions = model.position_rows
    changes: dict[str, Any] = {
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_size,
        "ffn_hidden_size": model.ffn_size,
        "seq_length": positions,
        "max_position_embeddings": positions,
        "decoder_seq_length": None,
    }
    if model.softmax_scale == model.head_size**-0.5:
        changes["softmax_scale"] = None
    if model.add_bias_linear:
        changes["add_qkv_bias"] = False
    if model.position_embedding != "rope":
        changes |= _defaults("rotary_base", "rotary_percent", "rope_scaling", "layers_without_rope")
    if model.position_embedding != "relative":
        changes |= _defaults("relative_attention_num_buckets", "relative_attention_max_distance")
    if family_name(model.family) == "t5":
        changes["num_decoder_layers"] = model.decoder_layers
        if not model.tie_word_embeddings:
            changes["output_layer_bias"] = False
    return attrs.evolve(model, **changes)


def _defaults(*names: str) -> dict[str, Any]:
    fields = attrs.fields_dict(ModelConfig)
    return {name: fields[name].default for name in names}
