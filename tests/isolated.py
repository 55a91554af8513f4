"""One reader after another in a process of its own, where a crash, a hang or a touched file is seen
and not suffered.

    with Isolated(folder) as process:
        process.read("png", content)        -> "read", "MediaError: ...", "UserError: ...",
                                            "crash: ..." or "hang"
"""

import contextlib
import io
import multiprocessing
import os
import resource
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path

LIMIT_S = 60                       # without an answer for so long, it hangs
MEMORY = 12 * 2**30                # bytes of address space; PyTorch takes a good part of it
READER_MEMORY = 4 * 2**30          # bytes that a reader may take besides
GROWTH = 2**20                     # bytes by which a growing file grows at a time, a hole, up to
MOST_GROWTH = 2**35                # so many
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
TOUCHING = {
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "shutil.rmtree", "shutil.copyfile", "shutil.move"
}
STARTING = {
    "subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork", "socket.connect",
    "socket.getaddrinfo", "webbrowser.open"
}


def small_adapter():
    from token_adapter import AdapterConfig, TokenAdapter

    return TokenAdapter(
        AdapterConfig(vocab_size=16, embed_dim=8, num_layers=1, num_heads=2, feedforward_dim=8,
                      max_seq_len=8, conditioning="prefix"))


class Isolated:
    """The process; started anew when it was lost."""

    def __init__(self, folder: Path):
        self.folder, self.process = folder, None

    def read(self, kind: str, content: bytes, size: int = 0, grows: bool = False,
             tail: bytes = b"") -> str:
        """What came of reading the content, with zeros up to this size and the tail behind it."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs, self.folder), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send((kind, content, size, grows, tail))
            if self.pipe.poll(LIMIT_S):
                return self.pipe.recv()
            outcome = "hang"
        except (EOFError, OSError):
            outcome = "crash: the process has ended"
        self.close()
        return outcome

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.join()
            self.pipe.close()
        self.process = None

    def __enter__(self) -> "Isolated":
        return self

    def __exit__(self, *_) -> None:
        self.close()


# -------------------------------------------------------------------------------- in that process
def serve(pipe, folder: Path) -> None:
    import torch
    import torch._dynamo  # PyTorch's first optimizer imports it, and it makes a cache folder then

    torch.set_num_threads(1)
    readers, touched = Readers(folder), []

    def watch(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = set(mode or "") & set("wax+") or (flags or 0) & WRITING
        else:
            path, writes = next(iter(arguments), ""), event in TOUCHING | STARTING
        if writes and not (event not in STARTING and inside(path)):
            touched.append(f"{event} {path}")

    def inside(path) -> bool:
        try:
            return isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(
                (f"{folder}/", os.devnull))
        except ValueError:                # no path at all: it will be refused
            return True

    sys.addaudithook(watch)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    data = size_of_data() + READER_MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    while True:
        try:
            kind, content, size, grows, tail = pipe.recv()
        except EOFError:
            return
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            outcome = readers.outcome(kind, content, size, grows, tail)
        if touched:
            outcome = f"crash: it touched {touched[0]}"
            touched.clear()
        if "\x1b" in printed.getvalue() or "\r" in printed.getvalue():
            outcome = "crash: control characters in the log"
        pipe.send(outcome)


def size_of_data() -> int:
    """Bytes of private memory that this process has."""
    words = Path("/proc/self/status").read_text().split("VmData:")[1].split()
    return int(words[0]) * 1024


@contextlib.contextmanager
def growing(path: Path):
    """Inside, the file gets longer and longer."""
    stop = threading.Event()

    def grow() -> None:
        size = path.stat().st_size
        while not stop.is_set() and size < MOST_GROWTH:
            size += GROWTH
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            time.sleep(0.001)

    thread = threading.Thread(target=grow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Readers:
    """What reads each kind of file; everything is imported before the first one."""

    def __init__(self, folder: Path):
        import pairs.splits as splits  # noqa: F401
        import report as program
        import training.phases as training
        from clips import dataset, dsec, pictures, videos
        from clips.pixels import PixelSettings, clip_pixels
        from decoding.task import read_task
        from drafting.checkpoints import load_adapter
        from drafting.memory import load_memory
        from machine.device import Runtime
        from pairs.formats import load_pairs
        from pairs.journal import Journal
        from reports import task_report as report
        from training.checkpoints import Fingerprint, Resume
        from vlm import video_llava

        dsec.check_reader()                # imports h5py and its filters
        # S: shorter than in earnest, of 20 and 15
        pictures.MAX_PICTURE_S = videos.MAX_WAIT_S = 2
        self.folder, self.set, self.model = folder, folder / "set", folder / "model"
        self.cpu, self.dataset, self.video_llava = Runtime.choose("cpu"), dataset, video_llava
        self.tower_reads = lambda images: clip_pixels(images, PixelSettings())
        self.load_pairs, self.pt, self.npz = load_pairs, load_adapter, load_memory
        self.Journal, self.Resume, self.training = Journal, Resume, training
        self.Fingerprint = Fingerprint
        self.report, self.program, self.read_task = report, program, read_task

    def outcome(self, kind: str, content: bytes, size: int = 0, grows: bool = False,
                tail: bytes = b"") -> str:
        from base import UserError
        from clips.limits import MediaError

        path, whole = self.place(kind), None
        if path.exists():
            whole = path.with_name(f"{path.name}.whole")
            shutil.move(path, whole)
        try:
            with open(path, "wb") as file:
                file.write(content)
                file.truncate(max(size, len(content)))
                file.seek(0, os.SEEK_END)
                file.write(tail)
            with growing(path) if grows else contextlib.nullcontext():
                getattr(self, kind)(path)
            return "read"
        except (MediaError, UserError) as error:
            return f"{type(error).__name__}: {error}"
        # That is what it is for: whatever else comes out of a reader is a fault
        except BaseException:
            return f"crash: {traceback.format_exc()}"
        finally:
            path.unlink(missing_ok=True)
            if whole:
                shutil.move(whole, path)

    def place(self, kind: str) -> Path:
        return {
            "index": self.set / "EventGPT_Instruction_Subset.json",
            "config": self.model / "config.json", "safetensors": self.model / "model.safetensors",
            "preprocessor": self.model / "preprocessor_config.json", "tokenizer": self.model /
            "tokenizer.json", "results": self.folder / "task" / "results.json",
            "exported_config": self.folder / "exported" / "config.json",
            "exported_metrics": self.folder / "exported" / "metrics.json",
            "exported_weights": self.folder / "exported" / "model.safetensors",
            "questions": self.folder / "questions.txt", "decode": self.folder / "task" /
            "decode.json", "journal": self.folder / ".out.json.journal.jsonl"
        }.get(kind, self.folder / f"file.{kind}")

    # Each of these takes the path of a file.
    def pairs(self, path: Path) -> None:
        from pairs.splits import clip_order
        from reports.blocks import escape, table

        pairs = self.load_pairs([path])
        clip_order(pairs.sequence, pairs.clip)
        assert len(list(pairs.answers("target"))) == len(pairs) and pairs.padded(
            "target", 8).shape == (len(pairs), 8)
        lines = table(["text"], [[escape(text)]
                                 for text in (*pairs.sequence, *pairs.clip, *pairs.files)])
        assert all(line.isprintable() and "<" not in line for line in lines)

    def index(self, path: Path) -> None:
        samples = self.dataset.read_dataset(path.parent)
        for sample in samples:
            paths = (*sample.event_images, *filter(None, (sample.events, sample.video)))
            self.dataset.digest_of(paths)
            assert all(path.is_relative_to(self.set) for path in paths)
            if not sample.trouble:
                with contextlib.suppress(self.dataset.MediaError):
                    self.dataset.draft_pictures(sample, "all")
                    self.dataset.target_pictures(sample, 4)

    def journal(self, path: Path) -> None:
        content = {"eventgpt": {"town/1": "a"}, "videollava": {}}
        with self.Journal(self.folder / "out.json", {}, content) as journal:
            for (model, number), keys in journal.places.items():
                assert all(
                    isinstance(journal.read(model, key, number)["tokens"], list) for key in keys)

    def results(self, path: Path) -> None:
        from machine.files import reading

        with reading(path, "as main() of report.py has it"):
            self.report.write_report(path.parent, {}, plots=False)
        self.program.summary([path.parent])
        page = path.parent / "RESULTS.md"
        lines = page.read_text().splitlines()
        page.unlink()
        # code
        assert all(line.isprintable() and ("<" not in line or line.startswith("    "))
                   for line in lines)
        self.read_task(path.parent)

    def exported_config(self, path: Path) -> None:
        task = self.read_task(path.parent)
        assert task.adapter.num_parameters() < 10**6 and isinstance(task.models, dict)

    exported_metrics = exported_weights = exported_config

    def resume(self, path: Path) -> None:
        import torch

        from machine.files import reading

        adapter = small_adapter()
        resume = self.Resume(path, self.Fingerprint({"train tokens": 1}, [1, 2]),
                             adapter.num_parameters())
        resume.read()
        trainer = self.training.Trainer(adapter, 4, 1e-3, 9)
        with reading(path, "as training has it"):
            self.training.take_up(resume.saved, [self.training.Phase("prefix", 0, 3)], adapter)
            self.training.restore(resume.saved, trainer, torch.Generator())
        for weight in trainer.weights:
            weight.grad = torch.ones_like(weight)
        trainer.optimizer.step()                 # reads and writes all that was restored

    def png(self, path: Path) -> None:
        self.tower_reads([self.dataset.read_event_image(path)])

    def npy(self, path: Path) -> None:
        self.tower_reads(self.dataset.event_frames(self.dataset.read_events(path)))

    def mp4(self, path: Path) -> None:
        self.tower_reads(self.dataset.read_video(path))

    def config(self, path: Path) -> None:
        self.video_llava.VideoLlava.load(path.parent, self.cpu)

    safetensors = preprocessor = tokenizer = config
    jpeg = gif = webp = png
    mkv = avi = ts = mp4

    def questions(self, path: Path) -> None:
        from clips.questions import read_questions

        read_questions("", path, 3)

    def decode(self, path: Path) -> None:
        from reports.decode_figures import one_line, read_decoding

        one_line(read_decoding(path.parent))

    def h5(self, path: Path) -> None:
        from clips.dsec import EventFile

        with EventFile(path) as events:
            for _ in events.slices(*events.between(0, 10**6)):
                pass
