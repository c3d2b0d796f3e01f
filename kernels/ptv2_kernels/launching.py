"""Launches that cost the processor little.

A launch by Triton binds the arguments, describes them in strings and looks up by those which
compiled kernel serves. It is left to Triton the first time; later launches of the same variant
hand their arguments to the kernel that it chose.
"""

from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ptv2_kernels.arguments import Strided
from ptv2_kernels.configs import INTERPRETED

MOST_VARIANTS = 4096  # strides that change with the batch make more and more of them


def specialization_of(values: tuple, plain: Set[int] = frozenset()) -> tuple:
    """What a compiled kernel may follow from of its arguments: all but addresses and floats.

    Integers and strides count by value, which is finer than what Triton makes of them. `plain`:
    places of integers that Triton does not specialise; of them only the number of bits counts.
    """
    specialization: list[Any] = []
    add = specialization.append
    for place, value in enumerate(values):
        kind = type(value)
        if kind is Strided:
            tensor, strides = value
            add((tensor.dtype, tensor.data_ptr() % 16 == 0, strides))
        elif value is None or kind is tuple:  # of strides
            add(value)
        elif kind is int:
            add(value >> 31 if place in plain else value)
        elif kind is float:
            add(float)
        elif isinstance(value, Tensor):
            add((value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, tuple):
            add(specialization_of(value))
        else:
            add((kind, value))
    return tuple(specialization)


def is_observed() -> bool:
    """Whether something waits at every launch or changes what is compiled; Triton serves it."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


class Launcher:
    """Launches one kernel, whose constants are its last parameters."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        # By device, options and specialization: how to run a compiled kernel, and its constants.
        self._variants: dict[tuple, tuple] = {}
        parameters = [] if INTERPRETED else kernel.params
        self._plain = {each.num for each in parameters if each.do_not_specialize}

    def __call__(
        self, grid: tuple[int, int, int], options: Mapping[str, Any], *arguments: Any
    ) -> None:
        """As `kernel[grid](*arguments, **options)`.

        Args:
            grid: numbers of programs.
            options: constants of the kernel and options of the compiler, the same object whenever
                they are the same.
            arguments: tensors, floats, integers and tuples of them, in the kernel's order.
        """
        if INTERPRETED or self.kernel.pre_run_hooks or is_observed():
            self.kernel[grid](*arguments, **options)
            return
        active = driver.active
        device = active.get_current_device()
        key = device, id(options), specialization_of(arguments, self._plain)
        known = self._variants.get(key)
        if known is None:
            compiled = self.kernel[grid](*arguments, **options)
            self._remember(key, compiled, options, len(arguments))
            return
        run, function, metadata, constants, _, _ = known
        stream = active.get_current_stream(device)
        run(*grid, stream, function, metadata, None, None, None, *arguments, *constants)

    def _remember(
        self, key: tuple, compiled: Any, options: Mapping[str, Any], argument_count: int
    ) -> None:
        if len(self._variants) >= MOST_VARIANTS:
            self._variants.clear()
        constants = tuple(options[each.name] for each in self.kernel.params[argument_count:])
        # The last two are kept alive: the module that is run, and the object that the key names.
        self._variants[key] = (
            compiled.run, compiled.function, compiled.packed_metadata, constants, compiled, options
        )  # fmt: skip
