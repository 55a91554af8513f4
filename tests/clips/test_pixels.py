"""CLIP pixels: equal to those of the reference processors."""

import json
from pathlib import Path

import numpy as np
import pytest

from base import UserError
from clips.pixels import PixelSettings, clip_pixels


@pytest.mark.parametrize("height, width",
                         [(1080, 1440), (480, 640), (100, 99), (224, 224), (300, 225), (33, 45)])
def test_pixels_equal_those_of_transformers(height, width):
    from transformers import CLIPImageProcessorPil, VideoLlavaImageProcessor

    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = clip_pixels([picture], PixelSettings())[0]
    processed = VideoLlavaImageProcessor()([picture], return_tensors="np")
    theirs = next(value for key, value in processed.items() if key.startswith("pixel_values"))[0]
    assert np.array_equal(ours, theirs)
    theirs = CLIPImageProcessorPil()([picture], return_tensors="np")["pixel_values"][0]
    assert np.abs(ours - theirs).max() <= 1e-6


SETTINGS = {"do_resize": True, "size": {"shortest_edge": 48}, "resample": 3, "do_center_crop": True,
            "crop_size": {"height": 48, "width": 48}, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
OTHER = {**SETTINGS, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def model_folder(folder: Path, **files) -> Path:
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def test_old_and_new_spellings_and_no_file_at_all_are_read(tmp_path):
    assert PixelSettings.of_folder(tmp_path, 56) == PixelSettings(56, 56)
    for size, crop in ((56, 56), ({"shortest_edge": 56}, {"height": 56, "width": 56})):
        model_folder(tmp_path,
                     preprocessor_config={"size": size, "crop_size": crop, "image_mean": None})
        assert PixelSettings.of_folder(tmp_path, 56) == PixelSettings(56, 56)


NESTED = {"processor_class": "VideoLlavaProcessor",
          "image_processor": {**OTHER, "image_processor_type": "VideoLlavaImageProcessor"},
          "video_processor": {**OTHER, "video_processor_type": "VideoLlavaVideoProcessor"}}


@pytest.mark.parametrize("files", [
    {"preprocessor_config": OTHER}, {"processor_config": NESTED},
    {"processor_config": NESTED, "preprocessor_config": SETTINGS},
    {"processor_config": {"image_processor": OTHER}},
    {"processor_config": {"processor_class": "VideoLlavaProcessor"}, "preprocessor_config": OTHER},
    {"video_preprocessor_config": OTHER, "preprocessor_config": OTHER},
    {"preprocessor_config": {**OTHER, "rescale_factor": 1 / 127.5}},
    {"preprocessor_config": {**OTHER, "size": {"shortest_edge": 60}}}])
def test_pixels_are_those_of_the_folders_own_processor(tmp_path, files):
    from transformers import VideoLlavaImageProcessor

    model_folder(tmp_path, **files)
    picture = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    processed = VideoLlavaImageProcessor.from_pretrained(tmp_path)([picture], return_tensors="np")
    theirs = next(value for key, value in processed.items() if key.startswith("pixel_values"))[0]
    ours = clip_pixels([picture], PixelSettings.of_folder(tmp_path, 48))[0]
    assert np.abs(ours - theirs).max() < 1e-6


@pytest.mark.parametrize(("files", "words"), [
    ({"preprocessor_config": {"size": 56, "crop_size": 60}}, "crop_size 60"),
    ({"preprocessor_config": {}}, "vision tower's 48 px"),  # transformers would take 224
    ({"preprocessor_config": {**SETTINGS, "size": {"height": 48, "width": 48}}},
     "wanted the shortest edge"),
    ({"preprocessor_config": {**SETTINGS, "size": {"shortest_edge": 48, "longest_edge": 60}}},
     "the shortest edge"),
    ({"preprocessor_config": {**SETTINGS, "crop_size": {"height": 48, "width": 40}}},
     "and a square"),
    ({"preprocessor_config": {**SETTINGS, "resample": 2}}, "resample 2"),
    ({"preprocessor_config": {**SETTINGS, "image_mean": 0.5}}, "three numbers as image_mean"),
    *(({"preprocessor_config": {**SETTINGS, name: False}}, f"{name} is False") for name in (
        "do_resize", "do_center_crop", "do_rescale", "do_normalize")),
    ({"preprocessor_config": {**SETTINGS, "do_pad": True}}, "do_pad is True"),
    ({"preprocessor_config": {**SETTINGS, "image_processor_type": "SiglipImageProcessor"}},
     "is for a Siglip"),
    ({"preprocessor_config": [SETTINGS]}, "found list"),
    ({"processor_config": {"image_processor": 3}}, "found int"),
    ({"processor_config": {"video_processor": OTHER}, "preprocessor_config": SETTINGS},
     "pixel settings differ"),
    ({"video_preprocessor_config": OTHER, "preprocessor_config": SETTINGS},
     "pixel settings differ")])
def test_settings_that_would_give_other_pixels_are_refused(tmp_path, files, words):
    with pytest.raises(UserError, match=words):
        PixelSettings.of_folder(model_folder(tmp_path, **files), 48)
