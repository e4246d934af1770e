"""The coordinator (process 0's coordination service): its address, and connecting to it."""

import errno
import ipaddress
import os
import socket
import threading

import jax
from jax._src import distributed as _jax_distributed
from jax._src.distributed import global_state as _jax_state

from esolm_jax.errors import UserError
from esolm_jax.parallel.relay import Relay


def bind_address(address: str) -> dict[str, str]:
    """The address that the coordinator binds to, as an argument of jax.distributed.initialize.

    It is the given IP address, or the address of this host that the given name resolves to. Without
    such an address (see _addresses) the coordinator binds to all interfaces, as JAX does.
    JAX_COORDINATOR_BIND_ADDRESS overrides both.

    Raises:
      UserError: the port is in use (JAX's server would crash this process).
    """
    host, port = address.rsplit(":", 1)
    if not os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        for family, sockaddr in _addresses(host.strip("[]"), int(port)):
            if _can_bind(family, sockaddr, address):
                ip = f"[{sockaddr[0]}]" if family == socket.AF_INET6 else sockaddr[0]
                return {"coordinator_bind_address": f"{ip}:{port}"}
    _can_bind(socket.AF_INET6, ("", int(port)), address)
    return {}


def _can_bind(family: int, sockaddr: tuple, address: str) -> bool:
    """Whether this host has the socket address. UserError if its port is in use."""
    try:
        with socket.socket(family) as test:
            test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            test.bind(sockaddr)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS={address}: the port is in use on this host"
            ) from error
        return False  # an address of a proxy, or of another host
    return True


def _addresses(host: str, port: int) -> list[tuple[int, tuple]]:
    """Families and socket addresses of an IP address or a host name.

    Empty for a name that resolves to a loopback or link-local address here: many hosts give their
    own name such an address (127.0.1.1 on Debian), where other hosts get the real one.
    """
    is_name = False
    try:
        name = "127.0.0.1" if host == "localhost" else str(ipaddress.ip_address(host))
    except ValueError:
        name, is_name = host, True
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # no such name; idna refuses a label
        return []
    ips = [ipaddress.ip_address(sockaddr[0].partition("%")[0]) for *_, sockaddr in found]
    if is_name and any(ip.is_loopback or ip.is_link_local for ip in ips):
        return []
    return [(family, sockaddr) for family, *_, sockaddr in found]


def connect(timeout: float, **arguments) -> Relay | None:
    """jax.distributed.initialize, through a Relay except in process 0.

    Raises:
      UserError: it takes longer than `timeout`, or fails.
    """
    problems, relays = [], []
    make_client = _jax_distributed._jax.get_distributed_runtime_client

    def make_client_through_relay(address, index, *args, **kwargs):
        if index > 0:
            relays.append(Relay(address, index))
            address = relays[0].target
        return make_client(address, index, *args, **kwargs)

    def initialize():
        try:
            _jax_distributed._jax.get_distributed_runtime_client = make_client_through_relay
            # JAX's own timeout aborts the process with a stack trace, so it has to come later.
            jax.distributed.initialize(initialization_timeout=int(timeout) + 60, **arguments)
        except Exception as error:  # to be raised by the thread that waits
            problems.append(error)
        finally:
            _jax_distributed._jax.get_distributed_runtime_client = make_client

    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        for relay in relays:
            relay.stop()
        raise UserError(_why_not_connected(timeout))
    if problems:
        raise UserError(f"cannot join the other processes: {problems[0]}") from problems[0]
    for relay in relays:
        relay.joined()
    return relays[0] if relays else None


def _why_not_connected(timeout: float) -> str:
    """The reason why the connection failed."""
    index, address = _jax_state.process_id, _jax_state.coordinator_address
    if address is None:
        return f"the cluster was not detected within {timeout} s (config.distributed.init_timeout)"
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except OSError:
        return (
            f"process {index}: no coordinator (process 0) answers at {address} within {timeout} s "
            "(config.distributed.init_timeout)"
        )
    return (
        f"process {index}: not all {_jax_state.num_processes} processes reached the coordinator at "
        f"{address} within {timeout} s (config.distributed.init_timeout)"
    )
