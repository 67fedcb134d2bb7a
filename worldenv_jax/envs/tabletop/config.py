# SPDX-License-Identifier: Apache-2.0
"""What is on the table and every number that decides how hard the tabletop is.

Coordinates: metres, z up, the table's surface at z = 0, the robot stands at negative x and the camera at positive x.
Scales follow LIBERO's Panda: an 8 cm wide gripper, 20 commands per second, objects of 4 to 5 cm.
"""

from dataclasses import dataclass

BOX, CYLINDER, SPHERE = "box", "cylinder", "sphere"


@dataclass(frozen=True)
class Object:
    """One movable object; contacts treat every object as an upright disc of this radius."""

    name: str
    shape: str
    radius: float  # m; half the side of a box
    half_height: float  # m
    color: tuple[float, float, float]  # linear RGB in [0, 1]
    home: tuple[float, float]  # m, nominal x, y


@dataclass(frozen=True)
class Receptacle:
    """One fixed place to put an object: a flat disc, or a square tray with a rim."""

    name: str
    preposition: str
    shape: str
    radius: float  # m; half the outer side of a tray
    floor: float  # m, height on which an object rests
    rim: float  # m, height of the wall seen from outside
    wall: float  # m, thickness of the wall; 0 where there is none
    color: tuple[float, float, float]
    home: tuple[float, float]


OBJECTS = (
    Object("red box", BOX, 0.022, 0.022, (0.86, 0.10, 0.10), (0.09, -0.105)),
    Object("green box", BOX, 0.022, 0.022, (0.10, 0.62, 0.16), (0.015, 0.06)),
    Object("blue cylinder", CYLINDER, 0.022, 0.026, (0.10, 0.28, 0.90), (0.015, -0.06)),
    Object("yellow ball", SPHERE, 0.024, 0.024, (0.98, 0.84, 0.08), (0.09, 0.0)),
    Object("purple cylinder", CYLINDER, 0.022, 0.022, (0.62, 0.16, 0.72), (0.09, 0.105)),
)

RECEPTACLES = (
    Receptacle("white plate", "on", CYLINDER, 0.05, 0.008, 0.008, 0.0, (0.97, 0.97, 0.97), (-0.09, -0.07)),
    Receptacle("brown tray", "in", BOX, 0.05, 0.006, 0.020, 0.005, (0.52, 0.31, 0.14), (-0.09, 0.07)),
)

INSTRUCTIONS = tuple(
    f"put the {thing.name} {place.preposition} the {place.name}" for thing in OBJECTS for place in RECEPTACLES
)


@dataclass(frozen=True)
class TabletopConfig:
    """Numbers of the world. Hashable, so a static argument under `jax.jit`.

    How far a hand may miss an object sideways and still grasp it is not a number of its own: the object must fit
    between the open fingers, `finger_travel - radius` = 1.6 to 1.8 cm.
    """

    image_size: int = 64  # pixels, square
    max_steps: int = 24  # commands per episode
    aftermath_steps: int = 4  # frames that an expert episode keeps after its first success
    control_hz: float = 20.0
    substeps: int = 4  # contact resolutions per command

    position_gain: float = 0.03  # m per command of 1
    rotation_gain: float = 0.3  # rad per command of 1
    finger_speed: float = 0.015  # m per command, each finger
    finger_travel: float = 0.04  # m, position of an open finger
    hand_low: tuple[float, float, float] = (-0.16, -0.16, 0.02)
    hand_high: tuple[float, float, float] = (0.16, 0.16, 0.22)
    tilt_limit: float = 0.35  # rad between the hand and straight down

    grasp_along: float = 0.022  # m, largest miss along the finger pads that friction still holds
    grasp_height: float = 0.02  # m, largest difference of height between hand and object
    push_limit: float = 0.012  # m per substep that a contact can move an object
    table_limit: float = 0.17  # m, objects stay on the table

    object_jitter: float = 0.02  # m, uniform on each axis
    receptacle_jitter: float = 0.015  # m
    box_yaw_jitter: float = 0.2  # rad
    hand_home: tuple[float, float, float] = (-0.03, 0.0, 0.15)
    hand_jitter: tuple[float, float, float] = (0.02, 0.02, 0.01)
    hand_yaw_jitter: float = 0.15  # rad
