"""How a command ends that cannot do its work: its exit code, and one sentence on standard error.

Of several processes one prints the sentence: rank zero. Most errors are the same on every rank,
before the processes have met and after (see `megafn.runtime.parallel.object_collectives`), and the
launcher ends all processes when the first has ended. So a rank other than zero waits for rank
zero to print and for the launcher to end it. It prints the sentence itself if that does not
happen, because the error is its own.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

BAD_INPUT = 2
# As shells report a process that SIGINT or SIGPIPE has ended.
INTERRUPTED = 130
OUTPUT_CLOSED = 141

# Ranks start and import at different speeds: the slowest has so long to print first.
SECONDS_FOR_RANK_ZERO = 10.0


def report(error: ValueError | OSError) -> None:
    """Print an error as a sentence: on rank zero, and on another rank if rank zero does not."""
    sentence = _sentence(error)
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"megafn: {sentence}", file=sys.stderr, flush=True)
        _tell_torchrun(sentence, time.time())
        return
    sentence = f"rank {rank}: {sentence}"
    # Told before the wait: rank zero may end of the connection that this rank has closed, and then
    # the launcher ends this rank. Dated after it: an error of rank zero's own comes first.
    _tell_torchrun(sentence, time.time() + SECONDS_FOR_RANK_ZERO)
    time.sleep(SECONDS_FOR_RANK_ZERO)
    print(f"megafn: {sentence}", file=sys.stderr, flush=True)


def _sentence(error: ValueError | OSError) -> str:
    notes = [f"({note})" for note in getattr(error, "__notes__", ())]
    return " ".join([_text(error), *notes])


def _text(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror
    return str(error)


def _tell_torchrun(sentence: str, seconds: float) -> None:
    """Have torchrun repeat the sentence where its own report ends, 30 lines below ours.

    torchrun names a file to each process that it starts. What it holds is described at
    `ChildFailedError` in torch.distributed.elastic.multiprocessing.errors.
    seconds: since 1970, when it happened; torchrun takes the earliest error for the cause.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    error = {"message": sentence, "extraInfo": {"timestamp": str(int(seconds))}}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": error}, file)
    except OSError:
        pass  # the sentence has been printed


def output_is_closed() -> bool:
    """Whether standard output is a pipe whose reader has left."""
    if sys.stdout is None:  # Python was started without one
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    closed = select.POLLERR | select.POLLHUP
    return any(event & closed for _, event in poll.poll(0))


def flush_or_discard_output() -> None:
    """Write what is in the buffer of standard output, or drop it: Python would report it later."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
