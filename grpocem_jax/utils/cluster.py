"""How the processes of a program find each other: JAX's distributed runtime, and who says so.

SLURM, Open MPI, Kubernetes and TPU pods are detected by JAX; elsewhere the address of process 0,
the number of processes and the index of each are given, by flags or by environment variables.
"""

import atexit
import contextlib
import dataclasses
import functools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import clusters, distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.processes import ALONE, Processes, lost

WAIT_S = 600
"""Seconds that a process waits for others that are alive: to start, and at each exchange."""

DEAD_AFTER_S = 60
"""Seconds without a sign of life after which a process counts as dead."""

LARGEST_MS = 2**31 - 1
AXIS = "process"

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""What says, without flags, where process 0 is, how many there are, and which this is."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among others.

    Attributes:
      coordinator: ``HOST:PORT`` of process 0.
      count: number of processes.
      index: of this one, from 0.
      devices: ids of its local devices; None for all.
    """

    coordinator: str
    count: int
    index: int
    devices: list[int] | None = None


def find(
    wanted: bool | None = None,
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> Place | None:
    """Finds out whether this is one of several processes.

    Args:
      wanted: whether there are several; None where the environment is to say so.
      address: ``HOST:PORT`` of process 0, or None for what the environment says.
      count: number of processes, or None.
      index: of this process, or None.

    Returns:
      the place, or None of a single process.

    Raises:
      InputError: something is missing, or does not fit the rest.
    """
    names = ("--coordinator_address", "--num_processes", "--process_id")
    given = dict(zip(names, (address, count, index), strict=True))
    flagged = [name for name, value in given.items() if value is not None]
    if wanted is False:
        if flagged:
            raise InputError(f"{flagged[0]} is for several processes; leave --nodistributed out.")
        return None
    environment = [os.environ.get(name) for name in VARIABLES]
    address = environment[0] if address is None else address
    count = _number(VARIABLES[1], environment[1]) if count is None else count
    index = _number(VARIABLES[2], environment[2]) if index is None else index
    if index is None:  # of an indexed job of Kubernetes, such as those of a JobSet
        name = "JOB_COMPLETION_INDEX"
        index = _number(name, os.environ.get(name)) if address is not None else None
    if not (wanted or flagged or address is not None or _launched()):
        return None
    devices = None
    if None in (address, count, index):
        address, count, index, devices = _detect(address, count, index)
    missing = [
        f"{name} (or {variable})"
        for name, variable, value in zip(names, VARIABLES, (address, count, index), strict=True)
        if value is None
    ]
    if address is None or count is None or index is None:
        raise InputError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: several "
            "processes need the HOST:PORT of process 0, how many there are and which this is, and "
            "no SLURM, Open MPI or other launcher is found that says so."
        )
    if count < 1:
        raise InputError(f"--num_processes={count}: must be at least 1.")
    if not 0 <= index < count:
        raise InputError(
            f"--process_id={index} does not fit --num_processes={count}: the indices go from 0 to "
            f"{count - 1}, a different one in each process."
        )
    _split(address)
    return None if count == 1 else Place(address, count, index, devices)


def _number(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name}={text!r}: must be a whole number.") from None


def _launched() -> bool:
    """Whether a launcher of several processes started this one."""
    sizes = [os.environ.get("OMPI_COMM_WORLD_SIZE")]
    if "SLURM_STEP_NODELIST" in os.environ and "SLURM_PROCID" in os.environ:
        sizes.append(os.environ.get("SLURM_NTASKS"))
    return any(size is not None and size.isdecimal() and int(size) > 1 for size in sizes)


def _detect(
    address: str | None, count: int | None, index: int | None
) -> tuple[str | None, int | None, int | None, list[int] | None]:
    """What JAX finds of what is not given."""
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            address, count, index, None, None, WAIT_S
        )
    except Exception as error:  # whatever asking a cluster's manager may raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--distributed: the launcher does not say which process this is ({reason}); give "
            "--coordinator_address, --num_processes and --process_id."
        ) from error
    devices = None if found[3] is None else [int(each) for each in found[3]]
    return found[0], found[1], found[2], devices


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"--coordinator_address={address!r}: must be HOST:PORT of process 0, with a port that "
            "is free there, such as 10.0.0.1:8476."
        )
    return host.strip("[]"), int(port)


def join(place: Place | None, *, wait_s: int = WAIT_S, dead_after_s: int = DEAD_AFTER_S) -> None:
    """Joins the other processes; before anything touches a device.

    Args:
      place: of `find`; None of a single process, which has none to join.
      wait_s: seconds to wait for the others, at least 1, now and at each exchange.
      dead_after_s: seconds without a sign of life after which a process counts as dead, at least
        10; the others end then.

    Raises:
      InputError: a limit out of range; process 0 cannot be reached in this time, or its port is
        taken.
    """
    for name, value, least in (("wait_s", wait_s, 1), ("dead_after_s", dead_after_s, 10)):
        if not least <= value <= 10**6:
            raise InputError(f"--{name}={value}: must be from {least} to 1000000 seconds.")
    if place is None:
        return
    started = time.monotonic()
    if place.index == 0:
        _check_port(place)
    else:
        _reach(place, wait_s)
    # Signals are caught by the commands themselves.
    jax.config.update("jax_enable_preemption_service", False)
    left = max(5.0, wait_s - (time.monotonic() - started))
    sentence = (
        f"--num_processes={place.count}: not all of them have come to {place.coordinator} within "
        f"{wait_s} s (--wait_s); see that each is started, with the same --num_processes and "
        "another --process_id."
    )
    with _ending_after(left, sentence):
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(left) + 60,
            heartbeat_timeout_seconds=dead_after_s,
            shutdown_timeout_seconds=wait_s,
        )
    _JOINED.append(wait_s)
    _WITNESSES.append(_Witness(place))
    watch = _Watch()
    atexit.register(watch.close)
    threading.Thread(target=watch.run, daemon=True).start()


_JOINED: list[int] = []
_WITNESSES: list["_Witness"] = []
_HERE: list[Processes] = []


def here() -> Processes:
    """The processes of this program, `ALONE` where JAX's distributed runtime was not started."""
    if not jax.distributed.is_initialized():
        return ALONE
    if not _HERE:
        runtime = _Runtime((_JOINED or [WAIT_S])[0])
        _HERE.append(Processes(jax.process_index(), jax.process_count(), runtime))
    return _HERE[0]


