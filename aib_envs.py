"""Actuator Inversion Benchmark (AIB): tasks, context sets, environments and evaluation protocol.

Fourteen control tasks (one of them, ODE-k, in 20 sizes) from "Dynamics-Aligned Shared Hypernetworks" (arXiv
2602.06550), registered with gymnasium as AIB/Cheetah-v0 etc. A task's reward is fixed; its dynamics depend on a context
(pole length, reversed actuators) that is constant within an episode and that the agent is not told. It trains on 20
contexts and is evaluated with frozen weights on three sets of 20: `train`, `eval-in` (interpolation) and `eval-out`
(extrapolation)."""

import copy
import difflib
import functools
import importlib
import itertools
import logging
import math
import numbers
import re
import warnings
from dataclasses import dataclass
from typing import ClassVar

import absl.logging
import gymnasium as gym
import numpy as np

logger = logging.getLogger("aib_envs")

# Keep off the terminal what others say about a missing display, an attribute of cheetah.xml, and (we do) divergence.
NOISE = ".*(DISPLAY environment variable is missing|'settotalmass' is deprecated|Nan, Inf or huge value)"
warnings.filterwarnings("ignore", NOISE)
absl.logging.get_absl_logger().addFilter(lambda record: not re.match(NOISE, record.getMessage()))

# ------------------------------------------------- The benchmark as data ----------------------------------------------


@dataclass(frozen=True)
class Dimension:
    """One dimension of a context: an `inner` range for training and an `outer` one for extrapolation, or two `values`.
    Outside `limits` a value makes no physical sense."""

    key: str
    default: float
    inner: tuple[float, float] | None = None
    outer: tuple[float, float] | None = None
    values: tuple[int, int] | None = None
    limits: tuple[float, float] = (-1e3, 1e3)


@dataclass(frozen=True)
class Task:
    """One row of the benchmark."""

    physics: str  # class of the environment, and what it simulates
    obs_dim: int
    act_dim: int
    steps: int  # length of an episode
    window: int  # K, the past transitions from which an agent infers the context
    dimensions: tuple[Dimension, ...]
    overlap: bool  # can one policy that does not know the context act well in all of them?
    total_timesteps: int  # vector steps of training
    bounds: tuple[float, float]  # returns that 0 and 1 stand for in scaled scores


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
SPLITS = ("train", "eval-in", "eval-out")


def _unknown(kind, name, allowed):
    near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return ValueError(f"unknown {kind} {name!r}{hint}; allowed: {', '.join(allowed)}")


def get_task(env_id):
    """The `Task` called `env_id` ("Cheetah", "ODE-5", ...). Raises ValueError that names what is allowed."""
    if env_id not in list(TASKS):
        raise _unknown("task", env_id, TASKS)
    return TASKS[env_id]


def complete_context(env_id, context=None):
    """`context` (dict or None) in table order, with the task's defaults for what it leaves out. Raises ValueError for a
    key that the task does not have and for a value that is not finite or not physical."""
    dimensions = {dimension.key: dimension for dimension in get_task(env_id).dimensions}
    if not isinstance(context, dict | None):
        raise ValueError(f"context must be a dict with keys from {', '.join(dimensions)}; got {context!r}")
    complete = {key: dimension.default for key, dimension in dimensions.items()}
    for key, value in (context or {}).items():
        if key not in dimensions:
            raise _unknown(f"context key for {env_id}", key, list(dimensions))
        values, (low, high) = dimensions[key].values, dimensions[key].limits
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not real or not low <= value <= high or (values and value not in values):
            need = f"{values[0]} or {values[1]}" if values else f"a finite number from {low} to {high}"
            raise ValueError(f"context {key} must be {need}; got {value!r}")
        complete[key] = int(value) if values else float(value)
    return complete


