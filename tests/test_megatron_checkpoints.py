"""Megatron's checkpoints: read into every layout, refused if bad, and nothing in them runs."""

import io
import os
import pickle
import re
import shutil
import subprocess
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import attrs
import pytest
import torch

import megafn as mf
from equivalence import tiny
from megafn.pure.pretrained.compatibility import changed_reach, model_problems
from megafn.pure.pretrained.megatron_model import model_of_arguments
from megafn.runtime.checkpoint.state_boxes import state_boxes
from megafn.runtime.pretrained import megatron_source, torch_dist
from megafn.runtime.pretrained.formats import find_weights
from megafn.runtime.pretrained.torch_archive import copy_part, open_files, read_archive
from megatron_writers import (
    TOKENS,
    legacy_bert,
    legacy_t5,
    weights_of,
    write,
    write_legacy,
)
from single_steps import TOLERANCE

GPT2 = dict(activation="gelu_tanh")
LLAMA = dict(
    position_embedding="rope",
    activation="swiglu",
    normalization="RMSNorm",
    num_query_groups=2,
    ffn_hidden_size=48,
    add_bias_linear=False,
    tie_word_embeddings=False,
)
BERT = dict(family="bert", num_tokentypes=2, bert_binary_head=True)
T5 = dict(family="t5")

ONE = dict()
FOUR = dict(tp=2, pp=2)
INTERLEAVED = dict(tp=2, pp=2, vpp=2)


@pytest.fixture(scope="module")
def written(pool, tmp_path_factory):
    """A folder of checkpoints, and the logits that megatron-core's own models give."""
    folder = tmp_path_factory.mktemp("megatron")
    models = {"gpt2": GPT2, "llama": LLAMA, "bert": BERT, "t5": T5}
    of_one = {name: tiny(**fields) for name, fields in models.items()}
    (logits,) = pool(1, write, of_one, folder)
    of_four = {
        "gpt2-vpp": tiny(**GPT2, **INTERLEAVED),
        "gpt2-four": tiny(**GPT2, **FOUR),
        "llama-four": tiny(**LLAMA, **FOUR),
    }
    pool(4, write, of_four, folder)
    write_legacy(tiny(**BERT, **FOUR), legacy_bert, folder / "bert-legacy")
    write_legacy(tiny(**T5, **FOUR), legacy_t5, folder / "t5-legacy")
    return folder, logits


def of(model):
    """Where the checkpoints of a model lie."""
    if model in ("bert", "t5"):
        return [f"{model}/torch_dist", f"{model}/mp_rank", f"{model}-legacy"]
    names = [model, f"{model}-four"] + (["gpt2-vpp"] if model == "gpt2" else [])
    return [f"{name}/{kind}" for name in names for kind in ("torch_dist", "mp_rank")]


# --------------------------------------------------------------------------------------- reading


def groups_of(config):
    return mf.build_groups(config.parallel, mf.world_size(), model=config.model)


def read(cases, folder):
    """[(path, whether all weights are right, logits, bytes read, bytes of this rank's parts)]."""
    results = []
    for model, changes in cases:
        config = tiny(**changes)
        expected = weights_of(config.model)
        with mf.init_groups(groups_of(config)) as pg:
            state = mf.setup(config, pg)
            for path in of(model):
                counted = []

                def copy(files, tensor, box, counted=counted):
                    part = copy_part(files, tensor, box)
                    counted.append(part.nbytes)
                    return part

                with mock.patch.object(megatron_source, "copy_part", copy):
                    state = mf.from_pretrained(state, Path(folder, path))
                whole = mf.whole_parameters(state.chunks, config.model, pg)
                right = all(torch.equal(whole[name], expected[name]) for name in whole)
                logits = None if model in ("bert", "t5") else mf.logits(state, TOKENS)
                results.append((path, right, logits, sum(counted), own_bytes(state)))
    return results


def own_bytes(state):
    """Of this rank's parameters, without rows that pad the vocabulary."""
    boxes = {}
    for box in state_boxes(state):
        if box.tensor.startswith("parameter/"):
            boxes[box.tensor, box.box] = box.view.nbytes
    return sum(boxes.values())


SEQUENCE_PARALLEL = FOUR | dict(sequence_parallel=True)


