"""Videos: frames of one file as arrays, and MP4s written. The only file that imports av."""

from __future__ import annotations

import collections
import errno
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from clips import limits
from clips.containers import check_whole
from clips.limits import MediaError, check_size, reading_media
from machine.files import write_whole
from machine.running import MACHINE_TROUBLE

MAX_FRAMES = 100_000       # 83 minutes at 20 fps; DSEC has clips of up to 320 frames
MAX_DECODING_S = 600       # of one video; 100,000 frames of 1440 x 1080 px take about as long
MAX_WAIT_S = 15  # for a file's head or next packet: FFmpeg searches broken files to their end
TOO_SLOW = f"nothing could be read within {MAX_WAIT_S} s"
MAX_PROBE_BYTES = 2**30    # read again to see whether an error was the disk's
# FFmpeg reads play lists too, which name other files and hosts; only single files of these
# containers are opened.
CONTAINERS = {"format_whitelist": "mov,matroska,avi,mpegts,h264,hevc", "protocol_whitelist": "file"}


def read_video(path: Path, num_frames: int = 8) -> list[np.ndarray]:
    """`num_frames` uniformly sampled frames (H, W, 3) uint8 RGB, all of one size, oldest first, upright.

    Frame k is number int(k (n - 1) / (num_frames - 1)) of n, as np.linspace(0, n - 1, num_frames)
    truncated; a shorter video repeats frames. n is the number of frames that are shown, counted by
    decoding all of them: what a container announces may be nothing (mkv, webm, ts), its first
    fragment, or frames that an edit list hides. Of several video streams the first is taken that is
    neither a cover picture nor a single frame.
    """
    with reading_media("video", path, ValueError, IndexError):
        check_whole(path)
        failure = None
        try:
            return _read(path, num_frames)
        except _ffmpeg_error() as error:
            failure = error
        # Outside of the handler: FFmpeg uses the system's error numbers for broken files too, and
        # this error must not look as if the system's had caused it.
        check_readable(path, failure)
        raise MediaError(_reason(failure))


def _read(path: Path, num_frames: int) -> list[np.ndarray]:
    end = time.monotonic() + MAX_DECODING_S
    index, expected = _choose_stream(path, end)
    shown, chosen, wanted = -1, {}, []
    for _ in range(3):                 # to count them, to read them, to read them by the right count
        wanted = np.linspace(0, expected - 1, num_frames).astype(int).tolist() if expected else []
        chosen, shown = {}, 0
        for frame in _decode(path, index, end):
            if shown in wanted:
                chosen[shown] = upright(frame)
            shown += 1
        if shown == expected:
            break
        expected = shown
    if not shown:
        raise MediaError("no frame could be decoded")
    if shown != expected:
        raise MediaError("its number of frames changes from one decoding to the next")
    if len({frame.shape for frame in chosen.values()}) > 1:
        raise MediaError("the frame size changes on the way")
    return [chosen[number] for number in wanted]


def _choose_stream(path: Path, end: float) -> tuple[int, int]:
    """The index of the stream to decode, and how many frames to expect of it; 0: not known."""
    from av.stream import Disposition

    with _open(path, end) as container:
        if not container.streams.video:
            raise MediaError("it has no video stream")
        pictures = Disposition.attached_pic | Disposition.timed_thumbnails
        streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
        if not streams:
            raise MediaError("it has no video stream but a cover picture")
        for stream in streams:
            _check_index(stream, path)
        if len(streams) == 1 and streams[0].frames:
            if streams[0].frames > MAX_FRAMES:
                raise MediaError(f"{streams[0].frames} frames, wanted 1 to {MAX_FRAMES}")
            return streams[0].index, streams[0].frames
        packets: collections.Counter[int] = collections.Counter()
        for packet in container.demux(streams):
            packets[packet.stream.index] += bool(packet.size) and not packet.is_discard
            _check_effort(packets[packet.stream.index], end)
        several = (stream for stream in streams if packets[stream.index] > 1)
        stream = next(several, streams[0])
        return stream.index, packets[stream.index]


def _check_index(stream, path: Path) -> None:
    """A MediaError if the container's index names frames beyond the end of the file."""
    entries = getattr(stream, "index_entries", ())       # PyAV 15 and later
    end = max((entry.pos + entry.size for entry in entries), default=0)
    if end > (size := path.stat().st_size):
        raise MediaError(f"it is cut short: {size} bytes are there, its index names frames up to {end}")


