"""Checkpoints that an older megafn wrote still load: the format and the names of parameters stay.

tests/data holds two of them, written by commit 862f356 with torch 2.13 and megatron-core 0.16.1,
two steps of a GPT of one layer: by one process, and by tp 2 x dp 2 with the distributed optimizer.
"""

import hashlib
import json
import shutil
from pathlib import Path

import attrs
import pytest
import torch

import megafn as mf
from megafn.pure.checkpoint.compatibility import resume_problems
from megafn.runtime.checkpoint.state_boxes import adam_step, state_boxes

DATA = Path(__file__).parent / "data"

# name: (sha256 of all parameters and moments, losses of iterations 3 and 4 of that run)
WRITTEN = {
    "checkpoint-of-one": (
        "8e775e552b3f2a6321ae1d6df7b19a6753646804d2c0b0ba387c6df640a779e3",
        [1.9149234, 1.8980871],
    ),
    "checkpoint-of-tp2-dp2": (
        "9036d6e179a9dafc64d5087bb479e53a11a57ee099aefce1028e835462f3944c",
        [1.9149235, 1.8980871],
    ),
}
CONFIG = mf.TrainConfig(
    model=mf.ModelConfig(
        num_layers=1,
        hidden_size=4,
        num_attention_heads=2,
        seq_length=8,
        vocab_size=7,
        ffn_hidden_size=4,
        position_embedding="rope",
        normalization="RMSNorm",
        add_bias_linear=False,
    ),
    optimizer=mf.OptimizerConfig(eps=1e-3),
    schedule=mf.ScheduleConfig(lr=1e-2, warmup_iters=1, weight_decay=0.1),
    micro_batch_size=2,
    global_batch_size=4,
    train_iters=4,
    eval_iters=0,
)


def unpack(name, directory):
    shutil.unpack_archive(DATA / f"{name}.zip", directory)
    return directory


def batch_of(iteration):
    """The micro-batches of a global batch, of 4 rows of 9 tokens."""
    tokens = (torch.arange(4 * 9).reshape(4, 9) * 3 + iteration) % 7
    return [{"text": tokens[:2]}, {"text": tokens[2:]}]


def digest_of(state):
    digest = hashlib.sha256()
    for box in sorted(state_boxes(state), key=lambda box: box.tensor):
        digest.update(box.tensor.encode())
        digest.update(box.view.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", WRITTEN)
def test_an_old_checkpoint_loads_and_training_continues(name, tmp_path):
    digest, losses = WRITTEN[name]
    directory = unpack(name, tmp_path)
    with mf.init_groups(mf.build_groups(CONFIG.parallel, 1)) as pg:
        state = mf.load(mf.setup(CONFIG, pg), directory)
        assert state.iteration == 2
        assert state.consumed_samples == 8
        assert adam_step(state) == 2
        assert digest_of(state) == digest
        resumed = []
        for iteration in (2, 3):
            state, metrics = mf.train_step(state, batch_of(iteration), mf.step_fn("gpt"))
            resumed.append(metrics.loss)
    torch.testing.assert_close(resumed, losses, rtol=0, atol=1e-4)


def without_field(path, section, field):
    """Take a field out of a checkpoint's config, as if its megafn had not known it."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_bytes())
    del manifest["config"][section][field]
    file.write_text(json.dumps(manifest))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    sums = path / "SHA256SUMS"
    lines = [line for line in sums.read_text().splitlines() if not line.endswith(file.name)]
    sums.write_text("\n".join([*lines, f"{digest}  {file.name}", ""]))


def test_a_field_that_the_stored_config_lacks_is_not_compared(tmp_path):
    directory = unpack("checkpoint-of-one", tmp_path)
    other = attrs.evolve(CONFIG, model=attrs.evolve(CONFIG.model, norm_epsilon=1e-6))
    with mf.init_groups(mf.build_groups(CONFIG.parallel, 1)) as pg:
        state = mf.setup(other, pg)
        with pytest.raises(mf.ConfigError, match="model.norm_epsilon = 1e-06: the checkpoint was"):
            mf.load(state, directory)
        without_field(mf.latest(directory), "model", "norm_epsilon")
        assert mf.load(state, directory).iteration == 2


def test_a_changed_field_of_a_record_in_the_model_is_one_problem():
    def scaled(factor):
        scaling = None if factor is None else mf.RopeScaling(factor=factor)
        return attrs.evolve(CONFIG, model=attrs.evolve(CONFIG.model, rope_scaling=scaling))

    assert resume_problems(scaled(8.0), scaled(8.0), 2) == ()
    (other,) = resume_problems(scaled(8.0), scaled(32.0), 2)
    assert str(other).startswith("model.rope_scaling.factor = 32.0: the checkpoint was")
    (new,) = resume_problems(scaled(None), scaled(8.0), 2)
    assert str(new).startswith("model.rope_scaling = RopeScaling(factor=8.0,")
