"""The CUDA driver library, asked what it can do. No context is made, so no GPU memory is taken.

Source: the CUDA driver API, initialization, version management and device management.
"""

from __future__ import annotations

import ctypes
from typing import Final, NamedTuple

from devmem_tcp.sys import calls

LIBRARY: Final = "libcuda.so.1"
_DMA_BUF_SUPPORTED: Final = 124  # CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED


class CudaDriver(NamedTuple):
    """A CUDA driver: CUresult of its start (0: it runs), 1000 · major + 10 · minor, and which GPUs export dma-bufs."""

    error: int
    version: int = 0
    exports_dmabuf: tuple[bool, ...] = ()


def driver() -> CudaDriver:
    """Load the driver library and ask it.

    Raises:
        OSError: there is no such library.
    """
    library = calls.load_library(LIBRARY)
    version, count = ctypes.c_int(), ctypes.c_int()
    failed = (
        library.cuInit(0)
        or library.cuDriverGetVersion(ctypes.byref(version))
        or library.cuDeviceGetCount(ctypes.byref(count))
    )
    if failed:
        return CudaDriver(int(failed))
    return CudaDriver(0, version.value, tuple(_exports(library, index) for index in range(count.value)))


def _exports(library: ctypes.CDLL, index: int) -> bool:
    gpu, value = ctypes.c_int(), ctypes.c_int()
    if library.cuDeviceGet(ctypes.byref(gpu), index):
        return False
    return not library.cuDeviceGetAttribute(ctypes.byref(value), _DMA_BUF_SUPPORTED, gpu) and bool(value.value)
