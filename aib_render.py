"""Pictures and videos of AIB environments, for `--capture-video` and for gymnasium's render_mode "rgb_array".

MuJoCo draws its own tasks, offscreen, with OpenGL: the environment variable MUJOCO_GL can choose egl, osmesa or glfw.
DI and ODE are drawn here: a black point that is to come to the grey disc. Import this module before MuJoCo.
"""

import ctypes.util
import os
import sys
import warnings
import weakref

import gymnasium as gym
import imageio
import numpy as np

import aib_envs

HEIGHT, WIDTH, FRAMES = 240, 320, 200

if sys.platform == "linux":  # MuJoCo reads it when it is imported
    os.environ.setdefault("MUJOCO_GL", "egl" if ctypes.util.find_library("EGL") else "osmesa")


def picture(env):
    """What an `aib_envs.ContextEnv` looks like now: uint8 [240, 320, 3]. Raises OSError where OpenGL is missing."""
    if not hasattr(env, "model"):
        in_plane = len(env.state) == 4  # DI's position; of ODE's x, [-2, 2] is shown
        x, y, goal = (*env.state[:2], 0.1) if in_plane else (np.clip(env.state[0] / 2, -1, 1), 0.0, 0.25)
        v, u = np.mgrid[1.1 : -1.1 : HEIGHT * 1j, -1.1 * WIDTH / HEIGHT : 1.1 * WIDTH / HEIGHT : WIDTH * 1j]
        grey = np.where(np.hypot(u, v) <= goal, 170, np.where(abs(u) <= 1.1, 255, 230))
        grey[np.hypot(u - x, v - y) <= 0.05] = 0
        return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)
    if not hasattr(env, "renderer"):
        env.renderer = _renderer(env.model)
        weakref.finalize(env, env.renderer.close)
    env.renderer.update_scene(env.data, camera=0)  # in every task it shows the whole, or follows the body
    return env.renderer.render()


def _renderer(model):
    try:
        import mujoco

        return mujoco.Renderer(model, HEIGHT, WIDTH)
    except Exception as error:  # OpenGL's are of many kinds
        raise OSError(_hint(error)) from None


def _hint(error):
    reason = str(error).partition("\n")[0].partition(", ")[0] or type(error).__name__
    return f"MuJoCo cannot draw here ({reason}): install EGL or OSMesa, and set MUJOCO_GL to egl or osmesa"


def check(env_id):
    """Draws a picture of a task. Raises OSError if that is not possible here."""
    with warnings.catch_warnings(action="ignore"):  # the error that follows them says it all
        try:
            env = gym.make(f"AIB/{env_id}-v0", render_mode="rgb_array")
        except (ImportError, AttributeError, RuntimeError) as error:  # without OpenGL, MuJoCo may not even be imported
            raise OSError(_hint(error)) from None
        env.reset(seed=0)
        env.render()


def modes(env_id):
    """One context per value of the task's binary dimension, if it has one; all else at its defaults."""
    return [{d.key: value} for d in aib_envs.get_task(env_id).dimensions for value in d.values or ()] or [{}]


def record(envs, policy, window, path):
    """Writes one rollout of `policy` (as in `aib_envs.evaluate`) as an animated GIF: the environments of `envs` (from
    `aib_envs.make_vec`) side by side, without the warm-up, in at most 200 frames. Returns the returns [n]."""
    frames = []

    def seen(obs, history):
        if history.t >= 0 and history.t % -(-history.rewards.shape[1] // FRAMES) == 0:
            frames.append(np.hstack([picture(env.unwrapped) for env in envs.envs]))
        return policy(obs, history)

    returns = aib_envs.evaluate(envs, seen, window, rollouts=1)[:, 0]
    with open(path, "wb") as file:
        imageio.mimsave(file, frames, format="GIF", fps=20, loop=0)
    return returns