def _points(dimension, split):
    """The values of one dimension that a set is made from: 50 of a continuous one, both of a binary one."""
    if dimension.values:
        return list(dimension.values)
    (a, b), (outer_a, outer_b) = dimension.inner, dimension.outer
    margin = (b - a) / 100
    outside = np.concatenate([np.linspace(outer_a, a - margin, 25), np.linspace(b + margin, outer_b, 25)])
    inside = np.linspace(a, b, 50) if split == "train" else np.linspace(a + margin, b - margin, 50)
    return np.round(outside if split == "eval-out" else inside, 4).tolist()


def context_set(env_id, split):
    """The 20 contexts (list of dicts) of `split`, one of "train", "eval-in", "eval-out". They depend on nothing else.
    Up to two dimensions: 20 evenly spaced rows of the product grid in lexicographic order. More (ODE-k): sorted draws,
    independent in each dimension, from a fixed generator."""
    dimensions = get_task(env_id).dimensions
    if split not in SPLITS:
        raise _unknown("split", split, SPLITS)
    points = [_points(dimension, split) for dimension in dimensions]
    if len(points) <= 2:
        grid = list(itertools.product(*points))
        rows = [grid[i] for i in np.linspace(0, len(grid) - 1, 20).astype(int)]
    else:
        rng = np.random.default_rng([len(points), SPLITS.index(split)])
        rows = sorted(zip(*(rng.choice(p, 20).tolist() for p in points), strict=True))
    return [dict(zip((dimension.key for dimension in dimensions), row, strict=True)) for row in rows]


def context_vector(env_id, context, scaled=False):
    """The context as float32 [number of dimensions] in table order; `scaled` maps each dimension's outer range (the two
    values of a binary one) to [-1, 1]."""
    values = np.array(list(complete_context(env_id, context).values()), np.float64)
    low, high = np.array([d.values or d.outer for d in get_task(env_id).dimensions]).T
    return (2 * (values - low) / (high - low) - 1 if scaled else values).astype(np.float32)


# ------------------------------------------------------ Environments --------------------------------------------------


