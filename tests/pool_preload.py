"""Imported once by the pool's fork server: what every worker needs.

A worker then starts in milliseconds. No process group, no CUDA context and no thread may come of
it: the workers are forked from here.
"""

import importlib
import pkgutil
import threading
import warnings

import torch

HEAVY = (
    "numpy",
    "pytest",
    "hypothesis",
    "torch.distributed",
    "torch.nn.functional",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing",
)


def megafn_modules():
    """Names of megafn's runtime modules."""
    try:
        package = importlib.import_module("megafn.runtime")
    except ImportError:
        return []
    return [module.name for module in pkgutil.walk_packages(package.__path__, "megafn.runtime.")]


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in (*HEAVY, *megafn_modules()):
        try:
            importlib.import_module(name)
        except Exception:
            # a module that does not import fails in the test that uses it, with its own traceback
            pass

torch.set_num_threads(1)
if threading.active_count() > 1:
    raise RuntimeError(
        f"an import started threads, workers can't be forked: {threading.enumerate()}"
    )
