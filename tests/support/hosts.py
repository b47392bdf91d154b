"""Two hosts on one machine: network namespaces connected by a cable, each a node of Ray."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from processes import wait_until

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_CLONE_NEWNET = 0x40000000
# An unreachable node counts as lost after some 10 s; the default is half a minute.
_HEALTH_CHECK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 5,
}


class CannotMakeHostsError(Exception):
    """Network namespaces are not available here."""


class Hosts:
    """The first host, to which the calling thread moves, and the second, which has room for two
    actors that require `prefill`.

    Raises:
        CannotMakeHostsError: the system has no namespaces, or does not let this process make them.
    """

    def __init__(self) -> None:
        self._names = [f"baton-{os.getpid()}-{end}" for end in "ab"]
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self._nodes: list[subprocess.Popen | None] = [None, None]
        # Names of sockets must be short.
        self._scratch = tempfile.TemporaryDirectory(prefix="baton-", dir="/tmp")
        try:
            for name in self._names:
                _ip("netns", "add", name)
            first, second = self._names
            _ip("-n", first, "link", "add", "cable", "type", "veth",
                "peer", "name", "cable", "netns", second)  # fmt: skip
            for name, address in zip(self._names, ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                _ip("-n", name, "link", "set", "lo", "up")
            self.join()
            for name in self._names:
                _ip("-n", name, "link", "set", "cable", "up")
            with open(f"/run/netns/{first}") as there:
                _enter(there.fileno())
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            reason = getattr(error, "stderr", None) or str(error)
            raise CannotMakeHostsError(f"ip netns: {reason.strip()}") from error

    def start(self, host: int) -> None:
        """Start Ray on host 0, the head, or 1."""
        options = [f"--node-ip-address={ADDRESSES[host]}", "--num-cpus=1"]
        options += [f"--object-store-memory={80 * 2**20}", "--block"]
        if host == 0:
            options += ["--head", "--include-dashboard=false"]
            options += [f"--system-config={json.dumps(_HEALTH_CHECK)}"]
        else:
            options += [f"--address={ADDRESSES[0]}:6379", '--resources={"prefill": 2}']
        command = [str(Path(sys.executable).parent / "ray"), "start", *options]
        with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
            self._nodes[host] = node = subprocess.Popen(
                ["ip", "netns", "exec", self._names[host], *command],
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    # Memory use of other programs must not end an actor of a test.
                    "RAY_memory_monitor_refresh_ms": "0",
                    # A place where no other program looks for a cluster to join.
                    "RAY_TMPDIR": self._scratch.name,
                },
            )

            def started() -> bool:
                text = Path(log.name).read_text()
                assert node.poll() is None, f"host {host} has no Ray: {text[-2000:]}"
                return "Ray runtime started" in text

            wait_until(started, f"Ray does not start on host {host}", seconds=180)

    def cut(self) -> None:
        """Take the link down."""
        _ip("-n", self._names[0], "link", "set", "cable", "down")

    def join(self) -> None:
        """Take the link up again."""
        _ip("-n", self._names[0], "link", "set", "cable", "up")

    def received_bytes(self) -> int:
        """Bytes that have come over the link to the first host."""
        told = _ip("-n", self._names[0], "-json", "-statistics", "link", "show", "dev", "cable")
        return json.loads(told)[0]["stats64"]["rx"]["bytes"]

    def processes(self, host: int) -> set[int]:
        """The processes on a host, without this one."""
        return set(map(int, _ip("netns", "pids", self._names[host]).split())) - {os.getpid()}

    def wait_until_empty(self, host: int) -> None:
        """Wait until a host has no process."""
        wait_until(lambda: not self.processes(host), f"processes are left on host {host}")
        node = self._nodes[host]
        if node is not None:
            node.wait()

    def close(self) -> None:
        """End Ray on both hosts, check that nothing remains, and remove the hosts."""
        _enter(self._home)
        os.close(self._home)
        try:
            # A node that is cut off ends only after a minute.
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                self.join()
            for host in (1, 0):
                node = self._nodes[host]
                if node is not None:
                    node.terminate()
                    self.wait_until_empty(host)
        finally:
            for name in self._names:
                with contextlib.suppress(OSError, subprocess.CalledProcessError):
                    _ip("netns", "delete", name)
            self._scratch.cleanup()


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Both hosts with Ray, and the calling thread connected to it on the first."""
    import ray

    hosts = Hosts()
    try:
        hosts.start(0)
        hosts.start(1)
        ray.init(
            f"{ADDRESSES[0]}:6379", _node_ip_address=ADDRESSES[0], logging_level="ERROR",
            log_to_driver=False,
        )  # fmt: skip
        yield hosts
    finally:
        ray.shutdown()
        hosts.close()


def _ip(*words: str) -> str:
    return subprocess.run(
        ["ip", *words], check=True, capture_output=True, text=True, timeout=10
    ).stdout


def _enter(namespace: int) -> None:
    """Move the calling thread, and threads that it starts later, into a network namespace."""
    # os.setns needs Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
