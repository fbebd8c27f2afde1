"""Checkpoints as megatron-core and Megatron-LM write them, of models whose weights are given."""

import argparse
import contextlib
from pathlib import Path

import torch

import megafn as mf
from megafn.pure.families.built_in import parameter_shapes
from megafn.runtime.parallel.megatron_context import megatron_context

# What Megatron-LM's padding of the vocabulary to a multiple makes of 97 token ids.
PADDED = 128

TOKENS = torch.randint(0, 97, (2, 32), generator=torch.Generator().manual_seed(5))


def weights_of(model):
    """Random weights of the whole model by their names; what pads the vocabulary is left out."""
    draw = torch.Generator().manual_seed(3)
    return {
        name: torch.empty(shape).normal_(1.0 if "norm.weight" in name else 0.0, 0.2, generator=draw)
        for name, shape in parameter_shapes(model).items()
    }


def arguments_of(config, **more):
    """Those of Megatron-LM's arguments that say what the model is."""
    model, parallel = config.model, config.parallel
    return argparse.Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.ffn_size,
        seq_length=model.seq_length,
        max_position_embeddings=model.position_rows,
        padded_vocab_size=PADDED,
        group_query_attention=model.num_query_groups is not None,
        num_query_groups=model.query_groups,
        swiglu=model.activation == "swiglu",
        normalization=model.normalization,
        norm_epsilon=model.norm_epsilon,
        add_bias_linear=model.add_bias_linear,
        position_embedding_type=model.position_embedding,
        untie_embeddings_and_output_weights=not model.tie_word_embeddings,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        params_dtype=torch.float32,
        **more,
    )


def cut(whole, tp, tp_rank, dim, stride=1):
    """A tensor-parallel rank's part."""
    blocks = [block.chunk(tp, dim)[tp_rank] for block in whole.chunk(stride, dim)]
    return torch.cat(blocks, dim)


def padded(whole):
    """With the rows that pad the vocabulary, which are random in Megatron-LM."""
    rows = PADDED - whole.shape[0]
    return torch.cat([whole, torch.full((rows, *whole.shape[1:]), 9.0)])


@contextlib.contextmanager
def cores_models(config):
    """megatron-core's own models of this rank, with `weights_of` the model: several if vpp > 1."""
    from megatron.core import parallel_state

    parallel = config.parallel
    with contextlib.ExitStack() as leaving:
        pg = leaving.enter_context(mf.init_groups(mf.build_groups(parallel, mf.world_size())))
        virtual = parallel.vpp if parallel.vpp > 1 else None
        parallel_state.initialize_model_parallel(parallel.tp, parallel.pp, virtual)
        leaving.callback(parallel_state.destroy_model_parallel)
        leaving.enter_context(megatron_context(pg, 1))
        build = {"gpt": cores_gpt, "bert": cores_bert, "t5": cores_t5}[config.model.family]
        chunks = [build(config, pg, i).eval() for i in range(parallel.vpp)]
        fill(chunks, config, pg)
        yield chunks, pg


def cores_gpt(config, pg, i):
    from megatron.core.models.gpt import GPTModel  # warns that Apex is not there
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    model, parallel = config.model, config.parallel
    return GPTModel(
        mf.transformer_config(config, pg),
        get_gpt_layer_local_spec(normalization=model.normalization),
        PADDED,
        model.seq_length,
        pre_process=pg.place.pp == 0 and i == 0,
        post_process=pg.place.pp == parallel.pp - 1 and i == parallel.vpp - 1,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        position_embedding_type=model.position_embedding,
        vp_stage=i if parallel.vpp > 1 else None,
    )


def cores_bert(config, pg, i):
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    model = config.model
    return BertModel(
        mf.transformer_config(config, pg),
        model.num_tokentypes,
        bert_layer_local_spec,
        PADDED,
        model.seq_length,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        add_binary_head=model.bert_binary_head,
    )


def cores_t5(config, pg, i):
    from megatron.core.models.T5 import T5Model  # warns that Apex is not there
    from megatron.core.models.T5.t5_spec import (
        decoder_model_with_local_spec,
        encoder_model_with_local_spec,
    )

    model, core = config.model, mf.transformer_config(config, pg)
    return T5Model(
        core,
        core,
        encoder_model_with_local_spec(),
        decoder_model_with_local_spec(),
        PADDED,
        model.position_rows,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        position_embedding_type=model.position_embedding,
    )


