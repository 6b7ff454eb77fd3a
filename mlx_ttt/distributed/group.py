"""How a process that `mlx.launch` or `mpirun` has started joins the others."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import mlx.core as mx

from ..errors import DistributedError
from .exchange import all_max, all_sum, wait
from .peers import Peers, links

Group = mx.distributed.Group

_STARTED_BY = ("MLX_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # set by mlx.launch, Open MPI, MPICH
INIT_LIMIT = 30.0  # seconds for MLX to connect processes that are all there

_LOST = ("[ring]", "[jaccl]", "[mpi]")  # how MLX's errors about connections begin


def started() -> bool:
    """Whether this process is one of several that were started together."""
    return any(name in os.environ for name in _STARTED_BY)


@contextlib.contextmanager
def joined() -> Iterator[Group | None]:
    """The group of all processes that were started together; None where this one is alone.

    While the context is open, the neighbours are watched: if one is lost, this process ends with one line on stderr and
    status 2. Leaving it with an exception, SystemExit and KeyboardInterrupt included, ends the other processes, too.

    Raises:
        DistributedError: the others do not come, or one is lost.
    """
    if not started():
        yield None
        return
    found = links(os.environ)
    peers = Peers(found) if found is not None and found.size > 1 else None
    goodbye = False
    try:
        group = _init()
        yield group if group.size() > 1 else None
        if group.size() > 1:
            wait()  # a sum that only the others still need is ours as well
        goodbye = True
    except RuntimeError as error:
        if str(error).startswith(_LOST):
            raise DistributedError(f"a process of the group is lost ({error}); start all again") from error
        raise
    finally:
        if peers is not None:
            peers.close(goodbye)


def _init() -> Group:
    """MLX's group.

    If another process dies at this moment, MLX waits for it without end, and holds Python's lock. A signal ends its
    waiting: the system call fails, and MLX raises an error.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
        return mx.distributed.init()
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, INIT_LIMIT, 1.0)
    try:
        return mx.distributed.init()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def any_of(flag: bool, group: Group | None) -> bool:
    """Whether the flag is set on any machine. All must ask at the same place: whether to stop, say."""
    if group is None:
        return flag
    return bool(all_max(mx.array(float(flag)), group).item())


def as_first(sampler: Callable[[mx.array], mx.array], group: Group | None) -> Callable[[mx.array], mx.array]:
    """A sampler that returns on every machine what it returns on the first.

    Machines have random numbers of their own, and different chips round differently. Texts that part would be worse
    than wrong: machines would wait for each other.
    """
    if group is None:
        return sampler

    def sample(logprobs: mx.array) -> mx.array:
        # The product, not zeros: it must wait for the log-probabilities on all machines, so that this sum comes after
        # those which they are made of.
        return all_sum(sampler(logprobs) * int(group.rank() == 0), group)

    return sample
