"""No global state: layouts are values, several live in one process, and leaving one leaves nothing
behind."""

import ast
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megafn as mf
from equivalence import local_parts, run_layout, share, tiny, uneven
from t5_rows import T5, pairs

PACKAGE = Path(mf.__file__).parent


def left_behind():
    """What a layout could leave in a process: groups, random states, replaced functions, modes."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    tracker = random._CUDA_RNG_STATE_TRACKER
    groups = torch.distributed.distributed_c10d._world.pg_map
    return (
        torch.distributed.is_initialized(),
        len(groups),
        bytes(torch.get_rng_state().numpy()),
        tracker,
        parallel_state._GLOBAL_MEMORY_BUFFER,
        parallel_state.model_parallel_is_initialized(),
        torch.cuda.current_device,
        torch.cuda.get_rng_state,
        torch._C._len_torch_function_stack(),
    )


def steps(config, pg, state, count):
    curve = []
    for iteration in range(count):
        state, metrics = mf.train_step(
            state, share(uneven(config, iteration), config, pg), mf.step_fn("gpt")
        )
        curve.append((metrics.loss, metrics.grad_norm))
    return state, curve


def train_and_leave(config):
    before = left_behind()
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        inside = left_behind()
        state, _ = steps(config, pg, mf.setup(config, pg), 2)
        mf.evaluate(state, [share(uneven(config, 9), config, pg)], mf.step_fn("gpt"))
        mf.logits(state, torch.zeros(1, 8, dtype=torch.long))
        assert left_behind() == inside, "a step left something"
    assert left_behind() == before, "the layout left something"
    with pytest.raises(KeyError):
        with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())):
            raise KeyError
    assert left_behind() == before, "a layout that ended in an exception left something"
    return True


@pytest.mark.parametrize(
    "n, layout",
    [
        (1, {}),
        (2, dict(tp=2, sequence_parallel=True)),
        (2, dict(pp=2)),
        (4, dict(tp=2, use_distributed_optimizer=True)),
    ],
)
def test_leaving_a_layout_leaves_nothing_behind(pool, n, layout):
    assert all(pool(n, train_and_leave, tiny(hidden_dropout=0.1, **layout)))


def models_alive(config, rows):
    """How many wrapped models this process holds, behind each of three runs of a layout."""
    from megatron.core.distributed import DistributedDataParallel

    found = []
    for _ in range(3):
        run_layout(config, rows)
        gc.collect()
        found.append(sum(type(one) is DistributedDataParallel for one in gc.get_objects()))
    return found


@pytest.mark.parametrize(
    "n, layout, rows",
    [
        (1, {}, uneven),
        (2, dict(tp=2, sequence_parallel=True), uneven),
        (2, dict(pp=2, vpp=2), uneven),
        (2, dict(use_distributed_optimizer=True), uneven),
        (2, dict(use_distributed_optimizer=True, dtype="bf16"), uneven),
        (4, T5 | dict(pp=2, use_distributed_optimizer=True), pairs),
    ],
    ids=["single", "tp2-sp", "pp2-vpp2", "dp2-dist", "dp2-dist-bf16", "t5-pp2-dp2-dist"],
)
def test_a_model_is_freed_when_nobody_holds_it(n, layout, rows, pool):
    """A cycle through autograd's nodes would be out of the garbage collector's sight: model,
    buffers and the threads of its groups would stay."""
    for first, *others in pool(
        n, models_alive, tiny(**layout | dict(steps=3 if "family" in layout else 4)), rows
    ):
        assert others == [first] * 2


def niceness():
    """Of every thread of this process while groups are open: name and niceness; and of the main one
    behind it."""
    with mf.init_groups(mf.build_groups(mf.ParallelConfig(), mf.world_size())):
        threads = [
            (name.read_text().strip(), os.getpriority(os.PRIO_PROCESS, int(name.parent.name)))
            for name in Path("/proc/self/task").glob("*/comm")
        ]
    return threads, os.getpriority(os.PRIO_PROCESS, 0)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux's /proc")
def test_only_gloo_s_watching_threads_are_held_back(pool):
    for threads, own in pool(2, niceness):
        if not any(name == "gloo_tcp_loop" for name, _ in threads):
            pytest.skip("this torch gives gloo's threads no names")
        assert {nice for name, nice in threads if name == "gloo_tcp_loop"} == {19}
        assert {nice for name, nice in threads if name != "gloo_tcp_loop"} == {own} and own < 19


def alone(config):
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        return (
            *steps(config, pg, mf.setup(config, pg), 4)[1:],
            [],
            local_parts(mf.setup(config, pg)),
        )


def side_by_side(*configs):
    """The same layouts open at once, their steps interleaved."""
    import contextlib

    with contextlib.ExitStack() as stack:
        groups = [
            stack.enter_context(mf.init_groups(mf.build_groups(config.parallel, mf.world_size())))
            for config in configs
        ]
        states = [mf.setup(config, pg) for config, pg in zip(configs, groups, strict=True)]
        curves = [[] for _ in configs]
        for iteration in range(4):
            for i, (config, pg) in enumerate(zip(configs, groups, strict=True)):
                states[i], metrics = mf.train_step(
                    states[i], share(uneven(config, iteration), config, pg), mf.step_fn("gpt")
                )
                curves[i].append((metrics.loss, metrics.grad_norm))
    return curves


def test_two_layouts_open_at_once_give_to_the_bit_what_each_gives_alone(pool):
    """With dropout: their random states don't meet."""
    student = tiny(tp=2, hidden_dropout=0.1, attention_dropout=0.1)
    teacher = tiny(pp=2, hidden_dropout=0.1, attention_dropout=0.1)
    together = pool(2, side_by_side, student, teacher)
    for i, config in enumerate((student, teacher)):
        for rank, (curve, *_) in enumerate(pool(2, alone, config)):
            assert together[rank][i] == curve