@torch.no_grad()
def fill(chunks, config, pg):
    """Layers count from 0 in each chunk; chunk i of a stage follows chunk i of earlier stages."""
    whole = weights_of(config.model)
    parallel = config.parallel
    for i, chunk in enumerate(chunks):
        chunks_before = i * parallel.pp + pg.place.pp
        before = chunks_before * config.model.num_layers // (parallel.pp * parallel.vpp)
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if "layers" in parts:
                parts[2] = str(int(parts[2]) + before)
            if name == "output_layer.weight" and config.model.tie_word_embeddings:
                parts = ["embedding", "word_embeddings", "weight"]
            if parts[:2] == ["lm_head", "output_layer"]:
                parts = parts[1:]  # T5
            value = whole[".".join(parts)]
            if parts[0] == "output_layer" or parts[1] == "word_embeddings":
                value = padded(value)
            if getattr(parameter, "tensor_model_parallel", False):
                stride = 2 if config.model.gated and "linear_fc1" in name else 1
                dim = parameter.partition_dim
                value = cut(value, parallel.tp, pg.place.tp, dim, stride)
            parameter.copy_(value)


def _strategy():
    """megatron-core's planner with torch's writer: its own starts a process for each checkpoint."""
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

    class Plain(SaveShardedStrategy):
        can_handle_sharded_objects = True

        def save(self, sharded, directory):
            flat, *_ = strategies._replace_state_dict_keys_with_sharded_keys(sharded, True)
            planner = strategies.MCoreSavePlanner(
                dedup_replicated_tensors=False, flatten_state_dict=False
            )
            writer = FileSystemWriter(directory, thread_count=1)
            tensors = strategies.mcore_to_pyt_state_dict(flat, False)
            _save_state_dict(tensors, writer, planner=planner)

    return Plain("torch_dist", 1)


