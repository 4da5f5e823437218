"""Tables, curves and verdicts from runs.

    python tools/report.py runs/                         what has been measured there: report/report.md
    python tools/report.py mine/ results/runs            your runs beside the published ones
    python tools/report.py --collect results/runs runs/  keeps of every finished run what this report needs

Beside report.md: every table as CSV, report/runs.csv with one number a cell, and the figures as PNG and SVG. Runs of
different length are never mixed. What cannot be used is named, and the rest is reported.
"""

import argparse
import collections
import contextlib
import csv
import functools
import io
import itertools
import json
import os
import sys
import textwrap
import zlib
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import aib_envs
import plan
import stats
from methods import METHODS

plt.switch_backend("Agg")  # draws into files only
RESULTS = ROOT / "results"
PAPER = json.loads((RESULTS / "paper_results.json").read_text())
SPLITS = aib_envs.SPLITS
SETS = (*SPLITS, "all sets")
OURS = "DMA*-SH"
LABELS = [method.label for method in METHODS.values()]
MAIN = ["DR", "Concat", "DA", "DMA", "DMA-Pearl", "DMA*", OURS, "RSAC"]  # in the overview
# Methods that have results here. Every other one is the reader's own, with a row in tools/methods.py or without.
PUBLISHED = {path.name.split("__")[1].replace("DMAstar", "DMA*") for path in RESULTS.glob("*/*__*__*")} | {*MAIN}
RIVALS = [OURS, "DMA*", "Concat", "DR"]  # the methods that the reader's own ones are compared with
KINDS = {"non-overlapping": False, "overlapping": True}  # can one policy act well in all contexts?
# The tasks of the paper's aggregates.
BENCHMARK = ["DI", "DI-Friction", "DI-Perm", "ODE", "Cartpole", "Cheetah", "Reacher-E", "Reacher-H", "Reacher-H-Perm"]
BENCHMARK += ["BallInCup", "Walker", "WalkerGym", "HopperGym"]
# Names in paper_results.json.
PAPER_KINDS = {"non-overlapping": "non_overlap", "overlapping": "overlap", "all": "all"}
PAPER_SETS = {"train": "train", "eval-out": "eval_out", "all sets": "aggregated"}
# Flags that tell no runs apart: they change nothing, or stand in the tables.
FREE = plan.NOT_COUNTED | {"env_id", "seed", "total_timesteps", "dataset"}
# Flags of many scripts that should be the same for all methods of a task, as the published runs have them.
DEFAULTS = {"learning_starts": 5000, "buffer_size": 100_000, "batch_size": 256, "gamma": 0.99, "tau": 0.005}
DEFAULTS |= {"policy_lr": 3e-4, "q_lr": 1e-3, "dynamics_lr": 3e-4, "eval_rollouts": 10, "bootstrap_at_limit": True}
# Scripts whose published runs have other values, which depend on the task, and their names.
RELATIVES = {"hyperzero.py": "HyperZero", "hyperdynamics.py": "HyperDynamics"}
STUCK = 60  # a rollout of ODE that ends with this or less, of 200, has waited at a wrong equilibrium


def fail(message):
    """Ends the program with one line."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def write(path, text):
    """A whole file or none. Bytes of a file's name that are no UTF-8 are written as escapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(text.encode(errors="backslashreplace"))
    temporary.replace(path)


# ---------------------------------------------------- Reading the runs ------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The code with which a run began or went on."""

    sha256: str  # of the script; "": not recorded
    commit: str
    changed: bool  # did the code differ from that commit?


@dataclass
class Run:
    """A run, finished or not."""

    directory: Path
    name: str  # of its directory when it was made, which ends with the time
    task: str
    method: str  # as the paper writes it, and with what differs from the other runs of the method
    seed: int
    steps: int  # of training
    script: str
    args: dict
    metrics: list  # a dict for each evaluation
    returns: dict | None  # {set: [20, rollouts]}; None: the run has not finished
    diverged: dict | None = None  # {set: [20, rollouts]} of bools; None: not recorded
    experts: list | None = None  # of hyperzero.py: each expert's return in its training context
    held_out: list | None = None  # of hyperzero.py: the contexts (0 to 19) whose experts stage 2 has not seen
    prediction: dict | None = None  # of hyperdynamics.py: {one_step, twenty_step: {set: error}}
    broke_down: str = ""  # why learning could not go on
    starts: tuple = ()  # a `Start` for the run's beginning and for each time it was resumed

    @property
    def setting(self):
        """The shared flags that differ from the published runs', as text. Only runs of one setting are compared."""
        return ", ".join(deviations(self, DEFAULTS))

    @property
    def published(self):
        """Which published method this is, perhaps in another setting; None: one of the reader's own."""
        return next((name for name in PUBLISHED if self.method in (name, in_setting(name, self.setting))), None)

    def aer(self, split):
        """Average episodic return over contexts and rollouts of the last evaluation."""
        if split == "all sets":
            return float(np.mean([self.aer(one) for one in SPLITS]))
        return float(self.returns[split].mean())

    def better(self, split):
        """The better of the last two evaluations, for each set separately: what the authors' code reports. The last but
        one has one rollout a context."""
        if split == "all sets":
            return float(np.mean([self.better(one) for one in SPLITS]))
        before = [line["aer"][split] for line in self.metrics[-2:-1]]
        return max([self.aer(split), *before])

    def scaled(self, split):
        """AER with the bounds of the task's returns as 0 and 1."""
        low, high = aib_envs.get_task(self.task).bounds
        return (self.aer(split) - low) / (high - low)

    def training(self):
        """How much of the task's training the run has had."""
        return self.steps / aib_envs.get_task(self.task).total_timesteps

    def mode_returns(self):
        """Mean return in the training contexts of each mode that they have; [] for a task without modes."""
        if not binary(self.task):
            return []
        contexts = aib_envs.context_set(self.task, "train")
        own = [[mode.items() <= context.items() for context in contexts] for mode in aib_envs.modes(self.task)]
        return [float(self.returns["train"][rows].mean()) for rows in own if any(rows)]

    def mode_rewards(self):
        """The same as reward per step [modes]."""
        return np.array(self.mode_returns()) / aib_envs.get_task(self.task).steps

    def worse_mode(self):
        """The return in the worst mode as a share of that in the best one; None without modes, or if the agent earns
        next to nothing in all of them."""
        found = sorted(self.mode_returns())
        enough = 0.01 * aib_envs.get_task(self.task).bounds[1]
        return found[0] / found[-1] if found and found[-1] >= enough else None

    def hours(self):
        return sum(self.metrics[-1].get("seconds", {}).values()) / 3600 if self.metrics else 0.0


def binary(task):
    """The task's dimension with two values, inversion or permutation, or None."""
    return next((d for d in aib_envs.get_task(task).dimensions if d.values), None)


def find_runs(directories, problems):
    """The directories of runs in and below `directories`; links are followed, what is no run is named. What runs.sh
    keeps in logs/ is passed over, and so is what a run that could not begin has left (.NAME)."""
    seen = set()

    def unreadable(error):
        problems.append(f"{error.filename}: cannot be read ({error.strerror})")

    for start in directories:
        for path, folders, files in os.walk(start, followlinks=True, onerror=unreadable):
            real = os.path.realpath(path)
            if real in seen:  # a link in a circle, or to what has been seen
                folders.clear()
                continue
            seen.add(real)
            if "config.json" in files:
                folders.clear()
                yield Path(path)
                continue
            folders[:] = sorted(name for name in folders if name != "logs" and not name.startswith("."))
            links = [name for name in files if not os.path.exists(os.path.join(path, name))]
            problems += [f"{os.path.join(path, name)}: a link to nothing" for name in links]
            if not folders:
                problems.append(f"{path}: no run is here (no config.json)")


