"""The planner's times: their error on published results, and what must hold for any of them."""

import math
import re
import subprocess
import sys
from importlib import resources

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megafn as mf
from megafn.pure.config.problems import ConfigError
from megafn.pure.families.gpt import GPT_SPEC
from megafn.pure.planner.implementation import IMPLEMENTATIONS
from megafn.pure.planner.machine import MACHINES, Machine
from megafn.pure.planner.memory.stage_memory import memory_by_stage
from megafn.pure.planner.published import accuracy
from megafn.pure.planner.published.error_bands import band_of, row_errors
from megafn.pure.planner.published.fit_constants import FITTED, error, fit
from megafn.pure.planner.published.rows import SOURCES, published_rows
from megafn.pure.planner.records import Layout
from megafn.pure.planner.time.step_time import step_time
from pool import ROOT

PAGE = ROOT / "docs" / "planner-accuracy.md"
FIGURES = [
    "peak_flops",
    "best_matmul_flops",
    "fp32_flops",
    "memory_bytes",
    "memory_bandwidth",
    "link_bandwidth",
    "network_bandwidth",
]
SHARES = ["matmul_efficiency", "memory_efficiency", "link_efficiency"]


def config_of(family="gpt", dtype="bf16", parallel=None, **model):
    sizes = dict(
        num_layers=32, hidden_size=4096, num_attention_heads=32, seq_length=4096, vocab_size=32000
    )
    return mf.TrainConfig(
        model=mf.ModelConfig(family=family, **sizes | model),
        parallel=parallel or mf.ParallelConfig(),
        precision=mf.PrecisionConfig(dtype=dtype),
        micro_batch_size=1,
        global_batch_size=512,
        train_iters=1,
    )


# ------------------------------------------------------------------------------ published results


def left_out(source):
    return [each.left_out for each in row_errors() if each.row.source == source]


def test_table_1_is_within_5_percent_on_average_with_each_row_left_out():
    errors = left_out("table-1")
    assert len(errors) == 10
    assert accuracy.mean_error(errors) < 0.05


def test_the_h100_table_is_within_10_percent_on_average_with_each_row_left_out():
    errors = left_out("h100-table")
    assert len(errors) == 9
    assert accuracy.mean_error(errors) < 0.10


@pytest.mark.parametrize(
    "source, largest_mean",
    [("seqsel", 0.09), ("vtrain", 0.09), ("nemo-fp8", 0.06), ("bridge-fp8", 0.15)],
)
def test_rows_that_nothing_was_fitted_to(source, largest_mean):
    errors = [each for each in row_errors() if each.row.source == source]
    assert all(each.left_out is None for each in errors)
    assert accuracy.mean_error(each.error for each in errors) < largest_mean


def test_memory_is_within_6_percent_of_what_megatron_s_ci_measures():
    rows = [row for row in published_rows() if row.source == "ci"]
    assert len(rows) == 6
    for row in rows:
        state, peak = accuracy.memory_errors(row)
        assert -0.06 < state <= 0 and -0.06 < peak <= 0, row.name


def test_the_chosen_layout_of_a_sweep_is_at_most_5_percent_slower_than_the_fastest():
    sweeps = accuracy.sweeps()
    assert [sweep.layouts for sweep in sweeps] == [26, 15, 47, 21]
    for sweep in sweeps:
        assert sweep.regret <= 0.05
        assert sweep.ordered > 0.75


def test_tiny_models_take_as_long_as_the_host_needs():
    errors = left_out("ci-tiny")
    assert len(errors) == 7
    assert accuracy.mean_error(errors) < 0.2
    for measured in row_errors():
        if measured.row.source == "ci-tiny":
            machine = attrs.evolve(measured.row.machine, launch_seconds=0)
            row = attrs.evolve(measured.row, machine=machine)
            assert error(row) < -0.7, "without the host they would take a quarter of their time"


