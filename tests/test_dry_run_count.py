"""The instruments of a dry run, on real tensors: bytes as torch's allocator counts them, FLOP as
torch's own counter does, and every message once."""

import gc

import attrs
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import megafn as mf
from equivalence import share, tiny, uneven
from megafn.runtime.dry_run import count, live_bytes
from megafn.runtime.dry_run.count import Counter, counting
from megafn.runtime.dry_run.fake_world import fake_world
from megafn.runtime.model.layers import causal_to_the_last

KIB = 1024


def kibibytes(count):
    """A tensor of so many KiB, made by an operation."""
    return torch.empty(count * KIB, dtype=torch.uint8)


def alive(counter):
    """Bytes that are alive now."""
    return sum(change.bytes for change in counter._memory.changes)


def opened(config):
    return mf.init_groups(mf.build_groups(config.parallel, 1, model=config.model))


def stepped(config, *, steps=1):
    """The counter of the last of some steps of one process."""
    with opened(config) as pg:
        batch = share(uneven(config, 0), config, pg)
        with counting() as counter:
            state = mf.setup(config, pg)
            for _ in range(steps):
                counter.start_step(state)
                state, _ = mf.train_step(state, batch, mf.step_fn("gpt"))
                counter.end_step(state)
        return counter


def small(**changes):
    return tiny(**dict(num_layers=2, micro_batch_size=1, global_batch_size=2) | changes)


# ------------------------------------------------------------------------------------- live bytes


def allocated(events):
    """(bytes alive at the end, the most that were) of memory events, as the allocator saw them."""
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return total, most


def held_to_the_allocator():
    """Raises AssertionError if a counter of two steps disagrees with torch's allocator."""
    config = small()
    activities = [ProfilerActivity.CPU]
    gc.collect()  # what earlier tests have left would be freed while the allocator is watched
    with opened(config) as pg:
        batch = share(uneven(config, 0), config, pg)
        with profile(activities=activities, profile_memory=True) as profiler, counting() as counter:
            state = mf.setup(config, pg)
            for _ in range(2):
                counter.start_step(state)
                state, _ = mf.train_step(state, batch, mf.step_fn("gpt"))
                counter.end_step(state)
        at_end = alive(counter)
    events = profiler.profiler.kineto_results.events()
    end, most = allocated([event for event in events if event.name() == "[memory]"])
    # gloo may let go of a few numbers later
    assert at_end == pytest.approx(end, rel=0.001)
    # the allocator also sees what is temporary inside of a kernel
    assert 0.95 * most < counter.memory().peak.total <= most


def test_the_bytes_are_those_of_torchs_allocator():
    held_to_the_allocator()


def no_frees(log, address, _):
    log._alive.pop(address)


def views_anew(log, tensor, module=""):
    changed = live_bytes.MemoryLog.see(log, tensor, module)
    if tensor._base is not None:
        log._changed(changed, tensor.nbytes)
    return changed


def nothing_of_tuples(values):
    if isinstance(values, torch.Tensor):
        yield values


def test_every_output_of_an_operation_counts():
    with counting() as counter:
        ranked = kibibytes(8).sort()
        assert alive(counter) == 8 * KIB + 8 * 8 * KIB
        del ranked


@pytest.mark.parametrize(
    "owner, name, bug, check",
    [
        (live_bytes.MemoryLog, "_freed", no_frees, held_to_the_allocator),
        (
            Counter,
            "_allocation",
            lambda counter, tensor: views_anew(counter._memory, tensor),
            held_to_the_allocator,
        ),
        (count, "tensors_in", nothing_of_tuples, test_every_output_of_an_operation_counts),
    ],
    ids=["frees are not seen", "views count again", "of several outputs none is seen"],
)
def test_a_bug_in_the_counter_shows(owner, name, bug, check, monkeypatch):
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises(AssertionError):
        check()


def test_a_storage_counts_once_for_as_long_as_anything_holds_it():
    with counting() as counter:
        whole = kibibytes(8)
        part = whole[:KIB].view(2, -1)
        assert alive(counter) == 8 * KIB
        del whole
        assert alive(counter) == 8 * KIB
        del part
        assert alive(counter) == 0


def test_what_autograd_saves_is_alive_until_the_backward_pass():
    weight = torch.ones(KIB, requires_grad=True)
    with counting() as counter:
        loss = (weight * 2).exp().sum()
        # the exponentials are their own derivative; the product is not kept
        assert alive(counter) == 4 * KIB + 4
        loss.backward()
        # the gradient is what remains, and the loss
        assert alive(counter) == 4 * KIB + 4


def test_a_tensor_whose_data_is_exchanged_lets_go_of_its_memory():
    with counting() as counter:
        tensor = kibibytes(8)
        tensor.data = torch.empty(1, dtype=torch.uint8)
        assert alive(counter) == 1


