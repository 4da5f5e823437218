"""The benchmark: tasks against the environments that they are built on, closed forms, context sets, protocol."""

import copy
import functools
import itertools
import json
import logging
import math
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from dm_control import suite
from dm_control.suite import cartpole, cheetah, reacher
from gymnasium.utils.env_checker import check_env
from lxml import etree

import aib_envs

ROOT = Path(__file__).parent.parent
SUITE = {
    "Cartpole": ("cartpole", "balance"),
    "Cheetah": ("cheetah", "run"),
    "Reacher-E": ("reacher", "easy"),
    "Reacher-H": ("reacher", "hard"),
    "Reacher-H-Perm": ("reacher", "hard"),
    "BallInCup": ("ball_in_cup", "catch"),
    "Walker": ("walker", "walk"),
}
GYM = {"WalkerGym": "Walker2d-v5", "HopperGym": "Hopper-v5"}


# The table of the paper, written down once more: obs/act, steps, K, overlap, training steps, upper return, and per
# dimension key, default, training range, outer range (or the two values).
MASS, INVERSION, PERMUTATION = ("mass", 1, 0.5, 1.5, 0.1, 2), ("inversion", 1, -1, 1), ("permutation", 0, 0, 1)
LENGTH, STRENGTH = ("length", 1, 0.8, 1.2, 0.4, 1.6), ("actuator_strength", 1, 0.5, 1.5, 0.1, 2)
GRAVITY, C0, C1 = ("gravity", 9.81, 4.91, 14.71, 0.98, 19.62), ("c0", 0, -5, 5, -10, 10), ("c1", 0, -5, 5, -10, 10)
TABLE = {
    "DI": (4, 2, 100, 24, False, 100_000, 100, MASS, INVERSION),
    "DI-Friction": (4, 2, 100, 24, True, 100_000, 100, MASS, ("friction", 1, 0.5, 1.5, 0.1, 2)),
    "DI-Perm": (4, 2, 100, 24, False, 100_000, 100, MASS, PERMUTATION),
    "ODE": (1, 2, 200, 24, False, 100_000, 200, C0, C1),
    "ODE-1": (1, 2, 200, 24, False, 100_000, 200, C0),
    "Cartpole": (5, 1, 1000, 128, False, 100_000, 1000, ("length", 0.5, 0.3, 0.85, 0.1, 2), INVERSION),
    "Cheetah": (17, 6, 1000, 128, False, 200_000, 1000, LENGTH, INVERSION),
    "Reacher-E": (6, 2, 1000, 128, False, 200_000, 1000, LENGTH, INVERSION),
    "Reacher-H": (6, 2, 1000, 128, False, 200_000, 1000, LENGTH, INVERSION),
    "Reacher-H-Perm": (6, 2, 1000, 128, False, 200_000, 1000, LENGTH, PERMUTATION),
    "BallInCup": (
        8,
        2,
        1000,
        128,
        True,
        200_000,
        1000,
        ("gravity", 9.81, 8, 12, 1, 20),
        ("distance", 0.3, 0.24, 0.36, 0.1, 0.5),
    ),
    "Walker": (24, 6, 1000, 128, True, 200_000, 1000, GRAVITY, STRENGTH),
    "WalkerGym": (17, 6, 1000, 128, True, 500_000, 5000, GRAVITY, STRENGTH),
    "HopperGym": (11, 3, 1000, 128, True, 500_000, 4000, GRAVITY, STRENGTH),
}
IDS = [*TABLE, *(f"ODE-{k}" for k in range(2, 21))]  # of the paper: a reader's own are not here


def make(env_id, context=None, **kwargs):
    return gym.make(f"AIB/{env_id}-v0", context=context, **kwargs).unwrapped


def actions_for(env, count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *env.action_space.shape)).astype(np.float32)


def started(env_id, context=None, **kwargs):
    env = make(env_id, context, **kwargs)
    env.reset(seed=7)
    return env


def rollout(env, actions, seed=7):
    """Observations and rewards of a whole action sequence."""
    obs, _ = env.reset(seed=seed)
    steps = [env.step(action)[:2] for action in actions]
    return np.stack([obs, *(o for o, _ in steps)]), np.array([r for _, r in steps])


# ------------------------------------------------------- gymnasium ----------------------------------------------------


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_checker(env_id):
    check_env(make(env_id, aib_envs.context_set(env_id, "eval-out")[3]), skip_render_check=True)


@pytest.mark.parametrize("env_id", ["DI", "ODE"])
def test_time_limit_truncates_and_nothing_terminates(env_id):
    env = gym.make(f"AIB/{env_id}-v0")
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(aib_envs.TASKS[env_id].steps)]
    assert not any(terminated for terminated, _ in ends)
    assert [truncated for _, truncated in ends].index(True) == aib_envs.TASKS[env_id].steps - 1


@pytest.mark.parametrize("env_id", TABLE)
def test_task_table_is_the_papers(env_id):
    task = aib_envs.get_task(env_id)
    row = (task.obs_dim, task.act_dim, task.steps, task.window, task.overlap, task.total_timesteps, task.bounds[1])
    dimensions = [(d.key, d.default, *(d.values or (*d.inner, *d.outer))) for d in task.dimensions]
    assert (*row, *dimensions) == TABLE[env_id] and task.bounds[0] == 0
    assert make(env_id).context == {key: default for key, default, *_ in TABLE[env_id][7:]}
    assert make(env_id).reset(seed=0)[0].shape == (task.obs_dim,)


def test_ode_k_has_k_coefficients():
    for k in range(1, 21):
        keys = [dimension.key for dimension in aib_envs.TASKS[f"ODE-{k}"].dimensions]
        assert keys == [f"c{i}" for i in range(k)]


# ------------------------------------ the default context is the original environment ---------------------------------


@pytest.mark.parametrize("env_id", SUITE)
def test_default_context_is_the_suite_task(env_id):
    env, original = make(env_id), suite.load(*SUITE[env_id], task_kwargs={"random": 7})
    obs, _ = env.reset(seed=7)
    timestep = original.reset()
    assert aib_envs.TASKS[env_id].steps == round(original._step_limit)
    for action in actions_for(env, 100):
        expected = np.concatenate([np.ravel(part) for part in timestep.observation.values()])
        assert np.array_equal(obs, expected.astype(np.float32))
        for name in ("qpos", "qvel", "act", "ctrl"):
            assert np.array_equal(getattr(env.data, name), getattr(original.physics.data, name))
        obs, reward, *_ = env.step(action)
        timestep = original.step(action)
        assert reward == timestep.reward


