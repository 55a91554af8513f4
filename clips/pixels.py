"""The pixels that a CLIP tower wants, and the settings of a model folder that define them."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from base import UserError
from machine.files import read_json

# Where transformers looks for the settings, by what they are for: a key of processor_config.json,
# else a file.
SOURCES = {"image": ("image_processor", ("preprocessor_config.json",)),
           "video": ("video_processor", ("video_preprocessor_config.json",
                                         "preprocessor_config.json"))}
PROCESSOR_FILE = "processor_config.json"
FAMILIES = ("CLIP", "VideoLlava")                  # whose processors work as clip_pixels does
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")             # on, or not named
OTHER_STEPS = ("do_pad", "do_flip_channel_order", "do_grayscale", "do_reduce_labels",
               "use_square_size",
               "offset")  # off, or not named
TYPES = ("image_processor_type", "video_processor_type", "feature_extractor_type")


@dataclasses.dataclass(frozen=True)
class PixelSettings:
    """How pictures become a CLIP tower's input; the defaults are those of OpenAI's CLIP at 224 px.
    """

    resize: int = 224              # px, the shortest edge after resizing (bicubic)
    crop: int = 224                # px, the centre square that is kept
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale: float = 1 / 255

    @staticmethod
    def of_folder(folder: Path, image_size: int,
                  kinds: tuple[str, ...] = ("video", "image")) -> "PixelSettings":
        """The settings that transformers would use for the model in this folder; CLIP's where it has none.

        image_size: of the vision tower, px. kinds: what the model's pictures may be prepared as. A
        UserError where the settings of two kinds differ, because one tower reads both, and where
        they ask for something that clip_pixels does not do.
        """
        settings = {}
        for kind in kinds:
            if source := _find(folder, *SOURCES[kind]):
                where, values = source
                settings[where] = _parse(where, values, image_size)
        if len(set(settings.values())) > 1:
            differing = "; ".join(f"{where}: {values}" for where, values in settings.items())
            raise UserError(f"the pixel settings differ: {differing}; wanted the same for pictures "
                            "and videos")
        return next(iter(settings.values()), PixelSettings(image_size, image_size))


def _find(folder: Path, key: str, names: tuple[str, ...]) -> tuple[str, object] | None:
    """(source, settings): a part of processor_config.json, as transformers 5 writes it, or a file.
    """
    combined = folder / PROCESSOR_FILE
    if combined.is_file():
        values = read_json(combined)
        if isinstance(values, dict) and key in values:
            return f"{combined}, {key}", values[key]
    for name in names:
        if (folder / name).is_file():
            return str(folder / name), read_json(folder / name)
    return None


def _parse(where: str, values, image_size: int) -> PixelSettings:
    """The settings; a UserError for all that clip_pixels would do otherwise than transformers."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: wanted pixel settings, found {type(values).__name__}")
    types = [str(values[key]) for key in TYPES if values.get(key) is not None]
    if foreign := [name for name in types if not name.startswith(FAMILIES)]:
        raise UserError(f"{where} is for a {foreign[0]}, wanted one of CLIP or Video-LLaVA")
    off = [name for name in STEPS if values.get(name, True) is not True]
    more = [name for name in OTHER_STEPS if values.get(name)]
    if off or more:
        steps = ", ".join(f"{name} is {values[name]!r}" for name in off + more)
        raise UserError(f"{where}: {steps}; wanted pictures that are resized, cropped, rescaled "
                        "and normalised, and nothing else")
    size = _side(values.get("size"), "shortest_edge")
    crop = _side(values.get("crop_size"), "height", "width")
    resample = values.get("resample", int(Image.Resampling.BICUBIC))
    fits = crop == image_size and crop <= size <= 8 * crop
    if not fits or type(resample) is not int or resample != Image.Resampling.BICUBIC:
        raise UserError(f"{where}: size {values.get('size')}, crop_size {values.get('crop_size')} "
                        f"and resample {resample} can't be used: wanted the shortest edge and a "
                        f"square, bicubic (3) and the vision tower's {image_size} px")
    mean = PixelSettings.mean if values.get("image_mean") is None else values["image_mean"]
    std = PixelSettings.std if values.get("image_std") is None else values["image_std"]
    rescale = values.get("rescale_factor", 1 / 255)
    numbers = all(isinstance(three, (list, tuple)) and len(three) == 3
                  and all(map(_is_number, three))
                  for three in (mean, std))
    if not numbers or 0 in std or not _is_number(rescale):
        raise UserError(f"{where}: wanted three numbers as image_mean, three as image_std (none of "
                        "them 0), and one as rescale_factor")
    return PixelSettings(size, crop, tuple(mean), tuple(std), rescale)


def _side(value, *keys: str) -> int:
    """px, of a number or of a dict with exactly these keys; transformers' 224 for None, -1 for
    others.
    """
    if value is None:
        return 224
    if isinstance(value, dict):
        sides = [value[key] for key in keys] if set(value) == set(keys) else []
        value = sides[0] if sides and all(side == sides[0] for side in sides) else None
    return value if type(value) is int else -1


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6          # which is no NaN


def clip_pixels(images: Iterable[np.ndarray], settings: PixelSettings) -> np.ndarray:
    """(H, W, 3) uint8 RGB pictures -> (number, 3, S, S) float32, resized, centre-cropped and normalised.

    Pillow's bicubic, as in CLIP's own preprocessing; torchvision's resampling gives other pixels.
    """
    # In this order and precision it repeats the reference processors bit for bit; there are only
    # 256 values.
    scaled = (np.arange(256, dtype=np.uint8).astype(np.float64) * settings.rescale).astype(np.float32)
    tables = [(scaled - np.float32(mean)) / np.float32(std)
              for mean, std in zip(settings.mean, settings.std)]
    pixels = []
    for image in images:
        height, width = image.shape[:2]
        short = min(height, width)
        size = [settings.resize if side == short else int(settings.resize * side / short)
                for side in (width, height)]
        resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        left, top = ((side - settings.crop) // 2 for side in size)
        square = np.asarray(resized.crop((left, top, left + settings.crop, top + settings.crop)))
        pixels.append([table[square[..., channel]] for channel, table in enumerate(tables)])
    return np.array(pixels)