def test_resizing_is_seen():
    with counting() as counter:
        tensor = kibibytes(8)
        tensor.resize_(2 * KIB)
        assert alive(counter) == 8 * KIB
        tensor.resize_(16 * KIB)
        assert alive(counter) == 16 * KIB
        torch.empty(32 * KIB, out=tensor, dtype=torch.uint8)
        assert alive(counter) == 32 * KIB
        tensor.untyped_storage().resize_(0)
        counter._memory.look_for_resized()
        assert alive(counter) == 0


def test_memory_that_no_operation_made_does_not_count():
    """Such as a batch that was read outside, on the host."""
    outside = torch.zeros(KIB)
    with counting() as counter:
        assert len(outside[1:].view(-1)) and alive(counter) == 0
        copy = outside.clone()
        assert alive(counter) == copy.nbytes
        assert torch.tensor([1, 2, 3]).nbytes == 24


def test_a_counter_leaves_nothing_in_torch():
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    before = len(hooks), torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
    with pytest.raises(RuntimeError, match="no step was counted"), counting() as counter:
        counter.memory()
    assert before == (
        len(hooks),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
    )


# ------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    "changes, of_parameter",
    [
        ({}, (4, 4, 8)),
        (dict(use_distributed_optimizer=True), (4, 4, 8)),
        (dict(dtype="bf16"), (2, 4, 12)),
        (dict(dtype="bf16", use_distributed_optimizer=True), (2, 4, 12)),
        (dict(name="sgd", momentum=0.9, eps=1e-8), (4, 4, 4)),
    ],
    ids=["fp32", "fp32-dist", "bf16", "bf16-dist", "sgd"],
)
def test_state_is_so_many_bytes_for_each_parameter(changes, of_parameter):
    memory = stepped(small(vocab_size=1024, **changes)).memory()
    assert memory.setup.parameters == memory.peak.parameters
    size = memory.setup.parameters / of_parameter[0]
    for kind, expected in zip(("gradients", "optimizer_state"), of_parameter[1:], strict=True):
        for moment in (memory.setup, memory.peak):
            # padding of buffers, and Adam's step counts
            assert getattr(moment, kind) == pytest.approx(expected * size, rel=0.02)


def test_the_first_step_needs_what_every_step_needs():
    """Adam's moments, which the first one makes at its end, count from its beginning."""
    config = small(dtype="bf16", vocab_size=1024)
    first = stepped(config)
    third = stepped(config, steps=3)
    assert first.memory() == third.memory()
    assert first.flops == third.flops and first.matmuls == third.matmuls


def test_the_timeline_begins_after_set_up_and_passes_through_the_peak():
    memory = stepped(small()).memory()
    passes = [runs for runs, _ in memory.timeline[::2]]
    assert passes == ["batch", *["forward", "backward"] * 2, "optimizer"]
    assert max(moment.total for _, moment in memory.timeline) == memory.peak.total
    after_first_forward = memory.timeline[3][1]
    after_first_backward = memory.timeline[5][1]
    assert after_first_forward.activations > after_first_backward.activations


def test_large_tensors_are_named_by_their_modules():
    counter = stepped(small(vocab_size=2048))
    largest = counter.largest_tensors(100)
    assert [tensor.bytes for tensor in largest] == sorted(
        (tensor.bytes for tensor in largest), reverse=True
    )
    named = {(tensor.module, tensor.shape, tensor.kind) for tensor in largest}
    assert ("output_layer", (32, 2048), "activations") in named
    assert ("decoder.layers.1.mlp.linear_fc1", (32, 128), "activations") in named


# ---------------------------------------------------------------------------- what only a CPU keeps


def kept_by(function, *inputs, dtype=torch.bfloat16):
    """(bytes that are alive after a call, bytes of those on a CPU only) with inputs [4, 16, 8]."""
    tensors = [torch.randn(4, 16, 8, dtype=dtype, requires_grad=True) for _ in range(inputs[0])]
    with counting() as counter:
        counter._memory.runs = live_bytes.FORWARD
        # made here, so that they are seen to be gone or not
        hidden = [tensor * 1 for tensor in tensors]
        output = function(*hidden)
        del hidden
        changes = counter._memory.changes
        step = live_bytes.StepMemory(changes=changes, start=0, peak=len(changes))
        assert output.requires_grad
        return alive(counter), live_bytes.cpu_only_at_peak(step)


ELEMENTS = 4 * 16 * 8
ROWS = 4 * 16


@pytest.mark.parametrize(
    "function, inputs, dtype, on_a_gpu",
    [
        # the input, the output, and a number a row
        (lambda x: F.rms_norm(x, (8,)), 1, torch.bfloat16, 2 * 2 * ELEMENTS + 4 * ROWS),
        (lambda x: F.rms_norm(x, (8,)), 1, torch.float32, 2 * 4 * ELEMENTS + 4 * ROWS),
        # the output and a mask of bytes
        (lambda x: F.dropout(x, 0.5), 1, torch.bfloat16, (2 + 1) * ELEMENTS),
        # queries, keys, values, the output, and a number a query
        (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5),
            3,
            torch.bfloat16,
            4 * 2 * ELEMENTS + 4 * ROWS,
        ),
        # layer norm is one kernel on a CPU too: input, output, two numbers a row
        (lambda x: F.layer_norm(x, (8,)), 1, torch.float32, 2 * 4 * ELEMENTS + 8 * ROWS),
    ],
    ids=["rms norm in bf16", "rms norm in fp32", "dropout", "attention", "layer norm"],
)
def test_what_a_cpu_keeps_beyond_the_fused_kernels_is_apart(function, inputs, dtype, on_a_gpu):
    kept, cpu_only = kept_by(function, inputs, dtype=dtype)
    assert kept - cpu_only == on_a_gpu


