"""How whole files are damaged, as hypothesis strategies: any bytes, and single parts with the
checksums put right.
"""

import copy
import gzip
import io
import json
import struct
import zipfile
import zlib

from hypothesis import strategies as st

from machine.journal import checksum_of, line_of, value_of

NUMBERS = [
    0, -1, 1, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 10**30, 0.5, 1e308,
    float("inf"),
    float("nan")
]
TEXTS = [
    "", "x" * 5000, "../../outside/secret.png", "/etc/passwd", "..", ".", "a\0b", "\ud83d",
    "9" * 5000, "~", "\x1b[31m\r\nRESULT | forged", "<script>alert(1)</script> | x | [y](http://z)",
    "\u202eevil", "$(id)", "town_00_a/000001"
]
DEEP = [[]]
for _ in range(300):
    DEEP = [DEEP, {"a": 1}]
ODD = [*NUMBERS, *TEXTS, None, True, [], {}, [[]], {"results": []}, [1] * 40_000, DEEP]


NPY_HEADER = 128               # bytes before the pickle


# ---------------------------------------------------------------------------------------- any bytes
def bytes_of(whole: bytes):
    """The file with up to six edits anywhere."""
    edit = st.tuples(st.sampled_from(("flip", "put", "put", "cut", "drop", "insert", "repeat")),
                     st.integers(0, max(len(whole) - 1, 0)), st.binary(min_size=1, max_size=8),
                     st.integers(1, 99))
    return st.lists(edit, min_size=1, max_size=6).map(lambda edits: edited(whole, edits))


def edited(content: bytes, edits: list[tuple]) -> bytes:
    for kind, at, new, size in edits:
        at = min(at, len(content))
        before, behind = content[:at], content[at:]
        content = {
            "flip": before + bytes(byte ^ (1 << size % 8) for byte in behind[:1]) + behind[1:],
            "put": before + new + behind[len(new):],
            "cut": before,
            "drop": before + behind[size:],
            "insert": before + new + behind,
            "repeat": before + behind[:size] + behind,
        }[kind]
    return content


# --------------------------------------------------------------------------------------------- JSON
def json_of(whole: bytes, lines: bool = False):
    """The same document with odd values in it; sometimes in another encoding, packed, or damaged as text."""
    values = [value_of(line) for line in whole.splitlines(keepends=True)] if lines else json.loads(whole)
    change = st.tuples(st.integers(0, 999), st.sampled_from(ODD), st.booleans())
    changed = st.lists(change, min_size=1,
                       max_size=4).map(lambda changes: text_of(values, changes, lines))
    packed = changed.flatmap(lambda text: st.sampled_from([
        text, text, text, text,
        gzip.compress(text, 1),
        text.decode("utf-8", "replace").encode("utf-16")
    ]))
    return st.one_of(packed, bytes_of(whole))


def text_of(values, changes: list[tuple], lines: bool) -> bytes:
    values = json.loads(json.dumps(values))                      # a copy
    for number, odd, twice in changes:
        places = list(places_in(values))
        holder, key = places[number % len(places)]
        holder[key] = fresh(odd)
        if twice and isinstance(holder, list):
            holder.append(fresh(odd))
    if lines:
        first = line_of(values[0])
        return first + b"".join(
            line_of({**value, "of": checksum_of(first)} if isinstance(value, dict) else value)
            for value in values[1:])
    return json.dumps(values).encode()


def fresh(odd):
    """A copy, which may be changed again; but of what is nested absurdly deep, where nothing is changed."""
    return odd if odd is DEEP else copy.deepcopy(odd)


