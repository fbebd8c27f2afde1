"""Global batches of GPT as raw rows: padding, documents, masks and lengths of many kinds."""

import torch
import torch.nn.functional as F

from equivalence import uneven


def padded_rows(config, iteration, *, positions=True):
    """Hugging Face rows, some padded on their left and some on their right; some labels -100."""
    rows = []
    for i, row in enumerate(uneven(config, iteration)):
        s, left, right = config.model.seq_length, (0, 7, 0, 20)[i % 4], (0, 0, 5, 3)[i % 4]
        mask = torch.ones(s, dtype=torch.long)
        mask[:left], mask[s - right :] = 0, 0
        labels = row["tokens"].masked_fill((mask == 0) | (row["tokens"] % 5 == 0), -100)
        rows.append({"input_ids": row["tokens"], "labels": labels, "attention_mask": mask})
        if positions:
            rows[-1]["position_ids"] = (mask.cumsum(0) - 1).clamp(min=0)
    return rows


def document_rows(config, iteration):
    """Rows of three documents each, as megatron-core's dataset gives them with its resets: masks
    [1, s, s], positions anew."""
    rows = uneven(config, iteration)
    for i, row in enumerate(rows):
        s = config.model.seq_length
        cut = torch.tensor([3 + i, 17 + i // 2])
        document = (torch.arange(s)[:, None] >= cut).sum(1)
        row["attention_mask"] = ~((document[:, None] == document) & torch.ones(s, s).tril().bool())[
            None
        ]
        row["position_ids"] = torch.arange(s) - F.pad(cut, (1, 0))[document]
    return rows


def key_rows(config, iteration):
    """Masks [1, 1, s] that hide keys alone; the first token is always seen."""
    rows = uneven(config, iteration)
    for i, row in enumerate(rows):
        row["attention_mask"] = (torch.arange(config.model.seq_length) % (3 + i % 3) == 2)[
            None, None
        ]
    return rows


def growing_rows(config, iteration):
    """Rows whose length changes from micro-batch to micro-batch, and from one data-parallel rank to
    the next."""
    lengths = (8, 32, 16, 24, 32, 8, 8, 16)
    return [
        {
            key: value[: lengths[(i // config.micro_batch_size + iteration) % 8]]
            for key, value in row.items()
        }
        | {
            "loss_mask": row["loss_mask"][: lengths[(i // config.micro_batch_size + iteration) % 8]]
            .clone()
            .index_fill_(0, torch.tensor(0), 1.0)
        }
        for i, row in enumerate(uneven(config, iteration))
    ]


def alone_rows(config, iteration, *, row=-1, position=-1):
    """A global batch in which one token counts: the last position of the last row by default."""
    rows = uneven(config, iteration)
    for one in rows:
        one["loss_mask"] = torch.zeros_like(one["loss_mask"])
    rows[row]["loss_mask"][position] = 1
    return rows
