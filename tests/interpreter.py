"""Triton's interpreter made to round and multiply as a GPU does; import it before any kernel.

Three of its habits (3.6) are not a GPU's: bounds of loops that are tensors fail with numpy 2.4 and
later; float32 to bfloat16 cuts instead of rounding; and products of bfloat16 multiply the bits.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

_Builder: Any = interpreter.InterpreterBuilder
_Handle: Any = interpreter.TensorHandle


def _rounded(values: Any) -> Any:
    """float32 as bits of bfloat16, to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _install() -> None:
    patch, cast = interpreter._patch_lang_tensor, _Builder.cast_impl
    convert, dot = _Builder.create_fp_to_fp, _Builder.create_dot

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    def narrows(source: Any, target: Any) -> bool:
        return source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if narrows(source, target):
            return _Handle(_rounded(source.data), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if narrows(source, target):
            return _Handle(_rounded(source.data), tl.bfloat16)
        return convert(self, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), total, *rest)

    def between(self: Any, source: Any, target: Any) -> Any:
        return self.cast_impl(source, target)

    interpreter._patch_lang_tensor = patch_tensor
    _Builder.cast_impl, _Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    _Builder.create_dot = create_dot
    _Builder.create_fp_ext = _Builder.create_fp_trunc = between


_install()
