"""Tasks with a desired speed: dm_control's Cheetah, Walker and Finger, whose reward depends on the context, too.

The desired speed is the reward parameter of HyperZero (arXiv 2211.15457), alone or together with the length of the
limbs. The tasks are not part of the benchmark. No method can infer from its transitions what a reward asks for, so they
are for methods that are told, as hyperzero.py is:

    python relatives/hyperzero.py --env-id relatives.aib_speed:Cheetah-Speed
"""

import gymnasium as gym
from dm_control.utils.rewards import tolerance

import aib_envs
from aib_envs import LENGTH, Dimension, Task

RUN = Dimension("speed", 2.0, (-5.0, 5.0), (-10.0, 10.0), limits=(-100, 100))  # m/s, negative: backwards
WALK = Dimension("speed", 1.0, (-2.0, 2.0), (-4.0, 4.0), limits=(-100, 100))
SPIN = Dimension("speed", -15.0, (-15.0, 15.0), (-30.0, 30.0), limits=(-1000, 1000))  # rad/s, the suite's: negative
FINGER = Dimension("length", 1.0, (0.8, 1.2), (0.6, 1.4), limits=(0.2, 2))  # factor; below 0.6 it reaches nothing
LEG = 0.95  # m, from Walker's hip to its ankle
LIMB = 0.16  # m, from Finger's outer joint to the middle of its tip

TASKS = {
    "Cheetah-Speed": Task("SpeedEnv cheetah run", 17, 6, 1000, 128, (RUN,), False, 200_000, (0, 1000)),
    "Cheetah-Speed-Length": Task("SpeedEnv cheetah run", 17, 6, 1000, 128, (RUN, LENGTH), False, 200_000, (0, 1000)),
    "Walker-Speed": Task("SpeedEnv walker stand", 24, 6, 1000, 128, (WALK,), False, 200_000, (0, 1000)),
    "Walker-Speed-Length": Task("SpeedEnv walker stand", 24, 6, 1000, 128, (WALK, LENGTH), False, 200_000, (0, 1000)),
    "Finger-Speed": Task("SpeedEnv finger spin", 9, 2, 1000, 128, (SPIN,), False, 200_000, (0, 1000)),
    "Finger-Speed-Length": Task("SpeedEnv finger spin", 9, 2, 1000, 128, (SPIN, FINGER), False, 200_000, (0, 1000)),
}


class SpeedEnv(aib_envs.SuiteEnv):
    """A suite task with the desired speed `context["speed"]`. The reward is 1 at that speed and falls linearly to 0 at
    a distance of |speed|, at least 1; in Walker's walking reward, the part for the speed does. Walker is also to hold
    its torso above 1.2 m, as in the suite, which it cannot where its legs are much shorter. Finger's speed is that of
    the body that it spins; its length is that of its outer limb."""

    def _build(self, domain, task):
        super()._build(domain, task)
        if domain == "walker":  # its feet begin on the floor
            self.model.body("torso").pos[2] += LEG * (self.context.get("length", 1.0) - 1)
        rewards = {"cheetah": self._run, "walker": self._walk, "finger": self._spin}
        self._standing = self._suite.task.get_reward
        self._suite.task.get_reward = rewards[domain]

    def _edit(self, spec, domain):
        if domain == "finger":
            if "length" in self.context:
                _move_fingertip(spec, LIMB * (1 - self.context["length"]))
        else:
            super()._edit(spec, domain)

    def _closeness(self, speed, margins, value_at_margin):
        """1 at the desired speed, `value_at_margin` at a distance of so many `margins`."""
        desired = self.context["speed"]
        margin = margins * max(abs(desired), 1.0)
        return tolerance(speed, (desired, desired), margin, "linear", value_at_margin)

    def _run(self, physics):
        return self._closeness(physics.speed(), margins=1, value_at_margin=0)

    def _walk(self, physics):
        move = self._closeness(physics.horizontal_velocity(), margins=0.5, value_at_margin=0.5)
        return self._standing(physics) * (5 * move + 1) / 6

    def _spin(self, physics):
        return self._closeness(physics.hinge_velocity(), margins=1, value_at_margin=0)


def _move_fingertip(spec, up):
    """Shortens Finger's outer limb by `up` in a mujoco.MjSpec; the tip keeps its size, and its sensors stay on it."""
    spec.geom("distal").fromto[5] += up
    spec.geom("fingertip").fromto[2] += up
    spec.geom("fingertip").fromto[5] += up
    for site in ("touchtop", "touchbottom"):
        spec.site(site).pos[2] += up


aib_envs.TASKS |= TASKS
for _id, _task in TASKS.items():
    gym.register(f"AIB/{_id}-v0", f"{__name__}:SpeedEnv", kwargs={"env_id": _id}, max_episode_steps=_task.steps)