def read_metrics(path, problems):
    """The lines of a metrics.jsonl that are evaluations, up to the first that cannot be read."""
    metrics = []
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
            if "aer" not in line and "experts" in line:  # of hyperzero.py's first stage
                continue
            values = [line["global_step"], *(line["aer"][split] for split in SPLITS)]
            values += [line.get("shadow_gradient", 0), *line.get("seconds", {}).values()]
            if not np.isfinite(values).all():
                raise ValueError
            metrics.append(line)
        except (ValueError, LookupError, TypeError, AttributeError):
            problems.append(f"{path}: line {number} cannot be read; what comes before it is used")
            return metrics
    if not metrics:
        problems.append(f"{path}: is missing or has no evaluation; the run is not in the curves")
    return metrics


def table_of(values, shape):
    """{set: array [20, rollouts]} of finite numbers. Raises ValueError."""
    found = {split: np.array(values[split], float) for split in SPLITS}
    for split, array in found.items():
        if array.ndim != 2 or len(array) != 20 or not array.size or not np.isfinite(array).all():
            raise ValueError(f"20 x rollouts finite numbers are needed in each set, not those of {split}")
        if shape and array.shape != shape[split].shape:
            raise ValueError(f"not as many as returns in {split}")
    return found


def numbers(values, length):
    """`values` as a list of `length` finite numbers, or of any length if that is None. Raises ValueError."""
    found = np.array(values, float)
    if found.ndim != 1 or not np.isfinite(found).all() or (length and len(found) != length):
        raise ValueError(f"{length or 'some'} finite numbers are needed")
    return found.tolist()


def read_extras(run, results, problems):
    """What only some methods have. A damaged part is named and left out."""
    last = run.metrics[-1] if run.metrics else {}

    def held_out():
        contexts = [int(i) for i in numbers(results["held_out"], None)]
        if not set(contexts) <= set(range(20)):
            raise ValueError("contexts have the numbers 0 to 19")
        return contexts

    def prediction():
        ahead = ("one_step", "twenty_step")
        found = [numbers([last["prediction"][key][split] for split in SPLITS], 3) for key in ahead]
        return dict(zip(ahead, (dict(zip(SPLITS, row, strict=True)) for row in found), strict=True))

    readers = {
        "diverged": (results, lambda: table_of(results["diverged"], run.returns)),
        "held_out": (results, held_out),
        "experts": (last, lambda: numbers(last["experts"], 20)),
        "prediction": (last, prediction),
    }
    for name, (source, read) in readers.items():
        if name not in source:
            continue
        try:
            setattr(run, name, read())
        except (ValueError, LookupError, TypeError) as error:
            problems.append(f"{run.directory}: its {name} cannot be used ({type(error).__name__}: {error})")


def starts_of(config):
    """The `Start`s of a config.json."""
    found = [config, *(config.get("resumed") or [])]
    return tuple(
        Start(str(start.get("script_sha256") or ""), str(start.get("commit")), bool(start.get("changed")))
        for start in found
    )


@functools.cache
def import_script(script):
    """Imports a run's script, for the tasks that it brings along. Why that fails (str), or None."""
    try:
        import aib_run  # here, for it imports PyTorch

        aib_run.load_script(script)
    except (Exception, SystemExit) as error:  # it may do anything
        return f"{script} cannot be imported ({type(error).__name__}: {error})"
    return None


def know_task(task, script):
    """Makes sure that the task of a run is in aib_envs.TASKS. Raises ValueError."""
    if task in list(aib_envs.TASKS) or ":" in task or not script:
        aib_envs.get_task(task)
        return
    reason = import_script(script) or f"{script} does not bring it along"
    if task not in list(aib_envs.TASKS):
        raise ValueError(f"unknown task {task!r}: {reason}")


def read_run(directory, problems):
    """The run in `directory`. Raises OSError, ValueError, LookupError, TypeError or AttributeError."""
    config = json.loads((directory / "config.json").read_text())
    finished = (directory / "results.json").exists()
    results = json.loads((directory / "results.json").read_text()) if finished else {"args": config["args"]}
    if results["args"].get("total_timesteps") != config["args"].get("total_timesteps"):  # it is being extended
        finished = False
        results = {"args": config["args"]}
    args = results["args"]
    script = Path(config.get("script") or "").name
    know_task(args["env_id"], script)
    task = aib_envs.task_name(args["env_id"])
    steps = int(args["total_timesteps"] or aib_envs.get_task(task).total_timesteps)
    metrics = read_metrics(directory / "metrics.jsonl", problems)
    run = Run(
        directory=directory,
        name=Path(str(config.get("run") or directory.name)).name,
        task=task,
        method=str(config["method"]).replace("DMAstar", "DMA*"),
        seed=int(args["seed"]),
        steps=steps,
        script=script,
        args=args,
        metrics=metrics,
        returns=table_of(results["returns"], None) if finished else None,
        broke_down=str(config.get("broke_down") or ""),
        starts=starts_of(config),
    )
    contexts = {split: aib_envs.context_set(task, split) for split in SPLITS}
    if finished and results["contexts"] != contexts:
        raise ValueError("its contexts are not the benchmark's")
    read_extras(run, results, problems)
    return run


def read_runs(directories):
    """Finished runs, unfinished ones that have a curve, and a list of what cannot be used (str)."""
    runs, problems = [], []
    for directory in find_runs(directories, problems):
        try:
            runs.append(read_run(directory, problems))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            problems.append(f"{directory}: cannot be used ({type(error).__name__}: {error})")
    tell_apart(runs, problems)
    finished = newest([run for run in runs if run.returns], problems)
    unfinished = [run for run in runs if run.returns is None and run.metrics]
    return finished, sorted(unfinished, key=order), problems


def order(run):
    """Runs stand in the order of tasks, lengths, methods and seeds."""
    return list(aib_envs.TASKS).index(run.task), run.steps, rank(run.method), run.seed


def rank(method):
    """A sort key: methods in the order of tools/methods.py, unknown ones after them by name."""
    name = method.partition(" (")[0]
    return LABELS.index(name) if name in LABELS else len(LABELS), method


def deviations(run, defaults):
    """Its shared flags that are not as in `defaults` (list of str). A flag that it does not have is as there."""
    return [f"{name} {run.args[name]}" for name, value in defaults.items() if run.args.get(name, value) != value]


def in_setting(name, setting):
    """The name of a method, or of a claim, in a `Run.setting`."""
    return f"{name} ({setting})" if setting else name


def defaults_of(method):
    """What a method's plain name says about its shared flags: its row in tools/methods.py counts, too."""
    words = next((row.flags.replace("=", " ").split() for row in METHODS.values() if row.label == method), [])
    given = dict(itertools.pairwise(words))
    found = {name: given.get(f"--{name.replace('_', '-')}") for name in DEFAULTS}
    off = {name: False for name in DEFAULTS if f"--no-{name.replace('_', '-')}" in words}
    return DEFAULTS | off | {name: float(text.replace("_", "")) for name, text in found.items() if text}


def apart(script):
    """Flags that `unusual` leaves out: they change nothing, or have defaults for all scripts."""
    return FREE if script in RELATIVES else FREE | set(DEFAULTS)


