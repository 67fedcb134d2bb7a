# SPDX-License-Identifier: Apache-2.0
"""How an `Episode` is laid out as RLDS steps: the only place that knows the feature names.

The keys that `modified_libero_rlds` has (moojink/rlds_dataset_builder) keep their names and meaning, so its readers
read our files. Ours adds success and cameras per step and who acted per episode, and follows RLDS in that the last
step holds the last frame and an action that is not part of the episode (zero deltas, the gripper held). The original
has no frame after the last action; there the last frame is repeated and success is taken from the reward.
"""

import io
import itertools
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from worldenv_jax.data.episodes import Episode, EpisodeSummary
from worldenv_jax.data.errors import DataError
from worldenv_jax.data.example_proto import Feature
from worldenv_jax.data.image_codec import EncodedFrames, decode_image, encode_image, has_encoding
from worldenv_jax.types import ACTION_DIM, PROPRIO_DIM

MAPPING_FILE = "mapping.json"
_UNKNOWN = -1  # task and seed of episodes that do not say
_FOREIGN_ACTOR = "human"


def view_key(view: int) -> str:
    """The step feature of a camera: image, wrist_image, image_2, image_3, ..."""
    return ("observation/image", "observation/wrist_image")[view] if view < 2 else f"observation/image_{view}"


def photograph_key(view: int) -> str:
    """The feature of an episode's metadata that holds a camera's photograph."""
    return f"photograph_{view}"


