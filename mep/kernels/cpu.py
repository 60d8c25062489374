"""Fused kernels for float32 on a CPU, compiled by numba on first use and kept on disk.

Each reads its operands once and writes its results once, where a chain of torch calls walks
through memory for every operation. They take addresses of contiguous memory: wrapping an array
would cost as much as the arithmetic.
"""

# numba gives functions other signatures than they are written with.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numba
from numba import njit, types
from numba.core import config
from numba.extending import intrinsic

__all__ = [
    "RAMP", "Kernels", "activate", "compiled", "cross_entropy", "doubles", "floats", "integers",
    "kernels", "move", "moved_from", "nudge", "pull", "slope",
]  # fmt: skip

_HERE = Path(__file__).parent
_f32 = numba.float32
# From this product of value and displacement on, a unit may end up on the other side.
_CROSSING = _f32(-0.5)
# Sums may be reordered and products contracted; NaN and infinity keep their meaning.
_ARITHMETIC: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
}


@dataclass(frozen=True)
class Kernels:
    """The kernels of one activation. Arguments ending in the batch ``B`` and the units ``n``.

    Attributes:
        kind: number of the activation.
        activate: ``(s, bias, y, B, n)``: ``s <- s + bias``, ``y <- phi(s)``; bias may be 0, none.
        move: ``(s, y, d, change, y_new, B, n)``: ``change <- phi(s + d) - phi(s)`` without
            cancellation, ``y_new <- phi(s + d)``.
        pull: ``(y, p, e, B, n)``: ``e <- phi'(s) p``; returns ``||e||^2``.
        nudge: ``(s, y, d, beta, p, e, change, y_new, norm, B, n)``: ``d <- d + beta e``, the same
            as ``move``, and per sample ``norm <- ||phi'(s + d) p - e||``; ``y_new`` may be ``y``,
            and then ``e`` may be 0: it is made of ``p``, and takes its place.
    """

    kind: int
    activate: Callable[..., None]
    move: Callable[..., None]
    pull: Callable[..., float]
    nudge: Callable[..., None]


