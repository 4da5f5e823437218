"""runs.sh: what it plans, what it runs at a time, what it says of failures; on this machine and on Slurm.

Most tests run it on a repository of scripts that learn nothing (`repo`), and so in a second. The slow ones take ours.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from tools import grid, plan
from tools.methods import METHODS

ROOT = Path(__file__).parent.parent
SHORT = "--learning-starts 100 --eval-every 100 --eval-rollouts 1 --batch-size 32"

# ----------------------------------------------- A repository that is quick ----------------------------------------

FAKE_ENVS = """
TASKS = {"DI": 0, "ODE": 0, "ODE-1": 0}
def get_task(env_id):
    if env_id not in (*TASKS, "tasks:Mine"):
        raise ValueError(f"unknown task {env_id}")
"""
FAKE_RUN = """
import argparse, dataclasses, fcntl, json, os, signal, sys, time
from pathlib import Path

@dataclasses.dataclass
class Args:
    env_id: str = "DI"
    seed: int = 1
    total_timesteps: int = 100
    run_dir: str = "runs"
    resume: str = ""
    eval_every: int = 10
    seconds: float = 0.0  # how long a step takes
    crash: int = 0  # the seed that is killed
    broken: int = 0  # the seed that fails
    shape: tuple = (1, 2)

def parse_args(cls, argv=None):
    parser = argparse.ArgumentParser(usage="")
    for field in dataclasses.fields(cls):
        kind = field.type if field.type in (int, float, str) else None
        if kind:
            parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default)
    return cls(**vars(parser.parse_args(argv)))

def saved_args(args):
    return vars(args)

def main(cls, method):
    args = parse_args(cls)
    if args.resume:
        run = Path(args.resume)
        saved = json.loads((run / "config.json").read_text())["args"]
        args = cls(**saved)
    else:
        run = Path(args.run_dir) / f"{args.env_id}__{method}__{args.seed}__{time.time_ns() // 10**6}"
        hidden = run.with_name("." + run.name)
        hidden.mkdir(parents=True)
        config = {"method": method, "args": vars(args)}
        (hidden / "config.json").write_text(json.dumps(config))
        (hidden / "metrics.jsonl").touch()
        hidden.rename(run)
    metrics = open(run / "metrics.jsonl", "a")
    for left in range(100, -1, -1):
        try:
            fcntl.flock(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # perhaps a grid only looks
            if not left:
                sys.exit("in use")
            time.sleep(0.01)
        except OSError:
            break
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    step = int((run / "checkpoint.pt").read_text()) if (run / "checkpoint.pt").exists() else 0
    print("begins at", step, "with", os.environ["OMP_NUM_THREADS"], "threads", flush=True)
    while step < args.total_timesteps and not asked:
        step += 10
        time.sleep(10 * args.seconds)
        line = {"global_step": step, "aer": {"train": 1.0}, "seconds": {"train": step * args.seconds}}
        print(json.dumps(line), file=metrics, flush=True)
        if args.seed == args.crash and step > 20:
            os.kill(os.getpid(), signal.SIGKILL)
        if args.seed == args.broken:
            sys.exit("it is broken")
        while step == 40 and Path("hold").exists() and not asked:
            time.sleep(0.005)
    (run / "checkpoint.pt").write_text(str(step))
    if step < args.total_timesteps:
        print("go on with: --resume", run)
        sys.exit(143)
    returns = {"train": [[1.0, 2.0]], "eval-in": [[3.0]], "eval-out": [[4.0]]}
    results = {"method": method, "args": vars(args), "returns": returns}
    (run / "results.json").write_text(json.dumps(results))
"""
FAKE_SCRIPT = """
import dataclasses, sys
import aib_envs, aib_run

@dataclasses.dataclass
class Args(aib_run.Args):
    context_aware: int = 0

def method_name(args):
    return METHOD

if __name__ == "__main__":
    aib_run.main(Args, method_name(None))
"""


class Repo:
    """A copy of the grid's files, with scripts for DR and HyperZero that only count."""

    def __init__(self, root, cwd):
        self.root, self.cwd, self.runs = root, cwd, cwd / "runs"
        (root / "relatives").mkdir(parents=True)
        (root / "tools").mkdir()
        cwd.mkdir()
        shutil.copy(ROOT / "runs.sh", root)
        for name in ("grid", "plan", "methods"):
            shutil.copy(ROOT / "tools" / f"{name}.py", root / "tools")
        (root / "aib_envs.py").write_text(FAKE_ENVS)
        (root / "aib_run.py").write_text(FAKE_RUN)
        self.write_script("dr_sac.py", '"DR"')
        self.write_script("relatives/hyperzero.py", '"HyperZero"')

    def write_script(self, name, method):
        text = f"import sys; sys.path.insert(0, {str(self.root)!r})\n{FAKE_SCRIPT}"
        (self.root / name).write_text(text.replace("METHOD", method))

    def env(self, settings):
        env = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "GRID_HOME")}
        env |= {"PYTHON": sys.executable, "JOBS": "2", "LC_ALL": "C.UTF-8"}
        env |= {"ENVS": "DI", "METHODS": "DR", "SEEDS": "1", "STEPS": "100"} | settings
        return {name: value for name, value in env.items() if value is not None}

    def __call__(self, *arguments, **settings):
        """The finished process of runs.sh with these settings; None takes one away."""
        command = ["bash", str(self.root / "runs.sh"), *arguments]
        options = {"cwd": self.cwd, "env": self.env(settings), "capture_output": True, "text": True}
        return subprocess.run(command, **options, timeout=600, check=False)

    @contextlib.contextmanager
    def hold(self):
        """Inside, runs stop after four evaluations and wait."""
        (self.cwd / "hold").touch()
        try:
            yield
        finally:
            (self.cwd / "hold").unlink()

    def start(self, *arguments, **settings):
        command = ["bash", str(self.root / "runs.sh"), *arguments]
        heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests may be started where it is ignored
        with open(self.cwd / "out", "w") as out:
            options = {"cwd": self.cwd, "env": self.env(settings), "stdout": out, "stderr": out}
            return subprocess.Popen(command, **options, start_new_session=True, preexec_fn=heard)


@pytest.fixture
def repo(tmp_path):
    return Repo(tmp_path / "repo", tmp_path / "cwd")


def statuses(process):
    """[(status, task, method, seed)] of a plan."""
    line = re.compile(r"^(new|resume|done|running) .+  (\S+) +(\S+) +seed (\d+) ", re.MULTILINE)
    return [(*found[:3], int(found[3])) for found in line.findall(process.stdout)]


