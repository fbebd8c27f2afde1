"""No rank of a generation waits for ever over NCCL, which a CPU's gloo cannot show.

Each rank's part of a generation runs here alone, with a `dist` that only records what is started.
A small model of NCCL then runs the recorded calls of all ranks against each other:

- What a rank starts over one communicator runs in the order of the starts.
- A message ends only when both its ranks have reached it, a broadcast when all have.
- A group's messages have a communicator for each pair of ranks, which both make when they first
  use it; or, if the process groups were made for a device (`device_id`), one with everything else.
"""

from collections import Counter
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from unittest import mock

import attrs
import pytest
import torch
from attrs import define, field, frozen

import megafn as mf
from megafn.pure.layout import coordinates
from megafn.runtime.generation import encoding, generate, stage_messages

VOCABULARY = 8
STEPS = 3
STOP = 1


@frozen
class Group:
    name: str
    ranks: tuple[int, ...]

    def size(self):
        return len(self.ranks)


@frozen
class Call:
    """Something started on a communicator: a message between two ranks, or a broadcast."""

    group: str
    ranks: tuple[int, ...]
    # of a message: from whom to whom; (): a broadcast
    way: tuple[int, ...] = ()
    # whether what the device computes afterwards waits for it
    is_awaited: bool = False


@frozen
class HostWait:
    """The process stops until the call with this number in its record has ended."""

    number: int


@define
class Recorded:
    """A `torch.distributed` that does nothing: the calls of one rank, in their order."""

    rank: int
    stops: Callable[[int], bool]
    calls: list[Call | HostWait] = field(factory=list)
    broadcasts: int = 0
    group: SimpleNamespace = SimpleNamespace(WORLD=Group("default", ()))
    Work: type = object

    def get_process_group_ranks(self, group):
        return list(group.ranks)

    def isend(self, tensor, peer, group):
        return self._start(self._message(group, (self.rank, peer)))

    def recv(self, tensor, peer, group):
        message = self._message(group, (peer, self.rank))
        self._start(attrs.evolve(message, is_awaited=True))

    def broadcast(self, tensor, source, group, async_op=False):
        """Of tokens: the same ones on all ranks. Every row of the part stops, or none does."""
        if tensor.dtype == torch.float64:
            tensor[0] = STOP if self.stops(self.broadcasts) else 2
            tensor[1] = 0.0
        self.broadcasts += 1
        work = self._start(Call(group.name, group.ranks, is_awaited=not async_op))
        if async_op:
            return work
        work.wait()  # what was received is looked at
        return None

    def _message(self, group, way):
        return Call(group.name, tuple(sorted(way)), way)

    def _start(self, call):
        number = len(self.calls)
        self.calls.append(call)
        return SimpleNamespace(
            wait=lambda: self.calls.append(HostWait(number)), is_completed=lambda: False
        )


class Stage:
    """A chunk that computes nothing."""

    def set_input_tensor(self, hidden):
        pass

    def __call__(self, tokens, *others, **named):
        return torch.zeros(tokens.size(1), tokens.size(0), VOCABULARY)


def recorded(parallel, world_size, rank, run, stops):
    """What `run(state)` starts on that rank of the layout."""
    groups = mf.build_groups(parallel, world_size)
    place = coordinates(groups, rank)
    (pipeline,) = [ranks for ranks in groups.pp if rank in ranks]
    everyone = tuple(range(world_size))
    pp = Group("pp", pipeline)
    # groups of the same ranks are one
    world = pp if pipeline == everyone else Group("world", everyone)
    dist = Recorded(rank=rank, stops=stops)
    pg = SimpleNamespace(
        groups=groups,
        rank=rank,
        place=place,
        device=torch.device("cpu"),
        pp=pp,
        world=world,
        is_first_stage=place.pp == 0,
        is_last_stage=place.pp == parallel.pp - 1,
    )
    model = mf.ModelConfig(
        num_layers=12, hidden_size=8, num_attention_heads=1, seq_length=64, vocab_size=VOCABULARY
    )
    config = mf.TrainConfig(
        model=model, parallel=parallel, micro_batch_size=1, global_batch_size=1, train_iters=1
    )
    chunks = [Stage() for _ in range(parallel.vpp)]
    state = SimpleNamespace(pg=pg, config=config, chunks=chunks)
    with (
        mock.patch.object(stage_messages, "dist", dist),
        mock.patch.object(generate, "dist", dist),
        mock.patch.object(encoding, "dist", dist),
        mock.patch.object(generate, "last_logits", lambda hidden, *_: hidden[-1]),
    ):
        run(state)
    return dist.calls


def decode(prompts):
    def run(state):
        config = mf.GenerationConfig(max_new_tokens=STEPS, temperature=0.0, stop_token_ids=(STOP,))
        rows = [(3, 4)] * prompts
        output = generate._Output(
            config=config, tokens=[[] for _ in rows], logprobs=[[] for _ in rows]
        )
        generate._decode(state, rows, output)

    return run


def encode(prompts, stages):
    def run(state):
        functions = SimpleNamespace(
            first_decoder_stage=lambda parallel: stages,
            encode=lambda chunk, tokens, mask: torch.zeros(*tokens.shape[::-1], 8),
        )
        encoding.encode([[(3, 4)]] * prompts, functions, state)

    return run


