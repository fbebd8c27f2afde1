"""BERT for the tests: models, and global batches as raw rows."""

import torch

MASKED = dict(family="bert")
PAIRS = MASKED | dict(num_tokentypes=2, bert_binary_head=True)


def bert_rows(config, iteration):
    """One global batch as raw rows, as megatron-core's dataset gives them; what counts is very
    uneven over the micro-batches.

    Some micro-batches predict one token, some every one; some have no pair that counts.
    """
    draw = torch.Generator().manual_seed(100 + iteration)
    size, length, rows = config.model.vocab_size, config.model.seq_length, []
    for row in range(config.global_batch_size):
        turn = (row // config.micro_batch_size + iteration) % 4
        n = length if turn == 1 else int(torch.randint(8, length, (), generator=draw))
        masked = torch.zeros(length, dtype=torch.long)
        masked[torch.randperm(n, generator=draw)[: (1, n, 3, n // 2)[turn]]] = 1
        text, labels = torch.randint(0, size, (2, length), generator=draw)
        order = -1 if turn == 2 else int(torch.randint(0, 2, (), generator=draw))
        rows.append(
            {
                "text": text,
                "labels": labels,
                "loss_mask": masked,
                "padding_mask": (torch.arange(length) < n).long(),
                "types": (torch.arange(length) >= n // 2).long()
                * (config.model.num_tokentypes > 0),
                "is_random": torch.tensor(order),
            }
        )
    return rows


def labelled_rows(config, iteration):
    """The same rows as Hugging Face batches of fine-tuning: a label for each sequence, some of
    which don't count."""
    draw, model = torch.Generator().manual_seed(iteration), config.model

    def label(row):
        if model.problem_type == "regression":
            return torch.randn(model.num_labels, generator=draw)
        if model.problem_type == "multi_label_classification":
            return torch.randint(0, 2, (model.num_labels,), generator=draw).float()
        return (
            torch.tensor(-100)
            if row % 5 == 1
            else torch.randint(0, model.num_labels, (), generator=draw)
        )

    return [
        {"input_ids": row["text"], "attention_mask": row["padding_mask"], "labels": label(i)}
        for i, row in enumerate(bert_rows(config, iteration))
    ]
