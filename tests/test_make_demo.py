"""The demo's world, its data set folders, and the two shipped models that describe it."""

import dataclasses
import hashlib
import itertools
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

import make_demo
from base import ROOT, UserError, drive_of
from clips.dataset import INDEX_FILE, draft_pictures, read_dataset, target_pictures
from clips.events import BLUE, RED, WHITE, event_frames
from demo import filming, texts, world
from demo.building import NUM_FRAMES, build_tokenizer
from demo.checking import DRAFT, TARGET, check_answers
from demo.data_sets import DATA_SETS, DRIVES, clips_per_sequence, render_data_set, scenes_of, sequences_of
from demo.learning import published_name
from demo.texts import DRAFT_PHRASES, TARGET_PHRASES
from demo.world import CHOICES, Scene
from machine.files import only_writer

SCENE = Scene("city street", "day", "trees", "car", "red", "left", "driving", "nobody", "red")
SEED = [1, 2, 3]


def others(scene: Scene, name: str) -> list[Scene]:
    return [dataclasses.replace(scene, **{name: value}) for value in CHOICES[name]
            if value != getattr(scene, name)]


def some_scenes(count: int) -> list[Scene]:
    random = np.random.default_rng(0)
    return [world.random_scene(random) for _ in range(count)]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """A test set of one clip a sequence, as main() makes it, in this process."""
    folder = tmp_path_factory.mktemp("demo") / "my_egpt_dsec_seq_1s"
    return folder, render_data_set(folder, sequences_of("test"), 10, 20)


# -------------------------------------------------------------------------------------------- world
def test_the_same_seed_films_the_same_pixels_and_another_does_not():
    frames = filming.frames_of(SCENE, SEED, 10)
    assert frames.shape == (10, 96, 96, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames, filming.frames_of(SCENE, SEED, 10))
    assert np.array_equal(frames[[0, 7, 9]], filming.frames_of(SCENE, SEED, 10, [0, 7, 9]))
    assert not np.array_equal(frames, filming.frames_of(SCENE, [1, 2, 4], 10))


@pytest.mark.parametrize("name", CHOICES)
def test_the_camera_sees_every_attribute(name):
    frames = filming.frames_of(SCENE, SEED, 1).astype(int)
    for other in others(SCENE, name):
        changed = np.abs(filming.frames_of(other, SEED, 1) - frames).max(-1) > 40
        assert changed.sum() > 15, other              # pixels of 9216; the smallest are the lamps


@pytest.mark.parametrize("name", CHOICES)
def test_events_ignore_light_and_colours_and_show_the_rest(name):
    def pictures(scene):
        return np.stack(event_frames(filming.events_of(scene, SEED, 4), 5, (96, 96)))

    for other in others(SCENE, name):
        same = np.array_equal(pictures(other), pictures(SCENE))
        assert same == (name in ("light", "colour") or other.traffic_light == "green"), other


def test_events_come_in_time_order_where_the_brightness_moved():
    events = filming.events_of(SCENE, SEED, 10)
    assert (np.diff(events["t"])
            >= 0).all() and events["t"][0] >= 0 and events["t"][-1] <= 9 * 50_000
    assert set(events["p"].tolist()) == {0, 1}
    # Replayed, the events add up to the change of log brightness, to within one threshold.
    frames = filming.frames_of(filming.neutral(SCENE), SEED, 10)
    levels = np.log(frames[[0, -1]] @ np.array([0.299, 0.587, 0.114]) + 10)
    replayed = np.zeros((96, 96))
    np.add.at(replayed, (events["y"], events["x"]),
              np.where(events["p"] == 1, filming.THRESHOLD, -filming.THRESHOLD))
    assert np.abs(levels[1] - levels[0] - replayed).max() < filming.THRESHOLD * 1.001


