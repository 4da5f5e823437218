"""Actuator Inversion Benchmark (AIB): tasks, context sets, environments and evaluation protocol.

Thirteen control tasks, and ODE-k for k from 1 to 20, from "Dynamics-Aligned Shared Hypernetworks"
(arXiv 2602.06550), registered with gymnasium as AIB/Cheetah-v0 etc. A task's reward is fixed. Its
dynamics depend on a context (pole length, reversed actuators) that is constant within an episode
and that the agent is not told. It trains on 20 contexts and is evaluated with frozen weights on
three sets of 20: `train`, `eval-in` (interpolation) and `eval-out` (extrapolation).
"""

import atexit
import contextlib
import copy
import ctypes.util
import difflib
import functools
import importlib
import itertools
import logging
import math
import numbers
import os
import re
import signal
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import absl.logging
import gymnasium as gym
import numpy as np

logger = logging.getLogger("aib_envs")

# Keep off the terminal what others say about an attribute of cheetah.xml, about a missing display,
# and about divergence: we say it ourselves.
NOISE = ".*('settotalmass' is deprecated|Nan, Inf or huge value|Failed to load Xlib)"
warnings.filterwarnings("ignore", NOISE)
absl.logging.get_absl_logger().addFilter(lambda record: not re.match(NOISE, record.getMessage()))

# The benchmark as data --------------------------------------------------------------------------


@dataclass(frozen=True)
class Dimension:
    """One dimension of a context: an `inner` range for training and an `outer` one for
    extrapolation, or two `values`. Outside `limits` a value makes no physical sense. Raises
    ValueError if it is neither continuous nor binary."""

    key: str
    default: float
    inner: tuple[float, float] | None = None
    outer: tuple[float, float] | None = None
    values: tuple[int, int] | None = None
    limits: tuple[float, float] = (-1e3, 1e3)

    def __post_init__(self):
        if self.values is None:
            ranges = [*(self.inner or ()), *(self.outer or ())]
            fine = len(ranges) == 4 and ranges[2] < ranges[0] < ranges[1] < ranges[3]
        else:
            fine = self.inner is None and self.outer is None and len(self.values) == 2
        if not fine:
            need = "two values, or an inner range within an outer one"
            raise ValueError(f"dimension {self.key} needs {need}")

    def checked(self, value):
        """`value` as int (binary) or float (continuous). Raises ValueError if it is not
        allowed."""
        low, high = self.limits
        is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if self.values:
            if is_real and value in self.values:
                return int(value)
            need = f"{self.values[0]} or {self.values[1]}"
        else:
            if is_real and low <= value <= high:
                return float(value)
            need = f"a finite number from {low} to {high}"
        raise ValueError(f"context {self.key} must be {need}; got {value!r}")


@dataclass(frozen=True)
class Task:
    """One row of the benchmark. Raises ValueError if no 20 different contexts can be made from
    it."""

    physics: str  # class of the environment, and what it simulates
    obs_dim: int
    act_dim: int
    steps: int  # length of an episode
    window: int  # K, the past transitions from which an agent infers the context
    dimensions: tuple[Dimension, ...]
    overlap: bool  # can one policy that does not know the context act well in all of them?
    total_timesteps: int  # vector steps of training
    bounds: tuple[float, float]  # returns that 0 and 1 stand for in scaled scores
    contexts: Callable | None = None  # contexts(split) -> its own 20; None: those of `context_set`

    def __post_init__(self):
        keys = [dimension.key for dimension in self.dimensions]
        if len(set(keys)) < len(keys):
            raise ValueError(f"task {self.physics} has two dimensions of the same key: {keys}")
        if not any(dimension.inner for dimension in self.dimensions):
            need = "a dimension with ranges: two values do not make 20 contexts"
            raise ValueError(f"task {self.physics} needs {need}")