@dataclass(frozen=True)
class StepKeys:
    """Where the parts of an episode are found among the features of a step."""

    images: tuple[str, ...] = (view_key(0), view_key(1))
    proprio: tuple[str, ...] = ("observation/state",)  # concatenated to 8 numbers
    action: str = "action"
    instruction: str = "language_instruction"
    reward: str = "reward"

    def check(self, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
        """Compares the keys with the features of a dataset.

        Raises:
            DataError: a key is missing or has another size; says how to write a mapping file.
        """
        problems = [f"no feature {key!r}" for key in self._all() if f"steps/{key}" not in shapes]
        if not problems:
            sizes = {"action": ([self.action], ACTION_DIM), "proprio": (self.proprio, PROPRIO_DIM)}
            for name, (keys, expected) in sizes.items():
                got = sum(int(np.prod(shapes[f"steps/{key}"])) for key in keys)
                if got != expected:
                    problems.append(f"{name} {list(keys)} has {got} numbers, expected {expected}")
        if problems:
            found = sorted(key.removeprefix("steps/") for key in shapes if key.startswith("steps/"))
            example = json.dumps(asdict(self))
            raise DataError(
                folder,
                f"{'; '.join(problems)}. The steps have {found}. Describe them in {folder / MAPPING_FILE}, "
                f"for example: {example}",
            )

    def _all(self) -> list[str]:
        return [*self.images, *self.proprio, self.action, self.instruction, self.reward]


def find_keys(shapes: Mapping[str, tuple[int, ...]], folder: Path) -> StepKeys:
    """The keys of a dataset: those of its mapping file where it has one, else the usual names.

    Args:
        shapes: shape of every feature, by "steps/..." key.
        folder: where features.json lies, and mapping.json where the names differ.

    Raises:
        DataError: the mapping file is not one, or the features do not have the keys.
    """
    mapping = folder / MAPPING_FILE
    if mapping.exists():
        keys = _read_mapping(mapping)
    else:
        present = itertools.takewhile(lambda key: f"steps/{key}" in shapes, map(view_key, itertools.count()))
        keys = StepKeys(images=tuple(present) or (view_key(0),))
    keys.check(shapes, folder)
    return keys


def _read_mapping(path: Path) -> StepKeys:
    names = [field.name for field in fields(StepKeys)]
    try:
        content = json.loads(path.read_text())
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        return StepKeys(**values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(path, f"not a mapping file ({error}); it is a JSON object with keys {names}") from error


def episode_features(
    num_views: int, image_size: tuple[int, int], encoding: str, photograph_size: Sequence[int] | None = None
):
    """The `tfds.features.FeaturesDict` of our schema for V views of (H, W) pixels, "png" or "jpeg".

    With photographs where these have a size (H', W').
    """
    from tensorflow_datasets import features  # half a second, needed by writers only

    image = features.Image(shape=(*image_size, 3), encoding_format=encoding)
    observation = {view_key(v).removeprefix("observation/"): image for v in range(num_views)}
    observation["state"] = features.Tensor(shape=(PROPRIO_DIM,), dtype=np.float32)
    steps = {
        "observation": features.FeaturesDict(observation),
        "action": features.Tensor(shape=(ACTION_DIM,), dtype=np.float32),
        "reward": features.Scalar(np.float32),
        "discount": features.Scalar(np.float32),
        "is_first": features.Scalar(np.bool_),
        "is_last": features.Scalar(np.bool_),
        "is_terminal": features.Scalar(np.bool_),
        "success": features.Scalar(np.bool_),
        "camera_intrinsics": features.Tensor(shape=(num_views, 3, 3), dtype=np.float32),
        "camera_pose": features.Tensor(shape=(num_views, 4, 4), dtype=np.float32),
        "language_instruction": features.Text(),
    }
    metadata = {
        "task": features.Scalar(np.int64),
        "seed": features.Scalar(np.int64),
        "sample": features.Scalar(np.int64),
        "starts": features.Text(),
        "actor": features.Text(),
        "noise": features.Scalar(np.float32),
        "environment": features.Tensor(shape=(), dtype=np.object_),  # .npz bytes
    }
    if photograph_size is not None:
        photograph = features.Image(shape=(*photograph_size, 3), encoding_format=encoding)
        metadata |= {photograph_key(view): photograph for view in range(num_views)}
    return features.FeaturesDict(
        {"steps": features.Dataset(steps), "episode_metadata": features.FeaturesDict(metadata)}
    )


def encode_episode(episode: Episode, encoding: str) -> dict[str, list[bytes] | np.ndarray]:
    """The features of an episode in our schema, step features with a leading axis of T + 1.

    Images that are already encoded that way are copied, not encoded again.
    """
    T = episode.num_steps
    is_last = np.arange(T + 1) == T
    held = np.zeros((1, ACTION_DIM), np.float32)
    held[:, 6] = episode.actions[-1:, 6].sum()  # 0 of an episode without actions
    steps = {
        **{view_key(v): frames for v, frames in enumerate(_encoded_views(episode.images, encoding))},
        "observation/state": episode.proprio,
        "action": np.concatenate([episode.actions, held]),
        "reward": np.append(episode.success[1:], False).astype(np.float32),
        "discount": np.ones(T + 1, np.float32),
        "is_first": np.arange(T + 1) == 0,
        "is_last": is_last,
        "is_terminal": is_last & episode.success,
        "success": episode.success,
        "camera_intrinsics": episode.intrinsics,
        "camera_pose": episode.camera_pose,
        "language_instruction": [episode.instruction.encode()] * (T + 1),
    }
    metadata = {
        "task": np.array([episode.task], np.int64),
        "seed": np.array([episode.seed], np.int64),
        "sample": np.array([episode.sample], np.int64),
        "starts": [episode.starts.encode()],
        "actor": [episode.actor.encode()],
        "noise": np.array([episode.noise], np.float32),
        "environment": [_pack_arrays(episode.environment)],
    }
    if episode.photographs is not None:
        metadata |= {photograph_key(v): [encode_image(image, encoding)] for v, image in enumerate(episode.photographs)}
    return {f"steps/{k}": v for k, v in steps.items()} | {f"episode_metadata/{k}": v for k, v in metadata.items()}


def decode_episode(example: Mapping[str, Feature], keys: StepKeys, split: str, path: Path) -> Episode:
    """An episode from the features of one Example, ours or those of `modified_libero_rlds`.

    Args:
        example: see `parse_example`.
        keys: where to look.
        split: name of the TFDS split it was found in.
        path: named in errors raised when its images are decoded.

    Raises:
        KeyError, ValueError: a feature is missing or its size does not fit.
    """
    ours = "steps/success" in example
    views = [_byte_strings(example[f"steps/{key}"]) for key in keys.images]
    actions = example[f"steps/{keys.action}"].reshape(-1, ACTION_DIM)
    steps = len(actions)
    proprio = np.concatenate([example[f"steps/{k}"].reshape(steps, -1) for k in keys.proprio], axis=1)
    if any(len(view) != steps for view in views):
        raise ValueError(f"{[len(view) for view in views]} frames in the views, {steps} actions")
    columns = {"instruction": _text(example[f"steps/{keys.instruction}"]), "split": split}
    if ours:
        return Episode(
            images=EncodedFrames(views, path),
            proprio=proprio,
            actions=actions[:-1],
            success=example["steps/success"].astype(bool),
            intrinsics=example["steps/camera_intrinsics"].reshape(steps, -1, 3, 3),
            camera_pose=example["steps/camera_pose"].reshape(steps, -1, 4, 4),
            **columns,
            **_decode_metadata(example),
        )
    return Episode(
        images=EncodedFrames([[*view, view[-1]] for view in views], path),
        proprio=np.concatenate([proprio, proprio[-1:]]),
        actions=actions,
        success=np.append(False, example[f"steps/{keys.reward}"] > 0),
        intrinsics=np.zeros((steps + 1, len(views), 3, 3), np.float32),
        camera_pose=np.zeros((steps + 1, len(views), 4, 4), np.float32),
        **columns,
        task=_UNKNOWN,
        seed=_UNKNOWN,
        starts="official",
        actor=_FOREIGN_ACTOR,
    )


def summary_keys(keys: StepKeys) -> frozenset[str]:
    """The features that `decode_summary` reads."""
    steps = (keys.action, keys.instruction, keys.reward, "success")
    return frozenset([f"steps/{key}" for key in steps] + ["episode_metadata/task", "episode_metadata/actor"])


def decode_summary(example: Mapping[str, Feature], keys: StepKeys, split: str) -> EpisodeSummary:
    """What `decode_episode` would say about an episode, from the features `summary_keys` alone.

    Raises:
        KeyError, IndexError, ValueError: a feature is missing.
    """
    ours = "steps/success" in example
    reached = example["steps/success"] if ours else example[f"steps/{keys.reward}"] > 0
    return EpisodeSummary(
        num_steps=example[f"steps/{keys.action}"].size // ACTION_DIM - ours,
        succeeded=bool(reached.any()),
        instruction=_text(example[f"steps/{keys.instruction}"]),
        task=int(example["episode_metadata/task"][0]) if ours else _UNKNOWN,
        split=split,
        actor=_text(example["episode_metadata/actor"]) if ours else _FOREIGN_ACTOR,
    )


def _decode_metadata(example: Mapping[str, Feature]) -> dict:
    values = {k.split("/")[1]: v for k, v in example.items() if k.startswith("episode_metadata/")}
    return {
        "task": int(values["task"][0]),
        "seed": int(values["seed"][0]),
        "sample": int(values["sample"][0]) if "sample" in values else 0,  # older folders have none
        "starts": _text(values["starts"]),
        "actor": _text(values["actor"]),
        "noise": float(str(values["noise"][0])),  # the shortest decimal: 0.3 comes back as 0.3
        "environment": _unpack_arrays(_byte_strings(values["environment"])[0]),
        "photographs": _decode_photographs(values),
    }


def _decode_photographs(metadata: Mapping[str, Feature]) -> np.ndarray | None:
    keys = itertools.takewhile(lambda key: key in metadata, map(photograph_key, itertools.count()))
    images = [decode_image(_byte_strings(metadata[key])[0]) for key in keys]
    return np.stack(images) if images else None


def _byte_strings(feature: Feature) -> list[memoryview]:
    if not isinstance(feature, list):
        raise ValueError(f"got {len(feature)} numbers, expected byte strings")
    return feature


def _text(feature: Feature) -> str:
    return bytes(_byte_strings(feature)[0]).decode()


def _encoded_views(images: np.ndarray | EncodedFrames, encoding: str) -> list[list[bytes]]:
    if isinstance(images, EncodedFrames) and has_encoding(images.views[0][0], encoding):
        return [[bytes(frame) for frame in view] for view in images.views]
    pixels = np.asarray(images)
    return [[encode_image(frame, encoding) for frame in pixels[:, v]] for v in range(pixels.shape[1])]


def _pack_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def _unpack_arrays(data: memoryview) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        raise ValueError(f"the environment state is damaged: {error}") from error
