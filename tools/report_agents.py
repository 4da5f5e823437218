"""What trained agents have understood: embeddings, and what happens when the actuators change inside an episode.

python tools/report_agents.py runs/<dir> ...    loads their agents: report/agents.md
"""

import argparse
import copy
from dataclasses import dataclass
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

import aib_envs
import aib_run
from report import (
    Page,
    csv_text,
    fail,
    legend,
    modes,
    panels,
    plt,
    rank,
    read_run,
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
    modes: tuple = ()  # its reward per step in the training contexts of each mode [2]

    def embed(self, history):
        """z [n, 8] of the windows that `history` ends with; None for a method without an encoder."""
        if not hasattr(self.agent, "encoder"):
            return None
        window = self.agent.window_size
        positions = np.linspace(0, window - 1, window // 5).astype(int)[None]  # a fifth, evenly spaced in time
        device = self.agent.log_alpha.device
        parts = [torch.from_numpy(part).to(device) for part in history.window(positions)]
        self.agent.encoder.eval()
        with torch.no_grad():
            return self.agent.encoder(*parts).cpu().numpy()


def load(directory):
    """The `Trained` agent of a run's directory."""
    run = read_run(directory, [])
    agent, args, make_envs = aib_run.load_agent(directory)
    name = f"{run.method} (seed {run.seed}, {run.steps:,} steps)"
    return Trained(name, run.method, run.task, agent, run.steps, partial(make_envs, args), mode_rewards(run))


def mode_rewards(run):
    """Reward per step in each mode [2], in training contexts; [] without modes."""
    return np.array(run.mode_returns()) / aib_envs.get_task(run.task).steps


class MixedWindow:
    """A History whose transitions before step `start` come from other environments of it: those at `rows`."""

    def __init__(self, history, rows, start):
        self.own = history
        self.other = copy.copy(history)
        self.start = start
        self.t = history.t
        for name in ("obs", "next_obs", "actions"):
            if hasattr(history, name):
                setattr(self.other, name, getattr(history, name)[rows])

    def window(self, positions):
        foreign = (self.own.t - self.own.window_size + positions < self.start)[..., None]
        pairs = zip(self.own.window(positions), self.other.window(positions), strict=True)
        return tuple(np.where(foreign, other, own) for own, other in pairs)


def roll_out(trained, contexts, rollout=0, switch=False, foreign=None):
    """Rewards [n, T], embeddings [n, T, 8] (or None) and observations [n, T + 1, obs_dim] of one episode, deterministic
    actions. `switch`: the binary dimension takes its other value in the middle. `foreign` [n]: in the middle,
    each window is filled with what the environment of that index has gone through."""
    envs = trained.make_envs(contexts)
    agent = trained.agent
    task = aib_envs.get_task(trained.task)
    n = len(contexts)
    middle = task.steps // 2
    rewards = np.zeros((n, task.steps))
    embeddings, observations = [], []
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
            observations.append(obs)
        actions = agent.act(obs, view)
        next_obs, reward, _, _, infos = envs.step(actions)
        history.add(obs, actions, reward, next_obs, infos["diverged"])
        obs = next_obs
        if t >= 0:
            rewards[:, t] = reward
    envs.close()
    z = None if embeddings[0] is None else np.stack(embeddings, axis=1)
    return rewards, z, np.stack([*observations, obs], axis=1)


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
    dimension = modes(task)
    return dimension.key if dimension else None


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
    binary = modes(task)
    if not binary:
        return [{dimension.key: value} for value in values]
    return [{dimension.key: value, binary.key: mode} for value in values for mode in binary.values]


INFORMATION = ("I(Z;c)", "I(Z;S)", "I(Z;U|S)")


def embedding_rows(trained):
    """A row of the diagnostics for each set, and z [60, samples, 8]."""
    mode, rows, contexts = mode_of(trained.task), [], aib_envs.eval_contexts(trained.task)
    episodes = [roll_out(trained, contexts, rollout)[1] for rollout in range(5)]  # one alone would tell its start
    z = np.concatenate([z[:, :: max(1, z.shape[1] // 10)] for z in episodes], axis=1)
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
        rows.append(row)
    return rows, z


def information_figure(rows, task):
    """Bars of the three pieces of information for each run and set, under their ceilings."""
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


def recovery(rewards, share=0.9, smooth=5):
    """Level of reward before the middle of the episode, the lowest after it (means of `smooth` steps), and the steps
    until `smooth` begin whose mean is back at `share` of the level (None: not in this episode)."""
    middle = len(rewards) // 2
    level = rewards[middle - middle // 4 : middle].mean()
    after = np.convolve(rewards[middle:], np.ones(smooth) / smooth, "valid")
    enough = after >= share * level
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


def paths(agents, task, starts=8):
    """Where a double integrator goes: {method: [path [starts, T + 1, 2] for each mode]}, of each method's first agent;
    the default mode comes first. The starts are the same in both."""
    mode = modes(task)
    contexts = [{mode.key: value} for value in sorted(mode.values, key=lambda value: value != mode.default)]
    first = {trained.method: trained for trained in reversed(agents)}
    methods = {method: first[method] for method in sorted(first, key=rank)}
    one = lambda trained, context: np.concatenate([roll_out(trained, [context], r)[2] for r in range(starts)])[..., :2]
    return {method: np.stack([one(trained, context) for context in contexts]) for method, trained in methods.items()}


def paths_figure(found, task):
    """Draws what `paths` has found: a row for each method, a column for each mode."""
    titles = ["normal actuators", f"{'reversed' if mode_of(task) == 'inversion' else 'swapped'} actuators"]
    size, circle = (3.0 * len(titles), 3.0 * len(found)), np.linspace(0, 2 * np.pi, 100)
    figure, axes = plt.subplots(len(found), len(titles), figsize=size, squeeze=False, layout="constrained")
    for row, (method, paths_of_modes) in zip(axes, found.items(), strict=True):
        row[0].set_ylabel(method)
        for axis, title, points in zip(row, titles, np.asarray(paths_of_modes), strict=True):
            axis.plot(0.1 * np.cos(circle), 0.1 * np.sin(circle), color="#009E73", linewidth=1.5, label="goal")
            axis.plot(*points.transpose(2, 1, 0), color=style(method)["color"], linewidth=0.8)
            axis.plot(*points[:, 0].T, "o", color="#999999", markersize=3, label="start")
            share = 100 * (np.hypot(*points[:, 1:].transpose(2, 0, 1)) <= 0.1).mean()
            axis.set_title(f"{title}: {share:.0f} % of the steps at the goal", fontsize=8)
            axis.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=[], yticks=[], aspect="equal")
    legend(figure, axes[0])
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


ABOUT_EMBEDDINGS = """Deterministic policies, evaluation-mode encoder. Embeddings: five episodes in each of the 60
contexts; t-SNE of them, and cosine similarity of the means of three contexts, in both modes where there are two.
Variability: trace of the covariance over the dimensions, the sum of its three parts. Overlap: mean cosine similarity of
the contexts' means. Information in nats about which context it is (c), the mode (S), and the continuous dimensions
given the mode (U|S), with what is possible at most. Adaptation: 20 contexts, four episodes each. In the middle of an
episode the actuators change; or, with the actuators as they were, the window is filled with what an agent in the other
mode, otherwise the same context, has gone through. Steps to 90 %: from the change until five begin whose mean reward is
back at 90 % of the level before.
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


def report(directories, out):
    """Everything that `python tools/report_agents.py` writes."""
    agents, problems = [], []
    for directory in dict.fromkeys(directories):
        try:
            agents.append((directory, load(directory)))
        except (Exception, SystemExit) as error:  # torch's are of many kinds; aib_run ends programs
            problems.append(f"{directory}: cannot be used ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
    tell(problems)
    if not agents:
        fail("no agents, nothing is written")
    agents.sort(key=lambda pair: (pair[1].task, rank(pair[1].method), pair[1].name))
    page = Page(out / "figures", "figures")
    page.text("How to read this", ABOUT_EMBEDDINGS)
    rows, times = [], []
    for task in dict.fromkeys(trained.task for _, trained in agents):
        own = [(directory, trained) for directory, trained in agents if trained.task == task]
        results = []
        for directory, trained in own:
            if hasattr(trained.agent, "encoder"):
                add_agent(page, task, trained, directory, rows)
            if mode_of(task):
                rewards, moved = adaptation(trained)
                several = len({other.steps for _, other in own if other.method == trained.method}) > 1
                label = f"{trained.method}, {trained.steps:,} steps" if several else trained.method
                results.append((label, rewards, moved))
                times += recovery_rows(task, trained.name, rewards)
        if aib_envs.get_task(task).physics == "DoubleIntegrator" and mode_of(task):
            figure = paths_figure(paths([trained for _, trained in own], task), task)
            page.figure(task, f"{task}_paths", figure, f"Paths on {task}")
        if any(row["task"] == task for row in rows):
            page.figure(task, f"{task}_information", information_figure(rows, task), f"Information in z on {task}")
        if results:
            page.figure(task, f"{task}_adaptation", adaptation_figure(results, task), f"Adaptation on {task}")
    page.table("Embeddings", "embeddings", rows)
    page.table("Adaptation", "adaptation", times)
    for problem in problems:
        page.text("Notes", f"- {problem}")
    for name, table in page.tables.items():
        write(out / "tables" / f"{name}.csv", csv_text(table))
    write(out / "agents.md", page.render("Trained agents") + "\n")
    print(f"{len(agents)} agents: {out / 'agents.md'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="where the report is written")
    args = parser.parse_args()
    try:
        report(args.runs, args.out)
    except OSError as error:
        fail(error)


if __name__ == "__main__":
    main()
