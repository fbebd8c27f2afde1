"""`train` from end to end: what it reports, on which ranks, when and where; and the command."""

import contextlib
import io
import json
import math
import os
import re
import sys
import warnings

import attrs
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import megafn as mf
from megafn.__main__ import main
from megafn.runtime.metrics import sinks
from pool import run_script

TEXT = "\f".join(
    f"Document {i} speaks of {'the same thing as before, ' * 8}and ends." for i in range(40)
)


def config(folder, *, valid_weight=200, log=(), data=True, **changes):
    """Two layers on a small text of its own, in `folder`: 7 iterations of 8 samples."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    return mf.TrainConfig(
        **{
            "model": mf.ModelConfig(
                num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=32
            ),
            "schedule": mf.ScheduleConfig(lr=1e-2, warmup_iters=2, weight_decay=0.1),
            "data": mf.DataConfig(
                train=str(text), split=(800, valid_weight, 0), cache=str(folder / "cache")
            )
            if data
            else None,
            "log": mf.LogConfig(**{"progress": False} | dict(log)),
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "train_iters": 7,
            "eval_iters": 2,
        }
        | changes
    )


def told(config, **arguments):
    """What `train` reports on this rank: metrics, the state's end, standard error, warnings."""
    seen, stderr = [], io.StringIO()
    with contextlib.redirect_stderr(stderr), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = mf.train(config, on_metrics=[seen.append], **arguments)
    files = {
        module.__file__
        for name, module in sys.modules.items()
        if name.partition(".")[0] == "megafn"
    }
    ours = [
        str(warning.message)
        for warning in caught
        if warning.filename in files or "batches" in str(warning.message)
    ]
    return seen, (state.iteration, state.consumed_samples), stderr.getvalue(), ours


def timeless(metrics):
    """A record without what depends on the clock."""
    return attrs.evolve(metrics, seconds=0.0, tokens_per_second=0.0)


# ---------------------------------------------------------------------------- what is reported


def test_every_rank_is_told_the_same_and_evaluations_come_when_due(pool, tmp_path):
    made = config(
        tmp_path,
        parallel=mf.ParallelConfig(pp=2),
        eval_interval=3,
        log={
            "tensorboard_dir": str(tmp_path / "logs"),
            "jsonl": str(tmp_path / "new" / "log.jsonl"),
        },
    )
    ranks = pool(4, told, made)
    seen, schedule = ranks[0][0], mf.make_schedule(made)
    for metrics, end, stderr, caught in ranks:
        assert (
            list(map(timeless, metrics)) == list(map(timeless, seen))
            and end == (7, 56)
            and stderr == ""
            and caught == []
        )
    assert [m.iteration for m in seen] == [1, 2, 3, 4, 5, 6, 7]
    assert [m.consumed_samples for m in seen] == [8, 16, 24, 32, 40, 48, 56]
    assert [(m.lr, m.weight_decay) for m in seen] == [
        attrs.astuple(schedule(8 * i)) for i in range(7)
    ]
    assert [m.iteration for m in seen if m.valid is not None] == [3, 6, 7]
    for m in seen:
        assert (
            m.count == 8 * 32
            and not m.skipped
            and m.grad_norm > 0
            and m.loss_scale == 1
            and m.report == {}
        )
        assert m.tokens_per_second * m.seconds == pytest.approx(8 * 32)
        if m.valid is not None:
            assert m.valid.count == 2 * 8 * 32 and m.valid.perplexity == pytest.approx(
                math.exp(m.valid.loss)
            )
    assert seen[-1].loss < seen[0].loss and seen[-1].valid.loss < seen[2].valid.loss

    lines = [json.loads(line) for line in (tmp_path / "new" / "log.jsonl").read_text().splitlines()]
    assert lines == [attrs.asdict(m, filter=lambda a, _: a.name != "logits") for m in seen]

    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert set(events.Tags()["scalars"]) == {
        f"train/{name}"
        for name in (
            "consumed_samples",
            "loss",
            "lr",
            "weight_decay",
            "grad_norm",
            "count",
            "skipped",
            "loss_scale",
            "seconds",
            "tokens_per_second",
        )
    } | {"valid/loss", "valid/perplexity"}
    for name in ("loss", "lr", "grad_norm", "consumed_samples"):
        assert [(e.step, e.value) for e in events.Scalars(f"train/{name}")] == [
            (m.iteration, pytest.approx(getattr(m, name), rel=1e-6)) for m in seen
        ]
    assert [(e.step, e.value) for e in events.Scalars("valid/loss")] == [
        (m.iteration, pytest.approx(m.valid.loss, rel=1e-6)) for m in seen if m.valid is not None
    ]


