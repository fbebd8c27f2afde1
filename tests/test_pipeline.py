"""The order of a pipeline: equal to what megatron-core runs, and the laws that follow from it."""

import re
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megafn.pure.pipeline import (
    Op,
    bubble,
    check_order,
    draw_pipeline,
    peak_activations,
    pipeline_order,
    timeline,
)


@st.composite
def pipelines(draw, max_pp=6, max_vpp=4):
    """(pp, vpp, num_micro_batches) that can run, fewer micro-batches than stages included."""
    pp = draw(st.integers(1, max_pp))
    vpp = draw(st.integers(1, max_vpp if pp > 1 else 1))
    return pp, vpp, draw(st.integers(1, 14)) if vpp == 1 else pp * draw(st.integers(1, 4))


# The oracle: megatron-core's own schedule functions run, one thread a stage. Their forward and
# backward are recorded instead of computed, and their communicator passes labels, so that what
# arrives where is theirs too.


class Channel:
    """What one stage sends to the next in one direction; receives are answered in order."""

    def __init__(self):
        self.sent = []
        self.posted = 0
        self.change = Condition()

    def send(self, label):
        with self.change:
            self.sent.append(label)
            self.change.notify_all()

    def post(self):
        self.posted += 1
        return Arriving(self, self.posted - 1)


class Arriving:
    label = None

    def __init__(self, channel, number):
        self.channel = channel
        self.number = number

    def wait(self):
        with self.channel.change:
            assert self.channel.change.wait_for(
                lambda: len(self.channel.sent) > self.number, timeout=20
            )
        self.label = self.channel.sent[self.number]
        return self


class FakeCommunicator:
    """What megatron-core's schedules call of its P2PCommunicator, on channels in a ring."""

    def __init__(self, stage, pp, vpp, config, forward, backward):
        self.config = config
        self.virtual_pipeline_model_parallel_size = vpp if vpp > 1 else None
        self.pp_group = SimpleNamespace(rank=lambda: stage, size=lambda: pp)
        self.to_next = forward[(stage + 1) % pp]
        self.to_prev = backward[(stage - 1) % pp]
        self.from_prev = forward[stage]
        self.from_next = backward[stage]

    def recv_forward(self, shape, is_first_stage):
        return None if is_first_stage else self.from_prev.post().wait()

    def recv_backward(self, shape, is_last_stage):
        return None if is_last_stage else self.from_next.post().wait()

    def send_forward(self, output, is_last_stage):
        if not is_last_stage:
            self.to_next.send(output)

    def send_backward(self, grad, is_first_stage):
        if not is_first_stage:
            self.to_prev.send(grad)

    def send_forward_recv_backward(self, output, shape, is_last_stage):
        self.send_forward(output, is_last_stage)
        return self.recv_backward(shape, is_last_stage)

    def send_backward_recv_forward(self, grad, shape, is_first_stage):
        self.send_backward(grad, is_first_stage)
        return self.recv_forward(shape, is_first_stage)

    def exchange(self, to, sent, receive, channel, names, overlap):
        if sent is not None:
            to.send(sent)
        arriving = channel.post() if receive else None
        if overlap:
            done = SimpleNamespace(wait=lambda: None) if sent is not None else None
            handles = zip(names, (done, arriving), strict=True)
            return arriving, {name: handle for name, handle in handles if handle}
        return arriving and arriving.wait()

    def send_forward_recv_forward(
        self, output_tensor, recv_prev, tensor_shape, overlap_p2p_comm=False
    ):
        return self.exchange(
            self.to_next,
            output_tensor,
            recv_prev,
            self.from_prev,
            ("send_next", "recv_prev"),
            overlap_p2p_comm,
        )

    def send_backward_recv_backward(
        self, input_tensor_grad, recv_next, tensor_shape, overlap_p2p_comm=False
    ):
        return self.exchange(
            self.to_prev,
            input_tensor_grad,
            recv_next,
            self.from_next,
            ("send_prev", "recv_next"),
            overlap_p2p_comm,
        )

    def send_forward_backward_recv_forward_backward(
        self, output, grad, recv_prev, recv_next, tensor_shape
    ):
        if output is not None:
            self.to_next.send(output)
        if grad is not None:
            self.to_prev.send(grad)
        posted = recv_prev and self.from_prev.post(), recv_next and self.from_next.post()
        return tuple(arriving.wait() if arriving else None for arriving in posted)