def settings(run):
    """The flags that `unusual` compares, and the script."""
    return {name: value for name, value in run.args.items() if name not in apart(run.script)} | {"script": run.script}


def script_defaults(script):
    """The default of each flag of a script, for runs that were made before it had the flag; {} if that is unknown."""
    with contextlib.suppress(Exception):  # it is not there any more, or broken
        import aib_run  # here, for it imports PyTorch

        return aib_run.plain(vars(aib_run.load_script(script).Args()))
    return {}


def tell_apart(runs, problems):
    """Names in a run's method what its plain name does not say: shared flags that are not `defaults_of` the method, and
    of the others, and of all of relatives, those that `unusual` finds. A line in `problems` for each such name."""
    counts = collections.Counter()
    example = {}
    for method, group in by_method(runs).items():
        for run, other in zip(group, unusual(group), strict=True):
            shared = [] if run.script in RELATIVES else deviations(run, defaults_of(method))
            if shared or other:
                run.method = in_setting(method, ", ".join([*shared, *other]))
                counts[run.method] += 1
                example.setdefault(run.method, run.directory)
    for name, count in counts.items():
        which = example[name] if count == 1 else f"{count} runs, {example[name]} among them"
        problems.append(f"{which}: shown as {name}, for the plain name stands for other flags")


def unusual(group):
    """For each run of a method: its flags that differ from the method's own (list of str). Those are what most of its
    runs have; of two as frequent, what is nearer to the script's defaults."""
    text = lambda found: json.dumps(found, sort_keys=True)
    found = [settings(run) for run in group]
    if len({text(one) for one in found}) == 1:
        return [[] for _ in group]
    defaults = {script: script_defaults(script) for script in {run.script for run in group}}
    found = [defaults[one["script"]] | one for one in found]
    found = [{name: value for name, value in one.items() if name not in apart(one["script"])} for one in found]
    counts = collections.Counter(map(text, found))

    def usualness(one):
        default = defaults[one["script"]]
        return counts[text(one)], -sum(default.get(name) != value for name, value in one.items())

    usual = max(found, key=usualness)
    return [[f"{name} {value}" for name, value in one.items() if usual.get(name) != value] for one in found]


def newest(runs, problems):
    """Of two finished runs of the same method, flags, seed and length, the one that began later."""
    kept = {}
    for run in sorted(runs, key=lambda run: run.name.rpartition("__")[2]):  # milliseconds
        key = run.task, run.method, run.seed, run.steps
        if key in kept:
            problems.append(f"{kept[key].directory}: left out, {run.directory} is a newer run of the same")
        kept[key] = run
    return sorted(kept.values(), key=order)


def by_method(runs):
    """{method: its runs}, in the order of methods."""
    methods = sorted({run.method for run in runs}, key=rank)
    return {method: [run for run in runs if run.method == method] for method in methods}


def tasks_of(runs):
    """The tasks that have runs, in the benchmark's order."""
    return [task for task in aib_envs.TASKS if any(run.task == task for run in runs)]


def lengths(runs):
    """The runs by task and length: {(task, steps): runs}."""
    found = collections.defaultdict(list)
    for run in sorted(runs, key=order):
        found[run.task, run.steps].append(run)
    return dict(found)


def main_runs(runs, task):
    """The runs of a task of one length: that of most methods, then of most runs, then the longer."""
    groups = [group for (name, _), group in lengths(runs).items() if name == task]
    return max(groups, key=lambda group: (len(by_method(group)), len(group), group[0].steps), default=[])


# ------------------------------------------------------- Numbers -----------------------------------------------------


def aers(runs, split):
    return np.array([run.aer(split) for run in runs])


def cell(values):
    """The value of each seed; from five seeds on the interquartile mean and its interval."""
    if len(values) < 5:
        return ", ".join(f"{value:.1f}" for value in values)
    low, high = stats.interval([np.array(values)], stats.iqm)
    return f"{stats.iqm(values):.1f} [{low:.1f}, {high:.1f}]"


def with_interval(groups, statistic, sign=""):
    """The statistic of groups [seeds] of several tasks, and its interval where there are seeds enough."""
    text = f"{float(statistic(*groups)):{sign}.2f}"
    if bounds := stats.interval(groups, statistic):
        text += f" [{bounds[0]:{sign}.2f}, {bounds[1]:{sign}.2f}]"
    return text


def doing_nothing(task):
    """What an action of 0 in every step earns: {set: [20]}, mean of 10 rollouts; None if nobody has measured it."""
    return json.loads((RESULTS / "zero_action.json").read_text()).get(task)


def task_table(runs, task):
    """A row for each method and number of steps, and one for doing nothing."""
    rows = []
    published = PAPER["AER_aggregated_over_sets_v2"].get(task, {})
    for (name, steps), group in lengths(runs).items():
        if name != task:
            continue
        for method, own in by_method(group).items():
            row = {"method": method, "steps": f"{steps:,}", "seeds": len(own)}
            row |= {split: cell(aers(own, split)) for split in SETS}
            row["better of the last two"] = cell([run.better("all sets") for run in own])
            row |= extra_columns(own)
            rows.append(row | ({"paper": published[method]} if method in published else {}))
    if rows and (nothing := doing_nothing(task)):
        means = {split: float(np.mean(values)) for split, values in nothing.items()}
        means["all sets"] = float(np.mean(list(means.values())))
        rows.append({"method": "doing nothing"} | {split: f"{mean:.1f}" for split, mean in means.items()})
    return even(rows)


def extra_columns(runs):
    """What only some tasks or methods have, for the runs of a method on a task: {column: cell}."""
    found = {}
    if binary(runs[0].task):
        shares = [run.worse_mode() for run in runs]
        found["worse mode"] = ", ".join("-" if share is None else f"{100 * share:.0f} %" for share in shares)
    if runs[0].task == "ODE":
        shares, means = zip(*map(stuck, runs), strict=True)
        found["stuck"] = ", ".join(f"{100 * share:.1f} %" for share in shares)
        found["mean of the others"] = ", ".join(f"{mean:.0f}" for mean in means)
    counted = [line["env_steps"] for line in runs[0].metrics if "env_steps" in line]
    if runs[0].script in RELATIVES and counted:
        found["steps of all environments"] = f"{counted[-1]:,}"
    taught = [run for run in runs if run.experts]
    if taught:
        found["its experts, train"] = cell([np.mean(run.experts) for run in taught])
    tested = [run for run in taught if run.held_out]
    if tested:
        found["held out"] = cell([run.returns["train"][run.held_out].mean() for run in tested])
        found["its experts, held out"] = cell([np.array(run.experts)[run.held_out].mean() for run in tested])
    planning = [run for run in runs if run.prediction]
    for ahead, split in itertools.product(("one_step", "twenty_step"), SPLITS) if planning else ():
        errors = [run.prediction[ahead][split] for run in planning]
        found[f"{ahead.replace('_', ' ')}, {split}"] = ", ".join(f"{error:.2g}" for error in errors)
    return found


def even(rows):
    """The rows, each with all columns that any of them has."""
    columns = dict.fromkeys(itertools.chain.from_iterable(rows))
    return [{name: row.get(name, "") for name in columns} for row in rows]


def without(rows, names):
    """The rows without the columns `names`."""
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def stuck(run):
    """Shares of rollouts that are stuck, and the mean return of the others, over all sets of ODE."""
    returns = np.concatenate([run.returns[split].ravel() for split in SPLITS])
    free = returns > STUCK
    return 1 - free.mean(), returns[free].mean() if free.any() else np.nan