@pytest.mark.parametrize("env_id", GYM)
def test_default_context_is_the_gymnasium_environment(env_id):
    env, original = make(env_id), gym.make(GYM[env_id], terminate_when_unhealthy=False).unwrapped
    obs, _ = env.reset(seed=7)
    expected, _ = original.reset(seed=7)
    for action in actions_for(env, 100):
        assert np.array_equal(obs, expected.astype(np.float32))
        assert np.array_equal(env.data.qpos, original.data.qpos) and np.array_equal(env.data.qvel, original.data.qvel)
        obs, reward, *_ = env.step(action)
        expected, expected_reward, *_ = original.step(action)
        assert reward == expected_reward


@pytest.mark.parametrize("env_id", ["Cartpole", "Cheetah"])
def test_resets_without_a_seed_go_on_as_the_suites(env_id):
    env, original = make(env_id), suite.load(*SUITE[env_id], task_kwargs={"random": 7})
    env.reset(seed=7)
    for _ in range(3):
        original.reset()
        assert np.array_equal(env.data.qpos, original.physics.data.qpos)
        env.reset()
    one, other = make(env_id).reset()[0], make(env_id).reset()[0]
    assert not np.array_equal(one, other)  # never seeded
    assert np.array_equal(env.reset(seed=2**40)[0], make(env_id).reset(seed=2**40)[0])  # any seed of gymnasium's


@pytest.mark.parametrize("env_id", ["DI", "ODE", "Cartpole", "HopperGym"])
def test_actions_are_clipped_in_every_task(env_id):
    env = make(env_id, aib_envs.context_set(env_id, "train")[1])
    wild = 3 * actions_for(env, 30)
    assert np.abs(wild).max() > 2
    for seen, expected in zip(rollout(env, wild), rollout(env, np.clip(wild, -1, 1)), strict=True):
        assert np.array_equal(seen, expected)


