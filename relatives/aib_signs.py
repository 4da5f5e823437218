"""Tasks with a held-out mode: DI and Cheetah, each with two signs whose combinations are not all seen in training.

In the benchmark an agent trains in both modes; eval-out has new masses and lengths only. Here each half of the
actuators has a sign of its own, which makes four modes. Training has three of them. eval-out has the fourth, both signs
reversed, and no new mass or length. The tasks are not part of the benchmark. A script trains on them with

    python dmash_sac.py --env-id relatives.aib_signs:DI-Signs
"""

import functools
import itertools

import gymnasium as gym
import numpy as np

import aib_envs
from aib_envs import LENGTH, MASS, Dimension, Task

HELD_OUT = (-1, -1)  # the signs in eval-out
SEEN = ((-1, 1), (1, -1), (1, 1))  # those in train and eval-in
MARGINS = {"train": 0.0, "eval-in": 0.01, "eval-out": 0.02}  # between a set's values and the training range's ends


def signs(*parts):
    """A dimension for each of two parts of the actuators: 1, or -1 where that part is reversed."""
    return tuple(Dimension(f"inversion_{part}", 1, values=(-1, 1)) for part in parts)


def contexts(continuous, parts, split):
    """The 20 contexts (list of dicts) of `split`: evenly spaced rows of a grid, as in `aib_envs.context_set`.

    The grid has 50 values of the continuous dimension, evenly spaced in the training range, times the modes of the set.
    The ends of the range are left out by no, 1 % or 2 % of it (train, eval-in, eval-out), so that no value is in two
    sets. Train and eval-in have the benchmark's values.
    """
    low, high = continuous.inner
    margin = MARGINS[split] * (high - low)
    values = np.round(np.linspace(low + margin, high - margin, 50), 4).tolist()
    modes = [HELD_OUT] if split == "eval-out" else SEEN
    grid = list(itertools.product(values, modes))
    rows = [grid[i] for i in np.linspace(0, len(grid) - 1, 20).astype(int)]
    first, second = (part.key for part in parts)
    return [{continuous.key: value, first: mode[0], second: mode[1]} for value, mode in rows]


class Signs:
    """Multiplies the first half of the action components with the first sign, the second half with the second."""

    def _step(self, action):
        values = [value for key, value in self.context.items() if key.startswith("inversion_")]
        return super()._step(action * np.repeat(values, len(action) // 2))


class SignsIntegrator(Signs, aib_envs.DoubleIntegrator):
    """DI whose two forces can be reversed one by one: `context["inversion_x"]` and `context["inversion_y"]`."""


class SignsSuite(Signs, aib_envs.SuiteEnv):
    """Cheetah whose legs can be reversed one by one: `context["inversion_back_leg"]`, `context["inversion_front_leg"]`.
    Each leg has three motors."""


FORCES = signs("x", "y")
LEGS = signs("back_leg", "front_leg")
FORCE_SETS = functools.partial(contexts, MASS, FORCES)
LEG_SETS = functools.partial(contexts, LENGTH, LEGS)

TASKS = {
    "DI-Signs": Task("SignsIntegrator", 4, 2, 100, 24, (MASS, *FORCES), False, 100_000, (0, 100), FORCE_SETS),
    "Cheetah-Legs": Task(
        "SignsSuite cheetah run", 17, 6, 1000, 128, (LENGTH, *LEGS), False, 200_000, (0, 1000), LEG_SETS
    ),
}

aib_envs.TASKS |= TASKS
for _id, _task in TASKS.items():
    _entry = f"{__name__}:{_task.physics.split()[0]}"
    gym.register(f"AIB/{_id}-v0", _entry, kwargs={"env_id": _id}, max_episode_steps=_task.steps)
