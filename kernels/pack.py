"""Packing many tensors into one buffer of bytes and back.

A checkpoint crosses to the host as one copy, whatever the number, strides and dtypes of its
tensors. The layout is :func:`plan`'s: every tensor at a multiple of 16 bytes, in row-major order,
the gaps zero. A buffer's bytes therefore depend on the values alone and can be compared or hashed.

On a GPU one launch of :mod:`djinn_fx.kernels.triton_pack` moves everything; the torch twins, a copy
per tensor, are what the CPU uses and what the kernel is held to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from djinn_fx.errors import InternalError
from djinn_fx.kernels import triton_pack
from djinn_fx.kernels.backend import uses_triton
from djinn_fx.kernels.words import words

#: Bytes: the widest load and store of a GPU thread, and no less than the itemsize of any dtype.
ALIGNMENT = 16


@dataclass(frozen=True)
class PackPlan:
    """Where each tensor of a sequence lies in its buffer.

    Attributes:
        offsets: byte offset of each tensor, a multiple of :data:`ALIGNMENT`.
        nbytes: size of the buffer, likewise a multiple.
    """

    offsets: tuple[int, ...]
    nbytes: int


def plan(tensors: Sequence[Tensor]) -> PackPlan:
    """The layout of ``tensors``: it depends on their shapes and dtypes alone."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end = _aligned(end + tensor.numel() * tensor.itemsize)
    return PackPlan(tuple(offsets), end)


def pack(tensors: Sequence[Tensor], out: Tensor) -> None:
    """Write ``tensors`` into ``out``, laid out by :func:`plan`; never waits for the device.

    Args:
        tensors: any shapes, strides and dtypes, on the device of ``out``.
        out: uint8, one-dimensional, contiguous, aligned, of ``plan(tensors).nbytes`` or more;
            bytes beyond that stay as they are.

    Raises:
        InternalError: a buffer that does not fit, or a tensor on another device.
    """
    layout = _checked(tensors, out)
    if _by_kernel(out):
        triton_pack.move(tensors, layout.offsets, out, to_buffer=True)
    else:
        pack_torch(tensors, layout, out)


def unpack(buffer: Tensor, tensors: Sequence[Tensor]) -> None:
    """Fill ``tensors`` from ``buffer``, which :func:`pack` wrote; the inverse, in place.

    Args:
        buffer: as ``out`` of :func:`pack`.
        tensors: of the shapes and dtypes that were packed; strides may differ.

    Raises:
        InternalError: as :func:`pack`.
    """
    layout = _checked(tensors, buffer)
    if _by_kernel(buffer):
        triton_pack.move(tensors, layout.offsets, buffer, to_buffer=False)
    else:
        unpack_torch(buffer, layout, tensors)


def pack_torch(tensors: Sequence[Tensor], layout: PackPlan, out: Tensor) -> None:
    """:func:`pack` by one copy per tensor; ``layout`` is the tensors' plan."""
    for offset, tensor in zip(layout.offsets, tensors, strict=True):
        if tensor.numel():
            mine = words(tensor)
            end = offset + tensor.numel() * tensor.itemsize
            out[offset:end].view(mine.dtype).view(mine.shape).copy_(mine)
            if end % ALIGNMENT:
                out[end : _aligned(end)].zero_()


def unpack_torch(buffer: Tensor, layout: PackPlan, tensors: Sequence[Tensor]) -> None:
    """:func:`unpack` by one copy per tensor; ``layout`` is the tensors' plan."""
    for offset, tensor in zip(layout.offsets, tensors, strict=True):
        if tensor.numel():
            mine = words(tensor)
            end = offset + tensor.numel() * tensor.itemsize
            mine.copy_(buffer[offset:end].view(mine.dtype).view(mine.shape))


def _by_kernel(buffer: Tensor) -> bool:
    return buffer.is_cuda and uses_triton()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _checked(tensors: Sequence[Tensor], buffer: Tensor) -> PackPlan:
    """The plan of ``tensors``, after a look at whether they and ``buffer`` fit together."""
    layout = plan(tensors)
    flat = buffer.dtype == torch.uint8 and buffer.dim() == 1 and buffer.is_contiguous()
    if not flat or buffer.numel() < layout.nbytes or buffer.data_ptr() % ALIGNMENT:
        raise InternalError(
            f"pack: the buffer must be contiguous uint8 [{layout.nbytes}] or longer, at a multiple "
            f"of {ALIGNMENT} bytes; it is {buffer.dtype} {tuple(buffer.shape)} "
            f"at {buffer.data_ptr():#x}."
        )
    for index, tensor in enumerate(tensors):
        if tensor.device != buffer.device:
            raise InternalError(f"pack: tensor {index} is on {tensor.device}, the buffer on {buffer.device}.")
    return layout