@pytest.mark.parametrize(
    "processes, gpt2, llama, bert, t5",
    [
        (1, ONE, ONE, ONE, ONE),
        (4, dict(pp=2, vpp=2), SEQUENCE_PARALLEL, dict(tp=4), SEQUENCE_PARALLEL),
    ],
    ids=["one process", "four processes"],
)
def test_checkpoints_of_megatron_are_read_into_every_layout(
    processes, gpt2, llama, bert, t5, pool, written
):
    folder, logits = written
    cases = [
        ("gpt2", GPT2 | gpt2),
        ("llama", LLAMA | llama),
        ("bert", BERT | bert),
        ("t5", T5 | t5),
    ]
    for rank in pool(processes, read, cases, folder):
        for path, right, found, bytes_read, bytes_of_own_parts in rank:
            assert right, path
            assert bytes_read == bytes_of_own_parts, path
            if found is not None:
                expected = logits[path.partition("/")[0].partition("-")[0]][..., :97]
                apart = (found - expected).abs().max() / expected.abs().max()
                assert apart < TOLERANCE, (path, apart)


# ---------------------------------------------------------------------------------------- refusing


def refusals(cases, folder):
    """What `from_pretrained` raises for (config, path)."""
    found = []
    for config, path in cases:
        with mf.init_groups(groups_of(config), timeout_seconds=20) as pg:
            state = mf.setup(config, pg)
            try:
                mf.from_pretrained(state, Path(folder, path))
            except (mf.ConfigError, mf.CheckpointError) as error:
                found.append(str(error))
            else:
                found.append(f"nothing was raised for {path}")
    return found


