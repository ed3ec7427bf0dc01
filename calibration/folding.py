"""Which matrices are multiplied with the same tensor, and what can take a factor for each of its channels.

X Wᵀ = (X / s)(W · s)ᵀ for any s > 0 by channel. 1/s goes, so that no operator is added, into what X comes from by a map
that is linear in each channel: a norm's weight and bias, or rows of the matrix before, where nothing stands between.

| matrices | X comes from |
|---|---|
| q, k, v of a layer | the norm's weight, in the tower its bias too |
| gate, up; fc1 | the second norm |
| o, out_proj | v_proj's rows, and its bias: attention mixes rows, not channels |
| down | up_proj's rows: silu(gate) · up is linear in up |
| fc2, linear_1, linear_2 | nothing: a nonlinearity, or the residual stream, stands before them |

Several query heads share a value head; then they share its factors. Knows names and sizes; opens no weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from numpy.typing import NDArray

from tokprune.runtime.manifest import ModelFacts
from tokprune.runtime.weights import DECODER, PROJECTOR, PROJECTOR_MATRICES, TOWER


@dataclass(frozen=True)
class Group:
    """``matrices`` that read one tensor, the first of which it is named by; ``takers`` are what its factors go into.

    Behind attention, channels are [heads, d] of which each ``shared`` heads, side by side, read one value head.
    """

    matrices: tuple[str, ...]
    takers: tuple[str, ...] = ()
    norm: bool = False  # the takers are a norm's
    shared: int = 1
    head_dim: int = 1

    def tie(self, values: NDArray) -> NDArray:
        """The largest of ``values`` [C] for each channel that the takers have, [C / shared]."""
        return values.reshape(-1, self.shared, self.head_dim).max(axis=1).reshape(-1)

    def spread(self, factors: NDArray) -> NDArray:
        """``factors`` of the takers' channels [C / shared] for each channel of the tensor, [C]."""
        return factors.reshape(-1, 1, self.head_dim).repeat(self.shared, axis=1).reshape(-1)

    def take(self, factors: NDArray) -> NDArray:
        """The inverse of `spread`."""
        return factors.reshape(-1, self.shared, self.head_dim)[:, 0].reshape(-1)


def find_groups(facts: ModelFacts) -> Iterator[Group]:
    """All groups of a model but ``lm_head``'s, in the order of prefill."""
    for layer in range(facts.vision.layers):
        at = f"{TOWER}{layer}."
        attention = f"{at}self_attn."
        norms = [tuple(f"{at}layer_norm{which}.{part}" for part in ("weight", "bias")) for which in (1, 2)]
        yield Group(_projections(attention, "qkv"), norms[0], norm=True)
        yield Group((f"{attention}out_proj.weight",), (f"{attention}v_proj.weight", f"{attention}v_proj.bias"))
        yield Group((f"{at}mlp.fc1.weight",), norms[1], norm=True)
        yield Group((f"{at}mlp.fc2.weight",))
    for name in PROJECTOR_MATRICES:
        yield Group((f"{PROJECTOR}{name}",))
    heads = facts.heads // facts.kv_heads
    for layer in range(facts.layers):
        at = f"{DECODER}{layer}."
        attention = f"{at}self_attn."
        yield Group(_projections(attention, "qkv"), (f"{at}input_layernorm.weight",), norm=True)
        yield Group(_projections(attention, "o"), _projections(attention, "v"), shared=heads, head_dim=facts.head_dim)
        mlp = [f"{at}mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        yield Group((mlp[0], mlp[1]), (f"{at}post_attention_layernorm.weight",), norm=True)
        yield Group((mlp[2],), (mlp[1],))


def _projections(attention: str, which: str) -> tuple[str, ...]:
    return tuple(f"{attention}{name}_proj.weight" for name in which)
