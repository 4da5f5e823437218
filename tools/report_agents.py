"""What trained agents have understood: embeddings, what happens when z is wrong, and when the actuators change inside
an episode.

python tools/report_agents.py runs/<dir> ...    loads their agents: report/agents.md
"""

import argparse
import contextlib
import copy
import itertools
import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import scipy.special
import scipy.stats
import torch
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist
from sklearn.manifold import TSNE
from sklearn.metrics.pairwise import cosine_similarity

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import aib_envs
import aib_run
from report import (
    STUCK,
    Page,
    binary,
    even,
    fail,
    legend,
    panels,
    path_of,
    rank,
    read_run,
    runs_path,
    say,
    style,
    tell,
    write,
)

# --------------------------------------------------- Trained agents --------------------------------------------------


@dataclass
class Trained:
    """A finished run's agent, in evaluation."""

    name: str
    method: str
    task: str
    agent: object
    steps: int
    make_envs: object
    modes: tuple = ()  # its reward per step in the training contexts of each mode [2], () without modes
    encoders: tuple = ()  # whose z stand side by side in what `embed` returns: normally its own
    untrained: object = None  # an encoder with fresh weights

    def embed(self, history):
        """z [n, 8] of the windows that `history` ends with; None for a method without an encoder."""
        if not self.encoders:
            return None
        k = self.agent.window_size
        positions = np.linspace(0, k - 1, k // 5).astype(int)[None]  # a fifth, evenly spaced in time
        device = self.agent.log_alpha.device
        sees_rewards = hasattr(self.agent, "infer_for_actor")  # RSAC's encoder
        window = history.window(positions, sees_rewards)
        parts = [torch.from_numpy(part).to(device) for part in window]
        with torch.no_grad():
            return torch.cat([encoder.eval()(*parts) for encoder in self.encoders], 1).cpu().numpy()


def load(directory):
    """The `Trained` agent of a run's directory."""
    run = read_run(directory, [])
    agent, args, make_envs = aib_run.load_agent(directory)
    name = f"{run.method} (seed {run.seed}, {run.steps:,} steps)"
    trained = Trained(name, run.method, run.task, agent, run.steps, partial(make_envs, args), run.mode_rewards())
    if encoder_of(agent):
        trained.encoders = (encoder_of(agent),)
        torch.manual_seed(0)
        fresh = aib_run.load_script(run.script).make_agent(args, make_envs(args, [{}]))
        trained.untrained = encoder_of(fresh)
    return trained


def load_all(directories, problems):
    """(directory, `Trained`) of each run that has an agent, in the order of tasks and methods; the others are named."""
    agents = []
    for directory in dict.fromkeys(directories):
        try:
            agents.append((directory, load(directory)))
        except (Exception, SystemExit) as error:  # torch's are of many kinds; aib_run ends programs
            problems.append(f"{directory}: cannot be used ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
    return sorted(agents, key=lambda pair: (pair[1].task, rank(pair[1].method), pair[1].name))


def encoder_of(agent):
    """The encoder whose z the policy is told; None for a method without one."""
    if hasattr(agent, "infer_for_actor"):  # RSAC
        return agent.infer_for_actor.encoder
    return getattr(agent, "encoder", None)


class MixedWindow:
    """A History whose transitions before step `start` come from other environments of it: those at `rows`."""

    def __init__(self, history, rows, start):
        self.own = history
        self.other = copy.copy(history)
        self.start = start
        self.t = history.t
        for name in ("obs", "next_obs", "actions", "all_rewards"):
            setattr(self.other, name, getattr(history, name)[rows])

    def window(self, positions, with_rewards=False):
        foreign = (self.own.t - self.own.window_size + positions < self.start)[..., None]
        own = self.own.window(positions, with_rewards)
        other = self.other.window(positions, with_rewards)
        return tuple(np.where(foreign, y, x) for x, y in zip(own, other, strict=True))


def roll_out(trained, contexts, rollout=0, switch=False, foreign=None):
    """Rewards [n, T] and embeddings [n, T, 8] (or None) of one episode, deterministic actions. `switch`: the binary
    dimension takes its other value in the middle. `foreign` [n]: in the middle, each window is filled with what the
    environment of that index has gone through."""
    envs = trained.make_envs(contexts)
    agent = trained.agent
    task = aib_envs.get_task(trained.task)
    n = len(contexts)
    middle = task.steps // 2
    rewards = np.zeros((n, task.steps))
    embeddings = []
    history = aib_envs.History(n, agent.window_size, task.steps, envs.single_observation_space.shape[0], task.act_dim)
    for t in range(-agent.window_size, task.steps):
        if t in (-agent.window_size, 0):
            obs, _ = envs.reset(seed=aib_envs.reset_seeds(n, 2, rollout, int(t < 0)))
        if switch and t == middle:
            for row, env in zip(obs, envs.envs, strict=True):
                invert(env.unwrapped, row)
        view = MixedWindow(history, foreign, middle) if foreign is not None and t >= middle else history
        if t >= 0:
            embeddings.append(trained.embed(view))
        actions = agent.act(obs, view)
        next_obs, reward, _, _, infos = envs.step(actions)
        history.add(obs, actions, reward, next_obs, infos["diverged"])
        obs = next_obs
        if t >= 0:
            rewards[:, t] = reward
    envs.close()
    z = None if embeddings[0] is None else np.stack(embeddings, axis=1)
    return rewards, z


def invert(env, obs):
    """Gives the binary dimension of an environment's context its other value, and tells those who see the context: in
    the observation [obs_dim] and in those to come."""
    env.flip()
    seen = len(env._suffix)
    if seen:
        obs[-seen:] = env._suffix


def variability(z, contexts, mode):
    """Theorem A.15: trace of the covariance of z [n, samples, d] over d, and the parts that add up to it: noise within
    contexts, spread of the contexts' means within a mode, separation of the modes. `contexts`: n dicts; `mode`: key of
    the binary dimension or None."""
    labels = np.array([context[mode] if mode else 0 for context in contexts])
    means, center, d = z.mean(1), z.mean((0, 1)), z.shape[-1]
    mode_means = np.stack([means[labels == label].mean(0) for label in labels])  # of each context's mode
    square = lambda x: float((x**2).sum(-1).mean() / d)
    return square(z - center), square(z - means[:, None]), square(means - mode_means), square(mode_means - center)


def overlap(means):
    """Mean pairwise cosine similarity of the contexts' mean embeddings [n, d]."""
    return float(1 - pdist(means, "cosine").mean())


DIGAMMA = scipy.special.digamma


def unit_scale(x, seed=0):
    """x [n, ...] as [n, d] with mean 0, an overall standard deviation of 1, and ties broken by far less than that."""
    x = np.asarray(x, float).reshape(len(x), -1)
    x = x - x.mean(0)
    return x / max(x.std(), 1e-12) + 1e-9 * np.random.default_rng(seed).standard_normal(x.shape)


def within(tree, x, radius):
    """How many points of `tree` lie closer to each x than its radius (max-norm), without itself."""
    return tree.query_ball_point(x, np.nextafter(radius, 0), p=np.inf, return_length=True) - 1


def kraskov(x, y, k=3):
    """Mutual information in nats of two continuous variables [n, ...]: Kraskov et al. 2004, first estimator."""
    x, y = unit_scale(x), unit_scale(y, seed=1)
    radius = cKDTree(np.hstack([x, y])).query(np.hstack([x, y]), k + 1, p=np.inf)[0][:, -1]
    counts = [within(cKDTree(part), part, radius) for part in (x, y)]
    return float(DIGAMMA(k) + DIGAMMA(len(x)) - sum(DIGAMMA(count + 1) for count in counts).mean())


def ross(x, labels, k=3):
    """Mutual information in nats of a continuous [n, ...] and a discrete variable [n]: Ross 2014."""
    x, labels = unit_scale(x), np.asarray(labels)
    radius, size = np.zeros(len(x)), np.zeros(len(x))
    for label in np.unique(labels):
        same = labels == label
        radius[same] = cKDTree(x[same]).query(x[same], k + 1, p=np.inf)[0][:, -1]
        size[same] = same.sum()
    inside = cKDTree(x).query_ball_point(x, radius, p=np.inf, return_length=True) - 1
    return float(DIGAMMA(len(x)) + DIGAMMA(k) - DIGAMMA(size).mean() - DIGAMMA(inside).mean())


def entropy(labels):
    """Of the labels' frequencies, in nats."""
    return float(scipy.stats.entropy(np.unique(labels, return_counts=True)[1]))


def informativeness(z, contexts, mode):
    """I(Z;c), I(Z;S), I(Z;U|S) in nats, of z [n, samples, d]. c is which of the n contexts it is, so at most ln n; S
    the mode, so at most its entropy; U the continuous dimensions. Without a mode: I(Z;c), None, I(Z;U)."""
    samples, flat = z.shape[1], z.reshape(-1, z.shape[-1])
    which = np.repeat(np.arange(len(contexts)), samples)
    s = np.repeat([context[mode] if mode else 0 for context in contexts], samples)
    u = np.repeat([[value for key, value in context.items() if key != mode] for context in contexts], samples, axis=0)
    u = u / u.std(0)
    given = sum((s == label).mean() * kraskov(flat[s == label], u[s == label]) for label in np.unique(s))
    return ross(flat, which), ross(flat, s) if mode else None, given


def mode_of(task):
    """The key of the task's dimension with two values, if it has one: inversion or permutation."""
    dimension = binary(task)
    return dimension.key if dimension else None


def has_several_signs(task):
    """Has it more than one dimension with two values? What follows is about one."""
    return len(aib_envs.modes(task)) > 2


def pairs_of(task, count):
    """`count` values of the first continuous dimension from the training range, each in both modes: one after the
    other, so that environment i ^ 1 is the other mode of i."""
    dimension = next(d for d in aib_envs.get_task(task).dimensions if d.inner)
    if count == 3:  # of the paper's heatmap
        values = (
            [0.8, 1.0, 1.3]
            if dimension == aib_envs.MASS
            else [dimension.inner[0], dimension.default, dimension.inner[1]]
        )
    else:
        values = np.linspace(*dimension.inner, count).round(4).tolist()
    mode = binary(task)
    if not mode:
        return [{dimension.key: value} for value in values]
    return [{dimension.key: value, mode.key: one} for value in values for one in mode.values]


INFORMATION = ("I(Z;c)", "I(Z;S)", "I(Z;U|S)")
UNTRAINED = "I(Z;S) untrained"


def embedding_rows(trained):
    """A row of the diagnostics for each set, and z [60, samples, 8]. An untrained encoder looks at the same windows:
    what it tells about the mode is no merit of training."""
    mode, rows, contexts = mode_of(trained.task), [], aib_envs.eval_contexts(trained.task)
    both = replace(trained, encoders=(*trained.encoders, trained.untrained))
    episodes = [roll_out(both, contexts, rollout)[1] for rollout in range(5)]  # one alone would tell its start
    z = np.concatenate([z[:, :: max(1, z.shape[1] // 10)] for z in episodes], axis=1)
    z, z_untrained = np.split(z, 2, axis=-1)
    untrained = aib_envs.by_split(z_untrained)
    for split, part in aib_envs.by_split(z).items():
        own = aib_envs.context_set(trained.task, split)
        row = {"task": trained.task, "run": trained.name, "set": split}
        names = ("variability", "noise within contexts", "spread within modes", "separation of modes")
        row |= dict(zip(names, (f"{value:.2g}" for value in variability(part, own, mode)), strict=True))
        row["overlap"] = f"{overlap(part.mean(1)):.2f}"
        of_s = entropy([context[mode] for context in own]) if mode else 0.0
        ceilings = (np.log(20), of_s, np.log(20) - of_s)
        for name, value, ceiling in zip(INFORMATION, informativeness(part, own, mode), ceilings, strict=True):
            row[name] = "" if value is None else f"{value:.2f} of {ceiling:.2f}"
        row[UNTRAINED] = f"{informativeness(untrained[split], own, mode)[1]:.2f}" if mode else ""
        rows.append(row)
    return rows, z


def information_figure(rows, task):
    """Bars of the three pieces of information for each run and set, under their ceilings; for the mode also what an
    untrained encoder tells."""
    figure, axes = panels(3, [f"{name} (nats)" for name in INFORMATION], sharey=True)
    figure.suptitle(task)
    own = [row for row in rows if row["task"] == task]
    runs = list(dict.fromkeys(row["run"] for row in own))
    for axis, name in zip(axes, INFORMATION, strict=True):
        for i, (split, color) in enumerate(zip(aib_envs.SPLITS, ("#0072B2", "#56B4E9", "#E69F00"), strict=True)):
            values = [row[name].split(" of ") for row in own if row["set"] == split and row[name]]
            if values:
                at = np.arange(len(runs)) + 0.27 * (i - 1)
                axis.bar(at, [float(value) for value, _ in values], 0.25, color=color, label=split)
                axis.hlines(float(values[0][1]), -0.5, len(runs) - 0.5, color="#000000", linewidth=0.8, label="at most")
            if values and name == "I(Z;S)":
                zero = [float(row[UNTRAINED]) for row in own if row["set"] == split]
                axis.hlines(
                    zero,
                    at - 0.125,
                    at + 0.125,
                    color="#000000",
                    linestyle=":",
                    linewidth=1.5,
                    label="untrained encoder",
                )
        axis.set_xticks(range(len(runs)), [run.replace(" (", "\n(").replace(", ", "\n") for run in runs], fontsize=6)
        if not axis.patches:
            say(axis, "this task has no mode")
    legend(figure, axes)
    return figure


def embedding_figure(trained, z):
    """t-SNE of the embeddings, coloured by mode (or the second dimension) and by the first continuous dimension;
    cosines of the means of three contexts, in both modes where there are two."""
    mode, contexts = mode_of(trained.task), aib_envs.eval_contexts(trained.task)
    continuous, *others = [d for d in aib_envs.get_task(trained.task).dimensions if d.inner]
    z = z[:, :: max(1, z.shape[1] // 20)]
    points = TSNE(init="pca", random_state=0, perplexity=30).fit_transform(z.reshape(-1, z.shape[-1]))
    first = mode or (others[0].key if others else continuous.key)
    titles = [f"t-SNE of z, by {first}", f"t-SNE of z, by {continuous.key}", "cosine similarity of mean z"]
    figure, axes = panels(3, titles, height=3.8, width=4.2)
    figure.suptitle(f"{trained.task}, {trained.name}")
    if mode:
        labels = np.repeat([context[mode] for context in contexts], z.shape[1])
        for value, color, marker in zip(np.unique(labels), ("#0072B2", "#E69F00"), ("o", "^"), strict=True):
            axes[0].plot(*points[labels == value].T, marker, color=color, markersize=2, label=f"{mode} {value:+d}")
        axes[0].legend(markerscale=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.05), ncol=2)
    for axis, key in zip(axes[mode is not None :], [first, continuous.key][mode is not None :], strict=False):
        shade = np.repeat([context[key] for context in contexts], z.shape[1])
        figure.colorbar(axis.scatter(*points.T, c=shade, s=3, cmap="viridis"), ax=axis)
    for axis in axes[:2]:
        axis.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    six = pairs_of(trained.task, 3)
    six.sort(key=lambda context: context.get(mode, 0))
    similarity = cosine_similarity(roll_out(trained, six)[1].mean(1))
    axes[2].imshow(similarity, vmin=-1, vmax=1, cmap="PuOr")
    names = [", ".join(f"{value:g}" for value in reversed(context.values())) for context in six]
    axes[2].set_xlabel(", ".join(reversed(six[0])))
    axes[2].set_xticks(range(len(six)), names, rotation=45, ha="right")
    axes[2].set_yticks(range(len(six)), names)
    for (i, j), value in np.ndenumerate(similarity):
        axes[2].text(
            j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if abs(value) > 0.7 else "black"
        )
    return figure, similarity, [context.get(mode, 0) for context in six]


# ------------------------------------------------------- Wrong z -----------------------------------------------------

NOISE = (0, 0.25, 0.5, 1, 2, 4)  # standard deviations of z over contexts


class ShortWindow:
    """A History that shows the last `length` transitions of the window only, and zeros for the others, as a History
    does in the warm-up."""

    def __init__(self, history, length):
        self.history = history
        self.length = length

    def window(self, positions, with_rewards=False):
        shown = (positions >= self.history.window_size - self.length)[..., None]
        return tuple(part * shown for part in self.history.window(positions, with_rewards))


class Episodes:
    """One episode in each context, in the benchmark's protocol. returns [n]; obs, actions, deltas [n, T - 1, dim]; z
    [n, T - 1, 8], None without an encoder; predictions of the deltas [n, T - 1, obs_dim] if they are asked for and
    there is a dynamics model, else None. The last step is left out: what comes after it is not seen. `noise`: standard
    deviation of Gaussian noise that is added to the actions; `random`: uniform actions in their place."""

    def __init__(self, trained, contexts, predict=False, noise=0.0, random=False):
        self.agent, steps = trained.agent, aib_envs.get_task(trained.task).steps
        encoder = encoder_of(self.agent)
        z, kept, predictions, rng = [], [], [], np.random.default_rng(0)
        remember = lambda module, inputs, output: z.append(output)  # returns None: changes nothing
        hook = encoder.register_forward_hook(remember) if encoder else contextlib.nullcontext()

        def policy(obs, history):
            actions = self.agent.act(obs, history)
            if random:
                actions = rng.uniform(-1, 1, actions.shape).astype(np.float32)
            if noise:
                actions = np.clip(actions + noise * rng.standard_normal(actions.shape, np.float32), -1, 1)
            kept.append((obs, actions))
            if predict and hasattr(self.agent, "dynamics"):
                predictions.append(self.predict(obs, actions, z[-1]))
            return actions

        envs = trained.make_envs(contexts)
        with hook:
            returns, _ = aib_envs.evaluate(envs, policy, self.agent.window_size, 1)
        envs.close()
        self.returns = returns[:, 0]
        obs, actions = (np.stack(part, axis=1)[:, -steps:] for part in zip(*kept, strict=True))
        self.obs, self.actions = obs[:, :-1], actions[:, :-1]
        self.deltas = obs[:, 1:] - obs[:, :-1]
        stacked = lambda parts: torch.stack(parts, 1)[:, -steps:-1].cpu().numpy() if parts else None
        self.z, self.predictions = stacked(z), stacked(predictions)

    def told(self, z):
        """What the networks are told when z is inferred."""
        inference = getattr(self.agent, "infer_for_actor", self.agent)  # of RSAC, of the others
        hypernetwork = getattr(inference, "hypernetwork", None)
        return z if hypernetwork is None else hypernetwork(z)

    @torch.no_grad()
    def predict(self, obs, actions, z):
        """The dynamics model's prediction of one step [n, obs_dim]."""
        inputs = torch.from_numpy(np.concatenate([obs, actions], 1)).to(z.device)
        return self.agent.dynamics(inputs, self.told(z))

    @torch.no_grad()
    def actions_with(self, z):
        """The policy's mean actions [n, T - 1, act_dim] in the same states if z [8] were inferred in all of them."""
        obs = torch.from_numpy(self.obs).flatten(0, 1).to(self.agent.log_alpha.device)
        z = torch.from_numpy(z).to(obs.device).expand(len(obs), -1)
        mean, _ = self.agent.actor(obs, self.told(z))
        return torch.tanh(mean).view(self.actions.shape).cpu().numpy()


def returns_with(trained, contexts, rollouts=1, change=lambda z: z, length=None):
    """Returns [n, rollouts] in the benchmark's protocol. At every step, those of the warm-up included, the policy is
    told `change(z)` instead of z [n, 8], inferred from the last `length` transitions (None: from the whole window)."""
    agent = trained.agent
    if length is None:
        length = agent.window_size
    envs = trained.make_envs(contexts)

    def policy(obs, history):
        return agent.act(obs, ShortWindow(history, length))

    with encoder_of(agent).register_forward_hook(lambda encoder, window, z: change(z)):
        returns, _ = aib_envs.evaluate(envs, policy, agent.window_size, rollouts)
    envs.close()
    return returns


def inferred(trained, contexts, rollouts=1):
    """Returns [n, rollouts] with the agent's own z, and these z: a list of [n, 8], one a step."""
    z = []

    def remember(now):
        z.append(now)
        return now

    return returns_with(trained, contexts, rollouts, remember), z


def with_noise(scale, level, seed=0):
    """A `change` for `returns_with`: adds Gaussian noise with the standard deviation `level` * `scale` [8]."""
    generator = torch.Generator().manual_seed(seed)

    def change(z):
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        return z + level * scale * noise

    return change


def with_z_of(z, rows):
    """A `change` for `returns_with`: environment i is told what has been `inferred` (z) in environment `rows`[i]."""
    steps = iter(z)
    return lambda _: next(steps)[rows]


def scale_of(z, window, rollouts):
    """Standard deviation [8] over contexts of their mean z: of what `inferred` returns, without the warm-up."""
    episodes = torch.stack(z).unflatten(0, (rollouts, -1))[:, window:]
    return episodes.mean((0, 1)).std(0, correction=0)


def lengths_of(window):
    """Lengths of windows in which the encoder sees 0, 1, 2, 4, ... and all of the transitions that it looks at: every
    fifth."""
    places = np.linspace(0, window - 1, window // 5).astype(int)
    seen = [2**i for i in range(len(places).bit_length()) if 2**i < len(places)]
    return [0, *(int(window - places[-number]) for number in seen), window]


def partners(task, other_mode):
    """For each of the 60 contexts the place [60] of another one in its set, of the same or of the other mode: the first
    from half a set further on."""
    mode = mode_of(task)
    found = []
    for i, split in enumerate(aib_envs.SPLITS):
        labels = [context.get(mode) for context in aib_envs.context_set(task, split)]
        n = len(labels)
        for j, label in enumerate(labels):
            order = [(j + n // 2 + k) % n for k in range(n)]
            found.append(i * n + next(k for k in order if (labels[k] != label) == other_mode))
    return np.array(found)


def wrong_z(trained, rollouts=1):
    """Returns [60, rollouts] when the policy is told a wrong z: {"noise": {standard deviations: returns}, "window":
    {transitions: returns}, "z of": {whose: returns}}."""
    contexts = aib_envs.eval_contexts(trained.task)
    window = trained.agent.window_size
    plain, z = inferred(trained, contexts, rollouts)
    scale = scale_of(z, window, rollouts)
    test = partial(returns_with, trained, contexts, rollouts)
    noise = {level: test(with_noise(scale, level)) for level in NOISE if level}
    lengths = {length: test(length=length) for length in lengths_of(window)[:-1]}
    whose = {"own context": plain, "same mode": test(with_z_of(z, partners(trained.task, False)))}
    if mode_of(trained.task):
        whose["other mode"] = test(with_z_of(z, partners(trained.task, True)))
    return {"noise": {0: plain} | noise, "window": lengths | {window: plain}, "z of": whose}


def wrong_z_rows(task, run, found):
    """Rows of the table, one for each set, of what `wrong_z` has found."""
    columns = {"return": found["noise"][0]}
    columns |= {f"noise {level:g}": found["noise"][level] for level in NOISE if level >= 0.5}
    columns |= {"empty window": found["window"][0], "1 transition": found["window"][1]}
    columns |= {f"z of {whose}": found["z of"].get(whose) for whose in ("same mode", "other mode")}
    rows = []
    for split in aib_envs.SPLITS:
        row = {"task": task, "run": run, "set": split}
        for name, returns in columns.items():
            row[name] = "" if returns is None else f"{aib_envs.by_split(returns)[split].mean():.1f}"
        rows.append(row)
    return rows


def wrong_z_figure(results, task):
    """Mean return over noise on z, over the transitions in the window, and with the z of other contexts. A line or a
    kind of bars is the mean over the runs with the same label; `results`: (label, what `wrong_z` has found)."""
    figure, axes = panels(3, ["noise on z", "short window", "z of another context"], sharey=True)
    figure.suptitle(task)
    labels = list(dict.fromkeys(label for label, _ in results))
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        own = [found for name, found in results if name == label]
        mean = lambda part, own=own: {key: np.mean([found[part][key] for found in own]) for key in own[0][part]}
        look = style(label) | {"marker": "o", "markersize": 3, "label": label}
        noise = mean("noise")
        axes[0].plot(noise.keys(), noise.values(), **look)
        window = mean("window")
        axes[1].plot(range(len(window)), window.values(), **look)
        bars = mean("z of")
        at = np.arange(len(bars)) + width * (i - (len(labels) - 1) / 2)
        drawn = axes[2].bar(at, bars.values(), 0.9 * width, color=style(label)["color"])
        axes[2].bar_label(drawn, fmt="%.0f", fontsize=7)
    axes[0].set(xlabel="standard deviations of z over contexts", ylabel="return of an episode")
    axes[1].set_xticks(range(len(window)), window)
    axes[1].set_xlabel(f"transitions in the window (of {max(window)})")
    axes[2].set_xticks(range(len(bars)), bars)
    axes[2].set_xlabel("whose z")
    legend(figure, axes)
    return figure


# --------------------------------------------------- Kinds of actions ------------------------------------------------


def sampling(agent):
    """With it the agent's policy samples its actions in evaluation, as it does in training; its encoder does not."""
    generator = torch.Generator().manual_seed(0)

    def sample(actor, inputs, output):
        mean, log_std = output
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        return mean + log_std.exp() * noise, log_std

    return agent.actor.register_forward_hook(sample)


NOISY = 0.05  # standard deviation of the noise on actions, which lie in [-1, 1]


def kinds_of_actions(trained):
    """An episode in each of the 60 contexts, {kind: Episodes}: with the policy's mean actions, as the benchmark has it;
    with a little noise on them; with sampled actions; and with mean actions while the policy is told a fixed z, the
    mean of the context's own z under sampled actions (of methods with an encoder)."""
    play = partial(Episodes, trained, aib_envs.eval_contexts(trained.task))
    found = {"mean": play(), "noisy": play(noise=NOISY)}
    with sampling(trained.agent):
        found["sampled"] = play()
    if encoder_of(trained.agent):
        z = found["sampled"].z.mean(1)
        with encoder_of(trained.agent).register_forward_hook(lambda *now: torch.from_numpy(z).to(now[2].device)):
            found["fixed z"] = play()
    return found


def actions_rows(trained, found):
    """Rows of the table, one a set, of what `kinds_of_actions` has found; on ODE also the share that is stuck."""
    rows = []
    for split in aib_envs.SPLITS:
        row = {"task": trained.task, "run": trained.name, "set": split}
        for kind, episodes in found.items():
            own = aib_envs.by_split(episodes.returns)[split]
            row[kind] = f"{own.mean():.1f}"
            if trained.task == "ODE":
                row[f"stuck, {kind}"] = f"{100 * (own <= STUCK).mean():.0f} %"
        rows.append(row)
    return rows


CALM = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # bounds of the mean size of the actions in a window


def calm_windows(trained, found):
    """What z tells about the mode after calm windows, of what `kinds_of_actions` has found: {kind: {bounds: (share of
    steps, mean place of z, share of steps with an unclear z)}}. The place is 1 at the mean z of the context's own mode
    and -1 at that of the other, which are taken from sampled actions; below 0.3 it is called unclear."""
    if aib_envs.get_task(trained.task).steps - 1 <= trained.agent.window_size:
        return {}  # there is no full window
    key = mode_of(trained.task)
    modes_of = np.array([context[key] for context in aib_envs.eval_contexts(trained.task)])
    z = found["sampled"].z.mean(1)
    low, high = (z[modes_of == mode].mean(0) for mode in np.unique(modes_of))
    own = np.where(modes_of == modes_of.max(), 1, -1)[:, None]
    window = trained.agent.window_size
    tables = {}
    for kind in ("mean", "noisy", "sampled"):
        episodes = found[kind]
        place = own * ((episodes.z - (low + high) / 2) @ (high - low)) * 2 / ((high - low) ** 2).sum()
        sizes = np.abs(episodes.actions).mean(2)
        size = np.lib.stride_tricks.sliding_window_view(sizes, window, axis=1)[:, :-1].mean(2)  # of the steps before
        place = place[:, window:]
        tables[kind] = {}
        for bounds in itertools.pairwise(CALM):
            inside = (size >= bounds[0]) & (size < bounds[1])
            if inside.mean() >= 0.005:  # fewer steps tell nothing
                there = place[inside]
                tables[kind][bounds] = inside.mean(), there.mean(), (there < 0.3).mean()
    return tables


def calm_rows(trained, tables):
    """Rows of the table of what `calm_windows` has found."""
    rows = []
    for kind, table in tables.items():
        for (low, high), (share, place, unclear) in table.items():
            row = {
                "task": trained.task,
                "run": trained.name,
                "actions": kind,
                "mean size in the window": f"{low:g} to {high:g}",
            }
            row |= {
                "steps": f"{100 * share:.0f} %",
                "place of z": f"{place:.2f}",
                "z unclear": f"{100 * unclear:.0f} %",
            }
            rows.append(row)
    return rows


# ----------------------------------------------- Adaptation inside an episode ----------------------------------------


def adaptation(trained, rollouts=4):
    """What happens when the actuators change in the middle of an episode, and when the window tells of the other mode.
    Rewards [T] averaged over 20 contexts and rollouts: as `usual`, `switch`, `foreign` (with a window only); `modes`
    [2]: the reward of each mode in training contexts. And how far the embedding has gone from the old to the new
    context's mean [T], for both."""
    contexts = pairs_of(trained.task, 10)
    other = np.arange(len(contexts)) ^ 1
    kinds = {"usual": {}, "switch": {"switch": True}}
    if trained.agent.window_size:
        kinds["foreign"] = {"foreign": other}
    runs = {
        kind: [roll_out(trained, contexts, r, **options) for r in range(rollouts)] for kind, options in kinds.items()
    }
    rewards = {kind: np.mean([run[0] for run in done], axis=(0, 1)) for kind, done in runs.items()}
    rewards["modes"] = np.array(trained.modes)
    moved = {}
    if runs["usual"][0][1] is not None:
        usual = np.mean([run[1] for run in runs["usual"]], axis=(0, 2))  # each context's mean [n, 8]
        way = usual[other] - usual
        if (way**2).sum() > 1e-8:  # else the encoder tells the modes not apart at all
            for kind, done in runs.items():
                z = np.mean([run[1] for run in done], axis=0)
                moved[kind] = ((z - usual[:, None]) * way[:, None]).sum((0, 2)) / (way**2).sum()
    return rewards, moved


def recovery(rewards, smooth=5):
    """Level of reward before the middle of the episode, the lowest after it (means of `smooth` steps), and the steps
    until `smooth` begin whose mean is back at 90 % of the level (None: not in this episode)."""
    middle = len(rewards) // 2
    level = rewards[middle - middle // 4 : middle].mean()
    after = np.convolve(rewards[middle:], np.ones(smooth) / smooth, "valid")
    enough = after >= 0.9 * level
    drop = len(enough) if enough.all() else int(enough.argmin())  # the first time that it is too low
    back = np.flatnonzero(enough[drop:])
    return level, after.min(), 0 if enough.all() else int(drop + back[0]) if len(back) else None


def masters_both(rewards):
    """Does the agent earn rewards [2] per step in both modes, in the worse one at least half as much as in the better
    one?"""
    return min(rewards) >= max(0.5 * max(rewards), 0.01)


def adaptation_figure(results, task):
    """Reward and embedding around the middle of the episode; a line is the mean over the runs of a method that master
    both modes, and its label says if some do not."""
    titles = ["actuators change at 0", "foreign window from 0 on", "embedding: 0 old, 1 new context"]
    reasons = ["no run masters both modes", "no run with a window masters both modes", "no run with an embedding does"]
    figure, axes = panels(3, titles, width=4.2)
    figure.suptitle(task)
    for method in dict.fromkeys(method for method, _, _ in results):
        runs = [(rewards, moved) for name, rewards, moved in results if name == method]
        own = [(rewards, moved) for rewards, moved in runs if masters_both(rewards["modes"])]
        label = method if len(own) == len(runs) else f"{method} ({len(own)} of {len(runs)} runs)"
        curves = [[rewards[kind] for rewards, _ in own if kind in rewards] for kind in ("switch", "foreign")]
        curves.append([moved["switch"] for _, moved in own if moved])
        for axis, values in zip(axes, curves, strict=True):
            if values:
                steps = np.arange(len(values[0])) - len(values[0]) // 2
                axis.plot(steps, np.mean(values, 0), label=label, **style(method))
    steps, window = aib_envs.get_task(task).steps, aib_envs.get_task(task).window
    for axis, reason in zip(axes, reasons, strict=True):
        if not axis.lines:
            say(axis, reason)
            continue
        axis.axvline(0, color="#999999", linewidth=0.8)
        axis.set_xlim(-min(steps // 4, 2 * window), min(steps // 2, 5 * window))
        axis.set_xlabel("steps after the change")
    axes[0].set_ylabel("reward per step")
    axes[1].sharey(axes[0])
    legend(figure, axes)
    return figure


def recovery_rows(task, run, rewards):
    """Rows of the table of adaptation times, of what `adaptation` has found."""
    rows = []
    for kind, what in {"switch": "actuators change", "foreign": "foreign window"}.items():
        if kind in rewards:
            level, low, steps = recovery(np.asarray(rewards[kind]))
            row = {
                "task": task,
                "run": run,
                "what": what,
                "reward before": f"{level:.2f}",
                "lowest after": f"{low:.2f}",
            }
            if level < 0.01:
                steps = "nothing to lose"
            elif not masters_both(rewards["modes"]):  # the other mode's reward is no adaptation
                steps = "masters one mode only"
            rows.append(row | {"steps to 90 %": {None: "not in the episode", 0: "nothing lost"}.get(steps, steps)})
    return rows


ABOUT = """Deterministic policies, evaluation-mode encoder. Embeddings: five episodes in each of the 60
contexts; t-SNE of them, and cosine similarity of the means of three contexts, in both modes where there are two.
Variability: trace of the covariance over the dimensions, the sum of its three parts. Overlap: mean cosine similarity of
the contexts' means. Information in nats about which context it is (c), the mode (S), and the continuous dimensions
given the mode (U|S), with what is possible at most; and what an untrained encoder tells about the mode, from the same
windows.

Wrong z: the return (mean over contexts; the figure shows the mean of all 60) in the benchmark's evaluation, warm-up
included, while the policy is told a wrong z at every step. Noise is Gaussian and fresh at each step; its unit is the
standard deviation over the 60 contexts of the mean z of each, in each dimension. A short window holds the last
transitions only, and zeros as in the warm-up for the others; of these the encoder looks at every fifth. Another
context's z is what the agent inferred there at the same step of its own episode; that context lies half a set away.

Kinds of actions: one episode in each context. The benchmark's evaluation takes the policy's *mean* action. *Noisy*
actions are these with Gaussian noise of standard deviation 0.05; *sampled* ones are drawn from the policy, as in
training. With a *fixed z* the policy takes its mean action, told the mean of the context's z under sampled actions. A
rollout of ODE with a return of 60 or less has waited at a wrong equilibrium: it is stuck.
Small actions show little of the actuators. So the second table says, by the mean size of the actions in the window,
where z then lies: at 1 on the mean z of its own mode, at -1 on that of the other; below 0.3 it is called unclear.

Adaptation: 20 contexts, four episodes each. In the middle of an episode the actuators change; or, with the actuators as
they were, the window is filled with what an agent in the other mode, otherwise the same context, has gone through.
Steps to 90 %: from the change until five begin whose mean reward is back at 90 % of the level before.
"""


def add_agent(page, task, trained, directory, rows):
    """Figure and table rows of one agent's embeddings."""
    own, z = embedding_rows(trained)
    rows += own
    figure, similarity, labels = embedding_figure(trained, z)
    page.figure(task, f"{directory.name}_embeddings", figure, f"Embeddings of {trained.name} on {task}")
    same = np.equal.outer(labels, labels)
    off_diagonal = ~np.eye(len(labels), dtype=bool)
    spread = lambda x: f"{x.min():.2f} to {x.max():.2f}"
    text = f"{trained.name}: cosine similarity within a mode {spread(similarity[same & off_diagonal])}"
    if not same.all():
        text += f", across modes {spread(similarity[~same])}"
    page.text(task, f"{text}.\n".replace("*", "\\*"))


def add_wrong_z(page, task, agents, rollouts, rows):
    """Figure and table rows of a task's agents with an encoder when z is wrong. `agents`: (directory, Trained, label).
    Returns the numbers, {name of the directory: ...}."""
    results, numbers = [], {}
    for directory, trained, label in agents:
        found = wrong_z(trained, rollouts)
        results.append((label, found))
        rows += wrong_z_rows(task, trained.name, found)
        lists = {part: {key: returns.tolist() for key, returns in group.items()} for part, group in found.items()}
        numbers[directory.name] = {"task": task, "method": trained.method, "steps": trained.steps} | lists
    if results:
        page.figure(task, f"{task}_wrong_z", wrong_z_figure(results, task), f"Return with a wrong z on {task}")
    return numbers


def report(directories, out, rollouts=1):
    """Everything that `python tools/report_agents.py` writes. `rollouts`: of each context, for every wrong z."""
    agents, problems = [], []
    for directory, trained in load_all(directories, problems):
        if has_several_signs(trained.task):
            problems.append(f"{directory}: a task with several signs is for tools/report_modes.py")
        else:
            agents.append((directory, trained))
    tell(problems)
    if not agents:
        fail("no agents, nothing is written")
    page = Page(out / "figures", "figures")
    page.text("How to read this", ABOUT)
    rows, wrong, sampled, calm, times = [], [], [], [], []
    numbers = {}
    for task in dict.fromkeys(trained.task for _, trained in agents):
        own = [(directory, trained) for directory, trained in agents if trained.task == task]
        results, labelled = [], []
        for directory, trained in own:
            several = len({other.steps for _, other in own if other.method == trained.method}) > 1
            label = f"{trained.method}, {trained.steps:,} steps" if several else trained.method
            labelled.append((directory, trained, label))
            if hasattr(trained.agent, "log_alpha"):  # soft actor-critic, whose policy is stochastic
                played = kinds_of_actions(trained)
                sampled += actions_rows(trained, played)
                if encoder_of(trained.agent) and mode_of(task):
                    calm += calm_rows(trained, calm_windows(trained, played))
            if trained.encoders:
                add_agent(page, task, trained, directory, rows)
            if mode_of(task):
                rewards, moved = adaptation(trained)
                results.append((label, rewards, moved))
                times += recovery_rows(task, trained.name, rewards)
        if any(row["task"] == task for row in rows):
            page.figure(task, f"{task}_information", information_figure(rows, task), f"Information in z on {task}")
        with_z = [entry for entry in labelled if encoder_of(entry[1].agent)]
        numbers |= add_wrong_z(page, task, with_z, rollouts, wrong)
        problems += [f"{entry[0]}: not under Wrong z, it has no encoder" for entry in labelled if entry not in with_z]
        if results:
            page.figure(task, f"{task}_adaptation", adaptation_figure(results, task), f"Adaptation on {task}")
    page.table("Embeddings", "embeddings", rows)
    page.table("Wrong z", "wrong_z", wrong)
    page.table("Kinds of actions", "actions", even(sampled))
    page.table("Kinds of actions", "calm_windows", calm)
    page.table("Adaptation", "adaptation", times)
    for problem in problems:
        page.text("Notes", f"- {problem}")
    write(out / "wrong_z.json", json.dumps(numbers) + "\n")
    page.save(out / "agents.md", "Trained agents")
    print(f"{len(agents)} agents: {out / 'agents.md'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="+", type=runs_path, help="directories of finished runs")
    parser.add_argument("--out", type=path_of, default=Path("report"), help="where the report is written")
    parser.add_argument("--rollouts", type=int, default=1, help="episodes in each context for every wrong z")
    args = parser.parse_args()
    if args.rollouts < 1:
        fail("--rollouts must be at least 1")
    try:
        report(args.runs, args.out, args.rollouts)
    except OSError as error:
        fail(error)


if __name__ == "__main__":
    main()
