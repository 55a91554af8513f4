"""Files that mean harm: bombs, pickles and code that want to run, paths that lead elsewhere, texts that pretend."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageFile

import extract_tokens_train
from base import UserError
from clips import media
from clips.dataset import read_dataset
from clips.media import MediaError, read_event_image, read_events, read_video, write_png, write_video
from drafting.memory import load_memory
from machine.device import Runtime
from pairs.formats import load_pairs
from tests.conftest import ROOT
from token_adapter import AdapterConfig, TokenAdapter, load_adapter, save_adapter
from vlm import loading
from vlm.eventgpt import EventGPT
from vlm.video_llava import VideoLlava

CPU = Runtime.choose("cpu")
TARGET, DRAFT = ROOT / "demo" / "models" / "video_llava", ROOT / "demo" / "models" / "eventgpt"
SHARDED = ROOT / "tests" / "eventgpt_parity" / "seed0"


@pytest.fixture(autouse=True)
def no_hang():
    """What hangs in Python ends here."""
    def ended(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Runs:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# ---------------------------------------------------------------------------------------------------- pictures
def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("size", [(16_384, 16_384), (16_384, 1), (8_000, 8_000), (2**31 - 1, 2)])
def test_a_picture_too_large_or_narrow_is_refused_before_it_is_decoded(tmp_path, monkeypatch, size):
    write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    whole = (tmp_path / "a.png").read_bytes()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(whole[:8] + header + whole[33:])

    def load(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MediaError, match=r"can't read the picture .*(px, wanted|exceeds limit)"):
        read_event_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_texts_and_profiles_that_unpack_to_very_much_are_refused(tmp_path, name):
    write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    whole = (tmp_path / "a.png").read_bytes()
    front = b"a\0\1\0\0\0" if name == b"iTXt" else b"a\0\0"
    (tmp_path / "a.png").write_bytes(whole[:33] + chunk(name, front + zlib.compress(bytes(2**26))) + whole[33:])
    assert (tmp_path / "a.png").stat().st_size < 2**17                        # 64 MiB of zeros
    with pytest.raises(MediaError, match="too large"):
        read_event_image(tmp_path / "a.png")


def test_a_drawing_in_postscript_starts_no_other_program(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    with pytest.raises(MediaError, match="cannot identify"):
        read_event_image(tmp_path / "a.png")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("read", [read_event_image, read_events, read_video])
def test_a_pipe_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match="no regular file"):
        read(tmp_path / "pipe")


# ------------------------------------------------------------------------------------------------------ videos
@pytest.fixture
def video(tmp_path) -> Path:
    write_video(tmp_path / "a.mp4", [np.full((48, 64, 3), 20 * k, np.uint8) for k in range(10)])
    return tmp_path / "a.mp4"


@pytest.mark.parametrize(("limit", "value", "words"), [
    ("MAX_FRAMES", 9, "10 frames, wanted 1 to 9"), ("MAX_PIXELS", 64 * 48 - 1, "64 x 48 px, wanted"),
    ("MAX_SIDE", 63, "64 x 48 px, wanted")])
def test_what_a_video_announces_is_bounded_before_it_is_decoded(video, monkeypatch, limit, value, words):
    import av

    def decode(*_):
        raise AssertionError("decoded")

    assert len(read_video(video)) == 8
    monkeypatch.setattr(media, limit, value)
    monkeypatch.setattr(av.container.InputContainer, "demux", decode)
    with pytest.raises(MediaError, match=words):
        read_video(video)


def stream(path: Path, frames: list[np.ndarray]) -> bytes:
    """Frames as H.264 in no container."""
    import av

    with av.open(str(path), "w", format="h264") as file:
        out = file.add_stream("libx264", rate=20)
        out.height, out.width = frames[0].shape[:2]
        for frame in frames:
            file.mux(out.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(out.encode())
    return path.read_bytes()


def test_a_video_that_announces_nothing_is_counted_only_so_far(tmp_path, monkeypatch):
    path = tmp_path / "a.h264"
    stream(path, [np.full((48, 64, 3), 8 * k, np.uint8) for k in range(30)])
    assert len(read_video(path)) == 8
    monkeypatch.setattr(media, "MAX_FRAMES", 9)
    with pytest.raises(MediaError, match="more than 9 frames"):
        read_video(path)


def test_frames_that_turn_out_larger_than_announced_are_not_decoded(tmp_path, monkeypatch):
    import av

    path = tmp_path / "a.h264"
    small, large = (stream(path, [np.zeros((48 * k, 64 * k, 3), np.uint8)] * 9) for k in (1, 4))
    path.write_bytes(small + large)
    with pytest.raises(MediaError, match="the frame size changes on the way"):
        read_video(path)
    monkeypatch.setattr(media, "MAX_PIXELS", 100 * 100)
    seen = set()
    with contextlib.suppress(av.error.FFmpegError):                    # some versions end here, some go on
        for frame in media._decode(path):
            seen.add((frame.width, frame.height))
    assert seen == {(64, 48)}
    with pytest.raises(MediaError):
        read_video(path)


def test_decoding_ends_after_its_time(video, monkeypatch):
    monkeypatch.setattr(media, "MAX_DECODING_S", -1)
    with pytest.raises(MediaError, match="s of decoding"):
        read_video(video)


@pytest.mark.parametrize("text", ["#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{other}\n#EXT-X-ENDLIST\n",
                                  "ffconcat version 1.0\nfile {other}\n", "v=0\nm=video 5004 RTP/AVP 96\n"])
def test_a_play_list_that_names_other_files_is_no_video(video, tmp_path, text):
    (tmp_path / "list.mp4").write_text(text.format(other=video.name))
    with pytest.raises(MediaError, match=r"can't read the video .*list\.mp4"):
        read_video(tmp_path / "list.mp4")


# ------------------------------------------------------------------------------------------------- raw events
def event_file(path: Path, operations: bytes) -> Path:
    """As np.save makes one, with these operations of a pickle in it."""
    np.save(path, {"x": 1}, allow_pickle=True)
    path.write_bytes(path.read_bytes()[:128] + b"\x80\x04" + operations + b".")
    return path


ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tC\x01btR"
OBJECTS, BYTES = (b"cnumpy\ndtype\n(X" + struct.pack("<I", 2) + name + b"\x89\x88tR" for name in (b"O8", b"u1"))
NESTED = b"K\x01" + b"\x940h\0h\0\x86" * 0 + b"".join(b"q%ch%ch%c\x86" % (k, k, k) for k in range(1, 40))


@pytest.mark.parametrize(("name", "operations"), {
    "a memo that would take 16 GiB": b"}r\xff\xff\xff\x7f",
    "a text that would take 2 GiB": b"X\xff\xff\xff\x7f",
    "a thousand objects of which there is one": ARRAY + b"(K\x01(M\xe8\x03t" + OBJECTS + b"\x89]NatRb",
    "objects in an array of numbers": ARRAY + b"(K\x01(K\x09t" + BYTES + b"\x89]Natb",
    "bytes as objects": ARRAY + b"(K\x01(K\x01t" + OBJECTS + b"\x89C\x08" + b"\x41" * 8 + b"tb",
    "a key that is hashed for ever": b"}(" + NESTED + b"K\x01u",
    "numbers said to be objects": BYTES + b"(K\x03X\x01\0\0\0|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb",
    "a call of numpy": b"cnumpy\nload\n(X\x0b\0\0\0/etc/passwdtR",
    "an attribute of the unpickler's own": b"cnumpy\n_reconstruct.__init__\n)R",
    "a set": b"(K\x01\x91", "an object made by its class": b"cnumpy\nndarray\n)\x81"}.items())
def test_pickles_that_cheat_are_refused(tmp_path, name, operations):
    with pytest.raises(MediaError, match="can't read the events"):
        read_events(event_file(tmp_path / "e.npy", operations))


@pytest.mark.parametrize("protocol", [3, 4])
def test_event_files_of_every_age_are_read(tmp_path, protocol):
    columns = {name: np.arange(9, dtype=kind) for name, kind in (("x", "u2"), ("y", "u2"), ("t", "i8"), ("p", "u1"))}
    more = {"time_start": np.int64(2**40), "duration_ms": 0.5, "indices": [1], "name": "é", "no": None, "yes": True}
    array = np.array({**columns, **more}, dtype=object)
    np.save(tmp_path / "e.npy", array, allow_pickle=True)
    (tmp_path / "e.npy").write_bytes((tmp_path / "e.npy").read_bytes()[:128] + pickle.dumps(array, protocol))
    found = read_events(tmp_path / "e.npy")
    for name, column in columns.items():
        assert np.array_equal(found[name], column) and found[name].dtype == column.dtype
    older = (tmp_path / "e.npy").read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    if protocol == 3:                              # names in lines, not behind their length
        (tmp_path / "e.npy").write_bytes(older)
        assert np.array_equal(read_events(tmp_path / "e.npy")["t"], columns["t"])


# ----------------------------------------------------------------------------------- checkpoints and memories
def adapter(**changed) -> TokenAdapter:
    return TokenAdapter(AdapterConfig(**{"vocab_size": 16, "embed_dim": 8, "num_layers": 1, "num_heads": 2,
                                         "feedforward_dim": 8, "max_seq_len": 8, **changed}))


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    torch.save({"model_state_dict": Runs(tmp_path / "executed"), "config": {}}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Runs(tmp_path / "executed"), 2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match="not a checkpoint that can be read"):
            load_adapter(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("tensor", [
    torch.zeros(1).expand(2**40, 8), torch.empty(16, 8, device="meta"), torch.zeros(16, 8, dtype=torch.int8),
    torch.zeros(16, 8).to_sparse(), torch.zeros(16, 8, dtype=torch.complex64)])
def test_a_checkpoint_whose_numbers_are_not_all_there_is_refused(tmp_path, tensor):
    save_adapter(adapter(), tmp_path / "a.pt")
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    found["model_state_dict"]["embedding.weight"] = tensor
    torch.save(found, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt"):
        load_adapter(tmp_path / "a.pt")


@pytest.mark.parametrize("config", [
    {"num_heads": "2"}, {"num_heads": [2]}, {"num_heads": float("nan")}, {"num_heads": 10**30}, {"dropout": None},
    {"conditioning": ["draft"]}, {"contract": {}}])
def test_a_checkpoint_with_an_odd_config_is_a_clear_error(tmp_path, config):
    save_adapter(adapter(), tmp_path / "a.pt")
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({**found, "config": {**found["config"], **config}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt"):
        load_adapter(tmp_path / "a.pt")


def test_a_memory_is_unpacked_only_so_far_and_runs_nothing(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "m.npz", target=np.zeros(2**15, np.int32), target_start=np.array([0, 2**15]))
    assert (tmp_path / "m.npz").stat().st_size < 2**10 and len(load_memory(tmp_path / "m.npz")) == 1
    monkeypatch.setattr("drafting.memory.MAX_UNPACKED_BYTES", 2**15)
    with pytest.raises(UserError, match="unpacks to more than"):
        load_memory(tmp_path / "m.npz")
    np.savez(tmp_path / "m.npz", target=np.array([Runs(tmp_path / "executed")]), target_start=np.array([0, 1]))
    with pytest.raises(UserError, match="not the memory of a task"):
        load_memory(tmp_path / "m.npz")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------- model folders
@pytest.fixture
def sharded(tmp_path) -> Path:
    return shutil.copytree(SHARDED, tmp_path / "model") / "checkpoint"


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match=r"can't load the model .*model-00002-of-00004\.safetensors"):
        EventGPT.load(sharded, CPU)


@pytest.mark.parametrize("length", [2**63, 2**40, 2**26, 0, 3])
def test_weights_with_an_absurd_header_are_a_clear_error(sharded, length):
    shard = sharded / "model-00003-of-00004.safetensors"
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    with pytest.raises(UserError, match="can't load the model"):
        EventGPT.load(sharded, CPU)


def test_pickled_weights_that_run_code_are_refused(tmp_path):
    folder = shutil.copytree(TARGET, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Runs(tmp_path / "executed"), "y": torch.zeros(10**6)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="can't load the model"):
        VideoLlava.load(folder, CPU)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("kind", "source"), [(VideoLlava, TARGET), (EventGPT, DRAFT)])
def test_code_in_a_model_folder_is_never_run(tmp_path, kind, source):
    folder, executed = shutil.copytree(source, tmp_path / "model"), tmp_path / "executed"
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil", "processing_evil"):
        (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(executed)!r})\nclass Evil: pass\n")
    maps = {"config.json": {"AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil"},
            "tokenizer_config.json": {"AutoTokenizer": ["tokenization_evil.Evil", None]},
            "preprocessor_config.json": {"AutoProcessor": "processing_evil.Evil"}}
    for name, auto_map in maps.items():
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**found, "auto_map": auto_map}))
    kind.load(folder, CPU)                         # its own architecture is known: what else is there is not needed
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "architectures": ["Evil"]}))
    if kind is VideoLlava:
        with pytest.raises(UserError, match="can't load the config"):
            kind.load(folder, CPU)
    assert not executed.exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, wanted 1 to 1,000"),
    ({"vocab_size": 10**12}, "vocab_size is 1000000000000"), ({"hidden_size": -64}, "hidden_size is -64"),
    ({"intermediate_size": 10**7}, "far more than fit into its 1 weight files"),
    ({"num_hidden_layers": 3}, "the weights of .* don't fit .* missing: .*layers.2"),
    ({"hidden_size": "64"}, "can't load the config")])
def test_a_config_that_is_not_that_of_the_weights_is_a_clear_error(tmp_path, change, words):
    folder = shutil.copytree(TARGET, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "text_config": {**config["text_config"], **change}}))
    with pytest.raises(UserError, match=words):
        VideoLlava.load(folder, CPU)


def test_too_little_memory_is_told_with_the_figures_before_loading(monkeypatch):
    monkeypatch.setattr(loading, "free_gib", lambda device: 0.0)
    monkeypatch.setattr(loading, "BITS", {})
    words = r"not enough memory for .* take about 0\.0 GiB \(float32, .*0\.0 GiB are free"
    with pytest.raises(UserError, match=words):
        VideoLlava.load(TARGET, CPU)
    assert loading.free_gib(torch.device("cpu")) == 0


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), MemoryError("Unable to allocate"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_memory_that_ends_while_loading_is_told_with_the_figures(monkeypatch, error):
    from transformers import VideoLlavaForConditionalGeneration

    def short(*_, **__):
        raise error

    monkeypatch.setattr(VideoLlavaForConditionalGeneration, "from_pretrained", short)
    with pytest.raises(UserError, match=r"not enough memory for .* GiB are free; .*allocate.*--quantization 4bit"):
        VideoLlava.load(TARGET, CPU)


# ------------------------------------------------------------------------------------------- texts, through it all
EVIL = "town_00_a\x1b[31m\r\n[2026-01-01 00:00:00] RESULT | forged‮\ud83d"


def test_ids_and_names_can_forge_no_line_of_the_log_and_end_no_run(demo, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(demo.test_1s, tmp_path / "set")
    index = folder / "EventGPT_Instruction_Subset.json"
    rows = json.loads(index.read_text())[:3]
    rows[0]["id"] = EVIL                           # answered, under that name
    rows[1]["event_data"] = rows[1]["video_data"] = f"{EVIL}/000001"
    rows[2]["event_image"] = [f"{EVIL}.png"]
    index.write_text(json.dumps(rows))
    output = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", [
        "extract_tokens_train.py", "--dataset_dir", str(folder), "--output_file", str(output), "--draft_model",
        str(DRAFT), "--target_model", str(TARGET), "--max_new_tokens", "8", "--device", "cpu", "--num_workers", "1"])
    extract_tokens_train.main()
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() and line.startswith("[20") for line in lines)
    assert not [line for line in lines if "] RESULT | forged" in line[:40]]
    found = json.loads(output.read_text())
    assert [row["sample_id"] for row in found["results"]] == [EVIL] and len(found["failed"]) == 2
    pairs = load_pairs([output])
    assert len(pairs) == 1


def test_names_that_no_path_can_have_are_trouble_of_one_clip(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "event_image").mkdir()
    (tmp_path / "event_image" / "circle").symlink_to("circle")
    names = ["a\0b", "\ud83d", "x" * 5000, "../a", "circle/000001", "circle", "..", "/x", "9" * 5000, "../../x"]
    rows = [{"event_image": [name]} for name in names] + [{"event_data": name} for name in names]
    (tmp_path / "EventGPT_Instruction_Subset.json").write_text(json.dumps(rows))
    samples = read_dataset(tmp_path)
    assert len(samples) == len(rows)
    for sample in samples:
        for path in sample.event_images:
            with pytest.raises(MediaError):
                read_event_image(path)
    leaving = [sample.index for sample in samples if "leaves the data set folder" in (sample.trouble or "")]
    assert leaving == [number for number, name in enumerate([*names, *names]) if name in ("/x", "../../x")]
