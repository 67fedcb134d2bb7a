# SPDX-License-Identifier: Apache-2.0
"""The evaluation protocol: every number that decides a success rate, for both worlds, and how a score is stated.

A score means something only together with its protocol, so `protocol_hash` is printed beside it: two scores with
different hashes must not be compared. The LIBERO numbers are those of OpenVLA-OFT's evaluation (step limits, 10
settling steps, chunks of 8 executed open loop, images turned by 180 degrees, environment seed 0).

Starts come in two kinds and two splits. For LIBERO the 50 published initial states of a task are the ``official``
``test`` starts and are used for nothing else; ``train`` starts are drawn from the task's own placement regions.
``shifted`` starts move target and receptacle and the arm's joints away from a start of the same split. On
libero_object the official starts hardly differ (replaying one demonstration blindly solves 72 % of them), therefore
both kinds are reported side by side.
"""

import dataclasses
import hashlib
import json
import math

from worldenv_jax.types import EpisodeSpec

SPLITS = ("train", "test")
LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
_LIBERO_MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The rules under which a policy is scored in one world.

    Lengths are metres, angles radians, times control steps.
    """

    world: str  # "tabletop" or a LIBERO suite
    max_steps: int  # steps of the policy; an episode without success by then has failed
    control_hz: int
    chunk: int  # actions executed open loop between two looks
    settle_steps: int  # steps of `settle_action` before the policy's first look, not counted in max_steps
    settle_action: tuple[float, ...]
    image_turn: int  # degrees by which the simulator's raw frames are turned before anyone sees them
    image_resize: str  # how frames reach the asked size: "render" = drawn at that size
    success: str  # when an episode counts as solved
    start_kinds: tuple[str, ...]
    official_test_starts: int  # published initial states per task, 0 where there are none
    environment_seed: int  # seeds whatever a published initial state leaves open
    shift_position: float  # half width of the uniform shift of target and receptacle, in x and in y
    shift_joints: float  # standard deviation of the normal shift of the arm's joints

    def to_dict(self) -> dict:
        """All numbers as JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def libero_protocol(suite: str) -> Protocol:
    """The protocol of a LIBERO suite.

    Raises:
      ValueError: unknown suite.
    """
    if suite not in _LIBERO_MAX_STEPS:
        raise ValueError(f"unknown LIBERO suite {suite!r}; expected one of {', '.join(LIBERO_SUITES)}")
    return Protocol(
        world=suite,
        max_steps=_LIBERO_MAX_STEPS[suite],
        control_hz=20,
        chunk=8,
        settle_steps=10,
        settle_action=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0),
        image_turn=180,
        image_resize="render",
        success="task predicate after any step up to max_steps",
        start_kinds=("official", "shifted"),
        official_test_starts=50,
        environment_seed=0,
        shift_position=0.03,
        shift_joints=0.02,
    )


def tabletop_protocol() -> Protocol:
    """The protocol of the embedded tabletop."""
    return Protocol(
        world="tabletop",
        max_steps=48,
        control_hz=20,
        chunk=8,
        settle_steps=0,
        settle_action=(),
        image_turn=0,
        image_resize="render",
        success="task predicate after any step up to max_steps",
        start_kinds=("shifted",),
        official_test_starts=0,
        environment_seed=0,
        shift_position=0.0,
        shift_joints=0.0,
    )


def check_spec(spec: EpisodeSpec, protocol: Protocol, num_tasks: int) -> None:
    """Refuses an episode that the protocol does not define.

    Raises:
      ValueError: every field that is out of range, in one message.
    """
    problems = []
    if not 0 <= spec.task < num_tasks:
        problems.append(f"task: got {spec.task}, expected 0 to {num_tasks - 1}")
    if spec.split not in SPLITS:
        problems.append(f"split: got {spec.split!r}, expected one of {SPLITS}")
    if spec.starts not in protocol.start_kinds:
        problems.append(f"starts: got {spec.starts!r}, expected one of {protocol.start_kinds}")
    if spec.seed < 0:
        problems.append(f"seed: got {spec.seed}, expected a number >= 0")
    if (spec.split, spec.starts) == ("test", "official") and spec.seed >= protocol.official_test_starts:
        problems.append(
            f"seed: got {spec.seed}, but {protocol.world} has {protocol.official_test_starts} official starts"
        )
    if problems:
        raise ValueError(f"{protocol.world} has no such episode {tuple(spec)}: " + "; ".join(problems))


def start_seed(world: str, spec: EpisodeSpec, purpose: str = "") -> int:
    """A 32-bit seed for the random numbers of one start.

    The seeds of the splits are disjoint by construction: the lowest bit is 0 for ``train`` and 1 for ``test``.
    """
    text = json.dumps([world, spec.task, spec.seed, spec.split, spec.starts, purpose])
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    return number & ~1 | SPLITS.index(spec.split)


def protocol_hash(protocol: dict) -> str:
    """First 12 hexadecimal digits of the SHA-256 of the protocol's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(protocol, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a success rate (E. B. Wilson, JASA 22, 1927), 95 % by default.

    Raises:
      ValueError: no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"got {successes} successes in {trials} trials; expected 0 <= successes <= trials, trials >= 1"
        )
    rate = successes / trials
    scale = 1.0 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z * math.sqrt(rate * (1.0 - rate) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)
