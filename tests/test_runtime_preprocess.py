"""Preprocessing against transformers' CLIPImageProcessorPil, and every image file that must be refused.

Both sides use Pillow's resize and the same float32 arithmetic, so values must agree far within one 8-bit
step: the tolerance of 1e-5 only leaves room for rounding in the normalisation.
"""

import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from transformers import CLIPImageProcessorPil

from tokprune.runtime import preprocess
from tokprune.runtime.errors import UserError
from tokprune.runtime.preprocess import load_image, original_box, pixel_values, read_image_spec

LLAVA = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
ORIENTATION = 0x0112


def write_config(folder, config):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def spec(tmp_path):
    return read_image_spec(write_config(tmp_path, LLAVA))


def photo(width, height, seed=0):
    """Smooth colours with noise on top: resampling and rounding both show."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 64, (height, width, 3))
    smooth = np.stack([x * 190 // width, y * 190 // height, (x + y) * 190 // (width + height)], axis=-1)
    return Image.fromarray((smooth + noise).astype(np.uint8))


def reference(path, config):
    """What transformers makes of the same file; it turns images upright when it loads them."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    known = {key: value for key, value in config.items() if key != "image_processor_type"}
    return np.stack(CLIPImageProcessorPil(**known)(upright)["pixel_values"])


def assert_equals_transformers(path, config, folder):
    ours = pixel_values(load_image(path), read_image_spec(write_config(folder, config)))
    theirs = reference(path, config)
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "size", [(336, 336), (335, 337), (501, 333), (333, 501), (1, 1), (7, 5), (20, 300), (1000, 31), (640, 480)]
)
def test_sizes(tmp_path, size):
    photo(*size).save(tmp_path / "a.png")
    assert_equals_transformers(tmp_path / "a.png", LLAVA, tmp_path)


def translucent():
    image = photo(123, 77).convert("RGBA")
    image.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, (77, 123), dtype=np.uint8)))
    return image


IMAGES = {
    "grey.png": lambda path: photo(123, 77).convert("L").save(path),
    "grey-alpha.png": lambda path: translucent().convert("LA").save(path),
    "bilevel.png": lambda path: photo(123, 77).convert("1").save(path),
    "palette.png": lambda path: photo(123, 77).quantize(17).save(path),
    "palette-transparent.png": lambda path: photo(123, 77).quantize(17).save(path, transparency=3),
    "rgb-transparent.png": lambda path: photo(123, 77).save(path, transparency=photo(123, 77).getpixel((5, 5))),
    "rgba.png": lambda path: translucent().save(path),
    "rgba.webp": lambda path: translucent().save(path, lossless=True),
    "rgba.tiff": lambda path: translucent().save(path),
    "rgb.bmp": lambda path: photo(123, 77).save(path),
    "rgb.jpg": lambda path: photo(123, 77).save(path),
    "progressive.jpg": lambda path: photo(123, 77).save(path, progressive=True),
    "cmyk.jpg": lambda path: photo(123, 77).convert("CMYK").save(path),
    "cmyk.tiff": lambda path: photo(123, 77).convert("CMYK").save(path),
    "lab.tiff": lambda path: Image.merge("LAB", photo(123, 77).split()).save(path),
    "animated.gif": lambda path: photo(123, 77).save(path, save_all=True, append_images=[photo(123, 77, 9)]),
    "animated.webp": lambda path: photo(123, 77).save(path, save_all=True, append_images=[photo(123, 77, 9)]),
}


@pytest.mark.parametrize("name", IMAGES)
def test_modes_and_formats(tmp_path, name):
    IMAGES[name](tmp_path / name)
    assert_equals_transformers(tmp_path / name, LLAVA, tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation(tmp_path, extension, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"a.{extension}"
    photo(90, 41).save(path, exif=exif)
    assert load_image(path).size == ((90, 41) if orientation < 5 else (41, 90))
    assert_equals_transformers(path, LLAVA, tmp_path)


def test_damaged_exif_turns_nothing(tmp_path):
    photo(60, 50).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08")
    assert_equals_transformers(tmp_path / "a.jpg", LLAVA, tmp_path)


@pytest.mark.parametrize("extension", ["png", "tiff"])
def test_16_bit_greyscale_is_scaled_not_clipped(tmp_path, extension):
    """Against the same ramp with 8 bits. Transformers clips at 255 of 65535: nothing to compare with."""
    ramp = np.arange(256, dtype=np.uint16).repeat(16).reshape(64, 64)
    Image.fromarray(ramp * 257).save(tmp_path / f"a.{extension}")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / f"a.{extension}"))[..., 1], ramp)