def diverged_table(runs):
    """A row for each method and set with diverged simulations."""
    rows = []
    for (_, steps), group in lengths(runs).items():
        for (method, own), split in itertools.product(by_method(group).items(), SPLITS):
            known = [run.diverged[split] for run in own if run.diverged]
            count = int(sum(part.sum() for part in known))
            if count:
                row = {"method": method, "steps": f"{steps:,}", "set": split, "diverged rollouts": count}
                rows.append(row | {"of": sum(part.size for part in known)})
    return rows


def brief(value):
    """A number without decimals, below 10 with one."""
    return f"{value:.1f}" if abs(value) < 9.95 else f"{value:.0f}"


def overview_methods(runs):
    """The main methods and the reader's own, of those that have runs."""
    return [method for method, own in by_method(runs).items() if own[0].published in (*MAIN, None)]


def overview_table(runs):
    """A row for each task and length: AER over all sets of the main methods and of the reader's own, beside the
    paper's AER of DMA*-SH."""
    rows = []
    methods = overview_methods(runs)
    for (task, steps), group in lengths(runs).items():
        row = {"task": task, "steps": f"{steps:,}", "of the paper's": f"{brief(100 * group[0].training())} %"}
        for method in methods:
            own = [run for run in group if run.method == method]
            row[method] = f"{brief(stats.iqm(aers(own, 'all sets')))} ({len(own)})" if own else ""
        rows.append(row | {f"paper, {OURS}": PAPER["AER_aggregated_over_sets_v2"].get(task, {}).get(OURS, "")})
    return rows


def cost_table(runs):
    """Hours of wall clock: a row for each task, a column for each method with its mean time for a run."""
    rows = []
    for (task, steps), group in lengths(runs).items():
        hours = sum(run.hours() for run in group)
        row = {"task": task, "steps": f"{steps:,}", "runs": len(group), "hours": f"{hours:.1f}"}
        for method in by_method(runs):
            times = [run.hours() for run in group if run.method == method]
            row[f"{method}, a run"] = f"{np.mean(times):.2f}" if times else ""
        rows.append(row)
    total = sum(run.hours() for run in runs)
    return [*rows, dict.fromkeys(rows[0], "") | {"task": "all", "runs": len(runs), "hours": f"{total:.1f}"}]


# ------------------------------------------------------ Over tasks ---------------------------------------------------


def of_kind(runs, kind):
    """The runs on the benchmark's tasks of a kind, or of both ("all")."""
    own = [run for run in runs if run.task in BENCHMARK]
    return [run for run in own if kind == "all" or aib_envs.get_task(run.task).overlap == KINDS[kind]]


def groups_of(runs, method, tasks, value):
    """[array [seeds]] of `value(run)`, one for each task."""
    return [np.array([value(run) for run in runs if (run.task, run.method) == (task, method)]) for task in tasks]


def blocks(runs):
    """What can be compared over tasks: (kind, runs, methods, tasks), where each of at least two tasks has a run of each
    of at least two methods, all after the same share of their task's training; those of most tasks first. "all": of
    each kind two or more."""
    shares = sorted({run.training() for run in runs})
    for share, kind in itertools.product(shares, [*KINDS, "all"]):
        own = [run for run in of_kind(runs, kind) if run.training() == share]
        have = {task: frozenset(run.method for run in own if run.task == task) for task in tasks_of(own)}
        candidates = {a & b for a, b in itertools.product(have.values(), repeat=2)}
        tasks_with = {methods: [task for task in have if methods <= have[task]] for methods in candidates}
        for methods in sorted(candidates, key=lambda some: (-len(tasks_with[some]), -len(some), sorted(some))):
            tasks = tasks_with[methods]
            larger = any(methods < other and tasks == tasks_with[other] for other in candidates)
            overlapping = sum(aib_envs.get_task(task).overlap for task in tasks)
            if kind == "all" and min(overlapping, len(tasks) - overlapping) < 2:
                continue  # nearly the same as one of the kinds
            if len(tasks) > 1 and len(methods) > 1 and not larger:
                yield kind, own, sorted(methods, key=rank), tasks


def aggregate_table(runs, kind, methods, tasks):
    """A row for each method: scaled AER, as interquartile and as plain mean over tasks and seeds, and the paper's."""
    rows = []
    for method in methods:
        row = {"method": method, "seeds": ", ".join(map(str, map(len, groups_of(runs, method, tasks, Run.training))))}
        for split in ("all sets", "eval-out"):
            groups = groups_of(runs, method, tasks, lambda run, split=split: run.scaled(split))
            row[f"{split}: IQM"] = with_interval(groups, stats.pooled_iqm)
            row[f"{split}: mean"] = with_interval(groups, stats.pooled_mean)
            row[f"{split}: paper's IQM"] = paper_score(kind, method, split)
        rows.append(row)
    unknown = [name for name in rows[0] if "paper" in name and not any(row[name] for row in rows)]
    return without(rows, unknown)


def paper_score(kind, method, split):
    columns = PAPER["normalised_IQM"]["columns"]
    if method not in columns:
        return ""
    values = PAPER["normalised_IQM"][PAPER_SETS[split]][PAPER_KINDS[kind]]
    return f"{values[columns.index(method)]:.2f}"


# ------------------------------------------------------- Verdicts ----------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """Method `one` earns more than `share` times what `other` earns."""

    one: str
    other: str
    share: float = 1.0
    kinds: tuple = tuple(KINDS)  # of tasks
    words: str = ""

    def __str__(self):
        return self.words or f"{self.one} above {self.other}"

    def moved(self, setting):
        """The same about runs of another setting."""
        names = in_setting(self.one, setting), in_setting(self.other, setting)
        return Claim(*names, self.share, self.kinds, in_setting(str(self), setting))


# The orders that the paper finds. The shares of DR are ours.
CLAIMS = [Claim(OURS, "DMA*"), Claim("DMA*", "DMA"), Claim(OURS, "DA"), Claim(OURS, "Concat")]
CLAIMS += [Claim(OURS, "DR", 1 / 0.6, ("non-overlapping",), f"DR fails: below 0.6 of {OURS}")]
CLAIMS += [Claim("DR", OURS, 0.8, ("overlapping",), f"DR does not fail: above 0.8 of {OURS}")]
CLAIMS += [Claim(OURS, other) for other in ("DMA-Pearl", "DMA*-H", "DMA*-H-RLonly", "DMA-SH", "RSAC")]


def own_claims(runs):
    """Each of the reader's own methods against the rivals of its setting, and the paper's claims in other settings than
    that of the published runs."""
    settings_of = {method: own[0].setting for method, own in by_method(runs).items() if not own[0].published}
    found = [Claim(one, in_setting(other, own)) for (one, own), other in itertools.product(settings_of.items(), RIVALS)]
    for setting in sorted({run.setting for run in runs if run.published and run.script not in RELATIVES} - {""}):
        found += [claim.moved(setting) for claim in CLAIMS]
    return found


def question(claim, runs, tasks, split):
    """[(returns of `one`, scaled returns of `other`)] for `stats.verdicts`, of each task."""
    one = groups_of(runs, claim.one, tasks, lambda run: run.aer(split))
    other = groups_of(runs, claim.other, tasks, lambda run: claim.share * run.aer(split))
    return list(zip(one, other, strict=True))


