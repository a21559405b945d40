"""Look at a guest's device memory from outside: ``python -m devmem_tcp.lab.outside`` boots one and does so.

The guest's NUMA node 1 is a file. In the guest a trial receives into a buffer there by devmem TCP, says where each
piece of the stream lies, and waits; this process, which took no part in the transfer, reads the file and compares every
byte.
"""

from __future__ import annotations

import argparse
import mmap
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab import trial

_SECOND_MEMORY: Final = "256M"
_LIMIT_S: Final = 240
_NODE: Final = 1


def compare(file: Path, whereabouts: trial.Whereabouts, wanted: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Compare a stream with the file that backs the node it was received into.

    Args:
        whereabouts: where each piece of the stream lies.
        wanted: the whole stream.

    Returns:
        The offsets in the file of the first byte of the stream's first piece, and of its last piece.

    Raises:
        DevmemError: a byte is wrong, missing, or not within the file.
    """
    got = 0
    offsets = []
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as memory:
        for at, physical, length in whereabouts.pieces:
            offset = physical - whereabouts.node_start
            if at != got or not 0 <= offset <= len(memory) - length:
                raise DevmemError(f"piece {at} of {length} bytes, at {offset} in the file, is not where it can be")
            if memory[offset : offset + length] != wanted[at : at + length].tobytes():
                raise DevmemError(f"a wrong byte between {at} and {at + length} of the stream, {offset} in the file")
            offsets.append(offset)
            got += length
    if got != len(wanted):
        raise DevmemError(f"{got} of {len(wanted)} bytes are in the file")
    return offsets[0], offsets[-1]


def watch(command: Sequence[str], file: Path, size: int) -> int:
    """Run a trial, compare what it says to be in the file whenever it waits, and return how many times that was.

    Raises:
        DevmemError: a comparison, or the trial, failed.
    """
    wanted = trial.content(size)
    decoder = msgspec.json.Decoder(trial.Whereabouts)
    compared = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if not line.startswith(b"{"):
                    print(line.decode(errors="replace"), end="", flush=True)
                    continue
                whereabouts = decoder.decode(line)
                first, last = compare(file, whereabouts, wanted)
                print(
                    f"outside  {size:,} bytes in {len(whereabouts.pieces):,} pieces, read from the file of the guest's"
                    f" node at {first:#x} … {last:#x}: all right",
                    flush=True,
                )
                compared += 1
                process.stdin.write(b"\n")
                process.stdin.flush()
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise DevmemError(f"the trial failed (exit status {process.returncode})")
    return compared


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m devmem_tcp.lab.outside", description=__doc__)
    parser.add_argument("--bytes", type=int, default=trial.NODE_BYTES, help="received each time (at most 16 MiB)")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="more options of devmem-tcp lab run")
    chosen: Any = parser.parse_args(arguments)
    if not 0 < chosen.bytes <= trial.NODE_BYTES:
        parser.error(f"--bytes is 1 to {trial.NODE_BYTES}")
    with tempfile.TemporaryDirectory(prefix="devmem-tcp-") as folder:
        file = Path(folder, "node1")
        lab = [sys.executable, "-m", "devmem_tcp", "lab", "run", "--quiet", "--timeout", str(_LIMIT_S)]
        lab += ["--second-memory", _SECOND_MEMORY, str(file), *chosen.options]
        job = [sys.executable, "-m", "devmem_tcp.lab.trial", "--node", str(_NODE), "--outside"]
        try:
            if not watch([*lab, "--", *job, "--bytes", str(chosen.bytes)], file, chosen.bytes):
                raise DevmemError("the trial did not say where the bytes are")
        except (DevmemError, msgspec.MsgspecError, OSError) as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