class ContextEnv(gym.Env, gym.utils.EzPickle):
    """What all tasks share: the context, reversed actuators, and what happens when a simulation diverges.

    Actions: float [act_dim] in [-1, 1]. Observations: float32 [obs_dim], with the context vector at the end if
    `observe_context` is "raw" or "scaled". Episodes never terminate; gymnasium's TimeLimit truncates them. When the
    simulation diverges, one warning is logged, and until the next reset the last finite observation is held, rewards
    are 0 and `info["diverged"]` is True. `context` is the complete context (dict). Pictures: uint8 [240, 320, 3].
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 20}
    divergence = (ArithmeticError,)  # what _reset and _step raise when the simulation diverges

    def __init__(self, env_id, context=None, observe_context=None, render_mode=None):
        self.env_id, self.context, task = env_id, complete_context(env_id, context), get_task(env_id)
        gym.utils.EzPickle.__init__(self, env_id, context and dict(context), observe_context, render_mode)  # for copies
        self.render_mode, self._camera = render_mode, render_mode and importlib.import_module("aib_render")
        if observe_context not in (None, "raw", "scaled"):
            raise _unknown("observe_context", observe_context, ["raw", "scaled"])
        self._suffix = context_vector(env_id, self.context, observe_context == "scaled") if observe_context else []
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (task.obs_dim + len(self._suffix),), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (task.act_dim,), np.float32)
        self._build(*task.physics.split()[1:])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._diverged, self._obs = False, np.zeros(self.observation_space.shape, np.float32)
        self._obs[len(self._obs) - len(self._suffix) :] = self._suffix
        self._simulate(lambda: (self._reset(seed), 0.0))
        return self._obs.copy(), {"diverged": self._diverged}

    def step(self, action):
        action = np.asarray(action)
        if action.shape != self.action_space.shape:
            raise ValueError(f"action must have shape {self.action_space.shape}; got {action.shape}")
        if self.context.get("permutation") == 1:
            action = action[::-1]
        action = action * self.context.get("inversion", 1)
        reward = 0.0 if self._diverged else self._simulate(lambda: self._step(action))
        return self._obs.copy(), reward, False, False, {"diverged": self._diverged}

    def _simulate(self, function):
        """Takes over the observation that `function` returns; returns the reward, 0.0 if the simulation diverged."""
        try:
            obs, reward = function()
            obs = np.concatenate([obs, self._suffix], dtype=np.float32, casting="same_kind")
            if math.isfinite(reward) and np.isfinite(obs).all():
                self._obs = obs
                return float(reward)
            reason = "a value is not finite"
        except self.divergence as error:
            reason = str(error)
        self._diverged = True
        logger.warning("%s diverged in context %s (%s): no rewards from here on", self.env_id, self.context, reason)
        return 0.0

    def render(self):
        return self._camera and self._camera.picture(self)

    def _build(self):  # then `_reset(seed)` returns an observation, `_step(action)` observation and reward
        """Makes the simulation."""


class DoubleIntegrator(ContextEnv):
    """A point mass in the plane that is to be brought to the origin. `state` [4]: position and velocity in [-1, 1]."""

    def _reset(self, seed):
        position = self.np_random.uniform(0.8, 1.0, 2) * self.np_random.choice([-1.0, 1.0], 2)
        self.state = np.concatenate([position, np.zeros(2)])
        return self.state

    def _step(self, action, dt=0.1):
        mass, friction = self.context["mass"], self.context.get("friction", 0.0)
        position, velocity = self.state[:2], self.state[2:]
        force = np.clip(action.astype(np.float64), -1.0, 1.0)
        velocity_next = velocity * (1 - dt * friction / mass) + force / mass * dt
        self.state = np.clip(np.concatenate([position + velocity * dt, velocity_next]), -1.0, 1.0)
        return self.state, float(math.hypot(*self.state[:2]) <= 0.1)


class ComplexODE(ContextEnv):
    """dx/dt = Re(sum_k c_k a^(k+1)) with a complex action a = a_0 + i a_1 (Beukman et al. 2023): keep x near 0.
    `state` [1]: x in [-20, 20]."""

    def _reset(self, seed):
        self.state = self.np_random.uniform(-1.0, 1.0, 1)
        return self.state

    def _step(self, action, dt=0.01):
        a = complex(*action)
        rate = sum((c * a ** (k + 1) for k, c in enumerate(self.context.values())), 0j).real
        self.state = np.clip(self.state + dt * rate, -20.0, 20.0)
        levels = ((0.05, 1.0), (0.1, 1 / 2), (0.2, 1 / 3), (0.5, 1 / 4), (2.0, 0.05))
        return self.state, next((reward for bound, reward in levels if abs(self.state[0]) < bound), 0.0)


def _edit_geometry(spec, domain, context):
    """Writes lengths and distances into a mujoco.MjSpec; mass and inertia follow when it is compiled."""
    length = context.get("length")
    if domain == "cartpole":
        spec.geom("pole_1").fromto = [0, 0, 0, 0, 0, 2 * length]
    elif length and domain in ("cheetah", "walker"):
        in_plane = np.array([length, 1.0, length])
        for body in spec.bodies[2:]:  # after world and torso
            geom, (joint,) = body.geoms[0], body.joints
            geom.pos, geom.size[1], joint.pos = geom.pos * in_plane, geom.size[1] * length, joint.pos * in_plane
            if not body.name.endswith("thigh"):  # the thighs stay where they join the torso
                body.pos = body.pos * in_plane
    elif domain == "reacher":
        for name in ("hand", "finger"):
            spec.body(name).pos[0] *= length
        for name in ("arm", "hand"):
            spec.geom(name).fromto[3] *= length
    elif domain == "ball_in_cup":
        string = spec.tendon("string")
        spec.body("ball").pos[2] += string.range[1] - context["distance"]
        string.range[1] = context["distance"]


def _edit_compiled(model, context):
    """Writes gravity and actuator strength into a compiled mujoco.MjModel."""
    if "gravity" in context:
        model.opt.gravity[2] = -context["gravity"]
    model.actuator_gear *= context.get("actuator_strength", 1.0)


@functools.cache
def _load_suite(domain, task):
    """dm_control's own environment and its model source, loaded once."""
    module = importlib.import_module(f"dm_control.suite.{domain}")
    return module.SUITE[task](), *module.get_model_and_assets()


