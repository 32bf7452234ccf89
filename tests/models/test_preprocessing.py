import jax
import numpy as np
import pytest
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from tspo_jax.models.preprocessing import ImageProcessor, QwenProcessor

SIZES = [(45, 71), (71, 45), (33, 33), (224, 224), (101, 257), (480, 853), (17, 90)]


@pytest.fixture(scope="module", params=SIZES, ids=str)
def image(request):
    rng = np.random.default_rng(request.param[0])
    smooth = np.linspace(0, 255, request.param[1])[None, :, None] * rng.random(3)
    return np.clip(smooth + rng.normal(0, 40, (*request.param, 3)), 0, 255).astype(np.uint8)


def hf_pixels(processor, image):
    """[S, S, 3] of a Hugging Face processor, which answers with the channels first."""
    return processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


@pytest.mark.parametrize(("resize", "size"), [(32, 32), (224, 224), (40, 31)])
def test_clip_equals_the_slow_processor(image, resize, size):
    config = {"size": {"shortest_edge": resize}, "crop_size": {"height": size, "width": size}}
    expected = hf_pixels(CLIPImageProcessorPil(**config), image)
    processor = ImageProcessor.clip(config, size)
    cropped = processor.crop(image)
    assert cropped.dtype == np.uint8 and cropped.shape == (size, size, 3)
    pixels = processor.normalize(cropped)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


@pytest.mark.parametrize("size", [28, 73, 384])
def test_siglip_equals_the_slow_processor(image, size):
    expected = hf_pixels(
        SiglipImageProcessorPil(size={"height": size, "width": size}, resample=3),
        image,
    )
    processor = ImageProcessor.siglip(size)
    np.testing.assert_allclose(processor.normalize(processor.crop(image)), expected, atol=1e-6)


def test_golden_pixels(golden):
    data = np.load(golden / "llava_video_grid.npz")
    processor = ImageProcessor.siglip(28)
    for case in ("case0", "case1"):
        pixels = processor.normalize(np.stack([processor.crop(frame) for frame in data[f"{case}/frames"]]))
        np.testing.assert_allclose(pixels.transpose(0, 3, 1, 2), data[f"{case}/pixel_values"], atol=1e-6)


def test_normalize_on_the_device_equals_the_host(image):
    processor = ImageProcessor.clip({}, 32)
    cropped = processor.crop(image)
    np.testing.assert_allclose(jax.jit(processor.normalize)(cropped), processor.normalize(cropped), atol=1e-6)


def test_old_style_numbers_and_own_statistics():
    """The 2021 files give plain numbers; a checkpoint's own mean and std are taken."""
    processor = ImageProcessor.clip(
        {"size": 224, "crop_size": 224, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}, 224
    )
    assert (processor.resize, processor.size) == (224, 224)
    grey = np.full((224, 224, 3), 51, np.uint8)
    np.testing.assert_allclose(processor.normalize(processor.crop(grey)), 0.5, atol=1e-6)


@pytest.mark.parametrize("config", [{"crop_size": 16}, {"size": {"shortest_edge": 16}, "crop_size": 32}])
def test_a_crop_that_the_tower_cannot_take(config):
    with pytest.raises(ValueError, match=r"preprocessor_config.json: .* 32 x 32 pixels"):
        ImageProcessor.clip(config, 32)


@pytest.mark.parametrize(
    ("height", "width", "shown"),
    [(720, 1280, (336, 644)), (480, 640, (420, 560)), (1280, 720, (644, 336)), (400, 400, (448, 448))],
)
def test_evaluation_keeps_the_aspect_ratio(height, width, shown):
    """The published runs of Qwen2.5-VL: 200,704 to 235,200 pixels a frame, 336 x 644 for 16:9."""
    processor = QwenProcessor.from_hf({}, 28, (392, 728))
    assert processor.size_of(height, width) == (392, 728)
    found = processor.keeping_aspect(200_704, 235_200).size_of(height, width)
    assert found == shown and abs(np.log((found[1] / found[0]) / (width / height))) < 0.1
