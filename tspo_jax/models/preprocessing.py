"""CLIP's, SigLIP's and Qwen-VL's image preprocessing in numpy + Pillow, as in the slow Hugging Face processors.

Images stay uint8 up to the crop, so that they travel to the device as bytes; `normalize` runs on host or device.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


MAX_FRAME_PIXELS = 768 * 28 * 28  # of a video for Qwen2.5-VL, as its own package cuts them down


def check_steps(config: Mapping, steps: Sequence[str]) -> None:
    """Raises ValueError where preprocessor_config.json switches one of `steps` off, or rescales by other than 1/255."""
    for step in steps:
        if not config.get(step, True):
            raise ValueError(f"preprocessor_config.json: {step} is false; only checkpoints that do it are supported")
    if not math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-4):
        raise ValueError(f"preprocessor_config.json: rescale_factor is {config['rescale_factor']}, not 1/255")


def normalize(pixels, mean: Sequence[float], std: Sequence[float]):
    """uint8 [..., 3] (numpy or jax) -> float32 of the same kind."""
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return (pixels.astype(np.float32) * np.float32(1 / 255) - mean) / std


def resize(image: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [height, width, 3]."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), resample))


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

        Raises ValueError when the crop is not the square that the tower takes, or a step is left out.
        """
        check_steps(config, ("do_resize", "do_center_crop", "do_rescale", "do_normalize"))
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
    def owlvit(cls, config: Mapping, image_size: int) -> "ImageProcessor":
        """From OWL-ViT's preprocessor_config.json ({} where a folder has none): squeezed to the square that the tower
        takes, nothing is cut off. Old files give `size` as [height, width].

        Raises ValueError where they ask for another size or a crop, or a step is left out.
        """
        check_steps(config, ("do_resize", "do_rescale", "do_normalize"))
        size = config.get("size", image_size)
        size = [size.get("height"), size.get("width")] if isinstance(size, Mapping) else size
        if (list(size) if isinstance(size, Sequence) else [size, size]) != [image_size, image_size]:
            raise ValueError(
                f"preprocessor_config.json: size {config['size']} is not the {image_size} x {image_size} pixels of "
                "config.json's vision tower"
            )
        if config.get("do_center_crop", False):
            raise ValueError("preprocessor_config.json: do_center_crop is true; OWL-ViT sees whole pictures")
        mean, std = tuple(config.get("image_mean", CLIP_MEAN)), tuple(config.get("image_std", CLIP_STD))
        return cls(image_size, mean, std, False, resample=config.get("resample", Image.Resampling.BICUBIC))

    @classmethod
    def siglip(cls, image_size: int, config: Mapping = MappingProxyType({})) -> "ImageProcessor":
        """From the tower's image size and preprocessor_config.json ({} where a folder has none).

        Raises ValueError when that resizes to another size, or a step is left out.
        """
        check_steps(config, ("do_resize", "do_rescale", "do_normalize"))
        size = config.get("size") or {}
        if {size.get("height", image_size), size.get("width", image_size)} != {image_size}:
            raise ValueError(
                f"preprocessor_config.json: size {dict(size)} is not the {image_size} x {image_size} pixels of "
                "config.json's vision tower"
            )
        mean, std = (tuple(config.get(name, (0.5,) * 3)) for name in ("image_mean", "image_std"))
        return cls(image_size, mean, std, False, resample=config.get("resample", Image.Resampling.BICUBIC))

    def crop(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [S, S, 3]."""
        H, W = image.shape[:2]
        if not self.keep_aspect:
            return resize(image, self.size, self.size, self.resample)
        short = min(H, W)
        image = resize(image, int(self.resize * H / short), int(self.resize * W / short), self.resample)
        top, left = (image.shape[0] - self.size) // 2, (image.shape[1] - self.size) // 2
        return image[top : top + self.size, left : left + self.size]

    def for_frames(self, num_frames: int) -> "ImageProcessor":
        """The processor of a video with so many frames: the same for all."""
        return self

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of every frame."""
        return self.size, self.size

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """The size that a frame of height x width is shown in."""
        return self.frame_size

    def normalize(self, pixels):
        """uint8 [..., S, S, 3] (numpy or jax) -> float32 of the same kind."""
        return normalize(pixels, self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class QwenProcessor:
    """Resizing for Qwen2.5-VL: every frame near its own size, or all to one.

    Attributes:
      unit: both sides are multiples of it.
      min_pixels, max_pixels: limits of a frame's area.
      frame_size: (height, width) of all frames; () = by `smart_resize`.
    """

    unit: int
    min_pixels: int = 56 * 56
    max_pixels: int = MAX_FRAME_PIXELS
    frame_size: tuple[int, ...] = ()
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resample: int = Image.Resampling.BICUBIC

    @classmethod
    def from_hf(cls, config: Mapping, unit: int, frame_size: Sequence[int] = ()) -> "QwenProcessor":
        """From preprocessor_config.json ({} where a folder has none), with `min_pixels` or `size.shortest_edge`.

        Raises ValueError for a `frame_size` whose sides are no multiples of `unit`, or a step that is left out.
        """
        check_steps(config, ("do_resize", "do_rescale", "do_normalize"))
        check_frame_size(frame_size, unit)
        size = config.get("size") or {}
        least = config.get("min_pixels") or size.get("shortest_edge") or cls.min_pixels
        most = min(config.get("max_pixels") or size.get("longest_edge") or cls.max_pixels, cls.max_pixels)
        return cls(
            unit,
            least,
            max(least, most),
            tuple(frame_size),
            tuple(config.get("image_mean", CLIP_MEAN)),
            tuple(config.get("image_std", CLIP_STD)),
            config.get("resample", cls.resample),
        )

    def for_frames(self, num_frames: int) -> "QwenProcessor":
        """The processor of a video with so many frames: the same for all."""
        return self

    def keeping_aspect(self, least: int, most: int) -> "QwenProcessor":
        """Every frame near its own aspect ratio, with so many pixels."""
        return dataclasses.replace(self, frame_size=(), min_pixels=least, max_pixels=most)

    def crop(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [h, w, 3], nothing is cut off."""
        return resize(image, *self.size_of(*image.shape[:2]), self.resample)

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """The size that a frame of height x width is shown in."""
        return self.frame_size or smart_resize(height, width, self.unit, self.min_pixels, self.max_pixels)

    def normalize(self, pixels):
        """uint8 [..., H, W, 3] (numpy or jax) -> float32 of the same kind."""
        return normalize(pixels, self.mean, self.std)


def check_frame_size(frame_size: Sequence[int], unit: int) -> None:
    """Raises ValueError for a size of all frames whose sides are no multiples of `unit`; () is none."""
    if frame_size and (len(frame_size) != 2 or any(side < 1 or side % unit for side in frame_size)):
        raise ValueError(f"frame_size is {tuple(frame_size)}, not height and width, both multiples of {unit}")


@dataclasses.dataclass(frozen=True)
class Qwen3Processor:
    """Resizing for Qwen3-VL: the frames of a video share its pixels, or are all of one size.

    Attributes:
      unit: both sides are multiples of it.
      frames_per_grid: frames that are encoded together.
      min_pixels, max_pixels: limits of all frames of a video together.
      max_frame_pixels: limit of a frame's area; None = none.
      num_frames: of the video.
      frame_size: (height, width) of all frames; () = by `video_resize`.
    """

    unit: int
    frames_per_grid: int = 2
    min_pixels: int = 128 * 32 * 32
    max_pixels: int = 768 * 32 * 32
    max_frame_pixels: int | None = None
    num_frames: int = 2
    frame_size: tuple[int, ...] = ()
    mean: tuple[float, ...] = (0.5,) * 3
    std: tuple[float, ...] = (0.5,) * 3
    resample: int = Image.Resampling.BICUBIC

    @classmethod
    def from_hf(
        cls, config: Mapping, patch_size: int, merge_size: int, frames_per_grid: int, frame_size: Sequence[int] = ()
    ) -> "Qwen3Processor":
        """From video_preprocessor_config.json ({} where a folder has none), for a tower of the given sizes.

        Raises ValueError for a processor of another tower, a step that is left out, or a `frame_size` whose sides are
        no multiples of a visual token's.
        """
        check_steps(config, ("do_resize", "do_rescale", "do_normalize"))
        tower = {"patch_size": patch_size, "merge_size": merge_size, "temporal_patch_size": frames_per_grid}
        for name, expected in tower.items():
            if config.get(name, expected) != expected:
                raise ValueError(
                    f"preprocessor_config.json: {name} is {config[name]}, but config.json's tower has {expected}"
                )
        unit = patch_size * merge_size
        check_frame_size(frame_size, unit)
        size = config.get("size") or {}
        capped = config.get("cap_pixels_per_frame")
        return cls(
            unit,
            frames_per_grid,
            size.get("shortest_edge") or cls.min_pixels,
            size.get("longest_edge") or cls.max_pixels,
            (config.get("max_video_tokens") or 768) * unit * unit if capped else None,
            frames_per_grid,
            tuple(frame_size),
            tuple(config.get("image_mean", cls.mean)),
            tuple(config.get("image_std", cls.std)),
            config.get("resample", cls.resample),
        )

    def for_frames(self, num_frames: int) -> "Qwen3Processor":
        """The processor of a video with so many frames: the more, the smaller each may be."""
        return dataclasses.replace(self, num_frames=num_frames)

    def keeping_aspect(self, least: int, most: int) -> "Qwen3Processor":
        """Every frame near its own aspect ratio, with at most so many pixels; the least is that of all frames."""
        return dataclasses.replace(self, frame_size=(), max_frame_pixels=most)

    def crop(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [h, w, 3], nothing is cut off."""
        return resize(image, *self.size_of(*image.shape[:2]), self.resample)

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """The size that a frame of height x width is shown in."""
        if self.frame_size:
            return self.frame_size
        n = max(self.num_frames, self.frames_per_grid)  # one frame is shown as a pair of it
        most = self.max_pixels
        if self.max_frame_pixels is not None:
            most = n * max(min(self.max_frame_pixels, most // n), int(1.05 * self.min_pixels))
        return video_resize(n, height, width, self.unit, self.frames_per_grid, self.min_pixels, most)

    def normalize(self, pixels):
        """uint8 [..., H, W, 3] (numpy or jax) -> float32 of the same kind."""
        return normalize(pixels, self.mean, self.std)


def video_resize(
    num_frames: int, height: int, width: int, unit: int, frames_per_grid: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size that Qwen3-VL shows the frames of height x width of a video in: multiples of `unit`, about the same
    aspect ratio, and together between the limits where that is possible.

    Raises ValueError for frames more than 200 times as long as wide.
    """
    if min(height, width) < unit:
        scale = max(unit / height, unit / width)
        height, width = int(height * scale), int(width * scale)
    check_aspect(height, width)
    sides = [round(side / unit) * unit for side in (height, width)]
    area = round(num_frames / frames_per_grid) * frames_per_grid * math.prod(sides)
    if area > max_pixels:
        scale = math.sqrt(num_frames * height * width / max_pixels)
        sides = [max(unit, math.floor(side / scale / unit) * unit) for side in (height, width)]
    elif area < min_pixels:
        scale = math.sqrt(min_pixels / (num_frames * height * width))
        sides = [math.ceil(side * scale / unit) * unit for side in (height, width)]
    return sides[0], sides[1]


def check_aspect(height: int, width: int) -> None:
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a frame of {height} x {width} pixels: its sides may differ by a factor of 200 at most")


def smart_resize(height: int, width: int, unit: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size that Qwen2.5-VL shows a frame of height x width in: multiples of `unit`, about the same aspect ratio,
    an area between the limits where that is possible.

    Raises ValueError for a frame more than 200 times as long as wide.
    """
    check_aspect(height, width)
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
