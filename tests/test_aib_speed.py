"""Tasks with a desired speed: rewards against dm_control's own, dynamics against the benchmark's, lengths of limbs."""

import mujoco
import numpy as np
import pytest
from dm_control import suite
from dm_control.suite import cheetah, finger, walker
from gymnasium.utils.env_checker import check_env
from lxml import etree

import aib_envs
import aib_speed

IDS = list(aib_speed.TASKS)


def make(env_id, **context):
    return aib_envs.make_vec(env_id, [context]).envs[0].unwrapped


def at_speed(env, speed):
    """The physics of `env`, whose body moves at `speed` m/s, backwards if negative, or is spun at `speed` rad/s."""
    env.reset(seed=3)
    env.data.qvel[:] = 0
    env.data.joint("hinge" if env.env_id.startswith("Finger") else "rootx").qvel[:] = speed
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


@pytest.mark.parametrize("desired", [-15.0, 15.0, 4.0])
def test_fingers_reward_falls_linearly_on_both_sides_of_the_desired_speed(desired):
    env = make("Finger-Speed", speed=desired)
    for part, expected in ((-0.5, 0), (0, 0), (0.3, 0.3), (1, 1), (1.2, 0.8), (2.5, 0)):
        found = env._suite.task.get_reward(at_speed(env, part * desired))
        assert found == pytest.approx(expected, abs=1e-9)
        if desired == -15:  # the suite's: 1 from that speed on
            assert finger.Spin().get_reward(env._suite.physics) == float(part >= 1)


def test_below_1_m_per_s_the_margin_stays():
    env = make("Cheetah-Speed", speed=0.1)
    for speed, expected in ((0.1, 1.0), (0.6, 0.5), (-0.4, 0.5), (1.2, 0.0)):
        assert env._suite.task.get_reward(at_speed(env, speed)) == pytest.approx(expected)


@pytest.mark.parametrize("env_id", [env_id for env_id in IDS if not env_id.startswith("Finger")])
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


@pytest.mark.parametrize("env_id", ["Finger-Speed", "Finger-Speed-Length"])
def test_finger_moves_as_the_suites(env_id):
    env, rng = make(env_id, speed=7.0), np.random.default_rng(0)
    theirs = suite.load("finger", "spin", task_kwargs={"random": 5})
    found, timestep = env.reset(seed=5)[0], theirs.reset()
    for _ in range(200):
        np.testing.assert_array_equal(found, np.concatenate(list(timestep.observation.values())).astype(np.float32))
        action = rng.uniform(-1, 1, 2)
        found, timestep = env.step(action)[0], theirs.step(action)


@pytest.mark.parametrize("length", [0.6, 1.0, 1.4])
def test_fingers_outer_limb_has_its_length_and_mass(length):
    xml, assets = finger.get_model_and_assets()
    root = etree.fromstring(xml)
    up = 0.16 * (1 - length)
    ends = {"distal": (0, -0.16 * length), "fingertip": (-0.13 + up, -0.161 + up)}
    for geom in root.iter("geom"):
        if geom.get("name") in ends:
            geom.set("fromto", "0 0 {} 0 0 {}".format(*ends[geom.get("name")]))
    for site in root.iter("site"):
        if site.get("name", "").startswith("touch"):
            x = site.get("pos").split()[0]
            site.set("pos", f"{x} 0 {-0.17 + up}")
    expected = mujoco.MjModel.from_xml_string(etree.tostring(root).decode(), assets)
    model = make("Finger-Speed-Length", length=length).model
    for name in (
        "body_pos",
        "body_mass",
        "body_inertia",
        "body_ipos",
        "geom_pos",
        "geom_size",
        "site_pos",
        "dof_damping",
    ):
        np.testing.assert_allclose(getattr(model, name), getattr(expected, name), atol=1e-12, err_msg=name)


def test_the_shortest_finger_reaches_what_it_spins():
    model = make("Finger-Speed-Length", length=0.6).model
    shoulder, hinge = (model.body(name).pos[0] for name in ("proximal", "spinner"))
    reach = 0.18 + 0.16 * 0.6 + 0.03  # both limbs and the tip's radius
    assert reach > hinge - shoulder - (0.09 + 0.04)  # the end of the spun capsule
