"""megafn: Megatron-scale training as functions, without Megatron's globals.

The public API, loaded lazily: `import megafn` brings no torch until something that runs is touched.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "ModelConfig": "pure.config.records",
    "RopeScaling": "pure.config.records",
    "ParallelConfig": "pure.config.records",
    "RecomputeConfig": "pure.config.records",
    "PrecisionConfig": "pure.config.records",
    "OptimizerConfig": "pure.config.records",
    "ScheduleConfig": "pure.config.records",
    "DataConfig": "pure.config.records",
    "LogConfig": "pure.config.records",
    "CheckpointConfig": "pure.config.records",
    "TrainConfig": "pure.config.records",
    "FamilySpec": "pure.families.family_spec",
    "StageLayout": "pure.families.family_spec",
    "Constant": "pure.families.family_spec",
    "Normal": "pure.families.family_spec",
    "Rule": "pure.config.rule",
    "rule": "pure.config.rule",
    "sample_tokens": "pure.families.built_in",
    "ConfigError": "pure.config.problems",
    "padded_vocab_size": "pure.config.records",
    "training_flops": "pure.flops",
    "num_micro_batches": "pure.config.records",
    "Problem": "pure.config.problems",
    "to_dict": "pure.config.serialization",
    "from_dict": "pure.config.serialization",
    "load_config": "pure.config.serialization",
    "dump_config": "pure.config.serialization",
    "pretrained_model": "pure.pretrained.architectures",
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
    "Machine": "pure.planner.machine",
    "MACHINES": "pure.planner.machine",
    "load_machine": "pure.planner.machine",
    "Memory": "pure.planner.records",
    "Layout": "pure.planner.records",
    "Plan": "pure.planner.plans.records",
    "Ranking": "pure.planner.plans.records",
    "plan": "pure.planner.plans.plan",
    "apply_plan": "pure.planner.plans.plan",
    "rank_plans": "pure.planner.plans.ranking",
    "draw_plan": "pictures.plan_drawing",
    "ProcessGroups": "runtime.parallel.groups",
    "init_groups": "runtime.parallel.groups",
    "world_size": "runtime.parallel.groups",
    "is_rank_zero": "runtime.parallel.groups",
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
    "layer_spec": "runtime.model.layers",
    "Chunk": "runtime.model.chunk",
    "ChunkFunctions": "runtime.model.chunk",
    "ChunkPlan": "runtime.model.chunk",
    "build_chunk": "runtime.families.build",
    "Tokenizer": "runtime.text.tokenizer",
    "byte_tokenizer": "runtime.text.tokenizer",
    "load_tokenizer": "runtime.text.tokenizer",
    "train_tokenizer": "runtime.text.train_tokenizer",
    "demo_text": "runtime.text.demo_text",
    "index_text": "runtime.text.indexing",
    "read_documents": "runtime.text.documents",
    "batches": "runtime.data.batches",
    "group_batches": "runtime.data.batches",
    "describe_data": "runtime.data.corpus_identity",
    "Step": "runtime.families.step",
    "Family": "runtime.families.family",
    "FamilyData": "runtime.families.family",
    "family_of": "runtime.families.built_in",
    "step_fn": "runtime.families.built_in",
    "step_of": "runtime.accelerate.train_steps",
    "logits": "runtime.generation.logits",
    "generate": "runtime.generation.generate",
    "Generated": "runtime.generation.generate",
    "GenerationConfig": "pure.generation",
    "progress": "runtime.metrics.sinks",
    "tensorboard": "runtime.metrics.sinks",
    "jsonl": "runtime.metrics.sinks",
    "Lora": "runtime.model.lora",
    "lora": "runtime.model.lora",
    "State": "runtime.model.state",
    "Metrics": "runtime.metrics.records",
    "Report": "runtime.metrics.records",
    "plot_plan": "pictures.plan_picture",
    "setup": "runtime.training.setup",
    "train_step": "runtime.training.step",
    "evaluate": "runtime.training.step",
    "fit": "runtime.training.fit",
    "train": "runtime.training.train",
    "replay": "runtime.training.replay",
    "save": "runtime.checkpoint.save",
    "load": "runtime.pretrained.load",
    "latest": "runtime.checkpoint.disk_format",
    "checkpoint_config": "runtime.checkpoint.load",
    "CheckpointError": "runtime.checkpoint.atomic_files",
    "from_pretrained": "runtime.pretrained.start",
    "to_pretrained": "runtime.pretrained.export",
    "export": "runtime.pretrained.export",
    "describe_weights": "runtime.pretrained.describe",
    "dry_run": "runtime.dry_run.dry_run",
    "DryRun": "runtime.dry_run.report",
    "draw_dry_run": "pictures.dry_run_drawing",
    "plot_dry_run": "pictures.dry_run_picture",
}
__all__ = list(_HOME)
__version__ = "0.1.0"

# Type checkers and editors read these imports; Python runs what follows `else`.
if TYPE_CHECKING:
    from megafn.pure.accelerate.plugin import from_plugin as from_plugin
    from megafn.pure.accelerate.plugin_fields import from_env as from_env
    from megafn.pure.config.problems import (
        ConfigError as ConfigError,
        Problem as Problem,
    )
    from megafn.pure.config.records import (
        CheckpointConfig as CheckpointConfig,
        DataConfig as DataConfig,
        LogConfig as LogConfig,
        ModelConfig as ModelConfig,
        OptimizerConfig as OptimizerConfig,
        ParallelConfig as ParallelConfig,
        PrecisionConfig as PrecisionConfig,
        RecomputeConfig as RecomputeConfig,
        RopeScaling as RopeScaling,
        ScheduleConfig as ScheduleConfig,
        TrainConfig as TrainConfig,
        num_micro_batches as num_micro_batches,
        padded_vocab_size as padded_vocab_size,
    )
    from megafn.pure.config.rule import (
        Rule as Rule,
        rule as rule,
    )
    from megafn.pure.config.serialization import (
        dump_config as dump_config,
        from_dict as from_dict,
        load_config as load_config,
        to_dict as to_dict,
    )
    from megafn.pure.families.built_in import sample_tokens as sample_tokens
    from megafn.pure.families.family_spec import (
        Constant as Constant,
        FamilySpec as FamilySpec,
        Normal as Normal,
        StageLayout as StageLayout,
    )
    from megafn.pure.flops import training_flops as training_flops
    from megafn.pure.generation import GenerationConfig as GenerationConfig
    from megafn.pure.layout import (
        Coordinates as Coordinates,
        Groups as Groups,
        build_groups as build_groups,
        coordinates as coordinates,
        group_of as group_of,
        rank_of as rank_of,
    )
    from megafn.pure.pipeline import (
        Op as Op,
        bubble as bubble,
        check_order as check_order,
        draw_pipeline as draw_pipeline,
        peak_activations as peak_activations,
        pipeline_order as pipeline_order,
        timeline as timeline,
    )
    from megafn.pictures.plan_drawing import draw_plan as draw_plan
    from megafn.pure.planner.machine import (
        MACHINES as MACHINES,
        Machine as Machine,
        load_machine as load_machine,
    )
    from megafn.pure.planner.plans.plan import (
        apply_plan as apply_plan,
        plan as plan,
    )
    from megafn.pure.planner.plans.records import (
        Plan as Plan,
        Ranking as Ranking,
    )
    from megafn.pure.planner.plans.ranking import rank_plans as rank_plans
    from megafn.pure.planner.records import (
        Layout as Layout,
        Memory as Memory,
    )
    from megafn.pure.pretrained.architectures import (
        pretrained_model as pretrained_model,
    )
    from megafn.pure.sampling import (
        batch_indices as batch_indices,
        sample_indices as sample_indices,
        split_among_ranks as split_among_ranks,
    )
    from megafn.pure.schedule import (
        LrWd as LrWd,
        make_schedule as make_schedule,
    )
    from megafn.pure.validation.validate import (
        check as check,
        validate as validate,
    )
    from megafn.runtime.accelerate.collectives import (
        avg_losses as avg_losses,
        gather as gather,
    )
    from megafn.runtime.accelerate.train_steps import step_of as step_of
    from megafn.runtime.checkpoint.atomic_files import CheckpointError as CheckpointError
    from megafn.runtime.checkpoint.disk_format import latest as latest
    from megafn.runtime.checkpoint.load import checkpoint_config as checkpoint_config
    from megafn.runtime.checkpoint.save import save as save
    from megafn.runtime.data.batches import (
        batches as batches,
        group_batches as group_batches,
    )
    from megafn.runtime.data.corpus_identity import describe_data as describe_data
    from megafn.pictures.dry_run_drawing import draw_dry_run as draw_dry_run
    from megafn.runtime.dry_run.dry_run import dry_run as dry_run
    from megafn.pictures.dry_run_picture import plot_dry_run as plot_dry_run
    from megafn.runtime.dry_run.report import DryRun as DryRun
    from megafn.runtime.families.build import build_chunk as build_chunk
    from megafn.runtime.families.built_in import (
        family_of as family_of,
        step_fn as step_fn,
    )
    from megafn.runtime.families.family import (
        Family as Family,
        FamilyData as FamilyData,
    )
    from megafn.runtime.families.step import Step as Step
    from megafn.runtime.generation.generate import (
        Generated as Generated,
        generate as generate,
    )
    from megafn.runtime.generation.logits import logits as logits
    from megafn.runtime.metrics.records import (
        Metrics as Metrics,
        Report as Report,
    )
    from megafn.runtime.metrics.sinks import (
        jsonl as jsonl,
        progress as progress,
        tensorboard as tensorboard,
    )
    from megafn.runtime.model.chunk import (
        Chunk as Chunk,
        ChunkFunctions as ChunkFunctions,
        ChunkPlan as ChunkPlan,
    )
    from megafn.runtime.model.layers import (
        layer_spec as layer_spec,
        transformer_config as transformer_config,
    )
    from megafn.runtime.model.lora import (
        Lora as Lora,
        lora as lora,
    )
    from megafn.runtime.model.losses import (
        Loss as Loss,
        argmax as argmax,
        cross_entropy as cross_entropy,
        logsumexp as logsumexp,
        token_loss as token_loss,
    )
    from megafn.runtime.model.state import State as State
    from megafn.runtime.model.weights import (
        initialize_weights as initialize_weights,
        whole_parameters as whole_parameters,
    )
    from megafn.runtime.parallel.groups import (
        ProcessGroups as ProcessGroups,
        init_groups as init_groups,
        is_rank_zero as is_rank_zero,
        world_size as world_size,
    )
    from megafn.pictures.plan_picture import plot_plan as plot_plan
    from megafn.runtime.pretrained.describe import describe_weights as describe_weights
    from megafn.runtime.pretrained.export import (
        export as export,
        to_pretrained as to_pretrained,
    )
    from megafn.runtime.pretrained.load import load as load
    from megafn.runtime.pretrained.start import from_pretrained as from_pretrained
    from megafn.runtime.text.demo_text import demo_text as demo_text
    from megafn.runtime.text.documents import read_documents as read_documents
    from megafn.runtime.text.indexing import index_text as index_text
    from megafn.runtime.text.tokenizer import (
        Tokenizer as Tokenizer,
        byte_tokenizer as byte_tokenizer,
        load_tokenizer as load_tokenizer,
    )
    from megafn.runtime.text.train_tokenizer import train_tokenizer as train_tokenizer
    from megafn.runtime.training.fit import fit as fit
    from megafn.runtime.training.replay import replay as replay
    from megafn.runtime.training.setup import setup as setup
    from megafn.runtime.training.step import (
        evaluate as evaluate,
        train_step as train_step,
    )
    from megafn.runtime.training.train import train as train
else:

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'megafn' has no attribute {name!r}")
        value = getattr(import_module(f"megafn.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