def group_without(config):
    from megatron.core.tensor_parallel import RowParallelLinear

    from megafn.runtime.model.layers import check_parallel_layers

    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.setup(config, pg)
        layer = next(m for m in state.chunks[0].modules() if isinstance(m, RowParallelLinear))
        layer.tp_group = pg.dp
        check_parallel_layers(state.chunks[0], pg)


def test_a_parallel_layer_without_its_group_is_named(pool):
    with pytest.raises(Exception, match="layers without the tensor-parallel group.*linear_proj"):
        pool(2, group_without, tiny(tp=2))


def test_importing_megafn_brings_no_torch():
    code = (
        "import sys, megafn; megafn.TrainConfig; megafn.validate; megafn.draw_pipeline; "
        "megafn.make_schedule; print('torch' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=60
    )
    assert ran.stdout == "False\n", ran.stderr


def imports(path):
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_what_is_pure_imports_nothing_that_is_not():
    for path in (PACKAGE / "pure").rglob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] not in ("torch", "megatron", "transformers"), (
                f"{path.name} imports {name}"
            )
            assert not name.startswith("megafn") or name.startswith("megafn.pure"), (
                f"{path.name} imports {name}"
            )


def test_imports_run_one_way():
    """A module imports only modules that do not, through any chain, import it."""
    files = {
        f"megafn.{path.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')}": path
        for folder in ("pure", "runtime")
        for path in (PACKAGE / folder).rglob("*.py")
        if path.stem != "__init__"
    }
    graph = {
        name: {other for other in imports(path) if other in files} for name, path in files.items()
    }

    def reached(name, seen):
        for other in graph[name] - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    def folder_of(name):
        return name.rpartition(".")[0]

    assert len(graph) > 15 and graph["megafn.runtime.training.train"]
    for name in graph:
        assert name not in reached(name, set()), f"{name} imports itself in a circle"
    folders = {folder_of(name): set() for name in files}
    for name, others in graph.items():
        folders[folder_of(name)] |= {folder_of(other) for other in others} - {folder_of(name)}
    graph = folders
    for name in folders:
        assert name not in reached(name, set()), f"the folder {name} imports itself in a circle"


def test_no_class_derives_from_another_of_ours():
    """What differs is a function in a record. Base classes are torch's, megatron-core's or
    Python's."""
    classes = [
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    names = {node.name for node in classes}
    assert {"Chunk", "TrainConfig"} <= names
    derived = {
        node.name: ast.unparse(base)
        for node in classes
        for base in node.bases
        if ast.unparse(base).rpartition(".")[2] in names
    }
    assert derived == {}
