"""Tasks with a desired speed: dm_control's Cheetah and Walker, whose reward depends on the context, too.

The desired speed is the reward parameter of HyperZero (arXiv 2211.15457), alone or together with the length of the
limbs. The tasks are not part of the benchmark. No method can infer from its transitions what a reward asks for, so they
are for methods that are told, as hyperzero.py is, which imports this module: that adds them to `aib_envs.TASKS` and
registers them with gymnasium.
"""

import gymnasium as gym
from dm_control.utils.rewards import tolerance

import aib_envs
from aib_envs import LENGTH, Dimension, Task

RUN = Dimension("speed", 2.0, (-5.0, 5.0), (-10.0, 10.0), limits=(-100, 100))  # m/s, negative: backwards
WALK = Dimension("speed", 1.0, (-2.0, 2.0), (-4.0, 4.0), limits=(-100, 100))
LEG = 0.95  # m, from Walker's hip to its ankle

TASKS = {
    "Cheetah-Speed": Task("SpeedEnv cheetah run", 17, 6, 1000, 128, (RUN,), False, 200_000, (0, 1000)),
    "Cheetah-Speed-Length": Task("SpeedEnv cheetah run", 17, 6, 1000, 128, (RUN, LENGTH), False, 200_000, (0, 1000)),
    "Walker-Speed": Task("SpeedEnv walker stand", 24, 6, 1000, 128, (WALK,), False, 200_000, (0, 1000)),
    "Walker-Speed-Length": Task("SpeedEnv walker stand", 24, 6, 1000, 128, (WALK, LENGTH), False, 200_000, (0, 1000)),
}


class SpeedEnv(aib_envs.SuiteEnv):
    """A suite task with the desired speed `context["speed"]`. Cheetah's reward is 1 at that speed and falls linearly to
    0 at a distance of |speed|, at least 1 m/s; in Walker's walking reward, the part for the speed does. Walker is also
    to hold its torso above 1.2 m, as in the suite, which it cannot where its legs are much shorter."""

    def _build(self, domain, task):
        super()._build(domain, task)
        if domain == "walker":  # its feet begin on the floor
            self.model.body("torso").pos[2] += LEG * (self.context.get("length", 1.0) - 1)
        suite, speed = self._suite.task, self.context["speed"]
        margin, standing = max(abs(speed), 1.0), suite.get_reward

        def run(physics):
            return tolerance(physics.speed(), (speed, speed), margin, "linear", value_at_margin=0)

        def walk(physics):
            move = tolerance(physics.horizontal_velocity(), (speed, speed), margin / 2, "linear", value_at_margin=0.5)
            return standing(physics) * (5 * move + 1) / 6

        suite.get_reward = {"cheetah": run, "walker": walk}[domain]


aib_envs.TASKS |= TASKS
for _id, _task in TASKS.items():
    gym.register(f"AIB/{_id}-v0", "aib_speed:SpeedEnv", kwargs={"env_id": _id}, max_episode_steps=_task.steps)
