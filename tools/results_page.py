"""Makes every table and figure of README.md from the files in results/.

    python readme.py                                 README.md's marked parts, and results/figures
    python report.py --collect results/runs runs/    puts finished runs into results/
    python readme.py --agents runs/                  the first, after the trained agents in runs/ that are not yet in
                                                     results/agents.json have been rolled out once more

A marked part of README.md begins with <!-- name --> and ends with <!-- end -->.
"""

import itertools
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

import aib_envs
import aib_tools
import report
import report_agents

README, RESULTS = Path(__file__).parent / "README.md", Path(__file__).parent / "results"
OURS = "DMA*-SH"
KINDS = "non-overlapping", "overlapping"  # tasks: can one policy act well in all contexts?
# An order that the paper finds: a method's return is more than `share` times another's. Each for the kinds of tasks.
# The shares of DR are ours.
CLAIMS = [
    ("DMA*-SH above DMA*", OURS, 1.0, "DMA*", KINDS),
    ("DMA* above DMA", "DMA*", 1.0, "DMA", KINDS),
    ("DMA*-SH above DA", OURS, 1.0, "DA", KINDS),
    ("DMA*-SH above Concat", OURS, 1.0, "Concat", KINDS),
    ("DR fails: below 0.6 of DMA*-SH", OURS, 1 / 0.6, "DR", ["non-overlapping"]),
    ("DR does not fail: above 0.8 of DMA*-SH", "DR", 0.8, OURS, ["overlapping"]),
]
RELATIVES = {"hyperzero": "HyperZero", "hyperdynamics": "HyperDynamics"}
SHOWN = "HyperZero", "HyperDynamics"  # what stands beside DMA*-SH in a figure
SETS = "all sets", "eval-out"


@dataclass
class Args:
    agents: str | None = None  # a directory of finished runs with their agent.pt


# ------------------------------------------------------- Tables ------------------------------------------------------


def tasks_of(runs):
    return [task for task in aib_envs.TASKS if any(run.task == task for run in runs)]


def of(runs, task, method):
    return [run for run in runs if (run.task, run.method) == (task, method)]


def published():
    return json.loads((RESULTS / "paper_results.json").read_text())


def benchmark_table():
    """A row for each of the benchmark's tasks."""
    rows = []
    for name in report.BENCHMARK:
        task = aib_envs.get_task(name)
        context = [
            f"{d.key} {d.values[0]} or {d.values[1]}"
            if d.values
            else f"{d.key} {d.inner[0]:g} to {d.inner[1]:g} ({d.outer[0]:g} to {d.outer[1]:g})"
            for d in task.dimensions
        ]
        row = {"task": name, "physics": task.physics, "context (eval-out)": ", ".join(context)}
        row |= {"overlapping": "yes" if task.overlap else "no", "episode": task.steps, "K": task.window}
        rows.append(row | {"training": f"{task.total_timesteps:,}", "bound of returns": f"{task.bounds[1]:,}"})
    return rows


def results_table(runs):
    """A row for each task and method, and one for doing nothing."""
    rows = []
    for task in tasks_of(runs):
        rows += [{"task": task} | row for row in report.task_table(runs, task, published())]
        means = {split: np.mean(x) for split, x in report.zero_returns(task, RESULTS).items()}
        means["all sets"] = np.mean(list(means.values()))
        nothing = dict.fromkeys(rows[0], "") | {"task": task, "method": "doing nothing"}
        rows.append(nothing | {name: f"{mean:.1f}" for name, mean in means.items()})
    hidden = {"paper, all sets"} if not any(row["paper, all sets"] for row in rows) else set()
    return [{key: value for key, value in row.items() if key not in hidden} for row in rows]


def one_mode(runs):
    """Says which runs have learned one mode only: in training contexts the other has less than half of it."""
    found = []
    for run in runs:
        modes = sorted(report_agents.mode_rewards(run.task, run.returns["train"]))
        if modes and modes[1] >= 0.01 and not report_agents.masters_both(modes):
            low, high = aib_envs.get_task(run.task).steps * np.array(modes)
            found.append(f"{run.task}, {run.method}, seed {run.seed} ({high:.1f} and {low:.1f})")
    text = "; ".join(found) if found else "none"
    return f"Runs that earn less than half as much in one mode as in the other (AER in training contexts): {text}.\n"