class SuiteEnv(ContextEnv):
    """A dm_control suite task on an edited model. Rewards, observations and resets are the suite's own."""

    def _build(self, domain, task):
        import mujoco
        from dm_control.mujoco import wrapper
        from dm_control.rl import control

        original, xml, assets = _load_suite(domain, task)
        spec = mujoco.MjSpec.from_string(xml if isinstance(xml, str) else xml.decode(), include=assets)
        for texture in spec.textures:
            if texture.type == mujoco.mjtTexture.mjTEXTURE_SKYBOX:  # a gradient: in full, 12 MB and slow to compile
                texture.width, texture.height = 16, 96
        _edit_geometry(spec, domain, self.context)
        self.model = spec.compile()
        _edit_compiled(self.model, self.context)
        physics, own_task = type(original.physics).from_model(wrapper.MjModel(self.model)), copy.deepcopy(original.task)
        own_task.random.seed()
        self._suite = control.Environment(physics, own_task, control_timestep=original.control_timestep())
        self.data, self.divergence = physics.data.ptr, (ArithmeticError, control.PhysicsError)

    def _reset(self, seed):
        if seed is not None:  # below 2**32 as the suite's own task does it
            self._suite.task.random.seed(seed if seed < 2**32 else np.random.SeedSequence(seed).generate_state(4))
        return self._flatten(self._suite.reset())

    def _step(self, action):
        timestep = self._suite.step(action)
        return self._flatten(timestep), timestep.reward

    def _flatten(self, timestep):
        return np.concatenate([np.ravel(part) for part in timestep.observation.values()])


class GymEnv(ContextEnv):
    """A gymnasium MuJoCo environment that never terminates, with edited gravity and gears."""

    def _build(self, module, name):
        from dm_control.mujoco import wrapper  # noqa: F401 (it sends what MuJoCo prints to absl's logger)
        from mujoco import mjtWarning as w

        cls = getattr(importlib.import_module(f"gymnasium.envs.mujoco.{module}"), name)
        self._gym = cls(terminate_when_unhealthy=False)
        self.model, self.data = self._gym.model, self._gym.data
        _edit_compiled(self.model, self.context)
        self._bad = [int(x) for x in (w.mjWARN_BADQPOS, w.mjWARN_BADQVEL, w.mjWARN_BADQACC, w.mjWARN_BADCTRL)]

    def _reset(self, seed):
        return self._gym.reset(seed=seed)[0]

    def _step(self, action):
        obs, reward, *_ = self._gym.step(action)
        if self.data.warning.number[self._bad].any():
            raise ArithmeticError("MuJoCo reports a bad state")  # and has reset itself: the numbers look fine
        return obs, reward


for _id, _task in TASKS.items():
    _entry = f"aib_envs:{_task.physics.split()[0]}"
    gym.register(f"AIB/{_id}-v0", _entry, kwargs={"env_id": _id}, max_episode_steps=_task.steps)


def make_vec(env_id, contexts, **options):
    """A gymnasium vector environment, one environment per context, that steps them in lockstep and never resets itself.
    `options` go to gymnasium.make. `infos["diverged"]` [n] tells which simulations have diverged in this episode."""
    get_task(env_id)
    make = functools.partial(gym.make, f"AIB/{env_id}-v0", disable_env_checker=True, **options)
    makers = [functools.partial(make, context=context) for context in contexts]
    return gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.DISABLED)


# --------------------------------------------------- Evaluation protocol ----------------------------------------------