def test_progress_shows_on_rank_zero_alone_and_interval_thins_the_records(pool, tmp_path):
    made = config(
        tmp_path,
        eval_interval=4,
        log={"progress": True, "interval": 3, "jsonl": str(tmp_path / "log.jsonl")},
    )
    (seen, _, bar, _), (others, _, nothing, _) = pool(2, told, made)
    assert nothing == "" and [m.iteration for m in seen] == [m.iteration for m in others] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ]
    assert (
        f"loss {seen[-1].loss:.4f}, lr {seen[-1].lr:.2e}, grad norm {seen[-1].grad_norm:.3f}" in bar
        and "7/7" in bar
    )
    # every third, each evaluation, and the last
    assert [
        json.loads(line)["iteration"] for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ] == [3, 4, 6, 7]


def test_progress_in_a_file_is_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sinks.time, "monotonic", lambda: now[0])
    made = mf.Metrics(
        iteration=0,
        consumed_samples=8,
        loss=2.0,
        grad_norm=0.5,
        lr=0.1,
        weight_decay=0.0,
        count=8,
        skipped=False,
        loss_scale=1.0,
        seconds=0.5,
        tokens_per_second=1000.0,
        report={},
    )
    with mf.progress(60, start=20) as sink:
        for iteration in range(21, 61):
            now[0] += 0.6
            valid = (
                mf.Report(loss=1.0, perplexity=math.e, count=8, report={})
                if iteration == 30
                else None
            )
            sink(attrs.evolve(made, iteration=iteration, valid=valid))
    numbers = "loss 2.0000, lr 1.00e-01, grad norm 0.500, 1,000 tokens/s"
    assert capsys.readouterr() == (
        "",
        f"21/60, 00:00<00:23, {numbers}\n"
        "iteration 30: held-out loss 1.0000, perplexity 2.72\n"
        f"38/60, 00:10<00:13, {numbers}\n"
        f"55/60, 00:21<00:03, {numbers}\n"
        f"60/60, 00:24<00:00, {numbers}\n",
    )


def test_a_number_that_json_lacks_is_null_and_a_second_run_appends(tmp_path):
    made = mf.Metrics(
        iteration=1,
        consumed_samples=8,
        loss=math.nan,
        lr=0.1,
        weight_decay=0.0,
        grad_norm=None,
        count=3,
        skipped=True,
        loss_scale=math.inf,
        seconds=1.0,
        tokens_per_second=2.0,
        report={"z": -math.inf},
    )
    for _ in range(2):
        with mf.jsonl(str(tmp_path / "log.jsonl")) as sink:
            sink(made)
    lines = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 2 and all(
        line["loss"] is line["loss_scale"] is line["report"]["z"] is None for line in lines
    )


# ------------------------------------------------------------------------- custom components


def rows(seed, n):
    """Micro-batches [2, 32] as a Hugging Face collator gives them."""
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 256, (2, 32), generator=draw)} for _ in range(n)]


class Counted:
    """An iterable that knows how often it was begun and how much was read."""

    def __init__(self, items):
        self.items, self.begun, self.read = items, 0, 0

    def __iter__(self):
        self.begun += 1
        for item in self.items:
            self.read += 1
            yield item


def given_batches(made, early):
    """On 2 ranks of data parallel 2: rank 1 has a batch less, where the run is to end early."""
    rank = int(os.environ["RANK"])
    train, valid = (
        Counted(rows(rank, 2 * (5 - rank) + 1 if early else 100)),
        Counted(rows(9 + rank, 3 * 2)),
    )
    seen, end, _, caught = told(made, batches=train, valid_batches=valid)
    return (
        [timeless(m) for m in seen],
        end,
        caught,
        (train.begun, train.read, valid.begun, valid.read),
    )


def test_valid_batches_are_iterated_anew_for_each_evaluation(pool, tmp_path):
    made = config(tmp_path, data=False, eval_interval=3)
    ranks = pool(2, given_batches, made, early=False)
    assert ranks[0][:3] == ranks[1][:3]
    seen, end, caught, _ = ranks[0]
    assert end == (7, 56) and caught == [] and [m.iteration for m in seen if m.valid] == [3, 6, 7]
    assert {m.valid.count for m in seen if m.valid} == {
        2 * 8 * 31
    }  # the last position has no label
    for *_, (begun, read, valid_begun, valid_read) in ranks:
        assert begun == 1 and read == 7 * 2  # nothing is read beyond what is trained on
        assert valid_begun == 3 and valid_read == 3 * 2 * 2


