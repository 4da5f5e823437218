"""Makes every table and figure of README.md from the files in results/.

    python readme.py                                 README.md's marked parts, and results/figures
    python readme.py --agents runs/                  the same, after the trained agents in runs/ have been rolled out
                                                     once more: results/agents.json
    python report.py --collect results/runs runs/    puts finished runs into results/

A marked part of README.md begins with <!-- name --> and ends with <!-- end -->.
"""

import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats

import aib_envs
import aib_tools
import report

README, RESULTS = Path(__file__).parent / "README.md", Path(__file__).parent / "results"
OURS = "DMA*-SH"
# What the paper says about an order: a method earns more than `share` times what another does, on tasks of a kind.
CLAIMS = [
    ("DMA*-SH is above DMA*", OURS, 1.0, "DMA*", None),
    ("DMA* is above DMA", "DMA*", 1.0, "DMA", None),
    ("DMA*-SH is above DA, which knows the context", OURS, 1.0, "DA", None),
    ("DMA*-SH is above Concat, which knows the context", OURS, 1.0, "Concat", None),
    ("DR fails (less than half of DMA*-SH) where no one policy can do all contexts", OURS, 2.0, "DR", False),
    ("DR does not fail (above 0.8 times DMA*-SH) where one can", "DR", 0.8, OURS, True),
]


@dataclass
class Args:
    agents: str | None = None  # a directory of finished runs with their agent.pt


def verdict(x, y):
    """Is the first method better? By Mann and Whitney's one-sided exact test over seeds, at 0.05."""
    if scipy.stats.mannwhitneyu(x, y, alternative="greater", method="exact").pvalue <= 0.05:
        return "holds"
    if scipy.stats.mannwhitneyu(y, x, alternative="greater", method="exact").pvalue <= 0.05:
        return "does not hold"
    best = scipy.stats.mannwhitneyu(range(len(x)), range(-len(y), 0), alternative="greater", method="exact").pvalue
    return "too few seeds to say" if best > 0.05 else "undecided: the seeds overlap"


def tasks_of(runs):
    return [task for task in aib_envs.TASKS if any(run.task == task for run in runs)]


def results_table(runs):
    """A row for each task and method."""
    paper = json.loads((RESULTS / "paper_results.json").read_text())
    return [{"task": task} | row for task in tasks_of(runs) for row in report.task_table(runs, task, paper)]


def paper_table(runs):
    """Scaled AER over the tasks of a kind, with the paper's in brackets."""
    paper = json.loads((RESULTS / "paper_results.json").read_text())
    return [row for row in report.aggregate_table(report.for_aggregates(runs, []), paper) if row["tasks"] != "all"]


def curves(runs):
    return "\n".join(f"![Learning curves on {task}](results/figures/{task}_curves.png)\n" for task in tasks_of(runs))


def claims_table(runs):
    """A row for each claim and task for which there are runs."""
    rows = []
    for (claim, one, share, other, overlap), task in itertools.product(CLAIMS, aib_envs.TASKS):
        values = {
            split: [[run.aer(split) for run in runs if (run.task, run.method) == (task, m)] for m in (one, other)]
            for split in ("all sets", "eval-out")
        }
        if not all(values["all sets"]) or overlap not in (None, aib_envs.get_task(task).overlap):
            continue
        row = {"the paper's claim": claim, "task": task, "seeds": " and ".join(str(len(x)) for x in values["all sets"])}
        for split, (x, y) in values.items():
            row[split] = f"{report.iqm(x):.1f} to {report.iqm(y):.1f}: {verdict(x, share * np.array(y))}"
        rows.append(row)
    return rows


def cost_table(runs):
    """Core-hours: a row for each task, a column for each method."""
    rows, methods = [], list(report.by_method(runs))
    hours = lambda own: sum(sum(run.metrics[-1]["seconds"].values()) for run in own) / 3600
    for task in [*tasks_of(runs), "all"]:
        own = [run for run in runs if task in (run.task, "all")]
        row = {"task": task, "runs": len(own), "core-hours": f"{hours(own):.1f}"}
        for method in methods:
            times = [hours([run]) for run in own if run.method == method]
            row[f"{method}, a run"] = f"{np.mean(times):.2f}" if times else ""
        rows.append(row)
    return rows