INVERSION = Dimension("inversion", 1, values=(-1, 1))  # every action component is multiplied by it
PERMUTATION = Dimension("permutation", 0, values=(0, 1))  # 1: the action components in reverse order
MASS = Dimension("mass", 1.0, (0.5, 1.5), (0.1, 2.0), limits=(1e-3, 1e3))
FRICTION = Dimension("friction", 1.0, (0.5, 1.5), (0.1, 2.0), limits=(0, 1e3))
POLE = Dimension("length", 0.5, (0.3, 0.85), (0.1, 2.0), limits=(0.05, 10))  # m, hinge to middle of the pole
LENGTH = Dimension("length", 1.0, (0.8, 1.2), (0.4, 1.6), limits=(0.05, 10))  # factor on the limbs
BALL_G = Dimension("gravity", 9.81, (8.0, 12.0), (1.0, 20.0), limits=(0, 1e3))  # m/s^2, downwards
DISTANCE = Dimension("distance", 0.3, (0.24, 0.36), (0.1, 0.5), limits=(0.01, 0.9))  # m, the string
GRAVITY = Dimension("gravity", 9.81, (4.91, 14.71), (0.98, 19.62), limits=(0, 1e3))  # m/s^2, downwards
GEAR = Dimension("actuator_strength", 1.0, (0.5, 1.5), (0.1, 2.0), limits=(0, 1e3))  # factor on every gear
COEFFICIENTS = tuple(Dimension(f"c{k}", 0.0, (-5.0, 5.0), (-10.0, 10.0)) for k in range(20))

TASKS = {
    "DI": Task("DoubleIntegrator", 4, 2, 100, 24, (MASS, INVERSION), False, 100_000, (0, 100)),
    "DI-Friction": Task("DoubleIntegrator", 4, 2, 100, 24, (MASS, FRICTION), True, 100_000, (0, 100)),
    "DI-Perm": Task("DoubleIntegrator", 4, 2, 100, 24, (MASS, PERMUTATION), False, 100_000, (0, 100)),
    "ODE": Task("ComplexODE", 1, 2, 200, 24, COEFFICIENTS[:2], False, 100_000, (0, 200)),  # overlaps, but weakly
    "Cartpole": Task("SuiteEnv cartpole balance", 5, 1, 1000, 128, (POLE, INVERSION), False, 100_000, (0, 1000)),
    "Cheetah": Task("SuiteEnv cheetah run", 17, 6, 1000, 128, (LENGTH, INVERSION), False, 200_000, (0, 1000)),
    "Reacher-E": Task("SuiteEnv reacher easy", 6, 2, 1000, 128, (LENGTH, INVERSION), False, 200_000, (0, 1000)),
    "Reacher-H": Task("SuiteEnv reacher hard", 6, 2, 1000, 128, (LENGTH, INVERSION), False, 200_000, (0, 1000)),
    "Reacher-H-Perm": Task("SuiteEnv reacher hard", 6, 2, 1000, 128, (LENGTH, PERMUTATION), False, 200_000, (0, 1000)),
    "BallInCup": Task("SuiteEnv ball_in_cup catch", 8, 2, 1000, 128, (BALL_G, DISTANCE), True, 200_000, (0, 1000)),
    "Walker": Task("SuiteEnv walker walk", 24, 6, 1000, 128, (GRAVITY, GEAR), True, 200_000, (0, 1000)),
    "WalkerGym": Task("GymEnv walker2d_v5 Walker2dEnv", 17, 6, 1000, 128, (GRAVITY, GEAR), True, 500_000, (0, 5000)),
    "HopperGym": Task("GymEnv hopper_v5 HopperEnv", 11, 3, 1000, 128, (GRAVITY, GEAR), True, 500_000, (0, 4000)),
}
for _k in range(1, 21):
    TASKS[f"ODE-{_k}"] = Task("ComplexODE", 1, 2, 200, 24, COEFFICIENTS[:_k], False, 100_000, (0, 200))
PUBLISHED = frozenset(TASKS)  # others are added by files of their own
SPLITS = ("train", "eval-in", "eval-out")


def _unknown(kind, name, allowed):
    lower = {one.lower(): one for one in allowed}
    near = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.5)
    hint = f" (did you mean {lower[near[0]]}?)" if near else ""
    return ValueError(f"unknown {kind} {name!r}{hint}; allowed: {', '.join(allowed)}")


def get_task(env_id):
    """The `Task` called `env_id` ("Cheetah", "ODE-5", ...). Of "module:Task" the module is imported
    first, as gymnasium.make does; it adds its tasks to `TASKS`. Raises ValueError that names what
    is allowed."""
    module, colon, name = str(env_id).rpartition(":")
    if colon:
        if name in PUBLISHED:
            raise ValueError(f"task {env_id!r}: {name} is a task of the benchmark; give yours another name")
        try:
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())  # the file may lie where one starts
            importlib.import_module(module)
        except Exception as error:  # it may do anything
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            need = "the name of a module that Python can import"
            raise ValueError(f"task {env_id!r} needs {need} before the colon ({reason})") from error
    if name not in TASKS:
        raise _unknown("task", name, [*TASKS, "module:Task of another file"])
    if colon and f"AIB/{name}-v0" not in gym.registry:
        raise ValueError(f"task {env_id!r} needs a gymnasium.register('AIB/{name}-v0', ...) in its file")
    return TASKS[name]


