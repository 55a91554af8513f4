"""The pixels that a CLIP tower wants, and the settings of a model folder that say so."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from base import UserError
from machine.files import read_json


@dataclasses.dataclass(frozen=True)
class PixelSettings:
    """How pictures become a CLIP tower's input; the defaults are those of OpenAI's CLIP at 224 px."""

    resize: int = 224              # px, the shortest edge after resizing (bicubic)
    crop: int = 224                # px, the centre square that is kept
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale: float = 1 / 255

    @staticmethod
    def read(file: Path | None, image_size: int) -> "PixelSettings":
        """From a preprocessor_config.json (old style: plain numbers; new: dicts); without one, CLIP's defaults."""
        found = read_json(file) if file and file.is_file() else {}
        found = found if isinstance(found, dict) else {}
        size, crop = found.get("size", image_size), found.get("crop_size", image_size)
        size = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
        crop = crop.get("height") if isinstance(crop, dict) else crop
        resample = found.get("resample", Image.Resampling.BICUBIC)
        fits = type(crop) is type(size) is int and crop == image_size and crop <= size <= 8 * crop
        if not fits or resample != Image.Resampling.BICUBIC:
            raise UserError(f"{file}: size {size}, crop_size {crop} and resample {resample} can't be used: "
                            f"wanted bicubic (3) and the vision tower's {image_size} px")
        mean, std = found.get("image_mean", PixelSettings.mean), found.get("image_std", PixelSettings.std)
        rescale = found.get("rescale_factor", 1 / 255)
        numbers = all(isinstance(three, (list, tuple)) and len(three) == 3 and all(map(_is_number, three))
                      for three in (mean, std))
        if not numbers or 0 in std or not _is_number(rescale):
            raise UserError(f"{file}: wanted three numbers as image_mean, three as image_std (none of them 0), "
                            "and one as rescale_factor")
        return PixelSettings(size, crop, tuple(mean), tuple(std), rescale)


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6          # which is no NaN


def clip_pixels(images: Iterable[np.ndarray], settings: PixelSettings) -> np.ndarray:
    """(H, W, 3) uint8 RGB pictures -> (number, 3, S, S) float32, resized, centre-cropped and normalised.

    Pillow's bicubic, as in CLIP's own preprocessing; torchvision's resampling gives other pixels.
    """
    # In this order and precision it repeats the reference processors bit for bit; there are only 256 values.
    scaled = (np.arange(256, dtype=np.uint8).astype(np.float64) * settings.rescale).astype(np.float32)
    tables = [(scaled - np.float32(mean)) / np.float32(std) for mean, std in zip(settings.mean, settings.std)]
    pixels = []
    for image in images:
        height, width = image.shape[:2]
        short = min(height, width)
        size = [int(settings.resize * side / short) if side != short else settings.resize for side in (width, height)]
        resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        left, top = ((side - settings.crop) // 2 for side in size)
        square = np.asarray(resized.crop((left, top, left + settings.crop, top + settings.crop)))
        pixels.append([table[square[..., channel]] for channel, table in enumerate(tables)])
    return np.array(pixels)