VARIANTS = {
    "padding, odd": {"size": {"shortest_edge": 40}, "crop_size": {"height": 65, "width": 64}},
    "padding on one axis": {"size": {"shortest_edge": 40}, "crop_size": {"height": 31, "width": 99}},
    "crop, odd remainder": {"size": {"shortest_edge": 51}, "crop_size": {"height": 40, "width": 30}},
    "exact size": {"size": {"height": 50, "width": 70}, "do_center_crop": False},
    "no resize": {"do_resize": False, "crop_size": {"height": 100, "width": 100}},
    "bilinear": {"resample": 2},
    "no normalisation": {"do_normalize": False},
    "no rescale": {"do_rescale": False},
    "another rescale": {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
    "ints, as transformers 4.0 wrote": {"size": 224, "crop_size": 224},
    "lists": {"size": [60, 70], "crop_size": [50, 40]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_configuration(tmp_path, name):
    photo(83, 61).save(tmp_path / "a.png")
    assert_equals_transformers(tmp_path / "a.png", LLAVA | VARIANTS[name], tmp_path)


class TestReadImageSpec:
    def test_what_transformers_5_writes(self, tmp_path, spec):
        processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
        processor.save_pretrained(tmp_path / "five")
        assert read_image_spec(tmp_path / "five" / "preprocessor_config.json") == spec

    def test_nested_as_in_processor_config(self, tmp_path, spec):
        assert read_image_spec(write_config(tmp_path, {"image_processor": LLAVA, "patch_size": 14})) == spec

    def test_nulls_and_what_does_not_matter(self, tmp_path, spec):
        neutral = dict.fromkeys(("device", "do_pad", "pad_size", "disable_grouping", "return_tensors"))
        kinds = {"image_processor_type": "CLIPImageProcessorFast", "data_format": "channels_first", "do_rescale": None}
        assert read_image_spec(write_config(tmp_path, LLAVA | neutral | kinds)) == spec

    def test_nothing_given_is_clips_default(self, tmp_path):
        photo(300, 200).save(tmp_path / "a.png")
        assert_equals_transformers(tmp_path / "a.png", {}, tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            {"image_processor_type": "SiglipImageProcessor"},
            {"do_pad": True},
            {"do_convert_rgb": False},
            {"do_resize": "yes"},
            {"do_center_crop": False},
            {"size": {"shortest_edge": 336, "longest_edge": 500}},
            {"size": {"max_height": 3, "max_width": 3}},
            {"size": 0},
            {"size": 336.0},
            {"size": True},
            {"size": 10**9},
            {"size": [1, 2, 3]},
            {"crop_size": {"shortest_edge": 336}},
            {"crop_size": {"height": -1, "width": 336}},
            {"resample": 17},
            {"resample": "bicubic"},
            {"rescale_factor": 0},
            {"rescale_factor": float("nan")},
            {"image_mean": [0.5, 0.5]},
            {"image_mean": 0.5},
            {"image_std": [0.5, 0.5, 0]},
            {"image_std": ["1", "1", "1"]},
        ],
        ids=str,
    )
    def test_refuses(self, tmp_path, change):
        path = write_config(tmp_path, LLAVA | change)
        with pytest.raises(UserError, match=f"{next(iter(change))} .* not supported"):
            read_image_spec(path)

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b'"text"', b'{"image_processor": 1}'])
    def test_refuses_what_is_no_configuration(self, tmp_path, content):
        path = tmp_path / "preprocessor_config.json"
        path.write_bytes(content)
        with pytest.raises(UserError, match="export the bundle again"):
            read_image_spec(path)

    def test_refuses_a_missing_file(self, tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_image_spec(tmp_path / "none.json")


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


class TestRefusedImages:
    def refuse(self, path, match):
        with pytest.raises(UserError, match=match) as caught:
            load_image(path)
        assert "\n" not in str(caught.value)
        return caught.value

    def test_missing(self, tmp_path):
        self.refuse(tmp_path / "none.png", "No such file")

    def test_below_a_file(self, tmp_path):
        (tmp_path / "file").write_text("x")
        self.refuse(tmp_path / "file" / "a.png", "cannot be opened")

    def test_directory(self, tmp_path):
        self.refuse(tmp_path, "is a directory")

    def test_nul_in_path(self):
        self.refuse("a\0.png", "no valid path")

    def test_too_long_a_name(self, tmp_path):
        self.refuse(tmp_path / ("a" * 300), "cannot be opened")

    @pytest.mark.skipif(os.name != "posix", reason="there are no FIFOs")
    def test_fifo_does_not_hang(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        self.refuse(tmp_path / "pipe", "no regular file")

    def test_permission(self, tmp_path, monkeypatch):
        photo(9, 9).save(tmp_path / "a.png")

        def denied(path, *_):  # root may read everything, so a chmod would not do
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(preprocess, "open", denied, raising=False)
        self.refuse(tmp_path / "a.png", "Permission denied")

    @pytest.mark.parametrize("content", [b"", b"hello, I am text\n", b"%PDF-1.7", b"P6 1 1 255 abc", b"\0" * 1000])
    def test_no_supported_format(self, tmp_path, content):
        (tmp_path / "a.png").write_bytes(content)
        self.refuse(tmp_path / "a.png", "none of PNG, JPEG")

    @pytest.mark.parametrize("extension", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
    @pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
    def test_cut_short(self, tmp_path, extension, share):
        path = tmp_path / f"a.{extension}"
        photo(60, 50).save(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        self.refuse(path, "damaged")

    def test_damaged_chunk(self, tmp_path):
        photo(60, 50).save(tmp_path / "a.png")
        data = bytearray((tmp_path / "a.png").read_bytes())
        data[60] ^= 0xFF
        (tmp_path / "a.png").write_bytes(data)
        self.refuse(tmp_path / "a.png", "damaged")

    def test_text_chunk_bomb(self, tmp_path):
        info = PngImagePlugin.PngInfo()
        info.add_text("bomb", "0" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
        photo(9, 9).save(tmp_path / "a.png", pnginfo=info)
        self.refuse(tmp_path / "a.png", "damaged")

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("size", [(8001, 8000), (9500, 9500), (60000, 60000), (2**31 - 1, 2**31 - 1)])
    def test_too_many_pixels_from_the_header(self, tmp_path, size):
        """Below, within and above the range where Pillow itself warns and where it refuses."""
        (tmp_path / "a.png").write_bytes(png_header(*size))
        self.refuse(tmp_path / "a.png", "scale it down")

    def test_too_large_a_file(self, tmp_path):
        with open(tmp_path / "a.png", "wb") as file:
            file.truncate(preprocess.MAX_FILE_BYTES + 1)  # sparse: takes no space
        self.refuse(tmp_path / "a.png", "at most 512")

    @pytest.mark.parametrize("mode", ["I", "F"])
    def test_32_bit_samples(self, tmp_path, mode):
        Image.new(mode, (9, 9)).save(tmp_path / "a.tiff")
        self.refuse(tmp_path / "a.tiff", "32-bit")

    def test_disk_errors_are_not_called_damage(self, tmp_path, monkeypatch):
        photo(9, 9).save(tmp_path / "a.png")

        def fail(_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(preprocess.ImageOps, "exif_transpose", fail)
        with pytest.raises(OSError, match="Input/output"):
            load_image(tmp_path / "a.png")

    @pytest.mark.parametrize("size", [(1, 20000), (20000, 1)])
    def test_too_elongated_for_the_resize(self, tmp_path, spec, size):
        photo(*size).save(tmp_path / "a.png")
        image = load_image(tmp_path / "a.png")
        with pytest.raises(UserError, match="less elongated"):
            pixel_values(image, spec)
        with pytest.raises(UserError, match="less elongated"):
            original_box(image.size, spec)


def test_pixel_values_take_rgb_only_and_give_the_dtype(spec):
    with pytest.raises(ValueError, match="RGB"):
        pixel_values(Image.new("L", (9, 9)), spec)
    values = pixel_values(photo(9, 9), spec, np.float16)
    assert values.dtype == np.float16
    assert values.flags.c_contiguous


class TestOriginalBox:
    @pytest.mark.parametrize("size", [(600, 300), (300, 600), (100, 101), (336, 336), (1000, 400)])
    def test_shows_what_transformers_sees(self, tmp_path, spec, size):
        """A ramp tells where the outermost pixels that transformers gives came from: to 2 of 256 steps."""
        width, height = size
        y, x = np.mgrid[:height, :width]
        ramp = np.stack([(x + 0.5) / width, (y + 0.5) / height, 0 * x], axis=-1) * 255
        Image.fromarray(ramp.round().astype(np.uint8)).save(tmp_path / "a.png")
        seen = reference(tmp_path / "a.png", LLAVA | {"do_normalize": False})[0]  # [3, 336, 336] in 0..1
        left, top, right, bottom = original_box(size, spec)
        assert abs(seen[0, :, 0].mean() - left / width) < 2 / 255
        assert abs(seen[0, :, -1].mean() - right / width) < 2 / 255
        assert abs(seen[1, 0].mean() - top / height) < 2 / 255
        assert abs(seen[1, -1].mean() - bottom / height) < 2 / 255

    def test_lies_outside_where_padded(self, tmp_path):
        change = {"size": {"shortest_edge": 40}, "crop_size": {"height": 60, "width": 60}}
        spec = read_image_spec(write_config(tmp_path, LLAVA | change))
        assert original_box((80, 80), spec) == (-20, -20, 100, 100)

    def test_is_the_whole_image_without_a_crop(self, tmp_path):
        change = {"size": {"height": 50, "width": 70}, "do_center_crop": False}
        spec = read_image_spec(write_config(tmp_path, LLAVA | change))
        assert original_box((123, 45), spec) == pytest.approx((0, 0, 123, 45))
