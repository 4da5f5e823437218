"""What trained agents do in a mode that they have never seen: tasks with several signs, as in relatives/aib_signs.py.

python tools/report_modes.py runs/<dir> ...    loads their agents: report/modes.md
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import aib_envs
import report_agents
from report import Page, even, fail, legend, panels, path_of, runs_path, tell

ABOUT = """One episode in each of the 60 contexts with mean actions, and one with random actions, which show more of the
world than a policy that has reached its goal, or that pushes against a wall. Seen modes are those of train and eval-in.
From random actions: *Dynamics error*: mean squared error of the predicted change of the observation, over the mean
square of the change itself, so that 1 is what a model earns that predicts no change. *Nearest z*: to which seen mode's
mean z the mean z of an episode is nearest. *Distance*: from the mean z of this mode to the nearest one of another seen
mode, in units of the mean distance between seen modes. From the policy's own actions: *Acts as in*: in which seen mode
the same policy, in the same state, would act most like it; it is then told the mean z of that mode. *Unlike it*: how
far its actions still are from those, mean square, in units of the mean between two seen modes. *Forces towards the
goal* (DI only): the share of the first five steps in which the force along x, along y drives the point towards 0;
later a good policy brakes.
"""
EARLY = 5  # steps


def mode_keys(task):
    """The keys of the task's dimensions with two values."""
    return [d.key for d in aib_envs.get_task(task).dimensions if d.values]


def name_of(mode):
    """ "+ -" of (1, -1)."""
    return " ".join("-" if value == -1 else "+" if value == 1 else str(value) for value in mode)


def rows_of(trained, played, wandered, contexts):
    """Rows of the table: one for each mode. And the mean z of each context [60, 8], None without an encoder. `played`:
    episodes with the policy's actions; `wandered`: with random ones."""
    keys = mode_keys(trained.task)
    mode = [tuple(context[key] for key in keys) for context in contexts]
    seen = sorted(set(mode[:40]), reverse=True)  # train and eval-in
    of = lambda which: np.array([m == which for m in mode])
    pairs = list(itertools.combinations(seen, 2))
    z = centres = None
    if wandered.z is not None:
        z = wandered.z.mean(1)
        centres = {m: z[of(m)].mean(0) for m in seen}
        scale = np.mean([np.linalg.norm(centres[a] - centres[b]) for a, b in pairs])
        as_in = {m: played.actions_with(centres[m]) for m in seen}
    rows = []
    for m in sorted(set(mode), reverse=True):
        own = of(m)
        row = {"task": trained.task, "run": trained.name, "mode": name_of(m), "seen": "yes" if m in seen else "no"}
        row["return"] = f"{played.returns[own].mean():.1f}"
        if wandered.predictions is not None:
            deltas = wandered.deltas[own]
            row["dynamics error"] = f"{np.mean((wandered.predictions[own] - deltas) ** 2) / np.mean(deltas**2):.2g}"
        if centres:
            distances = np.stack([np.linalg.norm(z[own] - centres[s], axis=1) for s in seen])
            row["nearest z"] = shares(distances.argmin(0), seen)
            others = [np.linalg.norm(z[own].mean(0) - centres[s]) for s in seen if s != m]
            row["distance"] = f"{min(others) / scale:.2f}"
            unlike = np.stack([((played.actions[own] - as_in[s][own]) ** 2).mean((1, 2)) for s in seen])
            row["acts as in"] = shares(unlike.argmin(0), seen)
            between = np.mean([(as_in[a][own] - as_in[b][own]) ** 2 for a, b in pairs])
            row["unlike it"] = f"{unlike.min(0).mean() / between:.2f}"
        if trained.task == "DI-Signs":
            pushed = played.actions[own, :EARLY] * np.array(m)
            towards = (pushed * played.obs[own, :EARLY, :2] < 0).mean((0, 1))
            row["forces towards the goal"] = ", ".join(f"{100 * share:.0f} %" for share in towards)
        rows.append(row)
    return rows, z


def shares(indices, seen):
    """ "+ -: 75 %, - +: 25 %" of indices into the seen modes."""
    counts = np.bincount(indices, minlength=len(seen)) / len(indices)
    return ", ".join(f"{name_of(m)}: {100 * share:.0f} %" for m, share in zip(seen, counts, strict=True) if share)


def figure_of(trained, z, contexts):
    """The mean z of each context on the first two principal components of those in seen modes."""
    keys = mode_keys(trained.task)
    mode = [tuple(context[key] for key in keys) for context in contexts]
    centre = z[:40].mean(0)
    axes = np.linalg.svd(z[:40] - centre, full_matrices=False)[2][:2]
    places = (z - centre) @ axes.T
    figure, (axis,) = panels(1, [trained.name])
    for m in sorted(set(mode), reverse=True):
        own = np.array([other == m for other in mode])
        marker = "o" if m in mode[:40] else "x"
        axis.scatter(*places[own].T, s=15, marker=marker, label=name_of(m) + (" unseen" if marker == "x" else ""))
    axis.set(xlabel="first principal component of z", ylabel="second")
    legend(figure, [axis])
    return figure


def report(directories, out):
    """Everything that `python tools/report_modes.py` writes."""
    agents, problems = [], []
    for directory, trained in report_agents.load_all(directories, problems):
        if len(mode_keys(trained.task)) < 2:
            problems.append(f"{directory}: not a task with several signs, but {trained.task}")
        elif not hasattr(trained.agent, "log_alpha"):
            problems.append(f"{directory}: not soft actor-critic, but {trained.method}")
        else:
            agents.append((directory, trained))
    tell(problems)
    if not agents:
        fail("no agents, nothing is written")
    page = Page(out / "figures", "figures")
    page.text("How to read this", ABOUT)
    table = []
    for directory, trained in agents:
        contexts = aib_envs.eval_contexts(trained.task)
        played = report_agents.Episodes(trained, contexts)
        wandered = report_agents.Episodes(trained, contexts, predict=True, random=True)
        rows, z = rows_of(trained, played, wandered, contexts)
        table += rows
        if z is not None:
            figure = figure_of(trained, z, contexts)
            page.figure(trained.task, f"{directory.name}_modes", figure, f"Mean z of {trained.name} in each context")
    page.table("Modes", "modes", even(table))
    for problem in problems:
        page.text("Notes", f"- {problem}")
    page.save(out / "modes.md", "Modes")
    print(f"{len(agents)} agents: {out / 'modes.md'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="+", type=runs_path, help="directories of finished runs")
    parser.add_argument("--out", type=path_of, default=Path("report"), help="where the report is written")
    args = parser.parse_args()
    try:
        report(args.runs, args.out)
    except OSError as error:
        fail(error)


if __name__ == "__main__":
    main()
