"""The overlay, read back from the file: which cells are in colour, and what happens when it cannot be written.

The pictures drawn on are of one saturated colour, so resampling changes nothing and a pixel of a PNG says
exactly whether its patch counts as kept.
"""

import errno
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokprune.runtime import overlay
from tokprune.runtime.errors import UserError
from tokprune.runtime.overlay import check_overlay_path, draw_overlay

RED = (220, 30, 30)
GRID = (24, 24)
CELL = 20  # 480 pixels over 24 cells
GAP = 12
BOX = (150.0, 0.0, 450.0, 300.0)  # the middle square of a 600×300 picture


@pytest.fixture
def image():
    return Image.new("RGB", (600, 300), RED)


def kept_cells(path, from_right, grid=GRID, cell=CELL):
    """Flat indices of the cells whose centre is in colour, in the panel that is ``from_right`` from the right."""
    sheet = Image.open(path).convert("RGB")
    left = sheet.width - (from_right + 1) * (grid[1] * cell + GAP)
    panel = np.asarray(sheet)[GAP : GAP + grid[0] * cell, left : left + grid[1] * cell]
    centres = panel[cell // 2 :: cell, cell // 2 :: cell].astype(int)
    colour = np.ptp(centres, axis=-1) > 40
    assert (centres[colour] == RED).all()
    assert (np.ptp(centres[~colour], axis=-1) == 0).all()  # dropped patches are grey
    return np.flatnonzero(colour).tolist()


class TestPicture:
    def test_one_stage(self, image, tmp_path):
        kept = sorted(np.random.default_rng(0).choice(576, 64, replace=False).tolist())
        draw_overlay(image, [(2, kept, None)], GRID, BOX, tmp_path / "a.png")
        assert kept_cells(tmp_path / "a.png", 0) == kept

    def test_stages_side_by_side(self, image, tmp_path):
        first = list(range(0, 576, 5))
        draw_overlay(image, [(2, first), (8, [0, 10, 45])], GRID, BOX, tmp_path / "a.png")
        assert kept_cells(tmp_path / "a.png", 1) == first
        assert kept_cells(tmp_path / "a.png", 0) == [0, 10, 45]

    def test_the_original_is_there_with_a_frame_around_the_box(self, image, tmp_path):
        draw_overlay(image, [(2, [0], None)], GRID, BOX, tmp_path / "a.png")
        sheet = np.asarray(Image.open(tmp_path / "a.png"))
        scale = 480 / 300
        middle = GAP + 240
        assert tuple(sheet[middle, GAP + 10]) == RED
        assert tuple(sheet[middle, GAP + round(150 * scale)]) == overlay._LINE
        assert tuple(sheet[middle, GAP + round(450 * scale) - 1]) == overlay._LINE

    def test_scores_colour_the_lines(self, image, tmp_path):
        scores = np.zeros(576)
        scores[[5, 100, 300]] = [0.2, 0.9, 0.5]
        draw_overlay(image, [(2, [5, 100, 300], scores)], GRID, BOX, tmp_path / "a.png")
        sheet = Image.open(tmp_path / "a.png")
        left = sheet.width - GAP - 24 * CELL
        lines = [sheet.getpixel((left + i % 24 * CELL, GAP + i // 24 * CELL)) for i in (5, 100, 300)]
        assert lines[0] == overlay._LOW
        assert lines[1] == overlay._HIGH
        assert overlay._LOW[0] < lines[2][0] < overlay._HIGH[0]

    @pytest.mark.parametrize("kept", [[], list(range(576))])
    def test_nothing_and_everything_kept(self, image, tmp_path, kept):
        draw_overlay(image, [(2, kept, None)], GRID, BOX, tmp_path / "a.png")
        assert kept_cells(tmp_path / "a.png", 0) == kept

    def test_no_stages(self, image, tmp_path):
        draw_overlay(image, [], GRID, BOX, tmp_path / "a.png")
        assert Image.open(tmp_path / "a.png").width == 960 + 2 * GAP

    def test_another_grid(self, image, tmp_path):
        draw_overlay(image, [(0, [0, 5, 7], None)], (2, 4), (0.0, 0.0, 600.0, 300.0), tmp_path / "a.png")
        assert kept_cells(tmp_path / "a.png", 0, (2, 4), 120) == [0, 5, 7]

    def test_padding_is_black(self, image, tmp_path):
        draw_overlay(image, [(0, [0, 300], None)], GRID, (-300.0, -450.0, 900.0, 750.0), tmp_path / "a.png")
        sheet = Image.open(tmp_path / "a.png")
        left = sheet.width - GAP - 24 * CELL
        assert sheet.getpixel((left + CELL // 2, GAP + CELL // 2)) == (0, 0, 0)
        assert sheet.getpixel((left + 12 * CELL + CELL // 2, GAP + 12 * CELL + CELL // 2)) == RED

    @pytest.mark.parametrize("size", [(9000, 16), (16, 9000), (1, 1)])
    def test_extreme_shapes(self, tmp_path, size):
        edge = min(size)
        left, top = (size[0] - edge) / 2, (size[1] - edge) / 2
        box = (left, top, left + edge, top + edge)
        draw_overlay(Image.new("RGB", size, RED), [(0, [7], None)], GRID, box, tmp_path / "a.png")
        assert kept_cells(tmp_path / "a.png", 0) == [7]

    @pytest.mark.parametrize(("name", "format_"), [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")])
    def test_formats(self, image, tmp_path, name, format_):
        draw_overlay(image, [(2, [1], None)], GRID, BOX, tmp_path / name)
        assert Image.open(tmp_path / name).format == format_

    @pytest.mark.parametrize(
        ("stages", "match"),
        [
            ([(2, [576], None)], "not given"),
            ([(2, [-1], None)], "not given"),
            ([(2, [5, 3], None)], "ascending"),
            ([(2, [3, 3], None)], "ascending"),
            ([(2, [3, 4], None), (8, [5], None)], "not given"),
            ([(2, [3], [0.1, 0.2])], "2 scores of 576 tokens"),
        ],
    )
    def test_stages_that_do_not_fit(self, image, tmp_path, stages, match):
        with pytest.raises(ValueError, match=match):
            draw_overlay(image, stages, GRID, BOX, tmp_path / "a.png")
        assert list(tmp_path.iterdir()) == []


class TestPath:
    @pytest.mark.parametrize("name", ["a", "a.txt", "a.gif", "png"])
    def test_extension(self, tmp_path, name):
        with pytest.raises(UserError, match="known extension"):
            check_overlay_path(tmp_path / name)

    def test_directory_itself(self, tmp_path):
        (tmp_path / "a.png").mkdir()
        with pytest.raises(UserError, match="is a directory"):
            check_overlay_path(tmp_path / "a.png")

    @pytest.mark.parametrize("parent", ["none", "file"])
    def test_no_directory(self, tmp_path, parent):
        (tmp_path / "file").write_text("x")
        with pytest.raises(UserError, match="does not exist"):
            check_overlay_path(tmp_path / parent / "a.png")

    def test_unwritable_directory(self, image, tmp_path, monkeypatch):
        def barred(path, *_, **__):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "touch", barred)  # root may write everywhere
        with pytest.raises(UserError, match=r"overlay .*a.png cannot be written \(Permission denied\)"):
            draw_overlay(image, [], GRID, BOX, tmp_path / "a.png")

    def test_a_full_disk_leaves_the_old_picture_and_nothing_else(self, image, tmp_path, monkeypatch):
        (tmp_path / "a.png").write_bytes(b"old")

        def full(_, path, **__):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", full)
        with pytest.raises(UserError, match="No space left"):
            draw_overlay(image, [], GRID, BOX, tmp_path / "a.png")
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
        assert (tmp_path / "a.png").read_bytes() == b"old"

    def test_replaces_an_old_picture(self, image, tmp_path):
        (tmp_path / "a.png").write_bytes(b"old")
        draw_overlay(image, [(2, [1], None)], GRID, BOX, tmp_path / "a.png")
        assert kept_cells(tmp_path / "a.png", 0) == [1]
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
