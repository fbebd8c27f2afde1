"""megafn: Megatron-scale training as functions, without Megatron's globals.

The public API, loaded lazily: `import megafn` brings no torch until something that runs is touched.
"""
from importlib import import_module

_HOME = {
    "ModelConfig": "pure.config",
    "ParallelConfig": "pure.config",
    "RecomputeConfig": "pure.config",
    "PrecisionConfig": "pure.config",
    "OptimizerConfig": "pure.config",
    "ScheduleConfig": "pure.config",
    "DataConfig": "pure.config",
    "LogConfig": "pure.config",
    "CheckpointConfig": "pure.config",
    "TrainConfig": "pure.config",
    "ConfigError": "pure.config",
    "padded_vocab_size": "pure.config",
    "training_flops": "pure.flops",
    "num_micro_batches": "pure.config",
    "Problem": "pure.config",
    "to_dict": "pure.dicts",
    "from_dict": "pure.dicts",
    "load_config": "pure.dicts",
    "dump_config": "pure.dicts",
    "from_plugin": "pure.plugin",
    "from_env": "pure.plugin_fields",
    "validate": "pure.validate",
    "check": "pure.validate",
    "Groups": "pure.layout",
    "Coordinates": "pure.layout",
    "build_groups": "pure.layout",
    "coordinates": "pure.layout",
    "rank_of": "pure.layout",
    "group_of": "pure.layout",
    "LrWd": "pure.schedule",
    "make_schedule": "pure.schedule",
    "deal": "pure.sampling",
    "sample_indices": "pure.sampling",
    "batch_indices": "pure.sampling",
    "Op": "pure.pipeline",
    "pipeline_order": "pure.pipeline",
    "bubble": "pure.pipeline",
    "peak_activations": "pure.pipeline",
    "timeline": "pure.pipeline",
    "check_order": "pure.pipeline",
    "draw_pipeline": "pure.pipeline",
    "ProcessGroups": "runtime.groups",
    "init_groups": "runtime.groups",
    "world_size": "runtime.groups",
    "Loss": "runtime.losses",
    "cross_entropy": "runtime.losses",
    "logsumexp": "runtime.losses",
    "argmax": "runtime.losses",
    "token_loss": "runtime.losses",
    "avg_losses": "runtime.losses",
    "gather": "runtime.losses",
    "transformer_config": "runtime.layers",
    "initialize_weights": "runtime.weights",
    "whole_parameters": "runtime.weights",
    "Stage": "runtime.models",
    "build_stage": "runtime.families",
    "Tokenizer": "runtime.tokenizer",
    "byte_tokenizer": "runtime.tokenizer",
    "load_tokenizer": "runtime.tokenizer",
    "demo_text": "runtime.text",
    "index_text": "runtime.text",
    "read_documents": "runtime.text",
    "batches": "runtime.data",
    "group_batches": "runtime.data",
    "Step": "runtime.steps",
    "step_fn": "runtime.families",
    "step_of": "runtime.methods",
    "logits": "runtime.generate",
    "generate": "runtime.generate",
    "progress": "runtime.sinks",
    "tensorboard": "runtime.sinks",
    "jsonl": "runtime.sinks",
    "State": "runtime.state",
    "Metrics": "runtime.train",
    "Report": "runtime.train",
    "setup": "runtime.train",
    "train_step": "runtime.train",
    "evaluate": "runtime.train",
    "fit": "runtime.train",
    "train": "runtime.train",
    "replay": "runtime.replay",
    "save": "runtime.checkpoint",
    "load": "runtime.checkpoint",
    "latest": "runtime.checkpoint",
    "CheckpointError": "runtime.durable",
}
__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'megafn' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"megafn.{_HOME[name]}"), name)
    return value


def __dir__():
    return [*globals(), *__all__]
