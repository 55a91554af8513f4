"""Videos: frames of one file as arrays, and MP4s written. The only file that imports av."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from clips import limits
from clips.limits import MediaError, check_file, check_size
from machine.files import write_whole

MAX_FRAMES = 100_000       # 83 minutes at 20 fps
MAX_DECODING_S = 600       # of one video; 100,000 frames of 1440 x 1080 px take about as long
# FFmpeg reads play lists too, which name other files and hosts; only single files of these containers are opened.
CONTAINERS = {"format_whitelist": "mov,matroska,avi,mpegts,h264,hevc", "protocol_whitelist": "file"}


def read_video(path: Path, num_frames: int = 8) -> list[np.ndarray]:
    """`num_frames` uniformly sampled frames (H, W, 3) uint8 RGB, all of one size, oldest first.

    Frame k is number int(k (n - 1) / (num_frames - 1)) of n, as np.linspace(0, n - 1, num_frames) truncated; a
    shorter video repeats frames. Every frame is decoded and counted, because a container may announce 0 frames
    (mkv, webm, ts) or more than are there: FFmpeg ends such a file without an error.
    """
    import av

    try:
        check_file(path)
        with av.open(str(path), options=CONTAINERS) as container:
            if not container.streams.video:
                raise MediaError("it has no video stream")
            announced = container.streams.video[0].frames
        total = announced or sum(1 for _ in _decode(path))
        if not 0 < total <= MAX_FRAMES:
            raise MediaError(f"{total} frames, wanted 1 to {MAX_FRAMES}")
        wanted = np.linspace(0, total - 1, num_frames).astype(int).tolist()
        chosen, seen = {}, 0
        for seen, frame in enumerate(_decode(path), start=1):
            if seen - 1 in wanted:
                chosen[seen - 1] = frame.to_ndarray(format="rgb24")
        if seen < total:
            raise MediaError(f"it is cut short: {seen} of {total} frames could be decoded")
        if len({frame.shape for frame in chosen.values()}) > 1:
            raise MediaError("the frame size changes on the way")
    except FileNotFoundError as error:
        raise MediaError(f"no such video: {path}") from error
    except MediaError as error:
        raise MediaError(f"can't read the video {path}: {error}") from error
    except (av.error.FFmpegError, OSError, ValueError, IndexError, MemoryError) as error:
        raise MediaError(f"can't read the video {path}: {error}") from error
    return [chosen[index] for index in wanted]


def _decode(path: Path) -> Iterator:
    """Yield every frame of the first video stream, undecoded pixels still in the codec's own format."""
    import av

    end, seen = time.monotonic() + MAX_DECODING_S, 0
    with av.open(str(path), options=CONTAINERS) as container:
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise MediaError("FFmpeg knows no decoder for its video")
        check_size(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = {"max_pixels": str(limits.MAX_PIXELS)}        # of frames that turn out larger
        stream.thread_type = "NONE"              # several clips are read at once: threads within one cost more
        for packet in container.demux(stream):
            for frame in packet.decode():
                seen += 1
                yield frame
            if seen > MAX_FRAMES or time.monotonic() > end:
                raise MediaError(f"more than {MAX_FRAMES} frames, or {MAX_DECODING_S} s of decoding")


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int = 20, crf: int = 28, threads: int = 0) -> None:
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
