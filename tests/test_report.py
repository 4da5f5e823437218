"""tools/report.py: made-up runs with known numbers, runs of all lengths and states of repair."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import aib_envs
import report
from methods import METHODS, Method

ROOT = Path(__file__).parent.parent


def make_run(directory, method, seed, value, steps=1000, env_id="DI", flags=None, **more):
    """A finished run whose return in every context is `value` + 0 (train), 1 (eval-in), 2 (eval-out)."""
    run = directory / f"{env_id}__{method}__{seed}__{steps}{value}"
    run.mkdir(parents=True)
    args = {"env_id": env_id, "seed": seed, "total_timesteps": steps, "gamma": 0.99, "run_dir": "runs"} | (flags or {})
    (run / "config.json").write_text(json.dumps({"run": run.name, "method": method, "args": args}))
    contexts = {split: aib_envs.context_set(env_id, split) for split in aib_envs.SPLITS}
    returns = {split: [[value + i - 1, value + i + 1]] * 20 for i, split in enumerate(aib_envs.SPLITS)}
    results = {"method": method, "args": args, "contexts": contexts, "returns": returns} | more
    (run / "results.json").write_text(json.dumps(results))
    lines = [{"global_step": s, "aer": dict.fromkeys(aib_envs.SPLITS, value)} for s in range(0, steps + 1, 500)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read(*directories):
    """Runs, unfinished runs and problems."""
    return report.read_runs(directories)


def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------ whole reports ------------------------------------------------


def test_report_of_known_numbers(tmp_path):
    """Two lengths side by side, a method that lacks a task, a run that has not finished, a name that is no UTF-8."""
    for seed, value in enumerate([40, 50, 60]):
        make_run(tmp_path / "runs", "DMAstar-SH", seed, value)
        make_run(tmp_path / "runs", "DR", seed, value / 10)
    make_run(tmp_path / "runs", "Concat", 1, 30)
    make_run(tmp_path / "runs", "Concat", 2, 20, steps=2000)
    make_run(tmp_path / "runs", "DR", 0, 50, env_id="DI-Perm")
    make_run(tmp_path / "runs", "DMAstar-SH", 0, 85, env_id="DI-Perm")
    (make_run(tmp_path / "runs", "DA", 1, 33) / "results.json").unlink()
    (tmp_path / "runs" / os.fsdecode(b"caf\xe9")).mkdir()
    command = [sys.executable, str(ROOT / "tools" / "report.py")]  # from another directory, as users do
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True, check=True)
    out = tmp_path / "report"
    rows = table(out / "tables" / "DI.csv")
    assert [(row["method"], row["steps"], row["seeds"]) for row in rows] == [
        ("DR", "1,000", "3"),
        ("Concat", "1,000", "1"),
        ("DMA*-SH", "1,000", "3"),
        ("Concat", "2,000", "1"),
        ("doing nothing", "", ""),
    ]
    assert [row["train"] for row in rows] == ["4.0, 5.0, 6.0", "30.0", "40.0, 50.0, 60.0", "20.0", "0.0"]
    assert rows[2]["all sets"] == "41.0, 51.0, 61.0"
    pooled = {row["method"]: row for row in table(out / "tables" / "over_tasks_1.csv")}
    assert list(pooled) == ["DR", "DMA*-SH"] and pooled["DR"]["seeds"] == "3, 1"
    # the middle half of 41 51 61 86 86 86, one task as heavy as the other
    assert float(pooled["DMA*-SH"]["all sets: IQM"]) == pytest.approx((0.5 * 51 + 61 + 1.5 * 86) / 300, abs=0.006)
    assert float(pooled["DMA*-SH"]["all sets: mean"]) == pytest.approx((51 + 86) / 200, abs=0.006)
    tidy = table(out / "runs.csv")
    assert len(tidy) == 4 * 10 and {row["AER"] for row in tidy if row["set"] == "eval-in"} >= {"41.0", "31.0"}
    page = (out / "report.md").read_text()
    assert "DI__DA__1" in page and "DI__DA__1" not in (out / "runs.csv").read_text()  # unfinished
    assert r"caf\udce9" in page
    for name in ("DI_curves", "DI_contexts", "DI-Perm_curves"):
        assert f"figures/{name}.png" in page
        for kind in ("png", "svg"):
            assert (out / "figures" / f"{name}.{kind}").stat().st_size > 5000
    assert "caf" in process.stderr


@pytest.mark.parametrize("tool", ["report", "watch"])
def test_a_tool_takes_the_benchmark_of_its_own_clone(tool, tmp_path):
    """Where another clone is installed."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "results").mkdir()
    for name in ("aib_envs.py", "aib_run.py", "results/paper_results.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    program = f"import sys; sys.path[0] = '{tmp_path}/tools'; import {tool}, aib_envs; print(aib_envs.__file__)"
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", program], env=path, capture_output=True, text=True)
    assert process.stdout.strip() == str(tmp_path / "aib_envs.py"), process.stderr


def test_only_what_is_there_is_explained(tmp_path):
    """And after all tables, as in RESULTS.md."""
    for number, method in enumerate(["DR", "DMAstar-SH"]):
        make_run(tmp_path / "one", method, 1, 4, env_id="ODE")
        for seed in range(5):
            make_run(tmp_path / "many", method, seed, 10 + 20 * number + seed)
    pages = {}
    for name in ("one", "many"):
        report.report([tmp_path / name], tmp_path / name / "out")
        pages[name] = (tmp_path / name / "out" / "report.md").read_text()
        order = [pages[name].index(f"## {heading}\n") for heading in ("Overview", "Hours", "How to read the tables")]
        assert order == sorted(order)
        overview, _, rest = pages[name].partition("## How to read")
        assert report.ABOUT_OVERVIEW in overview and "A cell" not in overview and "A cell" in rest
    pages = {name: " ".join(page.split()) for name, page in pages.items()}
    assert "*Worse mode*" not in pages["one"] and "*Stuck*" in pages["one"]
    assert "*Worse mode*" in pages["many"] and "*Stuck*" not in pages["many"]
    about = " ".join(report.ABOUT_VERDICTS.split())
    assert about in pages["many"] and about not in pages["one"]
    assert "| 5.0 (1) |" in pages["one"] and "| 13 (5) |" in pages["many"]


def test_unfinished_runs_alone_have_a_report(tmp_path, monkeypatch):
    run = make_run(tmp_path / "runs", "DR", 1, 10)
    (run / "results.json").unlink()
    edit(run / "config.json", broke_down="step 49: the loss qf_loss is not finite")
    report.report([tmp_path / "runs"], tmp_path / "out")
    assert "step 49: the loss qf_loss is not finite" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "figures" / "DI_curves.png").exists() and not (tmp_path / "out" / "runs.csv").exists()