def _optimizer_state(pg):
    """What stands beside the weights, under the names that megatron-core gives it."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    name = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
    return {
        "exp_avg": ShardedTensor.from_rank_offsets(name, torch.zeros(4), replica_id=pg.rank),
        "rng": ShardedObject("rng_state", [{}], (1,), (0,), replica_id=pg.rank),
    }


def write(configs, directory):
    """Writes what megatron-core's models of each config hold in both formats.

    In one process it returns GPT's logits of `TOKENS` too, {name of the config: [b, s, PADDED]}.
    """
    from megatron.core import dist_checkpointing, parallel_state

    logits = {}
    for name, config in configs.items():
        with cores_models(config) as (chunks, pg), torch.no_grad():
            if mf.world_size() == 1 and config.model.family == "gpt":
                positions = torch.arange(TOKENS.size(1)).expand_as(TOKENS)
                hidden = torch.ones(1, 1, *[TOKENS.size(1)] * 2).triu(1).bool()
                logits[name] = chunks[0](TOKENS, positions, hidden)
            folder = Path(directory, name, "torch_dist", "iter_0000007")
            if pg.is_rank_zero:
                folder.mkdir(parents=True)
                (folder.parent / "latest_checkpointed_iteration.txt").write_text("7")
            torch.distributed.barrier(pg.world)
            metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(True)}
            keys = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
            sharded = {
                key: chunk.sharded_state_dict(metadata=metadata)
                for key, chunk in zip(keys, chunks, strict=True)
            }
            sharded["optimizer"] = _optimizer_state(pg)
            common = {"args": arguments_of(config), "checkpoint_version": 3.0, "iteration": 7}
            dist_checkpointing.save(common | sharded, str(folder), sharded_strategy=_strategy())
            own = {
                key: chunk.state_dict_for_save_checkpoint()
                for key, chunk in zip(keys, chunks, strict=True)
            }
            place = f"mp_rank_{pg.place.tp:02d}"
            if config.parallel.pp > 1:
                place += f"_{pg.place.pp:03d}"
            folder = Path(directory, name, "mp_rank", place)
            folder.mkdir(parents=True)
            rest = {"optimizer": {"state": {0: torch.zeros(5)}}, "rng_state": [{"torch": None}]}
            torch.save(common | own | rest, folder / "model_optim_rng.pt")
    return logits


# ---------------------------------------------------------------------------- megatron.legacy

_LEGACY_LAYER = {
    "input_norm": "input_layernorm",
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
_LEGACY_ENCODER_LAYER = _LEGACY_LAYER | {"post_attention_norm": "pre_mlp_layernorm"}
_LEGACY_DECODER_LAYER = _LEGACY_LAYER | {
    "post_attention_norm": "pre_cross_attn_layernorm",
    "inter_attention.query": "cross_attention.linear_q",
    "inter_attention.key_value": "cross_attention.linear_kv",
    "inter_attention.dense": "cross_attention.linear_proj",
    "post_inter_attention_norm": "pre_mlp_layernorm",
}
_COLUMN_PARALLEL = ("query_key_value", "query", "key_value", "dense_h_to_4h")
_ROW_PARALLEL = ("attention.dense.weight", "dense_4h_to_h.weight")


def legacy_layers(whole, stack, numbers, table, tp_rank):
    """The layers of a stage: {name within the stack: part of tp rank 0 or 1}."""
    layers = {}
    for local, number in enumerate(numbers):
        for theirs, ours in table.items():
            for kind in ("weight", "bias"):
                name = f"{theirs}.{kind}"
                value = whole[f"{stack}.layers.{number}.{ours}.{kind}"]
                if theirs.rpartition(".")[2] in _COLUMN_PARALLEL:
                    value = cut(value, 2, tp_rank, 0)
                elif name.endswith(_ROW_PARALLEL):
                    value = cut(value, 2, tp_rank, 1)
                layers[f"layers.{local}.{name}"] = value
    return layers


def weight_and_bias(whole, name):
    return {kind: whole[f"{name}.{kind}"] for kind in ("weight", "bias")}


def under(prefix, values):
    return {f"{prefix}.{key}": value for key, value in values.items()}


def legacy_tables(whole, tp_rank):
    tables = {
        name: {"weight": whole[f"embedding.{name}.weight"]}
        for name in ("word_embeddings", "position_embeddings", "tokentype_embeddings")
        if f"embedding.{name}.weight" in whole
    }
    table = cut(padded(tables["word_embeddings"]["weight"]), 2, tp_rank, 0)
    return tables | {"word_embeddings": {"weight": table}}


def legacy_bert(whole, tp_rank, stage):
    """A stage's state dict of megatron.legacy's BertModel of 4 layers, tp 2 x pp 2."""
    layers = legacy_layers(
        whole, "encoder", range(2 * stage, 2 * stage + 2), _LEGACY_ENCODER_LAYER, tp_rank
    )
    if stage == 0:
        return {
            "language_model": {"embedding": legacy_tables(whole, tp_rank), "encoder": layers},
        }
    layers |= under("final_norm", weight_and_bias(whole, "encoder.final_layernorm"))
    return {
        "language_model": {
            "encoder": layers,
            "pooler": under("dense", weight_and_bias(whole, "pooler.dense")),
        },
        "lm_head": {
            "bias": cut(padded(whole["output_layer.bias"]), 2, tp_rank, 0),
            **under("dense", weight_and_bias(whole, "lm_head.dense")),
            **under("norm", weight_and_bias(whole, "lm_head.layer_norm")),
        },
        "binary_head": weight_and_bias(whole, "binary_head"),
        "word_embeddings_for_head": legacy_tables(whole, tp_rank)["word_embeddings"],
    }


def legacy_t5(whole, tp_rank, stage):
    """The same of T5Model, whose second stage is the decoder."""
    stack = ("encoder", "decoder")[stage]
    table = (_LEGACY_ENCODER_LAYER, _LEGACY_DECODER_LAYER)[stage]
    layers = legacy_layers(whole, stack, range(4), table, tp_rank)
    layers |= under("final_norm", weight_and_bias(whole, f"{stack}.final_layernorm"))
    tables = legacy_tables(whole, tp_rank)
    state = {"language_model": {"embedding": tables, stack: layers}}
    if stage == 1:
        state["lm_head"] = {"bias": cut(padded(whole["output_layer.bias"]), 2, tp_rank, 0)}
        state["word_embeddings_for_head"] = tables["word_embeddings"]
    return state


def write_legacy(config, state_dict, folder):
    """Writes a checkpoint of tp 2 x pp 2 as accelerate does."""
    whole = weights_of(config.model)
    for tp_rank in range(2):
        for stage in range(2):
            place = Path(folder, f"mp_rank_{tp_rank:02d}_{stage:03d}")
            place.mkdir(parents=True)
            content = {
                "args": arguments_of(config, bert_binary_head=True, bias_gelu_fusion=True),
                "checkpoint_version": 3.0,
                "iteration": 7,
                "model": state_dict(whole, tp_rank, stage),
            }
            torch.save(content, place / "model_optim_rng.pt")
