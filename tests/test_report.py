"""report.py: statistics against closed forms, scipy and known information; tables of runs with known numbers."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import aib_envs
import hyperdynamics
import report
import report_agents

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------ statistics ---------------------------------------------------


def test_interquartile_mean():
    assert report.iqm(np.array([1.0, 2, 3, 100])) == 2.5
    assert report.iqm(np.array([5.0, 1, 3])) == 3  # nothing to trim
    assert report.iqm(np.arange(12.0).reshape(3, 4)).tolist() == [1.5, 5.5, 9.5]


def test_bootstrap_of_one_group_against_scipy():
    x = np.random.default_rng(1).normal(10, 3, 12)
    ours = report.bootstrap([x], report.pooled_iqm, 20_000)
    theirs = scipy.stats.bootstrap((x,), report.iqm, method="percentile", n_resamples=20_000, random_state=2)
    assert ours == pytest.approx(theirs.confidence_interval, abs=0.06)


def test_bootstrap_of_a_mean_against_the_closed_form():
    x = np.random.default_rng(3).normal(0, 1, 400)
    low, high = report.bootstrap([x], lambda groups: groups[0].mean(1), 5000)
    assert (high - low) / 2 == pytest.approx(1.96 * x.std() / 20, rel=0.05)


def test_bootstrap_is_stratified():
    groups = [np.full(3, 0.0), np.full(3, 1.0)]  # all the variance lies between the tasks
    assert report.bootstrap(groups, report.pooled_iqm).tolist() == [0.5, 0.5]


def test_probability_of_improvement():
    x, y = np.random.default_rng(4).normal(size=(2, 9))
    expected = scipy.stats.mannwhitneyu(x, y).statistic / 81
    assert report.improvement(x, y) == pytest.approx(expected)
    assert report.improvement([1, 2], [1, 2]) == 0.5 and report.improvement([2, 3], [0, 1]) == 1
    assert report.mean_improvement([[2, 3], [0], [0, 1], [1]]) == 0.5


# ------------------------------------------------------ information --------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_kraskov_on_gaussians(correlation):
    rng = np.random.default_rng(0)
    x, y = rng.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], 3000).T
    assert report_agents.kraskov(x, y) == pytest.approx(-0.5 * math.log(1 - correlation**2), abs=0.05)
    assert report_agents.kraskov(100 * x, y) == pytest.approx(
        report_agents.kraskov(x, y), abs=1e-3
    )  # units do not matter


def test_kraskov_on_two_dimensional_gaussians():
    x = np.random.default_rng(0).normal(size=(3000, 2))
    y = x + np.random.default_rng(1).normal(size=(3000, 2))
    assert report_agents.kraskov(x, y) == pytest.approx(math.log(2), abs=0.07)


@pytest.mark.parametrize("share", [0.5, 0.45])
def test_a_clean_binary_code_tells_its_entropy(share):
    labels = np.arange(2000) < 2000 * share
    z = np.where(labels[:, None], [0.0, 1.0], [1.0, 0.0]) + 0.01 * np.random.default_rng(0).normal(size=(2000, 2))
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert report_agents.entropy(labels) == pytest.approx(entropy)
    assert report_agents.ross(z, labels) == pytest.approx(entropy, abs=0.01)
    assert report_agents.kraskov(z, labels.astype(float)) == pytest.approx(entropy, abs=0.02)


def test_a_code_that_knows_nothing_tells_nothing():
    rng = np.random.default_rng(0)
    assert report_agents.ross(rng.normal(size=(2000, 8)), rng.integers(0, 20, 2000)) == pytest.approx(0, abs=0.05)


def test_ties_are_no_information():
    bits = np.random.default_rng(0).integers(0, 2, (2, 1000))
    assert report_agents.kraskov(*bits) == pytest.approx(0, abs=0.1)
    assert report_agents.kraskov(np.full((1000, 8), 0.3), np.random.default_rng(0).normal(size=(1000, 8))) < 0.1
    assert report_agents.ross(np.full((1000, 8), 0.3), bits[0]) == pytest.approx(0, abs=0.1)


def test_ross_against_sklearn():
    from sklearn.feature_selection import mutual_info_classif

    labels = np.random.default_rng(0).integers(0, 3, 1500)
    x = labels + np.random.default_rng(1).normal(size=1500)
    theirs = mutual_info_classif(x[:, None], labels, n_neighbors=3, random_state=0)[0]
    assert report_agents.ross(x, labels) == pytest.approx(theirs, abs=0.02)


@pytest.mark.parametrize(("env_id", "mode"), [("DI", "inversion"), ("Walker", None), ("DI-Perm", "permutation")])
def test_variabilitys_parts_add_up(env_id, mode):
    z = np.random.default_rng(0).normal(size=(20, 30, 8)) * np.linspace(0.1, 2, 8)
    contexts = aib_envs.context_set(env_id, "train")
    z += 3 * np.array([context.get(mode, 0) for context in contexts])[:, None, None]
    total, *parts = report_agents.variability(z, contexts, mode)
    assert abs(total - sum(parts)) < 1e-10 and min(parts) >= 0 and report_agents.mode_of(env_id) == mode
    assert total == pytest.approx(np.cov(z.reshape(-1, 8).T, bias=True).trace() / 8)
    assert (parts[2] < 1e-12) == (mode is None) and parts[0] == pytest.approx(z.var(axis=1).mean())


def test_overlap_and_informativeness_of_a_clean_code():
    contexts = aib_envs.context_set("DI", "train")
    code = np.array([[context["inversion"] == 1, context["inversion"] == -1] for context in contexts], float)
    assert report_agents.overlap(code) == pytest.approx((11 * 10 + 9 * 8) / 380)
    z = code[:, None] + 1e-3 * np.random.default_rng(0).normal(size=(20, 50, 2))
    c, s, u = report_agents.informativeness(z, contexts, "inversion")
    assert s == pytest.approx(0.688, abs=0.01) and c == pytest.approx(s, abs=0.1) and u == pytest.approx(0, abs=0.1)
    z = np.array([list(context.values()) for context in contexts])[:, None] + 1e-4 * z  # knows the mass too
    c, s, u = report_agents.informativeness(z, contexts, "inversion")
    assert c == pytest.approx(math.log(20), abs=0.02) and u == pytest.approx(math.log(20) - 0.688, abs=0.2)


# ------------------------------------------------- made-up runs, known numbers ---------------------------------------


def make_run(directory, method, seed, value, steps=1000, env_id="DI", flags=None, metrics=True):
    """A finished run whose return in every context is `value` + 0 (train), 1 (eval-in), 2 (eval-out)."""
    run = directory / f"{env_id}__{method}__{seed}__{steps}{value}"
    run.mkdir(parents=True)
    args = {"env_id": env_id, "seed": seed, "total_timesteps": steps, "gamma": 0.99, "run_dir": "runs"} | (flags or {})
    (run / "config.json").write_text(json.dumps({"run": run.name, "method": method, "args": args}))
    contexts = {split: aib_envs.context_set(env_id, split) for split in aib_envs.SPLITS}
    returns = {split: [[value + i - 1, value + i + 1]] * 20 for i, split in enumerate(aib_envs.SPLITS)}
    results = {"method": method, "args": args, "contexts": contexts, "returns": returns}
    (run / "results.json").write_text(json.dumps(results))
    lines = [{"global_step": s, "aer": dict.fromkeys(aib_envs.SPLITS, value)} for s in range(0, steps + 1, 500)]
    if metrics:
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def main(*flags, cwd, code=0):
    command = [sys.executable, str(ROOT / "report.py"), *map(str, flags)]
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == code and "Traceback" not in process.stderr, process.stderr
    return process


def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_tables_of_known_numbers(tmp_path):
    for seed, value in enumerate([40, 50, 60]):
        make_run(tmp_path / "runs", "DMAstar-SH", seed, value)
        make_run(tmp_path / "runs", "DR", seed, value / 10)
    make_run(tmp_path / "runs", "Concat", 1, 30)
    make_run(tmp_path / "runs", "Concat", 2, 20, steps=2000)
    make_run(tmp_path / "runs", "DR", 0, 50, env_id="DI-Friction")
    make_run(tmp_path / "runs", "DMAstar-SH", 0, 85, env_id="DI-Friction")
    process = main(cwd=tmp_path)
    rows = table(tmp_path / "report" / "tables" / "DI.csv")
    assert [(row["method"], row["seeds"], row["steps"]) for row in rows] == [
        ("DR", "3", "1000"),
        ("Concat", "1", "1000"),
        ("DMA*-SH", "3", "1000"),
        ("Concat", "1", "2000"),
    ]
    assert [row["train"] for row in rows] == ["5.0 [4.0, 6.0]", "30.0", "50.0 [40.0, 60.0]", "20.0"]
    assert [row["eval-out"] for row in rows] == ["7.0 [6.0, 8.0]", "32.0", "52.0 [42.0, 62.0]", "22.0"]
    assert rows[2]["all sets"] == "51.0 [41.0, 61.0]"
    total = {(row["tasks"], row["method"]): row for row in table(tmp_path / "report" / "tables" / "aggregates.csv")}
    assert total["non-overlapping", "DMA*-SH"]["train"] == "0.50 [0.40, 0.60] (paper 0.84)"
    assert total["overlapping", "DR"]["eval-out"] == "0.52 (paper 0.55)"
    # every task with the same weight: the middle of 40 50 60 85 85 85, of which one at each end is cut off
    assert total["all", "DMA*-SH"]["train"] == "0.70 (paper 0.84)"
    assert (
        total["all", "DMA*-SH"]["seeds a task"] == "1 to 3" and total["all", "Concat"]["seeds a task"] == "1"
    )  # the run of 2,000 steps is not mixed in
    against = {(r["tasks"], r["DMA*-SH against"]): r for r in table(tmp_path / "report" / "tables" / "comparison.csv")}
    assert against["non-overlapping", "DR"]["train"] == "+900.0 % (paper +90.9 %); P = 1.00 [1.00, 1.00]"
    assert against["overlapping", "DR"]["train"] == "+70.0 % (paper +6.3 %); P = 1.00"
    assert process.stderr.splitlines() == [
        "DI: figures and aggregates are of 1000 steps; runs of [2000] are in the table only",
        "DI: Concat has no run with seed 0, 2, others have",
    ]
    page = (tmp_path / "report" / "report.md").read_text()
    for name in ("DI_curves", "DI_contexts", "DI-Friction_curves", "DI-Friction_contexts"):
        assert f"figures/{name}.png" in page
        for kind in ("png", "svg"):
            assert (tmp_path / "report" / "figures" / f"{name}.{kind}").stat().st_size > 5000


def test_collected_runs_give_the_same_report(tmp_path):
    for seed, value in enumerate([40, 50.1234567]):
        run = make_run(tmp_path / "here" / "runs", "DMAstar-SH", seed, value, flags={"run_dir": "/home/me/runs"})
        (run / "agent.pt").write_bytes(bytes(1000))
    make_run(tmp_path / "here" / "runs", "DR", 0, 5)
    (make_run(tmp_path / "here" / "runs", "DR", 1, 6) / "results.json").unlink()
    process = main("here/runs", "--collect", "kept", cwd=tmp_path)
    assert process.stdout.startswith("3 runs: kept") and "has not finished" in process.stderr
    names = {path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert names == {"config.json", "results.json", "metrics.jsonl"}
    assert "/home" not in "".join(path.read_text() for path in (tmp_path / "kept").rglob("*.json"))
    for source, out in (("here/runs", "one"), ("kept", "two")):
        main(source, "--out", out, cwd=tmp_path)
    tables = [(tmp_path / out / "tables" / "DI.csv").read_text() for out in ("one", "two")]
    assert tables[0] == tables[1] and "40.0, 50.1" in tables[0]


def test_models_and_experts(tmp_path):
    """hyperdynamics.py's prediction errors and hyperzero.py's experts, whose first stage has no AER."""
    for seed in (1, 2):
        run = make_run(tmp_path / "runs", "HyperDynamics", seed, 60)
        error = dict(zip(aib_envs.SPLITS, (0.01 * seed, 0.02, 0.123), strict=True))
        line = {"global_step": 1000, "aer": dict.fromkeys(aib_envs.SPLITS, 60)}
        line |= {"prediction": {"one_step": error, "twenty_step": error}}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        run = make_run(tmp_path / "runs", "HyperZero", seed, 50, flags={"dataset": f"runs/{seed}"})
        lines = [{"global_step": 0, "experts": [0.0] * 20}, {"global_step": 1000, "experts": [10.0 * seed] * 20}]
        lines[1]["aer"] = line["aer"]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    process = main(cwd=tmp_path)
    assert not process.stderr
    (row,) = table(tmp_path / "report" / "tables" / "DI_prediction.csv")
    assert row["method"] == "HyperDynamics" and row["seeds"] == "2"
    assert row["one step, train"] == "0.01, 0.02" and row["twenty step, eval-out"] == "0.12, 0.12"
    (row,) = table(tmp_path / "report" / "tables" / "DI_experts.csv")
    assert row == {"method": "HyperZero", "its experts, train": "10.0, 20.0"}


@pytest.mark.parametrize("length", [2, 20, 200])
def test_legends_have_as_many_columns_as_fit(length):
    figure, axes = report.panels(2, ["", ""])
    for i in range(6):
        axes[0].plot([0, 1], label=f"{i}" * length)
    report.legend(figure, axes)
    assert figure.legends[0]._ncols == {2: 6, 20: 2, 200: 1}[length]
    report.plt.close(figure)


def test_what_experts_have_not_taught(tmp_path):
    run = make_run(tmp_path / "runs", "HyperZero", 1, 50)
    results = json.loads((run / "results.json").read_text())
    for i in (3, 7):
        results["returns"]["train"][i] = [i, i]
    (run / "results.json").write_text(json.dumps(results | {"held_out": [3, 7]}))
    line = {"global_step": 1000, "aer": dict.fromkeys(aib_envs.SPLITS, 60), "experts": list(range(0, 40, 2))}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    main(cwd=tmp_path)
    (row,) = table(tmp_path / "report" / "tables" / "DI_experts.csv")
    expected = {"its experts, train": "19.0", "held out": "5.0", "its experts, held out": "10.0"}
    assert row == {"method": "HyperZero"} | expected


def test_a_task_that_is_not_the_benchmarks_is_in_no_aggregate(tmp_path):
    make_run(tmp_path / "runs", "HyperZero", 1, 50, env_id="Cheetah-Speed")
    make_run(tmp_path / "runs", "HyperZero", 1, 30)
    main(cwd=tmp_path)
    assert table(tmp_path / "report" / "tables" / "Cheetah-Speed.csv")
    (row, *_) = table(tmp_path / "report" / "tables" / "aggregates.csv")
    assert row["number of tasks"] == "1" and row["train"].startswith("0.30")


def test_there_are_styles_for_any_number_of_methods(monkeypatch):
    monkeypatch.setattr(report, "STYLE", dict(report.STYLE))
    assert len({str(report.style(f"mine {i}")) for i in range(40)}) == 18


def test_what_tells_runs_of_one_name_apart(tmp_path):
    """Another script of that name does, a flag that changes nothing that is learned does not."""
    for seed, name in enumerate(["dma_sac.py", "dma_sac.py", "my_sac.py"], 1):  # my_sac.py is not there
        run = make_run(tmp_path, "DMAstar", seed, 10, flags={"eval_every": seed, "eval_epochs": seed})
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"script": name}))
    make_run(tmp_path, "Kickstart", 1, 10)
    runs, problems = report.read_runs([tmp_path])
    assert [run.method for run in runs] == ["DMA*", "DMA*", "DMA* (script my_sac.py)", "Kickstart"]
    assert len(problems) == 1


def test_the_best_is_bold_only_where_intervals_allow_it():
    high = [4, 5, 6, 5, 5]
    assert report.best({"A": [1, 2, 3, 2, 2], "B": high}) == "B"
    assert report.best({"A": [4, 4, 6, 4, 4], "B": high}) is None
    assert report.best({"A": [1, 2, 3, 2], "B": high}) is None and report.best({"B": high}) is None


def test_what_cannot_be_used_is_named_and_the_rest_reported(tmp_path):
    runs = tmp_path / "runs"
    good = make_run(runs, "DR", 1, 10)
    (make_run(runs, "DR", 2, 10) / "results.json").unlink()
    half = make_run(runs, "DR", 3, 10)
    (half / "metrics.jsonl").write_text((half / "metrics.jsonl").read_text() + '{"global_step": 15')
    damaged = make_run(runs, "DR", 4, 10)
    (damaged / "results.json").write_text("{")
    few = make_run(runs, "DR", 5, 10)
    results = json.loads((few / "results.json").read_text())
    results["returns"]["train"].pop()
    (few / "results.json").write_text(json.dumps(results))
    other = make_run(runs, "DR", 6, 10, flags={"gamma": 0.9})
    again = Path(shutil.copytree(good, runs / "again"))
    (tmp_path / "empty").mkdir()
    process = main("runs", "empty", cwd=tmp_path)
    lines = process.stderr.splitlines()
    for part in (
        "empty: no runs here",
        "DI__DR__2__100010: has not finished (no results.json)",
        f"runs/{half.name}/metrics.jsonl: line 4 cannot be read; what comes before it is used",
        f"runs/{damaged.name}: cannot be used (JSONDecodeError",
        f"runs/{few.name}: cannot be used (ValueError: returns must be 20 x rollouts",
        f"runs/{other.name}: is shown as DR (gamma 0.9)",
        "left out",
    ):
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert "DI: DR has no run with seed 6, others have" in lines
    assert "DI: DR (gamma 0.9) has no run with seed 1, 3, others have" in lines
    assert again.name in process.stderr and len(lines) == 9
    rows = table(tmp_path / "report" / "tables" / "DI.csv")
    assert [(row["method"], row["seeds"]) for row in rows] == [("DR", "2"), ("DR (gamma 0.9)", "1")]


def test_tasks_count_alike_whatever_their_seeds(tmp_path):
    for method, seeds in {"DR": (3, 1), "DMAstar-SH": (1, 3)}.items():
        for env_id, value, n in zip(("DI", "DI-Perm"), (10, 90), seeds, strict=True):
            for seed in range(n):
                make_run(tmp_path / "runs", method, seed, value, env_id=env_id)
    make_run(tmp_path / "runs", "DR", 0, 200, env_id="ODE-2")
    process = main(cwd=tmp_path)
    (row,) = [r for r in table(tmp_path / "report" / "tables" / "comparison.csv") if r["tasks"] == "all"]
    assert row["train"].startswith("+0.0 %") and row["train"].endswith("P = 0.50") and row["common tasks"] == "2"
    assert "ODE-2: not in the aggregates, which hold the 13 tasks of the benchmark" in process.stderr


def test_flags_are_told_apart_over_tasks(tmp_path):
    make_run(tmp_path / "runs", "DR", 1, 10, flags={"gamma": 0.5})
    for env_id in ("DI-Perm", "DI-Friction"):
        make_run(tmp_path / "runs", "DR", 1, 10, env_id=env_id)
    process = main(cwd=tmp_path)
    assert "is shown as DR (gamma 0.5)" in process.stderr
    total = table(tmp_path / "report" / "tables" / "aggregates.csv")
    assert [(row["method"], row["number of tasks"]) for row in total if row["tasks"] == "all"] == [
        ("DR", "2"),
        ("DR (gamma 0.5)", "1"),
    ]


def test_damaged_results_and_metrics(tmp_path):
    runs = tmp_path / "runs"
    make_run(runs, "DR", 1, 10, metrics=False)
    other = make_run(runs, "DR", 2, 10)
    (other / "metrics.jsonl").write_text('{"aer": {"train": 1}}')
    for seed, change in enumerate([{"contexts": {}}, {"returns": dict.fromkeys(aib_envs.SPLITS, [[]] * 20)}], 3):
        path = make_run(runs, "DR", seed, 10) / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    process = main(cwd=tmp_path)
    for part in ("metrics.jsonl: is missing", "line 1 cannot be read", "contexts are not", "must be 20 x rollouts"):
        assert process.stderr.count(part) == 1
    (row,) = table(tmp_path / "report" / "tables" / "DI.csv")
    assert row["train"] == "10.0, 10.0"


@pytest.mark.parametrize("flags", [[], ["--collect", "kept"]])
def test_without_runs_the_old_report_stays(flags, tmp_path):
    (tmp_path / "report").mkdir()
    process = main("rnus", *flags, cwd=tmp_path, code=2)
    assert process.stderr == "report.py: no finished runs, nothing is written (rnus: no runs here)\n"
    assert not list(tmp_path.glob("report/*")) and not (tmp_path / "kept").exists()


def test_runs_are_not_collected_into_themselves(tmp_path):
    run = make_run(tmp_path / "runs", "DR", 1, 10)
    before = [path.read_text() for path in sorted(run.iterdir())]
    process = main("--collect", "runs/", cwd=tmp_path, code=2)
    assert "takes a directory for copies" in process.stderr and len(process.stderr.splitlines()) == 1
    assert [path.read_text() for path in sorted(run.iterdir())] == before


def test_the_newer_run_is_the_one_that_began_later(tmp_path):
    old, _ = (make_run(tmp_path, "DR", 1, value) for value in (10, 20))  # the value ends the name, as the time does
    os.utime(old)
    runs, problems = report.read_runs([tmp_path])
    assert [run.aer("train") for run in runs] == [20] and "left out" in problems[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--embedding", "x"], "--embeddings"),
        (["--out", "/dev/null/x"], "/dev/null"),
    ],
)
def test_bad_input_gets_one_line(flags, message, tmp_path):
    make_run(tmp_path / "runs", "DR", 1, 10)
    lines = main(*flags, cwd=tmp_path, code=2).stderr.splitlines()
    assert message in lines[-1] and lines[-1].startswith("report.py: ")


# ------------------------------------------------------- trained agents ----------------------------------------------


def test_recovery():
    rewards = np.array([1.0] * 50 + [0.0] * 10 + [0.5] * 10 + [1.0] * 30)
    level, low, steps = report_agents.recovery(rewards, smooth=1)
    assert (level, low, steps) == (1, 0, 20)
    assert report_agents.recovery(np.array([1.0] * 50 + [0.0] * 50))[2] is None
    assert report_agents.recovery(np.ones(100))[2] == 0  # nothing was lost
    lost_again = np.array([1.0] * 50 + [0.5] * 5 + [1.0] * 40 + [0.0] * 5)
    assert report_agents.recovery(lost_again, smooth=1)[1:] == (0, 5)


def test_recovery_rows_tell_adaptation_from_what_is_none():
    steps = lambda after, modes: [
        row["steps to 90 %"]
        for row in report_agents.recovery_rows("DI", "", {"switch": np.array([1.0] * 50 + after), "modes": modes})
    ]
    assert steps([0.0] * 20 + [1.0] * 30, [1.0, 0.9]) == [20]
    assert steps([0.0] * 50, [1.0, 0.9]) == ["not in the episode"] and steps([1.0] * 50, [1, 1]) == ["nothing lost"]
    assert steps([0.0] * 20 + [1.0] * 30, [1.0, 0.4]) == ["masters one mode only"]
    nothing = report_agents.recovery_rows("DI", "", {"switch": np.zeros(100), "modes": [0.0, 0.0]})
    assert nothing[0]["steps to 90 %"] == "nothing to lose"


def test_adaptation_figure_shows_agents_that_master_both_modes():
    runs = [("DMA", value, modes) for value, modes in ((1.0, [1.0, 0.9]), (0.5, [1.0, 0.1]))]
    results = [(m, {"switch": np.full(100, value), "modes": modes}, {}) for m, value, modes in runs]
    axis = report_agents.adaptation_figure([*results, ("DR", results[1][1] | {"modes": [0.0, 0.0]}, {})], "DI").axes[0]
    line, _ = axis.lines  # and the vertical one at 0
    assert line.get_label() == "DMA (1 of 2 runs)" and set(line.get_ydata()) == {1.0}


def test_a_foreign_window_holds_others_transitions_until_they_have_left_it():
    history = aib_envs.History(2, 4, 10, 1, 1)
    for t in range(-4, 6):
        obs = np.array([[t], [100 + t]], np.float32)
        history.add(obs, obs + 0.5, np.zeros(2), obs + 1, np.zeros(2, bool))
    positions = np.array([[0, 1, 2, 3]])  # transitions 2, 3, 4, 5
    view = report_agents.MixedWindow(history, np.array([1, 0]), 4)
    obs, actions, deltas = view.window(positions)
    assert obs[0, :, 0].tolist() == [102, 103, 4, 5] and obs[1, :, 0].tolist() == [2, 3, 104, 105]
    assert np.array_equal(actions, obs + 0.5) and (deltas == 1).all()
    own = history.window(positions)
    late = report_agents.MixedWindow(history, np.array([1, 0]), 2).window(positions)
    assert all(np.array_equal(a, b) for a, b in zip(late, own, strict=True))


def test_an_agent_that_plans_adapts_too():
    args = hyperdynamics.Args(env_id="DI", candidates=2, horizon=2, action_hold=1)
    agent = hyperdynamics.make_agent(args, hyperdynamics.make_envs(args, [{}]))
    trained = report_agents.Trained("", "HyperDynamics", "DI", hyperdynamics, args, agent)
    rewards, moved = report_agents.adaptation(trained, 1)
    assert rewards["foreign"].shape == (100,) and not moved


@pytest.mark.parametrize("observe", [None, "raw", "scaled"])
def test_inversion_inside_an_episode(observe):
    env = aib_envs.gym.make("AIB/DI-v0", context={"inversion": -1, "mass": 0.5}, observe_context=observe).unwrapped
    env.reset(seed=0)
    obs = env.reset(seed=0)[0]
    report_agents.invert(env, "inversion", obs)
    assert env.context == {"mass": 0.5, "inversion": 1} and (observe is None or obs[-1] == 1)
    env.state[:] = 0
    obs = env.step(np.ones(2, np.float32))[0]
    assert obs[2] > 0
    assert obs[4:].tolist() == pytest.approx({None: [], "raw": [0.5, 1], "scaled": [2 * 0.4 / 1.9 - 1, 1]}[observe])


def test_pairs():
    assert report_agents.pairs_of("DI", 3)[:3] == [
        {"mass": 0.8, "inversion": -1},
        {"mass": 0.8, "inversion": 1},
        {"mass": 1.0, "inversion": -1},
    ]
    twenty = report_agents.pairs_of("Cheetah", 10)
    assert len(twenty) == 20 and all(twenty[i]["length"] == twenty[i ^ 1]["length"] for i in range(20))


def test_embeddings_of_real_runs(tmp_path):
    flags = ["--env-id", "DI", "--total-timesteps", "20", "--learning-starts", "200", "--eval-rollouts", "1"]
    for script in (["dmash_sac.py"], ["dma_sac.py", "--kl-beta", "0.4"], ["dr_sac.py"], ["da_sac.py"]):
        command = [sys.executable, str(ROOT / script[0]), *script[1:], *flags]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    process = main("--embeddings", *(tmp_path / "runs").iterdir(), "nowhere", cwd=tmp_path)
    assert "4 agents" in process.stdout
    assert process.stderr.startswith("nowhere: cannot be used (FileNotFoundError")
    rows = table(tmp_path / "report" / "tables" / "embeddings.csv")
    assert [(row["run"], row["set"]) for row in rows[::3]] == [
        ("DMA-Pearl (seed 1, 20 steps)", "train"),
        ("DMA*-SH (seed 1, 20 steps)", "train"),
    ]
    assert {row["what"] for row in table(tmp_path / "report" / "tables" / "adaptation.csv")} == {
        "actuators change",
        "foreign window",
    }
    figures = [path.name for path in (tmp_path / "report" / "figures").glob("*.png")]
    assert sorted(name.split("__")[1] for name in figures if "embeddings" in name) == ["DMA-Pearl", "DMAstar-SH"]
    assert {"DI_adaptation.png", "DI_information.png", "DI_paths.png"} <= set(figures)
    page = (tmp_path / "report" / "embeddings.md").read_text()
    assert "within a mode" in page and "across modes" in page
    found = report_agents.paths([report_agents.load_agent(path) for path in (tmp_path / "runs").glob("*DR*")], "DI", 2)
    assert found["DR"].shape == (2, 2, 101, 2) and (found["DR"][0, :, 0] == found["DR"][1, :, 0]).all()
    assert (found["DR"][0, :, 1:] != found["DR"][1, :, 1:]).any()