def adaptation_table(agents):
    """A row for each task and method; what the runs of a method have found stands in the order of their seeds."""
    rows = []
    for task, found in agents.items():
        for method in sorted({agent["method"] for agent in found["adaptation"]}, key=report.rank):
            own = [report.recovery_rows(task, "", a["rewards"]) for a in found["adaptation"] if a["method"] == method]
            joined = lambda kind, key: ", ".join(str(r[kind][key]) for r in own if len(r) > kind)  # noqa: B023
            row = {"task": task, "method": method, "runs": len(own), "reward before": joined(0, "reward before")}
            for kind, name in enumerate(("actuators change", "foreign window")):
                row[f"{name}: lowest reward"] = joined(kind, "lowest after")
                row[f"{name}: steps to 90 %"] = joined(kind, "steps to 90 %")
            rows.append(row)
    return rows


def speed_table():
    """Of bench.py's results: a row for each method."""
    measured, rows = json.loads((RESULTS / "speed.json").read_text()), []
    for method, loop in measured["training"].items():
        row = {"method": method.replace("star", "*"), "updates/s": f"{loop['updates_per_second']:.1f}"}
        row |= {"env steps/s": f"{loop['env_steps_per_second']:,.0f}"}
        row |= {
            "an evaluation, s": f"{loop['evaluation_seconds']:.1f}",
            "peak memory, MiB": f"{loop['memory_mib']:.0f}",
        }
        step = measured["update"][method]
        row |= {"gradient step, ms": f"{step['ms']:.1f}", "time / DMA*": f"{step['time_ratio']:.2f}"}
        rows.append(row | {"work / DMA*": f"{step['work_ratio']:.2f}"})
    return rows


def parts(runs, agents):
    """{name of a marked part of README.md: its content}."""
    return {
        "results": report.markdown(results_table(runs)),
        "paper": report.markdown(paper_table(runs)),
        "curves": curves(runs),
        "claims": report.markdown(claims_table(runs)),
        "adaptation": report.markdown(adaptation_table(agents)),
        "cost": report.markdown(cost_table(runs)),
        "speed": report.markdown(speed_table()),
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


def roll_out(directory):
    """What the figures need of the agents in `directory`: {task: {"adaptation": [...], "paths": {...}}}."""
    found = {}
    runs, _ = report.read_runs([directory])
    for task in dict.fromkeys(run.task for run in runs):
        if not report.mode_of(task):
            continue
        own = [(run, report.load_agent(run.directory)) for run in runs if run.task == task]
        found[task] = {"adaptation": []}
        for run, trained in own:
            rewards, moved = report.adaptation(trained)
            rounded = [{kind: x.round(3).tolist() for kind, x in part.items()} for part in (rewards, moved)]
            row = {"run": trained.name, "method": run.method, "rewards": rounded[0], "moved": rounded[1]}
            found[task]["adaptation"].append(row)
        if aib_envs.get_task(task).physics == "DoubleIntegrator":
            shown = [trained for run, trained in own if run.method in ("DR", OURS)]
            found[task]["paths"] = {m: x.round(3).tolist() for m, x in report.paths(shown, task).items()}
    return found


def figures(runs, agents):
    """Draws them into results/figures."""
    (RESULTS / "figures").mkdir(exist_ok=True)

    def save(figure, name):
        figure.savefig(RESULTS / "figures" / f"{name}.png", dpi=100)

    for task in tasks_of(runs):
        save(report.learning_curves(runs, task), f"{task}_curves")
    for task, found in agents.items():
        as_arrays = lambda part: {kind: np.array(x) for kind, x in part.items()}
        curves = [(a["method"], as_arrays(a["rewards"]), as_arrays(a["moved"])) for a in found["adaptation"]]
        save(report.adaptation_figure(curves, task), f"{task}_adaptation")
        if found.get("paths"):
            save(report.paths_figure(found["paths"], task), f"{task}_paths")


def main(args):
    if args.agents:
        (RESULTS / "agents.json").write_text(json.dumps(roll_out(args.agents)) + "\n")
    runs, problems = report.read_runs([RESULTS / "runs"])
    agents = json.loads((RESULTS / "agents.json").read_text())
    README.write_text(fill(README.read_text(), parts(runs, agents)))
    figures(runs, agents)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(runs)} runs: README.md, results/figures")


if __name__ == "__main__":
    try:
        main(aib_tools.read_flags(Args, __doc__, Args()))
    except (OSError, LookupError, ValueError) as error:
        aib_tools.fail(error)