def runs_in(directory):
    """{(task, method, seed): directory of the run that has finished}."""
    found = {}
    for path in directory.glob("*/results.json"):
        config = json.loads((path.parent / "config.json").read_text())
        key = config["args"]["env_id"], config["method"], config["args"]["seed"]
        assert key not in found
        found[key] = path.parent
    return found


def lines_of(directory):
    """{a run: how many evaluations it has written}."""
    return {path.parent.name: len(path.read_text().splitlines()) for path in directory.glob("[!.]*/metrics.jsonl")}


def wait_for(condition, seconds=600):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.05)


def one_line(process, name):
    """It refused, with one line that names the variable."""
    assert process.returncode == 2, process
    assert len(process.stderr.splitlines()) == 1 and name in process.stderr, process.stderr
    assert " seed " not in process.stdout
    return True


# ------------------------------------------------------------ Settings -----------------------------------------------


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"ENVS": ""}, "ENVS"),
        ({"METHODS": ""}, "METHODS"),
        ({"SEEDS": ""}, "SEEDS"),
        ({"ENVS": "\t", "METHODS": "", "SEEDS": ""}, "METHODS"),
        ({"RUN_DIR": ""}, "RUN_DIR"),
        ({"RUN_DIR": "-x"}, "RUN_DIR"),
        ({"RUN_DIR": "a\nb"}, "RUN_DIR"),
        ({"RUN_DIR": "/dev/null/runs"}, "/dev/null"),
        ({"RUNNER": ""}, "RUNNER"),
        ({"RUNNER": "cloud"}, "RUNNER"),
        ({"DRY": "maybe"}, "DRY"),
        ({"JOBS": "0"}, "JOBS"),
        ({"JOBS": "9223372036854775808"}, "JOBS"),
        ({"SEEDS": "1 x"}, "SEEDS"),
        ({"SEEDS": "3-1"}, "SEEDS"),
        ({"SEEDS": "-1"}, "SEEDS"),
        ({"SEEDS": "1,2"}, "SEEDS"),
        ({"SEEDS": "4294967296"}, "SEEDS"),
        ({"SEEDS": "1-4000000000"}, "SEEDS"),
        ({"STEPS": "many"}, "STEPS"),
        ({"STEPS": "0"}, "STEPS"),
        ({"STEPS": "1e5"}, "STEPS"),
        ({"METHODS": "DR SAC"}, "METHODS"),
        ({"METHODS": "DMAstr-SH"}, "DMAstar-SH"),
        ({"METHODS": "dr"}, "did you mean DR"),
        ({"METHODS": "DR,DMAstar"}, "spaces"),
        ({"METHODS": None, "METHOD": "DR"}, "METHODS"),
        ({"ENVS": None, "ENV": "DI"}, "ENVS"),
        ({"SEEDS": None, "SEED": "3"}, "SEEDS"),
        ({"STEPS": None, "STEP": "300"}, "STEPS"),
        ({"FLAGS": None, "FLAG": "--crash 1"}, "FLAGS"),
        ({"RUNDIR": "elsewhere"}, "RUN_DIR"),
        ({"STEPS": None, "steps": "300"}, "STEPS"),
        ({"ENVS": None, "TASKS": "DI"}, "ENVS"),
        ({"ENVS": "DI OD"}, "OD"),
        ({"ENVS": "DI,ODE"}, "spaces"),
        ({"ENVS": "DI tasks:Yours"}, "tasks:Yours"),
        ({"METHODS": "Concat"}, "FLAGS"),  # the quick script has no such flag
        ({"FLAGS": "--gama 1"}, "FLAGS"),
        ({"FLAGS": "--crash x"}, "FLAGS"),
        ({"FLAGS": "'"}, "FLAGS"),
        ({"FLAGS": "--help"}, "FLAGS"),
        ({"FLAGS": "--seed=5"}, "FLAGS"),
        ({"FLAGS": "--crash 1\n--run_dir x"}, "FLAGS"),
        ({"FLAGS": "--crash 1 --"}, "cannot have --"),
        ({"FLAGS": "--total-timesteps=50"}, "FLAGS"),  # STEPS is set
        ({"SBATCH": "'"}, "SBATCH"),
        ({"PYTHON": "no-python"}, "PYTHON"),
    ],
)
def test_a_wrong_setting_gets_one_line(settings, names, repo):
    process = repo(**settings)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1, process
    assert names in process.stderr and "Traceback" not in process.stderr
    assert not repo.runs.exists()
    if names != "/dev/null":
        assert not process.stdout  # before anything is planned


def test_seeds_are_numbers_and_ranges(repo):
    assert [s[3] for s in statuses(repo(DRY="1", SEEDS="1-3 7 01 2-4"))] == [1, 2, 3, 7, 4]
    assert [s[3] for s in statuses(repo(DRY="1", SEEDS="1 01"))] == [1]
    assert [s[3] for s in statuses(repo(DRY="1", SEEDS=None))] == list(range(1, 11))
    assert len(statuses(repo(DRY="1", ENVS="DI DI", METHODS="DR DR"))) == 1


@pytest.mark.parametrize(
    ("dry", "is_dry"), [("1", 1), ("yes", 1), ("TRUE", 1), ("0", 0), ("no", 0), ("false", 0), ("", 0)]
)
def test_dry_means_what_it_says(dry, is_dry, repo):
    process = repo(DRY=dry)
    assert process.returncode == 0 and statuses(process) == [("new", "DI", "DR", 1)]
    assert repo.runs.exists() != is_dry


def test_help_and_other_arguments(repo):
    for flag in ("--help", "-h"):
        process = repo(flag)
        assert process.returncode == 0 and not process.stderr
        for name in (
            "ENVS",
            "METHODS",
            "SEEDS",
            "STEPS",
            "FLAGS",
            "RUN_DIR",
            "JOBS",
            "DRY",
            "PYTHON",
            "RUNNER",
            "TIME",
        ):
            assert f"\n  {name} " in process.stdout
        assert "export" not in process.stdout
    assert one_line(repo("DI"), "DI")
    assert one_line(repo("array"), "array")


def test_lists(repo):
    process = repo(METHODS="list")
    assert process.returncode == 0 and not process.stderr
    assert [line.split()[0] for line in process.stdout.splitlines()] == list(METHODS)
    process = repo(ENVS="list")
    assert process.returncode == 0, process.stderr
    assert [line.split()[0] for line in process.stdout.splitlines()] == ["DI", "ODE", "ODE-1"]
    assert not repo.runs.exists()