@pytest.mark.parametrize("split", DRIVES)
def test_road_light_and_background_stay_within_a_drive_and_the_rest_moves(split):
    kept = ("road", "light", "background")
    drives = {}
    for sequence in sequences_of(split):
        drives.setdefault(drive_of(sequence), []).extend(scenes_of(sequence, 12))
    for scenes in drives.values():
        for name in CHOICES:
            assert (len({getattr(scene, name) for scene in scenes}) == 1) == (name in kept), name
    for name in kept:         # and no road, light or background is missing from the set
        assert {getattr(scenes[0], name) for scenes in drives.values()} == set(CHOICES[name])


def test_a_shorter_sequence_is_the_beginning_of_a_longer_one():
    assert scenes_of("demotown_10_a", 3) == scenes_of("demotown_10_a", 9)[:3]


# -------------------------------------------------------------------------------------------- texts
def test_a_target_text_reads_back_as_its_scene_and_is_written_the_same_again():
    for scene in some_scenes(300):
        read = texts.read_text(texts.target_text(scene), TARGET_PHRASES)
        assert Scene(**read) == scene
        assert texts.target_text(Scene(**read)) == texts.target_text(scene)


def test_a_draft_text_reads_back_as_what_events_show():
    for scene in some_scenes(300):
        shown = dataclasses.asdict(filming.neutral(scene))
        wanted = {name: shown[name] for name in DRAFT_PHRASES}
        assert texts.read_text(texts.draft_text(scene), DRAFT_PHRASES) == wanted
        assert texts.draft_text(scene) == texts.draft_text(filming.neutral(scene))


def test_a_text_that_names_nothing_or_two_things_reads_as_none():
    text = texts.target_text(SCENE)
    assert texts.read_text(text.replace("car", "bus", 1), TARGET_PHRASES)["vehicle"] is None
    assert texts.read_text("", TARGET_PHRASES) == dict.fromkeys(TARGET_PHRASES)


# ---------------------------------------------------------------------------------------- data sets
def test_train_and_test_share_no_drive_and_names_are_none_of_dsec():
    train, test = ({drive_of(sequence) for sequence in sequences_of(split)}
                   for split in ("train", "test"))
    assert not train & test
    assert len(sequences_of("test")) >= 8 and len(test) >= 4
    assert all(re.fullmatch(r"demo[a-z]+_\d\d", drive) for drive in train | test)


def test_rows_have_the_published_fields_and_point_at_files(data_set):
    folder, rows = data_set
    assert json.loads((folder / INDEX_FILE).read_text()) == rows
    assert [row["event_data"] for row in rows] == sorted(row["event_data"] for row in rows)
    for row in rows:
        assert list(row) == ["id", "split", "event_data", "video_data", "mp4_data", "event_image",
                             "conversations"]
        assert row["split"] == folder.name and row["event_data"].endswith("/000000.npy")
        assert row["conversations"] == [{"from": "human", "value": ""},
                                        {"from": "gpt", "value": ""}]
        assert (folder / "mp4" /
                row["mp4_data"]).is_file() and f"{row['video_data']}.mp4" == row["mp4_data"]
        assert [(folder / "event_image" / name).is_file()
                for name in row["event_image"]] == [True] * 5
    samples = read_dataset(folder)
    assert [sample.trouble for sample in samples] == [None] * 10
    assert len({sample.id for sample in samples}) == 10


def test_event_pictures_are_red_and_blue_on_white_and_videos_have_20_frames_a_second(data_set):
    import av

    folder, rows = data_set
    for name in rows[0]["event_image"]:
        picture = np.asarray(Image.open(folder / "event_image" / name))
        assert picture.shape == (96, 96, 3)
        assert {tuple(colour) for colour in picture.reshape(-1, 3).tolist()} == {RED, BLUE, WHITE}
    with av.open(str(folder / "mp4" / rows[0]["mp4_data"])) as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 20)
        assert sum(1 for _ in video.decode(stream)) == 20


def test_rendering_again_gives_the_same_bytes(data_set, tmp_path):
    folder, rows = data_set
    sequence = rows[3]["video_data"].split("/")[0]
    again = tmp_path / folder.name
    assert render_data_set(again, [sequence], 1, 20) == [rows[3]]
    files = [path.relative_to(again) for path in again.rglob("*.*") if path.name != INDEX_FILE]
    assert len(files) == 6
    for path in files:
        assert hashlib.sha256((again / path).read_bytes()).digest() == \
            hashlib.sha256((folder / path).read_bytes()).digest(), path


