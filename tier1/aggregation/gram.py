"""The Gram engine: inner products and distances of low-rank updates, without ever forming one.

For updates i, j of one expert matrix, ΔW_i = s_i·B_i·A_i,

    G_ij  = ⟨ΔW_i, ΔW_j⟩_F = s_i·s_j · Σ ((B_iᵀ B_j) ∘ (A_i A_jᵀ))
    D²_ij = ‖ΔW_i − ΔW_j‖²_F = G_ii + G_jj − 2·G_ij

in fp64 from the decoded factors: two products of K = Σr columns instead of N dense matrices. An *expert* is a
(layer, expert id): the Gram matrices of its projections are added, and so can be those of several experts.

D² cancels where updates are near-equal, in fp64 too: two updates that differ by 1e-6 of their norm would keep three
digits (in fp32, as peers compute it, none). So pairs with D² < 1e-6·(G_ii + G_jj) are centred on one of them and taken
again: E_i = ΔW_i − ΔW_c is a product of 2r columns whose core is small (thin QR of both factors), so that the Gram
matrix of the E_i has no large part to cancel. Repeated while pairs are nearer still. Rules that need distances read
`distance2`, not `inner`.

Deterministic: the order of updates is given, products run on one thread on operands that torch allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor  # imported where it computes: configurations name rules where there is no torch

# A pair this near (relative to its squared norms) is taken again from its difference.
NEAR = 1e-6
_MAX_DEPTH = 4

Term = tuple[float, np.ndarray, np.ndarray]  # (s, A [r, d_in], B [d_out, r])
_Factors = tuple["Tensor", "Tensor"]  # (P [d_out, q], Q [q, d_in]), fp64, product P·Q


@dataclass(frozen=True, kw_only=True)
class Root:
    """A trusted direction g_0: `inner` ⟨ΔW_i, g_0⟩ fp64 [n] and `norm2` ‖g_0‖²."""

    inner: np.ndarray
    norm2: float


@dataclass(frozen=True, kw_only=True)
class Gram:
    """What a rule may know of n updates of one expert (or of several, added).

    Args:
        inner: G fp64 [n, n], symmetric.
        distance2: D² fp64 [n, n], accurate for near-equal updates where `inner` is not.
        root: products with a trusted direction, if there is one.
    """

    inner: np.ndarray
    distance2: np.ndarray
    root: Root | None = None

    @property
    def n(self) -> int:
        """Number of updates."""
        return len(self.inner)

    @property
    def norms(self) -> np.ndarray:
        """‖ΔW_i‖ fp64 [n]."""
        return np.sqrt(np.maximum(np.diag(self.inner), 0.0))

    def scaled(self, factors: np.ndarray) -> Gram:
        """Return the Gram matrix of k_i·ΔW_i; `factors` k fp64 [n].

        D² of near-equal updates is (k_i − k_j)(k_i·G_ii − k_j·G_jj) + k_i·k_j·D²_ij, which cancels nothing that D² has
        not; of others k_i²·G_ii + k_j²·G_jj − 2·k_i·k_j·G_ij, which is safe whatever their norms. Updates that only the
        scaling makes near-equal lose digits, so scale s before `matrix_gram` where that can happen.
        """
        k, squares = np.asarray(factors, dtype=np.float64), np.diag(self.inner)
        kk, ks = np.outer(k, k), k * squares
        own2 = k * ks
        norms2 = own2[:, None] + own2[None, :]
        apart = np.maximum(norms2 - 2 * kk * self.inner, 0.0)
        near = (k[:, None] - k[None, :]) * (ks[:, None] - ks[None, :]) + kk * self.distance2
        distance2 = np.where(self.distance2 < NEAR * (squares[:, None] + squares[None, :]), near, apart)
        np.fill_diagonal(distance2, 0.0)
        root = None if self.root is None else Root(inner=k * self.root.inner, norm2=self.root.norm2)
        return Gram(inner=kk * self.inner, distance2=np.maximum(distance2, 0.0), root=root)

    def merged(self, parts: np.ndarray) -> Gram:
        """Return the Gram matrix of Σ_j M_ij·ΔW_j; `parts` M fp64 [m, n], rows sum to 1.

        D² of two such means is a·D²·b − ½·a·D²·a − ½·b·D²·b: from distances alone, as in `distance2_to`.
        """
        inner, across = (parts @ matrix @ parts.T for matrix in (self.inner, self.distance2))
        own = np.diag(across) / 2
        distance2 = np.maximum((across + across.T) / 2 - (own[:, None] + own[None, :]), 0.0)  # symmetric to the bit
        np.fill_diagonal(distance2, 0.0)
        root = None if self.root is None else Root(inner=parts @ self.root.inner, norm2=self.root.norm2)
        return Gram(inner=(inner + inner.T) / 2, distance2=distance2, root=root)

    def __add__(self, other: Gram) -> Gram:
        """Return the Gram matrix of the same updates over both parts of the model."""
        root = None
        if self.root is not None and other.root is not None:
            root = Root(inner=self.root.inner + other.root.inner, norm2=self.root.norm2 + other.root.norm2)
        return Gram(inner=self.inner + other.inner, distance2=self.distance2 + other.distance2, root=root)


def matrix_gram(terms: Sequence[Term], root: np.ndarray | None = None) -> Gram:
    """Return the Gram matrix of updates of one expert matrix; run it inside `fold.one_thread`.

    Args:
        terms: (s, A, B) in canonical order; ranks may differ.
        root: dense trusted direction [d_out, d_in]; ⟨s·B·A, D⟩ = s · Σ (Bᵀ D) ∘ A costs as much as the fold.
    """
    factors = [(_fp64(b).mul_(s), _fp64(a)) for s, a, b in terms]
    inner, distance2 = _products(factors, 0)
    return Gram(inner=inner, distance2=distance2, root=None if root is None else _root(factors, _fp64(root)))


def own_root(gram: Gram, index: int) -> Gram:
    """Return `gram` with its update `index`, a trusted device's, as the root."""
    return Gram(
        inner=gram.inner,
        distance2=gram.distance2,
        root=Root(inner=gram.inner[:, index].copy(), norm2=float(gram.inner[index, index])),
    )


