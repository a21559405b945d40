"""Fetch the weights of a model from another host straight into registered memory, and look at where they landed.

    devmem-tcp serve model.safetensors --listen 127.0.0.1:5201        # there
    python examples/fetch_weights.py 127.0.0.1 5201 'model.layers.0.*'  # here

With a NIC that can, ``backend="kernel"`` and a key are all that changes: see docs/fetch.md.
"""

import sys

import devmem_tcp as dmt
from devmem_tcp.safetensors.fetching import fetch_tensors


def main(host: str, port: str, *only: str) -> None:
    with (
        dmt.open_nic("soft0", backend="software") as nic,
        fetch_tensors(nic, (host, int(port)), only=only) as weights,
    ):
        for name, message in weights.items():
            array = message.gather()  # DLPack: torch.from_dlpack(array), jax.numpy.from_dlpack(array) …
            where = "in place" if not message.path.copied else f"{message.path.copied:,} bytes copied"
            print(f"{name}: {array.dtype} {array.shape}, {array.nbytes:,} bytes, {where}")
        done = weights.summary
        print(f"{done.tensors} tensors, {done.bytes:,} bytes in {done.seconds:.2f} s, backend {done.backend}")
        print(f"path: dmabuf {done.dmabuf_bytes:,}, linear {done.linear_bytes:,}, host {done.host_bytes:,}")


if __name__ == "__main__":
    main(*sys.argv[1:])
