"""Sizes of the LeverageTopK operator: how much work it does on X [N, D], and how many FLOPs that is.

What the steps are is told in ``plugins/leverage_topk/body.py``. Knows numbers only: no array and no graph.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The iteration's fixed work, attributes of the node. ``benchmarks/leverage.py`` compares others.

    ``rounds`` of subspace iteration, its subspace at most ``oversampling`` columns wider than the rank;
    ``purifications``, steps of SP2; ``seed`` of the start; ``max_rank``, the cap on an energy rank. Rounds and steps
    that are None go by the rank: `rounds`, `purifications`.
    """

    rounds: int | None = None
    oversampling: int = 32
    purifications: int | None = None
    seed: int = 0
    max_rank: int = 64


_SMALL = 16  # ranks up to this one have a subspace of at most as many columns more, and more rounds
_ROUNDS, _WIDE_ROUNDS = 8, 6
_STEPS, _WIDE_STEPS = 45, 60  # gaps at larger ranks are smaller
_LEAST = 8  # columns more than a small rank
_MOST_WIDTH = 128  # that the kernels take: a rank close to it leaves fewer columns more, though at least _SMALL


def rounds(rank: int | None, settings: Settings) -> int:
    """Rounds of subspace iteration: wider subspaces need fewer; ``rank`` is None for an energy rank."""
    if settings.rounds is not None:
        return settings.rounds
    return _ROUNDS if (rank or settings.max_rank) <= _SMALL else _WIDE_ROUNDS


def purifications(rank: int | None, settings: Settings) -> int:
    """Steps of SP2, a gain of 1.24 in the gap each; ``rank`` is None for an energy rank."""
    if settings.purifications is not None:
        return settings.purifications
    return _STEPS if (rank or settings.max_rank) <= _SMALL else _WIDE_STEPS


def oversampling(rank: int | None, settings: Settings) -> int:
    """Columns more than the rank: as many again, within limits; ``rank`` is None for an energy rank."""
    wanted = rank or settings.max_rank
    return min(settings.oversampling, max(_LEAST, wanted), max(_SMALL, _MOST_WIDTH - wanted))


def subspace_width(n: int, d: int, rank: int | None, settings: Settings) -> int:
    """q, the columns of the subspace; ``rank`` is None for an energy rank."""
    return min((rank or settings.max_rank) + oversampling(rank, settings), n, d)


def forms_gram(n: int, d: int, width: int, rounds: int) -> bool:
    """Whether XXᵀ is formed: 2N²D once and 2N²q a product, against 4NDq a product."""
    products = rounds + 1
    return 4 * n * d * width * products > 2 * n * n * (d + width * products)


def is_wide(width: int) -> bool:
    """Whether a subspace is wider than any of a small rank: its projector starts from T(T + μ)⁻¹ in the graph, too."""
    return width > 2 * _SMALL


def is_full(turn: int, rounds: int, width: int) -> bool:
    """Whether round ``turn`` of ``rounds`` orthonormalises all columns: every second one, the last, a wide one's first.

    More than 32 columns of a first product are too nearly parallel to leave to the second round: of 1,000 subspaces 96
    wide, six came out with columns twice and a shift upon a wanted eigenvalue.
    """
    return (rounds - 1 - turn) % 2 == 0 or (turn == 0 and is_wide(width))


def flops(n: int, d: int, rank: int | None, settings: Settings | None = None) -> int:
    """FLOPs of one image's scores, 2 a multiply-add of the matrix products, as export counts them in the graph.

    ``rank`` is None for an energy rank. Elimination and all else that is done element by element do not count.
    """
    settings = settings or Settings()
    q, turns = subspace_width(n, d, rank, settings), rounds(rank, settings)
    if forms_gram(n, d, q, turns):
        total = _product(n, d, n) + turns * _product(n, n, q)
    else:
        total = turns * (_product(d, n, q) + _product(n, d, q))
    passes = turns + sum(is_full(turn, turns, q) for turn in range(turns))
    total += passes * (_product(q, n, q) + _product(n, q, q))  # YᵀY, and Y by its factor
    total += _product(d, n, q) + _product(q, d, q)  # XᵀQ and T
    return total + (purifications(rank, settings) + is_wide(q)) * _product(q, q, q) + _product(n, q, q)


def _product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns if inner > 1 else 0  # nothing is added up over a single term
