"""LeverageTopK as an ONNX function of standard operators: what runs where no plugin does.

Rank-r leverage without an SVD operator, in FP32, with fixed numbers of steps:

1. Subspace iteration Q ← orth((XXᵀ − c)Q) from a fixed Gaussian start, a few columns wider than r; the shifts
   c make the rounds a Chebyshev filter. XXᵀ is formed once if D is large against N, else applied as X(XᵀQ),
   which is both cheaper and more exact.
2. orth() is CholeskyQR *in column order*, by unrolled elimination: rows of massive activation grade the
   spectrum over many decades, and Gram-Schmidt order keeps small directions exact where symmetric
   orthonormalisation (Newton-Schulz) would drown them in rounding. Nodes cost more than arithmetic here, so
   most rounds take only the leading columns, those that grade the spectrum, out of all others.
3. Ritz step without an eigensolver: T = (XᵀQ)ᵀ(XᵀQ), and its spectral projector P onto the top r
   eigenvalues by SP2 purification (Niklasson, Phys. Rev. B 66, 155115, 2002). Then ℓ = rowsum(QP ∘ Q).

Only operators that TensorRT 10.3 has, no loop, no FP64. Knows no engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import FunctionProto, NodeProto, helper

from tokprune.plugins.leverage_topk.reference import RANK_TOLERANCE
from tokprune.plugins.nodes import DOMAIN, OPSET, Nodes
from tokprune.plugins.topk import top_k_nodes
from tokprune.runtime import leverage
from tokprune.runtime.leverage import Settings

OP_TYPE, VERSION = "LeverageTopK", 1
ATTRIBUTES = ("k", "rank", "energy", "max_rank", "rounds", "oversampling", "purifications", "seed")

_TINY = 1e-30  # keeps divisions finite where X = 0
_HUGE = 1e30
# On a unit diagonal, a pivot below this is rounding of FP32 products, and its column is not eliminated from
# others. A shift of the diagonal, the usual mend, leaves its share of u_1 in every column, which the next
# product multiplies by λ_1/λ_j: with gradings above 1e5 that diverges.
_FLOOR = 5e-6
# Share of the columns taken out of all others in every round, before the full elimination if there is one, and the
# least number. Those of massive rows and the mean come first; FP32 can factor the products of what is left.
_LEADING, _LEAST_LEADING = 1 / 4, 4


def leverage_topk(
    x: str,
    outputs: Sequence[str],
    n: int,
    d: int,
    k: int,
    *,
    rank: int | None = None,
    energy: float | None = None,
    settings: Settings | None = None,
) -> tuple[NodeProto, FunctionProto]:
    """The node that maps ``x`` [I, n, d] to ``outputs`` (kept_indices, scores), and the function it calls."""
    node = leverage_topk_node(x, outputs, k, rank=rank, energy=energy, settings=settings)
    function = leverage_topk_function(n, d, k, rank=rank, energy=energy, settings=settings)
    return node, function


def leverage_topk_node(
    x: str,
    outputs: Sequence[str],
    k: int,
    *,
    rank: int | None = None,
    energy: float | None = None,
    settings: Settings | None = None,
) -> NodeProto:
    """The node alone, as a plugin needs it: all attributes, absent rank or energy as 0."""
    if bool(rank) == bool(energy):
        raise ValueError(f"give either rank or energy, not rank={rank} and energy={energy}")
    settings = settings or Settings()
    return helper.make_node(
        OP_TYPE, [x], list(outputs), name=OP_TYPE, domain=DOMAIN, k=k, rank=rank or 0, energy=float(energy or 0),
        max_rank=settings.max_rank, rounds=leverage.rounds(rank, settings),
        oversampling=leverage.oversampling(rank, settings), purifications=leverage.purifications(rank, settings),
        seed=settings.seed,
    )  # fmt: skip


def leverage_topk_function(
    n: int,
    d: int,
    k: int,
    *,
    rank: int | None = None,
    energy: float | None = None,
    settings: Settings | None = None,
) -> FunctionProto:
    """The op for X [I, n, d], specialised to its shape and attributes: a model holds one such function.

    Outputs kept_indices [I, k] int64 and scores [I, n] float32. X must be finite, with Σx² in FP32's range.
    """
    settings = settings or Settings()
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} must lie between 1 and the number of rows {n}")
    if bool(rank) == bool(energy):
        raise ValueError(f"give either rank or energy, not rank={rank} and energy={energy}")
    if rank and not rank < n:
        raise ValueError(f"rank {rank} must be smaller than the number of rows {n}: at full rank all scores are 1")
    if energy and not 0 < energy < 1:
        raise ValueError(f"energy {energy} must lie between 0 and 1")
    body = _Body(n, d, leverage.subspace_width(n, d, rank, settings), leverage.rounds(rank, settings), settings.seed)
    cap = rank or min(settings.max_rank, n - 1)
    scores = body.scores(cap, energy, leverage.purifications(rank, settings))
    top_k_nodes(body.nodes, scores, k, "kept_indices")
    return helper.make_function(
        DOMAIN, OP_TYPE, ["X"], ["kept_indices", "scores"], body.nodes.protos,
        [helper.make_opsetid("", OPSET)], attributes=list(ATTRIBUTES),
    )  # fmt: skip


class _Body:
    """The nodes of one function. Shapes leave out the leading axis I; q is the width of the subspace."""

    def __init__(self, n: int, d: int, width: int, rounds: int, seed: int) -> None:
        self.nodes = Nodes("leverage")
        self._n, self._d, self._q, self._rounds = n, d, width, rounds
        add = self.nodes.add
        self._identity = self.nodes.constant(np.eye(width, dtype=np.float32)[None])  # [1, q, q]
        self._x = add("Cast", "X", to=Nodes.FLOAT)  # [n, d]
        self._xt = self._transposed(self._x)
        rows = add("ReduceSumSquare", self._x, self.nodes.int64([2]))  # [n, 1]
        trace = add("Max", add("ReduceSum", rows, self.nodes.int64([1])), self.nodes.float32(_TINY))
        self._inverse_trace = add("Reciprocal", trace)  # [1, 1]
        zero = add("Mul", self._inverse_trace, self.nodes.float32(0))
        self._identities = add("Add", zero, self._identity)  # [q, q], one an image
        self._gram = add("MatMul", self._x, self._xt) if leverage.forms_gram(n, d, width, rounds) else None  # [n, n]
        # Rows of the start weigh less where those of X are longer: else all columns of XXᵀQ are nearly parallel
        # where a few rows are massive, and one elimination leaves them far from orthogonal.
        start = np.random.Generator(np.random.Philox(seed)).standard_normal((n, width))
        norms = add("Sqrt", add("Max", rows, self.nodes.float32(_TINY)))
        self._start = add("Div", self.nodes.constant(start.astype(np.float32)[None]), norms)  # [n, q]

    def scores(self, rank: int, energy: float | None, purifications: int) -> str:
        """Nodes up to the output "scores" [n]; with ``energy``, ``rank`` is only the cap."""
        add, rounds = self.nodes.add, self._rounds
        leading = min(max(_LEAST_LEADING, int(_LEADING * self._q)), self._q - 1)
        q = self._start
        for turn in range(rounds):
            # Chebyshev's nodes on [0, 1], ascending. The first round's quotients say nothing yet, and a subspace
            # that is the whole space needs no filter.
            filtered = turn and self._q < min(self._n, self._d)
            shift = (1 - math.cos(math.pi * (turn - 0.5) / (rounds - 1))) / 2 if filtered else 0
            q = self._eliminated(self._normalised(self._apply(q, shift), _TINY), leading)
            if leverage.is_full(turn, rounds, self._q):
                q = self._eliminated(q, self._q - 1)
        projected = add("MatMul", self._xt, q)  # [d, q]
        t = add("Mul", add("MatMul", self._transposed(projected), projected), self._inverse_trace)
        t, target = self._target(t, rank, energy)
        start = self._compressed(t, target) if leverage.is_wide(self._q) else self._scaled(t)
        p = self._projector(start, target, purifications)
        weighted = add("Mul", add("MatMul", q, p), q)
        summed = add("ReduceSum", weighted, self.nodes.int64([2]), keepdims=0)
        return add("Max", summed, self.nodes.float32(0), output="scores")

    def _transposed(self, matrix: str) -> str:
        return self.nodes.add("Transpose", matrix, perm=[0, 2, 1])

    def _apply(self, q: str, shift: float) -> str:
        """(XXᵀ / tr(XXᵀ) − c) q [n, q] with c = ``shift`` times the least Rayleigh quotient of q's unit columns.

        Unwanted eigenvalues lie in [0, λ_q], which that quotient nears from above or below: shifts all over it make
        them fade, against those above, as fast as any polynomial of that degree can.
        """
        add, nodes = self.nodes.add, self.nodes
        if self._gram is not None:
            y = add("Mul", add("MatMul", self._gram, q), self._inverse_trace)
            left, right = q, y
        else:
            left = add("MatMul", self._xt, q)  # [d, q]
            right = add("Mul", left, self._inverse_trace)
            y = add("MatMul", self._x, right)
        if not shift:
            return y
        quotients = add("ReduceSum", add("Mul", left, right), nodes.int64([1]))  # [1, q]
        centre = add("Mul", add("ReduceMin", quotients, nodes.int64([2])), nodes.float32(shift))
        return add("Sub", y, add("Mul", q, centre))

    def _normalised(self, y: str, floor: float) -> str:
        """``y`` [n, q] with columns of unit norm, but for those whose squares sum to less than ``floor``."""
        add, nodes = self.nodes.add, self.nodes
        squares = add("ReduceSumSquare", y, nodes.int64([1]))  # [1, q]
        return add("Div", y, add("Sqrt", add("Max", squares, nodes.float32(floor))))

    def _eliminated(self, y: str, columns: int) -> str:
        """``y`` [n, q], of unit columns, with the first ``columns`` taken out of all later ones in turn; unit again.

        It is Y L⁻ᵀ D^-½ with YᵀY = LDLᵀ, L having a unit diagonal; with fewer ``columns`` than q − 1 the
        factorisation stops early, and the later columns are not orthogonal to each other.
        """
        a = self.nodes.add("MatMul", self._transposed(y), y)  # [q, q]
        _, inverse = self._factored(a, columns)
        return self._normalised(self.nodes.add("MatMul", y, self._transposed(inverse)), _FLOOR)

    def _factored(self, a: str, columns: int) -> tuple[str, str]:
        """DLᵀ and L⁻¹ [q, q] of ``a`` = LDLᵀ, L having a unit diagonal, of its first ``columns`` eliminated."""
        add, nodes, width = self.nodes.add, self.nodes, self._q
        # Elimination of [A | I] without pivoting: rows end as [DLᵀ | L⁻¹].
        rows = add("Concat", a, self._identities, axis=2)  # [q, 2q]
        finished = []
        for j in range(columns):
            row, rows = nodes.add_many("Split", 2, rows, nodes.int64([1, width - 1 - j]), axis=1)
            finished.append(row)
            pivot = add("Gather", row, nodes.int64([j]), axis=2)
            pivot = add("Where", add("Greater", pivot, nodes.float32(_FLOOR)), pivot, nodes.float32(_HUGE))
            factors = add("Div", add("Gather", rows, nodes.int64([j]), axis=2), pivot)  # [q - 1 - j, 1]
            rows = add("Sub", rows, add("Mul", factors, row))
        rows = add("Concat", *finished, rows, axis=1)  # [q, 2q]
        upper, inverse = nodes.add_many("Split", 2, rows, nodes.int64([width, width]), axis=2)
        return upper, inverse

    def _target(self, t: str, rank: int, energy: float | None) -> tuple[str, str]:
        """T without the directions that are rounding noise, and the rank [1, 1] its projector shall have."""
        add, nodes = self.nodes.add, self.nodes
        ritz = add("ReduceSum", add("Mul", t, self._identity), nodes.int64([1]))  # [1, q], nearly descending
        floor = add("Mul", add("ReduceMax", ritz, nodes.int64([2])), nodes.float32(RANK_TOLERANCE**2))
        significant = add("Cast", add("Greater", ritz, floor), to=Nodes.FLOAT)
        count = add("ReduceSum", significant, nodes.int64([2]))
        t = add("Mul", add("Mul", t, significant), self._transposed(significant))
        target = add("Min", count, nodes.float32(rank))
        if energy:
            held = add("CumSum", ritz, nodes.int64(2))  # of the trace, which is scaled to 1
            short = add("Cast", add("Less", held, nodes.float32(energy)), to=Nodes.FLOAT)
            needed = add("Add", add("ReduceSum", short, nodes.int64([2])), nodes.float32(1))
            target = add("Min", target, needed)
        return t, target

    def _scaled(self, t: str) -> str:
        """``t`` by a bound on its eigenvalues."""
        add, nodes = self.nodes.add, self.nodes
        bound = add("ReduceMax", add("ReduceSum", add("Abs", t), nodes.int64([1])), nodes.int64([2]))
        return add("Div", t, add("Max", bound, nodes.float32(_TINY)))

    def _compressed(self, t: str, target: str) -> str:
        """``t`` (t + μ)⁻¹ with μ near its ``target``-th eigenvalue: same eigenvectors, eigenvalues about μ at a half.

        From t itself SP2 would spend two steps on every factor of four between μ and the first eigenvalue, and with
        many of them leave small gaps at μ open. The inverse costs about five nodes a column.
        """
        add, nodes = self.nodes.add, self.nodes
        ritz = add("ReduceSum", add("Mul", t, self._identity), nodes.int64([1]))  # [1, q], noise being zero
        places = nodes.constant(np.arange(self._q, dtype=np.float32)[None, None])
        wanted = add("Where", add("Less", places, target), ritz, nodes.float32(_HUGE))
        mu = add("Max", add("ReduceMin", wanted, nodes.int64([2])), nodes.float32(_TINY))  # [1, 1]
        scales = add("Reciprocal", add("Sqrt", add("Add", ritz, mu)))  # [1, q]
        scaled = add("Mul", scales, self._transposed(scales))  # [q, q]
        # s (t + μ) s, s bringing the diagonal to 1, by its factors: (t + μ)⁻¹ = s L⁻ᵀ D⁻¹ L⁻¹ s
        m = add("Add", add("Mul", t, scaled), add("Mul", self._identity, add("Mul", mu, add("Mul", scales, scales))))
        upper, inverse = self._factored(m, self._q - 1)
        pivots = add("ReduceSum", add("Mul", upper, self._identity), nodes.int64([2]))  # [q, 1]
        inverse = add("MatMul", self._transposed(inverse), add("Div", inverse, pivots))
        return add("Sub", self._identity, add("Mul", add("Mul", inverse, scaled), mu))

    def _projector(self, x: str, target: str, steps: int) -> str:
        """Projector [q, q] onto the ``target`` largest eigenvalues of ``x``, which lie in [0, 1], by SP2.

        Two maps of [0, 1] keep 0, 1 and the order of eigenvalues: x² lowers, 2x − x² raises. Each step takes
        the one whose trace comes nearer to the target: x² if (tr X − tr X²)(tr X − target) > 0. Going by
        tr X > target alone would, once converged, feed rounding errors the map that doubles them.
        """
        add, nodes = self.nodes.add, self.nodes
        for _ in range(steps):
            square = add("MatMul", x, x)
            difference = add("Sub", x, square)
            excess = add("Sub", self._trace(x), target)
            lower = add("Greater", add("Mul", excess, self._trace(difference)), nodes.float32(0))
            x = add("Where", lower, square, add("Add", x, difference))
        return x

    def _trace(self, matrix: str) -> str:
        return self.nodes.add("ReduceSum", self.nodes.add("Mul", matrix, self._identity), self.nodes.int64([1, 2]))
