"""Tasks with a held-out mode: physics against a hand-written reference and against Cheetah, sets, and `module:Task`."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import aib_envs

MODULE = "relatives.aib_signs"
# {task: (the benchmark's, key of the continuous dimension, training range, keys of the signs)}
TABLE = {
    "DI-Signs": ("DI", "mass", (0.5, 1.5), ("inversion_x", "inversion_y")),
    "Cheetah-Legs": ("Cheetah", "length", (0.8, 1.2), ("inversion_back_leg", "inversion_front_leg")),
}
MODES = [(-1, -1), (-1, 1), (1, -1), (1, 1)]


def make(task, **context):
    return gym.make(f"{MODULE}:AIB/{task}-v0", context=context).unwrapped


def rollout(env, actions):
    """Observations [steps + 1, obs_dim] and rewards [steps]."""
    observations = [env.reset(seed=5)[0]]
    rewards = []
    for action in actions:
        obs, reward, *_ = env.step(action)
        observations.append(obs)
        rewards.append(reward)
    return np.stack(observations), np.array(rewards)


def actions_for(size, steps=60):
    return np.random.default_rng(3).uniform(-1.2, 1.2, (steps, size)).astype(np.float32)


@pytest.mark.parametrize("task", TABLE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_task_is_one_for_gymnasium(task):
    check_env(make(task, **aib_envs.context_set(f"{MODULE}:{task}", "eval-out")[3]), skip_render_check=True)


@pytest.mark.parametrize("task", TABLE)
def test_the_row_is_the_benchmarks(task):
    other = aib_envs.get_task(TABLE[task][0])
    own = aib_envs.get_task(f"{MODULE}:{task}")
    for name in ("obs_dim", "act_dim", "steps", "window", "overlap", "total_timesteps", "bounds"):
        assert getattr(own, name) == getattr(other, name)
    assert own.dimensions[0] == other.dimensions[0]


@pytest.mark.parametrize("task", TABLE)
def test_eval_out_has_the_mode_that_training_has_not_and_no_new_range(task):
    _, key, (low, high), signs = TABLE[task]
    sets = {split: aib_envs.context_set(f"{MODULE}:{task}", split) for split in aib_envs.SPLITS}
    for split, contexts in sets.items():
        modes = [tuple(context[sign] for sign in signs) for context in contexts]
        expected = [0, 6, 7, 7] if split != "eval-out" else [0, 0, 0, 20]
        assert sorted(modes.count(mode) for mode in MODES) == expected
        assert modes.count((-1, -1)) == (20 if split == "eval-out" else 0)
        values = [context[key] for context in contexts]
        assert low <= min(values) < low + 0.03 * (high - low) and high - 0.03 * (high - low) < max(values) <= high
        assert values == sorted(set(values)) and len(values) == 20
        assert all(list(context) == [key, *signs] for context in contexts)
    assert len({context[key] for contexts in sets.values() for context in contexts}) == 60
    seen = set(np.round(np.linspace(low, high, 50), 4))
    assert {context[key] for context in sets["train"]} <= seen  # as in the benchmark


def point_mass(state, actions, mass, signs):
    """States [steps + 1, 4] of DI, from its equations."""
    x, y, vx, vy = state
    states = [state]
    for action in np.clip(actions.astype(float), -1, 1):
        x, y = x + 0.1 * vx, y + 0.1 * vy
        vx, vy = vx + 0.1 * signs[0] * action[0] / mass, vy + 0.1 * signs[1] * action[1] / mass
        x, y, vx, vy = np.clip([x, y, vx, vy], -1, 1)
        states.append([x, y, vx, vy])
    return np.array(states)


@pytest.mark.parametrize("signs", MODES)
def test_di_signs_against_its_equations(signs):
    env = make("DI-Signs", mass=0.7, inversion_x=signs[0], inversion_y=signs[1])
    actions = actions_for(2)
    found, rewards = rollout(env, actions)
    expected = point_mass(found[0], actions, 0.7, signs)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(rewards, np.hypot(*expected[1:, :2].T) <= 0.1)


@pytest.mark.parametrize("signs", MODES)
def test_cheetah_legs_is_cheetah_with_signs_at_its_motors(signs):
    env = make("Cheetah-Legs", length=1.15, inversion_back_leg=signs[0], inversion_front_leg=signs[1])
    plain = gym.make("AIB/Cheetah-v0", context={"length": 1.15}).unwrapped
    names = [env.model.actuator(i).name for i in range(6)]
    by_hand = [signs[0] if name in ("bthigh", "bshin", "bfoot") else signs[1] for name in names]
    actions = actions_for(6)
    for found, expected in zip(rollout(env, actions), rollout(plain, actions * np.float32(by_hand)), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("task", TABLE)
def test_the_default_context_is_the_benchmarks_task(task):
    plain = gym.make(f"AIB/{TABLE[task][0]}-v0").unwrapped
    actions = actions_for(plain.action_space.shape[0])
    for found, expected in zip(rollout(make(task), actions), rollout(plain, actions), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_flip_reverses_both_parts_in_the_middle_of_an_episode():
    env = make("DI-Signs", inversion_y=-1)
    env.reset(seed=0)
    env.flip()
    velocity = env.step(np.array([0.5, 0.5], np.float32))[0][2:]
    assert velocity[0] < 0 < velocity[1]


def test_there_are_four_modes_to_look_at():
    keys = TABLE["DI-Signs"][3]
    found = [tuple(mode[key] for key in keys) for mode in aib_envs.modes(f"{MODULE}:DI-Signs")]
    assert found == MODES


def test_nothing_but_its_module_brings_a_task_along():
    program = f"import aib_envs; own = [*aib_envs.TASKS]; aib_envs.make_vec('{MODULE}:DI-Signs', [{{}}]);"
    program += "print(*own); print(*aib_envs.TASKS)"
    command = [sys.executable, "-c", program]
    before, after = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert after.split() == [*before.split(), *TABLE]


@pytest.mark.parametrize(
    ("env_id", "named"),
    [
        (f"{MODULE}:DI-Sign", "did you mean DI-Signs"),
        ("no_such_module:DI", "no_such_module"),
        (":DI", ":DI"),
        ("broken_tasks:Cart", "ZeroDivisionError"),
    ],
)
def test_a_wrong_module_or_task_gets_one_line(env_id, named, tmp_path, monkeypatch):
    (tmp_path / "broken_tasks.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=named) as error:
        aib_envs.get_task(env_id)
    assert "\n" not in str(error.value)
