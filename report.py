"""The paper's tables and figures from a directory of runs.

    python report.py runs/                           tables and figures of what has finished: report/report.md
    python report.py --embeddings runs/<dir> ...     loads trained agents: embeddings, adaptation: report/embeddings.md
    python report.py --collect results/runs runs/    keeps of every finished run what the first command needs

Tables are written as CSV too, figures as PNG and SVG. What cannot be used is named, and the rest is reported.
"""

import collections
import contextlib
import csv
import importlib
import itertools
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: threads are no help where everything is small

import matplotlib
import numpy as np
import scipy.stats
import tyro

import aib_envs
import aib_speed  # noqa: F401 (its tasks have reports, too)
import aib_tools

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
GROUPS = {"all": None, "overlapping": True, "non-overlapping": False}  # of tasks
SETS = [*aib_envs.SPLITS, "all sets"]
# Their names in paper_results.json.
PAPER_GROUPS = {"all": "all", "overlapping": "overlap", "non-overlapping": "non_overlap"}
PAPER_SETS = {"train": "train", "eval-out": "eval_out", "all sets": "aggregated"}

# Okabe and Ito's colours, which a colour-blind reader can tell apart, each with a line of its own.
STYLE = {
    "DR": ("#000000", "-"),
    "Concat": ("#E69F00", "--"),
    "DA": ("#56B4E9", (0, (8, 2))),
    "DMA": ("#009E73", ":"),
    "DMA-Pearl": ("#CC79A7", (0, (5, 1))),
    "DMA*": ("#0072B2", (0, (3, 1, 1, 1))),
    "DMA*-SH": ("#D55E00", "-"),
}
TOL = ["#882255", "#44AA99", "#999933", "#332288", "#AA4499", "#117733"]  # Tol's, for other methods
MORE = itertools.cycle(itertools.product(["--", ":", "-."], TOL))
MARKERS = "os^Dv*PX<>"
# The tasks of the aggregates.
BENCHMARK = ["DI", "DI-Friction", "DI-Perm", "ODE", "Cartpole", "Cheetah", "Reacher-E", "Reacher-H", "Reacher-H-Perm"]
BENCHMARK += ["BallInCup", "Walker", "WalkerGym", "HopperGym"]


@dataclass
class Args:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ("runs",)  # directories of runs, at whatever depth
    embeddings: tuple[str, ...] = ()  # directories of finished runs, whose agents are loaded
    collect: str | None = None  # a directory for small copies of finished runs, in place of a report
    out: str = "report"  # where the report is written


# ------------------------------------------------------ Statistics ----------------------------------------------------


def iqm(x, axis=-1):
    """Interquartile mean: the mean of the middle half (Agarwal et al. 2021); of three values or fewer, their mean."""
    return scipy.stats.trim_mean(x, 0.25, axis=axis)


def bootstrap(groups, statistic, resamples=2000):
    """95 % percentile interval of `statistic`, resampling seeds within each group (stratified by task). `groups`: list
    of arrays [seeds, ...]; `statistic` maps a list of arrays [resamples, seeds, ...] to [resamples, ...]."""
    rng = np.random.default_rng(0)
    drawn = [group[rng.integers(0, len(group), (resamples, len(group)))] for group in map(np.asarray, groups)]
    return np.percentile(statistic(drawn), [2.5, 97.5], axis=0)