def task_name(env_id):
    """The task's own name: "Cart" of "cart_tasks:Cart", "DI" of "DI"."""
    return env_id.rpartition(":")[2]


def complete_context(env_id, context=None):
    """`context` (dict or None) in table order, with the task's defaults for what it leaves out.
    Raises ValueError for a key that the task does not have and for a value that is not finite or
    not physical."""
    dimensions = {dimension.key: dimension for dimension in get_task(env_id).dimensions}
    if not isinstance(context, dict | None):
        keys = ", ".join(dimensions)
        raise ValueError(f"context must be a dict with keys from {keys}; got {context!r}")
    complete = {key: dimension.default for key, dimension in dimensions.items()}
    for key, value in (context or {}).items():
        if key not in dimensions:
            raise _unknown(f"context key for {env_id}", key, list(dimensions))
        complete[key] = dimensions[key].checked(value)
    return complete


def _points(dimension, split):
    """The values of one dimension that a set is made from: 50 of a continuous one, both of a
    binary one."""
    if dimension.values:
        return list(dimension.values)
    low, high = dimension.inner
    outer_low, outer_high = dimension.outer
    margin = (high - low) / 100
    if split == "train":
        points = np.linspace(low, high, 50)
    elif split == "eval-in":
        points = np.linspace(low + margin, high - margin, 50)
    else:
        below = np.linspace(outer_low, low - margin, 25)
        above = np.linspace(high + margin, outer_high, 25)
        points = np.concatenate([below, above])
    return np.round(points, 4).tolist()


def context_set(env_id, split):
    """The 20 contexts (list of dicts) of `split`, one of "train", "eval-in", "eval-out". They
    depend on nothing else. Up to two dimensions: 20 evenly spaced rows of the product grid in
    lexicographic order. More (ODE-k): sorted draws, independent in each dimension, from a fixed
    generator. A task with `contexts` has its own."""
    task = get_task(env_id)
    dimensions = task.dimensions
    if split not in SPLITS:
        raise _unknown("split", split, SPLITS)
    if task.contexts:
        return task.contexts(split)
    points = [_points(dimension, split) for dimension in dimensions]
    if len(points) <= 2:
        grid = list(itertools.product(*points))
        rows = [grid[i] for i in np.linspace(0, len(grid) - 1, 20).astype(int)]
    else:
        rng = np.random.default_rng([len(points), SPLITS.index(split)])
        rows = []
        while len(set(rows)) < 20:  # with two binary dimensions, the first 20 may repeat
            columns = [rng.choice(values, 20).tolist() for values in points]
            rows = sorted(zip(*columns, strict=True))
    keys = [dimension.key for dimension in dimensions]
    return [dict(zip(keys, row, strict=True)) for row in rows]


def context_vector(env_id, context, scaled=False):
    """The context as float32 [number of dimensions] in table order; `scaled` maps each
    dimension's outer range (the two values of a binary one) to [-1, 1]."""
    values = np.array(list(complete_context(env_id, context).values()), np.float64)
    if scaled:
        low, high = np.array([d.values or d.outer for d in get_task(env_id).dimensions]).T
        values = 2 * (values - low) / (high - low) - 1
    return values.astype(np.float32)


def modes(env_id):
    """One context per value of the task's binary dimension, all else at its defaults; per
    combination of values where it has several such dimensions, and [{}] where it has none."""
    binary = [dimension for dimension in get_task(env_id).dimensions if dimension.values]
    keys = [dimension.key for dimension in binary]
    rows = itertools.product(*(dimension.values for dimension in binary))
    return [dict(zip(keys, row, strict=True)) for row in rows]


# Environments -----------------------------------------------------------------------------------

HEIGHT = 240  # of a picture, in pixels
WIDTH = 320