@pytest.mark.parametrize("flags", [[], ["--collect", "kept"]])
def test_without_runs_the_old_report_stays(flags, tmp_path, monkeypatch, capsys):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.md").write_text("old")
    (tmp_path / "rnus").mkdir()
    error = refused(["rnus", *flags], tmp_path, monkeypatch, capsys)
    assert len(error.splitlines()) == 1 and "rnus" in error
    assert (tmp_path / "report" / "report.md").read_text() == "old" and not (tmp_path / "kept").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    report.write(path, "old")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        report.write(path, "new")
    assert path.read_text() == "old"


def test_home_in_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_run(tmp_path / "home" / "runs", "DR", 1, 10)
    for flags in (["--out=~/report"], ["--collect=~/kept"]):
        monkeypatch.setattr(sys, "argv", ["report.py", "~/runs", *flags])
        report.main()
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["kept", "report", "runs"]
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("flags", [["--collcet", "x"], ["--out", "/dev/null/x"], ["rnus", "runs/."]])
def test_bad_input_gets_one_line(flags, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "runs", "DR", 1, 10)
    error = refused(flags, tmp_path, monkeypatch, capsys)
    assert len(error.splitlines()) == 1 and any(flag[:9] in error for flag in flags)
    assert not (tmp_path / "report").exists()


def refused(flags, directory, monkeypatch, capsys):
    """What the program says on standard error when it ends with 2."""
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "argv", ["report.py", *flags])
    with pytest.raises(SystemExit) as stop:
        report.main()
    assert stop.value.code == 2
    return capsys.readouterr().err


# ------------------------------------------------------- reading runs -------------------------------------------------


def test_links_are_followed_and_what_is_no_run_is_named(tmp_path):
    make_run(tmp_path / "elsewhere", "DR", 1, 10)
    make_run(tmp_path / "runs", "DR", 2, 20)
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "circle").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "runs" / "logs").mkdir()  # of runs.sh
    (tmp_path / "runs" / ".DI__DR__9").mkdir()  # of a run that could not begin
    (tmp_path / "runs" / "killed").mkdir()
    (tmp_path / "runs" / "killed" / "metrics.jsonl").write_text("")
    strange = make_run(tmp_path / "runs", "DR", 3, 30)
    (strange / "config.json").unlink()
    (strange / "config.json").mkdir()  # as unreadable as can be, for root too
    runs, _, problems = read(tmp_path / "runs", tmp_path / "rnus")
    assert [run.seed for run in runs] == [1, 2]
    for name in ("dangling", "killed", "config.json", "rnus"):
        assert sum(name in line.partition(": ")[0] for line in problems) == 1, (name, problems)
    assert len(problems) == 4


@pytest.mark.skipif(os.getuid() == 0, reason="root can read everything")
def test_unreadable_directories_are_named(tmp_path):
    run = make_run(tmp_path, "DR", 1, 10)
    run.chmod(0)
    assert run.name in read(tmp_path)[2][0]
    run.chmod(0o700)


def test_an_error_of_the_walk_is_named(tmp_path, monkeypatch):
    make_run(tmp_path / "a", "DR", 1, 10)

    def scandir(path, real=os.scandir):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (tmp_path / "b").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    runs, _, problems = read(tmp_path)
    assert len(runs) == 1 and len(problems) == 1 and "Permission denied" in problems[0]


