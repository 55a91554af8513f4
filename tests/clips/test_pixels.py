"""CLIP pixels: equal to those of the reference processors."""

import numpy as np
import pytest

from base import UserError
from clips.pixels import PixelSettings, clip_pixels


@pytest.mark.parametrize("height, width", [(1080, 1440), (480, 640), (100, 99), (224, 224), (300, 225), (33, 45)])
def test_pixels_equal_those_of_transformers(height, width):
    from transformers import CLIPImageProcessorPil, VideoLlavaImageProcessor

    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = clip_pixels([picture], PixelSettings())[0]
    processed = VideoLlavaImageProcessor()([picture], return_tensors="np")
    theirs = next(value for key, value in processed.items() if key.startswith("pixel_values"))[0]
    assert np.array_equal(ours, theirs)
    theirs = CLIPImageProcessorPil()([picture], return_tensors="np")["pixel_values"][0]
    assert np.abs(ours - theirs).max() <= 1e-6


def test_pixel_settings_are_read_from_both_styles_and_bad_ones_refused(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    for text in ('{"size": 56, "crop_size": 56}', '{"size": {"shortest_edge": 56}, "crop_size": {"height": 56}}'):
        file.write_text(text)
        assert PixelSettings.read(file, 56) == PixelSettings(56, 56)
    assert PixelSettings.read(None, 56) == PixelSettings(56, 56)
    file.write_text('{"size": 56, "crop_size": 60}')
    with pytest.raises(UserError, match="crop_size 60"):
        PixelSettings.read(file, 56)
