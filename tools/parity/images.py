# SPDX-License-Identifier: Apache-2.0
"""OpenVLA-OFT's image path against TensorFlow: JPEG, Lanczos-3, centre crop, normalisation, augmentation."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tools.parity import Result, compare, load_npz, unknown
from worldenv_jax.data import image_transforms as transforms
from worldenv_jax.data.image_codec import decode_image, encode_image
from worldenv_jax.policy.config import DINO_MEAN, DINO_STD, HALF

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FLOAT = 2e-5
MAX_DIFFERENT_VALUES = 20


def check(fixture: Path) -> Iterator[Result]:
    """Yields one result per array of the folder."""
    for path in sorted(fixture.glob("*.npz")):
        checks = {"libero_frame": _frames, "processor": _processor, "augment": _augmentation}
        if path.stem in checks:
            yield from checks[path.stem](load_npz(path), fixture)
        else:
            yield unknown(path.name)


def _frames(arrays: dict[str, np.ndarray], _: Path) -> Iterator[Result]:
    """Every camera's chain; each step starts from the reference's result of the step before."""
    for name, reference in arrays.items():
        camera, quantity = name.split("_", 1)
        get = lambda quantity, camera=camera: arrays[f"{camera}_{quantity}"]
        size = reference.shape[0]
        if quantity == "env_frame":
            continue
        elif quantity == "policy_frame":
            yield compare(name, get("env_frame")[::-1, ::-1], reference, 0.0)
        elif quantity == "jpeg_q95":
            ours = np.frombuffer(encode_image(get("policy_frame"), "jpeg"), np.uint8)
            yield compare(name, decode_image(ours.tobytes()), decode_image(reference.tobytes()), 0.0)
        elif quantity == "jpeg_decoded":
            yield compare(name, decode_image(get("jpeg_q95").tobytes()), reference, 0.0)
        elif quantity == "lanczos224_float":
            yield compare(name, transforms.resize_lanczos_float(get("jpeg_decoded"), size), reference, 1e-3)
        elif quantity == "lanczos224":
            yield from _levels(name, transforms.resize_lanczos(get("jpeg_decoded"), size), reference)
        elif quantity == "crop_float":
            ours = transforms.center_crop_float(transforms.to_float(get("lanczos224")))
            yield compare(name, ours, reference, FLOAT)
        elif quantity == "center_crop":
            yield from _levels(name, transforms.center_crop(get("lanczos224")), reference)
        else:
            yield unknown(name)


def _processor(arrays: dict[str, np.ndarray], _: Path) -> Iterator[Result]:
    """DINO channels, then SigLIP channels."""
    constants = {"released": (DINO_MEAN, DINO_STD), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}
    for name, reference in arrays.items():
        kind = name.removeprefix("out_pixel_values_")
        if name == "in_image":
            continue
        elif kind not in constants:
            yield unknown(name)
            continue
        towers = [transforms.normalize(arrays["in_image"], *stats) for stats in (constants[kind], (HALF, HALF))]
        ours = np.concatenate(towers, axis=-1).transpose(2, 0, 1)
        yield compare(name, ours, reference, 1e-6 + _storage_error(reference))


def _augmentation(arrays: dict[str, np.ndarray], fixture: Path) -> Iterator[Result]:
    """All stages from the draw in augment.json."""
    names = {"crop_scale": "crop_area", "crop_offset": "crop_offset", "brightness_delta": "brightness"}
    names |= {"contrast_factor": "contrast", "saturation_factor": "saturation", "hue_delta": "hue"}
    draw = json.loads((fixture / "augment.json").read_text())
    draw = transforms.Augmentation(**{ours: draw[theirs] for theirs, ours in names.items()})
    stages = transforms.augment_stages(transforms.to_float(arrays["in_image"]), draw)
    for name, reference in arrays.items():
        stage = name.removeprefix("stage_")
        if name == "in_image":
            continue
        elif name == "out_uint8":
            yield from _levels(name, transforms.to_uint8(stages["hue"]), reference)
        elif stage in stages:
            yield compare(name, stages[stage], reference, FLOAT + _storage_error(reference))
        else:
            yield unknown(name)


def _levels(name: str, ours: np.ndarray, reference: np.ndarray) -> Iterator[Result]:
    """uint8 images: at most one level apart, in at most 20 values."""
    yield compare(name, ours, reference, 1.0)
    different = np.inf if ours.shape != reference.shape else float((ours != reference).sum())
    yield Result(f"{name}: different values", different, MAX_DIFFERENT_VALUES)


def _storage_error(reference: np.ndarray) -> float:
    """Half a unit in the last place of a reference that is stored in float16."""
    if reference.dtype != np.float16:
        return 0.0
    return float(np.spacing(np.abs(reference).max())) / 2.0
