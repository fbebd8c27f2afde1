"""Configs go through dicts and TOML unchanged; all that is wrong in a file is reported by field."""

import os
import re

import attrs
import pytest
from hypothesis import given

from config_values import CONFIGS
from megafn.pure.config import serialization
from megafn.pure.config.field_types import all_fields, has_type
from megafn.pure.config.problems import ConfigError, Problem, did_you_mean
from megafn.pure.config.records import (
    DataConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    RopeScaling,
    ScheduleConfig,
    TrainConfig,
)
from megafn.pure.config.serialization import dump_config, from_dict, load_config, to_dict

MODEL = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32}
RUN = {"model": MODEL, "micro_batch_size": 1, "global_batch_size": 8, "train_iters": 10}


@given(CONFIGS)
def test_a_config_is_its_dict_and_back(config):
    assert from_dict(to_dict(config)) == config


@given(CONFIGS)
def test_a_config_is_its_toml_and_back(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "config.toml"
    dump_config(config, path)
    assert load_config(path) == config
    assert os.listdir(path.parent).count(path.name) == 1 and not list(
        path.parent.glob(".config.toml*")
    )


@given(CONFIGS)
def test_every_generated_value_fits_its_field(config):
    assert [path for path, value, kind in all_fields(config) if not has_type(value, kind)] == []


def test_a_dict_is_plain_and_without_none():
    config = from_dict({**RUN, "data": {"train": [[3, "a"], [0.5, "b"]], "split": [1, 0, 0]}})
    assert config.data.train == ((3, "a"), (0.5, "b")) and config.data.split == (1.0, 0.0, 0.0)
    assert to_dict(config)["data"] == {
        **to_dict(DataConfig(train="x")),
        "train": [[3, "a"], [0.5, "b"]],
        "split": [1, 0, 0],
    }
    assert "kv_channels" not in to_dict(config)["model"] and "train_samples" not in to_dict(config)


def test_a_record_in_a_section_is_a_table_of_its_own(tmp_path):
    scaling = RopeScaling(factor=8.0)
    config = from_dict({**RUN, "model": {**MODEL, "rope_scaling": {"factor": 8}}})
    assert config.model.rope_scaling == scaling
    dump_config(config, tmp_path / "config.toml")
    assert "[model.rope_scaling]\nfactor = 8" in (tmp_path / "config.toml").read_text()
    with pytest.raises(
        ConfigError, match=r'model.rope_scaling.factr = 8: .* did you mean "factor"'
    ):
        from_dict({**RUN, "model": {**MODEL, "rope_scaling": {"factr": 8}}})


@pytest.mark.parametrize("train", ["a.txt", ["a", "b"], [[0.3, "a"], [1, "b"]], []])
def test_every_form_of_a_source_is_read(train):
    assert from_dict({"train": train}, DataConfig).train == serialization._tuples_for_lists(train)


@pytest.mark.parametrize(
    "mapping, cls, path, told",
    [
        ({"tp": "3"}, ParallelConfig, "tp", "= '3': give an integer"),
        ({"tp": True}, ParallelConfig, "tp", "= True: give an integer"),
        ({"tp": 2.0}, ParallelConfig, "tp", "= 2.0: give an integer"),
        ({"tp": None}, ParallelConfig, "tp", "= None: give an integer"),
        ({"tp": [1]}, ParallelConfig, "tp", "= [1]: give an integer"),
        ({"tp": 2**63}, ParallelConfig, "tp", "= 9223372036854775808: give an integer"),
        ({"order": 3}, ParallelConfig, "order", "= 3: give a string"),
        ({"sequence_parallel": 1}, ParallelConfig, "sequence_parallel", "= 1: give true or false"),
        ({"lr": "1e-3"}, ScheduleConfig, "lr", "= '1e-3': give a number"),
        ({"lr": False}, ScheduleConfig, "lr", "= False: give a number"),
        (
            {"warmup_iters": 0.5},
            ScheduleConfig,
            "warmup_iters",
            "= 0.5: give an integer, or leave it out",
        ),
        (
            {"train": [0.3, "a"]},
            DataConfig,
            "train",
            "= [0.3, 'a']: give a string or an array (tuple) of strings or an array (tuple) "
            "of [number, string] pairs",
        ),
        ({"train": [["a", 0.3]]}, DataConfig, "train", "= [['a', 0.3]]: give a string"),
        ({"train": [[0.3, "a", "b"]]}, DataConfig, "train", "= [[0.3, 'a', 'b']]: give a string"),
        (
            {"train": "a", "split": "abc"},
            DataConfig,
            "split",
            "= 'abc': give an array (tuple) of numbers",
        ),
        ({**RUN, "parallel": 7}, TrainConfig, "parallel", "= 7: give a table (ParallelConfig)"),
        ({**RUN, "data": "a.txt"}, TrainConfig, "data", "= 'a.txt': give a table (DataConfig)"),
        (
            {**RUN, "model": {**MODEL, "seq_length": "x"}},
            TrainConfig,
            "model.seq_length",
            "= 'x': give an integer",
        ),
        (
            {**RUN, "parallel": {"sequence_paralel": True}},
            TrainConfig,
            "parallel.sequence_paralel",
            '= True: there is no such field; did you mean "sequence_parallel"?',
        ),
        (
            {**RUN, "tp": 2},
            TrainConfig,
            "tp",
            '= 2: there is no such field; did you mean "parallel.tp"?',
        ),
        (
            {**RUN, "log": {"zzz": 1}},
            TrainConfig,
            "log.zzz",
            "= 1: there is no such field; choose one of progress, tensorboard_dir, jsonl, interval",
        ),
        (
            {**RUN, "parallel": {"dp": 2}},
            TrainConfig,
            "parallel.dp",
            "= 2: there is no such field; data parallelism follows from the number of processes: "
            "world_size / (tp * pp * cp)",
        ),
        (
            {**RUN, 3: 4},
            TrainConfig,
            "3",
            "= 4: there is no such field; docs/configuration.md lists the 23 fields",
        ),
        (
            {name: value for name, value in RUN.items() if name != "micro_batch_size"},
            TrainConfig,
            "micro_batch_size",
            "is missing: give an integer",
        ),
        (
            {**RUN, "model": {"num_layers": 1, "hidden_size": 8, "seq_length": 8}},
            TrainConfig,
            "model.num_attention_heads",
            "is missing",
        ),
        ("tp = 2", ParallelConfig, "config", "= 'tp = 2': give a table (ParallelConfig)"),
    ],
)
def test_one_wrong_thing_is_one_sentence_with_field_value_and_remedy(mapping, cls, path, told):
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{path} {told}')}.*$") as raised:
        from_dict(mapping, cls)
    assert "\n" not in str(raised.value)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as raised:
        from_dict(
            {
                "model": {"num_layers": "4", "seq_length": 1.5, "hiden_size": 64},
                "parallel": {"tp": True, "pq": 1},
                "micro_batch_size": 1,
            }
        )
    told = [line.split()[0] for line in str(raised.value).splitlines()]
    assert told == [
        "7",
        "model.num_layers",
        "model.num_attention_heads",
        "model.seq_length",
        "model.hiden_size",
        "parallel.tp",
        "parallel.pq",
        "global_batch_size",
    ]


def test_a_number_without_fraction_will_do_for_a_float():
    assert from_dict({"lr": 3}, ScheduleConfig).lr == 3.0


def test_the_nearest_name_heeds_no_case_and_is_not_far_fetched():
    assert (
        did_you_mean("Tp", ["tp", "pp"]) == '; did you mean "tp"?'
        and did_you_mean("relu", ["RELU"]) == '; did you mean "RELU"?'
    )
    assert did_you_mean("zebra", ["tp", "pp"]) == ""


@pytest.mark.parametrize(
    "value, told",
    [
        (len, "a function"),
        (object(), "a value of type object"),
        ("\ud800", "a string that is not Unicode"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_by_field(value, told):
    config = attrs.evolve(from_dict(RUN), log=LogConfig(jsonl=value))
    with pytest.raises(
        ConfigError, match=rf"^log\.jsonl = .*: {told} cannot be written to a file; leave it out"
    ):
        to_dict(config)


def test_a_dump_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path, config = tmp_path / "config.toml", from_dict(RUN)
    dump_config(config, path)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        dump_config(attrs.evolve(config, seed=1), path)
    assert load_config(path) == config and os.listdir(tmp_path) == ["config.toml"]


@pytest.mark.parametrize(
    "content, told",
    [
        (None, "cannot be read (No such file or directory)"),
        (b"seed = ", "is not valid TOML ("),
        (b"\xff", "is not valid TOML ('utf-8' codec"),
        (b"a = " + b"[" * 100_000, "is not valid TOML ("),
        (b"seed = '1'", "4 problems:\n  model is missing: give a table (ModelConfig)\n"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, told):
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert str(raised.value).startswith(f"{path}: {told}"), raised.value


def test_a_problem_reads_as_field_value_remedy():
    assert str(Problem("parallel.order", "tp", "name all")) == "parallel.order = 'tp': name all"
    assert str(Problem("seed", 10**5000, "give less")) == "seed = <int>: give less"
    assert len(str(Problem("seed", "x" * 5000, "give less"))) < 150


def test_a_model_config_says_what_follows_from_the_rest():
    model = ModelConfig(**MODEL)
    assert (
        model.ffn_size,
        model.head_size,
        model.query_groups,
        model.position_rows,
        model.gated,
    ) == (256, 16, 4, 32, False)
    model = ModelConfig(
        **MODEL,
        ffn_hidden_size=7,
        kv_channels=5,
        num_query_groups=2,
        max_position_embeddings=99,
        activation="swiglu",
    )
    assert (
        model.ffn_size,
        model.head_size,
        model.query_groups,
        model.position_rows,
        model.gated,
    ) == (7, 5, 2, 99, True)