class ContextEnv(gym.Env):
    """What all tasks share: the context, reversed actuators, and what happens when a simulation
    diverges.

    Observations: float32 [obs_dim], with the context vector at the end if `observe_context` is
    "raw" or "scaled". Actions: [act_dim], in every task first clipped to [-1, 1], then inverted
    or permuted. Episodes never terminate; gymnasium's TimeLimit truncates them. `context` is the
    complete context.

    When the simulation diverges, one warning is logged, and until the next reset the last finite
    observation is held, rewards are 0 and `info["diverged"]` is True.

    A copy (deepcopy, pickle) is a new environment with the same arguments. It begins with a
    reset.

    A subclass has `sizes`, `_build`, `_reset`, `_step` and `picture`. Raises ValueError for
    arguments that are not allowed, and if the row of the task has other sizes than the
    simulation.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 20}
    divergence = (ArithmeticError,)  # what _reset and _step raise when the simulation diverges
    sizes: tuple[int, int]  # of the simulation's observations and actions; known after _build

    def __init__(self, env_id, context=None, observe_context=None, render_mode=None):
        task = get_task(env_id)
        if observe_context not in (None, "raw", "scaled"):
            raise _unknown("observe_context", observe_context, ["raw", "scaled"])
        if render_mode not in (None, "rgb_array"):
            raise _unknown("render_mode", render_mode, ["rgb_array"])
        self.env_id = env_id
        self.observe_context = observe_context
        self.render_mode = render_mode
        self._original_context = complete_context(env_id, context)
        self._set_context(self._original_context)
        self._obs = None  # until the first reset
        self._build(*task.physics.split()[1:])

        if self.sizes != (task.obs_dim, task.act_dim):
            row = f"TASKS[{env_id!r}] has obs_dim {task.obs_dim} and act_dim {task.act_dim}"
            raise ValueError(f"{row}; its simulation has {self.sizes[0]} and {self.sizes[1]}")
        size = task.obs_dim + len(self._suffix)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (task.act_dim,), np.float32)

    def __reduce__(self):
        arguments = (self.env_id, self._original_context, self.observe_context, self.render_mode)
        return type(self), arguments

    def _set_context(self, context):
        self.context = dict(context)
        self._suffix = np.zeros(0, np.float32)
        if self.observe_context:
            self._suffix = context_vector(self.env_id, context, self.observe_context == "scaled")

    def flip(self):
        """Changes the value of the binary dimension (inversion, permutation) from the next step
        on, in the middle of an episode; the physics goes on. The next reset restores the context.
        So `_step` has to read that value: what `_build` has put into a model stays as it was.
        Raises ValueError if the task has no such dimension."""
        flipped = dict(self.context)
        for dimension in get_task(self.env_id).dimensions:
            if dimension.values:
                first, second = dimension.values
                is_first = self.context[dimension.key] == first
                flipped[dimension.key] = second if is_first else first
        if flipped == self.context:
            raise ValueError(f"{self.env_id} has no binary context dimension to flip")
        self._set_context(flipped)

    def reset(self, *, seed=None, options=None):
        """Starts an episode; returns the observation and {"diverged": bool}. There are no
        `options`: a context is chosen when the environment is made. Raises ValueError if some are
        given."""
        if options:
            advice = "a context is given to gymnasium.make"
            raise ValueError(f"reset takes no options ({advice}); got {options!r}")
        super().reset(seed=seed)
        self._set_context(self._original_context)
        self._diverged = False
        zeros = np.zeros(self.sizes[0], np.float32)  # what is seen if the start itself diverges
        self._obs = np.concatenate([zeros, self._suffix])
        self._simulate(self._start, seed)
        return self._obs.copy(), {"diverged": self._diverged}

    def step(self, action):
        """One step with `action` [act_dim]; returns what gymnasium's step does. Raises
        ResetNeeded before the first reset, also of a copy, and ValueError for another shape."""
        self._require_reset("step")
        action = np.asarray(action)
        if action.shape != self.action_space.shape:
            shape = self.action_space.shape
            raise ValueError(f"action must have shape {shape}; got {action.shape}")
        action = np.clip(action, -1.0, 1.0)
        if self.context.get("permutation") == 1:
            action = action[::-1]
        action = action * self.context.get("inversion", 1)
        reward = 0.0
        if not self._diverged:
            reward = self._simulate(self._step, action)
        return self._obs.copy(), reward, False, False, {"diverged": self._diverged}

    def render(self):
        """`picture()` if the environment was made with render_mode "rgb_array", otherwise
        None."""
        if self.render_mode is None:
            return None
        self._require_reset("render")
        return self.picture()

    def _require_reset(self, method):
        if self._obs is None:
            advice = "a copy of an environment needs one, too"
            raise gym.error.ResetNeeded(f"{method} before reset ({advice})")

    def _simulate(self, function, argument):
        """Takes over the observation that `function` returns. Returns its reward, 0.0 if it
        diverged."""
        try:
            obs, reward = function(argument)
            obs = np.concatenate([obs, self._suffix], dtype=np.float32, casting="same_kind")
            if math.isfinite(reward) and np.isfinite(obs).all():
                self._obs = obs
                return float(reward)
            reason = "a value is not finite"
        except self.divergence as error:
            reason = str(error)
        self._diverged = True
        message = "%s diverged in context %s (%s): no rewards from here on"
        logger.warning(message, self.env_id, self.context, reason)
        return 0.0

    def _start(self, seed):
        return self._reset(seed), 0.0

    def _build(self, *names):
        """Makes the simulation; `names` are those after the class in the task's `physics`."""

    def _reset(self, seed):
        """Starts an episode of the simulation; returns its observation."""
        raise NotImplementedError

    def _step(self, action):
        """One step of the simulation; returns its observation and reward."""
        raise NotImplementedError

    def picture(self):
        """What the environment looks like now: uint8 [HEIGHT, WIDTH, 3]."""
        raise NotImplementedError