def distance2_to(gram: Gram, weights: np.ndarray) -> np.ndarray:
    """Return ‖ΔW_i − Σ_j a_j·ΔW_j‖² fp64 [n] for weights a that sum to 1.

    Σ_j a_j·D²_ij − ½·Σ_jk a_j·a_k·D²_jk: from distances alone, so that near-equal updates keep their digits.
    """
    to_each = gram.distance2 @ weights
    return np.maximum(to_each - 0.5 * float(weights @ to_each), 0.0)


def _products(factors: Sequence[_Factors], depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (G, D²) of products P_i·Q_i."""
    import torch

    stacked_p = torch.cat([p for p, _ in factors], dim=1)
    stacked_q = torch.cat([q for _, q in factors], dim=0)
    cells = ((stacked_p.T @ stacked_p) * (stacked_q @ stacked_q.T)).numpy()
    starts = np.cumsum([0, *(len(q) for _, q in factors[:-1])])
    inner = np.add.reduceat(np.add.reduceat(cells, starts, axis=0), starts, axis=1)
    inner = (inner + inner.T) / 2
    squares = np.diag(inner)
    norms2 = squares[:, None] + squares[None, :]
    distance2 = np.maximum(norms2 - 2 * inner, 0.0)
    np.fill_diagonal(distance2, 0.0)
    if depth < _MAX_DEPTH:
        near = distance2 < NEAR * norms2
        for members in _components(near):
            # Only the near pairs are replaced: the others have all their digits already.
            pairs = np.ix_(members, members)
            refined = _centred(factors, members, depth + 1)
            distance2[pairs] = np.where(near[pairs], refined, distance2[pairs])
    return inner, distance2


def _centred(factors: Sequence[_Factors], members: Sequence[int], depth: int) -> np.ndarray:
    """Return D² of near-equal products from their differences to the first of them."""
    (centre_p, centre_q), *others = (factors[i] for i in members)
    differences = [_difference(p, q, centre_p, centre_q) for p, q in others]
    inner, distance2 = _products(differences, depth)
    result = np.zeros((len(members), len(members)))
    result[1:, 1:] = distance2
    result[0, 1:] = result[1:, 0] = np.maximum(np.diag(inner), 0.0)
    return result


def _difference(p: Tensor, q: Tensor, other_p: Tensor, other_q: Tensor) -> _Factors:
    """Return P·Q − P'·Q' as factors whose small core holds the cancellation: [P, −P']·[Q; Q'] = U·(R_u·R_vᵀ)·Vᵀ."""
    import torch

    u, r_u = torch.linalg.qr(torch.cat([p, -other_p], dim=1))
    v, r_v = torch.linalg.qr(torch.cat([q, other_q], dim=0).T.contiguous())
    return u @ (r_u @ r_v.T), v.T.contiguous()


def _components(near: np.ndarray) -> list[list[int]]:
    """Return the groups of two or more that pairs in `near` connect, each ascending."""
    seen: set[int] = set()
    groups = []
    for start in range(len(near)):
        if start in seen:
            continue
        group, queue = {start}, [start]
        while queue:
            found = set(np.flatnonzero(near[queue.pop()]).tolist()) - group
            group |= found
            queue.extend(sorted(found))
        seen |= group
        if len(group) > 1:
            groups.append(sorted(group))
    return groups


def _root(factors: Sequence[_Factors], root: Tensor) -> Root:
    inner = [float(((p.T @ root) * q).sum()) for p, q in factors]
    return Root(inner=np.array(inner), norm2=float(root.square().sum()))


def _fp64(array: np.ndarray) -> Tensor:
    import torch

    return torch.tensor(array, dtype=torch.float64)  # a copy: torch's own allocation is aligned
