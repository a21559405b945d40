"""Arrays on their way in and out: element types, what users may hand in, and what they get to look at received bytes.

In: ``source(obj)`` turns any array that the CPU can read into a Source: contiguous bytes with a type, a shape and an
order. Out: a ``DeviceArray`` shows bytes as an array to NumPy and to whatever speaks DLPack, and a ``Lease`` knows who
still looks at them. Nothing here copies unless it is told to.
"""

from devmem_tcp.arrays.device_array import DeviceArray
from devmem_tcp.arrays.dtypes import ARRAY_TYPES, ArrayType, array_type
from devmem_tcp.arrays.layout import Order, Source
from devmem_tcp.arrays.lease import Lease
from devmem_tcp.arrays.sources import source

__all__ = ["ARRAY_TYPES", "ArrayType", "DeviceArray", "Lease", "Order", "Source", "array_type", "source"]
