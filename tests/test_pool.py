import os
import signal
import subprocess
import time

import pytest
import torch
import torch.distributed as dist

from pool import PoolError, run_script


def all_reduce(start):
    dist.init_process_group("gloo")
    try:
        x = torch.full((3,), start + dist.get_rank())
        dist.all_reduce(x)
        return x
    finally:
        dist.destroy_process_group()


def identity():
    return {
        name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    }, torch.get_num_threads()


def pid():
    return os.getpid()


def fail_on(rank):
    dist.init_process_group("gloo")
    dist.barrier()  # all are connected: a peer that leaves is noticed at once
    if dist.get_rank() == rank:
        raise ArithmeticError(f"rank {rank} says no")
    dist.barrier()
    dist.destroy_process_group()


def fail_before_rendezvous(rank):
    if int(os.environ["RANK"]) == rank:
        raise ArithmeticError("no rendezvous")
    dist.init_process_group("gloo")


def hang():
    if os.environ["RANK"] == "1":
        time.sleep(1000)


def die():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def leave_process_group():
    dist.init_process_group("gloo")


def leave_rng_state():
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    get_cuda_rng_tracker().set_states({"x": torch.get_rng_state()})


def rng_tracker_states():
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return list(get_cuda_rng_tracker().get_states())


def leave_environment():
    os.environ["MEGAFN_LEFT"] = "1"


def read_environment():
    return os.environ.get("MEGAFN_LEFT"), os.environ.get("RANK")


def grown(tensor, *, by):
    tensor += by
    return {
        "tensor": tensor,
        "leaf": torch.ones(2, requires_grad=True),
        "bf16": torch.ones(2, dtype=torch.bfloat16),
    }


def test_ranks_talk_to_each_other_and_are_reused(pool):
    for n in (1, 2, 4):
        assert all(
            result.tolist() == [sum(range(7, 7 + n))] * 3 for result in pool(n, all_reduce, 7)
        )
    pids = pool(4, pid)
    assert len({*pids, os.getpid()}) == 5 and pool(2, pid) == pids[:2]


def test_every_rank_knows_its_place(pool):
    assert pool(3, identity) == [
        (
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "3",
                "MASTER_ADDR": "127.0.0.1",
            },
            1,
        )
        for rank in range(3)
    ]


def test_tensors_travel_as_copies(pool):
    x = torch.zeros(3)
    first, second = pool(2, grown, x, by=2)
    assert x.tolist() == [0, 0, 0] and first["tensor"].tolist() == second["tensor"].tolist() == [
        2,
        2,
        2,
    ]
    assert (
        first["leaf"].requires_grad
        and first["bf16"].dtype == torch.bfloat16
        and not first["tensor"].is_shared()
    )


def test_a_failure_shows_its_rank_and_traceback_and_the_pool_goes_on(pool):
    pids = pool(2, pid)
    with pytest.raises(
        PoolError,
        match=r"fail_on failed; rank 1 of 2: Traceback(.|\n)*in fail_on(.|\n)*"
        r"ArithmeticError: rank 1 says no",
    ):
        pool(2, fail_on, 1)
    assert pool(2, pid) == pids


def test_ranks_that_wait_for_a_failed_one_are_stopped(pool, monkeypatch):
    monkeypatch.setattr("pool.GRACE", 0.5)
    start = time.monotonic()
    with pytest.raises(
        PoolError,
        match=r"(?s)no rendezvous.*ranks \[0\] of 2: no answer within 0.5 s of that failure",
    ):
        pool(2, fail_before_rendezvous, 1)
    assert time.monotonic() - start < 10 and pool(2, all_reduce, 1)[0].tolist() == [3, 3, 3]


def test_a_hung_rank_ends_with_its_stack(pool):
    with pytest.raises(
        PoolError, match=r"(?s)ranks \[1\] of 2: no answer in 1 s; rank 1 stands at.*in hang"
    ):
        pool(2, hang, timeout=1)
    assert pool(2, all_reduce, 1)[0].tolist() == [3, 3, 3]


def test_a_dead_rank_is_told(pool):
    with pytest.raises(PoolError, match="rank 1 of 2: the worker died, exit code -9"):
        pool(2, die)
    assert pool(2, all_reduce, 1)[0].tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    "function, what",
    [
        (leave_process_group, "torch.distributed is still initialised"),
        (leave_rng_state, "RNG tracker is not as before"),
    ],
)
def test_what_is_left_behind_is_an_error(pool, function, what):
    with pytest.raises(PoolError, match=f"left behind: .*{what}"):
        pool(2, function)
    assert pool(2, rng_tracker_states) == [[], []] and pool(2, all_reduce, 1)[0].tolist() == [
        3,
        3,
        3,
    ]


def test_the_environment_is_restored(pool):
    pool(1, leave_environment)
    assert pool(1, read_environment) == [(None, "0")]


def test_scripts_run_in_fresh_processes():
    done = run_script(
        [
            "-c",
            "import os, sys; print(os.environ['OMP_NUM_THREADS'], os.environ['X']); sys.exit(3)",
        ],
        env={"X": "y"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "1 y\n", "")


def test_scripts_run_under_torchrun():
    done = run_script(
        [
            "-m",
            "timeit",
            "-n1",
            "-r1",
            "-s",
            "import os, sys",
            "sys.stdout.write(os.environ['RANK'] + '!')",
        ],
        nproc=2,
    )
    assert done.returncode == 0 and "0!" in done.stdout and "1!" in done.stdout


def test_a_script_that_hangs_is_killed_with_children_that_left_its_process_group():
    program = (
        "import subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(1000)']\n"
        "print(subprocess.Popen(sleep, start_new_session=True).pid, flush=True)\n"
        "time.sleep(1000)"
    )
    with pytest.raises(subprocess.TimeoutExpired) as hung:
        run_script(["-c", program], timeout=2)
    time.sleep(0.5)
    status = f"/proc/{int(hung.value.stdout)}/status"
    assert not os.path.exists(status) or "State:\tZ" in open(status).read()
