"""No global state: layouts are values, several live in one process, and leaving one leaves nothing behind."""
import ast
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch
from equivalence import local_parts, share, tiny, uneven

import megafn as mf

PACKAGE = Path(mf.__file__).parent


def left_behind():
    """What a layout could leave in a process: groups, random states, replaced functions, modes."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    tracker = random._CUDA_RNG_STATE_TRACKER
    groups = torch.distributed.distributed_c10d._world.pg_map
    return (torch.distributed.is_initialized(), len(groups), bytes(torch.get_rng_state().numpy()), tracker,
            parallel_state._GLOBAL_MEMORY_BUFFER, parallel_state.model_parallel_is_initialized(),
            torch.cuda.current_device, torch.cuda.get_rng_state, torch._C._len_torch_function_stack())


def steps(config, pg, state, count):
    curve = []
    for iteration in range(count):
        state, metrics = mf.train_step(state, share(uneven(config, iteration), config, pg), mf.step_fn("gpt"))
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


@pytest.mark.parametrize("n, layout", [(1, {}), (2, dict(tp=2, sequence_parallel=True)), (2, dict(pp=2)), (4, dict(tp=2, use_distributed_optimizer=True))])
def test_leaving_a_layout_leaves_nothing_behind(pool, n, layout):
    assert all(pool(n, train_and_leave, tiny(hidden_dropout=0.1, **layout)))


def leave_out_of_order(config, other, users_own):
    """Three layouts of which the first opened is left first; `users_own`: torch's default group is the user's."""
    if users_own:
        torch.distributed.init_process_group("gloo")
    before, curves = left_behind(), []
    opened = [mf.init_groups(mf.build_groups(made.parallel, mf.world_size())) for made in (config, other, config)]
    groups = [layout.__enter__() for layout in opened]
    states = [mf.setup(made, pg) for made, pg in zip((config, other, config), groups)]
    for layout, made, pg, state in zip(opened, (config, other, config), groups, states):
        curves.append(steps(made, pg, state, 2)[1])
        layout.__exit__(None, None, None)
    assert left_behind() == before, "the layouts left something"
    assert alone(other)[0][:2] == curves[1]
    if users_own:
        torch.distributed.destroy_process_group()
    return curves


@pytest.mark.parametrize("users_own", [False, True], ids=["a default group of megafn's", "one of the user's"])
def test_layouts_may_be_left_in_any_order(pool, users_own):
    first, *others = pool(2, leave_out_of_order, tiny(tp=2), tiny(pp=2), users_own)
    assert all(other == first for other in others) and first[0] == first[2]
    assert first[0] == [pytest.approx(step, abs=1e-4) for step in first[1]]


def watched(config):
    """Trains and evaluates while megatron-core's global groups are forbidden, and looked at from inside a step."""
    from unittest import mock

    from megatron.core import parallel_state

    def forbidden(*_, **__):
        raise AssertionError("parallel_state.initialize_model_parallel was called")

    def look(logits, batch, pg):
        held = {name: value for name, value in vars(parallel_state).items() if isinstance(value, torch.distributed.ProcessGroup)}
        assert not held and not parallel_state.model_parallel_is_initialized(), held
        seen.append(pg)
        return mf.token_loss(logits, batch, pg)

    seen, step = [], attrs.evolve(mf.step_fn("gpt"), loss=look)
    with mock.patch.object(parallel_state, "initialize_model_parallel", forbidden), \
            mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state, batch = mf.setup(config, pg), share(uneven(config, 0), config, pg)
        state, _ = mf.train_step(state, batch, step)
        mf.evaluate(state, [batch], step)
        mf.generate(state, torch.zeros(1, 4, dtype=torch.long), count=1)
    return len(seen), pg.is_last_stage


@pytest.mark.parametrize("n, layout", [(8, dict(tp=2, pp=2, sequence_parallel=True, use_distributed_optimizer=True)), (4, dict(pp=2, vpp=2)),
                                       (4, dict(tp=2, cp=2, recompute=mf.RecomputeConfig(granularity="full")))],
                         ids=["tp2-pp2-dp2-sp-dist", "pp2-vpp2-dp2", "tp2-cp2-full"])
def test_megatron_cores_global_groups_are_never_made(pool, n, layout):
    for calls, last in pool(n, watched, tiny(**layout)):
        assert (calls > 0) == last


