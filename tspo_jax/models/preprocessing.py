"""CLIP's and SigLIP's image preprocessing in numpy + Pillow, identical to the slow Hugging Face processors.

Images stay uint8 up to the crop, so that they travel to the device as bytes; `normalize` runs on host or device.
"""

import dataclasses
import math

import numpy as np
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Resize and crop of one checkpoint.

    Attributes:
      size: side S of the square that the tower sees.
      keep_aspect: True resizes the shorter side to `resize` and crops the centre (CLIP); False resizes to S x S
        (SigLIP).
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    keep_aspect: bool
    resize: int = 0
    resample: int = Image.Resampling.BICUBIC

    @classmethod
    def clip(cls, config: dict, image_size: int) -> "ImageProcessor":
        """From preprocessor_config.json ({} where a folder has none) and the tower's image size.

        Raises ValueError when the crop is not the square that the tower takes.
        """
        size, crop = config.get("size", image_size), config.get("crop_size", image_size)
        resize = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
        crop = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
        if crop != (image_size, image_size) or resize < image_size:
            raise ValueError(
                f"preprocessor_config.json: resize {resize} and crop {crop} do not give the "
                f"{image_size} x {image_size} pixels of config.json's vision tower"
            )
        mean = tuple(config.get("image_mean", CLIP_MEAN))
        std = tuple(config.get("image_std", CLIP_STD))
        return cls(image_size, mean, std, True, resize, config.get("resample", Image.Resampling.BICUBIC))

    @classmethod
    def siglip(cls, image_size: int) -> "ImageProcessor":
        return cls(image_size, (0.5,) * 3, (0.5,) * 3, False)

    def crop(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [S, S, 3]."""
        H, W = image.shape[:2]
        if not self.keep_aspect:
            return self._resized(image, self.size, self.size)
        short = min(H, W)
        image = self._resized(image, int(self.resize * H / short), int(self.resize * W / short))
        top, left = (image.shape[0] - self.size) // 2, (image.shape[1] - self.size) // 2
        return image[top : top + self.size, left : left + self.size]

    def normalize(self, pixels):
        """uint8 [..., S, S, 3] (numpy or jax) -> float32 of the same kind."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (pixels.astype(np.float32) * np.float32(1 / 255) - mean) / std

    def _resized(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        if image.shape[:2] == (height, width):
            return image
        return np.asarray(Image.fromarray(image).resize((width, height), self.resample))


def smart_resize(height: int, width: int, unit: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size that Qwen2.5-VL shows a frame of height x width in: multiples of `unit`, about the same aspect ratio,
    an area between the limits where that is possible.

    Raises ValueError for a frame more than 200 times as long as wide.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a frame of {height} x {width} pixels: its sides may differ by a factor of 200 at most")
    sides = [max(unit, round(side / unit) * unit) for side in (height, width)]
    if math.prod(sides) > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        sides = [max(unit, math.floor(side / scale / unit) * unit) for side in (height, width)]
    elif math.prod(sides) < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        sides = [math.ceil(side * scale / unit) * unit for side in (height, width)]
    return sides[0], sides[1]


def patchify(pixels, patch_size: int, temporal_patch_size: int, merge_size: int):
    """Frames [F, H, W, 3] (numpy or jax) as flat patches [F // t, (H // p) * (W // p), 3 * t * p * p].

    p and t are the sizes of a patch; F must be a multiple of t, H and W of p * merge_size. The merge_size x merge_size
    patches that will be one visual token come one after another; such blocks, and the patches in them, row by row. A
    patch's values are in the order channel, time, row, column.
    """
    t, p, m = temporal_patch_size, patch_size, merge_size
    F, H, W, _ = pixels.shape
    blocks = pixels.reshape(F // t, t, H // (p * m), m, p, W // (p * m), m, p, 3)
    return blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(F // t, H * W // p**2, -1)
