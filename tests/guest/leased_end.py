"""A container's program that receives by a queue leased to it, and sends back: run by ``test_leasing.py`` in a guest.

``leased_end.py NIC HOST PORT``: opens NIC, tries what is the host's to set, receives one stream to its end, sends
as much back from device memory, and says by JSON what came of it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict

import devmem_tcp as dmt
from devmem_tcp.buffers import CpuAccess
from devmem_tcp.errors import NicSettingError
from devmem_tcp.types import PAGE_SIZE

MIB = 1 << 20
LEASED = 1
ANSWER_BYTES = 64 * 1024


def hint_of(change: Callable[[], object]) -> str:
    """Return the hint of a setting that is refused."""
    try:
        change()
    except NicSettingError as refused:
        return str(refused.hint)
    return "it was not refused"


def main() -> None:
    name, host, port = sys.argv[1:]
    warnings.simplefilter("error")
    with (
        dmt.open_nic(name, backend="kernel") as nic,
        dmt.memory.Udmabuf().allocate(8 * MIB) as buffer,
        dmt.memory.Udmabuf().allocate(ANSWER_BYTES) as answer,
        nic.bind_rx(buffer, [LEASED]) as rx,
        nic.bind_tx(answer) as tx,
        nic.listen((host, int(port)), strict=True) as listener,
    ):
        hints = [
            hint_of(lambda: nic.set_header_split("on")),
            hint_of(lambda: nic.set_hds_thresh(0)),
            hint_of(lambda: nic.set_rss(equal=1)),
            hint_of(lambda: nic.add_ntuple(dst_port=int(port), queue=LEASED)),
        ]
        told = (nic.header_split.value, nic.rss_table, nic.ntuple_rules, nic.capabilities.settings)
        print("listening", flush=True)
        digest = hashlib.sha256()
        with listener.accept() as sock:
            sock.settimeout(30.0)
            sock.set_zerocopy()
            while batch := sock.recv_frags():
                with batch, buffer.cpu_access(CpuAccess.READ) as memory:
                    for offset, size in zip(batch.offsets.tolist(), batch.sizes.tolist(), strict=True):
                        digest.update(memory[offset : offset + size])
            with answer.cpu_access(CpuAccess.WRITE) as memory:
                memory[:] = digest.digest() * (ANSWER_BYTES // digest.digest_size)
            sock.send_frags(tx, [0], [ANSWER_BYTES])
            sock.shutdown_send()
            completed = sock.wait_completions(30.0)
            report = {
                "sha256": digest.hexdigest(),
                "stats": asdict(sock.stats),
                "rx_queue": sock.rx_queue,
                "queue_stats": asdict(nic.queue_stats(LEASED)),
                "buffer_pages": buffer.size_bytes // PAGE_SIZE,
                "dmabuf_id": rx.dmabuf_id,
                "drained": rx.drained,
                "completed": completed,
                "hints": hints,
                "told": told,
            }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