# ------------------------------------------------------------------------- FLOP and matrix products


def test_flop_are_those_of_torchs_counter():
    """It has no formula for attention on a CPU."""
    config = small()
    with opened(config) as pg:
        batch = share(uneven(config, 0), config, pg)
        step = mf.step_fn("gpt")
        with FlopCounterMode(display=False) as theirs:
            mf.train_step(mf.setup(config, pg), batch, step)
    ours = stepped(config)
    micro_batches, layers, heads, length, size = 2, 2, 4, 32, 8
    products = 2 * heads * length * length * size
    # two forward, five backward
    attention = micro_batches * layers * (2 + 5) * products
    assert ours.flops == theirs.get_total_flops() + attention
    assert ours.attention_calls == micro_batches * layers
    # each of four matrices of a layer and the output layer: forward, and two backward
    assert ours.matmuls == micro_batches * (4 * layers + 1) * 3


def test_recomputation_is_counted():
    once = stepped(small())
    twice = stepped(small(recompute=mf.RecomputeConfig(granularity="full")))
    assert twice.matmuls == once.matmuls + 2 * 4 * 2
    assert twice.flops > once.flops
    assert twice.memory().peak.activations < once.memory().peak.activations


def test_attention_that_ends_at_the_last_key_runs_under_torchs_counter():
    """As it does under context parallelism. torch makes no causal bias while a mode looks on."""
    query, key, value = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    expected = F.scaled_dot_product_attention(query, key, value, causal_lower_right(4, 6))
    with FlopCounterMode(display=False):
        bias = causal_to_the_last(4, 6)
        assert torch.equal(expected, F.scaled_dot_product_attention(query, key, value, bias))


# ---------------------------------------------------------------------------------------- messages


def messages_of(send, parallel=None, world_size=8):
    with fake_world(world_size, 0):
        groups = mf.build_groups(parallel or mf.ParallelConfig(tp=2, pp=2), world_size)
        with mf.init_groups(groups) as pg, counting() as counter:
            send(pg)
            return counter.messages(pg)


# newer versions of torch call two of them by other names
@pytest.mark.filterwarnings("ignore:`torch.distributed.:FutureWarning")
def test_every_collective_is_counted_over_its_group():
    def send(pg):
        four = torch.zeros(4)
        eight = torch.zeros(8)
        dist.all_reduce(four, group=pg.tp)
        dist.all_reduce(four, group=pg.dp, async_op=True).wait()
        dist.all_gather_into_tensor(eight, four, group=pg.tp)
        dist.all_gather([torch.zeros(4), torch.zeros(4)], four, group=pg.tp)
        dist.reduce_scatter_tensor(four, eight, group=pg.tp)
        dist.broadcast(four, src=0, group=pg.mp)
        dist.all_to_all_single(eight, torch.zeros(8), group=pg.dp)
        dist.barrier(group=pg.tp)
        peer = dist.get_process_group_ranks(pg.pp)[1]
        dist.send(four, peer, group=pg.pp)
        # torch's own group of all ranks, as megatron-core uses it between two stages
        dist.irecv(four, peer).wait()
        operations = [
            dist.P2POp(dist.isend, four, peer, pg.pp),
            dist.P2POp(dist.irecv, eight, peer, pg.pp),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    found = messages_of(send)
    by_collective = {kind: dict(of_kind.by_collective) for kind, of_kind in found.items()}
    assert {kind: sums for kind, sums in by_collective.items() if sums} == {
        "tp": {"all_reduce": 16, "all_gather": 32 + 32, "reduce_scatter": 32},
        "dp": {"all_reduce": 16, "all_to_all": 32},
        "mp": {"broadcast": 16},
        "pp": {"send": 32, "recv": 16 + 32},
    }
    assert found["tp"].count == 4 and found["tp"].bytes == 112
    assert found["pp"].count == 4


def test_a_group_of_one_rank_sends_nothing_and_groups_of_the_same_ranks_are_the_first_of_them():
    def send(pg):
        dist.all_reduce(torch.zeros(4), group=pg.cp)
        dist.all_reduce(torch.zeros(4), group=pg.world)

    found = messages_of(send, mf.ParallelConfig(tp=2), world_size=2)
    counted = {kind: of_kind.count for kind, of_kind in found.items() if of_kind.count}
    assert counted == {"tp": 1}
    assert attrs.asdict(found["cp"]) == {"count": 0, "bytes": 0, "by_collective": {}}
