"""Counts the bytes that interpreted kernels move, by kernel and by argument.

Import after TRITON_INTERPRET is set.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from tests.byte_formulas import Blocks, Moved

SECTOR = 32  # bytes: the least that moves between a cache and DRAM
# Arguments of which a program reads a few bytes, which the formulas leave out.
UNCOUNTED = {"cu_seqlens", "prefix_index", "prefix_lengths", "context_lengths", "seed"}


@dataclass
class Traffic:
    """Bytes of one argument of one launch."""

    loaded: int = 0  # requested: lanes that are not masked off, repeats included
    stored: int = 0
    loaded_sectors: list[np.ndarray] = field(default_factory=list)  # numbers, of each access
    stored_sectors: list[np.ndarray] = field(default_factory=list)

    @property
    def compulsory(self) -> int:
        """Bytes of the distinct sectors: what a perfect cache would move."""
        return self.compulsory_loaded + self.compulsory_stored

    @property
    def compulsory_loaded(self) -> int:
        return _sector_bytes(self.loaded_sectors)

    @property
    def compulsory_stored(self) -> int:
        return _sector_bytes(self.stored_sectors)


def _sector_bytes(sectors: list[np.ndarray]) -> int:
    return SECTOR * np.unique(np.concatenate(sectors)).size if sectors else 0


@dataclass
class LaunchTraffic:
    kernel: str
    tensors: dict[str, Tensor]
    constants: dict[str, object]
    traffic: dict[str, Traffic]

    def total(self, attribute: str) -> int:
        return sum(getattr(traffic, attribute) for traffic in self.traffic.values())


def named_tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a launch argument: `query` for query or query.ptr, `seed` for any.seed_ptr."""
    if isinstance(value, Tensor):
        yield name.removesuffix("_ptr"), value
    elif isinstance(value, tuple):
        fields = getattr(value, "_fields", [f"{name}[{index}]" for index in range(len(value))])
        for part, entry in zip(fields, value, strict=True):
            yield from named_tensors(name if part == "ptr" else part, entry)


def holds(tensor: Tensor, address: int) -> bool:
    """Whether an element of a tensor begins there; views of one buffer hold different ones."""
    offset, remainder = divmod(address - tensor.data_ptr(), tensor.element_size())
    if offset < 0 or remainder:
        return False
    dimensions = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(dimensions, reverse=True):
        if stride and size > 1:
            index = min(offset // stride, size - 1)
            offset -= index * stride
    return offset == 0


@contextmanager
def counted_bytes() -> Iterator[list[LaunchTraffic]]:
    """What every launch inside moves, in order; IndexError for an access to no argument."""
    launches: list[LaunchTraffic] = []
    builder, executor = InterpreterBuilder, GridExecutor
    saved = (builder.create_masked_load, builder.create_masked_store, executor.__call__)
    load, store, call = saved

    def touched(pointers, mask) -> tuple[Traffic, int, np.ndarray]:
        """The argument, its requested bytes and sectors."""
        addresses, mask = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[mask].astype(np.int64)
        if addresses.size == 0:
            return Traffic(), 0, addresses
        launch = launches[-1]
        first = int(addresses.flat[0])
        owners = (name for name, tensor in launch.tensors.items() if holds(tensor, first))
        name = next(owners, None)
        if name is None:
            raise IndexError(f"{launch.kernel} accesses {first:#x}, of no argument")
        size = launch.tensors[name].element_size()
        return launch.traffic[name], addresses.size * size, np.unique(addresses // SECTOR)

    def counting_load(self, pointers, mask, *rest):
        traffic, requested, sectors = touched(pointers, mask)
        traffic.loaded += requested
        traffic.loaded_sectors.append(sectors)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        traffic, requested, sectors = touched(pointers, mask)
        traffic.stored += requested
        traffic.stored_sectors.append(sectors)
        return store(self, pointers, value, mask, *rest)

    def counting_call(self, *args, **kwargs):
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        tensors = dict(
            pair for name, value in arguments.items() for pair in named_tensors(name, value)
        )
        constants = {name: value for name, value in arguments.items() if name.isupper()}
        name = self.fn.__name__.removeprefix("_").removesuffix("_kernel")
        traffic = {name: Traffic() for name in tensors}
        launches.append(LaunchTraffic(name, tensors, constants, traffic))
        return call(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    executor.__call__ = counting_call
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = saved


def blocks_of(launches: list[LaunchTraffic]) -> Blocks:
    names = ("BLOCK_QUERIES", "BLOCK_KEYS")
    return {
        launch.kernel: tuple(launch.constants[name] for name in names)
        for launch in launches
        if all(name in launch.constants for name in names)
    }


def splits_of(launches: list[LaunchTraffic]) -> int:
    """Parts of the batch that the prefix gradient was summed over; 0 without one."""
    partials = (launch.tensors.get("partial") for launch in launches)
    return next((partial.shape[0] for partial in partials if partial is not None), 0)


def disagreements(launches: list[LaunchTraffic], expected: list[Moved]) -> list[str]:
    """Where the requested bytes are not those of the formula, argument by argument."""
    counted = {
        (launch.kernel, name): (traffic.loaded, traffic.stored)
        for launch in launches
        for name, traffic in launch.traffic.items()
        if (traffic.loaded or traffic.stored) and name not in UNCOUNTED
    }
    formula = {
        (each.kernel, each.argument): (0, each.requested) if each.stored else (each.requested, 0)
        for each in expected
        if each.requested
    }
    return [
        f"{key}: {counted.get(key)} (loaded, stored) bytes counted, {formula.get(key)} by formula"
        for key in sorted(counted.keys() | formula.keys())
        if counted.get(key) != formula.get(key)
    ]