def damaged(folder):
    """{message: (fields of the config, path)} of checkpoints that are made bad here."""
    cases = {}

    def bad(name, message, source="llama/torch_dist", fields=LLAMA):
        copy = folder / f"bad-{name}"
        shutil.copytree(folder / source, copy)
        cases[message] = (fields, copy.name)
        return copy / "iter_0000007" if source.endswith("torch_dist") else copy

    def change(file, **changes):
        content = torch.load(file, weights_only=False)
        torch.save(content | changes, file)

    place = bad("no-metadata", r"\.metadata is missing; copy the whole checkpoint again")
    (place / ".metadata").unlink()
    place = bad("short-metadata", r"\.metadata is damaged: it does not describe tensors")
    os.truncate(place / ".metadata", 500)
    place = bad("no-data", r"__0_0\.distcp is missing; copy the whole checkpoint again")
    (place / "__0_0.distcp").unlink()
    place = bad("short-data", r"__0_0\.distcp is damaged: it has 9000 bytes, and should have \d+")
    os.truncate(place / "__0_0.distcp", 9000)
    place = bad("zeros", r"__0_0\.distcp is damaged: it is not a file of torch\.save")
    size = (place / "__0_0.distcp").stat().st_size
    (place / "__0_0.distcp").write_bytes(bytes(size))
    place = bad("zarr", r"sharded_backend = 'zarr': only torch_dist is read")
    (place / "metadata.json").write_text('{"sharded_backend": "zarr"}')

    place = bad("short", r"model_optim_rng\.pt is damaged", "llama/mp_rank")
    os.truncate(place / "mp_rank_00" / "model_optim_rng.pt", 9000)
    place = bad("old", r"checkpoint_version = 2\.0: must be 3 or more", "llama/mp_rank")
    change(place / "mp_rank_00" / "model_optim_rng.pt", checkpoint_version=2.0)
    place = bad("one-less", r"mp_rank_01_001/model_optim_rng\.pt is missing", "llama-four/mp_rank")
    shutil.rmtree(place / "mp_rank_01_001")
    place = bad("nan", r"embedding\.word_embeddings\.weight holds NaN", "llama/mp_rank")
    content = torch.load(place / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    content["model"]["embedding.word_embeddings.weight"][3, 4] = torch.nan
    torch.save(content, place / "mp_rank_00" / "model_optim_rng.pt")

    both = ("llama/torch_dist", "llama-four/mp_rank")
    for path in both:
        cases |= {
            rf"model\.hidden_size = 64: the weights at .*{path}": (
                LLAMA | dict(hidden_size=64),
                path,
            ),
            rf"model\.num_layers = 2: the weights at .*{path}": (LLAMA | dict(num_layers=2), path),
            rf"model\.vocab_size = 130: the weights at .*{path}": (
                LLAMA | dict(vocab_size=130),
                path,
            ),
            rf"model\.activation = 'geglu': the weights at .*{path}": (
                LLAMA | dict(activation="geglu"),
                path,
            ),
        }
    cases[r"no place for 1 of the stored tensors \(output_layer\.weight\)"] = (
        LLAMA | dict(tie_word_embeddings=True),
        "llama/torch_dist",
    )
    cases[r"model\.family = 'gpt': the weights at .*bert"] = (GPT2, "bert-legacy")
    return cases


def test_a_bad_checkpoint_of_megatron_is_refused_in_one_sentence_on_every_rank(pool, written):
    folder, _ = written
    cases = damaged(folder)
    configs = [(tiny(**fields, pp=2), path) for fields, path in cases.values()]
    first, second = pool(2, refusals, configs, folder)
    assert first == second
    for message, found in zip(cases, first, strict=True):
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(found)
        assert "\n" not in found or "problems:" in found


def test_a_model_that_megafn_lacks_is_refused_by_its_argument(written):
    folder, _ = written
    shutil.copytree(folder / "llama" / "mp_rank", folder / "experts")
    file = folder / "experts" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["args"].num_experts = 8
    torch.save(content, file)
    place = find_weights(folder / "experts")
    with (
        pytest.raises(mf.ConfigError, match="num_experts = 8: the model of the weights at"),
        place.format.open(place.path, None),
    ):
        pass


@pytest.mark.parametrize(
    "name, shape, box, message",
    [
        ("decoder.layers.mlp.linear_fc1.bias", (2, 4), ((1, 0), (2, 4)), r"\[2, 4\] at \[1, 0\]"),
        ("output_layer.bias", (4,), ((0, 0), (1, 4)), r"\[4\], and a part of the shape \[1, 4\]"),
        ("decoder.layers.mlp.linear_fc1.bias", (), ((), ()), r"its shape \[\] does not count them"),
    ],
)
def test_metadata_whose_shapes_disagree_are_damaged(name, shape, box, message, tmp_path):
    chunk = torch_dist.Chunk(box=box, file=tmp_path, start=0, end=8)
    tensor = torch_dist.ChunkedTensor(shape=shape, dtype=torch.float32, chunks=[chunk])
    with pytest.raises(mf.CheckpointError, match=message):
        torch_dist._check_shapes(name, tensor, tmp_path / ".metadata")


def test_a_bias_that_is_one_number_is_of_another_shape(tmp_path):
    bias = megatron_source.PiecewiseTensor(shape=(), pieces=(), file="there")
    with open_files() as files:
        weights = megatron_source.MegatronWeights(
            path=tmp_path,
            files=files,
            tensors={"output_layer.bias": bias},
            arguments={},
            family="bert",
            expected=frozenset(),
        )
        with pytest.raises(mf.CheckpointError, match=r"output_layer.bias: the model has it in sh"):
            megatron_source._made_of(weights, "output_layer.bias", (97,))


@pytest.mark.parametrize(
    "name, value, more",
    [
        ("softmax_type", "learnable", {}),
        ("window_size", (16, 16), {}),
        ("window_size", (-1, -1), {}),
        ("window_size", "16", {}),
        ("window_attn_skip_freq", 2, {"window_size": (16, 0)}),
    ],
)
def test_attention_that_megafn_lacks_is_refused_by_its_argument(name, value, more):
    with pytest.raises(mf.ConfigError, match=f"^{name} = {re.escape(repr(value))}: the model of"):
        model_of_arguments({name: value, **more}, {"family": "gpt"}, None, "base")


def test_arguments_of_the_reach_are_translated_and_a_config_may_choose_others():
    model = tiny(position_embedding="rope", rotary_base=7.0).model
    arguments = {"rotary_base": 10_000, "use_rope_scaling": True, "window_size": [15, 0]}
    described = model_of_arguments(arguments, {"family": "gpt", "num_layers": 4}, model, "base")
    assert described.rope_scaling == mf.RopeScaling(factor=8.0)
    assert described.sliding_window == 16
    assert model_problems(described, model, "base") == ()
    assert sorted(line.partition(",")[0] for line in changed_reach(described, model)) == [
        "model.rope_scaling = None",
        "model.rotary_base = 7.0",
        "model.sliding_window = None",
    ]


# ------------------------------------------------------------------------------------------ attacks


@attrs.frozen
class Attack:
    """Pickled, it calls a function of the attacker's choice when it is read."""

    function: object
    arguments: tuple

    def __reduce__(self):
        return self.function, self.arguments


def attacks(marker):
    command = f"touch {marker}"
    return [
        Attack(os.system, (command,)),
        Attack(exec, (f"import os; os.system({command!r})",)),
        Attack(subprocess.check_call, (["touch", str(marker)],)),
    ]


def read_all(path):
    """Reads every tensor of a checkpoint."""
    place = find_weights(path)
    with place.format.open(place.path, tiny(**LLAMA).model) as source:
        assert source.damage(0, 1) == []
        for name, whole in weights_of(tiny(**LLAMA).model).items():
            shape = tuple(whole.shape)
            if source.made_of(name, shape):
                target = torch.empty(shape)
                source.copy(name, shape, (tuple(0 for _ in shape), shape), target)
                assert torch.equal(target, whole)
        source.remember()


@pytest.mark.parametrize("kind", range(3), ids=["system", "exec", "subprocess"])
def test_nothing_that_stands_in_a_checkpoint_is_executed(kind, written, tmp_path):
    folder, _ = written
    marker = tmp_path / "executed"
    attack = attacks(marker)[kind]

    metadata = tmp_path / "metadata" / "iter_0000007"
    shutil.copytree(folder / "llama/torch_dist/iter_0000007", metadata)
    content = pickle.loads((metadata / ".metadata").read_bytes())
    content.planner_data = attack
    (metadata / ".metadata").write_bytes(pickle.dumps(content))
    common = tmp_path / "common" / "iter_0000007"
    shutil.copytree(folder / "llama/torch_dist/iter_0000007", common)
    torch.save({"args": attack, "checkpoint_version": 3.0}, common / "common.pt")
    beside = tmp_path / "beside"
    shutil.copytree(folder / "llama/mp_rank", beside)
    file = beside / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    torch.save({"attack": attack, **content, "rng_state": [attack]}, file)
    for place in (metadata, common, beside):
        read_all(place)

    # in the place of what is read
    name = "output_layer.weight"
    instead = tmp_path / "instead"
    shutil.copytree(folder / "llama/mp_rank", instead)
    file = instead / "mp_rank_00" / "model_optim_rng.pt"
    torch.save(content | {"model": content["model"] | {name: attack}}, file)
    read_all(instead)  # an output layer that is not stored is new
    data = tmp_path / "data" / "iter_0000007"
    shutil.copytree(folder / "llama/torch_dist/iter_0000007", data)
    plant(data, name, attack)
    with pytest.raises(AssertionError, match="no tensor of shape"):
        read_all(data)
    whole = tmp_path / "whole" / "iter_0000007"
    shutil.copytree(folder / "llama/torch_dist/iter_0000007", whole)
    (whole / ".metadata").write_bytes(pickle.dumps(attack))
    with pytest.raises(mf.CheckpointError, match="does not describe tensors"):
        read_all(whole)

    assert not marker.exists()
    pickle.loads((whole / ".metadata").read_bytes())  # it would have been
    assert marker.exists()


def plant(folder, name, attack):
    """Puts an attack where .metadata places a tensor."""
    written = io.BytesIO()
    torch.save(attack, written)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == name]
    file = folder / info.relative_path
    info.offset = file.stat().st_size
    info.length = len(written.getvalue())
    file.write_bytes(file.read_bytes() + written.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_file_outside_of_the_checkpoint_is_not_read(written, tmp_path):
    folder, _ = written
    copy = tmp_path / "iter_0000007"
    shutil.copytree(folder / "llama/torch_dist/iter_0000007", copy)
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        mf.CheckpointError, match=r"damaged: '\.\./__0_0\.distcp' is not a file name"
    ):
        read_all(copy)


@attrs.frozen
class Redirected:
    """A tensor whose pickle says afterwards that it lies in another file."""

    tensor: torch.Tensor
    path: str

    def __reduce__(self):
        arguments = (self.tensor._typed_storage(), 0, (4,), (1,), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments, (self.path, 0, torch.float32, (4,), (1,))


def test_a_pickle_cannot_place_a_tensor_in_another_file(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"what others wrote")
    file = tmp_path / "tensor.pt"
    torch.save({"weight": Redirected(torch.ones(4), str(elsewhere))}, file)
    with (
        open_files() as files,
        pytest.raises(
            mf.CheckpointError, match=r"tensor\.pt is damaged: it is not a file of torch"
        ),
    ):
        read_archive(files, file)