DAMAGED = {
    "no json": lambda results: "{",
    "a context too few": lambda results: results["returns"]["train"].pop(),
    "no rollouts": lambda results: results["returns"].update(train=[[]] * 20),
    "not finite": lambda results: results["returns"].update(train=[[float("nan")]] * 20),
    "other contexts": lambda results: results.update(contexts={}),
    "no task": lambda results: results["args"].update(env_id="Cheetha"),
    "a list": lambda results: "[]",
    "null": lambda results: "null",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_results_are_named(damage, tmp_path):
    make_run(tmp_path, "DR", 1, 10)
    path = make_run(tmp_path, "DR", 2, 20) / "results.json"
    results = json.loads(path.read_text())
    text = DAMAGED[damage](results)
    path.write_text(text if isinstance(text, str) else json.dumps(results))
    runs, _, problems = read(tmp_path)
    assert [run.seed for run in runs] == [1] and len(problems) == 1 and "DI__DR__2" in problems[0]


@pytest.mark.parametrize("value", [{}, None, [1, 2], "x", 3])
@pytest.mark.parametrize("name", ["prediction", "experts", "held_out", "diverged"])
def test_a_damaged_part_does_not_cost_the_report(name, value, tmp_path):
    runs = tmp_path / "runs"
    make_run(runs, "DR", 1, 10)
    run = make_run(runs, "DR", 2, 20)
    if name in ("prediction", "experts"):
        line = {"global_step": 1000, "aer": dict.fromkeys(aib_envs.SPLITS, 20), name: value}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    else:
        edit(run / "results.json", **{name: value})
    found, _, problems = read(runs)
    report.task_table(found, "DI")
    named = sum(name in line and run.name in line for line in problems)
    assert len(found) == 2 and (named == 1 or (name, value) == ("held_out", [1, 2]))


def test_a_damaged_line_of_metrics_ends_the_curve(tmp_path):
    run = make_run(tmp_path, "DR", 1, 10)
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"global_step": 15')
    other = make_run(tmp_path, "DR", 2, 10)
    (other / "metrics.jsonl").unlink()
    runs, _, problems = read(tmp_path)
    assert [len(run.metrics) for run in runs] == [3, 0] and len(problems) == 2
    report.plt.close(report.learning_curves(runs, [], "DI"))


@pytest.mark.parametrize("part", ["aer", "seconds", "shadow_gradient"])
@pytest.mark.parametrize("value", [None, {"train": "x"}, [1, 2], float("nan"), "x"])
def test_a_line_of_metrics_with_a_damaged_part_ends_the_curve(part, value, tmp_path):
    run = make_run(tmp_path / "runs", "DR", 1, 10)
    line = {"global_step": 1500, "aer": dict.fromkeys(aib_envs.SPLITS, 10), "shadow_gradient": 1.0} | {part: value}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    (found,), _, problems = read(tmp_path / "runs")
    assert len(found.metrics) == 3 and len(problems) == 1 and "line 4" in problems[0]


def test_while_a_run_is_extended_it_has_not_finished(tmp_path):
    run = make_run(tmp_path, "DR", 1, 10, steps=2000)
    found = json.loads((run / "results.json").read_text())
    found["args"]["total_timesteps"] = 1000  # it was at 1000 and is now on its way to 2000
    (run / "results.json").write_text(json.dumps(found))
    runs, unfinished, _ = read(tmp_path)
    assert not runs and [run.steps for run in unfinished] == [2000]


def test_of_two_runs_of_the_same_the_one_that_began_later_counts(tmp_path):
    old = make_run(tmp_path / "b", "DR", 1, 10)  # the value ends the name, as the time does
    make_run(tmp_path / "a", "DR", 1, 20)
    os.utime(old)
    runs, _, problems = read(tmp_path)
    assert [run.aer("train") for run in runs] == [20] and old.name in problems[0]
    make_run(tmp_path, "DR", 1, 30, steps=2000)
    assert [run.steps for run in read(tmp_path)[0]] == [1000, 2000]


def test_of_two_settings_as_frequent_the_scripts_defaults_are_the_methods_own(tmp_path):
    for seed, gamma in ((1, 0.5), (2, 0.99), (3, 0.6)):
        edit(make_run(tmp_path, "DR", seed, 10, flags={"gamma": gamma}) / "config.json", script="dr_sac.py")
    assert [run.method for run in read(tmp_path)[0]] == ["DR", "DR (gamma 0.5)", "DR (gamma 0.6)"]


def test_what_tells_runs_of_one_name_apart(tmp_path):
    """Another script or flag does, and the default of a flag that a run did not have; a flag that changes nothing that
    is learned does not."""
    for seed, name in enumerate(["dma_sac.py", "dma_sac.py", "my_sac.py"], 1):  # my_sac.py is not there
        edit(make_run(tmp_path / "a", "DMAstar", seed, 10, flags={"eval_every": seed}) / "config.json", script=name)
    edit(make_run(tmp_path / "a", "DMAstar", 4, 10, flags={"mask_prob": 0.2}) / "config.json", script="dma_sac.py")
    edit(make_run(tmp_path / "a", "DMAstar", 5, 10, flags={"mask_prob": 0.3}) / "config.json", script="dma_sac.py")
    runs, _, problems = read(tmp_path / "a")
    named = {run.seed: run.method for run in runs}
    assert named[1] == named[2] == named[4] == "DMA*" and "mask_prob 0.3" in named[5] and "my_sac.py" in named[3]
    assert len(problems) == 2


def test_flags_that_a_resume_may_change_tell_nothing_apart():
    import aib_run

    assert aib_run.FREE - {"eval_rollouts"} < report.FREE  # fewer rollouts are another measurement


def test_runs_of_different_code_are_named(tmp_path):
    old, new = ({"script_sha256": name * 64, "commit": "c" * 40} for name in "ab")
    starts = {1: old, 2: new, 3: old, 4: old | {"resumed": [old, new]}, 5: old | {"changed": True}}
    for seed, start in starts.items():
        edit(make_run(tmp_path / "FiLM", "FiLM", seed, 10) / "config.json", script="film_sac.py", **start)
        edit(make_run(tmp_path / "same", "Same", seed, 10) / "config.json", **old)
    for seed, commit in ((1, "d"), (2, "e"), (3, "e")):
        edit(make_run(tmp_path / "other", "Other", seed, 10) / "config.json", **old | {"commit": commit * 40})
        edit(make_run(tmp_path / "old", "DR", seed, 10) / "config.json", commit=commit * 40)
    film = "FiLM on DI: seeds 1, 3, 4, 5 and seed 2 are of different versions of film_sac.py"
    film += "; seed 4 went on with another version than they began with"
    film += "; seed 5 had code that was not committed"
    other = "Other on DI: seed 1 and seeds 2, 3 are of different commits"
    older = "3 of 16 runs do not have their script's hash (they are older). Their commits: eeeeeee (2), ddddddd (1)."
    assert report.code_notes(read(tmp_path)[0]) == [film, other, older]
    report.report([tmp_path], tmp_path / "out")
    assert f"- {film}\n- {other}\n" in (tmp_path / "out" / "report.md").read_text()


def test_shared_flags_have_the_scripts_defaults():
    import aib_run

    for script in {method.script for method in METHODS.values()}:
        if Path(script).name not in report.RELATIVES:
            args = vars(aib_run.load_script(script).Args())
            assert {name: args.get(name, value) for name, value in report.DEFAULTS.items()} == report.DEFAULTS


def test_a_plain_name_means_the_defaults(tmp_path):
    """However many runs have other flags. Verdicts are about runs with the same shared flags."""
    for method, starts in (("DR", 200), ("DMAstar-SH", 100), ("DMAstar", 100), ("Mine", 100)):
        for seed in (1, 2):
            flags = {"learning_starts": starts, "eval_rollouts": 10}
            make_run(tmp_path / "runs", method, seed, len(method) + seed, flags=flags)
    runs, _, problems = read(tmp_path / "runs")
    starts = {"DR": 200, "DMA*": 100, "DMA*-SH": 100, "Mine": 100}
    assert list(report.by_method(runs)) == [f"{name} (learning_starts {steps})" for name, steps in starts.items()]
    assert len(problems) == 4 and all("2 runs" in line for line in problems)  # one a name, not one a run
    assert {row["task"] for row in report.overview_table(runs)} == {"DI"} and not report.flag_notes(runs)
    assert not report.task_claims(runs, "DI")
    found = {row["claim"] for row in report.task_claims(runs, "DI", report.own_claims(runs))}
    own = {f"Mine (learning_starts 100) above {rival} (learning_starts 100)" for rival in ("DMA*-SH", "DMA*")}
    assert found == own | {"DMA*-SH above DMA* (learning_starts 100)"}
    make_run(tmp_path / "runs", "DMAstar-SH", 1, 99)
    make_run(tmp_path / "runs", "DR", 1, 99, flags={"learning_starts": 5000})
    runs, _, _ = read(tmp_path / "runs")
    assert {row["claim"] for row in report.task_claims(runs, "DI")} == {"DR fails: below 0.6 of DMA*-SH"}


def test_a_row_in_methods_names_flags(tmp_path, monkeypatch):
    row = Method("Big", "dr_sac.py", "--batch-size 512 --context-aware --gamma 0.9")
    monkeypatch.setitem(METHODS, "Big", row)
    for seed, size in ((1, 512), (2, 256), (3, 256)):
        make_run(tmp_path, "Big", seed, 10, flags={"batch_size": size, "gamma": 0.9})
    make_run(tmp_path, "DR", 1, 10)
    runs, _, _ = read(tmp_path)
    assert {run.method for run in runs} == {"DR", "Big", "Big (batch_size 256)"}
    assert not report.task_claims(runs, "DI", report.own_claims(runs))
    assert "Big: batch_size 512, not 256 (DI); gamma 0.9, not 0.99 (DI)" in report.flag_notes(runs)
    monkeypatch.setitem(METHODS, "Off", Method("Off", "dr_sac.py", "--no-bootstrap-at-limit"))
    assert report.defaults_of("Off") == report.DEFAULTS | {"bootstrap_at_limit": False}


def test_relatives_have_defaults_of_their_own(tmp_path):
    edit(make_run(tmp_path, "UVFA", 1, 10, flags={"tau": 0.01}) / "config.json", script="hyperzero.py")
    assert [run.method for run in read(tmp_path)[0]] == ["UVFA"]


def test_a_task_that_its_script_brings_along(tmp_path, monkeypatch):
    """It is in all tables and figures of its own, and in no aggregate."""
    monkeypatch.setattr(aib_envs, "TASKS", dict(aib_envs.TASKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    task = "aib_envs.Task('X', 2, 1, 9, 4, (aib_envs.MASS, aib_envs.INVERSION), False, 9, (0, 200))"
    (tmp_path / "my_cart.py").write_text(f"import aib_envs\naib_envs.TASKS['MyCart'] = {task}\n")
    (tmp_path / "my_sac.py").write_text("import my_cart\n")
    (tmp_path / "my_broken.py").write_text("import nothing_at_all\n")
    exec((tmp_path / "my_cart.py").read_text(), {})
    for method in ("DR", "DMAstar-SH", "Mine"):
        make_run(tmp_path / "runs", method, 1, 100, env_id="MyCart")
        edit(tmp_path / "runs" / f"MyCart__{method}__1__1000100" / "config.json", script="my_sac.py")
    broken = make_run(tmp_path / "runs", "Broken", 1, 100, env_id="MyCart")
    edit(broken / "config.json", script="my_broken.py")
    del aib_envs.TASKS["MyCart"]
    report.import_script.cache_clear()
    _, _, problems = read(broken)
    assert "my_broken.py cannot be imported" in problems[0] and "nothing_at_all" in problems[0]
    edit(make_run(tmp_path / "runs", "DR", 1, 10) / "config.json", script="my_sac.py")
    report.report([tmp_path / "runs"], tmp_path / "out")
    out = tmp_path / "out"
    rows = table(out / "tables" / "MyCart.csv")
    assert {row["method"] for row in rows} >= {"DR", "DMA*-SH", "Mine"} and rows[0]["worse mode"] == "100 %"
    assert {row["task"] for row in table(out / "tables" / "overview.csv")} == {"DI", "MyCart"}
    assert (out / "figures" / "MyCart_contexts.png").exists() and (out / "figures" / "MyCart_curves.png").exists()
    assert not (out / "tables" / "over_tasks_1.csv").exists()


def test_a_task_of_a_module_has_its_own_name(tmp_path):
    make_run(tmp_path / "runs", "DR", 1, 10, env_id="relatives.aib_signs:DI-Signs")
    make_run(tmp_path / "runs", "DR", 2, 20, env_id="relatives.aib_signs:DI-Signs")
    lost = make_run(tmp_path / "lost", "DR", 1, 10)
    for name in ("config.json", "results.json"):
        edit(lost / name, args=json.loads((lost / name).read_text())["args"] | {"env_id": "no_such_module:DI"})
    (group,) = report.lengths(read(tmp_path / "runs")[0])
    assert group == ("DI-Signs", 1000)
    runs, _, problems = read(tmp_path / "lost")
    assert not runs and len(problems) == 1 and "no_such_module" in problems[0]


def test_flags_are_told_apart_over_tasks(tmp_path):
    make_run(tmp_path, "DR", 1, 10, flags={"gamma": 0.5})
    for env_id in ("DI-Perm", "DI-Friction"):
        make_run(tmp_path, "DR", 1, 10, env_id=env_id)
    assert [run.method for run in read(tmp_path)[0]] == ["DR (gamma 0.5)", "DR", "DR"]


# --------------------------------------------------------- numbers ----------------------------------------------------


def made(task, method, seed, aer, steps=1000):
    """A run whose return is `aer` in every context of training and eval-in, and 10 less in eval-out."""
    returns = {split: np.full((20, 1), aer - 10.0 * (split == "eval-out")) for split in aib_envs.SPLITS}
    metrics = [{"global_step": steps, "seconds": {"update": 1800.0, "env": 360.0 * seed}}]
    metrics[0]["aer"] = {split: float(x.mean()) for split, x in returns.items()}
    where = Path(f"{task}__{method}__{seed}")
    return report.Run(where, where.name, task, method, seed, steps, "", {}, metrics, returns)


def runs_of(task, steps=1000, **values):
    methods = {"DMA_SH": "DMA*-SH", "DMA_": "DMA*"}
    named = {methods.get(name, name): own for name, own in values.items()}
    return [made(task, m, seed, x, steps) for m, own in named.items() for seed, x in enumerate(own, 1)]


@pytest.mark.parametrize("script", ["dmash_sac.py", "dmash_public.py"])
def test_terminal_time_limits_never_stand_under_a_plain_name(script, tmp_path):
    for seed in (1, 2):
        run = make_run(tmp_path, "Mine", seed, 50, flags={"bootstrap_at_limit": False})
        edit(run / "config.json", script=script)
    assert {run.method for run in read(tmp_path)[0]} == {"Mine (bootstrap_at_limit False)"}


def test_claims_have_a_line_each_on_the_page_and_all_numbers_in_the_file(tmp_path):
    page = report.Page(tmp_path, "figures")
    runs = runs_of("DI", DR=[10, 20, 30, 10, 20], DMA_SH=[60, 70, 80, 60, 70])
    report.add_verdicts(page, "Verdicts", "verdicts", report.task_claims(runs, "DI"))
    assert page.render("").count("| DR fails") == 1
    assert [row["set"] for row in page.tables["verdicts"]] == ["all sets", "eval-out"]
    (line,) = report.side_by_side(page.tables["verdicts"])
    assert (line["seeds"], line["all sets"]) == ("5/5", "holds: 63.3 and 13.3, P 1.00, p 0.004 -> 0.008")


def test_a_cell_has_every_seed_or_from_five_on_an_interval():
    assert report.cell([3, 1, 90, 2]) == "3.0, 1.0, 90.0, 2.0"
    value, low, high = (float(x.strip("[],")) for x in report.cell([5, 1, 90, 2, 4]).split())
    assert value == round(11 / 3, 1) and 1 <= low < value < high <= 90


def test_steps_of_all_environments_where_they_are_known():
    run = made("DI", "HyperZero", 1, 50)
    run.script = "hyperzero.py"
    assert "steps of all environments" not in report.extra_columns([run])
    run.metrics = []
    assert "steps of all environments" not in report.extra_columns([run])
    run.metrics = [{"env_steps": 10}, {"env_steps": 1200}]
    assert report.extra_columns([run])["steps of all environments"] == "1,200"


def test_aer_and_the_better_of_the_last_two():
    run = made("DI", "DR", 1, 50)
    assert run.aer("train") == 50 and run.aer("eval-out") == 40 and run.aer("all sets") == pytest.approx(140 / 3)
    assert run.better("all sets") == run.aer("all sets")  # there is but one evaluation
    before = {"global_step": 500, "aer": {"train": 70, "eval-in": 0, "eval-out": 45}}
    run.metrics.insert(0, before)
    assert [run.better(split) for split in report.SETS] == [70, 50, 45, 55]
    run.metrics.insert(0, before | {"aer": dict.fromkeys(aib_envs.SPLITS, 99)})
    assert run.better("train") == 70


def test_worse_mode():
    run = made("DI", "DMA*", 3, 80.0)
    assert run.worse_mode() == 1
    reversed_ = [context["inversion"] == -1 for context in aib_envs.context_set("DI", "train")]
    run.returns["train"][reversed_] = 10.0
    assert run.worse_mode() == 1 / 8 and made("DI", "DR", 1, 0.1).worse_mode() is None
    assert made("DI-Friction", "DR", 1, 50).worse_mode() is None


def test_worst_of_three_modes():
    aib_envs.get_task("relatives.aib_signs:DI-Signs")
    run = made("DI-Signs", "DR", 1, 80.0)
    signs = [(c["inversion_x"], c["inversion_y"]) for c in aib_envs.context_set("DI-Signs", "train")]
    returns = {(-1, 1): 10.0, (1, -1): 30.0, (1, 1): 40.0}
    run.returns["train"][:] = [[returns[pair]] for pair in signs]
    assert run.mode_returns() == [10, 30, 40] and run.worse_mode() == 1 / 4


def test_stuck_rollouts():
    run = made("ODE", "DMA*", 1, 180)
    run.returns["train"][:3] = 10
    run.returns["train"][3] = 60  # is stuck, too
    run.returns["train"][4] = 60.5
    share, mean = report.stuck(run)
    assert share == pytest.approx(4 / 60) and mean == pytest.approx((15 * 180 + 60.5 + 20 * 180 + 20 * 170) / 56)
    (row, _) = report.task_table([run], "ODE")
    assert row["stuck"] == "6.7 %"
    assert "stuck" not in report.task_table(runs_of("DI", DR=[1]), "DI")[0]


def test_diverged_simulations_are_counted_where_there_are_some(tmp_path):
    nothing = {split: [[False, False]] * 20 for split in aib_envs.SPLITS}
    some = nothing | {"eval-out": [[True, False]] * 3 + [[False, False]] * 17}
    make_run(tmp_path, "DR", 1, 10, diverged=nothing)
    make_run(tmp_path, "DR", 2, 20, diverged=some)
    make_run(tmp_path, "DR", 3, 30)  # from before that
    runs, _, _ = read(tmp_path)
    (row,) = report.diverged_table(runs)
    assert (row["method"], row["set"], row["diverged rollouts"], row["of"]) == ("DR", "eval-out", 3, 80)
    assert [row["diverged rollouts"] for row in report.tidy(runs)] == [0, 0, 0, 0, 0, 0, 3, 3, "", "", "", ""]
    report.collect([tmp_path], tmp_path / "kept")
    assert report.diverged_table(read(tmp_path / "kept")[0]) == [row]


def test_models_and_experts(tmp_path):
    """hyperdynamics.py's prediction errors, and hyperzero.py's experts, whose first stage has no AER."""
    for seed in (1, 2):
        run = make_run(tmp_path, "HyperDynamics", seed, 60)
        error = dict(zip(aib_envs.SPLITS, (0.01 * seed, 0.02, 0.123), strict=True))
        line = {"global_step": 1000, "aer": dict.fromkeys(aib_envs.SPLITS, 60)}
        planned = line | {"prediction": {"one_step": error, "twenty_step": error}}
        (run / "metrics.jsonl").write_text(json.dumps(planned) + "\n")
        run = make_run(tmp_path, "HyperZero", seed, 50, held_out=[3, 7])
        lines = [{"global_step": 0, "experts": [0.0] * 20}, line | {"experts": [*range(0, 40 * seed, 2 * seed)]}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs, _, problems = read(tmp_path)
    zero, dynamics, _ = report.task_table(runs, "DI")
    assert (
        not problems
        and dynamics["one step, train"] == "0.01, 0.02"
        and dynamics["twenty step, eval-out"] == "0.12, 0.12"
    )
    assert zero["its experts, train"] == "19.0, 38.0" and zero["its experts, held out"] == "10.0, 20.0"
    assert zero["held out"] == "50.0, 50.0" and zero["one step, train"] == "" == dynamics["held out"]


def test_lengths_are_never_pooled():
    runs = runs_of("DI", DR=[10, 20, 30]) + runs_of("DI", 2000, DR=[70]) + runs_of("DI-Perm", 2000, DR=[50])
    rows = report.task_table(runs, "DI")
    assert [(row["steps"], row["seeds"]) for row in rows[:2]] == [("1,000", 3), ("2,000", 1)]
    assert len(report.overview_table(runs)) == 3
    assert [run.steps for run in report.main_runs(runs, "DI")] == [1000] * 3  # as many methods, more runs
    assert [run.steps for run in report.main_runs(runs_of("DI", DR=[1]) + runs_of("DI", 2000, DR=[1]), "DI")] == [2000]
    assert not list(report.blocks(runs))  # one method


def test_tasks_over_which_methods_are_compared():
    """Those that have all of the methods, after the same share of their training."""
    half = runs_of("DI", 50_000, DR=[1], DA=[1], DMA_SH=[1]) + runs_of("DI-Perm", 50_000, DR=[1], DMA_SH=[1])
    half += runs_of("ODE", 50_000, DR=[1], DA=[1], DMA_SH=[1]) + runs_of("Cheetah", 100_000, DR=[1], DMA_SH=[1])
    full = runs_of("Cartpole", 100_000, DR=[1], DMA_SH=[1])
    found = [(kind, methods, tasks) for kind, _, methods, tasks in report.blocks(half + full)]
    assert found == [
        ("non-overlapping", ["DR", "DMA*-SH"], ["DI", "DI-Perm", "ODE", "Cheetah"]),
        ("non-overlapping", ["DR", "DA", "DMA*-SH"], ["DI", "ODE"]),
    ]
    kinds = lambda runs: [kind for kind, *_ in report.blocks(runs)]
    one = runs_of("DI-Friction", 50_000, DR=[1], DMA_SH=[1])
    assert "all" not in kinds(half + one)
    two = runs_of("DI-Friction", 50_000, DR=[1], DA=[1], DMA_SH=[1]) + runs_of("BallInCup", 100_000, DR=[1], DMA_SH=[1])
    of_all = [methods for kind, _, methods, _ in report.blocks(half + two) if kind == "all"]
    assert of_all == [["DR", "DMA*-SH"]]  # DA has one overlapping task only
    assert not list(report.blocks(full + runs_of("ODE-2", 100_000, DR=[1], DMA_SH=[1])))  # not the benchmark's


def test_aggregates_beside_the_paper():
    runs = runs_of("DI", DR=[10, 20, 30], DMA_SH=[60, 75, 90])
    runs += runs_of("DI-Perm", DR=[1, 2, 3], DMA_SH=[50, 30, 40])
    ((kind, own, methods, tasks),) = report.blocks(runs)
    first, second = report.aggregate_table(own, kind, methods, tasks)
    assert (first["method"], first["all sets: paper's IQM"]) == ("DR", "0.41")
    value, low, high = (float(x.strip("[],")) for x in second["all sets: mean"].split())
    assert value == pytest.approx(0.575 - 1 / 30, abs=0.005) and 0.42 < low < value < high < 0.66
    assert report.paper_score("overlapping", "DR", "eval-out") == "0.55" and not report.paper_score(
        "all", "Mine", "train"
    )


def test_claims_about_a_task():
    rows = report.task_claims(runs_of("BallInCup", DR=[650, 800, 900], DMA_SH=[750, 800, 850]), "BallInCup")
    assert [(row["claim"], row["set"]) for row in rows] == [
        ("DR does not fail: above 0.8 of DMA*-SH", "all sets"),
        ("DR does not fail: above 0.8 of DMA*-SH", "eval-out"),
    ]
    assert rows[0]["AER"] == "780.0 and 796.7" and rows[0]["verdict"] == "undecided"
    rows = report.task_claims(runs_of("DI", DR=[10, 20, 30, 10, 20], DMA_SH=[60, 70, 80, 60, 70]), "DI")
    assert [row["verdict"] for row in rows] == ["holds", "holds"] and rows[0]["p, Holm of 2"] == "0.008"
    rows = report.task_claims(runs_of("DI", DR=[40, 50, 55], DMA_SH=[60, 70, 80]), "DI")
    assert [row["verdict"] for row in rows] == ["undecided"] * 2  # 51.7 is below 56.7, but not below 0.6 of that


def test_claims_over_tasks():
    """Every task counts the same, those of one kind only, and those that lack one of the two methods do not."""
    runs = runs_of("DI", DMA_SH=[60, 70, 80], DA=[65, 10, 10]) + runs_of("ODE", DMA_SH=[50, 90], DA=[70, 80])
    runs += runs_of("DI-Perm", DA=[1, 2, 3]) + runs_of("DI-Friction", DMA_SH=[1, 2, 3], DA=[4, 5, 6])
    row, _ = report.pooled_claims(runs)
    assert (row["claim"], row["kind"], row["tasks"]) == ("DMA*-SH above DA", "non-overlapping", "DI, ODE")
    # 8 of 9 pairs and 2 of 4. Ways with i of 9 pairs: 1 1 2 3 3 3 3 2 1 1, with j of 4: 1 1 2 1 1. As high: 24 of 120
    assert (row["P"], row["p"], row["verdict"]) == ("0.69", "0.200", "undecided")
    mean = ((70 - 85 / 3) / 100 + (70 - 75) / 200) / 2
    assert float(row["of means"]) == pytest.approx(mean, abs=0.005)


def test_what_is_compared_with_nothing_is_named():
    runs = runs_of("ODE", DR=[10, 20], DMA_SH=[60]) + runs_of("ODE", 250, Mine=[90]) + runs_of("DI", DR=[1])
    assert report.left_out(runs) == ["Mine on ODE has 250 steps, most others have 1,000: not compared"]


def test_own_methods_have_a_table_of_their_own(tmp_path):
    """And leave what is said about the paper's claims as it is."""
    published = runs_of("DI", DR=[10, 20, 30], DA=[1, 2, 3], DMA_=[40, 50, 60], DMA_SH=[60, 70, 80])
    published += runs_of("ODE", DR=[10, 20, 30], DMA_SH=[60, 70, 80])
    mine = runs_of("DI", Mine=[90, 91, 92], Yours=[50, 51, 52]) + runs_of("ODE", Mine=[90, 91, 92])
    page = report.Page(tmp_path, "figures")
    for runs in (published, published + mine):
        before = dict(page.tables)
        report.add_task_verdicts(page, runs, "DI")
        report.add_over_tasks(page, runs)
    for name in ("DI_verdicts", "verdicts"):
        assert page.tables[name] == before[name]
    claims = list(dict.fromkeys(row["claim"] for row in page.tables["DI_own_verdicts"]))
    against = ("DMA*-SH", "DMA*", "DR")
    assert claims == [f"{one} above {other}" for one in ("Mine", "Yours") for other in against]
    pooled = page.tables["own_verdicts"]
    assert [row["claim"] for row in pooled] == ["Mine above DMA*-SH"] * 2 + ["Mine above DR"] * 2
    assert {row["p, Holm of 4"] for row in pooled} == {"0.010"}  # 4 / 400


def test_an_own_method_is_shown_with_a_row_and_without(monkeypatch):
    runs = runs_of("DI", DR=[10], DMA_SH=[60], Mine=[90])
    found = report.overview_table(runs), report.own_claims(runs)
    monkeypatch.setattr(report, "LABELS", [*report.LABELS, "Mine"])
    assert (report.overview_table(runs), report.own_claims(runs)) == found
    assert "Mine" in found[0][0] and len(found[1]) == 4


def test_hours():
    one, total = report.cost_table(runs_of("DI", DR=[10, 20]))
    assert (one["hours"], one["DR, a run"], total["hours"], total["runs"]) == ("1.3", "0.65", "1.3", 2)


# --------------------------------------------------------- figures ----------------------------------------------------


def test_curves_show_every_length_and_what_has_not_finished():
    runs = [made("DI", "DR", seed, 10 * seed, steps) for seed, steps in ((1, 1000), (2, 1000), (3, 2000))]
    for run in runs:
        lines = [run.metrics[0] | {"global_step": step, "shadow_gradient": 0.1} for step in (0, 500, run.steps)]
        run.metrics[:] = lines
    unfinished = made("DI", "DA", 1, 50)
    unfinished.returns = None
    figure = report.learning_curves(runs, [unfinished], "DI")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert len(lines) == 3 and {len(axis.lines) for axis in figure.axes} == {
        3,
        2,
    }  # the last one of the shadow gradient
    longer, shorter = lines["DR, 2,000 steps (1)"], lines["DR, 1,000 steps (2)"]
    assert max(longer.get_xdata()) == 2 and list(shorter.get_ydata()) == [15] * 3
    assert longer._dash_pattern != shorter._dash_pattern and longer.get_color() == shorter.get_color()
    assert len({axis.get_ylim() for axis in figure.axes[:3]}) == 1
    report.plt.close(figure)


def test_a_run_too_short_to_be_seen_is_not_in_the_legend():
    runs = [made("DI", "DR", 1, 10, 1000), made("DI", "DA", 1, 10, 49), made("DI", "DMA", 1, 10, 50)]
    figure = report.learning_curves(runs, [], "DI")
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"DR (1)", "DMA (1)"}
    report.plt.close(figure)


@pytest.mark.filterwarnings("error")
def test_a_long_legend_leaves_room(tmp_path):
    methods = [f"{name} (learning_starts {steps})" for name in report.STYLE for steps in (1, 2, 3, 4, 5)]
    figure = report.context_figure([made("DI", method, 1, 10) for method in methods], "DI")
    figure.savefig(tmp_path / "figure.png")
    assert figure.axes[0].get_position().height * figure.get_figheight() > 1
    report.plt.close(figure)


def test_no_two_methods_of_a_figure_look_the_same():
    methods = [*report.STYLE, *(f"{name} (batch_size {size})" for name in report.STYLE for size in (1, 2, 3, 4))]
    wanted = [str(report.style(method)) for method in methods]
    assert len(set(wanted)) < len(methods)  # there is something to do
    runs = [made("DI", method, 1, 10) for method in methods]
    for figure in (report.learning_curves(runs, [], "DI"), report.context_figure(runs, "DI")):
        lines = {line.get_label().removesuffix(" (1)"): line for line in figure.axes[0].lines}
        drawn = {(str(lines[method]._dash_pattern), lines[method].get_color()) for method in methods}
        assert len(drawn) == len(methods)
        report.plt.close(figure)
    looks = report.styles(methods)
    assert all(looks[method] == report.style(method) for method in report.STYLE)


def test_the_overview_shows_the_score_of_every_run():
    """Of several lengths that of most methods: Concat's run on DI is of another one, and its one on ODE is shown."""
    less = 10 / 3  # over all sets than in training
    runs = [made("DI", "DR", seed, aer + less) for seed, aer in ((1, 10), (2, 30))]
    runs += [made("DI", "DMA*-SH", 1, 70 + less), made("DI", "Concat", 1, 50 + less, 2000)]
    runs += [made("ODE", "Concat", 1, 180 + less), made("ODE", "DR", 1, 50 + less)]
    figure = report.overview_figure(runs)
    points = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines if line.get_label()[0] != "_"}
    wanted = {"DR": [0.1, 0.3, 0.25], "Concat": [0.9], "DMA*-SH": [0.7]}
    assert {name: [round(y, 9) for y in values] for name, values in points.items()} == wanted
    means = [segment[0, 1] for lines in figure.axes[0].collections for segment in lines.get_segments()]
    assert np.allclose(sorted(means), [0.2, 0.25, 0.7, 0.9])
    report.plt.close(figure)


@pytest.mark.parametrize("task", ["DI", "Walker", "ODE", "DI-Signs"])
def test_return_in_each_context(task):
    aib_envs.get_task("relatives.aib_signs:DI-Signs")
    figure = report.context_figure(runs_of(task, DR=[10, 20]), task)
    drawn = [y for axis in figure.axes for line in axis.lines if line.get_label() == "DR" for y in line.get_ydata()]
    assert sorted(set(drawn)) == [5, 15] and len(drawn) == (120 if task in ("Walker", "ODE") else 60)
    report.plt.close(figure)


# -------------------------------------------------------- collecting --------------------------------------------------


def test_collected_runs_give_the_same_tables(tmp_path):
    for seed, value in enumerate([40, 50.1234567]):
        run = make_run(tmp_path / "runs", "DMAstar-SH", seed, value, flags={"run_dir": "/home/me/runs"})
        (run / "agent.pt").write_bytes(bytes(1000))
    (make_run(tmp_path / "runs", "DR", 1, 6) / "results.json").unlink()
    report.collect([tmp_path / "runs"], tmp_path / "kept")
    names = {path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert names == {"config.json", "results.json", "metrics.jsonl"}
    assert "/home" not in "".join(path.read_text() for path in (tmp_path / "kept").rglob("*.json"))
    tables = [report.task_table(read(tmp_path / name)[0], "DI") for name in ("runs", "kept")]
    assert tables[0] == tables[1] and "40.0, 50.1" in tables[0][0].values()


def test_runs_whose_directories_have_one_name_are_all_kept(tmp_path):
    for folder, seed in (("A", 1), ("B", 2)):
        make_run(tmp_path / folder, "DR", seed, 10 * seed).rename(tmp_path / folder / "same")
    for _ in range(2):  # again: over the copies of the same runs
        report.collect([tmp_path / "A", tmp_path / "B"], tmp_path / "kept")
        assert sorted(run.aer("train") for run in read(tmp_path / "kept")[0]) == [10, 20]
    report.collect([tmp_path / "B"], tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_an_extended_run_replaces_its_older_copy(tmp_path):
    run = make_run(tmp_path / "runs", "DR", 1, 10)
    report.collect([tmp_path / "runs"], tmp_path / "kept")
    for name in ("config.json", "results.json"):
        found = json.loads((run / name).read_text())
        found["args"]["total_timesteps"] = 2000
        (run / name).write_text(json.dumps(found))
    report.collect([tmp_path / "runs"], tmp_path / "kept")
    assert [found.steps for found in read(tmp_path / "kept")[0]] == [2000]


def test_runs_are_not_collected_into_themselves(tmp_path):
    run = make_run(tmp_path / "runs", "DR", 1, 10)
    shutil.copytree(run, tmp_path / "before")
    with pytest.raises(SystemExit) as stop:
        report.collect([tmp_path / "runs"], tmp_path / "runs")
    assert stop.value.code == 2
    assert all(path.read_text() == (tmp_path / "before" / path.name).read_text() for path in run.iterdir())