def test_a_task_of_a_module_has_its_own_name_in_tables(repo, tmp_path):
    process = repo(ENVS="tasks:Mine DI")
    assert process.returncode == 0, process
    assert sorted(runs_in(repo.runs)) == [("DI", "DR", 1), ("tasks:Mine", "DR", 1)]
    assert (repo.runs / "logs" / "Mine__DR__1.log").exists()
    done = [("done", "DI", "DR", 1), ("done", "Mine", "DR", 1)]
    assert sorted(statuses(repo(DRY="1", ENVS="tasks:Mine DI"))) == done

    path = make_path(tmp_path / "bin", sbatch='printf "%s\\n" "$@"')
    told = repo(ENVS="tasks:Mine", SEEDS="2", RUNNER="slurm", PATH=path).stdout.splitlines()
    assert Path(repo.cwd, told[-1]).read_text().splitlines() == ["tasks:Mine DR 2"]


def test_a_broken_script_gets_one_line(repo):
    (repo.root / "dr_sac.py").write_text("import no_such_package\n")
    assert one_line(repo(), "no_such_package")


def test_two_scripts_of_one_name_get_one_line(repo):
    (repo.root / "mine").mkdir()
    repo.write_script("mine/dr_sac.py", '"HyperZero"')
    table = repo.root / "tools" / "methods.py"
    table.write_text(table.read_text().replace('"relatives/hyperzero.py"', '"mine/dr_sac.py"'))
    assert one_line(repo(METHODS="DR HyperZero"), "mine/dr_sac.py") and one_line(repo(METHODS="HyperZero DR"), "mine")


@pytest.mark.parametrize("name", ["Args", "method_name"])
def test_a_script_without_a_part_that_grids_need_gets_one_line(name, repo):
    path = repo.root / "dr_sac.py"
    path.write_text(path.read_text().replace(f"{name}(", "Other("))
    assert one_line(repo(), f"has no {name}")


def test_a_method_that_is_called_otherwise(repo):
    repo.write_script("dr_sac.py", '"Mine"')
    process = repo()
    assert one_line(process, "tools/methods.py") and "FLAGS" not in process.stderr
    assert one_line(repo(FLAGS="--crash 3"), "with these FLAGS")


def test_singular_words_of_others_do_no_harm(repo):
    assert len(statuses(repo(DRY="1", SEED="5", ENV="x"))) == 1  # SEEDS and ENVS are set
    assert len(statuses(repo(DRY="1", ENVS=None, METHODS="DR", ENV="/etc/shrc"))) == 2


def test_jobs_are_the_cores_whatever_threads_a_user_has_set(repo):
    assert f"; {grid.cores()} at a time" in repo(DRY="1", JOBS=None, OMP_NUM_THREADS="77").stdout
    assert 1 <= grid.cores() <= os.cpu_count()


def test_needs_nothing_but_bash_sed_and_python(repo, tmp_path):
    """No nproc, setsid, flock, readlink, as on macOS; nor the x bit; and the repository reached through a link."""
    path = make_path(tmp_path / "bin")
    (repo.root / "runs.sh").chmod(0o644)
    (tmp_path / "link.sh").symlink_to(repo.root / "runs.sh")
    command = ["bash", str(tmp_path / "link.sh")]
    options = {"cwd": repo.cwd, "env": repo.env({"PATH": path}), "capture_output": True}
    assert subprocess.run(command, **options, check=False).returncode == 0
    assert len(runs_in(repo.runs)) == 1
    command[0] = "sh"  # so it does not need a bash newer than macOS's 3.2
    assert b"nothing to do" in subprocess.check_output(
        command, cwd=repo.cwd, env=options["env"] | {"PATH": os.environ["PATH"]}
    )


# ------------------------------------------------------------ The grid -----------------------------------------------


def test_runs_what_is_left_and_says_how_it_goes(repo):
    settings = {"SEEDS": "1-3", "FLAGS": "--broken 2"}
    first = repo(**settings)
    assert first.returncode == 1
    planned, result = first.stdout.split("--- result")
    progress = [line for line in planned.splitlines() if " done" in line and "seed" in line]
    assert len(progress) == 3 and all(" of 3 done" in line for line in progress)
    assert sum("AER train 1.5, eval-in 3.0, eval-out 4.0" in line for line in progress) == 2
    assert sum("it is broken" in line for line in progress) == 1
    assert " 2 of 3 done" in result and len(result.splitlines()) == 2
    (failed,) = [line for line in result.splitlines() if line.startswith("FAILED")]
    assert "it is broken" in failed and "(runs/logs/DI__DR__2.log)" in failed
    assert "begins at 0 with 1 threads" in (repo.runs / "logs" / "DI__DR__1.log").read_text()

    names = {path.name for path in repo.runs.iterdir()}
    settings["FLAGS"] = ""
    for path in repo.runs.glob("*/*.json"):  # it is mended
        path.write_text(path.read_text().replace('"broken": 2', '"broken": 0'))
    second = repo(**settings)
    assert second.returncode == 0 and [s[0] for s in statuses(second)] == ["done", "resume", "done"]
    assert names == {path.name for path in repo.runs.iterdir()} and len(runs_in(repo.runs)) == 3
    third = repo(**settings)
    assert third.returncode == 0 and "nothing to do" in third.stdout
    for other in ({"STEPS": "90"}, {"FLAGS": "--broken 3"}, {"ENVS": "ODE"}, {"SEEDS": "4"}):
        assert {s[0] for s in statuses(repo(DRY="1", **settings | other))} == {"new"}
    assert "have other settings" not in third.stdout
    told = repo(DRY="1", **settings | {"STEPS": "90"}).stdout
    assert "note: 3 runs here have other settings (--total-timesteps) and are left alone\n" in told
    assert "1 run here has other settings (--crash)" in repo(DRY="1", FLAGS="--crash 9", SEEDS="2").stdout


def test_a_killed_run_does_not_take_others_with_it(repo):
    process = repo(SEEDS="1-4", FLAGS="--crash 2", JOBS="1")
    assert process.returncode == 1 and " 3 of 4 done\nFAILED" in process.stdout
    assert process.stdout.count("SIGKILL") == 2 and "137" in process.stdout and process.stdout.count("FAILED") == 1
    assert sorted(key[2] for key in runs_in(repo.runs)) == [1, 3, 4]