def megatron_cores(pp, vpp, num_micro_batches, overlap=False):
    """(order, arrivals): what each stage of megatron-core ran, and what it received.

    Per (stage, op) the (stage, op) whose tensor arrived.
    """
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=pp * vpp,
        hidden_size=4,
        num_attention_heads=1,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        overlap_p2p_comm=overlap,
        batch_p2p_comm=not overlap,
        deallocate_pipeline_outputs=False,
    )
    rows = [[] for _ in range(pp)]
    arrivals = {}

    def record(stage, op, arrived):
        rows[stage].append(op)
        arrivals[stage, op] = arrived and arrived.label
        return stage, op

    def forward_step(
        func, data, model, m, input_tensor, store, config, *, current_microbatch, vp_stage=None, **_
    ):
        return record(data, Op("F", current_microbatch, vp_stage or 0), input_tensor), 0

    def backward_step(input_tensor, output_tensor, output_tensor_grad, model_type, config):
        stage, op = output_tensor
        return record(stage, Op("B", op.micro_batch, op.chunk), output_tensor_grad)

    forward = [Channel() for _ in range(pp)]
    backward = [Channel() for _ in range(pp)]
    one = SimpleNamespace(size=lambda: 1)
    groups = SimpleNamespace(tp=one, cp=one, embd=None, pos_embd=None, pp=None, dp_cp=None)

    def run(stage):
        model = [torch.nn.Module() for _ in range(vpp)]
        for chunk in model:
            chunk.config = config
            chunk.model_type = ModelType.encoder_or_decoder
            chunk.set_input_tensor = None
        communicator = FakeCommunicator(stage, pp, vpp, config, forward, backward)
        schedule = schedules.get_forward_backward_func(pp_size=pp, vp_size=vpp if vpp > 1 else None)
        schedule(
            forward_step_func=None,
            data_iterator=[stage] * vpp,
            model=model,
            num_microbatches=num_micro_batches,
            seq_length=1,
            micro_batch_size=1,
            p2p_communicator=communicator,
            pg_collection=groups,
        )

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(pp) as threads:
        patch.setattr(schedules, "forward_step", forward_step)
        patch.setattr(schedules, "backward_step", backward_step)
        patch.setattr(schedules, "is_pp_first_stage", lambda group: group.rank() == 0)
        patch.setattr(schedules, "is_pp_last_stage", lambda group: group.rank() == group.size() - 1)
        # their token counter wants a CUDA device
        patch.setattr(
            schedules,
            "torch",
            SimpleNamespace(nn=torch.nn, int=torch.int, zeros=lambda *_, **__: 0),
        )
        list(threads.map(run, range(pp)))
    return tuple(map(tuple, rows)), arrivals


@settings(max_examples=60)
@given(pipelines().filter(lambda p: p[0] > 1), st.booleans())
def test_the_order_equals_what_megatron_cores_schedules_run(pipeline, overlap):
    order, _ = megatron_cores(*pipeline, overlap=overlap and pipeline[1] > 1)
    assert pipeline_order(*pipeline) == order


@settings(max_examples=60)
@given(pipelines().filter(lambda p: p[0] > 1), st.integers(0, 5), st.integers(0, 5))
def test_the_timeline_waits_for_exactly_the_tensors_that_megatron_core_passes(pipeline, tf, tb):
    order, arrivals = megatron_cores(*pipeline)
    slots = timeline(order, tf, tb)
    ends = {
        (stage, op): end
        for stage, ops in enumerate(order)
        for op, (_, end) in zip(ops, slots[stage], strict=True)
    }
    for stage, ops in enumerate(order):
        free = 0
        for op, (start, end) in zip(ops, slots[stage], strict=True):
            assert start == max(free, ends[arrivals[stage, op]] if arrivals[stage, op] else 0)
            assert end == start + (tf if op.kind == "F" else tb)
            free = end


@given(st.integers(1, 14))
def test_a_pipeline_of_one_stage_runs_each_backward_after_its_forward(m):
    """As megatron-core's `forward_backward_no_pipelining`."""
    assert pipeline_order(1, 1, m) == (tuple(Op(kind, i) for i in range(m) for kind in "FB"),)


