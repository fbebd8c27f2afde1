"""A dry run: the product's own step for one rank of any world, in this process, without memory."""

import random
import re
import sys
import warnings

import attrs
import numpy as np
import pytest
import torch

import megafn as mf
from bert_rows import MASKED, PAIRS, bert_rows
from equivalence import share, tiny
from gpt_rows import growing_rows
from megafn.__main__ import main
from t5_rows import T5, pairs


def small(**changes):
    """`tiny` with few micro-batches."""
    return tiny(**dict(num_layers=2, micro_batch_size=1, global_batch_size=4) | changes)


def raw_batch(config, rows, world_size, rank=0):
    """A rank's micro-batches of rows of the tests."""
    groups = mf.build_groups(config.parallel, world_size, model=config.model)

    class Place:
        dp_rank = mf.coordinates(groups, rank).dp
        dp_size = groups.dp_size

    return share(rows(config, 0), config, Place)


# ------------------------------------------------------------------------------ leaves nothing


def left_behind():
    """Everything that a dry run touches in a process."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as mcore_random
    from torch.distributed import distributed_c10d as c10d

    return (
        torch.distributed.is_initialized(),
        c10d._world,
        c10d._world.default_pg,
        dict(c10d._pg_map),
        dict(c10d._pg_names),
        c10d._group_count,
        c10d._default_pg_init_method,
        torch.distributed.all_gather_object,
        c10d.all_gather_object,
        torch.distributed.barrier,
        bytes(torch.get_rng_state().numpy()),
        random.getstate(),
        np.random.get_state()[1].tobytes(),
        mcore_random._CUDA_RNG_STATE_TRACKER,
        parallel_state._GLOBAL_MEMORY_BUFFER,
        torch.cuda.current_device,
        torch.cuda.get_rng_state,
        torch.nn.Module._apply,
        torch.nn.modules.module._global_forward_hooks.copy(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.is_grad_enabled(),
        sys.excepthook,
        list(warnings.filters),
    )


def test_nothing_is_left_behind_also_by_an_exception():
    config = small(tp=2, hidden_dropout=0.1)
    before = left_behind()
    first = mf.dry_run(config, 4, rank=3)
    assert left_behind() == before
    second = mf.dry_run(config, 4, rank=3)
    assert left_behind() == before
    assert first == second

    def fails(logits, batch, pg):
        random.random()
        torch.rand(1)
        np.random.rand()
        warnings.simplefilter("ignore")
        raise KeyError("of a user's loss")

    step = attrs.evolve(mf.step_fn("gpt"), loss=fails)
    with pytest.raises(KeyError, match="of a user's loss"):
        mf.dry_run(config, 4, step=step)
    assert left_behind() == before


def test_it_works_among_groups_of_its_own():
    config = small(warmup_iters=0)
    batch = raw_batch(config, lambda config, _: _rows(config), 1)
    with mf.init_groups(mf.build_groups(config.parallel, 1)) as pg:
        state = mf.setup(config, pg)
        state, first = mf.train_step(state, batch, mf.step_fn("gpt"))
        before = left_behind()
        report = mf.dry_run(small(tp=2, pp=2), 8, rank=7)
        assert report.place == mf.Coordinates(tp=1, pp=1, dp=1)
        assert left_behind() == before
        # the groups still work
        total = torch.ones(1)
        torch.distributed.all_reduce(total, group=pg.world)
        state, second = mf.train_step(state, batch, mf.step_fn("gpt"))
        assert second.loss < first.loss
    assert not torch.distributed.is_initialized()


def _rows(config):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(
        0, 97, (config.global_batch_size, config.model.seq_length + 1), generator=draw
    )
    return [{"text": row} for row in ids]


def test_the_optimizer_updates_and_no_real_memory_is_used():
    """A model of 200 GB."""
    config = mf.TrainConfig(
        model=mf.ModelConfig(
            num_layers=1, hidden_size=2**16, num_attention_heads=64, seq_length=64, vocab_size=64
        ),
        micro_batch_size=1,
        global_batch_size=1,
        train_iters=1,
    )
    report = mf.dry_run(config, 1)
    assert report.num_parameters > 50e9
    state = 4 * report.num_parameters
    assert report.memory.peak.parameters == state
    assert report.memory.peak.gradients == state
    # the two moments, which the first update makes
    assert report.memory.peak.optimizer_state == pytest.approx(2 * state, rel=0.001)


# --------------------------------------------------------------------------- what can be dry-run


def scaled(logits, batch, pg):
    loss = mf.token_loss(logits, batch, pg)
    chosen = logits.transpose(0, 1)[batch["loss_mask"] > 0]
    return mf.Loss(
        sum=loss.sum + 0 * chosen.sum(), count=loss.count, report={"twice": 2 * loss.sum.item()}
    )


def with_a_float_layer(config, pg, **place):
    chunk = mf.build_chunk(config, pg, **place)
    norm = chunk.decoder.layers[0].input_layernorm
    chunk.decoder.layers[0].input_layernorm = torch.nn.Sequential(norm, torch.nn.Linear(32, 32))
    return chunk


def plain_adam(config, chunks, pg):
    from megatron.core.optimizer import FP32Optimizer

    from megafn.runtime.model.optimizer import mcore_optimizer_config

    weights = [weight for chunk in chunks for weight in chunk.parameters() if weight.requires_grad]
    optimizer = FP32Optimizer(
        torch.optim.Adam(weights), mcore_optimizer_config(config), lambda _: None
    )
    return optimizer


def frozen_but_the_last(build):
    chunk = build()
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad = name.startswith("output_layer")
    return chunk


GPT_STEP = mf.step_fn("gpt")
ON_THE_LAST_STAGE = dict(pp=2, tie_word_embeddings=False)
# name: (rank, changes of the config, arguments)
CASES = {
    "gpt": (3, {}, {}),
    "vpp": (2, dict(pp=2, vpp=2, num_layers=4), {}),
    "cp": (1, dict(cp=2, tp=2, sequence_parallel=True), {}),
    "fp16": (0, dict(dtype="fp16"), {}),
    "full recomputation": (
        0,
        dict(recompute=mf.RecomputeConfig(granularity="full"), hidden_dropout=0.1),
        {},
    ),
    "bert": (0, MASKED | dict(pp=2, num_layers=2), {}),
    "bert pairs": (3, PAIRS | dict(pp=2, tp=2, num_layers=2), {}),
    "t5, encoder": (0, T5 | dict(pp=2, num_layers=2), {}),
    "t5, decoder": (3, T5 | dict(pp=2, num_layers=2), {}),
    "custom step": (0, {}, {"step": attrs.evolve(GPT_STEP, loss=scaled)}),
    "model function": (0, dict(tp=2, dtype="bf16"), {"model": with_a_float_layer}),
    "optimizer function": (0, {}, {"optimizer": plain_adam}),
    "lora": (
        1,
        dict(prepare_model=mf.lora(modules=("linear_qkv",), rank=2, alpha=4), pp=2),
        {},
    ),
    "lora on the last stage": (
        0,
        ON_THE_LAST_STAGE | dict(prepare_model=mf.lora(modules=("output_layer",), rank=2, alpha=4)),
        {},
    ),
    "frozen but the last stage": (
        3,
        ON_THE_LAST_STAGE | dict(prepare_model=frozen_but_the_last),
        {},
    ),
    "logits and diagnostics": (
        0,
        dict(return_logits="last_stage", log=mf.LogConfig(everything=True), pp=2),
        {},
    ),
}


@pytest.mark.filterwarnings("ignore:WARNING. there is no optimizer on RANK 0")
@pytest.mark.parametrize("case", CASES)
def test_everything_that_trains_can_be_dry_run(case):
    rank, changes, arguments = CASES[case]
    report = mf.dry_run(small(**changes), 4, rank, **arguments)
    peak = report.memory.peak
    assert peak.parameters > 0 and peak.activations > 0
    assert (peak.gradients > 0) == (case != "lora on the last stage")
    assert peak.total >= report.memory.setup.total
    assert report.flops > 0 and report.matmuls > 0
    assert report.num_parameters > 0
    assert str(report).startswith(f"one step of rank {rank} of 4")


@pytest.mark.parametrize(
    "changes, rows",
    [(MASKED, bert_rows), (T5, pairs)],
    ids=["bert", "t5"],
)
def test_a_batch_of_the_users(changes, rows):
    config = small(**changes | dict(num_layers=2))
    report = mf.dry_run(config, 2, batch=raw_batch(config, rows, 2))
    assert report.flops == mf.dry_run(config, 2).flops


@pytest.mark.parametrize("rank", range(4))
def test_micro_batches_of_different_lengths_over_a_pipeline(rank):
    """Neighbours would announce the shapes: in an interleaved pipeline, in the schedule's order."""
    config = small(pp=4, vpp=2, num_layers=8, global_batch_size=8)
    batch = raw_batch(config, growing_rows, 4)
    assert len({micro_batch["tokens"].shape for micro_batch in batch}) > 1
    report = mf.dry_run(config, 4, rank, batch=batch)
    sent = report.messages["pp"].by_collective
    assert sent["send"] > 0