def reset_seeds(num_envs, *key):
    """One reset seed (int) per environment, which depends on `key` (ints >= 0) and the environment's index only."""
    return [int(np.random.SeedSequence([*key, i]).generate_state(1)[0]) for i in range(num_envs)]


class History:
    """The running episode of n environments in lockstep: K warm-up steps, then T steps, every observation stored once.

    obs [n, K + T + 2, obs_dim]: K + 1 observations of the warm-up, T + 1 of the episode. actions [n, K + T, act_dim].
    rewards [n, T]. lengths [n]: steps before the simulation diverged, if it did. t: the current step, from -K (start of
    the warm-up) and 0 (start of the episode) on.
    """

    def __init__(self, num_envs, window, steps, obs_dim, act_dim):
        self.window_size = window
        self.obs = np.zeros((num_envs, window + steps + 2, obs_dim), np.float32)
        self.actions = np.zeros((num_envs, window + steps, act_dim), np.float32)
        self.rewards = np.zeros((num_envs, steps), np.float32)
        self.lengths = np.zeros(num_envs, np.int64)
        self.begin()

    def begin(self):
        """Starts a new episode; nothing of the last one is seen any more."""
        self.t = -self.window_size
        self.lengths[:] = 0

    def add(self, obs, actions, rewards, next_obs, diverged):
        """Appends the transition of step `t`: [n, obs_dim], [n, act_dim], [n], [n, obs_dim], [n]."""
        i = self.t + self.window_size
        position = i + (self.t >= 0)
        self.obs[:, position], self.obs[:, position + 1], self.actions[:, i] = obs, next_obs, actions
        if self.t >= 0:
            self.rewards[:, self.t] = rewards
            self.lengths += ~diverged
        self.t += 1

    def window(self, positions):
        """Past transitions at `positions` [n or 1, m] of the window: 0 is the oldest, K - 1 the one just before `t`.
        Returns obs, actions and deltas (next_obs - obs), each [n, m, dim]; zeros for what lies before the warm-up."""
        i = self.t + positions
        row, known, i = np.arange(len(self.obs))[:, None], (i >= 0)[..., None], np.maximum(i, 0)
        position = i + (i >= self.window_size)
        obs = self.obs[row, position]
        return obs * known, self.actions[row, i] * known, (self.obs[row, position + 1] - obs) * known


def eval_contexts(env_id):
    """The 60 contexts of an evaluation: 20 of train, of eval-in and of eval-out."""
    return [context for split in SPLITS for context in context_set(env_id, split)]


def by_split(returns):
    """What `evaluate` returns in `eval_contexts` [60, rollouts], as {split: [20, rollouts]}."""
    return dict(zip(SPLITS, np.split(returns, len(SPLITS)), strict=True))


def evaluate(envs, policy, window, rollouts):
    """The benchmark's protocol: undiscounted returns [n, rollouts] of `policy` in the n environments of a `make_vec`.

    `policy(obs [n, obs_dim], history) -> actions [n, act_dim]` must be deterministic. With `window` = K > 0 every
    rollout begins with K warm-up steps, which fill the window and earn nothing. Reset seeds depend on the rollout and
    on the environment's place in `envs` (so with `eval_contexts` on set and context) only.
    """
    task = get_task(envs.envs[0].unwrapped.env_id)
    history = History(envs.num_envs, window, task.steps, envs.single_observation_space.shape[0], task.act_dim)
    returns = np.zeros((envs.num_envs, rollouts))
    for rollout in range(rollouts):
        history.begin()
        for t in range(-window, task.steps):
            if t in (-window, 0):
                obs, _ = envs.reset(seed=reset_seeds(envs.num_envs, 1, rollout, int(t < 0)))
            actions = policy(obs, history)
            next_obs, rewards, _, _, infos = envs.step(actions)
            history.add(obs, actions, rewards, next_obs, infos["diverged"])
            returns[:, rollout] += rewards * (t >= 0)
            obs = next_obs
    return returns
