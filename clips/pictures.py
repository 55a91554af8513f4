"""Picture files (PNG, JPEG, TIFF, ...) as arrays, and PNGs written."""

from pathlib import Path

import numpy as np
from PIL import Image

from clips.limits import MediaError, check_file, check_size
from machine.files import write_whole

WHITE = (255, 255, 255)
# By content; Pillow's other readers have no business here, and one of them (EPS) starts another program.
PICTURES = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")


def read_event_image(path: Path) -> np.ndarray:
    """A picture of any mode and size -> (H, W, 3) uint8 RGB in [0, 255]. Transparent parts become white."""
    try:
        check_file(path)
        with Image.open(path, formats=PICTURES) as picture:
            check_size(*picture.size)
            if picture.has_transparency_data:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture.convert("RGBA"))
            elif picture.mode.startswith(("I", "F")):       # 16-bit grey: convert("RGB") would clip, not scale
                picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
            return np.array(picture.convert("RGB"))
    except FileNotFoundError as error:
        raise MediaError(f"no such picture: {path}") from error
    except MediaError as error:
        raise MediaError(f"can't read the picture {path}: {error}") from error
    except Exception as error:      # readers of broken files raise OSError, SyntaxError, struct.error, KeyError, ...
        raise MediaError(f"can't read the picture {path}: {type(error).__name__}: {error}") from error


def write_png(path: Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB as a PNG, whole or not at all."""
    write_whole(path, lambda temporary: Image.fromarray(image).save(temporary, "PNG"))
