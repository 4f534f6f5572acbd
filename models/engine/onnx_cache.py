"""Where an ONNX decoder keeps keys and values: one block of memory per sequence, bound to the session by address.

Two layouts exist. Graphs with GroupQueryAttention (onnxruntime-genai's builder) write new cells into the memory that
the old ones lie in, so nothing is copied and rewinding is free. Graphs that concatenate (Optimum) read the past and
write past plus new: two blocks take turns, and rewinding closes the gaps between the heads.

The memory is reserved, not taken: the system gives a page when a cell in it is first written, and a sequence that is
forgotten gives its pages back.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.model_folder import Decoder


class Block:
    """Keys and values of all layers: 2 * layers slots of `cells` tokens each, in the CPU's memory."""

    def __init__(self, decoder: Decoder, cells: int) -> None:
        self.dtype = np.dtype(decoder.kv_dtype)
        self.slot = decoder.kv_heads * cells * decoder.head_size  # elements
        self._memory = mmap.mmap(-1, 2 * decoder.layers * self.slot * self.dtype.itemsize)
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)  # cells of one head lie far from those of the next
        self._whole: NDArray[Any] = np.frombuffer(self._memory, self.dtype)
        self.address = self._whole.ctypes.data

    def address_of(self, slot: int) -> int:
        return self.address + slot * self.slot * self.dtype.itemsize

    def array(self, slot: int, shape: tuple[int, ...]) -> NDArray[Any]:
        begin = slot * self.slot
        return self._whole[begin : begin + int(np.prod(shape))].reshape(shape)

    def forget(self) -> None:
        self._memory.madvise(mmap.MADV_DONTNEED)


class Cache(ABC):
    """One sequence's cells, and the binding of a session that reads and writes them."""

    def __init__(self, decoder: Decoder, session: Any) -> None:
        self.binding = session.io_binding()
        self._decoder = decoder
        kinds = [(layer, kind) for layer in range(decoder.layers) for kind in ("key", "value")]
        self._slots = [(f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}") for layer, kind in kinds]

    @abstractmethod
    def bind(self, past: int, new: int) -> None:
        """Prepares a pass of `new` tokens after `past`."""

    @abstractmethod
    def trim(self, length: int, position: int) -> None:
        """Drops the cells from `position` on, of `length` that there are."""

    def _shape(self, cells: int) -> tuple[int, int, int, int]:
        return (1, self._decoder.kv_heads, cells, self._decoder.head_size)


class SharedCache(Cache):
    """Past and present are the same memory, bound once."""

    def __init__(self, decoder: Decoder, cells: int, session: Any, device: str = "cpu") -> None:
        super().__init__(decoder, session)
        shape = self._shape(cells)
        self._block = Block(decoder, cells) if device == "cpu" else DeviceBlock(decoder, shape, device)
        for slot, (past, present) in enumerate(self._slots):
            address = self._block.address_of(slot)
            self.binding.bind_input(past, device, 0, self._block.dtype, shape, address)
            self.binding.bind_output(present, device, 0, self._block.dtype, shape, address)

    def bind(self, past: int, new: int) -> None:
        pass

    def trim(self, length: int, position: int) -> None:
        if position == 0:
            self._block.forget()


class DeviceBlock:
    """The same in an accelerator's memory, which onnxruntime allocates."""

    def __init__(self, decoder: Decoder, shape: tuple[int, ...], device: str) -> None:
        import onnxruntime

        self.dtype = np.dtype(decoder.kv_dtype)
        self._values = [
            onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, self.dtype, device, 0)
            for _ in range(2 * decoder.layers)
        ]

    def address_of(self, slot: int) -> int:
        return int(self._values[slot].data_ptr())

    def forget(self) -> None:
        """It stays taken."""


class GrownCache(Cache):
    """The past is in one block, the present goes into the other."""

    def __init__(self, decoder: Decoder, cells: int, session: Any) -> None:
        super().__init__(decoder, session)
        self._past, self._present = Block(decoder, cells), Block(decoder, cells)

    def bind(self, past: int, new: int) -> None:
        before, after, dtype = self._shape(past), self._shape(past + new), self._past.dtype
        for slot, (input, output) in enumerate(self._slots):
            self.binding.bind_input(input, "cpu", 0, dtype, before, self._past.address_of(slot))
            self.binding.bind_output(output, "cpu", 0, dtype, after, self._present.address_of(slot))
        self._past, self._present = self._present, self._past

    def trim(self, length: int, position: int) -> None:
        if position == 0:
            self._past.forget()
            self._present.forget()
            return
        heads, size = self._decoder.kv_heads, self._decoder.head_size
        for slot in range(2 * self._decoder.layers):
            old = self._past.array(slot, (heads, length, size))
            self._present.array(slot, (heads, position, size))[:] = old[:, :position]
        self._past, self._present = self._present, self._past
