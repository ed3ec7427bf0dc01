"""Row layouts against a plain simulation that carries labelled rows through a selection."""

from __future__ import annotations

import numpy as np
import pytest

from tokprune.runtime.layout import Batch, Layout, left_pad


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


class TestBatch:
    """Sequences side by side, against the same simulation of each on its own."""

    # (rows, where images of 4 begin) of each sequence
    BATCHES = (
        [(10, [3]), (7, [1]), (12, [2])],
        [(6, []), (9, [0, 5]), (5, [0])],
        [(11, [1, 6])],
        [(3, []), (2, [])],
    )

    @staticmethod
    def batch(sequences) -> Batch:
        layouts = []
        for count, starts in sequences:
            visual = np.array([range(start, start + 4) for start in starts], dtype=np.int64).reshape(-1, 4)
            layouts.append(Layout.of(count, visual))
        return Batch(tuple(layouts))

    @pytest.mark.parametrize("sequences", BATCHES)
    def test_templates_gather_what_is_kept(self, sequences):
        batch = self.batch(sequences)
        generator = np.random.default_rng(3)
        labels = [[f"{number}.{row}" for row in range(layout.count)] for number, layout in enumerate(batch.sequences)]
        flat = [label for line in labels for label in ["pad"] * (batch.count - len(line)) + line]
        images = [
            [line[row] for row in rows] for line, x in zip(labels, batch.sequences, strict=True) for rows in x.visual
        ]
        assert [[flat[row] for row in rows] for rows in batch.visual] == images
        kept = [sorted(generator.choice(4, 2, replace=False).tolist()) for _ in images]
        template, after = batch.prune(2)
        sources = [*flat, *(image[i] for image, chosen in zip(images, kept, strict=True) for i in chosen)]
        first = 0
        for line, mask, row, x in zip(labels, after.mask, template, batch.sequences, strict=True):
            count = len(x.visual)
            expected = simulate(line, x.visual, kept[first : first + count])
            first += count
            gathered = [sources[source] for source in row]
            pads = after.count - len(expected)
            assert mask.tolist() == [0] * pads + [1] * len(expected)
            assert gathered[pads:] == expected
            assert gathered[:pads] == expected[:1] * pads
        assert template.shape == (len(labels), after.count)

    def test_text_of_each_image_is_its_own_sequence_s(self):
        # 9 rows, two pads before the second: its rows are 11 to 17, its images 11 to 14
        batch = self.batch([(9, [0, 5]), (7, [0]), (3, [])])
        assert batch.visual.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [11, 12, 13, 14]]
        assert batch.text.tolist() == [[4, -1, -1], [4, -1, -1], [15, 16, 17]]
        _, after = batch.prune(1)
        assert after.text.tolist() == [[2, -1, -1], [2, -1, -1], [5, 6, 7]]  # a pad before the first now

    def test_rows_of_text_move_up(self):
        _, after = self.batch([(8, [1]), (6, [1])]).prune(1)
        assert after.count == 5
        assert after.rows_of(np.array([[7, 0], [5, 0]])).tolist() == [[4, 0], [4, 2]]

    def test_left_pad(self):
        assert left_pad([np.array([4, 5, 6]), np.array([7])]).tolist() == [[4, 5, 6], [7, 7, 7]]
