"""megafn: Megatron-scale training as functions, without Megatron's globals.

The public API, loaded lazily: `import megafn` brings no torch until something that runs is touched.
"""

from importlib import import_module

_HOME = {
    "ModelConfig": "pure.config.records",
    "ParallelConfig": "pure.config.records",
    "RecomputeConfig": "pure.config.records",
    "PrecisionConfig": "pure.config.records",
    "OptimizerConfig": "pure.config.records",
    "ScheduleConfig": "pure.config.records",
    "DataConfig": "pure.config.records",
    "LogConfig": "pure.config.records",
    "CheckpointConfig": "pure.config.records",
    "TrainConfig": "pure.config.records",
    "ConfigError": "pure.config.problems",
    "padded_vocab_size": "pure.config.records",
    "training_flops": "pure.flops",
    "num_micro_batches": "pure.config.records",
    "Problem": "pure.config.problems",
    "to_dict": "pure.config.serialization",
    "from_dict": "pure.config.serialization",
    "load_config": "pure.config.serialization",
    "dump_config": "pure.config.serialization",
    "from_plugin": "pure.accelerate.plugin",
    "from_env": "pure.accelerate.plugin_fields",
    "validate": "pure.validation.validate",
    "check": "pure.validation.validate",
    "Groups": "pure.layout",
    "Coordinates": "pure.layout",
    "build_groups": "pure.layout",
    "coordinates": "pure.layout",
    "rank_of": "pure.layout",
    "group_of": "pure.layout",
    "LrWd": "pure.schedule",
    "make_schedule": "pure.schedule",
    "split_among_ranks": "pure.sampling",
    "sample_indices": "pure.sampling",
    "batch_indices": "pure.sampling",
    "Op": "pure.pipeline",
    "pipeline_order": "pure.pipeline",
    "bubble": "pure.pipeline",
    "peak_activations": "pure.pipeline",
    "timeline": "pure.pipeline",
    "check_order": "pure.pipeline",
    "draw_pipeline": "pure.pipeline",
    "ProcessGroups": "runtime.parallel.groups",
    "init_groups": "runtime.parallel.groups",
    "world_size": "runtime.parallel.groups",
    "Loss": "runtime.model.losses",
    "cross_entropy": "runtime.model.losses",
    "logsumexp": "runtime.model.losses",
    "argmax": "runtime.model.losses",
    "token_loss": "runtime.model.losses",
    "avg_losses": "runtime.accelerate.collectives",
    "gather": "runtime.accelerate.collectives",
    "transformer_config": "runtime.model.layers",
    "initialize_weights": "runtime.model.weights",
    "whole_parameters": "runtime.model.weights",
    "Chunk": "runtime.model.chunk",
    "build_chunk": "runtime.families.build",
    "Tokenizer": "runtime.text.tokenizer",
    "byte_tokenizer": "runtime.text.tokenizer",
    "load_tokenizer": "runtime.text.tokenizer",
    "demo_text": "runtime.text.demo_text",
    "index_text": "runtime.text.indexing",
    "read_documents": "runtime.text.documents",
    "batches": "runtime.data.batches",
    "group_batches": "runtime.data.batches",
    "Step": "runtime.families.step",
    "step_fn": "runtime.families.built_in",
    "step_of": "runtime.accelerate.train_steps",
    "logits": "runtime.generation.generate",
    "generate": "runtime.generation.generate",
    "progress": "runtime.metrics.sinks",
    "tensorboard": "runtime.metrics.sinks",
    "jsonl": "runtime.metrics.sinks",
    "State": "runtime.model.state",
    "Metrics": "runtime.metrics.records",
    "Report": "runtime.metrics.records",
    "setup": "runtime.training.setup",
    "train_step": "runtime.training.step",
    "evaluate": "runtime.training.step",
    "fit": "runtime.training.fit",
    "train": "runtime.training.train",
    "replay": "runtime.training.replay",
    "save": "runtime.checkpoint.checkpoint",
    "load": "runtime.checkpoint.checkpoint",
    "latest": "runtime.checkpoint.checkpoint",
    "CheckpointError": "runtime.checkpoint.atomic_files",
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
