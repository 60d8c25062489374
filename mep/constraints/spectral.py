"""SpectralNorm: no weight stretches any input by more than its bound."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mep.constraints.constraint import Constraint

__all__ = ["SpectralNorm"]

BOUND, VECTORS, DRAWS = "spectral_bound", "spectral_vectors", "spectral_draws"  # keys of the state

KEPT = 4  # vectors kept from step to step: one product of four costs what one of one does
DEPTH = 2  # products per step: with four vectors hardly ever refused, even under Muon with lr 0.1
SLACK = 1.005  # what an estimate may miss; the rest of the 1.01 is left to rounding in bfloat16
CERTAIN = 64  # Lanczos products without a certificate: see `_lanczos`
ROUNDING = 1e-5  # float32 estimates differ by less: no reason to touch a weight
AT_ONCE = 2**22  # entries in one batch: bounds the memory

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SpectralNorm(Constraint):
    """``sigma(W) <= b`` up to 1 %; a weight beyond is scaled, ``W <- (b / sigma) W``, or clipped.

    Scaling is cheap and keeps every direction in proportion, but wherever one of them grows at
    every step it drags all others down with it, as weight decay would. Clipping,
    ``W <- U min(S, b) V^T``, leaves them alone: it is the projection onto the ball of the spectral
    norm, the nearest weight in the Frobenius norm. Values up to 1.005 b may stay. A few directions
    are clipped by the estimate's own vectors; many take a decomposition of the Gram matrix in
    float64 at every step, cheap for kernels of some 100 rows and dear for 512.

    The largest singular value is estimated from below by block power iteration from the vectors of
    the last step. For matrices a Cholesky factor of ``(1.005 sigma)^2 I - W W^T`` then proves that
    nothing was missed (of the clipped ``W``, with ``b`` for ``sigma``), and the exact value is
    taken where it does not exist: neither a small gap
    nor a jump in an unknown direction breaks the bound. Matrices of one shape are one batch;
    kernels count as ``(out, in * height * width)``. Embeddings and vectors are left alone, and so
    are weights that have not just been updated.

    A bare kernel knows no stride, padding or groups: its operator is the convolution of stride 1
    with ``kernel // 2`` zeros around, ungrouped. No such proof exists for it; 64 Lanczos products
    from a start with a fresh random part find its norm within 1 % whatever its spectrum is, with a
    probability of failure below 1e-4 per step for inputs of up to 100,000 entries.

    Args:
        bound: > 0; None for ``max(1, sigma)`` of each weight at construction.
        conv: ``"flattened"``, or ``"operator"``: the operator norm for kernels of four dimensions.
        size: (height, width) of the images that kernels act on, for ``conv="operator"`` only.
        ends: False leaves the first and the last weight of a model alone, such as those into and
            out of a recurrent one.
        clip: whether only the singular values beyond the bound are cut down to it; for
            ``conv="flattened"``.

    Raises:
        TypeError, ValueError: if an option does not fit.

    >>> weight = torch.diag(torch.tensor([4.0, 1.0]))
    >>> SpectralNorm(2.0).apply([weight], [{}])
    >>> weight
    tensor([[2.0000, 0.0000],
            [0.0000, 0.5000]])

    >>> weight = torch.diag(torch.tensor([4.0, 1.0]))
    >>> SpectralNorm(2.0, clip=True).apply([weight], [{}])
    >>> weight
    tensor([[2.0000, 0.0000],
            [0.0000, 1.0000]])

    Source: Miyato et al. 2018, sec. 2.1 and appendix A (power iteration); operator norms of
    convolutions: Sedghi et al. 2019; the projection: Lefkimmiatis et al. 2013, proposition 1.
    """

    bound: float | None = None
    conv: Literal["flattened", "operator"] = "flattened"
    size: tuple[int, int] | None = None
    ends: bool = True
    clip: bool = False

    def __post_init__(self) -> None:
        if self.bound is not None:
            if isinstance(self.bound, bool) or not isinstance(self.bound, (int, float)):
                raise TypeError(
                    f"`SpectralNorm(bound=...)` must be a number or None, got {self.bound!r}"
                )
            if not (self.bound > 0 and math.isfinite(self.bound)):
                relation = "finite" if self.bound > 0 else "> 0"
                raise ValueError(f"`SpectralNorm(bound=...)` must be {relation}, got {self.bound}")
        if self.conv not in ("flattened", "operator"):
            raise ValueError(
                f"`SpectralNorm(conv=...)` must be 'flattened' or 'operator', got {self.conv!r}"
            )
        if (self.size is not None) != (self.conv == "operator"):
            raise ValueError(
                "`SpectralNorm(size=...)` is needed with conv='operator' and only there, "
                f"got size={self.size!r} with conv={self.conv!r}"
            )
        for name in ("ends", "clip"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"`SpectralNorm({name}=...)` must be a bool, got {getattr(self, name)!r}"
                )
        if self.clip and self.conv == "operator":
            raise ValueError(
                "`SpectralNorm(clip=True)` needs conv='flattened': an operator norm can be scaled "
                "only, for as a rule no kernel of that size has the clipped spectrum"
            )
        if self.size is not None and not (
            isinstance(self.size, tuple)
            and len(self.size) == 2
            and all(isinstance(n, int) and n >= 1 for n in self.size)
        ):
            raise ValueError(
                "`SpectralNorm(size=...)` must be two whole numbers >= 1 (height, width), "
                f"got {self.size!r}"
            )

    def holds_for(self, parameter: Tensor, role: str) -> bool:
        matrix = role not in ("embedding", "vector") and parameter.dim() >= 2
        return matrix and parameter.numel() > 0 and (self.ends or role == "hidden")

    @torch.no_grad()
    def prepare(self, parameter: Tensor, state: dict[str, Any]) -> None:
        if self.bound is None:
            weight = parameter.to(_dtype(parameter))
            if self._is_operator(parameter):
                norm = self._of_kernels(weight[None], [{DRAWS: 0}], 2 * CERTAIN)[0][0]
            else:
                norm = torch.linalg.matrix_norm(weight.flatten(1), 2)
            # a Python float: `load_state_dict` casts tensors to the parameter's dtype
            state[BOUND] = max(1.0, float(norm))

    @torch.no_grad()
    def apply(self, parameters: list[Tensor], states: list[dict[str, Any]]) -> None:
        batches: dict[tuple, list[tuple[Tensor, dict[str, Any]]]] = defaultdict(list)
        for parameter, state in zip(parameters, states, strict=True):
            if self.bound is None and BOUND not in state:  # a checkpoint of a run without bounds
                self.prepare(parameter, state)
            if VECTORS in state and state[VECTORS].shape != self._shape(parameter):
                del state[VECTORS]  # of a run with another `conv` or `size`
            key = parameter.shape, parameter.dtype, parameter.device, VECTORS in state
            batches[key].append((parameter, state))
        for batch in batches.values():
            largest = max(1, AT_ONCE // self._entries(batch[0][0]))
            for start in range(0, len(batch), largest):
                self._apply(batch[start : start + largest])

    def _apply(self, batch: list[tuple[Tensor, dict[str, Any]]]) -> None:
        first, states = batch[0][0], [state for _, state in batch]
        weights = torch.stack([p for p, _ in batch]).to(_dtype(first))
        bounds = weights.new_tensor([self.bound or state[BOUND] for state in states])
        parameters = [p for p, _ in batch]
        if self.clip:
            vectors = _clip(parameters, weights.flatten(2), bounds, states)
        else:
            vectors = self._scale(parameters, weights, bounds, states)
        for state, vector in zip(states, vectors.to(first.dtype), strict=True):
            state[VECTORS] = vector.clone()  # of its own, or each would be saved with the batch

    def _scale(
        self, parameters: list[Tensor], weights: Tensor, bounds: Tensor, states: list[dict]
    ) -> Tensor:
        """Scales parameters beyond their bounds; returns the vectors of a batch of copies."""
        if self._is_operator(parameters[0]):
            norms, vectors = self._of_kernels(weights, states, CERTAIN)
        else:
            norms, vectors = _of_matrices(weights.flatten(2), bounds, states)
        for p, factor in zip(parameters, (bounds / norms).tolist(), strict=True):
            if factor < 1 - ROUNDING:
                p.mul_(factor)
        return vectors

    def _is_operator(self, parameter: Tensor) -> bool:
        return self.conv == "operator" and parameter.dim() == 4

    def _shape(self, parameter: Tensor) -> tuple[int, int]:
        """Returns the shape of what is kept of a parameter's vectors."""
        if self._is_operator(parameter):
            return parameter.shape[1] * math.prod(self.size or ()), 1
        rows = min(len(parameter), parameter[0].numel())
        return rows, min(KEPT, rows)

    def _entries(self, parameter: Tensor) -> int:
        """Returns how many numbers one parameter's estimate stands in."""
        if self._is_operator(parameter):
            return 2 * CERTAIN * self._shape(parameter)[0]
        return parameter.numel()

    def _of_kernels(
        self, weights: Tensor, states: list[dict[str, Any]], depth: int
    ) -> tuple[Tensor, Tensor]:
        """Returns operator norms of kernels ``(N, out, in, *kernel)`` and their first vectors."""
        size = self.size or ()
        count, _, inputs, *kernel = weights.shape
        padding = [k // 2 for k in kernel]
        joined = weights.flatten(0, 1)

        def product(v: Tensor) -> Tensor:
            images = v.reshape(1, count * inputs, *size)
            out = F.conv2d(images, joined, padding=padding, groups=count)
            back = F.conv_transpose2d(out, joined, padding=padding, groups=count)
            return back.view(count, -1, 1)

        starts = []
        for state in states:
            # new at every step and the same after a resume: nothing stays hidden for long
            state[DRAWS] = state.get(DRAWS, 0) + 1
            generator = torch.Generator().manual_seed(state[DRAWS])
            fresh = torch.randn(inputs * math.prod(size), 1, generator=generator)
            start = F.normalize(fresh, dim=0).to(weights)
            starts.append(start + state[VECTORS].to(weights) if VECTORS in state else start)
        top, vectors = _lanczos(product, torch.stack(starts), depth)
        return top.sqrt(), vectors


def _of_matrices(
    weights: Tensor, bounds: Tensor, states: list[dict[str, Any]]
) -> tuple[Tensor, Tensor]:
    """Returns the norms of matrices ``(N, m, n)``, to 0.5 % if above the bound, and vectors.

    Overwrites the matrices.
    """
    units = _units(weights, bounds)
    gram = _gram(weights.div_(units[:, None, None]))
    values, vectors = _ritz(gram, states)
    top = values[:, -1]
    missed = ~_within(gram, SLACK**2 * top.maximum((bounds / units).square()))
    if missed.any():
        values, found = torch.linalg.eigh(gram[missed])
        top[missed], vectors[missed] = values[:, -1], found[..., -vectors.shape[-1] :]
    return top.sqrt() * units, vectors[..., -KEPT:]


def _clip(
    parameters: list[Tensor], weights: Tensor, bounds: Tensor, states: list[dict[str, Any]]
) -> Tensor:
    """Clips parameters beyond their bounds; returns vectors ``(N, min(m, n), KEPT)`` of a batch.

    Args:
        parameters: ``N`` of them.
        weights: copies of them as matrices ``(N, m, n)``, overwritten.
        bounds: ``(N,)``.
        states: of the parameters.
    """
    units = _units(weights, bounds)
    weights, bounds = weights.div_(units[:, None, None]), bounds / units
    values, vectors = _ritz(_gram(weights), states)
    excess = _excess(values, bounds)
    held = _cut(weights, vectors, excess)
    missed = ~_within(_gram(held), (SLACK * bounds).square()) | _is_far(values, bounds)
    if missed.any():
        exact, found = _projected(weights[missed].double(), bounds[missed].double())
        held[missed], vectors[missed] = exact.to(held), found[..., -vectors.shape[-1] :].to(held)
    held *= units[:, None, None]
    beyond = excess.any(1) | missed
    for p, weight, moved in zip(parameters, held, beyond.tolist(), strict=True):
        if moved:
            p.copy_(weight.view_as(p))
    return vectors[..., -KEPT:]


def _projected(weights: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``U min(S, b) V^T`` of matrices in float64, and all vectors of their Gram matrices.

    Those are decomposed, which takes a fraction of the time, where they are precise enough.
    """
    values, vectors = torch.linalg.eigh(_gram(weights))
    held = _cut(weights, vectors, _excess(values, bounds))
    far = _is_far(values, bounds)
    if far.any():
        u, s, v = torch.linalg.svd(weights[far], full_matrices=False)
        held[far] = (u * s.minimum(bounds[far, None])[:, None, :]) @ v
    return held, vectors


def _is_far(squares: Tensor, bounds: Tensor) -> Tensor:
    """True where singular values, squared, drown what is within the bound in their rounding."""
    return squares[:, -1] * torch.finfo(squares.dtype).eps ** 0.5 > bounds.square()


def _excess(squares: Tensor, bounds: Tensor) -> Tensor:
    """Returns ``1 - b / s`` of singular values beyond the bounds, else 0, from their squares."""
    found = 1 - bounds[:, None] / squares.clamp_min(0).sqrt()
    return torch.where(found > ROUNDING, found, 0)


def _cut(weights: Tensor, vectors: Tensor, excess: Tensor) -> Tensor:
    """Returns matrices without what is beyond the bound along vectors of their Gram matrices."""
    excess = excess[:, None, :]
    if _is_wide(weights):
        return weights - (vectors * excess) @ (vectors.mT @ weights)
    return weights - (weights @ vectors * excess) @ vectors.mT


def _units(weights: Tensor, bounds: Tensor) -> Tensor:
    """Returns the power of two below each one's largest entry, or bound: no square overflows then.

    Of two, so that to divide by it is exact.
    """
    entries = weights.flatten(1)
    # torch's own maximum norm takes ten times as long
    largest = torch.maximum(entries.amax(1), -entries.amin(1)).maximum(bounds)
    return torch.exp2(torch.frexp(largest).exponent.to(largest) - 1)


def _is_wide(weights: Tensor) -> bool:
    return weights.shape[1] <= weights.shape[2]


def _gram(weights: Tensor) -> Tensor:
    """Returns the smaller Gram matrix of each."""
    return weights @ weights.mT if _is_wide(weights) else weights.mT @ weights


def _ritz(gram: Tensor, states: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Returns Ritz values ``(N, k)``, ascending, and vectors ``(N, n, k)`` of ``(N, n, n)``.

    From the vectors of the last step; ``k`` is at most ``KEPT (DEPTH + 1)``.
    """
    if VECTORS in states[0]:
        start = torch.stack([state[VECTORS] for state in states]).to(gram)
    else:
        start = gram[..., :KEPT]
    basis = [start]
    for _ in range(DEPTH):
        basis.append(F.normalize(gram @ basis[-1], dim=1))
    found = torch.linalg.qr(torch.cat(basis, -1)).Q
    values, inner = torch.linalg.eigh(found.mT @ gram @ found)
    return values, found @ inner


def _within(gram: Tensor, squares: Tensor) -> Tensor:
    """True for each matrix of which a factorisation proves that no eigenvalue is beyond."""
    above = gram.neg()
    above.diagonal(0, 1, 2).add_(squares[:, None])
    return _positive(above)


def _positive(matrices: Tensor) -> Tensor:
    """True for each symmetric matrix of a batch that is positive definite.

    In two halves, by the Schur complement: LAPACK's factor of 128 rows takes twice as long.
    """
    half = matrices.shape[-1] // 2
    factor, info = torch.linalg.cholesky_ex(matrices[:, :half, :half])
    side = torch.linalg.solve_triangular(factor, matrices[:, :half, half:], upper=False)
    rest = torch.baddbmm(matrices[:, half:, half:], side.mT, side, alpha=-1)
    return (info == 0) & (torch.linalg.cholesky_ex(rest).info == 0)


def _lanczos(product: Product, start: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Returns the largest eigenvalues of positive operators, from below, and their vectors.

    From a random start the relative error exceeds ``d`` with a probability of at most
    ``1.648 sqrt(n) exp(-sqrt(d) (2 depth - 1))``, whatever the spectrum is (Kuczynski &
    Wozniakowski 1992): 1e-5 for 1 % of ``sigma``, 64 products and ``n = 1e5``; a warm vector added
    to the start can at most double it.

    Args:
        product: ``(N, n, 1) -> (N, n, 1)``.
        start: ``(N, n, 1)``.
        depth: number of products, >= 1.
    """
    basis = F.normalize(start, dim=1)
    images = product(basis)
    for _ in range(min(depth, start.shape[1]) - 1):
        new = image = images[..., -1:]
        for _ in range(2):  # twice is enough against rounding
            new = new - basis @ (basis.mT @ new)
        # what is left of an invariant subspace is rounding: no new direction
        size, whole = (torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (new, image))
        new = torch.where(size > 1e-5 * whole, new / size, 0)
        basis = torch.cat([basis, new], -1)
        images = torch.cat([images, product(new)], -1)
    values, inner = torch.linalg.eigh(basis.mT @ images)
    return values[:, -1], basis @ inner[..., -1:]


def _dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
