"""Files that ask for all memory or all time: holes, deflated zeros, very many small parts, growing
ones.

    for case in cases(kind, whole, number): case.content, case.size, case.grows
"""

import dataclasses
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator

GIB = 2**30
SIZES = (2**27 + 1, GIB, 2**31 - 1, 2**31 + 1, 4 * GIB + 5, 20 * GIB, 2**40)
JSON = ("pairs", "index", "journal", "results", "decode", "config", "tokenizer", "preprocessor",
        "questions")
VIDEOS = ("mp4", "mkv", "avi", "ts")
PICTURES = ("png", "jpeg", "gif", "webp")
ARCHIVES = ("pt", "npz", "resume")


@dataclasses.dataclass(frozen=True)
class Case:
    """A file: its content, zeros up to `size`, and whether it grows while it is read."""

    what: str
    content: bytes
    size: int = 0
    grows: bool = False
    tail: bytes = b""              # behind the zeros


def cases(kind: str, whole: bytes, number: int) -> Iterator[Case]:
    """So many hostile files of this kind, always the same ones."""
    chosen = random.Random(f"huge {kind}")
    makers = [sparse, sparse, growing, many_parts(kind)]
    if kind in ARCHIVES:
        makers.append(deflated)
    for row in range(number):
        yield makers[row % len(makers)](whole, chosen)


def sparse(whole: bytes, chosen: random.Random) -> Case:
    """The whole file, a part of it or nothing; then a hole; then perhaps its end again."""
    head = chosen.choice([b"", whole, whole[:chosen.randrange(len(whole) + 1)], whole[:16], b" "])
    tail = chosen.choice([b"", b"", whole, whole[-chosen.randrange(1, 200):]])
    return Case("sparse", head, chosen.choice(SIZES), tail=tail)


def growing(whole: bytes, chosen: random.Random) -> Case:
    return Case("growing",
                chosen.choice([whole, whole[:chosen.randrange(1, len(whole))], whole + b"\n"]),
                grows=True)


def deflated(whole: bytes, chosen: random.Random) -> Case:
    """An archive with one record of gigabytes of zeros in some kilobytes or megabytes."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    name, blocks = chosen.choice(list(parts)), chosen.choice([1, 16, 160])
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(2**26)) + packer.flush(zlib.Z_FULL_FLUSH)
    data = parts[name][:chosen.choice([0, 80, 128])]
    front = zlib.compressobj(9, wbits=-15)
    packed = (front.compress(data) + front.flush(zlib.Z_FULL_FLUSH) + block * blocks + b"\x03\x00")
    return Case("deflated", rezipped(parts, name, packed, len(data) + blocks * 2**26))


def rezipped(parts: dict[str, bytes], hostile: str, packed: bytes, size: int) -> bytes:
    """The archive with `packed` as the deflated record of this name."""
    file, entries = bytearray(), []
    for name, data in parts.items():
        method, stored, length = (8, packed, size) if name == hostile else (0, data, len(data))
        common = struct.pack("<HHHHHIII", 20, 0, method, 0, 33, zlib.crc32(data), len(stored),
                             length & 0xFFFFFFFF)
        letters = name.encode()
        entries.append((common, letters, len(file)))
        file += b"PK\3\4" + common + struct.pack("<HH", len(letters), 0) + letters + stored
    start = len(file)
    for common, letters, place in entries:
        file += b"PK\1\2\x14\0" + common
        file += struct.pack("<HHHHHII", len(letters), 0, 0, 0, 0, 0, place) + letters
    file += b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, len(entries), len(entries),
                                    len(file) - start, start, 0)
    return bytes(file)


def many_parts(kind: str):
    """A maker of files of this kind with very many small parts."""
    def make(whole: bytes, chosen: random.Random) -> Case:
        count = chosen.choice([300, 5_000, 60_000])
        return Case("many parts", repeated(kind, whole, chosen, count))
    return make


def repeated(kind: str, whole: bytes, chosen: random.Random, count: int) -> bytes:
    if kind == "jpeg":                                     # its scans again and again
        first = whole.index(b"\xff\xda")
        place = whole.index(b"\xff\xda", chosen.randrange(first + 1))
        return whole[:-2] + whole[place:-2][:400] * count + whole[-2:]
    if kind == "gif":
        start = whole.index(b"\x2c")
        return whole[:-1] + whole[start:-1][:200] * count + whole[-1:]
    if kind == "png":
        part = chosen.choice([b"IDAT", b"tEXt", b"fdAT", b"PLTE"])
        piece = struct.pack(">I", 0) + part + struct.pack(">I", zlib.crc32(part))
        return whole[:33] + piece * count + whole[33:]
    if kind == "webp":
        body = whole[12:] + (chosen.choice([b"ANMF", b"EXIF", b"XMP ", b"VP8 "]) + bytes(4)) * count
        return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    if kind in JSON:
        piece = chosen.choice([b"[", b'{"a":', b"[],", b"{},", b"9", b'"a",', b"\n", b"-", b"{}\n",
                               b"\xef\xbb\xbf"])
        front = chosen.choice([b"", b"[", whole[:chosen.randrange(len(whole))]])
        return front + piece * (count * 20) + chosen.choice([b"", b"]", b"0]"])
    place = chosen.randrange(len(whole))                   # any format: a stretch of it, many times
    stretch = whole[place:place + chosen.choice([1, 8, 40, 188, 400])]
    return whole[:place] + stretch * count + whole[place:]