def verdict_rows(rows, questions):
    """Adds what the tests say to `rows`, which are asked together."""
    small = lambda p: "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
    for row, found in zip(rows, stats.verdicts(questions), strict=True):
        row["P"] = f"{found['chance']:.2f}"
        row["p"] = small(found["p"])
        row[f"p, Holm of {found['asked']}"] = small(found["holm"])
        row["verdict"] = found["verdict"]
    return rows


def task_claims(runs, task, claims=CLAIMS):
    """A row for each claim, length and set of a task: AER of both methods, and what the test says. The claims are
    asked together, and with no others."""
    rows, questions = [], []
    for (name, steps), group in lengths(runs).items():
        for claim, split in itertools.product(claims, ("all sets", "eval-out")):
            if name != task or not claimed(claim, group, task):
                continue
            both = [[run for run in group if run.method == method] for method in (claim.one, claim.other)]
            row = {"claim": str(claim), "steps": f"{steps:,}", "set": split}
            row["seeds"] = "/".join(str(len(own)) for own in both)
            row["AER"] = " and ".join(f"{stats.iqm(aers(own, split)):.1f}" for own in both)
            rows.append(row)
            questions.append(question(claim, group, [task], split))
    return verdict_rows(rows, questions)


def claimed(claim, runs, task):
    """Is the claim about such a task, and are there runs of both methods?"""
    methods = {run.method for run in runs if run.task == task}
    kind = next(kind for kind, overlap in KINDS.items() if overlap == aib_envs.get_task(task).overlap)
    return kind in claim.kinds and {claim.one, claim.other} <= methods


def pooled_claims(runs, claims=CLAIMS):
    """A row for each claim, kind of tasks, share of training and set, over the tasks that have both methods. The claims
    are asked together, and with no others."""
    rows, questions = [], []
    shares = sorted({run.training() for run in runs})
    for claim, kind, share in itertools.product(claims, KINDS, shares):
        own = [run for run in of_kind(runs, kind) if run.training() == share]
        tasks = [task for task in tasks_of(own) if claimed(claim, own, task)]
        if len(tasks) < 2:
            continue
        for split in ("all sets", "eval-out"):
            rows.append(pooled_row(claim, kind, own, tasks, split))
            questions.append(question(claim, own, tasks, split))
    return verdict_rows(rows, questions)


def pooled_row(claim, kind, runs, tasks, split):
    """What `pooled_claims` says about one claim before it is tested: scaled AER of both methods, compared."""
    one = groups_of(runs, claim.one, tasks, lambda run: run.scaled(split))
    other = groups_of(runs, claim.other, tasks, lambda run: run.scaled(split))
    return {
        "claim": str(claim),
        "kind": kind,
        "training": f"{100 * runs[0].training():.0f} %",
        "tasks": ", ".join(tasks),
        "seeds": ", ".join(f"{len(x)}/{len(y)}" for x, y in zip(one, other, strict=True)),
        "set": split,
        "difference of IQM": with_interval([*one, *other], stats.difference(stats.pooled_iqm), sign="+"),
        "of means": with_interval([*one, *other], stats.difference(stats.pooled_mean), sign="+"),
    }


# ------------------------------------------------------- Figures ------------------------------------------------------

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
TOL = ["#882255", "#44AA99", "#999933", "#332288", "#AA4499", "#117733"]  # Paul Tol's, for all others
DASHES = ["--", ":", "-.", "-", (0, (12, 3)), (0, (8, 2, 1, 2, 1, 2))]  # those after the third: to tell apart
MARKERS = "os^Dv*PX<>"


