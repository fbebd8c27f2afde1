"""megafn: Megatron-scale training as functions, without Megatron's globals. Loaded lazily: nothing that runs, no torch."""
from importlib import import_module

_HOME = {
    "megafn.pure.config": "ModelConfig ParallelConfig RecomputeConfig PrecisionConfig OptimizerConfig ScheduleConfig DataConfig "
                          "LogConfig TrainConfig ConfigError to_dict from_dict load_config dump_config padded_vocab_size num_micro_batches",
    "megafn.pure.validate": "Problem validate check",
    "megafn.pure.layout": "Groups Coordinates build_groups coordinates rank_of group_of",
    "megafn.pure.schedule": "LrWd make_schedule",
    "megafn.pure.sampling": "sample_indices batch_indices",
    "megafn.pure.pipeline": "Op pipeline_order bubble peak_activations timeline check_order draw_pipeline",
    "megafn.runtime.groups": "ProcessGroups init_groups world_size",
    "megafn.runtime.losses": "Loss cross_entropy logsumexp argmax token_loss avg_losses gather",
    "megafn.runtime.layers": "transformer_config",
    "megafn.runtime.weights": "initialize_weights whole_parameters",
    "megafn.runtime.models": "Stage build_stage",
    "megafn.runtime.tokenizer": "Tokenizer byte_tokenizer load_tokenizer",
    "megafn.runtime.text": "demo_text index_text read_documents",
    "megafn.runtime.data": "batches group_batches",
    "megafn.runtime.steps": "Step step_fn",
    "megafn.runtime.generate": "logits generate",
    "megafn.runtime.sinks": "progress tensorboard jsonl",
    "megafn.runtime.train": "State Metrics Report setup train_step evaluate fit train",
}
_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = sorted(_MODULE)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _MODULE:
        raise AttributeError(f"module 'megafn' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE[name]), name)
    return value


def __dir__():
    return [*globals(), *__all__]
