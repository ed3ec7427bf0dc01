"""Statistics of known activations, against NumPy; and their file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tokprune.calibration.statistics import ROWS, Statistics, load_statistics, save_statistics
from tokprune.runtime.errors import UserError


def pieces() -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.standard_normal((rows, 6)).astype(np.float32) * [1, 2, 4, 8, 16, 0] for rows in (100, 1, 250, 40)]


@pytest.fixture
def statistics() -> Statistics:
    found = Statistics("key", {"seed": 0}, samples=4)
    for number, piece in enumerate(pieces()):
        found.add("a.weight", piece.astype(np.float32), (0, number))
    return found


def test_against_numpy(statistics: Statistics) -> None:
    seen, rows = statistics.tensors["a.weight"], np.concatenate(pieces()).astype(np.float32)
    assert seen.count == len(rows)
    np.testing.assert_array_equal(seen.largest, np.abs(rows).max(axis=0))
    np.testing.assert_allclose(seen.mean, np.abs(rows).mean(axis=0, dtype=np.float64), rtol=1e-12)
    assert seen.histogram.counts.sum() == rows.size


def test_sample_is_of_the_rows_and_even(statistics: Statistics) -> None:
    """128 of 391 rows, each once; each piece has its share within four standard deviations."""
    seen, rows = statistics.tensors["a.weight"], np.concatenate(pieces()).astype(np.float32)
    at = [int(np.flatnonzero((rows == row).all(axis=1))[0]) for row in seen.sample]
    assert len(at) == len(set(at)) == ROWS
    third = sum(101 <= index < 351 for index in at) / ROWS
    assert third == pytest.approx(250 / 391, abs=0.17)


def test_few_rows_are_all_kept() -> None:
    found = Statistics("key", {})
    found.add("a", np.arange(12, dtype=np.float32).reshape(4, 3), (1,))
    assert sorted(found.tensors["a"].sample[:, 0]) == [0, 3, 6, 9]


def test_seed_decides(statistics: Statistics) -> None:
    other = Statistics("key", {})
    for number, piece in enumerate(pieces()):
        other.add("a.weight", piece.astype(np.float32), (1, number))
    assert not np.array_equal(other.tensors["a.weight"].sample, statistics.tensors["a.weight"].sample)


def test_not_finite(statistics: Statistics) -> None:
    with pytest.raises(UserError, match=r"what a\.weight is multiplied with is not finite"):
        statistics.add("a.weight", np.array([[1, np.inf, 0, 0, 0, 0]], np.float32), (0,))


class TestFile:
    def test_round_trip(self, statistics: Statistics, tmp_path: Path) -> None:
        path = tmp_path / "folder" / "file.safetensors"
        save_statistics(statistics, path)
        found = load_statistics(path, "key")
        assert found is not None
        assert (found.samples, found.settings) == (4, {"seed": 0})
        rows = np.ones((9, 6), np.float32)
        for each in (found, statistics):  # and it goes on the same
            each.add("a.weight", rows, (0, 9))
        for one, other in zip(found.tensors.values(), statistics.tensors.values(), strict=True):
            assert (one.count, one.histogram.limit) == (other.count, other.histogram.limit)
            for part in ("largest", "total", "sample", "keys"):
                np.testing.assert_array_equal(getattr(one, part), getattr(other, part))
            np.testing.assert_array_equal(one.histogram.counts, other.histogram.counts)
        assert [entry.name for entry in path.parent.iterdir()] == ["file.safetensors"]

    def test_missing(self, tmp_path: Path) -> None:
        assert load_statistics(tmp_path / "none", "key") is None

    def test_of_other_data(self, statistics: Statistics, tmp_path: Path) -> None:
        save_statistics(statistics, tmp_path / "file")
        with pytest.raises(UserError, match="are of another bundle, other data or other settings: remove it"):
            load_statistics(tmp_path / "file", "other")

    @pytest.mark.parametrize("content", [b"", b"no header", None])
    def test_damaged(self, statistics: Statistics, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "file"
        save_statistics(statistics, path)
        path.write_bytes(path.read_bytes()[:-9] if content is None else content)
        with pytest.raises(UserError, match="cannot be read"):
            load_statistics(path, "key")

    def test_not_writable(self, statistics: Statistics, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("a file where a folder has to be")
        with pytest.raises(UserError, match="cannot be written"):
            save_statistics(statistics, tmp_path / "file" / "statistics")