def test_the_seam_on_cpu_leaves_torch_as_it_was():
    from megatron.core.tensor_parallel import layers, random
    from megafn.runtime.cpu import megatron_on_cpu

    def functions():
        return [vars(torch.cuda).copy(), vars(random).copy(), vars(layers).copy(), torch._C._len_torch_function_stack()]

    before = functions()
    with megatron_on_cpu(), megatron_on_cpu():
        assert torch.empty(2, device="cuda").device.type == torch.ones(2).cuda().device.type == "cpu"
        assert functions() != before
    assert functions() == before
    with pytest.raises(KeyError), megatron_on_cpu():
        raise KeyError
    assert functions() == before


def starts(config):
    """Whole parameters of this rank's stage, the same whether or not what they held before initialisation was a number."""
    def marked(made, pg, **flags):
        stage = mf.build_stage(made, pg, **flags)
        for parameter in stage.parameters():
            parameter.data.fill_(torch.nan)
        mf.initialize_weights(stage, made.model, pg, made.seed)
        return stage

    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        plain, again = (mf.whole_parameters(mf.setup(config, pg, model=model).chunks, config.model, pg) for model in (mf.build_stage, marked))
        assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)
        return plain


@pytest.mark.parametrize("shape", [{}, dict(tie_word_embeddings=False, position_embedding="rope", activation="swiglu", normalization="RMSNorm",
                                            num_query_groups=2, add_bias_linear=False, qk_layernorm=True)], ids=["gpt2", "llama"])
def test_every_layout_starts_from_the_same_weights_and_each_is_given_its_first_value(pool, shape):
    (whole,) = pool(1, starts, tiny(**shape))
    for n, layout in ((2, dict(tp=2)), (4, dict(tp=2, pp=2, vpp=2)), (4, dict(pp=4))):
        found = {}
        for part in pool(n, starts, tiny(**shape, **layout)):
            for name, value in part.items():
                assert torch.equal(value, whole[name]), name
            found |= part
        assert found.keys() == whole.keys()
    model = tiny(**shape).model
    for name, value in whole.items():
        if value.dim() == 1:
            assert (value == (1 if name.endswith("norm.weight") else 0)).all(), name
        else:
            to_the_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = model.init_method_std / (2 * model.num_layers) ** (0.5 if to_the_residual else 0)
            assert value.std().item() == pytest.approx(std, rel=0.1) and abs(value.mean().item()) < 0.1 * std, name
    assert not any(torch.equal(a, b) for (x, a) in whole.items() for (y, b) in whole.items() if x < y and a.dim() > 1)


def alone(config):
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        return (*steps(config, pg, mf.setup(config, pg), 4)[1:], [], local_parts(mf.setup(config, pg)))


def side_by_side(*configs):
    """The same layouts open at once, their steps interleaved."""
    import contextlib
    with contextlib.ExitStack() as stack:
        groups = [stack.enter_context(mf.init_groups(mf.build_groups(config.parallel, mf.world_size()))) for config in configs]
        states = [mf.setup(config, pg) for config, pg in zip(configs, groups)]
        curves = [[] for _ in configs]
        for iteration in range(4):
            for i, (config, pg) in enumerate(zip(configs, groups)):
                states[i], metrics = mf.train_step(states[i], share(uneven(config, iteration), config, pg), mf.step_fn("gpt"))
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
    from megafn.runtime.layers import check_parallel_layers
    from megatron.core.tensor_parallel import RowParallelLinear
    with mf.init_groups(mf.build_groups(config.parallel, mf.world_size())) as pg:
        state = mf.setup(config, pg)
        layer = next(m for m in state.chunks[0].modules() if isinstance(m, RowParallelLinear))
        layer.tp_group = pg.dp
        check_parallel_layers(state.chunks[0], pg)


def test_a_parallel_layer_without_its_group_is_named(pool):
    with pytest.raises(Exception, match="layers without the tensor-parallel group.*linear_proj"):
        pool(2, group_without, tiny(tp=2))


def test_importing_megafn_brings_no_torch():
    code = "import sys, megafn; megafn.TrainConfig; megafn.validate; megafn.draw_pipeline; megafn.make_schedule; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=60)
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
    for path in (PACKAGE / "pure").glob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] not in ("torch", "megatron", "transformers"), f"{path.name} imports {name}"
            assert not name.startswith("megafn") or name.startswith("megafn.pure"), f"{path.name} imports {name}"


def test_imports_run_one_way():
    """A module imports only modules that do not, through any chain, import it."""
    files = {f"megafn.{path.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')}": path
             for folder in ("pure", "runtime") for path in (PACKAGE / folder).glob("*.py") if path.stem != "__init__"}
    graph = {name: {other for other in imports(path) if other in files} for name, path in files.items()}

    def reached(name, seen):
        for other in graph[name] - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    assert len(graph) > 15 and graph["megafn.runtime.train"]
    for name in graph:
        assert name not in reached(name, set()), f"{name} imports itself in a circle"