def _draw_point(x, y, goal):
    """A picture of [-1, 1] x [-1, 1]: a black point at (x, y), a grey disc of radius `goal`
    around 0."""
    right = 1.1 * WIDTH / HEIGHT
    v, u = np.mgrid[1.1 : -1.1 : HEIGHT * 1j, -right : right : WIDTH * 1j]
    grey = np.where(abs(u) <= 1.1, 255, 230)
    grey[np.hypot(u, v) <= goal] = 170
    grey[np.hypot(u - x, v - y) <= 0.05] = 0
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


class DoubleIntegrator(ContextEnv):
    """A point mass in the plane that is to be brought to the origin. `state` [4]: position and
    velocity in [-1, 1]."""

    sizes = (4, 2)

    def _reset(self, seed):
        position = self.np_random.uniform(0.8, 1.0, 2) * self.np_random.choice([-1.0, 1.0], 2)
        self.state = np.concatenate([position, np.zeros(2)])
        return self.state

    def _step(self, action, dt=0.1):
        mass = self.context["mass"]
        friction = self.context.get("friction", 0.0)
        position = self.state[:2]
        velocity = self.state[2:]
        force = action.astype(np.float64)
        position_next = position + velocity * dt
        velocity_next = velocity * (1 - dt * friction / mass) + force / mass * dt
        self.state = np.clip(np.concatenate([position_next, velocity_next]), -1.0, 1.0)
        return self.state, float(math.hypot(*self.state[:2]) <= 0.1)

    def picture(self):
        return _draw_point(self.state[0], self.state[1], goal=0.1)


class ComplexODE(ContextEnv):
    """dx/dt = Re(sum_k c_k a^(k+1)) with a complex action a = a_0 + i a_1 (Beukman et al. 2023):
    keep x near 0. `state` [1]: x in [-20, 20]."""

    sizes = (1, 2)

    def _build(self):
        self._coefficients = [c for key, c in self.context.items() if key.startswith("c")]

    def _reset(self, seed):
        self.state = self.np_random.uniform(-1.0, 1.0, 1)
        return self.state

    def _step(self, action, dt=0.01):
        a = complex(*action)
        terms = [c * a ** (k + 1) for k, c in enumerate(self._coefficients)]
        rate = sum(terms, 0j).real
        self.state = np.clip(self.state + dt * rate, -20.0, 20.0)
        for bound, reward in ((0.05, 1.0), (0.1, 1 / 2), (0.2, 1 / 3), (0.5, 1 / 4), (2.0, 0.05)):
            if abs(self.state[0]) < bound:
                return self.state, reward
        return self.state, 0.0

    def picture(self):  # of x, [-2, 2] is shown
        return _draw_point(np.clip(self.state[0] / 2, -1, 1), 0.0, goal=0.25)


def _import_mujoco():
    """Imports MuJoCo and dm_control without OpenGL, which training does not need: dm_control
    would start it, and MuJoCo cannot be imported with a MUJOCO_GL that is not installed."""
    with contextlib.suppress(Exception):
        import triton  # noqa: F401 (of torch with CUDA: loaded after OpenGL, it can crash Python)
    chosen = os.environ.get("MUJOCO_GL")
    with contextlib.suppress(Exception):
        import mujoco  # noqa: F401
    os.environ["MUJOCO_GL"] = "disable"
    try:
        import dm_control.mujoco  # noqa: F401
    finally:
        del os.environ["MUJOCO_GL"]
        if chosen is not None:
            os.environ["MUJOCO_GL"] = chosen