@pytest.mark.parametrize(("clips", "counts"), [(1, [1, 1, 1]), (3, [1, 1, 1]), (7, [2, 2, 3])])
def test_clips_are_spread_over_the_sequences(clips, counts):
    assert clips_per_sequence(clips, 3) == counts


def test_what_is_there_is_skipped_and_bad_counts_are_refused(tmp_path, monkeypatch, capsys):
    for _, name, _ in DATA_SETS:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / INDEX_FILE).write_text("[]")
    monkeypatch.setattr(sys, "argv", ["make_demo.py", "--output_dir", str(tmp_path)])
    make_demo.main()
    assert capsys.readouterr().out.count("| skipped, it is there") == 4
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        ".lock", *[INDEX_FILE] * 4]
    monkeypatch.setattr(sys, "argv", ["make_demo.py", "--train_clips", "0"])
    with pytest.raises(UserError, match="--train_clips must be 1 or more, got 0"):
        make_demo.main()


# ------------------------------------------------------------------------------------------- models
@pytest.fixture(scope="module")
def models():
    from machine.device import Runtime
    from vlm.eventgpt import EventGPT
    from vlm.video_llava import VideoLlava

    folder, runtime = ROOT / "demo" / "models", Runtime.choose("cpu")
    return EventGPT.load(folder / "eventgpt",
                         runtime), VideoLlava.load(folder / "video_llava", runtime)


def test_two_at_once_do_not_make_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_demo.py", "--output_dir", str(tmp_path)])
    with only_writer(tmp_path, wait=False), pytest.raises(UserError,
                                                          match=r"is being written by process .* --wait"):
        make_demo.main()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]



def test_the_shipped_models_describe_clips_they_never_saw(models, data_set):
    draft, target = models
    samples = read_dataset(data_set[0])
    pictures = [draft_pictures(sample, "first") for sample in samples]
    assert check_answers("draft", draft, samples, pictures, DRAFT) > 0.9
    # The check can fail: the same answers are mostly wrong about the clips in another order.
    assert check_answers("draft", draft, samples, pictures[::-1], DRAFT) < 0.75
    pictures = [target_pictures(sample, NUM_FRAMES) for sample in samples]
    assert check_answers("target", target, samples, pictures, TARGET) > 0.9


def test_both_models_share_the_tokenizer_that_is_built_here(models):
    draft, target = (model.tokenizer for model in models)
    built = build_tokenizer()
    assert built.get_vocab() == draft.get_vocab()
    assert draft.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert target.convert_ids_to_tokens(range(len(draft), len(target))) == ["<image>", "<video>", "<pad>"]
    for scene, text in itertools.product(some_scenes(20), (texts.draft_text, texts.target_text)):
        ids = draft(text(scene)).input_ids
        assert ids == target(text(scene)).input_ids and ids[0] == 1
        assert len(ids) <= 64                          # BOS is no answer token, EOS takes its place
        assert draft.decode(ids, skip_special_tokens=True) == text(scene)
    odd = "zebra\n<0x0A> äß 車"
    assert draft.decode(draft(odd).input_ids, skip_special_tokens=True) == odd


def test_no_token_spans_white_space(models):
    assert not [token for token in models[1].tokenizer.get_vocab() if "▁" in token[1:]]


def test_the_event_weights_have_the_published_names_and_all_weights_are_small(models):
    from safetensors import safe_open

    folder = ROOT / "demo" / "models"
    with safe_open(folder / "eventgpt" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype.itemsize for name in names} == {2}
    assert names == {published_name(name) for name in models[0].model.state_dict()}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight",
            "model.norm.weight",
            "model.visual_projector.2.bias", "model.feature_adaptor.weight",
            "model.visual_tower.visual_tower.vision_model.pre_layrnorm.bias"} <= names
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 5e6