def places_in(value):
    """(container, key) of everything in it, but of what is nested absurdly deep."""
    for key, part in (value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(part, (dict, list)) and part is not DEEP and len(part) < 1000:
            yield from places_in(part)


# ---------------------------------------------------------------------------------------------- PNG
def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def zeros(count: int) -> bytes:
    return zlib.compress(bytes(count), 1)


ZEROS = zeros(2**24)
HOSTILE_CHUNKS = [(b"zTXt", b"a\0\0" + ZEROS), (b"iCCP", b"a\0\0" + ZEROS),
                  (b"iTXt", b"a\0\1\0\0\0" + ZEROS), (b"IDAT", ZEROS),
                  (b"acTL", b"\0\0\xff\xff\0\0\0\0"), (b"tRNS", b"\0"), (b"PLTE", b"\1\2\3" * 300),
                  (b"IEND", b""), (b"eXIf", b"MM\0*" + bytes(9)), (b"tEXt", b"no null"),
                  (b"gAMA", b""), (b"pHYs", b"\0")]


def png_of(whole: bytes):
    """Chunks dropped, repeated, edited, hostile ones among them, another header; with the right
    checksums.
    """
    chunks, at = [], 8
    while at < len(whole):
        size, = struct.unpack_from(">I", whole, at)
        chunks.append((whole[at + 4:at + 8], whole[at + 8:at + 8 + size]))
        at += size + 12
    side = st.sampled_from([0, 1, 5, 32, 48, 5000, 16384, 2**31 - 1])
    header = st.tuples(side, side, st.sampled_from([1, 2, 8, 16, 77]), st.sampled_from([0, 2, 3, 4, 6, 9]),
                       st.just(0), st.just(0), st.integers(0, 1))
    edit = st.tuples(st.sampled_from(("header", "drop", "hostile", "edit", "repeat")), st.integers(0, 99),
                     st.sampled_from(HOSTILE_CHUNKS), header, st.binary(max_size=8))

    def make(edits: list[tuple]) -> bytes:
        parts = list(chunks)
        for kind, number, hostile, fields, new in edits:
            at = number % max(len(parts), 1)
            if kind == "hostile":
                parts.insert(at, hostile)
            elif parts and kind == "header":
                parts[0] = b"IHDR", struct.pack(">IIBBBBB", *fields)
            elif parts and kind == "repeat":
                parts.insert(at, parts[at])
            elif parts and kind == "drop":
                del parts[at]
            elif parts:
                name, data = parts[at]
                parts[at] = name, data[:number] + new + data[number + len(new):]
        return whole[:8] + b"".join(chunk(*part) for part in parts)

    return st.one_of(st.lists(edit, min_size=1, max_size=4).map(make), bytes_of(whole))


# ---------------------------------------------------------------------------------------------- MP4
def mp4_of(whole: bytes):
    """Sizes, counts and dimensions in the boxes overwritten, or any bytes."""
    names = (b"moov trak mdia stbl stsz stco stts stsc stsd stss ctts avc1 avcC "
             b"tkhd mvhd mdhd dref elst mdat ftyp")
    boxes = st.sampled_from([whole.index(name) for name in names.split() if name in whole])
    places = st.tuples(boxes, st.sampled_from([-4, *range(0, 40, 2)])).map(sum)
    number = st.sampled_from([0, 1, 8, 2**16, 2**24, 2**31 - 1, 2**31,
                              2**32 - 1]).map(lambda n: struct.pack(">I", n))
    edit = st.tuples(st.just("put"), places, st.one_of(number, st.binary(min_size=1, max_size=4)),
                     st.just(1))
    return st.one_of(
        st.lists(edit, min_size=1, max_size=3).map(lambda edits: edited(whole, edits)),
        bytes_of(whole))


# -------------------------------------------------------------------------------- pickles, archives
OPERATIONS = [
    b"(", b")", b"}", b"]", b"u", b"s", b"a", b"e", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b",
    b"\x93", b"N", b"2", b"0", b"K\x05", b"h\x02", b"\x94", b"q\x01", b"r\xff\xff\xff\x7f",
    b"j\x00\x00\x00\x00", b"\x8c\x01x", b"\x8c\x05numpy", b"\x81", b"\x8f", b"\x90",
    b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"cos\nsystem\n",
    b"cbuiltins\neval\n", b"Q", b"cnumpy\nload\n", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"B\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"(K\x01K\x02t", b"P1\n", b"I99\n", b"L9L\n",
    b"F1e9\n", b".", b"\x8a\xff", b"\x80\x05", b"cnumpy\ndtype\n", b"\x8c\x02O8", b"\x8c\x02u8",
    b"Vtext\n", b"C\x08\x00\x00\x00\x00\x00\x00\x00\x00"
]


def pickle_of(whole: bytes, first: int = 0):
    """Operations of pickles put in or over anywhere behind `first`."""
    edit = st.tuples(st.sampled_from(("put", "insert")), st.integers(first, len(whole)),
                     st.sampled_from(OPERATIONS), st.just(1))
    return st.one_of(
        st.lists(edit, min_size=1, max_size=8).map(lambda edits: edited(whole, edits)),
        bytes_of(whole))


def zip_of(whole: bytes):
    """One part of the archive damaged and packed again with the right checksum, or any bytes of the
    archive.
    """
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    names = [name for name, data in parts.items() if data]

    def repeat(change: tuple) -> bytes:
        name, data, packed = change
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w",
                             zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
            for other, value_before in parts.items():
                archive.writestr(other, data if other == name else value_before)
        return file.getvalue()

    def change_of(name: str):
        return st.tuples(st.just(name), pickle_of(parts[name]), st.booleans())

    pickles = [name for name in names if name.endswith("data.pkl")]
    return st.one_of(st.sampled_from(pickles + names).flatmap(change_of).map(repeat), bytes_of(whole))


def safetensors_of(whole: bytes):
    """Another header over the same weights, or another length of it."""
    size, = struct.unpack_from("<Q", whole)
    header, rest = whole[8:8 + size], whole[8 + size:]
    length = st.sampled_from([0, 1, size - 1, size + 1, len(whole), 2**31, 2**40, 2**63, 2**64 - 1])
    return st.one_of(json_of(header).map(lambda text: struct.pack("<Q", len(text)) + text + rest),
                     length.map(lambda n: struct.pack("<Q", n) + header + rest), bytes_of(whole))


STRATEGIES = {
    "pairs": json_of, "index": json_of, "journal": lambda whole: json_of(whole, lines=True),
    "png": png_of, "mp4": mp4_of, "npy": lambda whole: pickle_of(whole, NPY_HEADER), "pt": zip_of,
    "npz": zip_of, "results": json_of, "resume": zip_of, "config": json_of, "preprocessor": json_of,
    "safetensors": safetensors_of, "exported_config": json_of, "exported_metrics": json_of,
    "exported_weights": safetensors_of
}