@pytest.mark.parametrize(
    "source, machine", [("table-1", "a100"), ("h100-table", "h100"), ("ci-tiny", "h100")]
)
def test_the_constants_of_a_machine_are_those_that_fit_its_rows(source, machine):
    rows = [row for row in published_rows() if row.source == source]
    for name, share in fit(rows, FITTED[source]).items():
        assert getattr(MACHINES[machine], name) == pytest.approx(share, abs=0.001)


def alternatives(row):
    """Layouts of a row with other micro-batches and chunks a stage, that fit into 78 GB."""
    layout = row.layout
    layers = row.config.model.num_layers // layout.pp
    chunks = [v for v in range(1, layers + 1) if layers % v == 0] if layout.pp > 1 else [1]
    for size in (1, 2, 4):
        count = row.config.global_batch_size // (size * layout.dp)
        for vpp in chunks:
            other = attrs.evolve(layout, micro_batch_size=size, num_micro_batches=count, vpp=vpp)
            memory = memory_by_stage(row.config, other, implementation="megatron")
            fits = max(stage.total for stage in memory) < 78e9
            if fits and (vpp == 1 or count % layout.pp == 0):
                yield other


def test_settings_that_the_h100_table_does_not_state_are_the_fastest_that_fit():
    for row in published_rows():
        if row.source == "h100-table":
            assert set(row.assumed) >= {"micro_batch", "vpp"}
            times = {
                layout: step_time(row.config, layout, row.machine, implementation="megatron").total
                for layout in alternatives(row)
            }
            assert times[row.layout] < 1.01 * min(times.values()), row.name


def test_every_row_names_its_source_and_its_place():
    rows = published_rows()
    assert len({row.name for row in rows}) == len(rows)
    assert {row.source for row in rows} == set(SOURCES)
    assert all(row.place and row.seconds > 0 for row in rows)


def test_published_layouts_are_layouts_that_a_config_can_have():
    refused = {}
    for row in published_rows():
        layout = row.layout
        devices = layout.tp * layout.pp * layout.cp * layout.dp
        problems = mf.validate(row.config, world_size=devices)
        if problems:
            refused[row.name] = [problem.field for problem in problems]
    # 15 layers in 8 chunks: megatron-core cuts them so, if embedding and loss count as layers
    uneven = ("bridge-LLAMA3.1_405B", "bridge-LLAMA3.1_405B-b")
    outer = [f"parallel.num_layers_in_{end}_pipeline_stage" for end in ("first", "last")]
    assert refused == dict.fromkeys(uneven, outer)