def style(method):
    """matplotlib's color and line style of a method, the same in every figure."""
    if method in STYLE:
        color, line = STYLE[method]
    else:
        index = LABELS.index(method) if method in LABELS else zlib.crc32(method.encode(errors="replace"))
        color = TOL[index % len(TOL)]
        line = DASHES[index // len(TOL) % 3]
    return {"color": color, "linestyle": line}


def styles(methods):
    """{method: its style}, in which no two are the same. Of two with the same `style` the later one gets another, and
    those with other flags come last."""
    found = {}
    for method in sorted(methods, key=lambda method: (method not in LABELS, rank(method))):
        wanted = style(method)
        dashes = [{"color": wanted["color"], "linestyle": line} for line in DASHES]
        others = [{"color": color, "linestyle": line} for line, color in itertools.product(DASHES, TOL)]
        free = (look for look in [wanted, *dashes, *others] if look not in found.values())
        found[method] = next(free, wanted)
    return found


def panels(columns, titles, height=3.2, width=3.6, **options):
    """A figure and its axes, `columns` in one row with a title each; width and height in inches, of one panel."""
    size = (width * columns, height)
    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False, **options)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def legend(figure, axes):
    """One legend below the figure, of all labels in `axes`, in as many columns as fit."""
    found = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        fit = int(figure.get_figwidth() / (0.09 * max(map(len, found)) + 0.8))  # inches for a letter, for a line
        rows = -(-len(found) // max(fit, 1))
        columns = -(-len(found) // rows)
        figure.set_figheight(figure.get_figheight() + 0.25 * max(rows - 4, 0))  # room for a long legend
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncol=columns, frameon=False)


def say(axis, reason):
    """Writes into an empty panel why it is empty."""
    axis.text(0.5, 0.5, reason, transform=axis.transAxes, ha="center", va="center", color="#666666", wrap=True)


def draw_curve(axis, runs, value, label, look):
    """A line for the interquartile mean over runs of `value(line of metrics)`, at the steps that all have, and a band:
    the interval from three runs on, the range of two."""
    curves = [{line["global_step"]: value(line) for line in run.metrics} for run in runs if run.metrics]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if not steps:
        return
    values = np.array([[curve[step] for step in steps] for curve in curves])
    low, high = stats.interval([values], stats.iqm, axis=0) or (values.min(0), values.max(0))
    thousands = np.array(steps) / 1000
    if runs[0].returns is None:
        look = look | {"linewidth": 0.7, "alpha": 0.7}
    axis.plot(thousands, stats.iqm(values, axis=0), label=label, **look)
    axis.fill_between(thousands, low, high, color=look["color"], alpha=0.15, linewidth=0)


def learning_curves(runs, unfinished, task):
    """AER over vector steps, a panel for each set, a line for each method and length; the shadow gradient, where it has
    been logged, in a fourth panel."""
    own = [run for run in [*runs, *unfinished] if run.task == task]
    logged = [run for run in own if run.metrics and all("shadow_gradient" in line for line in run.metrics)]
    titles = [*SPLITS, *(["shadow gradient norm"] if logged else [])]
    figure, axes = panels(len(titles), titles)
    figure.suptitle(task)
    looks = styles({run.method for run in own})
    longest = max((line["global_step"] for run in own for line in run.metrics), default=0)

    def draw(axis, members, value, label):
        short = all(line["global_step"] < 0.05 * longest for run in members for line in run.metrics)
        hidden = "_" * short  # from the legend: the line would not be seen
        method = members[0].method
        longer = {run.steps for run in runs if (run.task, run.method) == (task, method)}
        longer = {steps for steps in longer if steps > members[0].steps}
        look = looks[method] | ({"linestyle": DASHES[len(longer) % len(DASHES)], "linewidth": 1} if longer else {})
        draw_curve(axis, members, value, hidden + label, look)

    for (_, steps), group in lengths([run for run in own if run.returns]).items():
        for method, members in by_method(group).items():
            several = len({run.steps for run in runs if (run.task, run.method) == (task, method)}) > 1
            label = f"{method}, {steps:,} steps ({len(members)})" if several else f"{method} ({len(members)})"
            for axis, split in zip(axes, SPLITS, strict=False):
                draw(axis, members, lambda line, split=split: line["aer"][split], label)
            shadow = [run for run in members if run in logged]
            if shadow:
                draw(axes[3], shadow, lambda line: line["shadow_gradient"], label)
    for run in own:
        if run.returns is None:
            for axis, split in zip(axes, SPLITS, strict=False):
                draw(axis, [run], lambda line, split=split: line["aer"][split], f"{run.method}, unfinished")
    top = max(axis.get_ylim()[1] for axis in axes[:3])
    bottom = min(axis.get_ylim()[0] for axis in axes[:3])
    for axis in axes[:3]:
        axis.set_ylim(bottom, top)
    axes[0].set_ylabel("AER")
    if logged:
        axes[3].set_yscale("log")
    for axis in axes:
        axis.set_xlabel("vector steps (thousands)")
        if not axis.lines:
            say(axis, "no run has a metrics.jsonl")
    legend(figure, axes)
    return figure


def context_figure(runs, task):
    """Return in every context of the three sets, mean over seeds. With a binary dimension: a panel for each mode, a
    curve for each method over the continuous dimension. With two continuous ones: a panel for each, points."""
    dimensions = aib_envs.get_task(task).dimensions
    continuous = [dimension for dimension in dimensions if dimension.inner][:2]
    if binary(task):
        shown = [(continuous[0], mode) for mode in aib_envs.modes(task)]
        titles = [", ".join(f"{key} {value}" for key, value in mode.items()) for _, mode in shown]
    else:
        shown = [(dimension, {}) for dimension in continuous]
        titles = [dimension.key for dimension in continuous]
    main = main_runs(runs, task)
    groups = by_method(main)
    returns = {method: mean_in_contexts(own) for method, own in groups.items()}
    if nothing := doing_nothing(task):
        returns = {"doing nothing": nothing} | returns
    looks = styles(groups)
    figure, axes = panels(len(shown), titles, sharey=True, width=4.5)
    figure.suptitle(f"{task}, {main[0].steps:,} steps, mean over seeds")
    for axis, (dimension, mode) in zip(axes, shown, strict=True):
        axis.axvspan(*dimension.inner, color="#EEEEEE", linewidth=0, label="training range")
        axis.set_xlabel(dimension.key)
        for method, found in returns.items():
            points = []
            for split in SPLITS:
                pairs = zip(aib_envs.context_set(task, split), found[split], strict=True)
                points += [(c[dimension.key], r) for c, r in pairs if mode.items() <= c.items()]
            look = {"color": "#999999", "linestyle": "-", "marker": "."}
            if method in groups:
                look = looks[method] | {"marker": MARKERS[rank(method)[0] % len(MARKERS)]}
            if not mode:
                look |= {"linestyle": "", "fillstyle": "none"}
            axis.plot(*np.array(sorted(points)).T, label=method, markersize=3, linewidth=1.2, **look)
    axes[0].set_ylabel("return")
    legend(figure, axes)
    return figure


def overview_figure(runs):
    """Scaled AER over all sets of the overview's methods: a column for each task, in it a point for each run and a line
    at each method's mean. The runs of a task are those of `main_runs`."""
    tasks = tasks_of(runs)
    groups = {task: by_method(main_runs(runs, task)) for task in tasks}
    methods = [method for method in overview_methods(runs) if any(method in group for group in groups.values())]
    looks = styles(methods)
    room = 0.8 / len(methods)  # for a method, in a column that is 1 wide
    figure, (axis,) = panels(1, [""], height=3.6, width=max(1.6 + 0.85 * len(tasks), 5))
    for i, method in enumerate(methods):
        color = looks[method]["color"]
        points = []
        for column, task in enumerate(tasks):
            own = [run.scaled("all sets") for run in groups[task].get(method, [])]
            x = column - 0.4 + (i + 0.5) * room
            points += [(x, value) for value in own]
            if own:
                axis.hlines(np.mean(own), x - room / 2, x + room / 2, color=color)
        marker = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4, "linestyle": ""}
        axis.plot(*np.array(points).T, color=color, alpha=0.7, label=method, **marker)
    for column in range(1, len(tasks)):
        axis.axvline(column - 0.5, color="#DDDDDD", linewidth=0.8)
    axis.set_xticks(range(len(tasks)), [task.replace("-", "-\n", 1) for task in tasks])
    axis.set_xlim(-0.5, len(tasks) - 0.5)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axis.set_ylabel("score: AER / highest possible")
    legend(figure, [axis])
    return figure


def mean_in_contexts(runs):
    """{set: [20]}: return in each context, mean over rollouts and seeds."""
    return {split: np.mean([run.returns[split].mean(1) for run in runs], axis=0) for split in SPLITS}


# ------------------------------------------------------- The page ----------------------------------------------------

ABOUT_OVERVIEW = """In the figure a point is a run and a line the mean. In the table: the mean over seeds (their
number), from four on their interquartile mean. All sets together.
"""
# {start of a column's name: what is said where a table has such a column}
ABOUT = {
    "train": """AER: average episodic return over the 20 contexts of a set and the rollouts of the last evaluation. A
cell has the value of each seed; from five seeds on, the interquartile mean and its 95 % interval. Steps are
vector steps, one in each of the 20 training contexts. *Doing nothing*: action 0 at every step. In the curves (seeds in
brackets; the band is the range of two seeds, from three on the interval) the last point has as many starts for each
context as `--eval-rollouts` says (ten), those before have one: where that is an easy or a hard one, a curve jumps
there. The *shadow gradient* is the mean norm of the gradient that the policy's loss would have with respect to z.""",
    "better": """*Better of the last two*: the higher of the last two evaluations in each set, averaged over the sets;
this is what the authors' code reports. The last but one, up to `--eval-every` steps before, has one start for each
context only: where that is an easy one, this column gains from it.""",
    "worse mode": """*Worse mode*: for each seed, the return in training contexts with one sort of actuators, in percent
of that with the other sort (-: below 1 % of the highest return in both).""",
    "stuck": """*Stuck* (ODE): the share of rollouts of all sets that end with 60 of 200 or less. *Mean of the
others*: the return of the rest.""",
    "one step": """*One step*, *twenty step*: mean squared prediction errors in episodes of random actions, of
normalised differences and of standardised states.""",
}
ABOUT_OVER_TASKS = """AER divided by the bounds of the task's returns. Each table names its tasks: all that have runs
of all its methods, after the same share of the task's training. Every task has the same weight, which its runs share.
IQM is the interquartile mean over tasks and seeds, as in the paper. It leaves out each method's worst and best quarter
of runs: of four tasks about one task each, and not the same for every method. The plain mean counts everything. The
paper's numbers are of all its tasks of the kind. 95 % intervals (percentiles of 2,000 resamples of the seeds within
each task) are shown from three seeds a task on; of three seeds they are too narrow (in simulations they covered 73 to
86 %).
"""
ABOUT_VERDICTS = """A verdict stands before its numbers: the difference of mean scores (in single tasks both AER), P,
and p -> p after Holm's correction. The difference is the first method's minus the other's; for "DR fails" DMA*-SH
comes first. Seeds stand in the same order. A kind of tasks with one task only has no row.

- P: the share of pairs of runs, one of each method, of which the claim is true, averaged over tasks.
- p: if the two methods were the same (DR: if it earned exactly that share), how often so clear a result would come
  about by chance. Exact and one-sided: each task's runs are dealt out to the methods in all ways (Mann and Whitney).
- Holm: p is corrected for the number of questions in the table, a set and claim each. Those whose p, uncorrected, so
  few seeds cannot bring to 0.05 are not counted.
- A claim *holds* if the corrected p is at most 0.05, and *does not hold* if that is so of the opposite claim, which is
  tested by itself. Three seeds against three reach p = 0.05 at best, so more are needed where several questions are
  asked: five against five, or eight against three, where there are eight.
"""
ABOUT_OWN = f"""*Your own methods* stand against {", ".join(RIVALS)}, and methods with other flags than the published
runs' against each other. Only runs with the same shared flags are compared. These questions are corrected for among
themselves.
"""


