"""Start the process of the NICs, tell it things, end it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import msgspec

from devmem_tcp.errors import DevmemError, Timeout
from devmem_tcp.lab import control
from devmem_tcp.lab.vm import processes

_START_S: Final = 30.0
_POLL_S: Final = 0.02
_ANSWER_S: Final = 30.0
_LOG_LINES: Final = 15
_WIRING: Final = "wiring.json"
_LONGEST_PATH: Final = 107  # of a UNIX socket, in bytes: unix(7)


class NicClient:
    """A connection to a running process of NICs.

    Args:
        path: its control socket.

    Raises:
        OSError: nobody listens there.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(_ANSWER_S)
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rb")

    def ask(self, command: control.Command) -> Any:
        """Give a command, and return its result.

        Raises:
            DevmemError: it was refused, or the process has gone.
            Timeout: no answer in 30 s.
        """
        try:
            self._socket.sendall(msgspec.json.encode(command) + b"\n")
            line = self._lines.readline()
        except TimeoutError:
            raise Timeout("the process of the NICs does not answer") from None
        except ConnectionError:
            line = b""
        if not line:
            raise DevmemError("the process of the NICs has gone")
        answer = msgspec.json.decode(line, type=control.Answer)
        if answer.error:
            raise DevmemError(answer.error)
        return answer.result

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._lines.close()
        self._socket.close()


def newest(runs: Path) -> NicClient:
    """Return a connection to the NICs of the run that was started last and still goes on.

    Args:
        runs: the folder of all runs' folders.

    Raises:
        DevmemError: none goes on.
    """
    for wiring_file in sorted(runs.glob(f"*/{_WIRING}"), reverse=True):
        wiring = msgspec.json.decode(wiring_file.read_bytes(), type=control.Wiring)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return NicClient(Path(wiring.control))
    raise DevmemError("no lab is running", hint="devmem-tcp lab shell starts one")


class NicProcess:
    """NICs on one wire, made on entry and gone on exit.

    Args:
        plugs: the NICs; their ``path`` is filled in here.
        folder: where the process's log and wiring go.
        host_port: path of a UNIX socket to make, at which processes of the host are plugged into the wire.

    Raises (on entry):
        DevmemError: no socket can be made at ``host_port``, or the process did not come up; shows what it said.
    """

    def __init__(self, plugs: list[control.NicPlug], folder: Path, *, host_port: Path | None = None) -> None:
        self._plugs: Final = plugs
        self._host_port: Final = "" if host_port is None else str(host_port.absolute())
        self._log: Final = folder / "nics.log"
        self._wiring_file: Final = folder / _WIRING
        self._held = contextlib.ExitStack()
        self.client: NicClient
        self.sockets: tuple[Path, ...] = ()
        """Where QEMU finds each NIC."""

    def __enter__(self) -> NicProcess:
        if self._host_port:
            _check_free(Path(self._host_port))
        with contextlib.ExitStack() as held:
            folder = held.enter_context(processes.socket_folder())
            self.sockets = tuple(folder / f"nic{index}" for index in range(len(self._plugs)))
            plugs = [
                msgspec.structs.replace(plug, path=str(path))
                for plug, path in zip(self._plugs, self.sockets, strict=True)
            ]
            self.control_path = folder / "control"
            wiring = control.Wiring(control=str(self.control_path), nics=plugs, host_port=self._host_port)
            self._wiring_file.write_bytes(msgspec.json.encode(wiring))
            command = [sys.executable, "-m", "devmem_tcp.lab.nic_process", str(self._wiring_file)]
            process = held.enter_context(processes.running(command, self._log))
            self.client = held.enter_context(contextlib.closing(self._connect(process)))
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def _connect(self, process: subprocess.Popen[bytes]) -> NicClient:
        deadline = time.monotonic() + _START_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return NicClient(self.control_path)
            time.sleep(_POLL_S)
        said = processes.tail(self._log, _LOG_LINES)
        raise DevmemError(f"the process of the NICs did not come up; it said:\n{said or '(nothing)'}")


def _check_free(path: Path) -> None:
    """Raise DevmemError where no UNIX socket can be made."""
    if os.path.lexists(path):
        raise DevmemError(f"{path}: there is something there already", hint="remove it, or name another path")
    if not path.parent.is_dir():
        raise DevmemError(f"{path}: no such folder")
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise DevmemError(f"{path}: too long for a UNIX socket, which takes {_LONGEST_PATH} bytes")