def test_ctrl_c_reaches_all_runs_as_sigterm(repo):
    settings = {"SEEDS": "1-3"}
    with repo.hold():
        process = repo.start(**settings)
        wait_for(lambda: list(lines_of(repo.runs).values()) == [4, 4])
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    text = (repo.cwd / "out").read_text()
    assert len(list(repo.runs.glob("*/checkpoint.pt"))) == 2  # and seed 3 has not begun
    assert text.count("STOPPED") == 2 and text.count("go on with: --resume") == 2
    assert text.count("WAITING DI DR seed 3: not started\n") == text.count("WAITING") == 1
    second = repo(**settings)
    assert second.returncode == 0 and [s[0] for s in statuses(second)] == ["resume", "resume", "new"]
    assert len(runs_in(repo.runs)) == len(list(repo.runs.glob("DI__*"))) == 3
    assert all("begins at 0" in (repo.runs / "logs" / f"DI__DR__{seed}.log").read_text() for seed in (1, 2, 3))
    assert (repo.runs / "logs" / "DI__DR__1.log").read_text().count("begins at") == 2


def runs_in_process(path, repo, words):
    """Is /proc/<pid> a run of the repository with these words in its command line?"""
    try:
        line = (path / "cmdline").read_text(errors="replace")
        return "_sac.py" in line and words in line and os.readlink(path / "cwd") == str(repo.cwd)
    except OSError:  # it has ended, or is somebody else's
        return False


def test_a_run_that_is_told_to_end_has_not_failed(repo):
    """By `kill` or a batch system, with no word to the grid, which goes on with the next."""
    with repo.hold():
        process = repo.start(SEEDS="1 2", JOBS="1")
        wait_for(lambda: 4 in lines_of(repo.runs).values())
        (run,) = [path for path in Path("/proc").glob("[0-9]*") if runs_in_process(path, repo, "--seed\x001\x00")]
        os.kill(int(run.name), signal.SIGTERM)
        wait_for(lambda: list(lines_of(repo.runs).values()) == [4, 4])
    assert process.wait(timeout=60) == 1
    result = (repo.cwd / "out").read_text().split("--- result")[1].splitlines()[1:]
    assert [line.split()[0] for line in result] == ["STOPPED"] and "go on with" in result[0]
    assert repo(SEEDS="1 2").returncode == 0


def test_a_stopped_grid_whose_runs_are_all_done_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RUN_DIR", str(tmp_path))
    settings = grid.Settings(os.environ)
    job = {"task": "DI", "method": "DR", "seed": 1}
    local = types.SimpleNamespace(stopped=True, failures={}, started={plan.name_of(job)}, busy=set())
    row = plan.Row(job, "done", 0, False, None)
    assert grid.print_result(settings, [row], local) == 0
    row.status = "new"
    assert grid.print_result(settings, [row], local) == 130
    assert "STOPPED DI DR seed 1: before it had begun" in capsys.readouterr().out


def test_after_ctrl_c_the_table_is_about_this_grid_only(repo):
    (repo.runs / "logs").mkdir(parents=True)
    for seed in (1, 3):
        (repo.runs / "logs" / f"DI__DR__{seed}.log").write_text("of an old grid")
    with repo.hold():
        process = repo.start(SEEDS="1-3", JOBS="1", FLAGS="--crash 1")
        wait_for(lambda: any("__2__" in name and n == 4 for name, n in lines_of(repo.runs).items()))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    result = (repo.cwd / "out").read_text().split("--- result")[1].splitlines()[1:]
    assert [line.split()[0] for line in result] == ["FAILED", "STOPPED", "WAITING"]
    assert "SIGKILL" in result[0] and "go on with" in result[1] and "old" not in result[2]
    log = (repo.runs / "logs" / "DI__DR__1.log").read_text().splitlines()
    assert log[0] == "of an old grid" and log[1].startswith("--- started ") and "dr_sac.py --env-id DI" in log[1]


def test_the_last_line_is_of_the_last_start(tmp_path):
    log = tmp_path / "log"
    log.write_text("old reason\r90%\n--- started now: dr_sac.py\n")
    assert grid.last_line(log) == "it has said nothing"
    log.write_text(log.read_text() + "new\n")
    assert grid.last_line(log) == "new"


def test_a_second_ctrl_c_ends_at_once(repo):
    process = repo.start(FLAGS="--seconds 1000")
    wait_for(lambda: "begins at" in "".join(path.read_text() for path in repo.runs.glob("logs/*.log")))
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "stopping" in (repo.cwd / "out").read_text())
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130


def test_a_lost_terminal_ends_nothing(repo):
    env = repo.env({"SEEDS": "1-3"})
    options = {"cwd": repo.cwd, "env": env, "stdout": subprocess.PIPE, "start_new_session": True}
    with repo.hold():
        process = subprocess.Popen(["bash", str(repo.root / "runs.sh")], **options)
        wait_for(lambda: list(lines_of(repo.runs).values()) == [4, 4])
        process.stdout.close()
        os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=60) == 0 and len(runs_in(repo.runs)) == 3


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full 2>/dev/full"])
def test_nobody_need_hear_it(closed, repo, shim):
    settings = {"LD_PRELOAD": shim, "FAKE_LOCKS": "none"}  # so that there is something to say on stderr, too
    command = f"exec bash {shlex.quote(str(repo.root / 'runs.sh'))} {closed}"
    process = subprocess.run(["bash", "-c", command], cwd=repo.cwd, env=repo.env(settings), timeout=600, check=False)
    assert process.returncode == 0 and list(runs_in(repo.runs)) == [("DI", "DR", 1)]


def test_a_directory_with_any_name(repo):
    for run_dir in ("my runs", "r[a]*", "~/runs"):
        settings = {"RUN_DIR": run_dir, "HOME": str(repo.cwd), "FLAGS": "--crash 1"}
        assert repo(**settings).returncode == 1  # killed
        process = repo(DRY="1", **settings)
        assert [s[0] for s in statuses(process)] == ["resume"], process
        assert len(list(Path(repo.cwd, run_dir.replace("~/", "")).glob("DI__DR__1__*"))) == 1


# ------------------------------------------------------- Which run is which ------------------------------------------