class _Runtime:
    """JAX's: barriers of its coordination service, and programs over one device of each process.

    The barriers have a time limit, which programs have not, and all processes enter a program
    within milliseconds of each other, as gloo's, which has one of 30 s, wants it.
    """

    def __init__(self, wait_s: int, members: range | None = None):
        self._wait_s, self._members = wait_s, members

    def meet(self, name: str) -> None:
        client: Any = distributed.global_state.client
        if self._members is None:
            client.wait_at_barrier(name, 1000 * self._wait_s)
        else:
            own = f"{name}/from_{self._members.start}"
            client.wait_at_barrier(own, 1000 * self._wait_s, list(self._members))

    def among(self, members: range) -> "_Runtime":
        return _Runtime(self._wait_s, members)

    def gather(self, row: np.ndarray) -> np.ndarray:
        return self._run(_same, row)

    def total(self, row: np.ndarray) -> np.ndarray:
        return self._run(_sum, row)

    def _run(self, program: Any, row: np.ndarray) -> np.ndarray:
        parts = NamedSharding(self._mesh, PartitionSpec(AXIS))
        shape = (self._mesh.size, *row.shape)
        given = jax.make_array_from_process_local_data(parts, row[None], shape)
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        return np.asarray(program(given, everywhere).addressable_data(0))

    @functools.cached_property
    def _mesh(self) -> Mesh:
        firsts: dict[int, jax.Device] = {}
        for device in jax.devices():
            firsts.setdefault(device.process_index, device)
        members = range(len(firsts)) if self._members is None else self._members
        return Mesh(np.array([firsts[i] for i in members]), (AXIS,))


@functools.partial(jax.jit, static_argnums=1)
def _same(x: jax.Array, place: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, place)


@functools.partial(jax.jit, static_argnums=1)
def _sum(x: jax.Array, place: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x.sum(0), place)


def _check_port(place: Place) -> None:
    """Refuses a port at which process 0 cannot be reached; JAX would end without a sentence."""
    port = _split(place.coordinator)[1]
    family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
    try:
        with socket.socket(family) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("", port))
    except OSError as error:
        if socket.has_ipv6 and not os.path.exists("/proc/net/if_inet6"):
            return  # no IPv6 on this machine; JAX knows what to do
        raise InputError(
            f"--coordinator_address={place.coordinator}: process 0 cannot listen at port {port} "
            f"({error.strerror}); give another port, the same in every process."
        ) from None


def _reach(place: Place, wait_s: int) -> None:
    """Waits until process 0 listens."""
    host, port = _split(place.coordinator)
    until = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        if time.monotonic() >= until:
            raise InputError(
                f"--coordinator_address={place.coordinator}: process 0 could not be reached within "
                f"{wait_s} s (--wait_s; {reason}); see that it is started, on that host, and that "
                "no firewall is in between."
            )
        time.sleep(min(0.2, max(0.0, until - time.monotonic())))


@contextlib.contextmanager
def _ending_after(seconds: float, sentence: str) -> Iterator[None]:
    """Ends the process with a sentence where the block takes longer; nothing else can end it."""
    timer = threading.Timer(seconds, end, (sentence,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end(sentence: str) -> NoReturn:
    """Ends the process with a sentence and status 2, without a word to the other processes."""
    for witness in _WITNESSES:
        witness.close()
    with contextlib.suppress(OSError):
        os.write(2, f"error: {sentence}\n".encode())
    os._exit(2)


class _Witness:
    """Says a sentence where this process is ended in a way that leaves it none.

    JAX's runtime aborts a process where another one is gone, as a rule before `_Watch` can say so.
    The witness is a process that waits for the end of this one, and knows whether it was orderly.
    """

    CODE = (
        "import signal, sys\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
        "if not sys.stdin.buffer.read(1):\n"
        "    print(sys.argv[1], file=sys.stderr)\n"
    )

    def __init__(self, place: Place):
        sentence = (
            f"error: process {place.index} of {place.count} was ended by a signal, or by JAX "
            "because another process is gone; start the same command again in every process, which "
            "continues the run from its last checkpoint."
        )
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", self.CODE, sentence],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
        )
        atexit.register(self.close)

    def close(self) -> None:
        """Lets it go without a word."""
        with contextlib.suppress(OSError, ValueError):
            if self._child.stdin is not None:
                self._child.stdin.write(b".")
                self._child.stdin.close()


class _Watch:
    """Ends this process, with a sentence, where another one is lost while it computes.

    The runtime would do so itself, with a stack trace.
    """

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def run(self) -> None:
        client: Any = distributed.global_state.client
        while not self.closed:
            try:
                # Nobody lets the others pass: it ends with the runtime, or with a process.
                client.wait_at_barrier("grpocem_jax/end", LARGEST_MS)
                return
            except jax.errors.JaxRuntimeError as error:
                if self.closed:
                    return
                if "DEADLINE_EXCEEDED" not in str(error):
                    end(lost(error))