def pooled_iqm(groups):
    """IQM over tasks and seeds of `groups` [resamples, seeds, ...], each group (a task) with the same weight."""
    n = np.lcm.reduce([group.shape[1] for group in groups])
    return iqm(np.concatenate([np.repeat(group, n // group.shape[1], axis=1) for group in groups], axis=1), axis=1)


def improvement(x, y):
    """P(a run of x is better than one of y) [...], ties count half: x [..., n], y [..., m]. Mann and Whitney's U."""
    x, y = np.asarray(x)[..., :, None], np.asarray(y)[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean((-2, -1))


def mean_improvement(groups):
    """`improvement`, averaged over tasks: of the first half of `groups` over the second, one group a task."""
    half = len(groups) // 2
    return np.mean([improvement(x, y) for x, y in zip(groups[:half], groups[half:], strict=True)], axis=0)


# --------------------------------------------------- Reading of the runs ----------------------------------------------


@dataclass
class Run:
    """A finished run."""

    directory: Path
    task: str
    method: str  # as in the paper, with * for "star", and with what differs from the other runs of the method
    seed: int
    steps: int
    args: dict
    script: str | None
    returns: dict  # {split: [20, rollouts]}
    metrics: list  # one dict per evaluation
    name: str = ""  # of its directory when it was made, which ends with the time
    held_out: tuple = ()  # of hyperzero.py: the training contexts (from 0 to 19) whose experts stage 2 has not seen

    def aer(self, split):
        """Average episodic return over contexts and rollouts."""
        return float(np.mean([self.returns[s].mean() for s in (aib_envs.SPLITS if split == "all sets" else [split])]))

    def scaled(self, split):
        """AER with the bounds of the task's returns as 0 and 1."""
        low, high = aib_envs.get_task(self.task).bounds
        return (self.aer(split) - low) / (high - low)


def read_metrics(path, problems):
    """The lines of a metrics.jsonl, up to the first that is not one."""
    metrics = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            found = json.loads(line)
            if "aer" not in found and "experts" in found:  # of hyperzero.py's first stage
                continue
            if not np.isfinite([found["global_step"], *(found["aer"][split] for split in aib_envs.SPLITS)]).all():
                raise ValueError
            metrics.append(found)
        except (ValueError, LookupError, TypeError):
            problems.append(f"{path}: line {number} cannot be read; what comes before it is used")
            break
    else:
        if not metrics:
            problems.append(f"{path}: is missing or has no evaluation; the run is not in the curves")
    return metrics


def paper_name(method):
    """A method's name as in the paper."""
    return re.sub("^DMAstar", "DMA*", method)


def read_runs(directories):
    """The finished runs below `directories`, and a list of what cannot be used (str)."""
    runs, problems = [], []
    for directory in directories:
        paths = sorted(Path(directory).rglob("config.json"))
        if not paths:
            problems.append(f"{directory}: no runs here")
        for path in paths:
            run = path.parent
            try:
                config, results = json.loads(path.read_text()), run / "results.json"
                if not results.exists():
                    problems.append(f"{run}: has not finished (no results.json)")
                    continue
                results = json.loads(results.read_text())
                args = results["args"]
                returns = {split: np.array(results["returns"][split], float) for split in aib_envs.SPLITS}
                if not all(r.ndim == 2 and len(r) == 20 and r.size and np.isfinite(r).all() for r in returns.values()):
                    raise ValueError("returns must be 20 x rollouts finite numbers in each set")
                if results["contexts"] != {split: aib_envs.context_set(args["env_id"], split) for split in returns}:
                    raise ValueError("its contexts are not the benchmark's")
                fields = paper_name(config["method"]), int(args["seed"]), int(args["total_timesteps"]), args
                measured = returns, read_metrics(run / "metrics.jsonl", problems)
                more = str(config.get("run")), results.get("held_out", [])
                runs.append(Run(run, args["env_id"], *fields, config.get("script"), *measured, *more))
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                problems.append(f"{run}: cannot be used ({type(error).__name__}: {error})")
    return tell_apart(runs, problems), problems


def read_some_runs(directories):
    """The same, but ends the program if there is not a single run."""
    runs, problems = read_runs(directories)
    if not runs:
        aib_tools.fail(f"no finished runs, nothing is written ({'; '.join(problems)})")
    return runs, problems


def settings(run):
    """The script and the arguments that change what a run learns, and how far these are from the script's defaults,
    which also stand for flags that the script did not have yet."""
    free = aib_tools.FREE - {"eval_rollouts"} | {
        "seed",
        "run_dir",
        "env_id",
        "dataset",
        "resume",
        "eval_only",
        "context",
    }
    free |= {"eval_every", "eval_epochs"}
    defaults = {}
    with contextlib.suppress(Exception):  # the script is not here any more, or broken
        defaults = vars(importlib.import_module(run.script.removesuffix(".py")).Args()) if run.script else {}
    own = {name: value for name, value in (defaults | run.args).items() if name not in free}
    far = sum(name not in defaults or defaults[name] != value for name, value in own.items())
    return own | {"script": run.script}, far


def tell_apart(runs, problems):
    """Runs of a method with other flags get names that say so; of two with the same flags and seed the newer counts.
    A method's own flags are those that most of its runs have; of two as frequent, those nearer to the defaults."""
    for group in by_method(runs).values():
        counts = collections.Counter(json.dumps(settings(run)[0], sort_keys=True) for run in group)
        usual = max(group, key=lambda run: (counts[json.dumps(settings(run)[0], sort_keys=True)], -settings(run)[1]))
        usual = settings(usual)[0]
        for run in group:
            if other := [f"{name} {value}" for name, value in settings(run)[0].items() if usual.get(name) != value]:
                run.method += f" ({', '.join(other)})"
                problems.append(f"{run.directory}: is shown as {run.method}, for its flags differ from the other runs'")
    newest = {}
    for run in sorted(runs, key=lambda run: run.name.rpartition("__")[2]):  # milliseconds
        key = run.task, run.method, run.seed, run.steps
        if key in newest:
            problems.append(f"{newest[key].directory}: left out, {run.directory} is a newer run of the same")
        newest[key] = run
    return sorted(newest.values(), key=lambda run: (run.task, rank(run.method), run.steps, run.seed))


def rank(method):
    """A sort key: methods in the order of STYLE, unknown ones after them by name."""
    return list(STYLE).index(method) if method in STYLE else len(STYLE), method


def style(method):
    """matplotlib's color and line style of a method, the same in every figure."""
    if method not in STYLE:
        STYLE[method] = next(MORE)[::-1]
    color, line = STYLE[method]
    return {"color": color, "linestyle": line}


def of_one_length(runs, problems):
    """Of each task, the runs of that length which most of its runs have (of two such lengths, the longer)."""
    kept = []
    for task in dict.fromkeys(run.task for run in runs):
        own = [run for run in runs if run.task == task]
        steps = max(collections.Counter(run.steps for run in own).items(), key=lambda item: item[::-1])[0]
        kept += [run for run in own if run.steps == steps]
        if others := sorted({run.steps for run in own} - {steps}):
            problems.append(
                f"{task}: figures and aggregates are of {steps} steps; runs of {others} are in the table only"
            )
    return kept


def missing_seeds(runs):
    """A line for each method that lacks seeds which other methods have on the same task and for as many steps."""
    lines = []
    for task in dict.fromkeys(run.task for run in runs):
        seeds = {
            m: {run.seed for run in own} for m, own in by_method([run for run in runs if run.task == task]).items()
        }
        for method, own in seeds.items():
            if lacks := sorted(set.union(*seeds.values()) - own):
                lines.append(f"{task}: {method} has no run with seed {', '.join(map(str, lacks))}, others have")
    return lines


def by_method(runs):
    """{method: [runs]} in the paper's order."""
    methods = sorted({run.method for run in runs}, key=rank)
    return {method: [run for run in runs if run.method == method] for method in methods}


# -------------------------------------------------------- Tables ------------------------------------------------------


def cell(values):
    """Interquartile mean and interval, or the values themselves if there are less than three."""
    if len(values) < 3:
        return ", ".join(f"{value:.1f}" for value in values)
    low, high = bootstrap([values], pooled_iqm)
    return f"{iqm(values):.1f} [{low:.1f}, {high:.1f}]"


def best(values):
    """The method whose interval lies above all others' ({method: values per seed}), from five seeds on, or None."""
    if len(values) < 2 or min(map(len, values.values())) < 5:  # of three or four the interval is but their range
        return None
    bounds = {method: bootstrap([x], pooled_iqm) for method, x in values.items()}
    top = max(bounds, key=lambda method: bounds[method][0])
    return top if all(bounds[top][0] > high for method, (_, high) in bounds.items() if method != top) else None


def task_table(runs, task, paper):
    """Rows of the table of one task: one for each method and number of steps."""
    rows = []
    own = [run for run in runs if run.task == task]
    published = paper["AER_aggregated_over_sets_v2"].get(task, {})
    for steps in sorted({run.steps for run in own}):
        group = by_method([run for run in own if run.steps == steps])
        winners = {split: best({m: [run.aer(split) for run in g] for m, g in group.items()}) for split in SETS}
        for method, members in group.items():
            row = {"method": method, "seeds": len(members), "steps": steps}
            for split in SETS:
                text = cell([run.aer(split) for run in members])
                row[split] = f"**{text}**" if winners[split] == method else text
            rows.append(row | {"paper, all sets": published.get(method, "")})
    return rows


def prediction_table(runs, task):
    """Rows for the methods that plan with a model: its errors in each set, at the end."""
    rows = []
    for method, members in by_method([run for run in runs if run.task == task]).items():
        last = [run.metrics[-1]["prediction"] for run in members if run.metrics and "prediction" in run.metrics[-1]]
        if last:
            row = {"method": method, "seeds": len(last), "steps": members[0].steps}
            for ahead, split in itertools.product(("one_step", "twenty_step"), aib_envs.SPLITS):
                values = ", ".join(f"{found[ahead][split]:.2g}" for found in last)
                row[f"{ahead.replace('_', ' ')}, {split}"] = values
            rows.append(row)
    return rows


def experts_table(runs, task):
    """Rows for the methods that learn from experts: the experts' mean return in their own (training) contexts; and in
    those whose experts the method has not seen, its return and theirs."""
    rows = []
    for method, members in by_method([run for run in runs if run.task == task]).items():
        if known := [run for run in members if run.metrics and "experts" in run.metrics[-1]]:
            experts = lambda run, contexts: np.mean(np.array(run.metrics[-1]["experts"])[contexts])
            row = {"method": method, "its experts, train": cell([experts(run, slice(None)) for run in known])}
            known = [run for run in known if run.held_out]
            row["held out"] = cell([run.returns["train"][run.held_out].mean() for run in known]) if known else ""
            row["its experts, held out"] = cell([experts(run, run.held_out) for run in known]) if known else ""
            rows.append(row)
    for name in ("held out", "its experts, held out"):
        if not any(row[name] for row in rows):
            rows = [{key: value for key, value in row.items() if key != name} for row in rows]
    return rows


def group_of(runs, group):
    """The runs on the tasks of one of GROUPS."""
    return [run for run in runs if GROUPS[group] is None or aib_envs.get_task(run.task).overlap == GROUPS[group]]


def scores(runs, split):
    """[array [seeds]] of scaled AER, one for each task."""
    tasks = dict.fromkeys(run.task for run in runs)
    return [np.array([run.scaled(split) for run in runs if run.task == task]) for task in tasks]


def for_aggregates(runs, problems):
    """The runs of the benchmark's 13 tasks (ODE-2 is there as ODE)."""
    if left := sorted({run.task for run in runs} - set(BENCHMARK)):
        problems.append(f"{', '.join(left)}: not in the aggregates, which hold the 13 tasks of the benchmark")
    return [run for run in runs if run.task in BENCHMARK]


def aggregate_table(runs, paper):
    """IQM of scaled AER over tasks and seeds: one row for each method and group of tasks."""
    rows, published, columns = [], paper["normalised_IQM"], paper["normalised_IQM"]["columns"]
    for group in GROUPS:
        for method, members in by_method(group_of(runs, group)).items():
            row = {"tasks": group, "method": method, "number of tasks": len({run.task for run in members})}
            counts = [len(own) for own in scores(members, "train")]
            row["seeds a task"] = " to ".join(map(str, sorted({min(counts), max(counts)})))
            for split in SETS:
                values = scores(members, split)
                text = f"{pooled_iqm([own[None] for own in values])[0]:.2f}"
                if min(map(len, values)) >= 3:
                    low, high = bootstrap(values, pooled_iqm)
                    text += f" [{low:.2f}, {high:.2f}]"
                row[split] = text
                if split in PAPER_SETS and method in columns:
                    value = published[PAPER_SETS[split]][PAPER_GROUPS[group]][columns.index(method)]
                    row[split] += f" (paper {value:.2f})"
            rows.append(row)
    return rows


def comparison_table(runs, paper, ours="DMA*-SH"):
    """Relative gain of DMA*-SH over each method and probability of improvement, on the tasks that both have."""
    rows, published = [], paper["relative_gain_of_DMA*-SH_percent"]
    for group, method in itertools.product(GROUPS, [m for m in by_method(runs) if m != ours]):
        members = by_method(group_of(runs, group))
        common = {run.task for run in members.get(ours, [])} & {run.task for run in members.get(method, [])}
        if not common:
            continue
        row = {"tasks": group, f"{ours} against": method, "common tasks": len(common)}
        for split in SETS:
            x, y = (scores([run for run in members[m] if run.task in common], split) for m in (ours, method))
            above, below = (pooled_iqm([own[None] for own in values])[0] for values in (x, y))
            gain = f"{100 * (above / below - 1):+.1f} %" if below > 0.005 else "(from 0)"
            if split in PAPER_SETS and f"vs {method}" in published["columns"]:
                column = published["columns"].index(f"vs {method}")
                gain += f" (paper {published[PAPER_SETS[split]][PAPER_GROUPS[group]][column]:+.1f} %)"
            chance = mean_improvement(x + y)
            text = f"{gain}; P = {chance:.2f}"
            if min(map(len, x + y)) >= 3:
                low, high = bootstrap(x + y, mean_improvement)
                text += f" [{low:.2f}, {high:.2f}]"
            row[split] = text
        rows.append(row)
    return rows


def markdown(rows):
    """A table of `rows`, dicts with the same keys, in Markdown."""
    escape = lambda x: str(x).replace("DMA*", "DMA\\*").replace("|", "\\|")
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([row[key] for key in rows[0]] for row in rows)]
    return "\n".join("| " + " | ".join(map(escape, line)) + " |" for line in lines) + "\n"


def write_csv(path, rows):
    """The same rows as a file, without the marks of bold face."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {key: str(value).strip("*") if str(value).startswith("**") else value for key, value in row.items()}
            for row in rows
        )


# ------------------------------------------------------- Figures ------------------------------------------------------


def save(figure, path):
    """Writes a figure as PNG and SVG to `path`; returns the Markdown that shows it."""
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"))
    plt.close(figure)
    return f"![{path.stem}](figures/{path.name}.png)\n"


def panels(columns, titles, height=3.2, width=3.6, **options):
    """A figure and its axes, [columns] in one row with a title each; width and height in inches, of one panel."""
    figure, axes = plt.subplots(
        1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False, **options
    )
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def legend(figure, axes):
    """One legend below the figure, of all labels in `axes`, in as many columns as fit."""
    found = {}
    for axis in axes:
        found |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if found:
        fit = int(figure.get_figwidth() / (0.09 * max(map(len, found)) + 0.8))  # inches for a letter, for a line
        columns = max(min(len(found), fit), 1)
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncol=columns, frameon=False)


def draw_band(axis, x, values, method):
    """A line for the IQM over runs [runs, points] and its interval, or their range below three runs."""
    low, high = bootstrap([values], pooled_iqm) if len(values) >= 3 else (values.min(0), values.max(0))
    axis.plot(x, iqm(values, axis=0), label=method, **style(method))
    axis.fill_between(x, low, high, color=style(method)["color"], alpha=0.15, linewidth=0)


def learning_curves(runs, task):
    """AER over vector steps: a panel for each set, a line for each method, a band of interval95 over its seeds."""
    figure, axes = panels(3, aib_envs.SPLITS, sharey=True)
    figure.suptitle(task)
    for method, members in by_method([run for run in runs if run.task == task]).items():
        for axis, split in zip(axes, aib_envs.SPLITS, strict=True):
            curves = [{m["global_step"]: m["aer"][split] for m in run.metrics} for run in members if run.metrics]
            steps = sorted(set.intersection(*map(set, curves))) if curves else []
            if steps:
                draw_band(axis, np.array(steps) / 1000, np.array([[c[s] for s in steps] for c in curves]), method)
    axes[0].set_ylabel("AER")
    for axis in axes:
        axis.set_xlabel("vector steps (thousands)")
    legend(figure, axes)
    return figure


def shadow_figure(runs, task):
    """Shadow gradient norm over training, beside the return; None if no run has logged it."""
    figure, axes = panels(2, ["shadow gradient norm", "AER, eval-out"])
    figure.suptitle(task)
    found = False
    for method, members in by_method([run for run in runs if run.task == task]).items():
        logged = [run for run in members if run.metrics and all("shadow_gradient" in m for m in run.metrics)]
        for run in logged:
            steps = [m["global_step"] / 1000 for m in run.metrics]
            label = {"label": method} if run is logged[0] else {}
            axes[0].plot(steps, [m["shadow_gradient"] for m in run.metrics], **style(method), **label)
            axes[1].plot(steps, [m["aer"]["eval-out"] for m in run.metrics], **style(method))
            found = True
    axes[0].set_yscale("log")
    for axis in axes:
        axis.set_xlabel("vector steps (thousands)")
    if not found:
        plt.close(figure)
        return None
    legend(figure, axes)
    return figure


def zero_returns(task, directory):
    """What doing nothing earns in each of the 60 contexts, mean of 10 rollouts: {split: [20]}. Computed once and kept
    in `directory`."""
    for path in (HERE / "results" / "zero_action.json", directory / "zero_action.json"):
        known = {}
        with contextlib.suppress(OSError, ValueError):  # none yet, or damaged
            known = json.loads(path.read_text())
        if task in known:
            return known[task]
    envs = aib_envs.make_vec(task, aib_envs.eval_contexts(task))
    nothing = np.zeros(envs.action_space.shape, np.float32)
    returns = aib_envs.by_split(aib_envs.evaluate(envs, lambda obs, history: nothing, 0, 10))
    known[task] = {split: r.mean(1).round(2).tolist() for split, r in returns.items()}
    aib_tools.write(directory / "zero_action.json", known)
    return known[task]


def context_figure(runs, task, zero):
    """Return in every context of the three sets. With a binary dimension: a panel for each mode, a curve for each
    method over the continuous dimension. With two continuous ones: a panel for each, points."""
    dimensions = aib_envs.get_task(task).dimensions
    continuous, modes = [d for d in dimensions if d.inner][:2], next((d for d in dimensions if d.values), None)
    shown = [(continuous[0], value) for value in modes.values] if modes else [(d, None) for d in continuous]
    sign = "+" if modes and min(modes.values) < 0 else ""
    figure, axes = panels(
        len(shown), [f"{modes.key} {v:{sign}d}" if modes else d.key for d, v in shown], sharey=True, width=4.5
    )
    figure.suptitle(task)
    for axis, (dimension, value) in zip(axes, shown, strict=True):
        axis.axvspan(*dimension.inner, color="#EEEEEE", linewidth=0, label="training range")
        for method, members in [("doing nothing", None), *by_method([run for run in runs if run.task == task]).items()]:
            points = []
            for split in aib_envs.SPLITS:
                means = np.mean([run.returns[split].mean(1) for run in members], 0) if members else zero[split]
                pairs = zip(aib_envs.context_set(task, split), means, strict=True)
                points += [(c[dimension.key], m) for c, m in pairs if not modes or c[modes.key] == value]
            x, y = np.array(sorted(points)).T
            look = style(method) if members else {"color": "#999999", "linestyle": "-"}
            look |= {
                "marker": MARKERS[rank(method)[0] % len(MARKERS)] if members else ".",
                "markersize": 3,
                "label": method,
            }
            if modes:
                axis.plot(x, y, linewidth=1.2 if members else 3, **look)
            else:
                axis.plot(x, y, **look | {"linestyle": "", "fillstyle": "none", "markersize": 5})
        axis.set_xlabel(dimension.key)
    axes[0].set_ylabel("return")
    legend(figure, axes)
    return figure


EXPLANATION = """Average episodic return (AER) over 20 contexts and the rollouts of the last evaluation. Tables:
interquartile mean over seeds and its 95 % bootstrap interval (of three or four seeds, that is their range), or, below
three seeds, the seeds' own values. Bold, from five seeds on: the interval lies above those of all other methods. Steps
are vector steps, one in each of the 20 contexts. Curves: the same mean and interval, or the range of the runs below
three seeds. Return in each context: mean over seeds. Prediction errors: mean squares, of normalised differences one
step and of standardised states 20 steps ahead. The paper's numbers are of its own number of steps (100,000 to
500,000).
"""
OVER_TASKS = """Interquartile mean over tasks and seeds, every task with the same weight, of AER scaled by the tasks'
return bounds. Rows with another number of tasks cannot be compared; the paper's numbers are of all its tasks.
"""


def report(args):
    """Everything that `python report.py runs/` writes."""
    out = Path(args.out)
    runs, problems = read_some_runs(args.runs)
    paper = json.loads((HERE / "results" / "paper_results.json").read_text())
    (out / "figures").mkdir(parents=True, exist_ok=True)
    (out / "tables").mkdir(exist_ok=True)
    same = of_one_length(runs, problems)
    problems += missing_seeds(same)
    tasks = list(dict.fromkeys(run.task for run in runs))
    page = ["# Report\n", f"{len(runs)} finished runs of {len(tasks)} tasks.\n"]
    page += [EXPLANATION]
    tables = {}
    for task in tasks:
        page.append(f"## {task}\n")
        tables[task] = task_table(runs, task, paper)
        page.append(markdown(tables[task]))
        for name, table in {"prediction": prediction_table(same, task), "experts": experts_table(same, task)}.items():
            if table:
                tables[f"{task}_{name}"] = table
                page.append(markdown(table))
        figures = {
            "curves": learning_curves(same, task),
            "contexts": context_figure(same, task, zero_returns(task, out)),
        }
        figures["shadow"] = shadow_figure(same, task)
        page += [save(figure, out / "figures" / f"{task}_{name}") for name, figure in figures.items() if figure]
    if counted := for_aggregates(same, problems):
        tables["aggregates"], tables["comparison"] = aggregate_table(counted, paper), comparison_table(counted, paper)
        page += ["## Over tasks\n", OVER_TASKS]
        page.append(markdown(tables["aggregates"]))
        if tables["comparison"]:
            page += [
                "Gain in that mean, and P, the probability that a run of DMA\\*-SH is better than one of the other.\n"
            ]
            page.append(markdown(tables["comparison"]))
    for name, rows in tables.items():
        if rows:
            write_csv(out / "tables" / f"{name}.csv", rows)
    if problems:
        page += ["## Not used, or not mixed\n", *(f"- {problem}" for problem in problems)]
    (out / "report.md").write_text("\n".join(page) + "\n")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(runs)} runs: {out / 'report.md'}")


def collect(args):
    """Copies of the finished runs that are small enough for a repository: no weights, no returns of single contexts
    before the last evaluation, returns to three decimals."""
    runs, problems = read_some_runs(args.runs)
    if any(run.directory.resolve() == Path(args.collect, run.directory.name).resolve() for run in runs):
        aib_tools.fail(f"--collect takes a directory for copies, not that of the runs; got {args.collect}")
    for run in runs:
        copy_of = Path(args.collect) / run.directory.name
        copy_of.mkdir(parents=True, exist_ok=True)
        config, results = (json.loads((run.directory / f"{name}.json").read_text()) for name in ("config", "results"))
        for file in (config, results):
            for name in ("run_dir", "dataset"):
                file["args"].pop(name, None)  # paths of the machine
        results["returns"] = {split: run.returns[split].round(3).tolist() for split in run.returns}
        kept = [{name: value for name, value in line.items() if name != "returns"} for line in run.metrics]
        aib_tools.write(copy_of / "config.json", config)
        aib_tools.write(copy_of / "results.json", json.dumps(results) + "\n")
        aib_tools.write(copy_of / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(runs)} runs: {args.collect}")


if __name__ == "__main__":
    try:
        args = aib_tools.read_flags(Args, __doc__, Args())
        if args.embeddings:
            import report_agents  # here, because it takes its tools from this file

            report_agents.embeddings(args)
        else:
            (collect if args.collect else report)(args)
    except OSError as error:
        aib_tools.fail(error)