def test_batches_that_end_early_on_one_rank_end_the_run_on_all_with_a_warning(pool, tmp_path):
    for seen, end, caught, _ in pool(2, given_batches, config(tmp_path, data=False), early=True):
        assert end == (4, 32) and len(seen) == 4 and all(m.valid is None for m in seen)
        assert caught == [
            "batches ended at iteration 4 of 7: give more of them, or lower train_iters."
        ]


def built_chunks(made):
    asked = []

    def model(config, pg, **flags):
        asked.append(flags)
        return mf.build_chunk(config, pg, **flags)

    seen, *_ = told(made, model=model)
    return asked, [(m.loss, m.grad_norm) for m in seen]


def test_a_model_function_of_ones_own_builds_each_chunk(pool, tmp_path):
    made = config(
        tmp_path,
        parallel=mf.ParallelConfig(pp=2, vpp=2),
        model=mf.ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, seq_length=32),
    )
    (first, curve), (last, _) = pool(2, built_chunks, made)
    assert first == [
        {"pre_process": i == 0, "post_process": False, "vp_stage": i} for i in range(2)
    ]
    assert last == [{"pre_process": False, "post_process": i == 1, "vp_stage": i} for i in range(2)]
    assert curve == [(m.loss, m.grad_norm) for m in pool(2, told, made)[0][0]]


def by_hand(made):
    """A custom loop: three steps with `train_step`, the rest with `fit`, and `evaluate`."""
    step, seen = mf.step_fn("gpt"), []
    with mf.init_groups(mf.build_groups(made.parallel, mf.world_size())) as pg:
        state = mf.setup(made, pg)
        for batch in mf.batches(made, pg, count=3):
            old = state
            state, metrics = mf.train_step(state, batch, step)
            seen.append(metrics)
            assert (old.iteration, old.consumed_samples) == (
                state.iteration - 1,
                state.consumed_samples - 8,
            )
        state = mf.fit(state, step, on_metrics=[seen.append])
        report = mf.evaluate(state, mf.batches(made, pg, split="valid"), step)
    return list(map(timeless, seen)), report


def test_train_equals_the_same_functions_called_by_hand(pool, tmp_path):
    made = config(tmp_path, parallel=mf.ParallelConfig(tp=2))
    for (seen, report), (whole, *_) in zip(
        pool(2, by_hand, made), pool(2, told, made), strict=True
    ):
        assert seen == list(map(timeless, whole)) and report == whole[-1].valid


# -------------------------------------------------------------------------------- one process


def test_one_plain_process_needs_no_launcher_and_is_left_as_it_was(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    numbers = torch.get_rng_state()
    seen, end, _, caught = told(config(tmp_path, train_iters=None, train_samples=23, eval_iters=0))
    assert end == (2, 16) and caught == []  # 7 samples do not fill a global batch
    assert all(m.valid is None for m in seen) and len(seen) == 2
    assert not dist.is_initialized() and torch.equal(torch.get_rng_state(), numbers)


def test_a_run_neither_reads_nor_writes_transformer_engines_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    monkeypatch.delenv("NVTE_FUSED_ATTN", raising=False)
    before = dict(os.environ)
    told(config(tmp_path, train_iters=3, eval_iters=0))
    assert dict(os.environ) == before


def test_a_batch_in_which_no_token_counts_is_refused_before_the_update(tmp_path):
    made = config(tmp_path, data=False)
    with mf.init_groups(mf.build_groups(made.parallel, 1)) as pg:
        state = mf.setup(made, pg)
        before = [p.clone() for p in state.chunks[0].parameters()]
        nothing = [raw | {"labels": torch.full((2, 32), -100)} for raw in rows(0, 4)]
        with pytest.raises(
            ValueError,
            match="loss_mask: 0 tokens count in this whole global batch.*give at least one",
        ):
            mf.train_step(state, nothing, mf.step_fn("gpt"))
        assert all(map(torch.equal, before, state.chunks[0].parameters()))
        with pytest.raises(ValueError, match="batches: nothing to evaluate on; give"):
            mf.evaluate(state, [], mf.step_fn("gpt"))
        state, metrics = mf.train_step(
            state, rows(0, 4), mf.step_fn("gpt")
        )  # and the state is still good
        assert metrics.iteration == 1 and math.isfinite(metrics.grad_norm)


def test_the_loss_falls_on_real_text(pool):
    made = mf.TrainConfig(
        model=mf.ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=64),
        parallel=mf.ParallelConfig(tp=2),
        schedule=mf.ScheduleConfig(lr=3e-3, warmup_fraction=0.1),
        data=mf.DataConfig(train=mf.demo_text()),
        log=mf.LogConfig(progress=False),
        micro_batch_size=8,
        global_batch_size=16,
        train_iters=40,
        eval_iters=4,
    )
    seen = pool(2, told, made)[0][0]
    assert abs(seen[0].loss - math.log(256)) < 0.3  # untrained: as good as a guess
    assert seen[-1].loss < 3.4 and seen[-1].valid.loss < 3.4


