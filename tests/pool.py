"""Real processes for tests: a pool of workers that serves the whole session, and whole scripts.

megafn keeps no global state, so one worker can run hundreds of layouts one after another; the pool
checks after every call that nothing was left behind.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
GRACE = 10.0  # seconds that ranks may go on after another one failed


class PoolError(RuntimeError):
    """A rank failed, hung or died; the text holds its traceback."""


# --------------------------------------------------------------------------------- in the workers


def rng_states():
    """State of megatron-core's tensor-parallel RNG tracker, by name."""
    from megatron.core.tensor_parallel import random

    tracker = random._CUDA_RNG_STATE_TRACKER
    return (
        {}
        if tracker is None
        else {name: bytes(state.numpy()) for name, state in tracker.get_states().items()}
    )


def clear_leftovers(rng_before):
    """What the function left in the process, in words.

    Process groups are destroyed, so that the next call starts clean.
    """
    import torch
    from megatron.core import parallel_state

    found = []
    if torch.distributed.is_initialized():
        found.append("torch.distributed is still initialised")
        torch.distributed.destroy_process_group()
    if parallel_state.model_parallel_is_initialized():
        found.append("megatron's parallel_state is initialised")
        parallel_state.destroy_model_parallel()
    if rng_states() != rng_before:
        found.append("megatron's RNG tracker is not as before")
        from megatron.core.tensor_parallel import random

        random.get_cuda_rng_tracker().reset()
    if torch._C._len_torch_function_stack():
        found.append("a torch function mode is still active")
    if torch.cuda.current_device.__module__ != "torch.cuda":
        found.append("torch.cuda.current_device is still replaced")
    return found


def run_call(message):
    """(True, result, when) or (False, traceback text, when) of one pickled call.

    The clock is the same for all processes.
    """
    path, env, call = pickle.loads(message)
    sys.path[:] = path  # test modules are found as in the test process
    before = rng_states()
    with mock.patch.dict(os.environ, env):
        try:
            function, args, kwargs = pickle.loads(call)
            # plain pickle copies tensors into the bytes; multiprocessing's would share memory
            # through descriptors
            reply = True, pickle.dumps(function(*args, **kwargs)), time.monotonic()
        except BaseException:
            reply = False, traceback.format_exc(), time.monotonic()
    left = clear_leftovers(before)
    if left and reply[0]:
        reply = False, "left behind: " + "; ".join(left), reply[2]
    return reply


