"""Repairs bfloat16 in Triton's interpreter, which stores it as uint16 codes and does integer arithmetic on them.

Operands widen to float32, the operation runs, the result rounds to nearest even. Arithmetic, dot, sums, scans, casts and
constants are covered; bfloat16 atomics still raise. A driver stand-in lets code that asks for the target run without a GPU.
Importing this module applies the repair; triton must have been imported with TRITON_INTERPRET=1.
"""

import functools

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle


def widen(codes):
    return (codes.astype(np.uint32) << 16).view(np.float32)


def narrow(values):
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bf16(handle):
    if not isinstance(handle, TensorHandle) or isinstance(handle.dtype, tl.pointer_type):
        return False
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def to_fp32(handle):
    return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def to_bf16(handle):
    return TensorHandle(narrow(handle.data), tl.bfloat16) if handle.dtype.scalar == tl.float32 else handle


def repair_operation(name, operands):
    original = getattr(InterpreterBuilder, name)

    @functools.wraps(original)
    def repaired(self, *args):
        if not any(map(is_bf16, args[:operands])):
            return original(self, *args)
        result = original(self, *map(to_fp32, args[:operands]), *args[operands:])
        return result if result.data.dtype == np.bool_ else to_bf16(result)

    setattr(InterpreterBuilder, name, repaired)


def repair_dot(original):
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == b.dtype.scalar == d.dtype.scalar == tl.float32:
            # BLAS sums in an order that depends on the tile's shape; the compiled kernel is a chain of fused multiply-adds
            # over k whatever its tile, so that what one kernel recomputes agrees with what another computed.
            total = d.data.astype(np.float32)
            wide_a, wide_b = a.data.astype(np.float64), b.data.astype(np.float64)
            for k in range(a.data.shape[-1]):
                total = (total + wide_a[..., :, k, None] * wide_b[..., k, None, :]).astype(np.float32)
            return TensorHandle(total, tl.float32)
        result = original(self, to_fp32(a), to_fp32(b), to_fp32(d), input_precision, max_num_imprecise_acc)
        return to_bf16(result) if is_bf16(d) else result

    return create_dot


def repair_cast(original):
    def cast_impl(self, source, dtype):
        if is_bf16(source) and dtype.scalar != tl.bfloat16:
            return to_fp32(source) if dtype.scalar == tl.float32 else original(self, to_fp32(source), dtype)
        if dtype.scalar == tl.bfloat16 and not is_bf16(source):
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return original(self, source, dtype)

    return cast_impl


def repair_fold(cls, name):
    """Sums and scans: numpy would add the codes."""
    original = getattr(cls, name)

    def narrowed(self, tensor):
        codes = narrow(tensor.handle.data)
        return self.to_tensor(codes if tensor.type.is_block() else codes.ravel()[0], tl.bfloat16)

    def repaired(self, x):
        if not is_bf16(x.handle):
            return original(self, x)
        result = original(self, self.to_tensor(widen(x.handle.data), tl.float32))
        return [narrowed(self, t) for t in result] if isinstance(result, list) else narrowed(self, result)

    setattr(cls, name, repaired)


class NoDriver:
    """What code may ask of a driver while kernels are interpreted."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


for _name, _operands in (("binary_op", 2), ("unary_op", 1), ("create_fabs", 1), ("create_rsqrt", 1),
                         ("create_erf", 1), ("create_fma", 3), ("create_clampf", 3)):  # fmt: skip
    repair_operation(_name, _operands)
InterpreterBuilder.create_dot = repair_dot(InterpreterBuilder.create_dot)
InterpreterBuilder.cast_impl = repair_cast(InterpreterBuilder.cast_impl)
InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(narrow(np.array([value])), tl.bfloat16)
for _cls, _names in ((ReduceOps, ("sum",)), (ScanOps, ("cumsum", "cumprod"))):
    for _name in _names:
        repair_fold(_cls, _name)
triton.runtime.driver.set_active(NoDriver())