def markdown(rows):
    """A table of `rows`, dicts with the same keys, in Markdown."""
    if not rows:
        return ""
    escape = lambda x: str(x).replace("*", "\\*").replace("|", "\\|")
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(map(escape, line)) + " |" for line in lines) + "\n"


def csv_text(rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def tidy(runs):
    """Rows for runs.csv: one number a cell, a row for each run and set."""
    rows = []
    for run, split in itertools.product(runs, SETS):
        row = {"task": run.task, "method": run.method, "seed": run.seed, "steps": run.steps, "set": split}
        row |= {"AER": run.aer(split), "better of the last two": run.better(split)}
        parts = [run.diverged[one] for one in SPLITS if split in (one, "all sets")] if run.diverged else []
        row["diverged rollouts"] = int(sum(part.sum() for part in parts)) if parts else ""
        rows.append(row | {"run": str(run.directory)})
    return rows


class Page:
    """Sections of Markdown in order, the tables that stand in them, and where figures go."""

    def __init__(self, figures, link, kinds=("png", "svg")):
        self.figures, self.link, self.kinds = figures, link, kinds
        self.sections = {}  # {heading: [paragraphs]}
        self.tables = {}  # {name: rows}
        figures.mkdir(parents=True, exist_ok=True)

    def text(self, heading, text):
        self.sections.setdefault(heading, []).append(text)

    def table(self, heading, name, rows, shown=None):
        """`shown`: what the page shows of the table if that is less than its file has."""
        if rows:
            self.tables[name] = rows
            self.text(heading, markdown(shown or rows))

    def figure(self, heading, name, figure, alt):
        for kind in self.kinds:
            figure.savefig(self.figures / f"{name}.{kind}", dpi=100)
        plt.close(figure)
        self.text(heading, f"![{alt}]({self.link}/{name}.png)\n")

    def render(self, title):
        lines = [f"# {title}\n"]
        for heading, parts in self.sections.items():
            lines += [f"## {heading}\n", *parts]
        return "\n".join(lines)

    def save(self, path, title):
        """Writes the page to `path`, and its tables beside it."""
        for name, rows in self.tables.items():
            write(path.parent / "tables" / f"{name}.csv", csv_text(rows))
        write(path, self.render(title) + "\n")


def add_explanations(page):
    """What the columns mean that the page's tables have so far, and its verdicts."""
    columns = {name for rows in page.tables.values() for name in rows[0]}
    found = [text for start, text in ABOUT.items() if any(name.startswith(start) for name in columns)]
    parts = [textwrap.fill(" ".join(" ".join(found).split()), 120, break_on_hyphens=False) + "\n"] if found else []
    parts += [ABOUT_VERDICTS] * ("verdict" in columns)
    parts += [ABOUT_OWN] * any(name.endswith("own_verdicts") for name in page.tables)
    if parts:
        page.text("How to read the tables", "\n".join(parts))


def add_verdicts(page, heading, name, rows):
    """A line for each claim that can be decided, a sentence for those that cannot. The table's file has all numbers."""
    few = [row for row in rows if row["verdict"] == "too few seeds"]
    rows = [row for row in rows if row not in few]
    page.table(heading, name, rows, shown=side_by_side(rows))
    if few:
        claims = [f"{row['claim']} ({row.get('tasks', 'seeds')}: {row['seeds']})" for row in few]
        text = "Too few seeds to decide (it takes 3/3 in one task, or 2/2 in each of two): "
        text += f"{'; '.join(dict.fromkeys(claims))}.\n"
        page.text(heading, text.replace("*", "\\*"))


def side_by_side(rows):
    """Rows of claims with their sets beside each other: {what is the same of both, all sets: cell, eval-out: cell}."""
    found = {}
    for row in rows:
        about = {name: row[name] for name in ("claim", "kind", "training", "tasks", "steps", "seeds") if name in row}
        line = found.setdefault(tuple(about.values()), about)
        (holm,) = [value for name, value in row.items() if name.startswith("p, Holm")]
        compared = row.get("of means") or row["AER"]
        line[row["set"]] = f"{row['verdict']}: {compared}, P {row['P']}, p {row['p']} -> {holm}"
    return even(list(found.values()))


def add_own_verdicts(page, heading, name, rows):
    """The same for the reader's own methods, if there are some."""
    if rows:
        page.text(heading, "**Your own methods.**\n")
        add_verdicts(page, heading, name, rows)


def add_task(page, runs, unfinished, task):
    """The tables of one task, and its curves."""
    own = [run for run in runs if run.task == task]
    page.table(task, task, task_table(own, task))
    page.table(task, f"{task}_diverged", diverged_table(own))
    page.figure(task, f"{task}_curves", learning_curves(own, unfinished, task), f"Learning curves on {task}")


def add_task_verdicts(page, runs, task):
    """What the runs say about the claims on one task."""
    own = [run for run in runs if run.task == task]
    add_verdicts(page, task, f"{task}_verdicts", task_claims(own, task))
    add_own_verdicts(page, task, f"{task}_own_verdicts", task_claims(own, task, own_claims(own)))


def add_over_tasks(page, runs):
    """Scores and verdicts over several tasks, if there are several."""
    heading = "Over tasks"
    for number, (kind, own, methods, tasks) in enumerate(blocks(runs), 1):
        if number == 1:
            page.text(heading, ABOUT_OVER_TASKS)
        share = 100 * own[0].training()
        name = {"all": "Overlapping and not"}.get(kind, kind.capitalize())
        page.text(heading, f"**{name}, after {share:.0f} % of the training: {', '.join(tasks)}.**\n")
        page.table(heading, f"over_tasks_{number}", aggregate_table(own, kind, methods, tasks))
    heading = "Verdicts over tasks"
    add_verdicts(page, heading, "verdicts", pooled_claims(runs))
    add_own_verdicts(page, heading, "own_verdicts", pooled_claims(runs, own_claims(runs)))


def seeds_of(runs):
    """seeds 1, 3"""
    seeds = [str(run.seed) for run in runs]
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"


def code_notes(runs):
    """A line for each method that has runs of different or of unknown code, and one for all runs that are too old to
    tell which script made them."""
    notes = []
    for method, own in by_method(runs).items():
        found = collections.defaultdict(list)  # {what is to be said: of which tasks}
        for (task, _), group in lengths(own).items():
            if texts := code_of_group([run for run in group if run.starts]):
                found["; ".join(texts)].append(task)
        parts = [f"on {', '.join(dict.fromkeys(tasks))}: {text}" for text, tasks in found.items()]
        if parts:
            notes.append(f"{method} {'; '.join(parts)}")
    old = [run for run in runs if run.starts and not any(start.sha256 for start in run.starts)]
    if old:
        counts = collections.Counter(short(run.starts[-1].commit) for run in old)
        commits = ", ".join(f"{commit} ({count})" for commit, count in counts.most_common())
        count = f"{len(old)} of {len(runs)} runs"
        notes.append(f"{count} do not have their script's hash (they are older). Their commits: {commits}.")
    return notes


def short(commit):
    """A commit's first seven digits; what is no commit stays as it is."""
    return commit[:7] if len(commit) == 40 else commit


def code_of_group(group):
    """What is to be said about the code of runs that are put together (list of str). Nothing if all are old."""
    if not any(start.sha256 for run in group for start in run.starts):
        return []
    found = []
    same = collections.defaultdict(list)
    for run in group:
        same[run.starts[0].sha256, run.starts[0].commit].append(run)
    if len(same) > 1:
        hashes = {sha256 for sha256, _ in same} - {""}
        what = f"versions of {group[0].script}" if len(hashes) > 1 else "commits"
        found.append(f"{' and '.join(map(seeds_of, same.values()))} are of different {what}")
    resumed = [run for run in group if len({(start.sha256, start.commit) for start in run.starts}) > 1]
    if resumed:
        found.append(f"{seeds_of(resumed)} went on with another version than they began with")
    changed = [run for run in group if any(start.changed for start in run.starts)]
    if changed:
        found.append(f"{seeds_of(changed)} had code that was not committed")
    return found


def left_out(runs):
    """A line for each method of a task that has no runs as long as most others', so that it is compared with none."""
    lines = []
    for task in tasks_of(runs):
        main = main_runs(runs, task)
        for method, own in by_method([run for run in runs if run.task == task]).items():
            if method not in by_method(main):
                steps = " and ".join(f"{number:,}" for number in sorted({run.steps for run in own}))
                lines.append(f"{method} on {task} has {steps} steps, most others have {main[0].steps:,}: not compared")
    return lines


def flag_notes(runs):
    """A line for each method whose shared flags differ from the published runs' while its name does not say so."""
    found = collections.defaultdict(dict)  # {method: {what is to be said: of which tasks}}
    for (task, _), group in lengths(runs).items():
        for method, own in by_method(group).items():
            for text in deviations(own[0], DEFAULTS):
                if text not in method:
                    found[method].setdefault(text, {})[task] = True
    notes = []
    for method, texts in found.items():
        parts = [f"{text}, not {DEFAULTS[text.split()[0]]} ({', '.join(tasks)})" for text, tasks in texts.items()]
        notes.append(f"{method}: {'; '.join(parts)}")
    return notes


def add_notes(page, runs, unfinished, problems):
    """What is not in the tables, and why."""
    lines = []
    for run in unfinished:
        last = run.metrics[-1]
        aer = ", ".join(f"{split} {last['aer'][split]:.1f}" for split in SPLITS)
        where = f"{run.task}, {run.method}, seed {run.seed}, in {run.directory}"
        progress = f"step {last['global_step']:,} of {run.steps:,}, AER {aer}"
        lines.append(f"{'Broken down' if run.broke_down else 'Unfinished'}, in the curves only: {where}: {progress}")
        if run.broke_down:
            lines[-1] += f"; {run.broke_down}"
    unknown = sum(run.diverged is None for run in runs)
    if unknown:
        lines.append(f"{unknown} of {len(runs)} runs do not say whether simulations diverged (they are older).")
    lines += left_out(runs)
    lines += code_notes(runs)
    lines += flag_notes(runs)
    lines += problems
    if lines:
        page.text("Notes", "".join(f"- {line}\n" for line in lines).replace(f"{ROOT}/", "").replace("*", "\\*"))


def report(directories, out):
    """Everything that `python tools/report.py runs/` writes."""
    runs, unfinished, problems = read_runs(directories)
    if not runs and not unfinished:
        fail(f"no runs, nothing is written ({'; '.join(problems)})")
    if left := sorted({run.task for run in runs} - set(BENCHMARK)):
        problems.append(f"{', '.join(left)}: not in what is said over tasks, which is of the benchmark's 13")
    page = Page(out / "figures", "figures")
    page.text("Overview", f"{len(runs)} finished runs of {len(tasks_of(runs))} tasks; {len(unfinished)} unfinished.\n")
    if runs:
        page.figure("Overview", "overview", overview_figure(runs), "The score of every run")
    page.table("Overview", "overview", overview_table(runs))
    if runs:
        page.text("Overview", ABOUT_OVERVIEW)
    for task in tasks_of([*runs, *unfinished]):
        add_task(page, runs, unfinished, task)
        if main_runs(runs, task):
            page.figure(task, f"{task}_contexts", context_figure(runs, task), f"Return in each context of {task}")
        add_task_verdicts(page, runs, task)
    add_over_tasks(page, runs)
    if runs:
        page.table("Hours", "hours", cost_table(runs))
    add_explanations(page)
    add_notes(page, runs, unfinished, problems)
    if runs:
        write(out / "runs.csv", csv_text(tidy(runs)))
    page.save(out / "report.md", "Report")
    tell(problems)
    print(f"{len(runs)} finished runs, {len(unfinished)} unfinished: {out / 'report.md'}")


def tell(problems):
    for problem in problems:
        print(problem.encode(errors="backslashreplace").decode(), file=sys.stderr)


# ------------------------------------------------------- Collecting ---------------------------------------------------


def collect(directories, target):
    """Copies of the finished runs that are small enough for a repository: no weights, no returns of single contexts
    before the last evaluation, returns to three decimals, no paths of the machine."""
    runs, _, problems = read_runs(directories)
    if not runs:
        fail(f"no finished runs, nothing is written ({'; '.join(problems)})")
    if any(target.resolve() in run.directory.resolve().parents for run in runs):
        fail(f"--collect takes a directory for copies, not that of the runs; got {target}")
    for run in runs:
        config, results = (json.loads((run.directory / f"{name}.json").read_text()) for name in ("config", "results"))
        for file in (config, results):
            for name in ("run_dir", "dataset", "resume", "eval_only"):
                file["args"].pop(name, None)
        results["returns"] = {split: run.returns[split].round(3).tolist() for split in SPLITS}
        if run.diverged:
            results["diverged"] = {split: run.diverged[split].astype(int).tolist() for split in SPLITS}
        kept = [{name: value for name, value in line.items() if name != "returns"} for line in run.metrics]
        copy_of = target / run.name  # an extended run takes the place of itself
        write(copy_of / "config.json", json.dumps(config, indent=1))
        write(copy_of / "results.json", json.dumps(results) + "\n")
        write(copy_of / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
    tell(problems)
    print(f"{len(runs)} runs: {target}")


def path_of(text):
    """A path of the command line. The shell leaves the ~ of --out=~/report as it is."""
    return Path(os.path.expanduser(text))


def runs_path(text):
    """The same of a directory that must be there: a slip of the pen in one of many should not go unnoticed."""
    path = path_of(text)
    if not os.path.lexists(path):  # a link to nothing is reported with the rest
        raise argparse.ArgumentTypeError(f"there is no {text}")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="*", type=runs_path, default=[Path("runs")], help="directories, at any depth")
    parser.add_argument("--out", type=path_of, default=Path("report"), help="where the report is written")
    parser.add_argument("--collect", type=path_of, help="a directory for small copies, in place of a report")
    args = parser.parse_args()
    try:
        if args.collect:
            collect(args.runs, args.collect)
        else:
            report(args.runs, args.out)
    except OSError as error:
        fail(error)


if __name__ == "__main__":
    main()