def paper_table(runs):
    """Scaled AER, IQM over tasks and seeds and its interval (from three runs on, if no task has one alone), beside the
    paper's, and the plain mean. The tasks are those of DMA*-SH; a method that lacks one of them has no row."""
    rows, paper = [], published()["normalised_IQM"]
    for kind in KINDS:
        tasks = tasks_of([run for run in report.group_of(runs, kind) if run.method == OURS])
        for method in report.by_method(runs):
            own = [of(runs, task, method) for task in tasks]
            if not tasks or not all(own):
                continue
            row = {"kind": kind, "tasks": ", ".join(tasks), "method": method}
            row["seeds"] = ", ".join(str(len(group)) for group in own)
            for split in SETS:
                scaled = [np.array([run.scaled(split) for run in group]) for group in own]
                row[split] = f"{report.pooled_iqm([group[None] for group in scaled])[0]:.2f}"
                if min(map(len, own)) >= 2 and sum(map(len, own)) >= 3:
                    low, high = report.bootstrap(scaled, report.pooled_iqm)
                    row[split] += f" [{low:.2f}, {high:.2f}]"
                values = paper[report.PAPER_SETS[split]][report.PAPER_GROUPS[kind]]
                known = method in paper["columns"]
                row[f"paper, {split}"] = f"{values[paper['columns'].index(method)]:.2f}" if known else ""
                row[f"{split}, plain mean"] = f"{np.mean([group.mean() for group in scaled]):.2f}"
            rows.append(row)
    return rows


def deals(x, y):
    """{probability of improvement: in how many ways to deal out all returns to the two methods}: by sums of ranks."""
    n, m = len(x), len(y)
    ways = [Counter() for _ in range(n + 1)]  # for each number dealt to the first: {sum of doubled ranks: ways}
    ways[0][0] = 1
    for rank in (2 * scipy.stats.rankdata([*x, *y])).astype(int).tolist():
        for k in range(n, 0, -1):
            for total, count in ways[k - 1].items():
                ways[k][total + rank] += count
    return {(total / 2 - n * (n + 1) / 2) / (n * m): count for total, count in ways[n].items()}


def p_value(groups):
    """One-sided exact p-value of the probability of improvement, averaged over tasks: in what share of all ways to deal
    out each task's returns to the two methods it is as high. `groups`: one (returns, other's returns) a task."""
    ways = Counter({0.0: 1})  # {sum over tasks: in how many ways}
    for x, y in groups:
        before, more, ways = ways, deals(x, y), Counter()
        for (a, n), (b, m) in itertools.product(before.items(), more.items()):
            ways[round(a + b, 9)] += n * m
    found = sum(report.improvement(x, y) for x, y in groups) - 1e-6
    return sum(n for value, n in ways.items() if value >= found) / ways.total()


def verdict(groups):
    """Is the first method better? At 0.05; for one task it is Mann and Whitney's test."""
    if p_value(groups) <= 0.05:
        return "holds"
    if p_value([(y, x) for x, y in groups]) <= 0.05:
        return "does not hold"
    clearest = [(range(len(x)), range(-len(y), 0)) for x, y in groups]
    return "too few seeds" if p_value(clearest) > 0.05 else "undecided"


def claimed(runs):
    """For each claim and kind of tasks: its name, the share, and {task: (runs, runs of the other)} where both have."""
    for (claim, one, share, other, kinds), kind in itertools.product(CLAIMS, KINDS):
        tasks = tasks_of(report.group_of(runs, kind)) if kind in kinds else []
        pairs = {task: (of(runs, task, one), of(runs, task, other)) for task in tasks}
        if pairs := {task: pair for task, pair in pairs.items() if all(pair)}:
            yield claim, kind, share, pairs


def claims_table(runs):
    """A row for each claim and kind of tasks: probability of improvement, averaged over tasks, and what a test says."""
    rows = []
    for claim, kind, share, pairs in claimed(runs):
        row = {"claim": claim, "kind": kind, "tasks": ", ".join(pairs)}
        row["seeds"] = ", ".join(f"{len(x)} and {len(y)}" for x, y in pairs.values())
        for split in ("train", "eval-in", *SETS):
            aers = [[np.array([run.aer(split) for run in group]) for group in pair] for pair in pairs.values()]
            groups = [(x, share * y) for x, y in aers]
            chance = np.mean([report.improvement(x, y) for x, y in groups])
            p = p_value(groups)
            row[split] = f"{chance:.2f}, p {f'= {p:.3f}' if p >= 0.001 else '< 0.001'}: {verdict(groups)}"
        rows.append(row)
    return rows