@pytest.mark.parametrize("env_id", ["DI", "ODE", "Cheetah", "HopperGym"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_environment_and_its_copies_begin_with_a_reset(env_id, wrapped):
    env = gym.make(f"AIB/{env_id}-v0", render_mode="rgb_array")
    env = env if wrapped else env.unwrapped
    action = np.zeros(env.action_space.shape, np.float32)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(action)
    with pytest.raises(gym.error.ResetNeeded):
        env.render()
    expected, _ = env.reset(seed=3)
    env.step(action)
    for other in (copy.deepcopy(env), pickle.loads(pickle.dumps(env)), copy.copy(env.unwrapped)):
        with pytest.raises(gym.error.ResetNeeded) as error:
            other.step(action)
        assert "\n" not in str(error.value)
        assert np.array_equal(other.reset(seed=3)[0], expected)
    env.step(action)  # the original goes on


@pytest.mark.parametrize("env_id", ["DI", "Cheetah", "Reacher-H-Perm"])
def test_flip_in_the_middle_of_an_episode(env_id):
    key = aib_envs.get_task(env_id).dimensions[1].key
    env, twin = started(env_id, observe_context="raw"), started(env_id)
    before = env.context[key]
    for t, action in enumerate(actions_for(env, 40)):
        mirrored = action
        if t >= 20:  # what the twin, which is never flipped, has to do to move in the same way
            mirrored = action[::-1] if key == "permutation" else -action
        if t == 20:
            env.flip()
            assert env.context[key] != before and env.context[key] in aib_envs.get_task(env_id).dimensions[1].values
        obs, reward, *_ = env.step(action)
        twin_obs, twin_reward, *_ = twin.step(mirrored)
        assert np.array_equal(obs[:-2], twin_obs) and reward == twin_reward
        assert obs[-1] == env.context[key]
    env.flip()
    assert env.context[key] == before
    env.flip()
    assert copy.deepcopy(env).context[key] == before  # as it was made
    obs, _ = env.reset()
    assert env.context[key] == before == obs[-1]


@pytest.mark.parametrize("env_id", ["DI", "Cheetah", "HopperGym"])
def test_copies_keep_the_context(env_id):
    context = aib_envs.context_set(env_id, "eval-out")[0]
    mine = dict(context)
    env, actions = make(env_id, mine), actions_for(make(env_id), 5)
    mine.clear()
    for other in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert other.context == context
        assert np.array_equal(rollout(env, actions)[0], rollout(other, actions)[0])


@pytest.mark.parametrize("env_id", ["DI", "Cartpole", "Cheetah", "Reacher-E", "Reacher-H"])
def test_inversion_mirrors_the_actions_exactly(env_id):
    plus, minus = make(env_id, {"inversion": 1}), make(env_id, {"inversion": -1})
    actions = actions_for(plus, 100)
    obs, rewards = rollout(plus, actions)
    mirrored_obs, mirrored_rewards = rollout(minus, -actions)
    assert np.array_equal(obs, mirrored_obs) and np.array_equal(rewards, mirrored_rewards)
    assert not np.array_equal(obs, rollout(minus, actions)[0])


@pytest.mark.parametrize("env_id", ["DI-Perm", "Reacher-H-Perm"])
def test_permutation_swaps_the_actions_exactly(env_id):
    straight, swapped = make(env_id, {"permutation": 0}), make(env_id, {"permutation": 1})
    actions = actions_for(straight, 100)
    obs, rewards = rollout(straight, actions)
    swapped_obs, swapped_rewards = rollout(swapped, actions[:, ::-1])
    assert np.array_equal(obs, swapped_obs) and np.array_equal(rewards, swapped_rewards)
    assert not np.array_equal(obs, rollout(swapped, actions)[0])


# ------------------------------------------------------ context sets --------------------------------------------------


@pytest.mark.parametrize("env_id", IDS)
def test_context_sets_are_disjoint_in_the_continuous_dimensions(env_id):
    dimensions = aib_envs.TASKS[env_id].dimensions
    sets = {split: aib_envs.context_set(env_id, split) for split in aib_envs.SPLITS}
    for split, contexts in sets.items():
        assert len(contexts) == 20 and contexts == aib_envs.context_set(env_id, split)
        assert len({tuple(context.values()) for context in contexts}) == 20
        assert all(list(context) == [dimension.key for dimension in dimensions] for context in contexts)
    for dimension in dimensions:
        train, inside, outside = ({context[dimension.key] for context in sets[split]} for split in aib_envs.SPLITS)
        if dimension.values:
            assert train == inside == outside == set(dimension.values)
            continue
        (a, b), (outer_a, outer_b) = dimension.inner, dimension.outer
        assert not train & inside and not train & outside and not inside & outside
        assert all(a <= value <= b for value in train) and all(a < value < b for value in inside)
        assert all(outer_a <= value < a or b < value <= outer_b for value in outside)


@pytest.mark.parametrize("env_id", [env_id for env_id in TABLE if env_id != "ODE-1"])
@pytest.mark.parametrize("split", aib_envs.SPLITS)
def test_context_sets_recomputed_from_the_table(env_id, split):
    points = []
    for _, _, *numbers in TABLE[env_id][7:]:
        if len(numbers) == 2:
            points.append(numbers)
            continue
        a, b, low, high = numbers
        margin = (b - a) / 100
        between = lambda start, stop, n: [start + (stop - start) * i / (n - 1) for i in range(n)]
        values = {
            "train": between(a, b, 50),
            "eval-in": between(a + margin, b - margin, 50),
            "eval-out": between(low, a - margin, 25) + between(b + margin, high, 25),
        }
        points.append(values[split])
    grid = [(x, y) for x in points[0] for y in points[1]]
    expected = np.array([grid[i * (len(grid) - 1) // 19] for i in range(20)])
    contexts = np.array([tuple(context.values()) for context in aib_envs.context_set(env_id, split)])
    assert np.abs(contexts - expected).max() <= 0.5001e-4  # rounded to four digits, half of the last one away at most


def test_context_sets_have_the_published_values():
    rows = lambda env_id, split: [tuple(context.values()) for context in aib_envs.context_set(env_id, split)]
    assert rows("DI", "train")[:3] == [(0.5, -1), (0.5408, 1), (0.602, -1)] and rows("DI", "train")[-1] == (1.5, 1)
    assert rows("Walker", "train")[:3] == [(4.91, 0.5), (5.31, 1.1327), (5.91, 0.7653)]
    assert rows("Cheetah", "eval-out")[:2] == [(0.4, -1), (0.433, 1)]
    assert [row[0] for row in rows("ODE-1", "train")][:2] == [-5.0, -4.5918]
    assert rows("ODE", "train") == rows("ODE-2", "train")
    masses = [mass for mass, _ in rows("DI", "eval-out")]  # as np.round rounds 0.21375, 1.57125 and 1.93875
    assert (masses[3], masses[11], masses[18]) == (0.2138, 1.5712, 1.9388)
    modes = [row[1] for row in rows("DI", "train")]
    assert sorted((modes.count(-1), modes.count(1))) == [9, 11]


def test_ode_k_draws_do_not_depend_on_global_seeds():
    first = aib_envs.context_set("ODE-5", "train")
    np.random.seed(123)  # noqa: NPY002
    assert aib_envs.context_set("ODE-5", "train") == first == sorted(first, key=lambda c: tuple(c.values()))
    heads = [tuple(aib_envs.context_set("ODE-3", split)[0].values()) for split in aib_envs.SPLITS]  # must not change
    assert heads == [(-4.7959, -3.3673, -4.5918), (-3.5, 1.3, -0.1), (-10.0, 7.7542, -6.9375)]


# ------------------------------------------------------- closed forms -------------------------------------------------


@pytest.mark.parametrize(("mass", "friction"), [(0.5, 0.0), (1.3, 0.0), (0.7, 1.4), (1.9, 0.3)])
def test_double_integrator_closed_form(mass, friction):
    env = make("DI-Friction", {"mass": mass, "friction": friction}) if friction else make("DI", {"mass": mass})
    env.reset(seed=0)
    start, force, dt, steps = np.array([-0.9, 0.85]), np.array([0.3, -0.2]), 0.1, 12
    env.state = np.concatenate([start, np.zeros(2)])
    for _ in range(steps):
        obs, *_ = env.step(force)
    k, keep = np.arange(steps), 1 - dt * friction / mass
    velocity = lambda n: force * dt / mass * (keep ** np.arange(n)).sum()
    position = start + dt * sum(velocity(n) for n in k)
    assert np.abs(np.concatenate([position, velocity(steps)])).max() < 1  # no clipping on the way
    np.testing.assert_allclose(env.state, [*position, *velocity(steps)], rtol=1e-12)
    np.testing.assert_allclose(obs, env.state, rtol=1e-6)


def test_double_integrator_clips_and_rewards():
    env = make("DI")
    env.reset(seed=0)
    env.state[:] = [0.06, 0.08, 0.0, 0.0]  # exactly 0.1 away, up to rounding
    assert env.step(np.zeros(2))[1] == float(math.hypot(0.06, 0.08) <= 0.1)
    env.state[:] = [0.1001, 0.0, 0.0, 0.0]
    assert env.step(np.zeros(2))[1] == 0.0
    env.state[:] = [0.0, 0.0, 1.0, 0.0]
    assert env.step(np.zeros(2))[1] == 1.0  # position moves by the old velocity: 0.1
    env.state[:] = [0.99, -0.99, 1.0, -1.0]
    env.step(np.array([5.0, -5.0]))  # forces are clipped to 1, position and velocity too
    assert env.state.tolist() == [1.0, -1.0, 1.0, -1.0]
    env.state[:] = [0.15, 0.0, -1.0, 0.0]
    assert env.step(np.zeros(2))[1] == 1.0  # the reward looks at the new position
    env.state[:] = 0.0
    env.step(np.array([5.0, 0.5]))
    np.testing.assert_allclose(env.state, [0, 0, 0.1, 0.05])  # a force of 5 is one of 1
    quadrants = set()
    for seed in range(40):
        obs, _ = env.reset(seed=seed)
        assert ((np.abs(obs[:2]) > 0.8) & (np.abs(obs[:2]) < 1)).all() and (obs[2:] == 0).all()
        quadrants.add(tuple(np.sign(obs[:2])))
    assert len(quadrants) == 4


def test_ode_closed_form():
    context = {"c0": 1.5, "c1": -2.0, "c2": 3.0, "c3": 0.5, "c4": -4.0}
    env = make("ODE-5", context)
    env.reset(seed=0)
    env.state[:] = 0.25
    radius, angle, steps = 0.8, 2.1, 30
    for _ in range(steps):
        env.step(np.array([radius * math.cos(angle), radius * math.sin(angle)]))
    rate = sum(c * radius ** (k + 1) * math.cos((k + 1) * angle) for k, c in enumerate(context.values()))
    np.testing.assert_allclose(env.state[0], 0.25 + 0.01 * steps * rate, rtol=1e-10)


def test_ode_rewards_and_bounds():
    env = make("ODE-1", {"c0": 5.0})
    env.reset(seed=0)
    levels = [(0.05, 1), (0.1, 1 / 2), (0.2, 1 / 3), (0.5, 1 / 4), (2.0, 0.05), (math.inf, 0)]
    for (bound, reward), (_, next_reward) in itertools.pairwise(levels):
        for sign in (-1, 1):
            for x, expected in ((0.999 * bound, reward), (bound, next_reward)):
                env.state[:] = sign * x
                assert env.step(np.zeros(2))[1] == expected
    for sign in (-1, 1):
        env.state[:] = sign * 19.999
        env.step(np.array([sign, 0.0]))
        assert env.state[0] == sign * 20.0
    starts = np.array([env.reset(seed=seed)[0][0] for seed in range(200)])
    assert -1 < starts.min() < -0.9 and 0.9 < starts.max() < 1


# --------------------------------------------------------- physics ----------------------------------------------------


def compiled(module, edit):
    """The suite's model compiled from XML whose attributes `edit(element by tag and name)` has changed by hand."""
    xml, assets = module.get_model_and_assets()
    root = etree.fromstring(xml)
    edit(lambda tag, name: next(e for e in root.iter(tag) if e.get("name") == name))
    return mujoco.MjModel.from_xml_string(etree.tostring(root).decode(), assets)


def scale(element, attribute, factors):
    values = [float(x) * f for x, f in zip(element.get(attribute).split(), factors, strict=True)]
    element.set(attribute, " ".join(repr(value) for value in values))


def assert_same_bodies(model, expected):
    for name in ("body_mass", "body_inertia", "body_ipos", "body_pos", "geom_pos", "geom_size", "jnt_range"):
        np.testing.assert_allclose(getattr(model, name), getattr(expected, name), rtol=1e-12, atol=1e-14, err_msg=name)


def test_cheetah_length_is_the_hand_edited_model():
    def edit(find):
        for name in ("bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot"):
            scale(find("geom", name), "pos", (1.2, 1, 1.2))
            scale(find("geom", name), "size", (1, 1.2))
        for name in ("bshin", "bfoot", "fshin", "ffoot"):
            scale(find("body", name), "pos", (1.2, 1, 1.2))

    longer, default = make("Cheetah", {"length": 1.2}).model, make("Cheetah").model
    assert_same_bodies(longer, compiled(cheetah, edit))
    leg = mujoco.mj_name2id(longer, mujoco.mjtObj.mjOBJ_BODY, "bshin")
    assert longer.body_inertia[leg].max() > 1.3 * default.body_inertia[leg].max()
    np.testing.assert_allclose(longer.body_mass.sum(), 14)  # the suite fixes the total mass


def test_reacher_length_is_the_hand_edited_model():
    def edit(find):
        for name in ("hand", "finger"):
            scale(find("body", name), "pos", (0.7, 1, 1))
        for name in ("arm", "hand"):
            scale(find("geom", name), "fromto", (1, 1, 1, 0.7, 1, 1))

    assert_same_bodies(make("Reacher-E", {"length": 0.7}).model, compiled(reacher, edit))


def test_cartpole_length_is_the_hand_edited_model():
    def edit(find):
        find("geom", "pole_1").set("fromto", "0 0 0 0 0 1.6")

    model = make("Cartpole", {"length": 0.8}).model
    assert_same_bodies(model, compiled(cartpole, edit))
    np.testing.assert_allclose([model.body("pole_1").mass[0], model.body("pole_1").ipos[2]], [0.1, 0.8])


def test_ball_in_cup_gravity_and_distance():
    env, default = make("BallInCup", {"gravity": 12.5, "distance": 0.22}), make("BallInCup")
    assert env.model.opt.gravity.tolist() == [0, 0, -12.5] and default.model.opt.gravity[2] == -9.81
    assert env.model.tendon_range.tolist() == [[0, 0.22]]
    np.testing.assert_allclose(env.model.body("ball").pos - default.model.body("ball").pos, [0, 0, 0.08], atol=1e-15)


@pytest.mark.parametrize("env_id", ["Walker", "WalkerGym", "HopperGym"])
def test_gravity_and_actuator_strength(env_id):
    env, default = make(env_id, {"gravity": 3.7, "actuator_strength": 1.4}), make(env_id)
    assert env.model.opt.gravity.tolist() == [0, 0, -3.7]
    assert np.array_equal(env.model.actuator_gear, 1.4 * default.model.actuator_gear)
    env.reset(seed=0)
    default.reset(seed=0)
    env.step(actions_for(env, 1)[0])
    default.step(actions_for(env, 1)[0])
    torque = env.data.qfrc_actuator[3:], default.data.qfrc_actuator[3:]
    np.testing.assert_allclose(torque[0], 1.4 * torque[1], rtol=1e-12)


# -------------------------------------------------------- divergence --------------------------------------------------


@pytest.mark.parametrize("env_id", ["Cheetah", "Cartpole", "HopperGym", "DI", "ODE"])
def test_divergence_holds_the_observation_and_ends_rewards(env_id, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    env = make(env_id)
    env.reset(seed=1)
    zero = np.zeros(env.action_space.shape, np.float32)
    held, _, _, _, info = env.step(zero)
    assert info == {"diverged": False}
    if hasattr(env, "state"):
        env.state[:] = np.nan
    else:
        env.data.qvel[:] = np.inf
    with caplog.at_level(logging.WARNING, "aib_envs"):
        for _ in range(3):
            obs, reward, terminated, truncated, info = env.step(zero)
            assert np.array_equal(obs, held) and reward == 0.0 and info == {"diverged": True}
            assert not terminated and not truncated
            obs[:] = 9  # the caller's own copy
    assert len(caplog.records) == 1 and env_id in caplog.text
    obs, info = env.reset(seed=1)
    assert info == {"diverged": False} and env.step(zero)[4] == {"diverged": False}
    assert np.array_equal(rollout(env, [zero], seed=1)[0][1], held)  # nothing of it is left


@pytest.mark.parametrize("field", ["qpos", "qvel", "qacc_warmstart", "ctrl"])
@pytest.mark.parametrize("env_id", ["Walker", "WalkerGym"])
def test_every_kind_of_divergence_is_seen(env_id, field, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    env, action = make(env_id), np.zeros(6, np.float32)
    env.reset(seed=0)
    if field == "ctrl":
        action[2] = np.nan
    else:
        getattr(env.data, field)[2] = 1e300 if field != "qacc_warmstart" else np.nan
    obs, reward, *_, info = env.step(action)
    if field != "qacc_warmstart":  # MuJoCo recovers from a bad warm start by itself
        assert info["diverged"] and reward == 0
    assert np.isfinite(obs).all() and np.isfinite(reward)
    out, err = capfd.readouterr()
    assert not out and "Nan" not in err


def test_divergence_in_reset_and_of_the_reward(monkeypatch):
    env = make("DI", {"mass": 2.0}, observe_context="raw")
    env.reset(seed=0)
    monkeypatch.setattr(env, "_step", lambda action: (env.state, math.nan))
    assert env.step(np.zeros(2))[1:] == (0.0, False, False, {"diverged": True})

    def fails(seed):
        raise ArithmeticError("no start")

    monkeypatch.setattr(env, "_reset", fails)
    obs, info = env.reset(seed=0)
    assert info == {"diverged": True} and obs.tolist() == [0, 0, 0, 0, 2, 1]
    assert env.step(np.zeros(2))[1:] == (0.0, False, False, {"diverged": True})


def test_history_counts_the_steps_before_a_divergence_and_keeps_rewards():
    history = aib_envs.History(2, 3, 5, 1, 1)
    for t in range(-3, 5):
        obs, diverged = np.full((2, 1), t), np.array([t >= 2, t == -2])
        history.add(obs, np.zeros((2, 1)), np.array([t, 10 * t]), obs + 1, diverged)
    assert history.lengths.tolist() == [2, 5]
    assert history.rewards.tolist() == [[0, 1, 2, 3, 4], [0, 10, 20, 30, 40]]


def test_observations_are_the_callers_own():
    env = make("DI")
    first, _ = env.reset(seed=0)
    second = env.step(np.ones(2))[0]
    kept = second.copy()
    env.step(np.ones(2))
    assert first is not second and np.array_equal(second, kept)
    second[:] = 9
    assert not (env.step(np.zeros(2))[0] == 9).any()


# --------------------------------------------------------- bad input --------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aib_envs.get_task("Cheeta"), "'Cheeta'.*Cheetah.*DI, "),
        (lambda: aib_envs.get_task("ODE-21"), "'ODE-21'.*ODE-20"),
        (lambda: aib_envs.get_task(["DI"]), "DI"),
        (lambda: aib_envs.context_set("DI", "eval"), "'eval'.*train, eval-in, eval-out"),
        (lambda: make("DI", {"mas": 1.0}), "'mas'.*mass, inversion"),
        (lambda: make("DI", {"gravity": 1.0}), "'gravity'.*mass, inversion"),
        (lambda: make("DI", {"mass": math.nan}), "mass.*nan"),
        (lambda: make("DI", {"mass": -1.0}), "mass.*0.001.*1000.*-1"),
        (lambda: make("DI", {"mass": True}), "mass.*True"),
        (lambda: make("DI", {"mass": None}), "mass.*None"),
        (lambda: make("DI", {"mass": [1.0]}), "mass"),
        (lambda: make("DI", {"mass": "heavy"}), "mass.*heavy"),
        (lambda: make("DI", {"mass": 10**400}), "mass"),
        (lambda: make("ODE", {"c0": 10**400}), "c0"),
        (lambda: make("DI", [1.0]), "mass, inversion"),
        (lambda: make("DI", 0), "mass, inversion"),
        (lambda: make("DI", {"inversion": 0}), "inversion.*-1 or 1"),
        (lambda: make("DI-Perm", {"permutation": 2}), "permutation.*0 or 1"),
        (lambda: make("BallInCup", {"distance": 1.0}), "distance.*0.01.*0.9"),
        (lambda: make("Cheetah", {"length": 0.0}), "length"),
        (lambda: make("Walker", {"gravity": -9.81}), "gravity.* 0 "),
        (lambda: make("Walker", {"actuator_strength": math.inf}), "actuator_strength.*inf"),
        (lambda: make("DI", observe_context="yes"), "'yes'.*raw, scaled"),
        (lambda: aib_envs.DoubleIntegrator("DI", render_mode="human"), "'human'.*rgb_array"),
        (lambda: make("DI").reset(options={"context": {"mass": 1.0}}), "options.*context"),
        (lambda: make("Cheetah").reset(options={"seed": 1}), "options.*seed"),
        (lambda: started("DI").step(np.zeros(3)), r"\(2,\).*\(3,\)"),
        (lambda: started("Walker").flip(), "Walker"),
    ],
)
def test_bad_input_gets_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_numbers_of_any_type_are_taken_in_table_order():
    context = {"actuator_strength": np.float32(0.5), "gravity": np.uint8(10)}
    env = make("Walker", context)
    assert list(env.context.items()) == [("gravity", 10.0), ("actuator_strength", 0.5)]
    assert env.model.opt.gravity[2] == -10 and type(env.context["gravity"]) is float


def test_the_whole_range_of_a_context_can_be_reset():
    for distance in (0.01, 0.9):  # a ball hung so low that it touches the ground would be placed for ever
        assert np.isfinite(make("BallInCup", {"distance": distance}).reset(seed=0)[0]).all()


# ---------------------------------------------------- a row of one's own ---------------------------------------------


def add_task(monkeypatch, like, **changes):
    """Adds the row "Mine", which is that of `like` with `changes`."""
    monkeypatch.setitem(aib_envs.TASKS, "Mine", replace(aib_envs.TASKS[like], **changes))
    spec = gym.envs.registration.EnvSpec(
        "AIB/Mine-v0", gym.registry[f"AIB/{like}-v0"].entry_point, kwargs={"env_id": "Mine"}
    )
    monkeypatch.setitem(gym.registry, "AIB/Mine-v0", spec)


def test_a_task_of_another_file_that_gymnasium_does_not_know_is_named(monkeypatch, tmp_path):
    code = 'import aib_envs\naib_envs.TASKS |= {"Other": aib_envs.TASKS["DI"]}\n'
    (tmp_path / "tasks_without_registration.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(aib_envs, "TASKS", dict(aib_envs.TASKS))
    with pytest.raises(ValueError, match=r"gymnasium\.register\('AIB/Other-v0'"):
        aib_envs.get_task("tasks_without_registration:Other")


def test_a_task_file_may_lie_where_one_starts(monkeypatch, tmp_path):
    code = "import aib_envs, gymnasium\naib_envs.TASKS |= {'Here': aib_envs.TASKS['DI']}\n"
    code += "gymnasium.register('AIB/Here-v0', 'aib_envs:DoubleIntegrator', kwargs={'env_id': 'Here'})\n"
    (tmp_path / "tasks_where_one_starts.py").write_text(code)
    monkeypatch.setattr(aib_envs, "TASKS", dict(aib_envs.TASKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert aib_envs.get_task("tasks_where_one_starts:Here") == aib_envs.TASKS["DI"]
    gym.registry.pop("AIB/Here-v0")
    with pytest.raises(ValueError, match="DI is a task of the benchmark"):
        aib_envs.get_task("tasks_where_one_starts:DI")


@pytest.mark.parametrize("env_id", ["DI", "ODE-3", "Cheetah", "HopperGym"])
@pytest.mark.parametrize("field", ["obs_dim", "act_dim"])
def test_a_row_with_wrong_sizes_is_named_with_the_right_ones(env_id, field, monkeypatch):
    task = aib_envs.TASKS[env_id]
    add_task(monkeypatch, env_id, **{field: getattr(task, field) + 1})
    with pytest.raises(ValueError, match=f"Mine.*{task.obs_dim} and {task.act_dim}$"):
        aib_envs.make_vec("Mine", [{}])


@pytest.mark.parametrize(
    "row",
    [
        lambda: replace(aib_envs.TASKS["DI"], dimensions=(aib_envs.INVERSION,)),
        lambda: replace(aib_envs.TASKS["DI"], dimensions=(aib_envs.INVERSION, aib_envs.PERMUTATION)),
        lambda: replace(aib_envs.TASKS["DI"], dimensions=()),
        lambda: replace(aib_envs.TASKS["DI"], dimensions=(aib_envs.LENGTH, aib_envs.POLE)),
        lambda: aib_envs.Dimension("mode", 0, values=(0, 1, 2)),
        lambda: aib_envs.Dimension("mode", 0, values=(0,)),
        lambda: aib_envs.Dimension("mode", 0),
        lambda: aib_envs.Dimension("mass", 1.0, (0.5, 1.5)),
        lambda: aib_envs.Dimension("mass", 1.0, (0.5, 1.5), (0.1, 2.0), values=(0, 1)),
        lambda: aib_envs.Dimension("mass", 1.0, (0.1, 2.0), (0.5, 1.5)),
    ],
)
def test_a_row_without_20_contexts_is_refused(row):
    with pytest.raises(ValueError, match=r"mode|mass|length|DoubleIntegrator") as error:
        row()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["LENGTH", "DISTANCE"])
@pytest.mark.parametrize("env_id", ["BallInCup", "Reacher-E", "HopperGym"])
def test_a_dimension_without_effect_is_refused(env_id, key, monkeypatch):
    dimension = getattr(aib_envs, key)
    add_task(monkeypatch, env_id, dimensions=(dimension,))
    if (env_id, key) in [("BallInCup", "DISTANCE"), ("Reacher-E", "LENGTH")]:
        make("Mine")
        return
    with pytest.raises(ValueError, match=dimension.key):
        make("Mine")


def test_a_row_with_three_dimensions(monkeypatch):
    dimensions = (aib_envs.MASS, aib_envs.INVERSION, aib_envs.PERMUTATION)
    add_task(monkeypatch, "DI", dimensions=dimensions)
    for split in aib_envs.SPLITS:
        contexts = aib_envs.context_set("Mine", split)
        assert len({tuple(context.values()) for context in contexts}) == 20
        assert contexts == aib_envs.context_set("Mine", split)
    env = make("Mine", {"inversion": -1})
    env.reset(seed=0)
    env.flip()
    assert env.context == {"mass": 1.0, "inversion": 1, "permutation": 1}


def test_ode_with_inversion(monkeypatch):
    add_task(monkeypatch, "ODE-1", dimensions=(*aib_envs.COEFFICIENTS[:1], aib_envs.INVERSION))
    env = make("Mine", {"c0": 2.0, "inversion": -1})
    env.reset(seed=0)
    env.state[:] = 0.5
    env.step(np.array([1.0, 0.0]))
    np.testing.assert_allclose(env.state, 0.48)


# -------------------------------------------------------- true context ------------------------------------------------


def test_context_can_be_observed_raw_and_scaled():
    context = {"mass": 2.0, "inversion": -1}
    plain, raw, scaled = (make("DI", context, observe_context=mode) for mode in (None, "raw", "scaled"))
    obs = [env.reset(seed=3)[0] for env in (plain, raw, scaled)]
    assert [o.shape for o in obs] == [(4,), (6,), (6,)] and all(np.array_equal(obs[0], o[:4]) for o in obs)
    assert obs[1][4:].tolist() == [2.0, -1.0] and obs[2][4:].tolist() == [1.0, -1.0]
    assert aib_envs.context_vector("DI", {"mass": 0.1, "inversion": 1}, scaled=True).tolist() == [-1.0, 1.0]
    assert raw.step(np.zeros(2))[0][4:].tolist() == [2.0, -1.0]


# --------------------------------------------------- vector env, protocol ---------------------------------------------


def test_vector_env_steps_every_context_as_it_would_alone():
    contexts = aib_envs.context_set("Cartpole", "eval-out")[:4]
    envs, seeds = aib_envs.make_vec("Cartpole", contexts), aib_envs.reset_seeds(4, 5)
    obs, _ = envs.reset(seed=seeds)
    actions = np.random.default_rng(0).uniform(-1, 1, (30, 4, 1)).astype(np.float32)
    all_obs = np.stack([obs, *(envs.step(a)[0] for a in actions)])
    for i, context in enumerate(contexts):
        assert np.array_equal(all_obs[:, i], rollout(make("Cartpole", context), actions[:, i], seeds[i])[0])


def test_history_window_is_strictly_past():
    k, steps, rng = 4, 12, np.random.default_rng(0)
    envs = aib_envs.make_vec("ODE", aib_envs.context_set("ODE", "train")[:3])
    history = aib_envs.History(3, k, steps, 1, 2)
    for episode in range(2):  # nothing of the first one may show in the second
        history.begin()
        log = [(np.zeros((3, 1)), np.zeros((3, 2)), np.zeros((3, 1)))] * k  # before the warm-up
        for t in range(-k, steps):
            if t in (-k, 0):
                obs, _ = envs.reset(seed=[100 * episode + t + 10] * 3)
            for seen, expected in zip(history.window(np.arange(k)[None]), zip(*log[-k:], strict=True), strict=True):
                assert np.array_equal(seen, np.stack(expected, 1))
            actions = rng.uniform(-1, 1, (3, 2)).astype(np.float32)
            next_obs, rewards, *_, infos = envs.step(actions)
            history.add(obs, actions, rewards, next_obs, infos["diverged"])
            log.append((obs, actions, next_obs - obs))
            obs = next_obs
        assert history.lengths.tolist() == [steps] * 3 and np.array_equal(history.next_obs[:, -1], obs)
    positions = np.array([[3, 0], [1, 2], [2, 2]])  # each environment its own
    for part, column in zip(history.window(positions), zip(*log[-k:], strict=True), strict=True):
        assert all(np.array_equal(part[i, j], column[positions[i, j]][i]) for i in range(3) for j in range(2))


def test_evaluation_protocol():
    envs, calls = aib_envs.make_vec("DI", aib_envs.eval_contexts("DI")), []

    def policy(obs, history):
        calls.append((history.t, obs.copy()))
        return np.zeros((60, 2), np.float32)

    contexts = [c for split in aib_envs.SPLITS for c in aib_envs.context_set("DI", split)]
    assert [env.unwrapped.context for env in envs.envs] == contexts
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.DISABLED
    with_window, diverged = aib_envs.evaluate(envs, policy, 24, 2)
    warm_up = [obs for t, obs in calls if t == -24]
    starts = [obs for t, obs in calls if t == 0]
    assert [t for t, _ in calls] == [*range(-24, 100)] * 2 and len(starts) == 2
    assert not np.array_equal(starts[0], starts[1])  # rollouts differ
    assert not any(np.array_equal(a, b) for a, b in itertools.product(warm_up, starts))  # the warm-up has its own
    assert len(np.unique(starts[0][:, 0])) == 60  # contexts and sets differ
    calls.clear()
    without, _ = aib_envs.evaluate(envs, policy, 0, 2)
    assert all(np.array_equal(a, b) for a, b in zip(starts, [obs for t, obs in calls if t == 0], strict=True))
    for returns in (with_window, without):
        assert returns.shape == (60, 2) and returns.dtype == np.float64
    assert diverged.shape == (60, 2) and diverged.dtype == bool and not diverged.any()


def test_evaluation_tells_which_simulations_diverged(monkeypatch, caplog):
    envs = aib_envs.make_vec("DI", aib_envs.context_set("DI", "train")[:4])

    def policy(obs, history):
        nonlocal calls
        calls += 1
        when = {1: -3, 2: 0, 3: 99}  # in the warm-up, at the first step, at the last one
        for i, t in when.items():
            if t == history.t and calls <= 124:  # of the first rollout only
                envs.envs[i].unwrapped.state[:] = np.nan
        return np.zeros((4, 2), np.float32)

    calls = 0
    returns, diverged = aib_envs.evaluate(envs, policy, 24, 2)
    assert diverged.T.tolist() == [[False, True, True, True], [False] * 4]
    assert np.isfinite(returns).all() and len(caplog.records) == 3


def test_evaluation_when_nothing_can_even_start(monkeypatch):
    def fails(self, seed):
        raise ArithmeticError("no start")

    monkeypatch.setattr(aib_envs.DoubleIntegrator, "_reset", fails)
    envs = aib_envs.make_vec("DI", aib_envs.eval_contexts("DI"))
    returns, diverged = aib_envs.evaluate(envs, lambda obs, history: np.ones((60, 2)), 24, 2)
    assert not returns.any() and diverged.all()
    assert all(part.all() for part in aib_envs.by_split(diverged).values())


def test_history_stores_every_transition():
    history = aib_envs.History(2, 3, 5, 1, 2)
    for t in range(-3, 5):
        obs = np.full((2, 1), t)
        history.add(obs, np.full((2, 2), 10 * t), np.zeros(2), obs + 0.5, np.zeros(2, bool))
    assert history.obs.shape == history.next_obs.shape == (2, 8, 1) and history.actions.shape == (2, 8, 2)
    steps = np.arange(-3, 5)
    assert (history.obs[..., 0] == steps).all() and (history.next_obs[..., 0] == steps + 0.5).all()
    assert (history.actions[..., 1] == 10 * steps).all()


def test_returns_by_split():
    returns = np.arange(120.0).reshape(60, 2)
    split = aib_envs.by_split(returns)
    assert list(split) == ["train", "eval-in", "eval-out"] and all(r.shape == (20, 2) for r in split.values())
    assert split["eval-in"][0].tolist() == [40, 41] and split["eval-out"][-1].tolist() == [118, 119]


def test_evaluation_in_one_context():
    envs = aib_envs.make_vec("ODE-1", [{"c0": 0.0}])  # where x' = x: each step of an episode earns the same
    returns, _ = aib_envs.evaluate(envs, lambda obs, history: np.ones((1, 2), np.float32), 24, 3)
    levels = [(0.05, 1.0), (0.1, 1 / 2), (0.2, 1 / 3), (0.5, 1 / 4), (2.0, 0.05)]
    for rollout in range(3):
        x = envs.reset(seed=aib_envs.reset_seeds(1, 1, rollout, 0))[0][0, 0]
        assert returns[0, rollout] == pytest.approx(200 * next(r for bound, r in levels if abs(x) < bound))


def test_evaluation_counts_the_rewards_of_the_episode_only():
    envs = aib_envs.make_vec("ODE-1", aib_envs.eval_contexts("ODE-1"))

    def policy(obs, history):  # x' = x + 0.01 c Re(a): stays where it is in the warm-up, then goes to 0
        c = np.array([env.unwrapped.context["c0"] for env in envs.envs])
        a = np.clip(-obs[:, 0] / (0.01 * c), -1, 1) * (history.t >= 0)
        return np.stack([a, np.zeros(60)], 1).astype(np.float32)

    returns = aib_envs.evaluate(envs, policy, 24, 1)[0][:, 0]
    assert returns.max() <= 200 and returns.max() > 150  # 224 steps would show as more than 200
    slow = np.abs([env.unwrapped.context["c0"] for env in envs.envs]) > 4
    assert returns[slow].min() > 100


def test_reset_seeds_depend_on_key_and_index_only():
    seeds = aib_envs.reset_seeds(60, 1, 0, 0)
    assert seeds == aib_envs.reset_seeds(60, 1, 0, 0) and len(set(seeds)) == 60
    assert seeds[:20] == aib_envs.reset_seeds(20, 1, 0, 0) != aib_envs.reset_seeds(20, 1, 0, 1)


# ----------------------------------------------------------- pictures -------------------------------------------------


def test_modes():
    assert aib_envs.modes("DI-Perm") == [{"permutation": 0}, {"permutation": 1}]
    assert aib_envs.modes("Walker") == [{}]


@pytest.mark.parametrize("env_id", ["DI", "ODE", "ODE-3"])
def test_pictures_show_the_state(env_id):
    env = started(env_id, render_mode="rgb_array")
    env.state[:2] = (0.5, -0.5)[: len(env.state)]
    picture = env.render()
    assert picture.shape == (240, 320, 3) and picture.dtype == np.uint8
    y, x = np.argwhere(picture[..., 0] == 0).mean(0)
    assert abs(x - (159.5 + (0.5 if env_id == "DI" else 0.25) * 239 / 2.2)) < 1
    assert abs(y - (119.5 + (0.5 if env_id == "DI" else 0) * 239 / 2.2)) < 1
    assert started(env_id).render() is None


# Each program runs in a process of its own: what has been imported decides what MuJoCo can draw with.
PICTURE = """
    import warnings
    warnings.simplefilter("error")
    import aib_envs, gymnasium as gym
    gym.make("AIB/Cartpole-v0").reset()
    env = gym.make("AIB/Cartpole-v0", render_mode="rgb_array")
    env.reset(seed=0)
    for _ in range(3):
        try:
            picture = env.render()
            print(picture.shape, picture.std() > 5)
        except OSError as error:
            print("one line:", error)
"""
ONE_LINE = ["one line:"] * 3
SHOWN = ["(240, 320, 3) True"] * 3


def without(*names):
    """The beginning of a program that finds no shared library with these names."""
    return f"""
    import ctypes, ctypes.util
    find, load = ctypes.util.find_library, ctypes.CDLL.__init__
    def refuse(self, name, *args, **kwargs):
        if any(missing in str(name) for missing in {names}):
            raise OSError(name)
        load(self, name, *args, **kwargs)
    ctypes.util.find_library = lambda name: None if name in {names} else find(name)
    ctypes.CDLL.__init__ = refuse
    """


def run_program(*parts, **environment):
    """Runs a program without a display; MuJoCo draws with what the environment names, if anything."""
    kept = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    nowhere = {"DISPLAY": "", "WAYLAND_DISPLAY": "", "XDG_SESSION_TYPE": ""}
    return subprocess.run(
        [sys.executable, "-c", "".join(textwrap.dedent(part) for part in parts)],
        cwd=Path(aib_envs.__file__).parent,
        env=kept | nowhere | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def in_a_process(*parts, **environment):
    """The lines that a program prints, and its stderr. It must not fail or abort."""
    process = run_program(*parts, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines(), process.stderr


@functools.cache
def mujoco_can_draw(backend):
    program = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>')).render()"
    return run_program(program, MUJOCO_GL=backend).returncode == 0


def test_triton_is_loaded_before_opengl(tmp_path):
    # torch with CUDA brings it. After OpenGL, which comes with MuJoCo, its LLVM crashes Python.
    (tmp_path / "triton.py").write_text("import sys\nprint('mujoco' in sys.modules)\n")
    program = "import aib_envs; aib_envs.gym.make('AIB/Cartpole-v0')"
    found = run_program(program, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert found.stdout.split() == ["False"]


def beginnings(lines):
    return [line[: len(expected)] for line, expected in zip(lines, ONE_LINE, strict=True)]


@pytest.mark.parametrize("env_id", [env_id for env_id in TABLE if not env_id.startswith(("DI", "ODE"))])
def test_mujocos_pictures(env_id):
    env = started(env_id, render_mode="rgb_array")
    try:
        first = env.render()
    except OSError as error:
        pytest.skip(str(error))
    for _ in range(20):
        env.step(np.ones(env.action_space.shape, np.float32))
    assert first.shape == (240, 320, 3) and first.std() > 5 and (first != env.render()).any()
    env.reset(seed=7)
    env.close()  # closes the renderer, and the next picture makes another one
    assert np.array_equal(env.render(), first)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo itself knows what to draw with")
@pytest.mark.parametrize("before", ["", "import mujoco", "import dm_control.suite"])
def test_pictures_whatever_was_made_before(before):
    lines, _ = in_a_process(before, PICTURE)
    if mujoco_can_draw("egl"):
        assert lines == SHOWN
    elif lines != SHOWN:
        assert beginnings(lines) == ONE_LINE


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo itself knows what to draw with")
def test_a_program_that_has_drawn_ends_in_silence():
    if not mujoco_can_draw("egl"):
        pytest.skip("EGL cannot draw here")
    program = """
    import tempfile
    kept = tempfile.TemporaryDirectory()  # Python then runs all such clean-ups after those of EGL
    import aib_envs
    env = aib_envs.gym.make("AIB/Cartpole-v0", render_mode="rgb_array")
    env.reset()
    env.render()
    """
    _, stderr = in_a_process(program)
    assert not stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo itself knows what to draw with")
@pytest.mark.parametrize(
    ("gone", "backend"),
    [
        (("EGL", "OSMesa"), None),
        (("EGL", "OSMesa"), "egl"),
        (("EGL", "OSMesa"), "osmesa"),
        ((), "glfw"),
        ((), "nonsense"),
    ],
)
def test_without_opengl_there_is_one_line_and_training_goes_on(gone, backend):
    environment = {"MUJOCO_GL": backend} if backend else {}
    lines, stderr = in_a_process(without(*gone), PICTURE, **environment)
    assert beginnings(lines) == ONE_LINE and not stderr
    assert all("MUJOCO_GL" in line for line in lines)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo itself knows what to draw with")
@pytest.mark.parametrize(
    "before",
    [
        """
        import glfw
        glfw.init = lambda: True  # there is a display, but no OpenGL
        """,
        """
        import mujoco
        try:
            mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"))
        except mujoco.FatalError:
            pass
        """,
    ],
)
@pytest.mark.parametrize("backend", ["glfw", ""])
def test_a_failed_attempt_to_draw_is_not_repeated(before, backend):  # Python would be aborted
    lines, _ = in_a_process(before, PICTURE, MUJOCO_GL=backend)
    if backend or "Renderer" in before:
        assert beginnings(lines) == ONE_LINE
    elif mujoco_can_draw("egl"):
        assert lines == SHOWN


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo itself knows what to draw with")
def test_osmesa_where_there_is_no_egl():
    if not mujoco_can_draw("osmesa"):
        pytest.skip("OSMesa is not installed")
    assert in_a_process(without("EGL"), PICTURE)[0] == SHOWN


def test_training_starts_no_opengl():
    if not Path("/proc/self/maps").exists():
        pytest.skip("there is no /proc here, which says what a program has loaded")
    program = """
        import warnings
        warnings.simplefilter("error")
        import os, sys
        import aib_envs
        assert not any(name.split(".")[0] in ("mujoco", "dm_control") for name in sys.modules)
        for env_id in ("Cartpole", "HopperGym"):
            envs = aib_envs.make_vec(env_id, [{}], render_mode="rgb_array")
            envs.reset(seed=0)
            envs.step(envs.action_space.sample())
        assert not any(name.split(".")[0] == "OpenGL" for name in sys.modules)
        assert "MUJOCO_GL" not in os.environ
        if sys.platform == "linux":
            with open("/proc/self/maps") as maps:
                loaded = maps.read()
            assert not any(name in loaded for name in ("libEGL", "libOSMesa", "libGL.", "libX11"))
        import mujoco
        mujoco.GLContext  # one's own mujoco.Renderer can still be made
    """
    assert in_a_process(program) == ([], "")


# --------------------------------------------- The task of docs/extending.md ------------------------------------------

TRAIN_A_LITTLE = "--env-id cart_tasks:Cart --total-timesteps 5 --learning-starts 200 --eval-rollouts 1 --batch-size 8"


def test_the_task_of_the_page_trains_and_is_filmed_without_a_word_of_others(tmp_path):
    pytest.importorskip("torch")
    page = (ROOT / "docs" / "extending.md").read_text()
    (code,) = [part.split("```")[0] for part in page.split("```python\n") if "class CartEnv" in part.split("```")[0]]
    (tmp_path / "cart_tasks.py").write_text(code)
    shutil.copy(ROOT / "dr_sac.py", tmp_path / "film_sac.py")

    def start(*flags):
        command = [sys.executable, "film_sac.py", *flags]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        options = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "check": False}
        return subprocess.run(command, **options)

    process = start(*TRAIN_A_LITTLE.split())
    assert process.returncode == 0 and "Error" not in process.stderr and "arn" not in process.stderr, process.stderr
    (directory,) = (tmp_path / "runs").iterdir()
    assert directory.name.startswith("Cart__DR__1__")
    assert json.loads((directory / "config.json").read_text())["args"]["env_id"] == "cart_tasks:Cart"
    if not mujoco_can_draw("egl"):
        pytest.skip("EGL cannot draw here")
    process = start("--eval-only", str(directory), "--capture-video", "--context", "mass=1.2")
    assert process.returncode == 0 and not process.stderr, process.stderr
    assert (directory / "video.gif").exists()  # the model has no camera of its own
