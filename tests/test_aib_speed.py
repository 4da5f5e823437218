"""Tasks with a desired speed: rewards against dm_control's own, dynamics against the benchmark's, lengths of limbs."""

import numpy as np
import pytest
from dm_control.suite import cheetah, walker
from gymnasium.utils.env_checker import check_env

import aib_envs
import aib_speed

IDS = list(aib_speed.TASKS)


def make(env_id, **context):
    return aib_envs.make_vec(env_id, [context]).envs[0].unwrapped


def at_speed(env, speed):
    """The physics of `env`, whose body moves at `speed` m/s, backwards if negative."""
    env.reset(seed=3)
    env.data.qvel[:] = 0
    env.data.joint("rootx").qvel[:] = speed
    env._suite.physics.forward()
    return env._suite.physics


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_task_is_one_for_gymnasium_and_for_the_benchmark(env_id):
    check_env(make(env_id), skip_render_check=True)
    sets = [aib_envs.context_set(env_id, split) for split in aib_envs.SPLITS]
    assert all(len(contexts) == 20 for contexts in sets)
    speed = aib_envs.get_task(env_id).dimensions[0]
    (low, high), (outer_low, outer_high) = speed.inner, speed.outer
    train, inside, outside = (np.array([context["speed"] for context in contexts]) for contexts in sets)
    assert (low <= train).all() and (train <= high).all() and not set(train) & set(inside)
    assert ((outside < low) | (outside > high)).all() and outer_low <= outside.min() and outside.max() <= outer_high
    assert all((speeds < 0).sum() == (speeds > 0).sum() == 10 for speeds in (train, inside, outside))


@pytest.mark.parametrize("desired", [5.0, 2.5, 1.0])
def test_cheetahs_reward_is_the_suites_up_to_the_desired_speed_and_falls_after_it(desired, monkeypatch):
    monkeypatch.setattr(cheetah, "_RUN_SPEED", desired)
    task = cheetah.Cheetah()
    forward, backward = make("Cheetah-Speed", speed=desired), make("Cheetah-Speed", speed=-desired)
    for part in (-0.5, 0.0, 0.3, 0.99, 1.0):
        expected = task.get_reward(at_speed(forward, part * desired))
        assert forward._suite.task.get_reward(forward._suite.physics) == pytest.approx(expected)
        for env, speed in ((forward, (2 - part) * desired), (backward, -part * desired)):
            assert env._suite.task.get_reward(at_speed(env, speed)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("desired", [8.0, 1.0])
def test_walkers_reward_is_the_suites_up_to_the_desired_speed_and_falls_after_it(desired):
    task = walker.PlanarWalker(move_speed=desired)
    forward, backward = make("Walker-Speed", speed=desired), make("Walker-Speed", speed=-desired)
    for part in (-0.5, 0.0, 0.3, 0.99, 1.0):
        expected = task.get_reward(at_speed(forward, part * desired))
        assert 0.1 < expected < 1
        assert forward._suite.task.get_reward(forward._suite.physics) == pytest.approx(expected)
        for env, speed in ((forward, (2 - part) * desired), (backward, -part * desired)):
            assert env._suite.task.get_reward(at_speed(env, speed)) == pytest.approx(expected, abs=1e-9)


def test_below_1_m_per_s_the_margin_stays():
    env = make("Cheetah-Speed", speed=0.1)
    for speed, expected in ((0.1, 1.0), (0.6, 0.5), (-0.4, 0.5), (1.2, 0.0)):
        assert env._suite.task.get_reward(at_speed(env, speed)) == pytest.approx(expected)


@pytest.mark.parametrize("env_id", IDS)
def test_the_speed_changes_nothing_but_the_reward(env_id):
    envs = [make(env_id.partition("-")[0]), make(env_id), make(env_id, speed=-1.5)]
    rng, rewards = np.random.default_rng(0), []
    for step in range(20):
        action = rng.uniform(-1, 1, 6)
        steps = [env.step(action) if step else env.reset(seed=1) for env in envs]
        for obs, *_ in steps[1:]:
            np.testing.assert_array_equal(obs, steps[0][0])
        rewards.append([s[1] for s in steps if step])
    own, forward, backward = np.array(rewards[1:]).T
    assert (forward != backward).all()
    assert env_id.startswith("Cheetah") or np.array_equal(own, forward)  # it walks at 1 m/s by default, and did not yet


@pytest.mark.parametrize("length", [0.4, 1.0, 1.6])
def test_walkers_limbs_have_their_length_and_begin_on_the_floor(length):
    env = make("Walker-Speed-Length", length=length)
    env.reset(seed=0)
    env.data.qpos[:] = 0  # it stands straight
    env._suite.physics.forward()
    model, data = env.model, env.data
    for side in ("right", "left"):
        hip, knee, ankle = (data.joint(f"{side}_{joint}").xanchor for joint in ("hip", "knee", "ankle"))
        assert hip[2] - knee[2] == pytest.approx(0.45 * length) and knee[2] - ankle[2] == pytest.approx(0.5 * length)
        sizes = [model.geom(f"{side}_{limb}").size[1] for limb in ("thigh", "leg", "foot")]
        assert sizes == pytest.approx([0.225 * length, 0.25 * length, 0.1 * length])
        foot = data.geom(f"{side}_foot").xpos
        assert foot[2] == pytest.approx(0.05) and foot[0] - ankle[0] == pytest.approx(0.06 * length)
    assert data.geom("torso").xpos[2] - data.joint("right_hip").xanchor[2] == pytest.approx(0.3)
    mass = model.body("right_leg").mass.item() / make("Walker-Speed").model.body("right_leg").mass.item()
    volume = lambda half: np.pi * 0.04**2 * (2 * half + 4 / 3 * 0.04)  # of a capsule
    assert mass == pytest.approx(volume(0.25 * length) / volume(0.25))
