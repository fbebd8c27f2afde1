"""Indexed datasets as megatron-core writes them."""

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def indexed(prefix, documents):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for ids in documents:
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)
