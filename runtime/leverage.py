"""Sizes of the LeverageTopK operator: how much work it does on X [N, D], and how many FLOPs that is.

What the steps are is told in ``plugins/leverage_topk/body.py``. Knows numbers only: no array and no graph.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The iteration's fixed work, attributes of the node. ``benchmarks/leverage.py`` compares others.

    ``rounds`` of subspace iteration, its subspace at most ``oversampling`` columns wider than the rank;
    ``purifications``, steps of SP2; ``seed`` of the start; ``max_rank``, the cap on an energy rank.
    """

    rounds: int = 8
    oversampling: int = 16
    purifications: int = 45
    seed: int = 0
    max_rank: int = 64


_LEAST = 8  # columns more than a small rank


def oversampling(rank: int | None, settings: Settings) -> int:
    """Columns more than the rank: as many again, within limits; ``rank`` is None for an energy rank."""
    return min(settings.oversampling, max(_LEAST, rank or settings.max_rank))


def subspace_width(n: int, d: int, rank: int | None, settings: Settings) -> int:
    """q, the columns of the subspace; ``rank`` is None for an energy rank."""
    return min((rank or settings.max_rank) + oversampling(rank, settings), n, d)


def forms_gram(n: int, d: int, width: int, settings: Settings) -> bool:
    """Whether XXᵀ is formed: 2N²D once and 2N²q a product, against 4NDq a product."""
    products = settings.rounds + 1
    return 4 * n * d * width * products > 2 * n * n * (d + width * products)


def is_full(turn: int, settings: Settings) -> bool:
    """Whether round ``turn`` orthonormalises all columns: every second one does, and the last."""
    return (settings.rounds - 1 - turn) % 2 == 0


def flops(n: int, d: int, rank: int | None, settings: Settings | None = None) -> int:
    """FLOPs of one image's scores, 2 a multiply-add of the matrix products, as export counts them in the graph.

    ``rank`` is None for an energy rank. Elimination and all else that is done element by element do not count.
    """
    settings = settings or Settings()
    q = subspace_width(n, d, rank, settings)
    if forms_gram(n, d, q, settings):
        total = _product(n, d, n) + settings.rounds * _product(n, n, q)
    else:
        total = settings.rounds * (_product(d, n, q) + _product(n, d, q))
    passes = settings.rounds + sum(is_full(turn, settings) for turn in range(settings.rounds))
    total += passes * (_product(q, n, q) + _product(n, q, q))  # YᵀY, and Y by its factor
    total += _product(d, n, q) + _product(q, d, q)  # XᵀQ and T
    return total + settings.purifications * _product(q, q, q) + _product(n, q, q)


def _product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns if inner > 1 else 0  # nothing is added up over a single term
