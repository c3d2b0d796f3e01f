"""Repairs and checks of Triton's interpreter, which runs the kernels on machines without a GPU.

It multiplies the bit patterns of bf16 in `tl.dot`, truncates float32 to bf16, rounds twice in
`tl.fma`, and notices no access outside a tensor; that of Triton 3.6 cannot count to a tensor with
numpy 2.4. Import after TRITON_INTERPRET is set.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
)


def _widen(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = np.atleast_1d(handle.data).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _round_to_bf16(handle: TensorHandle) -> TensorHandle:
    """Rounds to nearest even, as the hardware does."""
    values = np.ascontiguousarray(handle.data, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    rounded = np.where(np.isnan(values), np.uint32(0x7FC0), rounded)
    return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)


def _remember_types() -> None:
    """Looks up what the interpreter would work out anew for every operation, 40 % of its time."""
    block_type, original_block = tl.block_type, tl.block_type.__init__
    original_tensor, original_np_dtype = tl.tensor.__init__, interpreter._get_np_dtype
    original_operands = TritonSemantic.binary_op_type_checking_impl
    blocks: dict[tuple, dict[str, object]] = {}
    shapes: dict[str, tuple] = {}
    np_dtypes: dict[str, np.dtype] = {}

    def quick_block(self, element_ty, shape):
        sizes = tuple(getattr(size, "value", size) for size in shape)
        key = (element_ty.name, sizes)
        if key in blocks and all(type(size) is int for size in sizes):
            vars(self).update(blocks[key], element_ty=element_ty)
        else:
            original_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))

    def quick_tensor(self, handle, type):
        if type.name in shapes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = shapes[type.name]
        else:
            original_tensor(self, handle, type)
            shapes[type.name] = self.shape, self.numel

    def quick_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = original_np_dtype(dtype)
        return np_dtypes[name]

    def quick_operands(self, left, right, *more, **options):
        alike = isinstance(left, tl.tensor) and isinstance(right, tl.tensor)
        if alike and left.type.name == right.type.name and not left.dtype.is_ptr():
            if len(more) < 3 and not options:  # not a division
                return left, right
        return original_operands(self, left, right, *more, **options)

    block_type.__init__, tl.tensor.__init__ = quick_block, quick_tensor
    TritonSemantic.binary_op_type_checking_impl = quick_operands
    interpreter._get_np_dtype = quick_np_dtype


def repair_interpreter() -> None:
    """Makes bf16 dots and roundings right, fuses fma, and makes device-function calls quicker."""
    original_dot, original_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    if original_dot.__name__ == "repaired_dot":
        return

    def repaired_dot(self, left, right, *rest):
        return original_dot(self, _widen(left), _widen(right), *rest)

    def repaired_cast(self, source, to_type):
        source = _widen(source)
        if to_type.scalar == tl.bfloat16:
            return _round_to_bf16(source)
        return original_cast(self, source, to_type)

    def repaired_fp_to_fp(self, source, to_type, rounding_mode):
        return repaired_cast(self, source, to_type)

    def repaired_fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data.astype(np.float64)
        return TensorHandle((exact + z.data).astype(x.data.dtype), x.dtype.scalar)

    # The stock call patches the language again for every call of a device function, 40 % of the
    # time; once per launch and module is enough.
    patched_modules: set[str] = set()
    original_call, original_launch = InterpretedFunction.__call__, GridExecutor.__call__

    def quick_call(self, *args, **kwargs):
        if self.fn.__module__ in patched_modules:
            return self.rewrite()(*args, **kwargs)
        patched_modules.add(self.fn.__module__)
        return original_call(self, *args, **kwargs)

    def forgetful_launch(self, *args, **kwargs):
        patched_modules.clear()
        return original_launch(self, *args, **kwargs)

    original_patch = interpreter._patch_lang_tensor

    def repaired_patch(tensor, *scope):
        original_patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    _remember_types()
    # Every sum of integers would be made three times, to compare it with an assert that is off.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang_tensor = repaired_patch
    InterpreterBuilder.create_dot = repaired_dot
    InterpreterBuilder.cast_impl = repaired_cast
    InterpreterBuilder.create_fp_to_fp = repaired_fp_to_fp
    InterpreterBuilder.create_fma = repaired_fma
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, repaired_cast)
    InterpretedFunction.__call__ = quick_call
    GridExecutor.__call__ = forgetful_launch


def flatten(argument) -> Iterator:
    """The leaves of a kernel argument, which may be a tuple of tuples."""
    if isinstance(argument, tuple):
        for element in argument:
            yield from flatten(element)
    else:
        yield argument


@contextmanager
def bounds_checked():
    """Raises IndexError when a kernel loads or stores outside all the tensors it was given.

    Lanes that a load masks off without a default are NaN inside, so that reading them shows.
    """
    ranges: list[tuple[int, int]] = []
    builder, executor = InterpreterBuilder, GridExecutor
    saved = (builder.create_masked_load, builder.create_masked_store, executor.__call__)
    load, store, call = saved

    def check(pointers, mask) -> None:
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        addresses = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data, shape)]
        if addresses.size == 0:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        first, last = int(addresses.min()), int(addresses.max()) + max(size, 1)
        if not any(low <= first and last <= high for low, high in ranges):
            raise IndexError(f"access to [{first:#x}, {last:#x}) outside every argument")

    def checked_load(self, pointers, mask, other, *rest):
        check(pointers, mask)
        element = pointers.get_element_ty()
        if other is None and element.is_floating():
            bits = np.full(mask.data.shape, 0x7FC0 if element == tl.bfloat16 else np.nan)
            other = TensorHandle(bits.astype(interpreter._get_np_dtype(element)), element)
        return load(self, pointers, mask, other, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def remembering_call(self, *args, **kwargs):
        ranges.clear()
        for tensor in flatten((*args, *kwargs.values())):
            if hasattr(tensor, "data_ptr") and tensor.numel():
                extent = sum(
                    (n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
                )
                first = tensor.data_ptr()
                ranges.append((first, first + (extent + 1) * tensor.element_size()))
        return call(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    executor.__call__ = remembering_call
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = saved