@pytest.mark.parametrize(
    "rank, changes",
    [
        (0, {}),
        (1, dict(pp=2, dtype="bf16", use_distributed_optimizer=True)),
        (0, dict(pp=2, vpp=2, tp=2, sequence_parallel=True, num_layers=4)),
        (3, PAIRS | dict(pp=2, num_layers=2)),
        (0, T5 | dict(pp=2, num_layers=2)),
    ],
)
def test_of_many_micro_batches_a_few_are_run_and_the_numbers_are_the_same(rank, changes):
    config = small(**changes)
    dp = 4 // (config.parallel.tp * config.parallel.pp)
    config = attrs.evolve(config, global_batch_size=20 * dp * config.micro_batch_size)
    few = mf.dry_run(config, 4, rank)
    # of a custom step nothing is known
    all_of_them = mf.dry_run(config, 4, rank, step=attrs.evolve(mf.step_fn(config.model.family)))
    assert len(few.memory.timeline) < len(all_of_them.memory.timeline) or config.parallel.pp == 1

    def without_timeline(report):
        return attrs.evolve(
            report,
            memory=attrs.evolve(report.memory, timeline=()),
            num_micro_batches_in_timeline=0,
        )

    assert without_timeline(few) == without_timeline(all_of_them)


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "world_size, rank, message",
    [
        (4, 4, "rank = 4: must be 0 to 3 in a world of 4 ranks"),
        (4, -1, "rank = -1: must be 0 to 3 in a world of 4 ranks"),
        (4, 1.5, "rank = 1.5: must be 0 to 3 in a world of 4 ranks"),
        (3, 0, "world_size = 3: "),
        (0, 0, "world_size = 0: "),
    ],
)
def test_a_rank_outside_of_the_world_is_one_sentence(world_size, rank, message):
    with pytest.raises(mf.ConfigError, match=message) as error:
        mf.dry_run(small(tp=2), world_size, rank)
    assert "\n" not in str(error.value)