def test_the_page_holds_the_tables_that_the_command_prints():
    ran = subprocess.run(
        [sys.executable, "-m", "megafn.pure.planner.published.accuracy"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == PAGE.read_text().partition("## The tables\n")[2].strip()
    assert f"{len(published_rows())} published results" in PAGE.read_text()


@pytest.mark.parametrize("name", ["a100", "h100"])
def test_the_page_has_the_constants_of_a_machine(name):
    (row,) = re.findall(rf"^\| {name} \| (.+) \|$", PAGE.read_text(), re.M)
    *cells, fitted_on = row.split(" | ")
    for cell, share in zip(cells, SHARES, strict=True):
        machine = MACHINES["a100" if cell == "A100's" else name]
        assert getattr(MACHINES[name], share) == getattr(machine, share)
        assert cell in ("A100's", f"{getattr(machine, share):.3f}")
    assert fitted_on.startswith(MACHINES[name].fitted_on)


def test_the_planner_needs_no_torch_and_finds_its_rows_in_the_package():
    code = (
        "import sys, megafn.pure.planner.published.accuracy as a; a.report(); "
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout == "False\n", ran.stderr
    assert resources.files("megafn.pure.planner.published").joinpath("published.csv").is_file()


# ------------------------------------------------------------------------------------------ bands


def test_a_band_holds_the_errors_of_rows_like_the_plan():
    config = config_of(hidden_size=12288, num_attention_heads=96, num_layers=96, seq_length=2048)
    layout = Layout(tp=8, pp=8, dp=24, num_micro_batches=48)
    band = band_of(config, layout, MACHINES["a100"], "megatron")
    assert -0.2 < band.low < 0 < band.high < 0.2
    assert band.not_trusted is None
    assert "2104.04473" in band.source


@pytest.mark.parametrize(
    "reason, change",
    [
        ("megafn's own time", dict(implementation="megafn")),
        ("fitted on results of h200", dict(machine=MACHINES["h200"])),
        ("fitted on results of b200", dict(machine=MACHINES["b200"])),
        ("family bert", dict(config=config_of("bert"))),
        ("family t5", dict(config=config_of("t5"))),
        ("fp32", dict(config=config_of(dtype="fp32"))),
        ("hidden size below 4096", dict(config=config_of(hidden_size=2048))),
        ("cp", dict(layout=Layout(tp=2, cp=2, dp=2))),
        ("longer than 8,192 tokens", dict(config=config_of(seq_length=32768))),
        ("sliding window", dict(config=config_of(sliding_window=1024))),
        ("more than 6,144 devices", dict(layout=Layout(tp=8, pp=16, dp=64))),
    ],
)
def test_a_band_says_why_rows_do_not_speak_for_a_plan(reason, change):
    plan = dict(
        config=config_of(),
        layout=Layout(tp=2, dp=4, num_micro_batches=8),
        machine=MACHINES["h100"],
        implementation="megatron",
    )
    assert band_of(**plan).not_trusted is None
    band = band_of(**plan | change)
    assert reason in band.not_trusted
    assert band.low <= band.high and band.source


# ---------------------------------------------------------------------------------- any layout

sizes = st.sampled_from([1, 2, 4, 8, 16])
layouts = st.builds(
    Layout,
    tp=sizes,
    pp=sizes,
    vpp=st.sampled_from([1, 2, 4]),
    cp=st.sampled_from([1, 2, 4]),
    dp=sizes,
    micro_batch_size=st.integers(1, 8),
    num_micro_batches=st.integers(1, 128),
    sequence_parallel=st.booleans(),
    use_distributed_optimizer=st.booleans(),
    recompute=st.builds(
        mf.RecomputeConfig,
        granularity=st.sampled_from([None, "selective", "full"]),
        method=st.sampled_from(["uniform", "block"]),
        num_layers=st.integers(1, 4),
    ),
)
configs = st.builds(
    config_of,
    family=st.sampled_from(["gpt", "bert", "t5"]),
    dtype=st.sampled_from(["bf16", "fp32"]),
    activation=st.sampled_from(["gelu", "swiglu"]),
    num_query_groups=st.sampled_from([8, 32]),
    sliding_window=st.sampled_from([None, 1024]),
    position_embedding=st.sampled_from(["rope", "learned_absolute"]),
    parallel=st.builds(
        mf.ParallelConfig, order=st.sampled_from(["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"])
    ),
)
machines = st.sampled_from(list(MACHINES.values()))
implementations = st.sampled_from(list(IMPLEMENTATIONS))


def is_at_most(one, other):
    return one <= other * (1 + 1e-9)


@settings(max_examples=150, deadline=None)
@given(configs, layouts, machines, implementations)
def test_the_kinds_are_finite_and_add_up_to_the_step(config, layout, machine, implementation):
    time = step_time(config, layout, machine, implementation=implementation)
    kinds = attrs.asdict(time)
    assert all(math.isfinite(seconds) and seconds >= 0 for seconds in kinds.values())
    assert time.total == pytest.approx(sum(kinds.values())) and time.total > 0


@settings(max_examples=150, deadline=None)
@given(
    configs,
    layouts,
    machines,
    implementations,
    st.sampled_from(FIGURES),
    st.floats(1.0, 8.0),
)
def test_a_better_machine_is_never_slower(config, layout, machine, implementation, field, factor):
    better = attrs.evolve(machine, **{field: getattr(machine, field) * factor})
    before = step_time(config, layout, machine, implementation=implementation).total
    after = step_time(config, layout, better, implementation=implementation).total
    assert is_at_most(after, before)


@settings(max_examples=150, deadline=None)
@given(configs, layouts, machines, implementations)
def test_more_micro_batches_shrink_the_share_of_the_bubble(config, layout, machine, implementation):
    def share(count):
        some = attrs.evolve(layout, num_micro_batches=count)
        time = step_time(config, some, machine, implementation=implementation)
        return time.bubble / time.total

    assert is_at_most(share(2 * layout.num_micro_batches), share(layout.num_micro_batches))


@settings(max_examples=100, deadline=None)
@given(configs, layouts, machines)
def test_time_is_linear_in_the_global_batch_but_for_what_happens_once(config, layout, machine):
    one, two, three = (
        step_time(config, attrs.evolve(layout, num_micro_batches=count), machine).total
        for count in (8, 16, 24)
    )
    assert three - two == pytest.approx(two - one, rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(configs, layouts, machines)
def test_megafn_is_never_faster_than_with_overlap_and_fused_kernels(config, layout, machine):
    own = step_time(config, layout, machine, implementation="megafn").total
    fused = step_time(config, layout, machine, implementation="megatron").total
    assert is_at_most(fused, own)


@settings(max_examples=100, deadline=None)
@given(configs, layouts, machines, implementations)
def test_recomputation_costs_at_most_a_forward_pass(config, layout, machine, implementation):
    def time(granularity):
        some = attrs.evolve(layout, recompute=mf.RecomputeConfig(granularity=granularity))
        return step_time(config, some, machine, implementation=implementation)

    none, selective, full = time(None), time("selective"), time("full")
    assert none.recomputation == 0
    assert 0 < selective.recomputation < full.recomputation < full.layers / 2


def test_the_fullest_stage_decides_where_stages_differ():
    """7 of 32 layers on the first and on the last of four stages leave 9 for each of the others."""
    full = mf.RecomputeConfig(granularity="full")
    layout = Layout(pp=4, num_micro_batches=8, recompute=full)
    outer = dict(num_layers_in_first_pipeline_stage=7, num_layers_in_last_pipeline_stage=7)
    even = step_time(config_of(), layout, MACHINES["h100"])
    uneven = step_time(config_of(), attrs.evolve(layout, **outer), MACHINES["h100"])
    assert uneven.recomputation == pytest.approx(even.recomputation * 9 / 8)
    assert even.head > 0 == uneven.head


def test_a_machine_of_ones_own_has_the_shares_of_h100():
    own = Machine(
        name="ours",
        peak_flops=400e12,
        memory_bytes=64e9,
        memory_bandwidth=2e12,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
    )
    assert [getattr(own, share) for share in SHARES] == [
        getattr(MACHINES["h100"], share) for share in SHARES
    ]
    assert own.best_matmul_flops == 320e12
    layout = Layout(tp=8, dp=2, num_micro_batches=4)
    slower = step_time(config_of(), layout, own).total
    assert slower > step_time(config_of(), layout, MACHINES["h100"]).total
    assert "ours" in band_of(config_of(), layout, own, "megatron").not_trusted


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, None, "80 GB", True])
@pytest.mark.parametrize("field", FIGURES)
def test_a_machine_without_a_figure_is_refused_when_it_is_made(field, value):
    with pytest.raises(ConfigError, match=rf"^machine\.{field} = .+: must be .+; give .+$"):
        attrs.evolve(MACHINES["h100"], **{field: value})


def test_figures_in_tera_or_giga_are_refused_together_with_the_units_that_are_meant():
    with pytest.raises(ConfigError) as caught:
        Machine(
            name="rtx 4090",
            peak_flops=165,
            fp32_flops=82.6,
            memory_bytes=24,
            memory_bandwidth=1008,
            link_bandwidth=25,
            network_bandwidth=12,
        )
    assert str(caught.value).splitlines()[1:] == [
        "  machine.peak_flops = 165: in FLOP/s; did you mean 165e12 (165 TFLOP/s)?",
        "  machine.fp32_flops = 82.6: in FLOP/s; did you mean 82.6e12 (82.6 TFLOP/s)?",
        "  machine.memory_bytes = 24: in bytes; did you mean 24e9 (24 GB)?",
        "  machine.memory_bandwidth = 1008: in bytes/s; did you mean 1008e9 (1008 GB/s)?",
        "  machine.link_bandwidth = 25: in bytes/s; did you mean 25e9 (25 GB/s)?",
        "  machine.network_bandwidth = 12: in bytes/s; did you mean 12e9 (12 GB/s)?",
    ]


def test_memory_in_mebibytes_is_refused():
    with pytest.raises(ConfigError, match="memory_bytes = 81920: too small to be in bytes; give"):
        attrs.evolve(MACHINES["h100"], memory_bytes=81920)


@pytest.mark.parametrize("value", [0, 1.5, -0.1, math.nan, "all"])
@pytest.mark.parametrize("field", SHARES)
def test_a_share_is_above_0_and_at_most_1(field, value):
    with pytest.raises(ConfigError, match=rf"^machine\.{field} = .+: must be .+; give .+$"):
        attrs.evolve(MACHINES["h100"], **{field: value})


@pytest.mark.parametrize("value", [-1, math.inf, math.nan, "5 ms"])
def test_a_host_launches_in_a_time(value):
    with pytest.raises(ConfigError, match="machine.launch_seconds = .+: must be .+; give"):
        attrs.evolve(MACHINES["h100"], launch_seconds=value)


@pytest.mark.parametrize("value", [0, 2.5, True])
def test_a_node_has_a_whole_number_of_devices(value):
    with pytest.raises(ConfigError, match="machine.devices_per_node = .+: must be .+; give"):
        attrs.evolve(MACHINES["h100"], devices_per_node=value)


@pytest.mark.parametrize("name", ["Megatron", "", None, []])
def test_an_unknown_implementation_is_refused(name):
    with pytest.raises(ConfigError, match="implementation = .*: choose one of megafn, megatron"):
        step_time(config_of(), Layout(), MACHINES["h100"], implementation=name)


def test_a_family_of_ones_own_is_priced_by_its_parameters_or_refused():
    own = attrs.evolve(GPT_SPEC, name="ours")
    time = step_time(config_of(own), Layout(), MACHINES["h100"])
    assert time == step_time(config_of(), Layout(), MACHINES["h100"])
    silent = attrs.evolve(own, parameter_shapes=None)
    with pytest.raises(ConfigError, match="model.family = 'ours': .*give it parameter_shapes"):
        step_time(config_of(silent), Layout(), MACHINES["h100"])


def test_a_model_of_a_quadrillion_parameters_has_a_price():
    config = config_of(hidden_size=2**20, num_attention_heads=2**13, num_layers=10_000)
    layout = Layout(tp=64, pp=1000, dp=1000, num_micro_batches=10_000)
    assert math.isfinite(step_time(config, layout, MACHINES["b200"]).total)


def test_attention_hides_messages_of_context_parallelism_only_as_far_as_it_lasts():
    layout = Layout(cp=4, dp=2, num_micro_batches=8)
    fast = MACHINES["h100"]
    slow = attrs.evolve(fast, link_bandwidth=5e9, network_bandwidth=5e9)
    config = config_of(seq_length=32768)
    waited = step_time(config, layout, slow, implementation="megafn").cp
    assert step_time(config, layout, fast, implementation="megatron").cp == 0
    assert 0 < step_time(config, layout, slow, implementation="megatron").cp < waited
