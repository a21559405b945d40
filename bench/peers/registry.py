"""The peers by name, each as module:class; a module is imported only when its peer is asked for."""

from __future__ import annotations

import importlib
from typing import Final

from peers.contract import Peer

PEERS: Final = {
    "devmem-tcp": "peers.devmem_tensors:DevmemSeries",
    "devmem-tcp-messages": "peers.devmem_tensors:DevmemMessages",
    "devmem-tcp-asyncio": "peers.devmem_asyncio:DevmemAsyncio",
    "c": "peers.c_loops:CLoops",
    "plain": "peers.plain:Plain",
    "asyncio-streams": "peers.asyncio_streams:AsyncioStreams",
    "asyncio-buffered": "peers.asyncio_buffered:AsyncioBuffered",
    "pyzmq": "peers.zmq_pair:ZmqPair",
    "gloo": "peers.torch_gloo:TorchGloo",
    "grpcio": "peers.grpcio_calls:GrpcioCalls",
    "ucxx": "peers.ucxx_tcp:UcxxTcp",
    "nixl": "peers.nixl_ucx:NixlUcx",
    "mooncake": "peers.mooncake_tcp:MooncakeTcp",
}


def load(reference: str) -> Peer:
    """Make the peer that ``module:class`` names."""
    module, _, name = reference.partition(":")
    peer: Peer = getattr(importlib.import_module(module), name)()
    return peer