@given(pipelines())
def test_every_op_runs_once_on_every_stage_and_no_backward_before_its_forward(pipeline):
    pp, vpp, m = pipeline
    order = pipeline_order(pp, vpp, m)
    assert len(order) == pp
    for ops in order:
        assert sorted((op.kind, op.micro_batch, op.chunk) for op in ops) == sorted(
            (kind, i, chunk) for kind in "FB" for i in range(m) for chunk in range(vpp)
        )
        for op in ops:
            assert ops.index(Op("F", op.micro_batch, op.chunk)) <= ops.index(op)
    check_order(order)


def most_held(ops):
    """The most forwards of a stage's ops whose backward is yet to come."""
    held = 0
    most = 0
    for op in ops:
        held += 1 if op.kind == "F" else -1
        most = max(most, held)
    return most


def test_peak_activations_are_what_the_order_holds_at_most_in_a_thousand_pipelines():
    without_interleaving = [(pp, 1, m) for pp in range(1, 17) for m in range(1, 41)]
    interleaved = [
        (pp, vpp, pp * groups)
        for pp in range(2, 13)
        for vpp in range(2, 7)
        for groups in range(1, 8)
    ]
    for pipeline in without_interleaving + interleaved:
        counted = tuple(map(most_held, pipeline_order(*pipeline)))
        assert peak_activations(*pipeline) == counted, pipeline


@given(pipelines(), st.integers(0, 9), st.integers(0, 9))
def test_makespan_equals_the_formula_for_any_times_of_forward_and_backward(pipeline, tf, tb):
    pp, vpp, m = pipeline
    slots = timeline(pipeline_order(pp, vpp, m), tf, tb)
    assert max(end for row in slots for _, end in row) == (m * vpp + pp - 1) * (tf + tb)


@given(pipelines(), st.integers(1, 9), st.integers(1, 9))
def test_bubble_is_the_share_of_the_makespan_in_which_each_stage_idles(pipeline, tf, tb):
    slots = timeline(pipeline_order(*pipeline), tf, tb)
    makespan = max(end for row in slots for _, end in row)
    for row in slots:
        assert bubble(*pipeline) == pytest.approx(
            1 - sum(end - start for start, end in row) / makespan, abs=1e-12
        )


@given(pipelines())
def test_interleaving_divides_the_bubbles_time_by_the_number_of_chunks(pipeline):
    """arXiv 2104.04473, 2.2: over the ideal time, the bubble is (pp - 1) / (m vpp)."""
    pp, vpp, m = pipeline
    share = bubble(pp, vpp, m)
    assert share / (1 - share) == pytest.approx((pp - 1) / (m * vpp), abs=1e-12)


@pytest.mark.parametrize(
    ("pipeline", "says"),
    [
        ((0, 1, 4), "pp = 0: must be at least 1"),
        ((2, 0, 4), "vpp = 0: must be at least 1"),
        ((2, 1, 0), "num_micro_batches = 0: must be at least 1"),
        (
            (1, 2, 4),
            "vpp = 2: interleaving needs a pipeline, but pp = 1; set vpp to 1 or pp to 2 or more",
        ),
        (
            (4, 2, 6),
            "num_micro_batches = 6: interleaving (vpp = 2) needs a multiple of pp = 4; "
            "set it to one, or vpp to 1",
        ),
    ],
)
@pytest.mark.parametrize("ask", [pipeline_order, bubble, peak_activations, draw_pipeline])
def test_a_pipeline_that_can_not_be_is_refused_by_field_value_and_remedy(ask, pipeline, says):
    with pytest.raises(ValueError) as error:
        ask(*pipeline)
    assert str(error.value) == says


@pytest.mark.parametrize("times", [(-1, 1), (1, -1)])
def test_a_negative_time_is_refused(times):
    with pytest.raises(ValueError, match=r"^(for|back)ward_time = -1: must be 0 or more$"):
        timeline(pipeline_order(2, 1, 2), *times)


# check_order points at the wrong cell


def F(micro_batch):
    return Op("F", micro_batch)


def B(micro_batch):
    return Op("B", micro_batch)


def changed(order, stage, ops):
    return (*order[:stage], tuple(ops), *order[stage + 1 :])


