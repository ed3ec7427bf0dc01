"""From an image file to pixel values, as transformers' CLIP image processor (its PIL form) makes them.

Knows Pillow, NumPy and `preprocessor_config.json`; knows no model. Of two rules that transformers has for
transparency, this follows that of version 5: what is transparent shows white.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from tokprune.runtime.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 64_000_000  # of the file, and again of the resized image: 256 MB each, as Pillow stores RGB
MAX_FILE_BYTES = 512 * 2**20  # what 64 megapixels take uncompressed at 8 bytes a pixel
MAX_EDGE = 4096  # of what the model reads; LLaVA-1.5 has 336

# What Pillow's decoders and its EXIF reader raise on damaged files.
_DAMAGED = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error)

# Names with or without Fast or Pil at the end. LLaVA's own processor without its padding is CLIP's.
_TYPES = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")
_SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes pixel values: resize, centre crop, rescale, normalise, in this order."""

    resize: int | tuple[int, int] | None  # length of the shortest edge; or (height, width); or left as it is
    crop: tuple[int, int] | None  # (height, width), or no crop
    resample: Image.Resampling
    scale: float  # what the 8-bit values are multiplied by
    mean: tuple[float, ...]  # 3 channels, after the scale
    std: tuple[float, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pixel values, whatever the image's."""
        size = self.crop or self.resize
        assert isinstance(size, tuple)  # read_image_spec sees to it
        return size


def read_image_spec(path: Path | str) -> ImageSpec:
    """Read a `preprocessor_config.json` of transformers 4 or 5; what is missing or null has CLIP's default.

    Raises UserError if the file cannot be read or asks for what is not supported here.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): export the bundle again") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not valid JSON ({error}): export the bundle again") from None
    if isinstance(data, dict):
        data = data.get("image_processor", data)  # transformers 5 nests it in processor_config.json
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no image processor: export the bundle again")
    return image_spec(data, str(path))


def image_spec(data: Mapping[str, Any], where: str) -> ImageSpec:
    """What `read_image_spec` reads, from the parsed JSON; ``where`` names its origin in errors."""
    return _Settings(where, {key: value for key, value in data.items() if value is not None}).spec()


@dataclass(frozen=True)
class _Settings:
    """The values of one file that are not null, and the file's name for errors."""

    where: str
    data: dict[str, Any]

    def spec(self) -> ImageSpec:
        kind = self.data.get("image_processor_type") or self.data.get("feature_extractor_type") or _TYPES[0]
        if str(kind).removesuffix("Fast").removesuffix("Pil") not in _TYPES:
            raise self._unsupported("image_processor_type", kind, "CLIPImageProcessor")
        for key in ("do_pad", "use_square_size", "default_to_square"):
            if self.data.get(key, False) is not False:
                raise self._unsupported(key, self.data[key], "false")
        if self.data.get("do_convert_rgb", True) is not True:
            raise self._unsupported("do_convert_rgb", self.data["do_convert_rgb"], "true")
        on = {key: self.data.get(key, True) for key in _SWITCHES}
        for key, value in on.items():
            if not isinstance(value, bool):
                raise self._unsupported(key, value, "true or false")
        resize = self._size("size", shortest=True) if on["do_resize"] else None
        crop = self._size("crop_size", shortest=False) if on["do_center_crop"] else None
        if crop is None and not isinstance(resize, tuple):
            raise self._unsupported("do_center_crop", False, "true, or a size of fixed height and width")
        assert not isinstance(crop, int)  # shortest=False gives pairs only
        return ImageSpec(
            resize=resize,
            crop=crop,
            resample=self._resample(),
            scale=self._numbers("rescale_factor", [1 / 255])[0] if on["do_rescale"] else 1.0,
            mean=self._numbers("image_mean", _CLIP_MEAN) if on["do_normalize"] else (0.0, 0.0, 0.0),
            std=self._numbers("image_std", _CLIP_STD) if on["do_normalize"] else (1.0, 1.0, 1.0),
        )

    def _size(self, key: str, *, shortest: bool) -> int | tuple[int, int]:
        """An int is the shortest edge where ``shortest``, else a square; a list is (height, width)."""
        value = found = self.data.get(key, 224)
        if shortest and isinstance(value, dict) and set(value) == {"shortest_edge"}:
            value = value["shortest_edge"]
        elif isinstance(value, dict) and set(value) == {"height", "width"}:
            value = [value["height"], value["width"]]
        edges = value if isinstance(value, list) and len(value) == 2 else [value]
        if not all(type(edge) is int and 1 <= edge <= MAX_EDGE for edge in edges):
            allowed = "a shortest_edge, or a height and width" if shortest else "a height and width"
            raise self._unsupported(key, found, f"{allowed}, of 1 to {MAX_EDGE}")
        if len(edges) == 1 and shortest:
            return edges[0]
        return edges[0], edges[-1]

    def _resample(self) -> Image.Resampling:
        value = self.data.get("resample", int(Image.Resampling.BICUBIC))
        try:
            return Image.Resampling(value)
        except ValueError:
            raise self._unsupported("resample", value, "one of Pillow's filters, 0 to 5") from None

    def _numbers(self, key: str, default: list[float]) -> tuple[float, ...]:
        """As many finite numbers as ``default`` has, alone or in a list; positive, but for a mean."""
        value = self.data.get(key, default)
        numbers = value if isinstance(value, list) else [value]
        finite = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        if len(numbers) != len(default) or not finite or (key != "image_mean" and min(numbers) <= 0):
            sign = "" if key == "image_mean" else "positive "
            raise self._unsupported(key, value, f"{len(default)} finite {sign}number(s)")
        return tuple(float(n) for n in numbers)

    def _unsupported(self, key: str, found: Any, allowed: str) -> UserError:
        return UserError(
            f"{self.where} asks for {key} {found!r}, which is not supported: it must be {allowed}, "
            "so export the bundle again"
        )


def load_image(path: Path | str) -> Image.Image:
    """Open an image file: mode RGB, upright by its EXIF tag, transparency on white, first frame.

    16-bit greyscale is scaled to 8 bits (transformers clips it at 255, which leaves white). Size and mode are
    judged from the header, before anything is decoded. Raises UserError if the path cannot be opened, if the
    file is none of FORMATS, is damaged, or is over MAX_PIXELS or MAX_FILE_BYTES.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise UserError(f"the image {path} is {kind}: name an image file")
        if status.st_size > MAX_FILE_BYTES:
            raise UserError(
                f"the image {path} has {status.st_size / 2**20:.0f} MiB, "
                f"at most {MAX_FILE_BYTES // 2**20} are read: compress it or scale it down"
            )
        file = open(path, "rb")  # noqa: SIM115 - closed below; only opening it belongs into this try
    except OSError as error:
        raise UserError(f"the image {path} cannot be opened ({error.strerror}): check the path") from None
    except ValueError:  # what Python says to a NUL in a path
        raise UserError(f"the image path {str(path)!r} is no valid path: check it") from None
    with file:
        image = _open(file, path)
        try:
            # exif_transpose first: transformers' load_image does so, and it decodes the pixels
            return _to_rgb(ImageOps.exif_transpose(image))
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk failed, not the file
                raise
            raise UserError(
                f"the image {path} cannot be decoded ({error}): it is damaged or cut short, copy or save it again"
            ) from error


def _open(file: Any, path: Path | str) -> Image.Image:
    """Read the header only, and refuse what is too large to decode."""
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels on; the limit below is lower and an error
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise UserError(
            f"the image {path} is none of {', '.join(FORMATS)}, or its start is damaged: convert it to PNG or JPEG"
        ) from None
    except Image.DecompressionBombError as error:
        raise UserError(f"the image {path} is too large ({error}): scale it down") from None
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"the image {path} has a damaged header ({error}): copy or save it again") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(
            f"the image {path} has {width}×{height} pixels, "
            f"at most {MAX_PIXELS // 10**6} million are read: scale it down"
        )
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # no range is defined for these
        raise UserError(f"the image {path} has 32-bit samples: save it with 8 or 16 bits")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """As convert_to_rgb of transformers 5; greyscale of 16 bits is scaled to 8 before."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # a PNG of 16 bits is "I" in older Pillow
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8))
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def pixel_values(image: Image.Image, spec: ImageSpec, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
    """Pixel values [1, 3, H, W] of an RGB image, computed in float32 and given as ``dtype``.

    Raises UserError if the image is so elongated that resizing it would pass MAX_PIXELS.
    """
    if image.mode != "RGB":
        raise ValueError(f"mode {image.mode} was given, RGB is needed: open images with load_image")
    if spec.resize is not None:
        image = image.resize(_resized(image.size, spec), resample=spec.resample)
    if spec.crop is not None:
        image = image.crop(_crop_box(image.size, spec.crop))  # 0 beyond the edges, as CLIP pads
    values = (np.asarray(image).astype(np.float64) * spec.scale).astype(np.float32)  # [H, W, 3]
    values -= np.array(spec.mean, np.float32)
    values /= np.array(spec.std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None].astype(dtype))


