"""Fetch the weights of a model from a server straight into registered memory, and look at where they landed.

    python examples/fetch_weights.py                                    # makes a small file and serves it itself

    devmem-tcp serve model.safetensors --listen 127.0.0.1:5201          # or from another host,
    python examples/fetch_weights.py 127.0.0.1 5201 'model.layers.0.*'  # and only some of them

With a NIC that can, ``backend="kernel"`` and a key are all that changes: see docs/fetch.md.
"""

import multiprocessing
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

import devmem_tcp as dmt
from devmem_tcp.safetensors.fetching import fetch_tensors
from devmem_tcp.safetensors.header import encode_header
from devmem_tcp.safetensors.serving import serve_tensors


def fetch(host: str, port: int, *only: str) -> None:
    with (
        dmt.open_nic("soft0", backend="software") as nic,
        fetch_tensors(nic, (host, port), only=only) as weights,
    ):
        for name, message in weights.items():
            array = message.gather()  # DLPack: torch.from_dlpack(array), jax.numpy.from_dlpack(array) …
            where = "in place" if not message.path.copied else f"{message.path.copied:,} bytes copied"
            print(f"{name}: {array.dtype} {array.shape}, {array.nbytes:,} bytes, {where}")
        done = weights.summary
        print(f"{done.tensors} tensors, {done.bytes:,} bytes in {done.seconds:.2f} s, backend {done.backend}")
        print(f"path: dmabuf {done.dmabuf_bytes:,}, linear {done.linear_bytes:,}, host {done.host_bytes:,}")


def serve(file: Path, parent: Connection) -> None:
    """Offer a file until a client has fetched from it."""
    with (
        dmt.open_nic("soft1", backend="software") as nic,
        serve_tensors(nic, [file], listen=("127.0.0.1", 0)) as server,
    ):
        parent.send(server.address)
        served = next(session for session in server if session.tensors)  # the first may only look at what there is
        print(f"served {served.tensors} tensors, {served.bytes:,} bytes")


def make_model(file: Path) -> None:
    """Write a file of two layers; any library that writes safetensors would do."""
    tensors = {f"model.layers.{layer}.weight": ("F32", (256, 512)) for layer in range(2)}
    values = np.random.default_rng(0).random((2, 256, 512), np.float32)
    file.write_bytes(encode_header(tensors, {"made": "by an example"}) + values.tobytes())


def main(*arguments: str) -> None:
    if len(arguments) > 1:
        host, port, *only = arguments
        fetch(host, int(port), *only)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model.safetensors")
        processes = multiprocessing.get_context("spawn")
        ours, theirs = processes.Pipe()
        server = processes.Process(target=serve, args=(Path(folder) / "model.safetensors", theirs))
        server.start()
        theirs.close()
        fetch(*ours.recv())
        server.join()
        sys.exit(server.exitcode)


if __name__ == "__main__":
    main(*sys.argv[1:])