def _has_failed_to_draw(model):
    """Whether MuJoCo has failed to draw in this process and would abort Python if it tried again.
    A child process tries: it waits forever then, until the alarm ends it."""
    if not sys.modules["glfw"].get_error()[0]:  # what MuJoCo tries first when nothing is chosen
        return False
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(2)
            sys.modules["mujoco"].MjrContext(model, 150)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] != 0


@functools.cache  # a second try after a failed one can abort Python
def _why_no_picture():
    """None, or in one line why MuJoCo cannot draw in this process."""
    default = "egl" if ctypes.util.find_library("EGL") else "osmesa"
    backend = os.environ.get("MUJOCO_GL") or default
    try:
        import mujoco

        model = mujoco.MjModel.from_xml_string("<mujoco/>")
        with warnings.catch_warnings(action="ignore"):
            if sys.platform == "linux":  # when it was imported, MuJoCo may have chosen GLFW
                if "glfw" in sys.modules and _has_failed_to_draw(model):
                    raise OSError("it failed before in this program")
                if backend in ("egl", "osmesa"):
                    gl_context = sys.modules[mujoco.Renderer.__module__].gl_context
                    gl_context.GLContext = importlib.import_module(f"mujoco.{backend}").GLContext
                elif not importlib.import_module("glfw").init():
                    raise OSError(f"MUJOCO_GL is {backend}, and GLFW finds no display")
            mujoco.Renderer(model, HEIGHT, WIDTH).close()
    except Exception as error:  # OpenGL's are of many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        advice = "install EGL (Debian: apt install libegl1 libgl1) and set MUJOCO_GL=egl"
        return f"MuJoCo cannot draw here ({reason}): {advice}"
    return None


class MujocoEnv(ContextEnv):
    """A task that MuJoCo simulates: `model` (mujoco.MjModel) and `data` (mujoco.MjData)."""

    renderer = None

    def picture(self):
        """What the environment looks like now: uint8 [HEIGHT, WIDTH, 3]. Drawn offscreen with
        OpenGL; the environment variable MUJOCO_GL can choose egl, osmesa or glfw. Raises OSError
        if there is none."""
        if self.renderer is None:
            reason = _why_no_picture()
            if reason:
                raise OSError(reason)
            import mujoco

            self.renderer = mujoco.Renderer(self.model, HEIGHT, WIDTH)
            close = weakref.finalize(self, self.renderer.close)
            close.atexit = False
            atexit.register(close)  # what is registered last runs first: before EGL ends
        camera = 0 if self.model.ncam else -1  # the model's first; without one MuJoCo's free camera
        self.renderer.update_scene(self.data, camera)
        return self.renderer.render()

    def close(self):
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None


def _scale_limbs(spec, domain, length):
    """Writes lengths into a mujoco.MjSpec; mass and inertia follow when it is compiled."""
    if domain == "cartpole":
        spec.geom("pole_1").fromto = [0, 0, 0, 0, 0, 2 * length]
    elif domain in ("cheetah", "walker"):
        in_plane = np.array([length, 1.0, length])
        for body in spec.bodies[2:]:  # after world and torso
            geom = body.geoms[0]
            (joint,) = body.joints
            geom.pos = geom.pos * in_plane
            geom.size[1] *= length
            joint.pos = joint.pos * in_plane
            if not body.name.endswith("thigh"):  # the thighs stay where they join the torso
                body.pos = body.pos * in_plane
    elif domain == "reacher":
        for name in ("hand", "finger"):
            spec.body(name).pos[0] *= length
        for name in ("arm", "hand"):
            spec.geom(name).fromto[3] *= length
    else:
        raise ValueError(f"what a length means for {domain} is not defined")


def _set_distance(spec, domain, distance):
    """Writes the length of BallInCup's string into a mujoco.MjSpec."""
    if domain != "ball_in_cup":
        raise ValueError(f"what a distance means for {domain} is not defined")
    string = spec.tendon("string")
    spec.body("ball").pos[2] += string.range[1] - distance
    string.range[1] = distance


def _edit_compiled(model, context):
    """Writes gravity and actuator strength into a compiled mujoco.MjModel."""
    if "gravity" in context:
        model.opt.gravity[2] = -context["gravity"]
    model.actuator_gear *= context.get("actuator_strength", 1.0)


@functools.cache
def _load_suite(domain, task):
    """dm_control's own environment and its model source (XML, assets), loaded once."""
    module = importlib.import_module(f"dm_control.suite.{domain}")
    xml, assets = module.get_model_and_assets()
    if isinstance(xml, bytes):
        xml = xml.decode()
    return module.SUITE[task](), xml, assets