def test_a_step_that_cannot_read_the_example_asks_for_a_batch():
    step = attrs.evolve(GPT_STEP, batch=lambda raw, config, pg: {"tokens": raw["sentences"]})
    with pytest.raises(mf.ConfigError, match="batch = None: .*'sentences'.*give dry_run a batch"):
        mf.dry_run(small(), 1, step=step)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(step="gpt"), "step = 'gpt': must be a Step; give mf.step_fn"),
        (dict(model=torch.nn.Linear(2, 2)), "model = Linear: must be a function that builds"),
        (dict(model="gpt"), "model = str: must be a function that builds one model chunk"),
        (
            dict(model=lambda *_, **__: torch.nn.Linear(2, 2)),
            "the Linear that it returned has no config; set its attribute config",
        ),
    ],
)
def test_arguments_of_another_kind_are_one_sentence(arguments, message):
    with pytest.raises(mf.ConfigError, match=message) as error:
        mf.dry_run(small(), 1, **arguments)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------- pictures, command


def test_the_command_prints_the_table_and_draws_memory(tmp_path, capsys):
    path = tmp_path / "config.toml"
    mf.dump_config(small(pp=2, tp=2), path)
    arguments = ["dry-run", str(path), "--world-size", "8", "--rank", "7"]
    assert main([*arguments, "--picture", str(tmp_path / "memory.png")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "one step of rank 7 of 8: stage 1 of 2 (pp), tp 1 of 2, cp 0 of 1, dp 1 of 2\n"
        "2 micro-batches of 1; "
    )
    assert re.search(r"^at the peak, on a GPU .* [kM]B$", out, re.M)
    assert "fit" not in out and "drawn:" not in out
    assert re.search(r"^tp +[\d,]+ +[\d.]+ kB  all_reduce ", out, re.M)
    assert "A activations" in out and re.search(r"^ +0 \+ *f.*b.*o+$", out, re.M)
    assert max(map(len, out.splitlines())) <= 100
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")

    assert main([*arguments[:-1], "8"]) == 2
    assert capsys.readouterr() == (
        "",
        "megafn: rank = 8: must be 0 to 7 in a world of 8 ranks\n",
    )


@pytest.mark.parametrize(
    "picture, message",
    [
        ("nowhere/a.png", "there is no folder .*nowhere; make it first"),
        ("a.jpg", "pictures are PNG; name a file that ends in .png"),
        ("folder.png", "this is a folder; name a file in it"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(
    picture, message, tmp_path, monkeypatch, capsys
):
    (tmp_path / "folder.png").mkdir()
    path = tmp_path / "config.toml"
    mf.dump_config(small(), path)
    monkeypatch.setattr(mf, "dry_run", None)
    picture = str(tmp_path / picture)
    assert main(["dry-run", str(path), "--world-size", "1", "--picture", picture]) == 2
    out, error = capsys.readouterr()
    assert out == "" and re.fullmatch(f"megafn: --picture = '.*': {message}\n", error)


@pytest.mark.parametrize("usable, verdict", [(0.9, "does not fit"), (1.1, "fits"), (9, "fits")])
def test_the_command_says_whether_the_rank_fits_a_device(usable, verdict, tmp_path, capsys):
    config = small()
    path = tmp_path / "config.toml"
    mf.dump_config(config, path)
    on_gpu = mf.dry_run(config, 1).memory.peak_on_gpu.total
    machine = tmp_path / "machine.toml"
    fields = attrs.asdict(mf.MACHINES["h100"]) | dict(
        name="toy", memory_bytes=usable * on_gpu, reserved_bytes=0
    )
    machine.write_text(_as_toml(fields))
    picture = tmp_path / "memory.png"
    arguments = ["--world-size", "1", "--machine", str(machine), "--picture", str(picture)]
    assert main(["dry-run", str(path), *arguments]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^{verdict} toy, ", out, re.M)
    assert ("above the picture: toy, " in out) == (usable == 9)
    assert picture.exists()


def _as_toml(fields):
    lines = []
    for name, value in fields.items():
        if isinstance(value, dict):
            value = "{" + ", ".join(f"{key} = {number}" for key, number in value.items()) + "}"
        elif isinstance(value, str):
            value = f'"{value}"'
        lines.append(f"{name} = {value}")
    return "\n".join(lines)


def test_what_only_a_cpu_keeps_has_a_row_and_a_line():
    report = mf.dry_run(small(normalization="RMSNorm", global_batch_size=64), 2)
    memory = report.memory
    assert 0 < memory.cpu_only == memory.peak.total - memory.peak_on_gpu.total
    assert re.search(r"^kept on a CPU only +(\S+ kB) +\1$", str(report), re.M)
    drawing = mf.draw_dry_run(report)
    assert re.search(r"^--- .*: the peak on a GPU, without what only a CPU keeps$", drawing, re.M)
    assert re.search(r"^drawn: \d of the 32 micro-batches, which are alike$", drawing, re.M)


def test_a_long_step_is_drawn_in_the_width_of_a_terminal():
    report = mf.dry_run(small(pp=2, global_batch_size=24), 2, step=attrs.evolve(GPT_STEP))
    assert len(report.memory.timeline) > 80
    drawing = mf.draw_dry_run(report)
    assert max(map(len, drawing.splitlines())) < 110
    # the highest moment is not lost where neighbours share a column
    assert "A" in drawing.splitlines()[0]