def tasks_table(runs):
    """A row for each claim and task: both methods' AER, and what a test says."""
    rows = []
    for claim, _, share, pairs in claimed(runs):
        for task, pair in pairs.items():
            row = {"claim": claim, "task": task, "seeds": " and ".join(str(len(group)) for group in pair)}
            for split in SETS:
                x, y = (np.array([run.aer(split) for run in group]) for group in pair)
                row[split] = f"{report.iqm(x):.1f} and {report.iqm(y):.1f}: {verdict([(x, share * y)])}"
            rows.append(row)
    return rows


def cost_table(runs, relatives):
    """Hours of one thread: a row for each task, a column for each method; and a row for the `relatives`."""
    rows, methods = [], list(report.by_method(runs))
    hours = lambda own: sum(sum(run.metrics[-1]["seconds"].values()) for run in own) / 3600
    for task in [*tasks_of(runs), "all"]:
        own = [run for run in runs if task in (run.task, "all")]
        row = {"task": task, "runs": len(own), "hours": f"{hours(own):.1f}"}
        for method in methods:
            times = [hours([run]) for run in own if run.method == method]
            row[f"{method}, a run"] = " to ".join(dict.fromkeys(f"{f(times):.2f}" for f in (min, max))) if times else ""
        rows.append(row)
    last = {"task": "relatives (below)", "runs": len(relatives), "hours": f"{hours(relatives):.1f}"}
    return [*rows, dict.fromkeys(rows[0], "") | last] if relatives else rows


def adaptation_table(agents):
    """A row for each task and method; what the runs of a method have found stands in the order of their seeds."""
    rows = []
    for task, found in agents.items():
        for method in sorted({agent["method"] for agent in found["adaptation"]}, key=report.rank):
            mine = sorted((a for a in found["adaptation"] if a["method"] == method), key=lambda agent: agent["seed"])
            own = [report_agents.recovery_rows(task, "", agent["rewards"]) for agent in mine]
            joined = lambda kind, key: ", ".join(str(r[kind][key]) for r in own if len(r) > kind)  # noqa: B023
            row = {"task": task, "method": method, "seeds": ", ".join(str(agent["seed"]) for agent in mine)}
            row["reward before"] = joined(0, "reward before")
            for kind, name in enumerate(("inversion", "foreign window")):
                row[f"lowest after {name}"] = joined(kind, "lowest after")
                row[f"steps to 90 % after {name}"] = joined(kind, "steps to 90 %")
            rows.append(row)
    return rows


def relatives_table(runs, name):
    """A row for each task and method of hyperzero.py or hyperdynamics.py, with what belongs to it alone."""
    rows, own = [], [run for run in runs if run.script == f"{name}.py"]
    for task in tasks_of(own):
        extra = {row["method"]: row for row in report.prediction_table(own, task) + report.experts_table(own, task)}
        for row in report.task_table(own, task, published()):
            more = {key: value for key, value in extra[row["method"]].items() if key not in row}
            rows.append({"task": task} | {k: v for k, v in row.items() if not k.startswith(("paper", "all"))} | more)
    return rows


def held_out_table(runs):
    """Of hyperzero.py's runs with --held-out: a row for each task and method."""
    rows = []
    for task in tasks_of(runs):
        for row in report.experts_table(runs, task):
            own = {"task": task, "method": row["method"], "seeds": len(of(runs, task, row["method"]))}
            rows.append(own | {key: value for key, value in row.items() if key != "its experts, train"})
    return rows


def speed_table():
    """Of bench.py's results: a row for each method."""
    measured, rows = json.loads((RESULTS / "speed.json").read_text()), []
    for method, loop in measured["training"].items():
        row = {"method": report.paper_name(method), "updates/s": f"{loop['updates_per_second']:.1f}"}
        row |= {"env steps/s": f"{loop['env_steps_per_second']:,.0f}"}
        row |= {
            "an evaluation, s": f"{loop['evaluation_seconds']:.1f}",
            "peak memory, MiB": f"{loop['memory_mib']:.0f}",
        }
        step = measured["update"][method]
        row |= {"gradient step, ms": f"{step['ms']:.1f}", "time / DMA*": f"{step['time_ratio']:.2f}"}
        rows.append(row | {"work / DMA*": f"{step['work_ratio']:.2f}"})
    return rows