class SuiteEnv(MujocoEnv):
    """A dm_control suite task on an edited model. Rewards, observations and resets are the
    suite's own."""

    def _build(self, domain, task):
        _import_mujoco()
        import mujoco
        from dm_control.mujoco import wrapper
        from dm_control.rl import control

        original, xml, assets = _load_suite(domain, task)
        spec = mujoco.MjSpec.from_string(xml, include=assets)
        for texture in spec.textures:
            if texture.type == mujoco.mjtTexture.mjTEXTURE_SKYBOX:
                texture.width = 16  # in full, it takes 12 MB and long to compile
                texture.height = 96
        self._edit(spec, domain)
        self.model = spec.compile()
        _edit_compiled(self.model, self.context)

        physics = type(original.physics).from_model(wrapper.MjModel(self.model))
        own_task = copy.deepcopy(original.task)
        own_task.random.seed()
        timestep = original.control_timestep()
        self._suite = control.Environment(physics, own_task, control_timestep=timestep)
        self.data = physics.data.ptr
        self.divergence = (ArithmeticError, control.PhysicsError)
        parts = self._suite.observation_spec().values()
        obs_dim = sum(math.prod(part.shape) for part in parts)
        self.sizes = (obs_dim, self._suite.action_spec().shape[0])

    def _edit(self, spec, domain):
        """Writes the context into a mujoco.MjSpec, before it is compiled."""
        if "length" in self.context:
            _scale_limbs(spec, domain, self.context["length"])
        if "distance" in self.context:
            _set_distance(spec, domain, self.context["distance"])

    def _reset(self, seed):
        if seed is not None:  # below 2**32 as the suite's own task does it
            if seed >= 2**32:
                seed = np.random.SeedSequence(seed).generate_state(4)
            self._suite.task.random.seed(seed)
        return self._flatten(self._suite.reset())

    def _step(self, action):
        timestep = self._suite.step(action)
        return self._flatten(timestep), timestep.reward

    def _flatten(self, timestep):
        return np.concatenate([np.ravel(part) for part in timestep.observation.values()])


class GymEnv(MujocoEnv):
    """A gymnasium MuJoCo environment that never terminates, with edited gravity and gears."""

    def _build(self, module, name):
        _import_mujoco()  # dm_control, too: it sends what MuJoCo prints to absl's logger
        from mujoco import mjtWarning as w

        other = set(self.context) - {"gravity", "actuator_strength", "inversion", "permutation"}
        if other:
            raise ValueError(f"what {', '.join(other)} means for {name} is not defined")
        cls = getattr(importlib.import_module(f"gymnasium.envs.mujoco.{module}"), name)
        self._gym = cls(terminate_when_unhealthy=False)
        self.model = self._gym.model
        self.data = self._gym.data
        self.sizes = (self._gym.observation_space.shape[0], self._gym.action_space.shape[0])
        _edit_compiled(self.model, self.context)
        bad = (w.mjWARN_BADQPOS, w.mjWARN_BADQVEL, w.mjWARN_BADQACC, w.mjWARN_BADCTRL)
        self._bad = [int(warning) for warning in bad]

    def _reset(self, seed):
        obs, _ = self._gym.reset(seed=seed)
        return obs

    def _step(self, action):
        obs, reward, *_ = self._gym.step(action)
        if self.data.warning.number[self._bad].any():
            # It has reset itself: the numbers look fine.
            raise ArithmeticError("MuJoCo reports a bad state")
        return obs, reward


for _id, _task in TASKS.items():
    _entry = f"aib_envs:{_task.physics.split()[0]}"
    gym.register(f"AIB/{_id}-v0", _entry, kwargs={"env_id": _id}, max_episode_steps=_task.steps)


def make_vec(env_id, contexts, **options):
    """A gymnasium vector environment, one environment per context, that steps them in lockstep
    and never resets itself. `options` go to gymnasium.make. `infos["diverged"]` [n] tells which
    simulations have diverged in this episode."""
    get_task(env_id)  # ValueError for an unknown task; imports the module of module:Task
    name = f"AIB/{task_name(env_id)}-v0"
    make = functools.partial(gym.make, name, disable_env_checker=True, **options)
    makers = [functools.partial(make, context=context) for context in contexts]
    return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.DISABLED)


# Evaluation protocol ----------------------------------------------------------------------------


