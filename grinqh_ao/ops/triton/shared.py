"""Shared memory that a program addresses as it likes, for which Triton has no operations.

Addresses are int32, in bytes. What is not SHARED has pointers to int8 instead, into global memory:
Triton's interpreter has nothing else, and not everything fits.
"""

from __future__ import annotations

import triton
import triton.language as tl

STORE_16_BYTES = tl.constexpr(
    "{.reg .pred p; .reg .b32 lower, upper; setp.ne.s32 p, $5, 0; mov.b64 {lower, upper}, $4; "
    "@p st.shared.v4.b32 [$1], {$2, $3, lower, upper}; mov.u32 $0, 0;}"
)
STORE_8_BYTES = tl.constexpr(
    "{.reg .pred p; setp.ne.s32 p, $4, 0; @p st.shared.v2.b32 [$1], {$2, $3}; mov.u32 $0, 0;}"
)
STORE_4_BYTES = tl.constexpr(
    "{.reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.u32 $0, 0;}"
)
STORE_FLOATS_2 = tl.constexpr("st.shared.v2.b32 [$2], {$4, $5}; mov.u32 $0, 0; mov.u32 $1, 0;")
STORE_FLOATS_4 = tl.constexpr(
    "st.shared.v4.b32 [$4], {$8, $9, $10, $11}; "
    "mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;"
)


@triton.constexpr_function
def allocation(size):
    return f"{{.shared .align 16 .b8 grinqh_memory[{size}]; mov.u32 $0, grinqh_memory;}}"


@triton.jit
def allocate(SIZE: tl.constexpr):
    """Once in a program; 48 KiB are there without asking, Triton's own included."""
    return tl.inline_asm_elementwise(
        allocation(SIZE), "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def bits_of(value):
    return value.to(tl.int32, bitcast=True)


@triton.jit
def as_pointer(address, element: tl.constexpr):
    return address.to(tl.pointer_type(element))


@triton.jit
def store_16_bytes(address, first, second, rest, mask, SHARED: tl.constexpr):
    """int32, float32 and int64, side by side."""
    if SHARED:
        tl.inline_asm_elementwise(
            STORE_16_BYTES, "=r,r,r,r,l,r",
            [address, first, bits_of(second), rest, mask.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(as_pointer(address, tl.int32), first, mask=mask)
        tl.store(as_pointer(address + 4, tl.float32), second, mask=mask)
        tl.store(as_pointer(address + 8, tl.int64), rest, mask=mask)


@triton.jit
def store_8_bytes(address, first, second, mask):
    """Two int32, side by side, in shared memory."""
    tl.inline_asm_elementwise(
        STORE_8_BYTES, "=r,r,r,r,r", [address, first, second, mask.to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def store_float(address, value, mask, SHARED: tl.constexpr):
    if SHARED:
        tl.inline_asm_elementwise(
            STORE_4_BYTES, "=r,r,r,r", [address, bits_of(value), mask.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(as_pointer(address, tl.float32), value, mask=mask)


@triton.jit
def store_vectors(address, values, SHARED: tl.constexpr):
    """Values [threads, 2 or 4], those of a thread side by side."""
    if SHARED:
        if values.shape[1] == 4:
            tl.inline_asm_elementwise(
                STORE_FLOATS_4, "=r,=r,=r,=r,r,r,r,r,r,r,r,r", [address, bits_of(values)],
                dtype=tl.int32, is_pure=False, pack=4,
            )  # fmt: skip
        else:
            tl.inline_asm_elementwise(
                STORE_FLOATS_2, "=r,=r,r,r,r,r", [address, bits_of(values)],
                dtype=tl.int32, is_pure=False, pack=2,
            )  # fmt: skip
    else:
        tl.store(as_pointer(address, tl.float32), values)


@triton.jit
def load_vectors(address, V: tl.constexpr, SHARED: tl.constexpr):
    """What ``store_vectors`` has stored, float32 [threads, V] from addresses of that shape."""
    if SHARED:
        if V == 4:
            bits = tl.inline_asm_elementwise(
                "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r,r,r,r", [address],
                dtype=tl.int32, is_pure=False, pack=4,
            )  # fmt: skip
        else:
            bits = tl.inline_asm_elementwise(
                "ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r,r", [address],
                dtype=tl.int32, is_pure=False, pack=2,
            )  # fmt: skip
        return bits.to(tl.float32, bitcast=True)
    else:
        return tl.load(as_pointer(address, tl.float32))


@triton.jit
def load_int(address, SHARED: tl.constexpr):
    if SHARED:
        return tl.inline_asm_elementwise(
            "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.load(as_pointer(address, tl.int32))


@triton.jit
def load_float(address, SHARED: tl.constexpr):
    return load_int(address, SHARED).to(tl.float32, bitcast=True)


@triton.jit
def load_byte(address, SHARED: tl.constexpr):
    """As int32."""
    if SHARED:
        return tl.inline_asm_elementwise(
            "ld.shared.u8 $0, [$1];", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.load(as_pointer(address, tl.uint8)).to(tl.int32)
