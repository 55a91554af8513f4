"""MediaError, and the bounds beyond which a picture, event file or video is broken or hostile."""

from pathlib import Path

# Beyond these a file is broken or hostile; DSEC has clips of 1440 x 1080 px and up to 320 frames.
MAX_SIDE = 16384           # px
MAX_PIXELS = 2**25         # in a picture or frame: 8K; a few such at once still fit into memory
MAX_RATIO = 100            # of the sides: the shorter one is what CLIP's resizing goes by


class MediaError(Exception):
    """This picture, event file or video can't be used; the message says why."""


def check_file(path: Path) -> None:
    """A pipe or a device would be read for ever."""
    if path.exists() and not path.is_file():
        raise MediaError("it is no regular file")


def check_size(width: int, height: int) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise MediaError(f"{width} x {height} px, wanted 1 to {MAX_SIDE} px a side")
    if width * height > MAX_PIXELS or max(width, height) > MAX_RATIO * min(width, height):
        raise MediaError(f"{width} x {height} px, wanted {MAX_PIXELS} px at most, sides up to 1 : {MAX_RATIO}")