def reset_seeds(num_envs, *key):
    """One reset seed (int) per environment, which depends on `key` (ints >= 0) and the
    environment's index only."""
    return [int(np.random.SeedSequence([*key, i]).generate_state(1)[0]) for i in range(num_envs)]


class History:
    """The running episode of n environments in lockstep: K warm-up steps, then T steps.

    t: the current step, -K at the start of the warm-up, 0 at the start of the episode. Step t
    stands at index K + t of obs [n, K + T, obs_dim], actions [n, K + T, act_dim], next_obs [n,
    K + T, obs_dim] and all_rewards [n, K + T]; rewards [n, T] are those of the episode alone.
    lengths [n]: steps before the simulation diverged, if it did.
    """

    def __init__(self, num_envs, window_size, steps, obs_dim, act_dim):
        self.window_size = window_size
        self.obs = np.zeros((num_envs, window_size + steps, obs_dim), np.float32)
        self.actions = np.zeros((num_envs, window_size + steps, act_dim), np.float32)
        self.next_obs = np.zeros((num_envs, window_size + steps, obs_dim), np.float32)
        self.all_rewards = np.zeros((num_envs, window_size + steps), np.float32)
        self.rewards = self.all_rewards[:, window_size:]  # a view
        self.lengths = np.zeros(num_envs, np.int64)
        self.begin()

    def begin(self):
        """Starts a new episode; nothing of the last one is seen any more."""
        self.t = -self.window_size
        self.lengths[:] = 0

    def add(self, obs, actions, rewards, next_obs, diverged):
        """Appends the transition of step `t`: [n, obs_dim], [n, act_dim], [n], [n, obs_dim],
        [n]."""
        index = self.window_size + self.t
        self.obs[:, index] = obs
        self.actions[:, index] = actions
        self.next_obs[:, index] = next_obs
        self.all_rewards[:, index] = rewards
        if self.t >= 0:
            self.lengths += ~diverged
        self.t += 1

    def window(self, positions, with_rewards=False):
        """Past transitions at `positions` [n or 1, m] of the window: 0 is the oldest, K - 1 the
        one just before `t`. Returns obs, actions, deltas (next_obs - obs) and, if asked for,
        rewards, each [n, m, dim]; zeros for what lies before the warm-up."""
        index = self.t + positions  # of step t - K + positions
        known = (index >= 0)[..., None]
        past = np.arange(len(self.obs))[:, None], np.maximum(index, 0)
        obs = self.obs[past]
        parts = [obs, self.actions[past], self.next_obs[past] - obs]
        if with_rewards:
            parts.append(self.all_rewards[past][..., None])
        return tuple(part * known for part in parts)


def eval_contexts(env_id):
    """The 60 contexts of an evaluation: 20 of train, of eval-in and of eval-out."""
    return [context for split in SPLITS for context in context_set(env_id, split)]


def by_split(array):
    """`array` [60, rollouts] in the order of `eval_contexts`, as {split: [20, rollouts]}."""
    return dict(zip(SPLITS, np.split(array, len(SPLITS)), strict=True))


def evaluate(envs, policy, window_size, rollouts):
    """The benchmark's protocol, for `policy` in the n environments of a `make_vec`. Returns the
    undiscounted returns (float64) and whether the simulation diverged (bool), both [n, rollouts].

    `policy(obs [n, obs_dim], history) -> actions [n, act_dim]` must be deterministic. With
    `window_size` = K > 0 every rollout begins with K warm-up steps, which fill the window and earn
    nothing; a simulation that diverges in them counts as diverged, too. Reset seeds depend only
    on the rollout and on the environment's place in `envs`.
    """
    task = get_task(envs.envs[0].unwrapped.env_id)
    obs_dim = envs.single_observation_space.shape[0]
    history = History(envs.num_envs, window_size, task.steps, obs_dim, task.act_dim)
    returns = np.zeros((envs.num_envs, rollouts))
    diverged = np.zeros((envs.num_envs, rollouts), bool)
    for rollout in range(rollouts):
        history.begin()
        for t in range(-window_size, task.steps):
            if t in (-window_size, 0):
                obs, _ = envs.reset(seed=reset_seeds(envs.num_envs, 1, rollout, int(t < 0)))
            actions = policy(obs, history)
            next_obs, rewards, _, _, infos = envs.step(actions)
            history.add(obs, actions, rewards, next_obs, infos["diverged"])
            if t >= 0:
                returns[:, rollout] += rewards
            diverged[:, rollout] |= infos["diverged"]
            obs = next_obs
    return returns, diverged