def refusal(order):
    with pytest.raises(ValueError) as error:
        check_order(order)
    return str(error.value)


@given(pipelines(), st.data())
def test_a_missing_op_is_pointed_at(pipeline, data):
    order = pipeline_order(*pipeline)
    stage = data.draw(st.integers(0, len(order) - 1))
    index = data.draw(st.integers(0, len(order[stage]) - 1))
    lost = order[stage][index]
    says = refusal(changed(order, stage, order[stage][:index] + order[stage][index + 1 :]))
    if lost.kind == "B":
        end = len(order[stage]) - 1
        assert says == f"stage {stage}, index {end}: the ops end without {lost}; add it"
    else:
        backward = Op("B", lost.micro_batch, lost.chunk)
        at = order[stage].index(backward) - 1
        assert says == (
            f"stage {stage}, index {at}: {backward} comes before its forward; put {lost} before it"
        )


@given(pipelines(max_pp=3).filter(lambda p: p[0] > 1), st.data())
def test_a_micro_batch_that_one_stage_leaves_out_is_pointed_at(pipeline, data):
    pp, vpp, m = pipeline
    order = pipeline_order(*pipeline)
    stage, i, chunk = (data.draw(st.integers(0, most - 1)) for most in (pp, m, vpp))
    ops = [op for op in order[stage] if (op.micro_batch, op.chunk) != (i, chunk)]
    says = refusal(changed(order, stage, ops))
    assert (
        says == f"stage {stage}, index {len(ops)}: the ops end without {Op('F', i, chunk)}; add it"
    )


@given(pipelines(), st.data())
def test_a_repeated_op_is_pointed_at(pipeline, data):
    order = pipeline_order(*pipeline)
    stage = data.draw(st.integers(0, len(order) - 1))
    index = data.draw(st.integers(0, len(order[stage]) - 1))
    again = data.draw(st.integers(index + 1, len(order[stage])))
    op = order[stage][index]
    says = refusal(changed(order, stage, (*order[stage][:again], op, *order[stage][again:])))
    assert says == (
        f"stage {stage}, index {again}: "
        f"{op} is repeated, first at index {index}; remove one of them"
    )


@given(pipelines(), st.data())
def test_a_backward_before_its_forward_is_pointed_at(pipeline, data):
    order = pipeline_order(*pipeline)
    stage = data.draw(st.integers(0, len(order) - 1))
    ops = list(order[stage])
    index = data.draw(st.sampled_from([i for i, op in enumerate(ops) if op.kind == "F"]))
    forward = ops[index]
    backward = Op("B", forward.micro_batch, forward.chunk)
    ops[ops.index(backward)] = forward
    ops[index] = backward
    says = refusal(changed(order, stage, ops))
    assert says == (
        f"stage {stage}, index {index}: "
        f"{backward} comes before its forward; put {forward} before it"
    )


@pytest.mark.parametrize("op", [Op("W", 0), Op("F", -1), Op("B", 0, -1)])
def test_what_is_not_an_op_is_pointed_at(op):
    assert refusal(changed(pipeline_order(2, 1, 2), 1, [Op("F", 0), op])).startswith(
        f"stage 1, index 1: {op!r} is not an op"
    )


def test_a_deadlock_between_stages_is_pointed_at_by_the_whole_cycle():
    """Complete, each once, forwards first: but each stage waits for what the other does next.

    Stage 0 needs B0 before it sends F1, for which stage 1 waits before it does B0.
    """
    order = ((F(0), B(0), F(1), B(1)), (F(0), F(1), B(0), B(1)))
    assert refusal(order) == (
        "deadlock: stage 0, index 1: B0 waits for B0 of stage 1, "
        "while stage 1, index 1: F1 waits for F1 of stage 0"
    )


def test_a_stage_outside_the_cycle_is_not_blamed_for_it():
    order = ((F(0), F(1), B(0), B(1)), (F(0), B(0), F(1), B(1)), (F(0), F(1), B(0), B(1)))
    assert refusal(order) == (
        "deadlock: stage 1, index 1: B0 waits for B0 of stage 2, "
        "while stage 2, index 1: F1 waits for F1 of stage 1"
    )