@pytest.mark.parametrize("eval_iters, warned", [(2, False), (10, True)])
def test_a_validation_split_that_is_repeated_is_a_warning(eval_iters, warned, tmp_path):
    made = config(tmp_path, train_iters=3, eval_iters=eval_iters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mf.train(made)
    messages = [w for w in caught if "validation split" in str(w.message)]
    assert len(messages) == warned
    for warning in messages:
        assert warning.filename == __file__
        assert re.search(
            r"eval_iters = 10: the validation split has \d+ samples, that is [\d.]+ global "
            r"batches of 8, so each evaluation repeats them; set eval_iters to \d+ or give",
            str(warning.message),
        )


# -------------------------------------------------------------------------------- the command


def test_the_command_trains_from_a_file_in_a_plain_process(tmp_path):
    mf.dump_config(
        config(tmp_path, log={"jsonl": str(tmp_path / "log.jsonl")}), tmp_path / "config.toml"
    )
    done = run_script(["-m", "megafn", "train", tmp_path / "config.toml"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6, 7] and lines[-1]["valid"][
        "loss"
    ] < lines[0]["loss"]


def test_the_command_checks_a_file_and_draws_its_pipeline(tmp_path, capsys):
    made = config(tmp_path, parallel=mf.ParallelConfig(pp=2))
    mf.dump_config(made, tmp_path / "config.toml")
    assert main(["check", str(tmp_path / "config.toml"), "--world-size", "4"]) == 0
    first, drawn = capsys.readouterr().out.split("\n", 1)
    assert (
        "can run on 4 processes: tp 1 x pp 2 x cp 1 x dp 2, 7 iterations of 2 micro-batches of 2"
        in first
    )
    assert drawn == mf.draw_pipeline(2, 1, 2) + "\n"
    assert main(["check", str(tmp_path / "config.toml"), "--world-size", "3"]) == 1
    first, *told = capsys.readouterr().out.splitlines()
    assert "cannot run on 3 processes" in first and told == [
        f"  {problem}" for problem in mf.validate(made, 3)
    ]


def test_the_command_makes_indexed_data_that_can_be_trained_on(tmp_path, capsys):
    made = config(tmp_path)
    assert main(["data", made.data.train, str(tmp_path / "indexed" / "a"), "--split", "3,1,0"]) == 0
    prefixes = capsys.readouterr().out.split()
    assert prefixes == [str(tmp_path / "indexed" / f"a_{part}") for part in ("train", "valid")]
    again = ["data", made.data.train, str(tmp_path / "indexed" / "a"), "--split", "1,0,0"]
    assert main(again) == 2
    assert f"{prefixes[0]}.idx exists already; name another" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0
    assert capsys.readouterr().out.split() == prefixes[:1]
    assert main([*again, "--split", "3,1,0", "--overwrite"]) == 0
    seen, *_ = told(attrs.evolve(made, data=mf.DataConfig(train=prefixes[0], valid=prefixes[1])))
    assert len(seen) == 7 and seen[-1].valid.count == 2 * 8 * 32


def test_the_command_loads_no_torch_to_check(tmp_path):
    mf.dump_config(config(tmp_path), tmp_path / "config.toml")
    done = run_script(
        [
            "-c",
            "import sys; from megafn.__main__ import main; "
            f"code = main(['check', {str(tmp_path / 'config.toml')!r}, '--world-size', '2']); "
            "sys.exit(code or 'torch' in sys.modules)",
        ]
    )
    assert (done.returncode, done.stderr) == (0, "")
