"""The effects: processes, devices, files. Imports `megafn.pure`; is never imported by it."""

import warnings

with warnings.catch_warnings():  # megatron-core tells of optional packages that megafn does without
    warnings.simplefilter("ignore")
    import megatron.core.datasets.gpt_dataset
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401
