# SPDX-License-Identifier: Apache-2.0
"""The scripted expert: solves LIBERO tasks from privileged state, for demonstrations and as a reference policy.

Works from the task's goal predicates: opens what must be open, turns knobs, moves objects, closes. Grasps are planned
from collision shapes, so there is no table of objects. Its actions are ordinary environment actions at 20 Hz, and it
looks at the scene before each of them, so it recovers from noise on its actions.
"""

from worldenv_jax.envs.libero.articulated import ArticulatedSkills
from worldenv_jax.envs.libero.grasp_planning import UP
from worldenv_jax.envs.libero.motion import OPEN, Hand, Motion, SkillFailed
from worldenv_jax.envs.libero.scene import Scene
from worldenv_jax.envs.libero.skills import ObjectSkills

_ORDER = {"open": 0, "turnon": 1, "in": 2, "on": 2, "close": 3}
_ROUNDS = 4  # passes over goals that do not hold (yet, or any more)


class Expert:
    """Plans for one episode of one environment (`libero`'s, after its start)."""

    def __init__(self, env):
        self.scene = Scene(env)
        self.hand = Hand(self.scene)
        self.objects = ObjectSkills(self.scene, self.hand)
        self.articulated = ArticulatedSkills(self.scene, self.hand)

    def actions(self) -> Motion:
        """Environment actions [7], one per control step, until all goals hold or the expert gives up."""
        pairs = list(self.objects.slots)
        goals = sorted(self.scene.goals(), key=lambda goal: pairs.index(goal[1]) if goal[1] in pairs else -1)
        goals.sort(key=lambda goal: _ORDER.get(goal[0], 2))
        for _ in range(_ROUNDS):
            for goal in goals:
                if self.scene.holds(goal):
                    continue
                try:
                    yield from self._skill(goal)
                except SkillFailed:
                    yield from self.hand.wait(3, OPEN)
                    yield from self.hand.back_off(0.1 * UP)
            yield from self.hand.wait(15)

    def _skill(self, goal: tuple[str, ...]) -> Motion:
        relation, name, *receptacle = goal
        if relation == "open":
            return self.articulated.open_drawer(name)
        if relation == "turnon":
            return self.articulated.turn_knob(goal)
        if relation == "close":
            slides = self.scene.joint(name).slides
            return self.articulated.close_drawer(goal) if slides else self.articulated.close_door(goal)
        if relation == "on" and name.startswith("plate"):
            return self.objects.push(goal)
        if relation == "in" and "microwave" in receptacle[0]:
            return self.articulated.insert_mug(goal)
        return self._pick_and_place(goal)

    def _pick_and_place(self, goal: tuple[str, ...]) -> Motion:
        receptacle = goal[2]
        if goal[0] == "in" and "cabinet" in receptacle and self.articulated.is_shut(receptacle):
            yield from self.articulated.open_drawer(receptacle)
        yield from self.objects.pick_and_place(goal)
