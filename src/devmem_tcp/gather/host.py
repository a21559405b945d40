"""Make payload contiguous with the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from devmem_tcp.buffers import Buffer, CpuAccess
from devmem_tcp.gather.plan import GatherPlan, inline_source, plan_gather
from devmem_tcp.types import FragBatch, U8Array

_ROWS_PER_RUN: Final = 8  # copying a run costs as much as np.take of about ten rows, the bytes themselves aside


def gather(
    batches: FragBatch | Sequence[FragBatch],
    buffer: Buffer | Mapping[int, Buffer],
    out: npt.NDArray[Any] | None = None,
) -> U8Array:
    """Return the payload of one or several batches as contiguous bytes, in TCP order.

    A payload that lies in one piece in the dma-buf already is not copied: the answer is a view of it. Otherwise, and
    whenever ``out`` is given, it is copied: frags of equal size by one np.take, others run by run.

    Args:
        batches: in the order they were received; none of them released.
        buffer: the Buffer that the frags lie in, or, for frags of several bindings, {dmabuf_id: Buffer}.
        out: where to copy to: C-contiguous, writable, of any dtype without objects, as large as the payload at least.

    Returns:
        shape (payload bytes,), uint8: a view of ``buffer``, a view of the beginning of ``out``, or a new array.

    Raises:
        ValueError: ``out`` is too small, not contiguous, read-only or part of a Buffer; a dmabuf_id without Buffer; a
            frag outside its Buffer (so it is not the one the frags were received into).
        StaleFragError: a batch was released.

    Lifetime: a view of ``buffer`` is valid until the batch is released, and keeps ``buffer`` from being closed. On a
    dma-buf it must be read within ``buffer.cpu_access(CpuAccess.READ)``; the copies made here are.
    """
    if isinstance(batches, FragBatch):
        batches = (batches,)
    plan = plan_gather(batches)
    nbytes = plan.nbytes
    buffers = _buffers_of(plan, buffer)
    if out is None and plan.contiguous:
        _check_inside(plan, {dmabuf_id: held.size_bytes for dmabuf_id, held in buffers.items()})
        ((dmabuf_id, offset, size),) = plan.runs.tolist()
        return buffers[dmabuf_id].array(offset=offset, count=size)
    target = np.empty(nbytes, np.uint8) if out is None else _bytes_of(out, nbytes)
    with contextlib.ExitStack() as accesses:
        sources: dict[int, memoryview] = {
            dmabuf_id: accesses.enter_context(held.cpu_access(CpuAccess.READ)) for dmabuf_id, held in buffers.items()
        }
        for view in sources.values():
            if out is not None and np.may_share_memory(target, np.frombuffer(view, np.uint8)):
                raise ValueError("out lies in the buffer to gather from: its pages are the NIC's")
        sources |= {inline_source(index): batch.inline for index, batch in enumerate(batches)}
        _check_inside(plan, {source: view.nbytes for source, view in sources.items()})
        _copy(plan, sources, target)
    return target


def _buffers_of(plan: GatherPlan, buffer: Buffer | Mapping[int, Buffer]) -> dict[int, Buffer]:
    """Return the Buffer of each dma-buf that the plan has pieces in."""
    wanted = plan.dmabuf_ids
    if isinstance(buffer, Buffer):
        if len(wanted) > 1:
            raise ValueError(f"the frags lie in dma-bufs {_listed(wanted)}: pass {{dmabuf_id: Buffer}} of them")
        return dict.fromkeys(wanted, buffer)
    missing = [dmabuf_id for dmabuf_id in wanted if dmabuf_id not in buffer]
    if missing:
        raise ValueError(f"frags lie in dma-buf {_listed(missing)}, but a Buffer was given for {_listed(buffer)} only")
    return {dmabuf_id: buffer[dmabuf_id] for dmabuf_id in wanted}


def _listed(dmabuf_ids: Sequence[int] | Mapping[int, Buffer]) -> str:
    return ", ".join(map(str, dmabuf_ids)) or "none"


def _bytes_of(out: npt.NDArray[Any], nbytes: int) -> U8Array:
    """Return the first ``nbytes`` of ``out`` as bytes."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a NumPy array, not {type(out).__name__}")
    if out.dtype.hasobject:
        raise ValueError(f"out has dtype {out.dtype}, which holds objects")
    if not out.flags.c_contiguous:
        raise ValueError(f"out, of shape {out.shape} and strides {out.strides}, is not C-contiguous")
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    if out.nbytes < nbytes:
        raise ValueError(f"out has {out.nbytes} bytes, the payload {nbytes}")
    return out.reshape(-1).view(np.uint8)[:nbytes]


def _check_inside(plan: GatherPlan, sizes: Mapping[int, int]) -> None:
    """Raise ValueError for a run that ends outside its source."""
    present, which = np.unique(plan.runs["source"], return_inverse=True)
    limits = np.array([sizes[source] for source in present.tolist()], np.int64)[which]
    ends = plan.runs["offset"] + plan.runs["size"]
    outside = np.flatnonzero(ends > limits)
    if len(outside):
        run = outside[0]
        source = int(plan.runs["source"][run])
        name = f"dma-buf {source}" if source >= 0 else f"the inline bytes of batch {-1 - source}"
        raise ValueError(f"a frag ends at byte {ends[run]} of {name}, which is {limits[run]} bytes long")


def _copy(plan: GatherPlan, sources: Mapping[int, memoryview], target: U8Array) -> None:
    width = plan.equal_size
    if width is not None and target.nbytes // width <= _ROWS_PER_RUN * len(plan.runs):
        source = np.frombuffer(sources[int(plan.runs["source"][0])], np.uint8)
        table = source[: len(source) // width * width].reshape(-1, width)
        # The runs were checked: nothing is clipped. Under mode="raise" NumPy copies it all twice.
        np.take(table, plan.rows(), axis=0, out=target.reshape(-1, width), mode="clip")
        return
    into = target.data  # slices of memoryviews cost half of NumPy's
    at = 0
    for source_id, offset, size in plan.runs.tolist():
        into[at : at + size] = sources[source_id][offset : offset + size]
        at += size