def work(connection, trace_path):
    """A worker's life: calls until the test process is gone."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module=r"megafn\b")  # ours are errors here too
    with open(trace_path, "w") as trace:
        faulthandler.register(signal.SIGUSR1, file=trace)  # says where a hung worker stands
        gc.freeze()  # what was imported is not looked at again
        with contextlib.suppress(EOFError):
            while True:
                connection.send(run_call(connection.recv_bytes()))
                # models in cycles hold their groups, whose threads wake 100 times a second
                gc.collect()


# ---------------------------------------------------------------------------- in the test process


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_worker(context, trace_path):
    ours, theirs = context.Pipe()
    # the fork server takes its environment and search path from here, the first time
    env = {
        "OMP_NUM_THREADS": "1",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
    }
    with mock.patch.dict(os.environ, env):
        process = context.Process(target=work, args=(theirs, trace_path))
        process.start()
    theirs.close()
    return process, ours


@contextlib.contextmanager
def worker_pool(size=8):
    """Yields `call(n, function, *args, timeout=120, **kwargs) -> [result of each of n ranks]`.

    `function` stands at module level and runs in n processes, n at most `size`, with RANK,
    LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set and no process group initialised.
    Results come back as copies.

    Raises PoolError with the traceback of the first rank that failed, and what the others did.
    Ranks that don't come back (within `timeout` seconds, or soon after another one failed) are
    killed; the next call starts fresh ones.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pool_preload"])
    workers = []
    folder = tempfile.TemporaryDirectory(prefix="megafn-pool-")

    def trace_path(rank):
        return Path(folder.name, str(rank))

    def stop():
        for process, _ in workers:
            process.kill()
        for process, connection in workers:
            process.join()
            connection.close()
        workers.clear()

    def stack(rank):
        """Where a worker stands now, as faulthandler tells it."""
        process, _ = workers[rank]
        file = trace_path(rank)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.2)
        return file.read_text()[-3000:] if file.exists() else ""

    def call(n, function, *args, timeout=120, **kwargs):
        if not 1 <= n <= size:
            raise ValueError(f"n = {n}: the pool has 1 to {size} workers")
        message = pickle.dumps((function, args, kwargs))
        while len(workers) < n:
            workers.append(start_worker(context, trace_path(len(workers))))
        port = str(free_port())
        for rank, (_, connection) in enumerate(workers[:n]):
            env = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(n),
                "LOCAL_WORLD_SIZE": str(n),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            # a dead worker: seen below
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.send_bytes(pickle.dumps((sys.path, env, message)))
        waiting = {connection: rank for rank, (_, connection) in enumerate(workers[:n])}
        results = [None] * n
        failures = []
        dead = []
        end = time.monotonic() + timeout
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    good, reply, when = connection.recv()
                except (EOFError, ConnectionResetError):
                    workers[rank][0].join(5)
                    good = False
                    reply = f"the worker died, exit code {workers[rank][0].exitcode}"
                    when = 0.0
                    dead.append(rank)
                if good:
                    results[rank] = pickle.loads(reply)
                else:
                    failures.append((when, f"rank {rank} of {n}: {reply}"))
                    end = min(end, time.monotonic() + GRACE)
        # the cause first: a death, then the earliest exception
        failures = [text for _, text in sorted(failures)]
        hung = sorted(waiting.values())
        if hung:
            why = (
                f"no answer within {GRACE:g} s of that failure"
                if failures
                else f"no answer in {timeout:g} s"
            )
            failures.append(
                f"ranks {hung} of {n}: {why}; rank {hung[0]} stands at\n{stack(hung[0])}"
            )
        if hung or dead:
            stop()
        if failures:
            brief = [
                text
                if text.startswith("ranks")
                else " ... ".join(text.splitlines()[:: len(text.splitlines()) - 1 or 1])
                for text in failures[1:]
            ]
            raise PoolError(
                "\n".join(
                    [f"{getattr(function, '__qualname__', function)} failed; {failures[0]}", *brief]
                )
            )
        return results

    try:
        yield call
    finally:
        stop()
        folder.cleanup()


def marked(mark):
    """Ids of the running processes whose environment holds `mark`.

    A process group would not do: torchrun gives each worker a session of its own.
    """
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "environ").read_bytes():
                yield int(entry.name)


def run_script(args, nproc=None, timeout=120, env=None):
    """Run Python on `args` in a fresh process, or in `nproc` processes under torchrun.

    args: a script and its arguments, or -c, -m and so on. Returns the CompletedProcess with stdout
    and stderr as text, whatever the exit code. After `timeout` seconds every process of it is
    killed and subprocess.TimeoutExpired raised, its text included.
    """
    launcher = (
        []
        if nproc is None
        else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    )
    command = [sys.executable, *launcher, *map(str, args)]
    mark = f"MEGAFN_TEST_RUN={uuid.uuid4().hex}"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        **(env or {}),
        "MEGAFN_TEST_RUN": mark.partition("=")[2],
    }
    process = subprocess.Popen(
        command,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as expired:
        kill_run(process, mark)
        expired.stdout, expired.stderr = process.communicate()
        expired.add_note(f"stdout:\n{expired.stdout[-4000:]}\nstderr:\n{expired.stderr[-4000:]}")
        raise
    except BaseException:
        kill_run(process, mark)
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def kill_run(process, mark):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
