"""The effects: processes, devices, files. Imports `megafn.pure`; is never imported by it."""

import warnings

# megatron-core warns of optional packages that megafn does without, when it is first imported.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core.datasets.gpt_dataset
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401
