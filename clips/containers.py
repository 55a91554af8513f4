"""Whether the end of a video file is gone, by the sizes that its container names in front of each part.

Frame counts don't tell: MP4s with edit lists show fewer frames than they announce, fragmented ones
announce the first fragment alone. Containers that write no sizes (.ts, .h264, recordings whose
sizes were never filled in) can't tell.
"""

import io
from collections.abc import Iterator
from pathlib import Path

from clips.limits import MediaError

MAX_PARTS = 10**6                  # looked at in one file: more are no video, and reading them takes long
MP4_BOXES = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide",
             b"udta", b"uuid",
             b"meta", b"mfra", b"sidx", b"ssix", b"prft", b"emsg", b"pnot", b"pdin"}
# The two elements of a Matroska or WebM file
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def check_whole(path: Path) -> None:
    """A MediaError if a part of the file goes on beyond its end."""
    with open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        start = file.read(12)
        if start[4:8] in MP4_BOXES:
            ends = mp4_ends(file, size)
        elif start[:4] == b"RIFF":
            ends = riff_ends(file, size)
        elif start[:4] == EBML:
            ends = matroska_ends(file)
        else:
            return
        for _, end in zip(range(MAX_PARTS), ends):
            if end > size:
                raise MediaError(f"it is cut short: {size} bytes are there, wanted {end}")


def mp4_ends(file, size: int) -> Iterator[int]:
    """Where each top-level box ends: size (4 bytes, or 8 after the name if that is 1), name."""
    place = 0
    while place + 8 <= size:
        file.seek(place)
        header = file.read(16)
        length, name = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if name not in MP4_BOXES or length < 8:          # to the file's end (0), or no box at all
            return
        place += length
        yield place


def riff_ends(file, size: int) -> Iterator[int]:
    """Where each RIFF chunk ends (a large AVI has several). Unknown sizes are 0 or nearly 2^32."""
    place = 0
    while place + 12 <= size:
        file.seek(place)
        header = file.read(8)
        length = int.from_bytes(header[4:], "little")
        if header[:4] != b"RIFF" or length < 4 or length >= 2**32 - 16:
            return
        place += 8 + length
        yield place
        place += length % 2


def matroska_ends(file) -> Iterator[int]:
    """Where the header and the segment end."""
    file.seek(0)
    for name in (EBML, SEGMENT):
        if file.read(4) != name:
            return
        first = file.read(1)
        if not first or not first[0]:
            return
        extra = 8 - first[0].bit_length()        # as many zeros in front as bytes that follow
        value_bits = 7 * (extra + 1)
        length = int.from_bytes(first + file.read(extra), "big") & (2**value_bits - 1)
        if length == 2**value_bits - 1:                  # unknown
            return
        end = file.tell() + length
        yield end
        if name == EBML:
            file.seek(end)