# ------------------------------------------------------------------------------- a model of NCCL


@define
class Progress:
    """How far a rank has come: which of its calls were launched, run, and have ended."""

    calls: list[Call | HostWait]
    launched: int = 0
    running: set[int] = field(factory=set)
    ended: set[int] = field(factory=set)

    @property
    def is_done(self):
        return self.launched == len(self.calls) == len(self.ended)


def communicator(call, for_a_device):
    if call.way and not for_a_device:
        return (call.group, call.ranks)
    return (call.group,)


def deadlock(records, for_a_device):
    """What each rank is stuck at, or None if all come to their end."""
    ranks = [Progress(record) for record in records]
    moved = True
    while moved:
        moved = False
        for rank in ranks:
            moved |= launch(rank, ranks, for_a_device)
            moved |= start(rank, for_a_device)
        moved |= end(ranks)
    if all(rank.is_done for rank in ranks):
        return None
    return [
        [call for number, call in enumerate(rank.calls) if number not in rank.ended][:2]
        for rank in ranks
    ]


def launch(rank, ranks, for_a_device):
    """The process calls what it can before it has to wait."""
    before = rank.launched
    while rank.launched < len(rank.calls):
        call = rank.calls[rank.launched]
        if isinstance(call, HostWait):
            if call.number not in rank.ended:
                break
            rank.ended.add(rank.launched)
        elif not is_made(communicator(call, for_a_device), call, ranks, for_a_device):
            break
        rank.launched += 1
    return rank.launched > before


def is_made(name, call, ranks, for_a_device):
    """Whether every rank of a communicator has come to a first use of it, and so makes it."""
    if for_a_device or not call.way:
        return True  # made with the groups, or by the collectives before a generation
    return all(
        any(
            isinstance(reached, Call) and communicator(reached, for_a_device) == name
            for reached in ranks[other].calls[: ranks[other].launched + 1]
        )
        for other in call.ranks
    )


def start(rank, for_a_device):
    """On the device a call runs after those of its communicator, and after what was awaited."""
    busy = set()
    has_started = False
    for number in range(rank.launched):
        call = rank.calls[number]
        if number in rank.ended:
            continue
        name = communicator(call, for_a_device)
        if number not in rank.running and name not in busy:
            rank.running.add(number)
            has_started = True
        busy.add(name)
        if call.is_awaited:
            break
    return has_started


def end(ranks):
    """End what runs on all of its ranks; the n-th of a kind meets the n-th of another rank."""
    reached = Counter()
    places = {}
    for index, rank in enumerate(ranks):
        seen = Counter()
        for number, call in enumerate(rank.calls):
            if isinstance(call, HostWait):
                continue
            kind = (call.group, call.ranks, call.way)
            key = (*kind, seen[kind])
            seen[kind] += 1
            if number in rank.running:
                reached[key] += 1
                places.setdefault(key, []).append((index, number))
    has_ended = False
    for key, count in reached.items():
        if count == len(key[1]):
            for index, number in places[key]:
                ranks[index].running.discard(number)
                ranks[index].ended.add(number)
            has_ended = True
    return has_ended


# --------------------------------------------------------------------------------------- the tests


def never(broadcast):
    return False


def some(broadcast):
    return broadcast % 3 == 1


def records_of(parallel, world_size, run, stops=never):
    return [recorded(parallel, world_size, rank, run, stops) for rank in range(world_size)]


@pytest.mark.parametrize("for_a_device", [False, True], ids=["pairs", "one"])
@pytest.mark.parametrize("pp, vpp", list(product((2, 3, 4), (1, 2, 3))))
def test_the_stages_of_a_generation_never_wait_for_each_other(pp, vpp, for_a_device):
    """With one prompt, fewer than stages, and as many; with and without replicas."""
    parallel = mf.ParallelConfig(pp=pp, vpp=vpp)
    for prompts, replicas, stops in product((1, pp - 1, pp), (1, 2), (never, some)):
        records = records_of(parallel, pp * replicas, decode(prompts), stops)
        assert deadlock(records, for_a_device) is None


@pytest.mark.parametrize("for_a_device", [False, True], ids=["pairs", "one"])
def test_the_stages_of_an_encoder_never_wait_for_each_other(for_a_device):
    for pp, stages in ((2, 1), (4, 2), (4, 3)):
        records = records_of(mf.ParallelConfig(pp=pp), pp, encode(pp, stages))
        assert deadlock(records, for_a_device) is None


def one_group(pg, *, from_last_stage):
    return pg.pp


@pytest.mark.parametrize(
    "pp, vpp, for_a_device", [(2, 2, False), (2, 2, True), (3, 2, True), (2, 1, True)]
)
def test_over_one_communicator_they_would(pp, vpp, for_a_device):
    """So the model of NCCL finds what the communicators are there for."""
    parallel = mf.ParallelConfig(pp=pp, vpp=vpp)
    with mock.patch.object(stage_messages, "_group_of_messages", one_group):
        records = records_of(parallel, pp, decode(pp))
    assert deadlock(records, for_a_device) is not None
