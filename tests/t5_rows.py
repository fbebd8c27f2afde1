"""T5 for the tests: models, and global batches of sequence pairs as raw rows."""

import torch

T5 = dict(family="t5", num_layers=4, seq_length=24, decoder_seq_length=16, steps=6)
RELATIVE = dict(
    position_embedding="relative",
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)


def pairs(config, iteration, lengths=None):
    """One global batch of sequence pairs as Hugging Face rows: uneven masks on both sides, labels
    that don't count.

    lengths(micro-batch) -> (s, t) of its rows; None: the config's.
    """
    draw = torch.Generator().manual_seed(300 + iteration)
    model, rows = config.model, []
    for row in range(config.global_batch_size):
        turn = row // 2 + iteration
        s, t = (model.seq_length, model.decoder_length) if lengths is None else lengths(turn)
        read, write = [s, s // 3, 1, s - 1][turn % 4], [1, t, 3, t // 2][(turn + row) % 4]
        ids, labels = (torch.randint(0, model.vocab_size, (n,), generator=draw) for n in (s, t))
        mask, decoder_mask = torch.arange(s) < read, torch.arange(t) < write
        if row % 3 == 0:
            mask = mask.flip(0)  # padded on the left
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": mask.long(),
                "labels": labels.where(decoder_mask, -100),
                "decoder_attention_mask": decoder_mask.long(),
            }
        )
    return rows


def of_many_lengths(config, iteration):
    """Lengths that differ from micro-batch to micro-batch, sometimes with an equal sum."""
    return pairs(config, iteration, lambda turn: [(24, 16), (16, 24), (8, 10), (20, 6)][turn % 4])


def of_one_sum(config, iteration):
    """Lengths that differ, and what travels between stages does not."""
    return pairs(config, iteration, lambda turn: [(24, 16), (16, 24)][turn % 2])