def original_box(image_size: tuple[int, int], spec: ImageSpec) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of what the model sees, in pixels of the original of (width, height).

    Lies beyond the original where the crop was padded. Raises UserError as `pixel_values` does.
    """
    width, height = image_size
    resized = _resized(image_size, spec)
    left, top, right, bottom = (0, 0, *resized) if spec.crop is None else _crop_box(resized, spec.crop)
    x, y = width / resized[0], height / resized[1]
    return left * x, top * y, right * x, bottom * y


def _resized(image_size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """(width, height) after the resize: get_resize_output_image_size of transformers, rounding down."""
    width, height = image_size
    if spec.resize is None:
        return width, height
    if isinstance(spec.resize, tuple):
        return spec.resize[1], spec.resize[0]
    short, long = min(width, height), max(width, height)
    longest = int(spec.resize * long / short)
    if spec.resize * longest > MAX_PIXELS:
        raise UserError(
            f"the image has {width}×{height} pixels, and would have {spec.resize}×{longest} "
            "when its shorter edge is resized for the model: crop it to a less elongated shape"
        )
    return (spec.resize, longest) if width <= height else (longest, spec.resize)


def _crop_box(image_size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a centre crop to (height, width); negative where it is to be padded."""
    left, top = (image_size[0] - crop[1]) // 2, (image_size[1] - crop[0]) // 2
    return left, top, left + crop[1], top + crop[0]
