"""Row layouts against a plain simulation that carries labelled rows through a selection."""

from __future__ import annotations

import numpy as np
import pytest

from tokprune.runtime.layout import Layout


def simulate(labels: list[object], visual: np.ndarray, kept: list[list[int]]) -> list[object]:
    """Rows that are left if image i keeps its rows ``kept[i]``."""
    drop = {int(row) for i, rows in enumerate(visual) for j, row in enumerate(rows) if j not in kept[i]}
    return [label for row, label in enumerate(labels) if row not in drop]


@pytest.mark.parametrize(
    ("count", "starts", "tokens"),
    [(10, [3], 4), (8, [0], 4), (8, [4], 4), (20, [1, 9], 5), (15, [0, 5, 10], 5), (6, [], 4)],
)
def test_template_gathers_what_is_kept(count: int, starts: list[int], tokens: int):
    visual = np.array([range(start, start + tokens) for start in starts], dtype=np.int64).reshape(-1, tokens)
    generator = np.random.default_rng(count)
    kept = [sorted(generator.choice(tokens, 2, replace=False).tolist()) for _ in starts]
    labels: list[object] = [f"row{row}" for row in range(count)]
    template, after = Layout.of(count, visual).prune(2)
    slots = [labels[visual[i][j]] for i, rows in enumerate(kept) for j in rows]
    assert [[*labels, *slots][source] for source in template] == simulate(labels, visual, kept)
    assert after.count == len(template) == count - len(starts) * (tokens - 2)
    assert after.visual.shape == (len(starts), 2)


def test_second_stage_goes_on_from_the_first():
    visual = np.arange(2, 10)[None]
    _, first = Layout.of(12, visual).prune(5)
    assert first.visual.tolist() == [[2, 3, 4, 5, 6]]
    template, second = first.prune(1)
    assert second.count == 5
    assert template.tolist() == [0, 1, first.count, 7, 8]
    assert second.origin.tolist() == [0, 1, -1, 10, 11]


def test_rows_of_text_move_up():
    _, after = Layout.of(12, np.arange(2, 10)[None]).prune(3)
    assert after.rows_of(np.array([11, 0, 10])).tolist() == [6, 0, 5]


@pytest.mark.parametrize("row", [2, 9, 12])
def test_rows_of_refuses_what_is_no_text(row: int):
    _, after = Layout.of(12, np.arange(2, 10)[None]).prune(3)
    with pytest.raises(ValueError, match="text rows"):
        after.rows_of(np.array([row]))
