"""What objects of other libraries say, as config fields: Hugging Face model configs, torch optimizers, schedulers, loaders.

Read by their attributes alone; neither torch nor transformers is imported. Each function returns {dotted path: value}
and raises ConfigError where the object asks for what the config cannot say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs

from megafn.pure.config.problems import ConfigError, Problem, config_error, did_you_mean
from megafn.pure.config.records import DataConfig, ModelConfig

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "swiglu",
}
_T5_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gated-gelu": "geglu_tanh",
    "gated-gelu_new": "geglu_tanh",
    "gated-silu": "swiglu",
}  # by the name gated-gelu transformers mean gelu_new


def model_fields(model: Any) -> dict[str, Any]:
    """`model.*` fields of a Hugging Face config, or of a model that has one; a ModelConfig is taken as it is.

    gpt2, llama, megatron-bert and t5 are known. Dropout is what the config says. Sequence lengths are left to the
    caller, who knows what is trained on; "model.max_position_embeddings" is the length of the position table.

    >>> from types import SimpleNamespace
    >>> model_fields(SimpleNamespace(model_type="bert"))
    Traceback (most recent call last):
    megafn.pure.config.problems.ConfigError: model.model_type = 'bert': its norms stand behind the residual sum, megatron-core's before it, \
so the weights would mean something else; choose megatron-bert, which has the order of megatron-core
    """
    if isinstance(model, ModelConfig):
        return {
            f"model.{name}": value for name, value in attrs.asdict(model, recurse=False).items()
        }
    config = getattr(model, "config", model)
    kind = getattr(config, "model_type", None)
    if kind == "bert":
        raise config_error(
            [
                Problem(
                    "model.model_type",
                    kind,
                    "its norms stand behind the residual sum, megatron-core's before it, so "
                    "the weights would mean something else; choose megatron-bert, which has the order of megatron-core",
                )
            ]
        )
    if kind not in _MODELS:
        raise config_error(
            [
                Problem(
                    "model.model_type",
                    kind,
                    "give a Hugging Face config or model of "
                    + f"{', '.join(_MODELS)}, or a ModelConfig{did_you_mean(str(kind), _MODELS)}",
                )
            ]
        )
    missing = object()

    def read(name: str, default: Any = missing) -> Any:
        value = getattr(config, name, default)
        if value is missing:
            raise config_error(
                [Problem(f"model.{name}", None, f"a {kind} config has it; give one")]
            )
        return value

    def refuse_unless(name: str, *allowed: Any) -> None:
        if (value := read(name, allowed[0])) not in allowed:
            raise config_error(
                [
                    Problem(
                        f"model.{name}",
                        value,
                        f"megatron-core's layers have no such thing; only {allowed[0]!r} can be trained",
                    )
                ]
            )

    head = (
        type(model).__name__
        if model is not config
        else ((getattr(config, "architectures", None) or [""])[0] or "")
    )
    found = _MODELS[kind](read, refuse_unless, head)
    return {f"model.{name}": value for name, value in found.items()}


def _activation(value: Any) -> str:
    if value not in _ACTIVATIONS:
        raise config_error(
            [Problem("model's activation", value, f"choose one of {', '.join(_ACTIVATIONS)}")]
        )
    return _ACTIVATIONS[value]


def _gpt2(read: Callable, refuse_unless: Callable, head: str) -> dict[str, Any]:
    refuse_unless("scale_attn_weights", True)
    refuse_unless("scale_attn_by_inverse_layer_idx", False)
    refuse_unless("add_cross_attention", False)
    refuse_unless("embd_pdrop", read("resid_pdrop", 0.1))  # megatron-core has one hidden dropout
    return dict(
        family="gpt",
        num_layers=read("n_layer"),
        hidden_size=read("n_embd"),
        num_attention_heads=read("n_head"),
        vocab_size=read("vocab_size"),
        max_position_embeddings=read("n_positions"),
        ffn_hidden_size=read("n_inner", None),
        activation=_activation(read("activation_function", "gelu_new")),
        norm_epsilon=read("layer_norm_epsilon", 1e-5),
        hidden_dropout=read("resid_pdrop", 0.1),
        attention_dropout=read("attn_pdrop", 0.1),
        init_method_std=read("initializer_range", 0.02),
        tie_word_embeddings=read("tie_word_embeddings", True),
    )


def _llama(read: Callable, refuse_unless: Callable, head: str) -> dict[str, Any]:
    refuse_unless("mlp_bias", False)
    refuse_unless("attention_bias", False)
    refuse_unless("hidden_act", "silu")
    rope = (
        read("rope_parameters", None) or read("rope_scaling", None) or {}
    )  # transformers 5, and 4
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise config_error(
            [
                Problem(
                    "model.rope_scaling",
                    rope,
                    "scaled rotary positions are not built; give a config without them",
                )
            ]
        )
    return dict(
        family="gpt",
        num_layers=read("num_hidden_layers"),
        hidden_size=read("hidden_size"),
        num_attention_heads=read("num_attention_heads"),
        num_query_groups=read("num_key_value_heads", None),
        kv_channels=read("head_dim", None),
        ffn_hidden_size=read("intermediate_size"),
        vocab_size=read("vocab_size"),
        max_position_embeddings=read("max_position_embeddings"),
        position_embedding="rope",
        rotary_base=float(rope.get("rope_theta") or read("rope_theta", None) or 10_000.0),
        activation="swiglu",
        normalization="RMSNorm",
        norm_epsilon=read("rms_norm_eps", 1e-6),
        add_bias_linear=False,
        tie_word_embeddings=read("tie_word_embeddings", False),
        attention_dropout=read("attention_dropout", 0.0),
        init_method_std=read("initializer_range", 0.02),
    )


def _megatron_bert(read: Callable, refuse_unless: Callable, head: str) -> dict[str, Any]:
    refuse_unless("position_embedding_type", "absolute")
    refuse_unless("is_decoder", False)
    found = dict(
        family="bert",
        num_layers=read("num_hidden_layers"),
        hidden_size=read("hidden_size"),
        num_attention_heads=read("num_attention_heads"),
        ffn_hidden_size=read("intermediate_size"),
        vocab_size=read("vocab_size"),
        max_position_embeddings=read("max_position_embeddings"),
        num_tokentypes=read("type_vocab_size", 2),
        activation=_activation(read("hidden_act", "gelu")),
        norm_epsilon=read("layer_norm_eps", 1e-12),
        hidden_dropout=read("hidden_dropout_prob", 0.1),
        attention_dropout=read("attention_probs_dropout_prob", 0.1),
        init_method_std=read("initializer_range", 0.02),
        bert_binary_head=head.endswith("ForPreTraining"),
    )
    if head not in ("", "MegatronBertModel") and not head.endswith(
        ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification")
    ):
        raise config_error(
            [
                Problem(
                    "model",
                    head,
                    "this head is not built; give MegatronBertForMaskedLM, ForPreTraining or ForSequenceClassification",
                )
            ]
        )
    if head.endswith("ForSequenceClassification"):
        found |= dict(num_labels=read("num_labels", 2), problem_type=read("problem_type", None))
    else:
        found["tie_word_embeddings"] = read("tie_word_embeddings", True)
    return found


def _t5(read: Callable, refuse_unless: Callable, head: str) -> dict[str, Any]:
    refuse_unless("is_encoder_decoder", True)
    if head not in ("", "T5Model", "T5ForConditionalGeneration"):
        raise config_error(
            [Problem("model", head, "this head is not built; give T5ForConditionalGeneration")]
        )
    activation, start = read("feed_forward_proj", "relu"), read("decoder_start_token_id", None)
    if activation not in _T5_ACTIVATIONS:
        raise config_error(
            [
                Problem(
                    "model.feed_forward_proj",
                    activation,
                    f"choose one of {', '.join(_T5_ACTIVATIONS)}",
                )
            ]
        )
    return dict(
        family="t5",
        num_layers=read("num_layers"),
        num_decoder_layers=read("num_decoder_layers", None) or read("num_layers"),
        hidden_size=read("d_model"),
        num_attention_heads=read("num_heads"),
        kv_channels=read("d_kv"),
        ffn_hidden_size=read("d_ff"),
        vocab_size=read("vocab_size"),
        max_position_embeddings=read("n_positions", 512),
        position_embedding="relative",
        relative_attention_num_buckets=read("relative_attention_num_buckets", 32),
        relative_attention_max_distance=read("relative_attention_max_distance", 128),
        activation=_T5_ACTIVATIONS[activation],
        normalization="RMSNorm",
        norm_epsilon=read("layer_norm_epsilon", 1e-6),
        add_bias_linear=False,
        hidden_dropout=read("dropout_rate", 0.1),
        attention_dropout=read("dropout_rate", 0.1),
        tie_word_embeddings=read("tie_word_embeddings", True),
        decoder_start_token_id=start if start is not None else read("pad_token_id", None) or 0,
    )


_MODELS = {"gpt2": _gpt2, "llama": _llama, "megatron-bert": _megatron_bert, "t5": _t5}


def optimizer_fields(optimizer: Any) -> dict[str, Any]:
    """`optimizer.*` and `schedule.*` fields of a torch optimizer, by its class name and parameter groups.

    AdamW, SGD, and Adam where it has no weight decay (it would add the decay to the gradient; megafn's is decoupled).
    Groups may differ in weight decay, one value and 0: which parameters are not decayed is `no_wd_decay_cond`'s to say.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    name, groups = type(optimizer).__name__, getattr(optimizer, "param_groups", None) or []
    kinds = {"adamw": "adam", "adam": "adam", "fusedadam": "adam", "sgd": "sgd"}
    if name.lower() not in kinds or not groups:
        raise config_error(
            [
                Problem(
                    "optimizer",
                    name,
                    "give torch.optim.AdamW, Adam or SGD, whose settings megatron-core's optimizer takes over",
                )
            ]
        )

    def one(key: str) -> Any:
        values = {group.get(key) for group in groups}
        if len(values) > 1:
            remedy = "use scale_lr_cond and lr_mult" if key == "lr" else "give them all one"
            raise config_error(
                [
                    Problem(
                        f"optimizer.{key}",
                        tuple(sorted(values)),
                        f"its parameter groups differ; {remedy}",
                    )
                ]
            )
        return values.pop()

    for key in ("amsgrad", "maximize", "nesterov", "dampening"):
        if one(key):
            raise config_error(
                [
                    Problem(
                        f"optimizer.{key}",
                        one(key),
                        "megatron-core's optimizer does not have it; leave it out",
                    )
                ]
            )
    decays = sorted({float(group.get("weight_decay", 0.0)) for group in groups} - {0.0})
    if len(decays) > 1:
        raise config_error(
            [
                Problem(
                    "optimizer.weight_decay",
                    tuple(decays),
                    "one value and 0 are all that its parameter groups may have",
                )
            ]
        )
    if name.lower() == "adam" and decays and not one("decoupled_weight_decay"):
        raise config_error(
            [
                Problem(
                    "optimizer.weight_decay",
                    decays[0],
                    "torch's Adam adds it to the gradient, megafn decouples it; "
                    "use AdamW, or Adam without it",
                )
            ]
        )
    found = {
        "optimizer.name": kinds[name.lower()],
        "schedule.lr": float(one("initial_lr") or one("lr")),
        "schedule.weight_decay": decays[0] if decays else 0.0,
    }
    if found["optimizer.name"] == "sgd":
        return found | {"optimizer.momentum": float(one("momentum"))}
    beta1, beta2 = one("betas")
    return found | {"optimizer.beta1": beta1, "optimizer.beta2": beta2, "optimizer.eps": one("eps")}


def scheduler_fields(scheduler: Any, micro_batch_size: int) -> dict[str, Any]:
    """`schedule.*` fields of a learning rate scheduler, and "horizon": its steps in samples or iterations.

    accelerate's MegatronLMDummyScheduler counts the micro-batches of all ranks (`len(dataloader) * epochs`), so its
    total_num_steps are that many samples times micro_batch_size. Schedulers of transformers (`get_linear_schedule_with_warmup`,
    `get_cosine_...`, `get_constant_...`) and torch's CosineAnnealingLR count updates.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    name = type(scheduler).__name__
    if getattr(scheduler, "total_num_steps", None) is not None:
        found = {"schedule.decay_samples": scheduler.total_num_steps * micro_batch_size}
        if warmup := getattr(scheduler, "warmup_num_steps", 0):
            found["schedule.warmup_samples"] = warmup * micro_batch_size
        return found | {"horizon": ("train_samples", found["schedule.decay_samples"])}
    if name == "CosineAnnealingLR":
        return {
            "schedule.decay": "cosine",
            "schedule.decay_iters": scheduler.T_max,
            "schedule.min_lr": float(scheduler.eta_min),
            "horizon": ("train_iters", scheduler.T_max),
        }
    function = (getattr(scheduler, "lr_lambdas", None) or [None])[0]
    steps: Mapping[str, Any] = getattr(function, "keywords", None) or {}
    styles = {
        f"_get_{style}_schedule_with_warmup_lr_lambda": style
        for style in ("linear", "cosine", "constant")
    }
    style = styles.get(getattr(getattr(function, "func", None), "__name__", None))
    if style is None or steps.get("num_cycles", 0.5) != 0.5:
        raise config_error(
            [
                Problem(
                    "scheduler",
                    name,
                    "its steps cannot be read; give an object with total_num_steps and warmup_num_steps, "
                    "a linear, cosine or constant scheduler of transformers, or CosineAnnealingLR; or say it with "
                    "lr_decay_style, lr_decay_iters and lr_warmup_iters",
                )
            ]
        )
    found = {"schedule.decay": style}
    if steps.get("num_warmup_steps"):
        found["schedule.warmup_iters"] = steps["num_warmup_steps"]
    if (total := steps.get("num_training_steps")) is not None:
        found |= {"schedule.decay_iters": total, "horizon": ("train_iters", total)}
    return found


def loader_fields(dataloaders: Any, *, smallest: bool) -> dict[str, Any]:
    """ "micro_batch_size" of loaders: the smallest or largest batch size; and "data" of a MegatronLMDummyDataLoader."""
    loaders = tuple(dataloaders) if isinstance(dataloaders, (tuple, list)) else (dataloaders,)
    dummies = [
        loader.dataset_args
        for loader in loaders
        if isinstance(getattr(loader, "dataset_args", None), Mapping)
    ]
    if dummies and len(dummies) < len(loaders):
        raise ConfigError(
            "dataloaders: some are of indexed data, some of batches; give loaders of one kind"
        )
    sizes = (
        [one["micro_batch_size"] for one in dummies if one.get("micro_batch_size")]
        if dummies
        else list(map(_batch_size, loaders))
    )
    found = {"micro_batch_size": min(sizes) if smallest else max(sizes)} if sizes else {}
    return found | ({"data": _indexed(dummies[0])} if dummies else {})


def _batch_size(loader: Any) -> int:
    size = getattr(loader, "batch_size", None) or getattr(
        getattr(loader, "batch_sampler", None), "batch_size", None
    )
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(
            f"dataloaders: {type(loader).__name__} tells no batch_size; leave it out and give micro_batch_size"
        )
    return size


def _indexed(arguments: Mapping[str, Any]) -> DataConfig:
    paths = arguments.get("data_path")
    if not paths:
        raise ConfigError(
            "dataloaders: the loader of indexed data tells no data_path; give one, or data = DataConfig(...)"
        )
    paths = [paths] if isinstance(paths, str) else list(paths)
    train = (
        paths[0]
        if len(paths) == 1
        else tuple((float(weight), path) for weight, path in zip(paths[::2], paths[1::2]))
    )
    split = weights(arguments.get("splits_string") or arguments.get("split") or "969, 30, 1")
    return DataConfig(
        train=train, split=split, sampler=arguments.get("dataloader_type") or "single"
    )


def weights(text: str | Iterable[float]) -> tuple[float, ...]:
    """Megatron's split string as numbers.

    >>> weights("969, 30, 1")
    (969.0, 30.0, 1.0)
    """
    try:
        return tuple(map(float, text.split(",") if isinstance(text, str) else text))
    except (TypeError, ValueError):
        raise config_error(
            [Problem("split", text, 'give three weights, such as "969, 30, 1"')]
        ) from None
