"""The process of the NICs: ``python -m devmem_tcp.lab.nic_process WIRING.json``.

One thread serves every NIC of one wire, their timers and the control socket. It blocks while nothing happens, and ends
on SIGTERM or SIGINT.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Final

import msgspec

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab import control
from devmem_tcp.lab.dma import DmaSpace
from devmem_tcp.lab.gvnic.device import Gvnic
from devmem_tcp.lab.gvnic.faults import Faults
from devmem_tcp.lab.hostport import HostPort, HostSocket
from devmem_tcp.lab.pcap import PcapWriter
from devmem_tcp.lab.vfio_user import VfioUserServer
from devmem_tcp.lab.wire import Switch

_CHUNK: Final = 1 << 16
_MAX_LINE: Final = 1 << 20


class Nic:
    """One NIC: its device, the memory it reaches, and the socket that QEMU finds it at."""

    def __init__(self, plug: control.NicPlug, switch: Switch) -> None:
        with contextlib.ExitStack() as undo:
            dma = undo.enter_context(contextlib.closing(DmaSpace()))
            self.device: Final = Gvnic(
                mac=bytes.fromhex(plug.mac.replace(":", "")),
                queues=plug.queues,
                mtu=plug.mtu,
                dma=dma,
                switch=switch,
                faults=Faults(plug.seed, **plug.faults),
                name=plug.name,
            )
            undo.callback(self.device.close)
            self.server: Final = VfioUserServer(plug.path, self.device, dma)
            undo.callback(self.server.close)
            self.close: Final = undo.pop_all().close


class Wire:
    """The NICs on one switch, the host processes on it, what is captured, and the commands on all of that.

    Lifetime: owns the NICs, the host ports and the capture; ``close`` lets them go.
    """

    def __init__(self, plugs: list[control.NicPlug], host_port: str = "") -> None:
        self.switch: Final = Switch()
        self.nics: Final[dict[str, Nic]] = {}
        self._capture: tuple[PcapWriter, BinaryIO] | None = None
        with contextlib.ExitStack() as undo:
            for plug in plugs:
                self.nics[plug.name] = Nic(plug, self.switch)
                undo.callback(self.nics[plug.name].close)
            self.hosts: Final = HostSocket(host_port, self.switch) if host_port else None
            if self.hosts is not None:
                undo.callback(self.hosts.close)
            self._held = undo.pop_all()

    def close(self) -> None:
        """End the capture, and let the NICs and the host processes go."""
        self._stop_capture()
        self._held.close()

    def tick(self) -> float | None:
        """Do what the time has come for; return the seconds until there is more, None: never, as things are."""
        deadlines = []
        for nic in self.nics.values():
            nic.device.tick()
            if (deadline_s := nic.device.deadline_s()) is not None:
                deadlines.append(deadline_s)
        return max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None

    def obey(self, command: control.Command) -> Any:
        """Do what a command says, and return its result.

        Raises:
            ValueError: no such NIC or fault, a value out of range.
            OSError: the capture's file cannot be written.
        """
        match command:
            case control.SetFaults(faults=faults, nic=name):
                chosen = self.nics if name is None else {name: self._nic(name)}
                return {name: asdict(nic.device.faults.set(**faults)) for name, nic in chosen.items()}
            case control.SetLink(nic=name, up=up):
                self._nic(name).device.set_link(up)
            case control.RequestReset(nic=name):
                self._nic(name).device.request_reset()
            case control.StartCapture(path=path, ports=ports, snap_length=snap_length):
                self._start_capture(path, ports, snap_length)
            case control.StopCapture():
                return self._stop_capture()
            case control.GetStatistics():
                return self._statistics()
        return None

    def _nic(self, name: str) -> Nic:
        try:
            return self.nics[name]
        except KeyError:
            raise ValueError(f"no NIC {name!r}; there are: {', '.join(self.nics) or 'none'}") from None

    def _start_capture(self, path: str, ports: list[str], snap_length: int) -> None:
        for name in ports:
            self._nic(name)
        self._stop_capture()
        with contextlib.ExitStack() as undo:
            file = undo.enter_context(open(path, "wb"))
            writer = PcapWriter(file, ports=ports or None, snap_length=snap_length)
            undo.pop_all()
        self._capture = writer, file
        self.switch.add_tap(writer)

    def _stop_capture(self) -> control.Captured:
        if self._capture is None:
            return control.Captured(packets=0)
        (writer, file), self._capture = self._capture, None
        self.switch.remove_tap(writer)
        failure = writer.failure
        try:
            file.close()
        except OSError as error:  # what was still buffered
            failure = failure or error
        return control.Captured(packets=writer.packets, failure=(failure.strerror or str(failure)) if failure else "")

    def _statistics(self) -> dict[str, Any]:
        counters = self.switch.counters
        nics = {
            name: {
                "device": asdict(nic.device.statistics()),
                "driver": nic.device.driver_version,
                "socket": asdict(nic.server.counters),
                "wire": asdict(counters[nic.device]),
            }
            for name, nic in self.nics.items()
        }
        ports = self.hosts.ports if self.hosts is not None else []
        hosts = {
            port.name: {"port": asdict(port.counters), "wire": asdict(counters[port])}
            for port in ports
            if not port.closed
        }
        return {"nics": nics, "host_ports": hosts, "cpu_s": time.process_time()}


class Clients:
    """The control socket and who is connected to it."""

    def __init__(self, path: str, obey: Callable[[control.Command], Any]) -> None:
        self._obey = obey
        self._lines: dict[socket.socket, bytearray] = {}
        self._decoder = msgspec.json.Decoder(control.Command)
        self.listener: Final = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()

    def accept(self) -> socket.socket:
        """Take the next client."""
        client, _ = self.listener.accept()
        self._lines[client] = bytearray()
        return client

    def serve(self, client: socket.socket) -> bool:
        """Answer the commands that have come; False, and the client is closed, when it has gone."""
        lines = self._lines[client]
        try:
            data = client.recv(_CHUNK)
            lines += data
            while b"\n" in lines:
                line, _, rest = bytes(lines).partition(b"\n")
                lines[:] = rest
                client.sendall(msgspec.json.encode(self._answer(line)) + b"\n")
        except ConnectionError:
            data = b""
        if data and len(lines) <= _MAX_LINE:
            return True
        del self._lines[client]
        client.close()
        return False

    def close(self) -> None:
        """Close all of it."""
        for client in self._lines:
            client.close()
        self.listener.close()

    def _answer(self, line: bytes) -> control.Answer:
        try:
            return control.Answer(result=self._obey(self._decoder.decode(line)))
        except (msgspec.MsgspecError, ValueError, TypeError, OSError, DevmemError) as error:
            return control.Answer(error=str(error))


def serve(wiring: control.Wiring, stop: socket.socket) -> None:
    """Make the NICs and serve them until ``stop`` is readable."""
    with (
        contextlib.closing(Wire(wiring.nics, wiring.host_port)) as wire,
        contextlib.closing(Clients(wiring.control, wire.obey)) as clients,
        select.epoll() as epoll,
    ):
        acts: dict[int, Callable[[], object]] = {}

        def watch(fd: int, act: Callable[[], object]) -> None:
            acts[fd] = act
            epoll.register(fd, select.EPOLLIN)

        def accept() -> None:
            client = clients.accept()
            watch(client.fileno(), lambda: answer(client))

        def answer(client: socket.socket) -> None:
            fd = client.fileno()
            if not clients.serve(client):  # closed, and so out of the epoll set
                del acts[fd]

        def plug_in() -> None:
            assert wire.hosts is not None
            port = wire.hosts.accept()
            watch(port.fileno(), lambda: pass_on(port))

        def pass_on(port: HostPort) -> None:
            fd = port.fileno()
            port.ready()
            if port.closed:  # and so out of the epoll set
                del acts[fd]

        if wire.hosts is not None:
            watch(wire.hosts.fileno(), plug_in)
        for nic in wire.nics.values():
            watch(nic.server.fileno(), nic.server.ready)
        watch(clients.listener.fileno(), accept)
        epoll.register(stop, select.EPOLLIN)
        while True:
            for fd, _ in epoll.poll(wire.tick()):
                if fd == stop.fileno():
                    return
                acts[fd]()


def main() -> None:
    """Serve what the wiring file says; the module's command line."""
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s: %(message)s", level=logging.INFO)
    wiring = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=control.Wiring)
    stop, signalled = socket.socketpair()
    with stop, signalled:
        signalled.setblocking(False)
        signal.set_wakeup_fd(signalled.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _nothing)  # the byte on the socket is what counts
        gc.freeze()  # what was imported is not looked at again: that would cost milliseconds in the middle of a burst
        serve(wiring, stop)
        signal.set_wakeup_fd(-1)


def _nothing(number: int, frame: FrameType | None) -> None:
    pass


if __name__ == "__main__":
    main()