# -------------------------------------------------- Figures and the page ----------------------------------------------


def steps_figure(runs, task):
    """AER over environment steps, all that a run has made: warm-up, random actions and experts included."""
    figure, axes = report.panels(3, aib_envs.SPLITS, sharey=True)
    figure.suptitle(task)
    for method, members in report.by_method([run for run in runs if run.task == task]).items():
        for axis, split in zip(axes, aib_envs.SPLITS, strict=True):
            curves = [{m["env_steps"]: m["aer"][split] for m in run.metrics} for run in members]  # the last at each
            steps = sorted(set.intersection(*map(set, curves)))
            mean = [np.mean([curve[step] for curve in curves]) for step in steps]
            axis.plot(steps, mean, marker=".", **report.style(method), label=method)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlabel("environment steps")
    axes[0].set_ylabel("AER")
    report.legend(figure, axes)
    return figure


def figures(runs, agents, relatives):
    """{name: (what it shows, matplotlib figure)}."""
    drawn = {}
    for name, title in RELATIVES.items():
        own = [run for run in relatives if run.script == f"{name}.py"]
        for task in tasks_of(own):
            figure = report.context_figure(own, task, report.zero_returns(task, RESULTS))
            drawn[f"{task}_{name}"] = f"Return in each context of {task}: {title} and variants", figure
    both = [run for run in runs if run.method in ("DMA*", OURS)] + [run for run in relatives if run.method in SHOWN]
    for task in tasks_of(relatives):
        if any(run.task == task and run.method == OURS for run in both):
            drawn[f"{task}_steps"] = f"Return over environment steps on {task}", steps_figure(both, task)
    for task in tasks_of(runs):
        drawn[f"{task}_curves"] = f"Learning curves on {task}", report.learning_curves(runs, task)
    for task, found in agents.items():
        as_arrays = lambda part: {kind: np.array(x) for kind, x in part.items()}
        curves = [(a["method"], as_arrays(a["rewards"]), as_arrays(a["moved"])) for a in found["adaptation"]]
        text = f"Reward and embedding on {task} after the actuators have changed"
        drawn[f"{task}_adaptation"] = text, report_agents.adaptation_figure(curves, task)
    if agents.get("DI", {}).get("paths"):
        text = "Paths of a point mass that is to reach the circle, under DR and under DMA*-SH"
        drawn["DI_paths"] = text, report_agents.paths_figure(agents["DI"]["paths"], "DI")
    return drawn


def parts(runs, agents, relatives, held_out, drawn):
    """{name of a marked part of README.md: its content}; `drawn`: {name of a figure: what it shows}."""
    pictures = lambda end: "\n".join(
        f"![{text}](results/figures/{name}.png)\n" for name, text in drawn.items() if name.endswith(end)
    )
    table = lambda rows: report.markdown(rows) if rows else "No results yet.\n"
    return {
        "paths": pictures("_paths"),
        "results": table(results_table(runs)),
        "modes": one_mode(runs),
        "curves": pictures("_curves"),
        "paper": table(paper_table(runs)),
        "claims": table(claims_table(runs)),
        "claims_by_task": table(tasks_table(runs)),
        "adaptation": table(adaptation_table(agents)),
        "inversions": pictures("_adaptation"),
        "cost": table(cost_table(runs, relatives + held_out)),
        "benchmark": table(benchmark_table()),
        **{name: table(relatives_table(relatives, name)) + "\n" + pictures(f"_{name}") for name in RELATIVES},
        "held_out": table(held_out_table(held_out)),
        "steps": pictures("_steps"),
        "speed": table(speed_table()),
    }


def fill(page, contents):
    """`page` with its marked parts replaced. Raises LookupError for a part without content, or content without part."""
    filled = set()

    def replace(match):
        filled.add(match[1])
        return f"<!-- {match[1]} -->\n{contents[match[1]]}<!-- end -->"

    page = re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", replace, page, flags=re.DOTALL)
    if missing := set(contents) - filled:
        raise LookupError(f"README.md has no part {', '.join(sorted(missing))}")
    return page