@given(pipelines().filter(lambda p: p[1] > 1), st.data())
def test_a_chunk_before_the_one_that_feeds_it_is_a_deadlock(pipeline, data):
    """Stage 0 is fed by the last stage's previous chunk; backwards it is the other way round."""
    pp, vpp, m = pipeline
    kind = data.draw(st.sampled_from("FB"))
    i = data.draw(st.integers(0, m - 1))
    chunk = data.draw(st.integers(0, vpp - 2))
    if kind == "F":
        stage, feeder = 0, pp - 1
        fed, feeding = Op("F", i, chunk + 1), Op("F", i, chunk)
    else:
        stage, feeder = pp - 1, 0
        fed, feeding = Op("B", i, chunk), Op("B", i, chunk + 1)

    ops = list(pipeline_order(*pipeline)[stage])
    early = ops.index(feeding)
    ops[ops.index(fed)] = feeding
    ops[early] = fed
    says = refusal(changed(pipeline_order(*pipeline), stage, ops))
    assert says.startswith("deadlock: ")
    assert f"stage {stage}, index {early}: {fed} waits for {feeding} of stage {feeder}" in says


def inputs_have_run(op, way, last_way, ran):
    """Whether what an op needs is in `ran`; `way` counts the chunks that a micro-batch passes."""
    if op.kind == "F":
        return way == 0 or ("F", op.micro_batch, way - 1) in ran
    fed = way == last_way or ("B", op.micro_batch, way + 1) in ran
    return fed and ("F", op.micro_batch, way) in ran


@given(pipelines(max_pp=4, max_vpp=3), st.randoms(use_true_random=False))
def test_an_order_is_accepted_exactly_when_some_interleaving_of_the_stages_finishes_it(
    pipeline, random
):
    """A second opinion: repeatedly take any op at the head of its stage whose inputs have run."""
    pp, vpp, m = pipeline
    order = []
    for ops in pipeline_order(pp, vpp, m):
        ops = list(ops)
        for _ in range(random.randrange(3)):
            i = random.randrange(len(ops) - 1)
            ops[i], ops[i + 1] = ops[i + 1], ops[i]
        order.append(ops)

    waiting = [list(ops) for ops in order]
    ran = set()
    while True:
        ready = [
            stage
            for stage, ops in enumerate(waiting)
            if ops and inputs_have_run(ops[0], ops[0].chunk * pp + stage, pp * vpp - 1, ran)
        ]
        if not ready:
            break
        stage = random.choice(ready)
        op = waiting[stage].pop(0)
        ran.add((op.kind, op.micro_batch, op.chunk * pp + stage))
    if len(ran) == 2 * m * vpp * pp:
        check_order(order)
    else:
        refusal(order)


# the picture


@given(pipelines())
def test_the_picture_shows_every_op_in_its_turn_and_every_row_over_the_whole_step(pipeline):
    pp, vpp, m = pipeline
    *rows, _, closing = draw_pipeline(*pipeline).splitlines()
    assert len(rows) == pp and len({len(row) for row in rows}) == 1
    superscripts = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
    for row, ops in zip(rows, pipeline_order(*pipeline), strict=True):
        drawn = re.findall(r"(\[?) *(\d+)([⁰¹²³⁴⁵⁶⁷⁸⁹]*)", row.split("|")[1])
        assert ops == tuple(
            Op("B" if bracket else "F", int(number), int(chunk.translate(superscripts) or 0))
            for bracket, number, chunk in drawn
        )
        idle = 3 * (pp - 1)  # a forward counts 1, a backward 2
        assert row.count("·") == idle
    assert f"bubble {idle / (3 * m * vpp + idle):.1%} " in closing
    assert f" {' '.join(map(str, peak_activations(*pipeline)))} (" in closing


def test_the_picture_of_interleaving_marks_the_chunk():
    assert draw_pipeline(pp=2, vpp=2, num_micro_batches=2) == "\n".join(
        [
            "stage 0 |0 1 0¹1¹· · [0¹]· [1¹][0 ][1 ]|",
            "stage 1 |· 0 1 0¹[0¹]1¹[1¹][0 ][1 ]· · |",
            "n forward of micro-batch n, [n] its backward, n¹ in chunk 1, · idle",
            "bubble 20.0% of the step; peak activations by stage 4 3 "
            "(micro-batches of one chunk, 1/2 of a stage)",
        ]
    )
