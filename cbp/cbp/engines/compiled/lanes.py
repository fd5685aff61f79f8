"""Sixteen float32 side by side, as one value of compiled code: a register of AVX-512, two of AVX2, four of NEON.

The compiler turns loops over single numbers into such registers of its own accord, but into half as wide ones, and it
does not keep a tile of sums in them. What comes out does not depend on the processor: every operation works on each
lane by itself, except `sum_each`, which adds in an order of its own.

Addresses are of float32 and need no other alignment.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

LANES = 16
LANE_BYTES = 4 * LANES
Lanes = Any
"""Sixteen float32."""

_FLOAT, _INT, _BIT, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(1), ir.IntType(64)
_VECTOR, _FOUR = ir.VectorType(_FLOAT, LANES), ir.VectorType(_FLOAT, 4)
_FLAGS, _LONGS = ir.VectorType(_BIT, LANES), ir.VectorType(_LONG, LANES)
_ALIGNMENT = 4


def has_wide_registers() -> bool:
    """Whether this processor has enough room in registers for a tile of sums."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512f", False))


class _LanesType(types.Type):
    pass


def _model_of_lanes(manager: Any, its_type: Any) -> Any:
    model: Any = models.PrimitiveModel
    return model(manager, its_type, _VECTOR)


_register: Any = register_model(_LanesType)
_register(_model_of_lanes)
_make_type: Any = _LanesType
_LANES = _make_type("Lanes")
_uniform_tuple: Any = types.UniTuple
_declare: Any = cgutils.get_or_insert_function


def _pointer(builder: Any, address: Any, element: Any) -> Any:
    return builder.inttoptr(address, element.as_pointer())


def _load(builder: Any, address: Any, element: Any) -> Any:
    loaded = builder.load(_pointer(builder, address, element))
    loaded.align = _ALIGNMENT
    return loaded


def _shuffled(builder: Any, first: Any, second: Any, places: list[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INT, len(places)), places))


def _repeated(builder: Any, value: Any, vector: Any) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_INT, 0))
    return _shuffled(builder, one, one, [0] * LANES)


def _first(builder: Any, count: Any) -> Any:
    """The lanes before `count`."""
    return builder.icmp_signed("<", ir.Constant(_LONGS, list(range(LANES))), _repeated(builder, count, _LONGS))


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(_declare(builder.module, function_type, name), arguments)


def _operation(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """A function of compiled code, from one that builds its instructions out of the arguments' values."""

    def decorate(build: Callable[..., Any]) -> Any:
        def code(target: Any, builder: Any, _signature: Any, values: Any) -> Any:
            built = build(builder, *values)
            return target.get_dummy_value() if result is types.void else built

        typed = result(*arguments), code

        def of_none(_context: Any) -> Any:
            return typed

        def of_one(_context: Any, _first: Any) -> Any:
            return typed

        def of_two(_context: Any, _first: Any, _second: Any) -> Any:
            return typed

        def of_three(_context: Any, _first: Any, _second: Any, _third: Any) -> Any:
            return typed

        return intrinsic((of_none, of_one, of_two, of_three)[len(arguments)])

    return decorate


@_operation(_LANES)
def zeros(_builder: Any) -> Any:
    return ir.Constant(_VECTOR, [0.0] * LANES)


@_operation(_LANES, types.float32)
def fill(builder: Any, number: Any) -> Any:
    """One number in all lanes."""
    return _repeated(builder, number, _VECTOR)


@_operation(_LANES, types.int64)
def load(builder: Any, address: Any) -> Any:
    """The sixteen numbers from an address on."""
    return _load(builder, address, _VECTOR)


@_operation(_LANES, types.int64, types.int64)
def load_first(builder: Any, address: Any, count: Any) -> Any:
    """The first `count` of them, and zeros; nothing else is read."""
    others = [ir.Constant(_INT, _ALIGNMENT), _first(builder, count), ir.Constant(_VECTOR, [0.0] * LANES)]
    return _call(builder, "llvm.masked.load.v16f32.p0", _VECTOR, [_pointer(builder, address, _VECTOR), *others])


@_operation(_LANES, types.int64)
def load_four(builder: Any, address: Any) -> Any:
    """Four numbers, four times."""
    four = _load(builder, address, _FOUR)
    return _shuffled(builder, four, four, [0, 1, 2, 3] * 4)


@_operation(_LANES, types.int64)
def load_one(builder: Any, address: Any) -> Any:
    """The number at an address in all lanes."""
    return _repeated(builder, _load(builder, address, _FLOAT), _VECTOR)


@_operation(types.void, types.int64, types.int64, _LANES)
def store_first(builder: Any, address: Any, count: Any, lanes: Any) -> None:
    """The first `count` lanes."""
    others = [_pointer(builder, address, _VECTOR), ir.Constant(_INT, _ALIGNMENT), _first(builder, count)]
    _call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), [lanes, *others])


@_operation(types.void, types.int64, types.int64, _LANES)
def store_fours(builder: Any, address: Any, step: Any, lanes: Any) -> None:
    """Four lanes to an address, and the next to each of three more, `step` bytes apart."""
    for start in range(0, LANES, 4):
        four = _shuffled(builder, lanes, lanes, list(range(start, start + 4)))
        builder.store(four, _pointer(builder, address, _FOUR)).align = _ALIGNMENT
        address = builder.add(address, step)


@_operation(_LANES, _LANES, _LANES)
def add(builder: Any, first: Any, second: Any) -> Any:
    return builder.fadd(first, second)


@_operation(_LANES, _LANES)
def absolute(builder: Any, lanes: Any) -> Any:
    return _call(builder, "llvm.fabs.v16f32", _VECTOR, [lanes])


@_operation(_LANES, _LANES, _LANES, _LANES)
def multiply_add(builder: Any, first: Any, second: Any, third: Any) -> Any:
    """first · second + third, rounded once."""
    return _call(builder, "llvm.fma.v16f32", _VECTOR, [first, second, third])


@_operation(_LANES, _uniform_tuple(_LANES, LANES))
def sum_each(builder: Any, sixteen: Any) -> Any:
    """In lane k the sum over all lanes of number k: halves of two are added into one, until one is left."""
    left = [builder.extract_value(sixteen, k) for k in range(LANES)]
    width = LANES // 2
    while width:
        starts = range(0, LANES, 2 * width)
        low = [start + k + of for start in starts for of in (0, LANES) for k in range(width)]
        high = [place + width for place in low]
        pairs = zip(left[: len(left) // 2], left[len(left) // 2 :], strict=True)
        left = [builder.fadd(_shuffled(builder, *pair, low), _shuffled(builder, *pair, high)) for pair in pairs]
        width //= 2
    return left[0]