def _decode(path: Path, index: int, end: float) -> Iterator:
    """Yield every frame of a stream that is to be shown, as PyAV frames in the codec's own pixel format."""
    with _open(path, end) as container:
        stream = container.streams[index]
        if stream.codec_context is None:
            raise MediaError("FFmpeg knows no decoder for its video")
        check_size(stream.codec_context.width, stream.codec_context.height)
        # Frames may turn out larger than announced.
        stream.codec_context.options = {"max_pixels": str(limits.MAX_PIXELS)}
        stream.thread_type = "NONE"          # several clips are read at once: threads within one cost more
        frames = 0
        for packet in container.demux(stream):
            for frame in packet.decode():
                frames += 1
                yield frame
            _check_effort(frames, end)


def _check_effort(frames: int, end: float) -> None:
    if frames > MAX_FRAMES or time.monotonic() > end:
        raise MediaError(f"more than {MAX_FRAMES} frames, or {MAX_DECODING_S} s of decoding")


def _open(path: Path, end: float):
    import av

    _check_effort(0, end)
    wait_s = min(MAX_WAIT_S, max(0.01, end - time.monotonic()))
    start = time.monotonic()
    container = av.open(str(path), options=CONTAINERS, timeout=(wait_s, wait_s))
    # FFmpeg makes do with an interrupted search
    if time.monotonic() - start >= wait_s:
        container.close()
        raise MediaError(TOO_SLOW)
    return container


def upright(frame) -> np.ndarray:
    """A PyAV frame -> (H, W, 3) uint8 RGB, turned and mirrored as its display matrix says.

    The matrix (3 x 3, int32, 16 binary places) maps pixel (x, y) to (a x + c y, b x + d y).
    """
    picture = frame.to_ndarray(format="rgb24")
    matrix = next((bytes(item)
                   for item in frame.side_data if item.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return picture
    a, b, _, c, d = np.sign(np.round(np.frombuffer(matrix, np.int32)[:5] /
                                     2**16)).astype(int).tolist()
    if abs(a) == abs(d) == 1 and b == c == 0:
        right, down = a, d
    elif abs(b) == abs(c) == 1 and a == d == 0:
        picture = picture.swapaxes(0, 1)
        right, down = c, b
    else:
        raise MediaError(f"it is to be shown turned by {frame.rotation} degrees, wanted quarter turns")
    return np.ascontiguousarray(picture[::down, ::right])


# ---------------------------------------------------------------------------------- FFmpeg's errors
def _ffmpeg_error() -> type[Exception]:
    import av

    return av.error.FFmpegError


def _reason(error) -> str:
    if type(error).__name__ == "ExitError":              # the timeout of _open
        return TOO_SLOW
    return error.strerror or str(error)


def check_readable(path: Path, error) -> None:
    """Raise the system's own error if it is the reason why FFmpeg could not read this file."""
    if error.errno == errno.ENOENT:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
    if error.errno not in MACHINE_TROUBLE:
        return
    if error.errno == errno.ENOMEM:
        bytearray(2**26)          # a MemoryError if that is not free; else the file asks for too much
    with open(path, "rb", buffering=0) as file:
        for _ in range(MAX_PROBE_BYTES // 2**20):
            if not file.read(2**20):
                break


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int = 20, crf: int = 28,
                threads: int = 0) -> None:
    """Write (H, W, 3) uint8 RGB frames as H.264 (yuv420p), whole or not at all. Sides must be even.

    threads: 0 leaves the number to FFmpeg, which makes the bytes depend on the machine's cores.
    """
    import av

    def write(temporary: Path) -> None:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = None
            for frame in frames:
                if stream is None:
                    # mbtree off: on processors with AVX-512 it gives other bytes from call to call.
                    stream = container.add_stream("libx264", rate=fps, options={
                        "crf": str(crf), "preset": "fast", "x264-params": "mbtree=0"})
                    stream.codec_context.thread_count = threads
                    stream.height, stream.width = frame.shape[:2]
                    stream.pix_fmt = "yuv420p"
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            assert stream is not None, f"no frames for {path}"
            container.mux(stream.encode())

    write_whole(path, write)