def test_a_script_that_has_got_a_flag_since(repo):
    settings = {"SEEDS": "1 2", "FLAGS": "--crash 2"}
    assert repo(**settings).returncode == 1  # one is done, one interrupted
    script = repo.root / "dr_sac.py"
    script.write_text(script.read_text().replace("context_aware: int", "mine: float = 5.0\n    context_aware: int"))
    assert [s[0] for s in statuses(repo(DRY="1", **settings))] == ["done", "resume"]
    more = settings | {"FLAGS": "--crash 2 --mine 4"}
    assert [s[0] for s in statuses(repo(DRY="1", **more))] == ["new", "new"]
    more["FLAGS"] += ".0"
    assert repo(**more).returncode == 1
    assert [s[0] for s in statuses(repo(DRY="1", **more))] == ["done", "resume"]
    assert len(list(repo.runs.glob("DI__*"))) == 4

    script.write_text(script.read_text().replace("mine: float = 5.0\n    ", ""))  # and that has lost it again
    process = repo(DRY="1", **settings)
    assert [s[0] for s in statuses(process)] == ["done", "resume"]
    assert process.stderr.count("mine 4.0") == 2 and len(process.stderr.splitlines()) == 2


def test_runs_of_another_version_of_their_script_are_told(repo):
    def notes():
        return [line for line in repo(DRY="1", SEEDS="1 2").stdout.splitlines() if "version" in line]

    assert repo(SEEDS="1 2").returncode == 0 and not notes()  # they do not say of which they are
    script = repo.root / "dr_sac.py"
    version = hashlib.sha256(script.read_bytes()).hexdigest()
    for path in repo.runs.glob("*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"script_sha256": version}))
    assert not notes()
    script.write_text(script.read_text() + "# edited\n")
    (line,) = notes()
    assert "2 runs" in line and "dr_sac.py" in line and "(DR)" in line


def test_the_same_run():
    args = {
        "env_id": "DI",
        "seed": 1,
        "total_timesteps": 100,
        "gamma": 0.9,
        "shape": (1, 2),
        "run_dir": "a",
        "cuda": True,
    }
    run = plan.identity("DR", args)
    assert run == plan.identity("DR", args | {"run_dir": "b", "cuda": False, "shape": [1, 2]})
    assert run != plan.identity("Concat", args)
    assert run != plan.identity("DR", args | {"new": 1})  # nobody knows the default
    assert plan.identity("DR", args, {"new": 1}) == plan.identity("DR", args | {"new": 1}, {"new": 1})
    assert plan.identity("DR", args, {"new": 1}) != plan.identity("DR", args | {"new": 2}, {"new": 1})
    assert plan.identity("DR", args, {"eval_every": 5}) == plan.identity("DR", args | {"eval_every": 1})
    for name, value in {"seed": 2, "gamma": 1.0, "total_timesteps": 1, "eval_rollouts": 1}.items():
        assert plan.identity("DR", args, {"eval_rollouts": 5}) != plan.identity("DR", args | {name: value})
    args |= {"dataset": "x", "held_out": 0.1}  # stage 1 is the data set's
    zero = plan.identity("HyperZero", args)
    assert zero == plan.identity("HyperZero", args | {"gamma": 1.0, "total_timesteps": 1})
    assert zero != plan.identity("HyperZero", args | {"held_out": 0.2})


def test_damaged_files_do_not_lose_a_run_or_stop_the_grid(repo):
    assert repo().returncode == 0
    (run,) = repo.runs.glob("DI__*")
    for name, content in {
        "a": "{}",
        "b": "[]",
        "c": '{"method": "DR"}',
        "d": "{",
        "e": '{"method": "DR", "args": 1}',
    }.items():
        (repo.runs / name).mkdir()
        (repo.runs / name / "config.json").write_text(content)
    (repo.runs / "f").symlink_to("f")  # a directory that cannot be read
    shutil.copytree(run, repo.runs / f".{run.name}")  # one that is just being made
    (run / "results.json").write_text("{")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n{"seconds": 7}\n\xff\n{"global_step": 7')
    process = repo(DRY="1")
    assert process.returncode == 0 and [s[0] for s in statuses(process)] == ["resume"]
    assert process.stderr.count("is left aside") == 6 and "Traceback" not in process.stderr
    assert plan.last_metrics(run)["global_step"] == 100
    (run / "metrics.jsonl").unlink()
    run.rename(repo.runs / os.fsdecode(b"\xff"))  # no UTF-8
    process = repo(DRY="1")
    assert [s[0] for s in statuses(process)] == ["resume"] and "Traceback" not in process.stderr


def test_the_run_that_came_furthest_goes_on(repo):
    assert repo(FLAGS="--broken 1").returncode == 1
    (first,) = repo.runs.glob("DI__*")
    for name, step in {"b": 50, "c": 30}.items():
        other = shutil.copytree(first, repo.runs / name)
        (other / "metrics.jsonl").write_text(json.dumps({"global_step": step, "seconds": {}}) + "\n")
    assert "--resume runs/b " in repo(DRY="1", FLAGS="--broken 1").stdout
    (repo.runs / "c" / "checkpoint.pt").write_text("30")
    assert "--resume runs/c " in repo(DRY="1", FLAGS="--broken 1").stdout


# ------------------------------------------------------------ Speeds -------------------------------------------------


def write_run(directory, steps, seconds, method="DR", task="DI", seed=9):
    directory.mkdir(parents=True)
    args = {"env_id": task, "seed": seed, "total_timesteps": steps}
    (directory / "config.json").write_text(json.dumps({"method": method, "args": args}))
    (directory / "metrics.jsonl").write_text(json.dumps({"global_step": steps, "seconds": {"train": seconds}}) + "\n")


def test_speeds_are_of_long_runs_here_or_else_of_the_results(repo):
    def hours(**settings):
        process = repo(DRY="1", STEPS="36000", **settings)
        assert process.returncode == 0, process.stderr
        assert ("(~:" in process.stdout) == ("~" in process.stdout.replace("(~:", ""))
        lines = [line for line in process.stdout.splitlines() if " seed " in line]
        return [line.split(maxsplit=1)[1].partition("  ")[0] for line in lines]

    assert hours() == ["?"]
    write_run(repo.runs / "short", 300, 3000)
    assert hours() == ["?"]  # of 300 steps: no measure
    write_run(repo.root / "results" / "runs" / "a", 10_000, 1000)
    write_run(repo.root / "results" / "runs" / "b", 10_000, 3000)
    assert hours(ENVS="DI ODE") == ["~2.0 h", "~2.0 h"]  # ODE like DI
    write_run(repo.root / "results" / "runs" / "c", 10_000, 4000, task="ODE")
    assert hours(ENVS="DI ODE") == ["~2.0 h", "~4.0 h"]
    write_run(repo.runs / "long", 10_000, 500)
    assert hours(ENVS="DI ODE") == ["30 min", "~4.0 h"]
    assert hours(METHODS="HyperZero") == ["?"]
    assert "no run of HyperZero has 5,000 steps" in repo(DRY="1", METHODS="HyperZero").stdout
    process = repo(DRY="1", STEPS="36000", METHODS="DR HyperZero", SEEDS="1 2")
    assert "1.0 core-hours" in process.stdout and "2 of unknown speed" in process.stdout
    assert plan.read_runs(ROOT / "results", "*/*")  # ours are where they are looked for


# ----------------------------------------------------- Locks and shared disks ----------------------------------------

SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>

int flock(int fd, int operation) {
    const char *kind = getenv("FAKE_LOCKS");
    if (!strcmp(kind, "none")) {
        errno = ENOLCK;
        return -1;
    }
    if ((operation & LOCK_EX) && (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY) {
        errno = EBADF;
        return -1;
    }
    return ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(fd, operation);
}
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """A library to preload, with which flock does what NFS does ("nfs"), or a file system without locks ("none")."""
    directory = tmp_path_factory.mktemp("shim")
    (directory / "flock.c").write_text(SHIM)
    command = ["gcc", "-shared", "-fPIC", "-o", str(directory / "flock.so"), str(directory / "flock.c"), "-ldl"]
    if not shutil.which("gcc") or subprocess.run(command, check=False).returncode:
        pytest.skip("gcc cannot make the library")
    return str(directory / "flock.so")


@pytest.mark.parametrize("kind", ["nfs", "none"])
def test_shared_file_systems(kind, repo, shim):
    settings = {"SEEDS": "1 2", "LD_PRELOAD": shim, "FAKE_LOCKS": kind}
    first = repo(**settings, FLAGS="--crash 2")
    assert first.returncode == 1 and len(runs_in(repo.runs)) == 1
    for path in repo.runs.glob("*/*.json"):
        path.write_text(path.read_text().replace('"crash": 2', '"crash": 0'))
    second = repo(**settings)
    assert second.returncode == 0 and [s[0] for s in statuses(second)] == ["done", "resume"], second
    assert "Traceback" not in first.stderr + second.stderr
    for process in (first, second):
        assert len(process.stderr.splitlines()) == (kind == "none")  # which is said once


def test_two_grids_at_once_share_the_work(repo):
    settings = {"SEEDS": "1-4", "JOBS": "1", "FLAGS": "--seconds 0.001"}
    options = {"cwd": repo.cwd, "env": repo.env(settings), "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(["bash", str(repo.root / "runs.sh")], **options) for _ in range(2)]
    texts = [process.communicate(timeout=600)[0] for process in both]
    assert len(runs_in(repo.runs)) == len(list(repo.runs.glob("DI__*"))) == 4, texts
    assert repo(**settings).returncode == 0


def test_a_run_that_is_running_elsewhere(repo):
    assert repo(FLAGS="--broken 1").returncode == 1
    (run,) = repo.runs.glob("DI__*")
    with open(run / "metrics.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = repo(FLAGS="--broken 1")
        assert [s[0] for s in statuses(process)] == ["running"] and process.returncode == 1
        assert "begins" not in process.stdout
    assert [s[0] for s in statuses(repo(DRY="1", FLAGS="--broken 1"))] == ["resume"]


def test_a_run_or_log_that_cannot_be_written(repo, monkeypatch, capsys):
    run = repo.runs / "a"
    write_run(run, 10, 1)

    def refused(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    with monkeypatch.context() as patch:
        patch.setattr(plan, "open", refused, raising=False)
        assert not plan.in_use(run)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not plan.in_use(run) and not plan.in_use(repo.runs / "nothing")

    (repo.runs / "logs" / "DI__DR__1.log").mkdir(parents=True)  # cannot be written by anybody
    process = repo(SEEDS="1 2")
    assert process.returncode == 1 and list(runs_in(repo.runs)) == [("DI", "DR", 2)]
    assert process.stdout.count("FAILED") == 1 and "Traceback" not in process.stderr


# ------------------------------------------------------------- Slurm -------------------------------------------------


def make_path(directory, **scripts):
    """A PATH of bash, sed and these scripts, and nothing else."""
    directory.mkdir()
    for name in ("bash", "sed"):
        (directory / name).symlink_to(shutil.which(name))
    for name, text in scripts.items():
        (directory / name).write_text(f"#!/bin/sh\n{text}\n")
        (directory / name).chmod(0o755)
    return str(directory)


@pytest.fixture
def node(tmp_path):
    """PATH on a node, with a scontrol that ends the task, as Slurm would. There may be no sbatch."""
    return make_path(tmp_path / "node", scontrol='echo "scontrol $*"; kill -9 $PPID')


@pytest.mark.parametrize(("jobs", "array"), [("", "0-3"), ("2", "0-3%2")])
def test_slurm_gets_one_array_and_how_many_may_run_at_once(jobs, array, repo, tmp_path):
    path = make_path(tmp_path / "bin", sbatch='printf "%s\\n" "$@"')
    settings = {"ENVS": "DI ODE", "SEEDS": "1 2", "RUNNER": "slurm", "SBATCH": "--mem=4G --comment='a b'", "JOBS": jobs}
    settings |= {"RUN_DIR": "my 100% runs", "PATH": path, "TIME": "10"}
    dry = repo(DRY="1", **settings)
    assert dry.returncode == 0 and not list(repo.cwd.iterdir())
    (line,) = [line for line in dry.stdout.splitlines() if line.startswith("sbatch ")]
    assert f"--array={array} " in line and "--mem=4G" in line and "--time=10 " in line
    process = repo(**settings)
    told = process.stdout.splitlines()
    assert process.returncode == 0 and not process.stderr
    assert f"--array={array}" in told and "--mem=4G" in told and "--comment=a b" in told and told[-2] == "array"
    assert Path(repo.cwd, told[-1]).read_text().splitlines() == ["DI DR 1", "DI DR 2", "ODE DR 1", "ODE DR 2"]
    assert any(line.startswith("--output=my 100%% runs/") for line in told)


def test_without_slurm(repo, node):
    assert one_line(repo(RUNNER="slurm", PATH=node), "RUNNER") and not repo.runs.exists()
    process = repo(RUNNER="slurm", PATH=node, DRY="1")
    assert process.returncode == 0 and "sbatch --requeue" in process.stdout


def slurm_task(repo, path, restarts=0, **settings):
    """A task of an array, without Slurm: its process and its log."""
    log = repo.runs / "logs" / "DI__DR__1.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if not (log.parent / "list.txt").is_dir():
        (log.parent / "list.txt").write_text("ODE DR 7\nDI DR 1\n")
    settings |= {"PATH": path, "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": str(restarts)}
    settings |= {"RUNNER": "slurm", "GRID_HOME": str(repo.root), "ENVS": None, "METHODS": None, "SEEDS": None}
    copy = shutil.copy(repo.root / "runs.sh", repo.cwd / "slurm_script")  # as Slurm does
    command = ["bash", str(copy), "array", "runs/logs/list.txt"]
    return subprocess.Popen(command, cwd=repo.cwd, env=repo.env(settings), start_new_session=True), log


def test_a_slurm_task_runs_and_is_requeued_after_a_crash_only(repo, node):
    process, log = slurm_task(repo, node, FLAGS="--crash 1")
    assert process.wait(timeout=60) == -signal.SIGKILL  # by our scontrol
    assert "scontrol requeue 12" in log.read_text() and "exit code 137" in log.read_text()
    process, log = slurm_task(repo, node, restarts=3, FLAGS="--crash 1")
    assert process.wait(timeout=60) == 137 and log.read_text().count("scontrol") == 1  # often enough
    process, log = slurm_task(repo, node, FLAGS="--gama 1")
    assert process.wait(timeout=60) == 2 and log.read_text().count("scontrol") == 1
    process, log = slurm_task(repo, node)
    assert process.wait(timeout=60) == 0 and list(runs_in(repo.runs)) == [("DI", "DR", 1)]
    process, log = slurm_task(repo, node)
    assert process.wait(timeout=60) == 0 and log.read_text().count("begins at") == 3


@pytest.mark.parametrize("unreadable", ["list.txt", "DI__DR__1.log"])
def test_a_slurm_task_that_the_file_server_lets_down_is_requeued(unreadable, repo, node):
    (repo.runs / "logs" / unreadable).mkdir(parents=True)
    process, _ = slurm_task(repo, node)
    assert process.wait(timeout=60) == -signal.SIGKILL  # by our scontrol


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 0)])
def test_a_slurm_task_near_its_time_limit(number, requeued, repo, node):
    with repo.hold():
        process, log = slurm_task(repo, node)
        wait_for(lambda: 4 in lines_of(repo.runs).values())
        os.kill(process.pid, number)
        assert process.wait(timeout=60) == (-signal.SIGKILL if requeued else 143)
    assert log.read_text().count("scontrol") == requeued and log.read_text().count("go on with") == 1
    assert len(list(repo.runs.glob("*/checkpoint.pt"))) == 1


def test_a_requeued_task_waits_for_a_lock_that_a_crash_has_left(repo, node):
    log = repo.runs / "logs" / "DI__DR__1.log"
    log.parent.mkdir(parents=True)
    with open(log, "a") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        process, _ = slurm_task(repo, node)
        assert process.wait(timeout=60) == grid.ELSEWHERE and "scontrol" not in log.read_text()
        process, _ = slurm_task(repo, node, restarts=1)
        time.sleep(1.5)
        assert process.poll() is None
    assert process.wait(timeout=60) == 0 and len(runs_in(repo.runs)) == 1


@pytest.mark.parametrize("kind", ["nfs", "none"])
def test_a_requeued_task_on_a_shared_file_system(kind, repo, node, shim):
    more = {"LD_PRELOAD": shim, "FAKE_LOCKS": kind}
    with repo.hold():
        process, _ = slurm_task(repo, node, **more)
        wait_for(lambda: 4 in lines_of(repo.runs).values())
        os.killpg(process.pid, signal.SIGKILL)  # the node is gone
        process.wait()
    process, _ = slurm_task(repo, node, restarts=1, **more)
    assert process.wait(timeout=60) == 0
    assert len(runs_in(repo.runs)) == len(list(repo.runs.glob("DI__*"))) == 1


@pytest.fixture
def slurm(tmp_path):
    """A real Slurm of one node with two CPUs. Skips, with Slurm's reason, where it cannot start."""
    directory, script = tmp_path / "slurm", str(ROOT / "tests" / "slurm.sh")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"SLURM_PORT": port}
    directory.mkdir()
    with open(directory / "start.log", "w+") as log:  # the daemons keep it open
        code = subprocess.run(
            ["bash", script, str(directory), "2"], env=env, stdout=log, stderr=log, check=False
        ).returncode
    if code:
        subprocess.run(["bash", script, str(directory), "stop"], check=False, capture_output=True)
        pytest.skip((directory / "start.log").read_text().strip())
    yield {"SLURM_CONF": str(directory / "slurm.conf")}
    subprocess.run(["bash", script, str(directory), "stop"], check=False)


@pytest.mark.slow
def test_a_real_slurm_array_survives_a_requeue_a_time_limit_and_a_kill(repo, slurm):
    settings = {"RUNNER": "slurm", "TIME": "10", "ENVS": "DI ODE", "SEEDS": "1 2", "RUN_DIR": "my runs"} | slurm
    settings["FLAGS"] = "--seconds 0.2"
    runs = repo.cwd / "my runs"

    def submit(**more):
        submitted = repo(**settings | more)
        assert submitted.returncode == 0, submitted.stderr
        return submitted.stdout.split()[-1]

    def tool(*command, check=True):
        env = os.environ | slurm
        return subprocess.run(command, env=env, capture_output=True, text=True, check=check).stdout

    def begun(name):
        return any(run.startswith(name) and lines > 1 for run, lines in lines_of(runs).items())

    def over():
        for task in range(4):  # Slurm would wait two minutes before it starts a requeued job again
            tool("scontrol", "update", f"JobId={job}_{task}", "StartTime=now", check=False)
        time.sleep(1)
        return not tool("squeue", "--noheader")

    def log_of(name):
        return (runs / "logs" / f"{name}.log").read_text()

    job = submit()
    wait_for(lambda: begun("DI__DR__1"))
    tool("scontrol", "requeue", f"{job}_0")  # what an administrator or a pre-emption does
    wait_for(lambda: begun("DI__DR__2"))
    pids = tool("pgrep", "-f", "dr_sac.py --env-id DI --seed 2 ").split()
    (pid,) = [int(pid) for pid in pids if os.readlink(f"/proc/{pid}/cwd") == str(repo.cwd)]  # and nobody else's
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: begun("ODE__DR__1"))
    # What Slurm sends two minutes before the time limit. (scancel goes on trying after it has been delivered.)
    command = ["scancel", "--batch", "--signal=USR1", f"{job}_2"]
    warning = subprocess.Popen(command, env=os.environ | slurm, stderr=subprocess.DEVNULL)
    wait_for(lambda: "requeued" in log_of("ODE__DR__1"))
    warning.kill()
    warning.wait()
    wait_for(over)

    assert len(runs_in(runs)) == len(list(runs.glob("*__*"))) == 4  # all went on in their own directories
    assert log_of("DI__DR__1").count("begins at") == 2 and "requeued" not in log_of("DI__DR__1")
    assert "exit code 137: requeued" in log_of("DI__DR__2")
    assert "exit code 143: requeued" in log_of("ODE__DR__1") and log_of("ODE__DR__1").count("begins at 0") == 1
    assert log_of("ODE__DR__2").count("begins at") == 1
    assert "nothing to do" in repo(**settings).stdout

    job = submit(ENVS="DI", SEEDS="3", FLAGS="--broken 3")
    wait_for(over)
    assert log_of("DI__DR__3").count("requeued") == 3  # but no more than that


# -------------------------------------------------------- Our scripts ------------------------------------------------


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_methods_flags_make_that_method(method):
    env = {"ENVS": "DI", "METHODS": method.name, "SEEDS": "1 2", "STEPS": "20000"}
    jobs = plan.jobs(env)  # which refuses another name
    assert [job["seed"] for job in jobs] == [job["args"]["seed"] for job in jobs] == [1, 2]
    assert {job["args"]["total_timesteps"] for job in jobs} == {20_000}
    json.dumps(jobs)


def test_a_flag_that_a_task_does_not_take_is_refused_before_the_start(capsys):
    env = {"ENVS": "DI ODE", "METHODS": "DR", "SEEDS": "1", "FLAGS": "--learning-starts 100"}
    with pytest.raises(SystemExit) as stop:
        plan.jobs(env)
    assert stop.value.code == 2 and "ODE" in capsys.readouterr().err
    assert len(plan.jobs(env | {"ENVS": "DI"})) == 1


def test_the_default_is_the_whole_benchmark():
    jobs = plan.jobs({"SEEDS": "1"})
    tasks = list(dict.fromkeys(job["task"] for job in jobs))
    assert {"DI", "DI-Friction", "DI-Perm", "ODE", "Cartpole", "Cheetah", "Reacher-E"} < set(tasks)
    assert "ODE-1" not in tasks
    methods = [method.name for method in METHODS.values() if not method.extra]
    assert [job["method"] for job in jobs] == methods * len(tasks)


def test_what_is_not_counted_is_what_may_change():
    aib_run = pytest.importorskip("aib_run")
    free = aib_run.FREE - {"total_timesteps", "eval_rollouts"}
    hyperzero = plan.import_script("relatives/hyperzero.py")
    assert (free | hyperzero.Args.free) - {"total_timesteps", "eval_rollouts"} | {"run_dir"} == plan.NOT_COUNTED
    assert set(hyperzero.STAGE_1) == plan.OF_DATASET


def ours(cwd, **settings):
    """The finished process of our runs.sh with these settings."""
    env = os.environ | {"PYTHON": sys.executable, "FLAGS": SHORT, "STEPS": "300", "JOBS": "2", "LC_ALL": "C.UTF-8"}
    options = {"cwd": cwd, "env": env | settings, "capture_output": True, "text": True, "timeout": 900}
    return subprocess.run(["bash", str(ROOT / "runs.sh")], **options, check=False)


@pytest.mark.slow
def test_our_grid_on_this_machine(tmp_path):
    settings = {"ENVS": "DI", "METHODS": "DR Concat", "SEEDS": "1 2"}
    # Concat with seed 2 cannot go on: its checkpoint is damaged
    broken = ours(tmp_path, ENVS="DI", METHODS="Concat", SEEDS="2", STEPS="100", FLAGS=SHORT + " --keep-checkpoint")
    assert broken.returncode == 0, broken.stderr
    (run,) = (tmp_path / "runs").glob("*__*")
    (run / "results.json").unlink()
    (run / "checkpoint.pt").write_bytes(b"nothing")
    config = json.loads((run / "config.json").read_text())
    config["args"]["total_timesteps"] = 300
    (run / "config.json").write_text(json.dumps(config))

    first = ours(tmp_path, **settings)
    assert [s[0] for s in statuses(first)] == [
        "new",
        "new",
        "new",
        "resume",
    ] and f"--resume runs/{run.name}" in first.stdout
    assert first.returncode == 1
    (failed,) = [line for line in first.stdout.splitlines() if line.startswith("FAILED")]
    assert f"runs/{run.name}/checkpoint.pt" in failed and "(runs/logs/DI__Concat__2.log)" in failed
    assert len(runs_in(tmp_path / "runs")) == 3
    shutil.rmtree(run)
    second = ours(tmp_path, **settings)
    assert second.returncode == 0 and [s[0] for s in statuses(second)] == ["done", "done", "done", "new"]
    assert "AER" in second.stdout and len(runs_in(tmp_path / "runs")) == 4


@pytest.mark.slow
def test_ctrl_c_stops_our_grid_with_checkpoints(tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "FLAGS": SHORT, "STEPS": "100000", "JOBS": "2"}
    env |= {"ENVS": "DI", "METHODS": "DR", "SEEDS": "1-3"}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    options = {"cwd": tmp_path, "env": env, "start_new_session": True, "preexec_fn": heard}
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(["bash", str(ROOT / "runs.sh")], stdout=out, stderr=out, **options)
    wait_for(lambda: len(lines_of(tmp_path / "runs")) == 2 and min(lines_of(tmp_path / "runs").values()) > 1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert len(list((tmp_path / "runs").glob("*/checkpoint.pt"))) == 2  # and seed 3 has not begun
    text = (tmp_path / "out").read_text()
    assert text.count("STOPPED") == 2 and text.count("--resume") >= 2 and text.count("not started") == 1


def test_a_list_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "tools" / "plan.py")]
        process = subprocess.run(command, env=os.environ | {"METHODS": "list"}, stdout=full, stderr=subprocess.PIPE)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