def compiled(compiler: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """Returns what a compiler of numba's makes of a function, and keeps it for the next process.

    numba compiles again when the function's own file has changed; here it has to when any file of
    this folder has, for compiled functions contain those that they call.
    """
    before = config.CACHE_DIR
    config.CACHE_DIR = str(Path(before or _HERE / "__pycache__") / f"kernels-{_stamp()}")
    try:
        return compiler(cache=True, **_ARITHMETIC)(function)
    except RuntimeError:  # there is no place on this machine where it could be kept
        return compiler(**_ARITHMETIC)(function)
    finally:
        config.CACHE_DIR = before


@cache
def _stamp() -> str:
    """What the sources of this folder are known by."""
    whole = hashlib.sha256()
    for file in sorted(_HERE.glob("*.py")):
        whole.update(file.read_bytes())
    return whole.hexdigest()[:16]


_kernel = partial(compiled, njit)


def _cast(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.inttoptr(args[0], context.get_value_type(signature.return_type))


@intrinsic
def floats(typingctx: Any, address: Any) -> Any:
    """An address as a pointer to float32."""
    return types.CPointer(types.float32)(address), _cast


@intrinsic
def doubles(typingctx: Any, address: Any) -> Any:
    """An address as a pointer to float64."""
    return types.CPointer(types.float64)(address), _cast


@intrinsic
def integers(typingctx: Any, address: Any) -> Any:
    """An address as a pointer to int64."""
    return types.CPointer(types.int64)(address), _cast


@njit(inline="always")
def _tanh(x):
    """A quotient of odd and even polynomials, to 4e-7 of the value."""
    c = min(max(x, _f32(-7.9988117)), _f32(7.9988117))
    q = c * c
    odd = q * _f32(-2.76076847742355e-16) + _f32(2.00018790482477e-13)
    odd = q * odd + _f32(-8.60467152213735e-11)
    odd = q * odd + _f32(5.12229709037114e-08)
    odd = q * odd + _f32(1.48572235717979e-05)
    odd = q * odd + _f32(6.37261928875436e-04)
    odd = q * odd + _f32(4.89352455891786e-03)
    even = q * _f32(1.19825839466702e-06) + _f32(1.18534705686654e-04)
    even = q * even + _f32(2.26843463243900e-03)
    even = q * even + _f32(4.89352518554385e-03)
    return c * (odd / even) if x == x else x  # whatever a clamp makes of a NaN


@njit(inline="always")
def _tanh_slope(y):
    return _f32(1) - y * y


@njit(inline="always")
def _tanh_change(s, y, d):
    """``tanh(s + d) - tanh s = t (1 - y^2) / (1 + y t)`` with ``t = tanh d``."""
    t = _tanh(d)
    return t * (_f32(1) - y * y) / (_f32(1) + y * t)


@njit(inline="always")
def _tanh_crossing(s, y, d):
    """The same for a unit on its way to the other end, where quotient and square lose digits."""
    return _tanh(s + d) - y if y * d < _CROSSING else _tanh_change(s, y, d)


@njit(inline="always")
def _relu(x):
    return _f32(0) if x <= 0 else x


@njit(inline="always")
def _relu_slope(y):
    return _f32(0) if y <= 0 else _f32(1)


@njit(inline="always")
def _relu_change(s, y, d):
    """``max(d + min(s, 0), -max(s, 0))``: exactly ``d`` or 0 where the kink is not crossed."""
    moved = d + (s - y)
    return -y if moved <= -y else moved


_KINDS = {"tanh": 0, "relu": 1}
_TANH, RAMP = _KINDS["tanh"], _KINDS["relu"]


# The compiler takes a choice that is the same for all units out of the loop.
@njit(inline="always")
def _value(kind, x):
    return _tanh(x) if kind == _TANH else _relu(x)


@njit(inline="always")
def slope(kind, y):
    """Returns ``phi'`` where the activity is ``y``."""
    return _tanh_slope(y) if kind == _TANH else _relu_slope(y)


@njit(inline="always")
def _change(kind, s, y, d):
    return _tanh_change(s, y, d) if kind == _TANH else _relu_change(s, y, d)


@njit(inline="always")
def _crossing(kind, s, y, d):
    return _tanh_crossing(s, y, d) if kind == _TANH else _relu_change(s, y, d)


@_kernel
def activate(kind, s_, bias_, y_, batch, n):
    """``Kernels.activate`` of an activation by its number."""
    s, y = numba.carray(floats(s_), (batch, n)), numba.carray(floats(y_), (batch, n))
    if bias_ != 0:
        bias = numba.carray(floats(bias_), (n,))
        for b in range(batch):
            for j in range(n):
                s[b, j] += bias[j]
                y[b, j] = _value(kind, s[b, j])
    else:
        for b in range(batch):
            for j in range(n):
                y[b, j] = _value(kind, s[b, j])


@njit(inline="always")
def _changes(kind, s, y, d, change, b, n):
    """One sample's change of activity."""
    crossings = _f32(0)  # a count: a minimum would not be vectorised
    for j in range(n):
        crossings += _f32(1) if y[b, j] * d[b, j] < _CROSSING else _f32(0)
        change[b, j] = _change(kind, s[b, j], y[b, j], d[b, j])
    if crossings > 0:  # hardly ever: the whole row again, with care
        for j in range(n):
            change[b, j] = _crossing(kind, s[b, j], y[b, j], d[b, j])


@_kernel
def move(kind, s_, y_, d_, change_, y_new_, batch, n):
    """``Kernels.move`` of an activation by its number."""
    s, y = numba.carray(floats(s_), (batch, n)), numba.carray(floats(y_), (batch, n))
    d, change = numba.carray(floats(d_), (batch, n)), numba.carray(floats(change_), (batch, n))
    y_new = numba.carray(floats(y_new_), (batch, n))
    for b in range(batch):
        _changes(kind, s, y, d, change, b, n)
        for j in range(n):
            y_new[b, j] = y[b, j] + change[b, j]


@njit(inline="always")
def moved_from(kind, s_, d_, change_, y_, batch, n):
    """``change <- phi(s + d) - phi(s)``, ``y <- phi(s + d)``, where nothing is known of ``s``."""
    s, d = numba.carray(floats(s_), (batch, n)), numba.carray(floats(d_), (batch, n))
    change, y = numba.carray(floats(change_), (batch, n)), numba.carray(floats(y_), (batch, n))
    for b in range(batch):
        for j in range(n):
            y[b, j] = _value(kind, s[b, j])
        _changes(kind, s, y, d, change, b, n)
        for j in range(n):
            y[b, j] += change[b, j]


@_kernel
def pull(kind, y_, p_, e_, batch, n):
    """``Kernels.pull`` of an activation by its number."""
    y, p = numba.carray(floats(y_), (batch, n)), numba.carray(floats(p_), (batch, n))
    e = numba.carray(floats(e_), (batch, n))
    total = 0.0
    for b in range(batch):
        row = _f32(0)
        for j in range(n):
            error = slope(kind, y[b, j]) * p[b, j]
            e[b, j] = error
            row += error * error
        total += row
    return total


@njit(inline="always")
def _nudged(kind, s, y, d, share, p, e, change, y_new, norm, batch, n):
    for b in range(batch):
        if share != 0:
            for j in range(n):
                d[b, j] += share * e[b, j]
        _changes(kind, s, y, d, change, b, n)
        row = _f32(0)
        for j in range(n):
            value_new = y[b, j] + change[b, j]
            y_new[b, j] = value_new
            force = slope(kind, value_new) * p[b, j] - e[b, j]
            row += force * force
        norm[b] = math.sqrt(row)


@njit(inline="always")
def _nudged_alone(kind, s, y, d, share, p, change, norm, batch, n):
    """The same of an error that is nowhere: of ``p``, in whose place it is put."""
    for b in range(batch):
        if share != 0:
            for j in range(n):
                d[b, j] += share * (slope(kind, y[b, j]) * p[b, j])
        _changes(kind, s, y, d, change, b, n)
        row = _f32(0)
        for j in range(n):
            error = slope(kind, y[b, j]) * p[b, j]
            value_new = y[b, j] + change[b, j]
            y[b, j] = value_new
            force = slope(kind, value_new) * p[b, j] - error
            p[b, j] = error
            row += force * force
        norm[b] = math.sqrt(row)


@_kernel
def nudge(kind, s_, y_, d_, beta, p_, e_, change_, y_new_, norm_, batch, n):
    """``Kernels.nudge`` of an activation by its number."""
    s, y = numba.carray(floats(s_), (batch, n)), numba.carray(floats(y_), (batch, n))
    d, p = numba.carray(floats(d_), (batch, n)), numba.carray(floats(p_), (batch, n))
    e, norm = numba.carray(floats(e_), (batch, n)), numba.carray(floats(norm_), (batch,))
    change, share = numba.carray(floats(change_), (batch, n)), _f32(beta)
    if e_ == 0:
        _nudged_alone(kind, s, y, d, share, p, change, norm, batch, n)
    elif y_new_ == y_:  # one array by two names would not be vectorised
        _nudged(kind, s, y, d, share, p, e, change, y, norm, batch, n)
    else:
        y_new = numba.carray(floats(y_new_), (batch, n))
        _nudged(kind, s, y, d, share, p, e, change, y_new, norm, batch, n)


@_kernel
def cross_entropy(s_, y_, value_, gradient_, batch, n):
    """``value <- -log softmax(s)_y``, ``gradient <- softmax(s) - one_hot(y)``, by sample.

    The entry of the target is minus the others' sum, which keeps its digits where they are small.
    """
    s, y = numba.carray(floats(s_), (batch, n)), numba.carray(integers(y_), (batch,))
    value = numba.carray(floats(value_), (batch,))
    gradient = numba.carray(floats(gradient_), (batch, n))
    for b in range(batch):
        own, most = s[b, y[b]], s[b, 0]
        for j in range(n):
            most = max(most, s[b, j])
        others = _f32(0)
        for j in range(n):
            gradient[b, j] = math.exp(s[b, j] - most) if j != y[b] else _f32(0)
            others += gradient[b, j]
        whole = others + math.exp(own - most)
        for j in range(n):
            gradient[b, j] /= whole
        gradient[b, y[b]] = -others / whole
        value[b] = (most - own) + math.log(whole)


def kernels(activation: str) -> Kernels | None:
    """Returns the kernels of an activation, or None if it has none here."""
    if activation not in _KINDS:
        return None
    kind = _KINDS[activation]
    return Kernels(kind, *(partial(kernel, kind) for kernel in (activate, move, pull, nudge)))