def median_run(runs):
    """The run with the median training return, of an even number the lower one."""
    return sorted(runs, key=lambda run: run.aer("train"))[(len(runs) - 1) // 2]


def load_agent(directory):
    with aib_tools.reading(directory / "agent.pt"):
        return report_agents.load_agent(directory)


def rolled_out():
    """What agents.json has of the runs in results/runs: {task: {"adaptation": [...], "paths": {...}}}."""
    try:
        found = json.loads((RESULTS / "agents.json").read_text())
        for known in found.values():
            known["adaptation"] = [row for row in known["adaptation"] if (RESULTS / "runs" / row["run"]).is_dir()]
        return found
    except (OSError, ValueError):  # none yet, or damaged
        return {}


def roll_out(directory):
    """What the figures need of trained agents: {task: {"adaptation": [...], "paths": {...}}}. What agents.json has of
    runs in results/runs stays, be they in `directory` or not; a run whose training returns are no longer the same is
    rolled out again, which may take a minute."""
    found = rolled_out()
    runs, problems = report.read_some_runs([directory])
    runs = report.of_one_length(runs, problems)
    for problem in problems:
        print(problem, file=sys.stderr)
    tasks = list(filter(report_agents.mode_of, tasks_of(runs)))
    if not tasks:
        aib_tools.fail(f"{directory} has no runs of tasks with reversed or swapped actuators, nothing is written")
    for task in tasks:
        own = [(run, load_agent(run.directory)) for run in runs if run.task == task]
        known = found.setdefault(task, {"adaptation": []})
        rows = {row["run"]: row for row in known["adaptation"]}
        for run, trained in own:
            name = run.directory.name
            if name not in rows or rows[name]["rewards"]["modes"] != np.round(trained.modes, 3).tolist():
                rounded = lambda part: {kind: x.round(3).tolist() for kind, x in part.items()}
                row = dict(zip(("rewards", "moved"), map(rounded, report_agents.adaptation(trained)), strict=True))
                rows[name] = {"run": name, "method": run.method, "seed": run.seed} | row
        known["adaptation"] = sorted(rows.values(), key=lambda row: (report.rank(row["method"]), row["seed"]))
        if task == "DI":
            collected = report.of_one_length(report.read_runs([RESULTS / "runs"])[0], [])
            groups = [of(collected, task, method) for method in ("DR", OURS)]
            medians = {median_run(group).directory.name for group in groups if group}
            shown = [trained for run, trained in own if run.directory.name in medians]
            for name in medians - {run.directory.name for run, _ in own}:
                print(f"{name}: not in {directory}, its paths in the picture are as they were", file=sys.stderr)
            drawn = {m: x.round(3).tolist() for m, x in report_agents.paths(shown, task).items()}
            known["paths"] = known.get("paths", {}) | drawn
    return {task: found[task] for task in aib_envs.TASKS if task in found}


def read_results():
    runs, problems = report.read_runs([RESULTS / "runs"])
    held_out, more = report.read_runs([RESULTS / "held_out"])
    relatives, agents = [], json.loads((RESULTS / "agents.json").read_text())
    for task in aib_envs.TASKS:  # one by one, for their budgets (flags) depend on it
        found = report.read_runs(sorted((RESULTS / "relatives").glob(f"{task}__*")))
        relatives, problems = relatives + found[0], problems + found[1]
    return report.of_one_length(runs, problems), agents, relatives, held_out, problems + more


def main(args):
    if args.agents:
        aib_tools.write(RESULTS / "agents.json", json.dumps(roll_out(args.agents)) + "\n")
    runs, agents, relatives, held_out, problems = read_results()
    drawn = figures(runs, agents, relatives)
    (RESULTS / "figures").mkdir(exist_ok=True)
    for name, (_, figure) in drawn.items():
        figure.savefig(RESULTS / "figures" / f"{name}.png", dpi=100)
        plt.close(figure)
    shown = {name: text for name, (text, _) in drawn.items()}
    aib_tools.write(README, fill(README.read_text(), parts(runs, agents, relatives, held_out, shown)))
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(runs)} runs: README.md, results/figures")


if __name__ == "__main__":
    try:
        main(aib_tools.read_flags(Args, __doc__, Args()))
    except (OSError, LookupError, ValueError) as error:
        aib_tools.fail(error)
