"""runs.sh: what it plans, what it runs at a time, what it says of failures; on this machine and on a real Slurm."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import aib_tools
import hyperdynamics

ROOT = Path(__file__).parent.parent
SHORT = "--learning-starts 200 --eval-every 100 --eval-rollouts 1 --batch-size 32"


def grid(cwd, **settings):
    """The finished process of runs.sh with these settings."""
    env = os.environ | {"PYTHON": sys.executable, "FLAGS": SHORT, "STEPS": "300", "JOBS": "2", "LC_ALL": "C.UTF-8"}
    env |= settings
    command = [str(ROOT / "runs.sh")]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900, check=False)


def outcome(run):
    """What a run has learned, without what depends on time and place."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run / "results.json").read_text())
    return [{k: v for k, v in m.items() if k != "seconds"} for m in metrics], results["returns"]


def runs_in(directory):
    """{(task, method, seed): directory of the run that has finished}."""
    found = {}
    for path in directory.glob("*/results.json"):
        config = json.loads((path.parent / "config.json").read_text())
        found[config["args"]["env_id"], config["method"], config["args"]["seed"]] = path.parent
    return found


def statuses_lines(process):
    return [line for line in process.stdout.splitlines() if " seed " in line and " h " in line]


def statuses(process):
    """[(status, task, method, seed)] of a plan."""
    words = [line.split() for line in statuses_lines(process)]
    return [(word[0], word[3], word[4], int(word[6])) for word in words]


def test_the_default_is_the_papers_grid(tmp_path):
    process = grid(tmp_path, DRY="1", STEPS="", FLAGS="")
    assert process.returncode == 0, process.stderr
    assert len(statuses(process)) == 13 * 7 * 10 and {s[0] for s in statuses(process)} == {"new"}
    assert "910 new, 0 to resume, 0 done" in process.stdout and not list(tmp_path.iterdir())
    line = next(line for line in process.stdout.splitlines() if " DMA-Pearl " in line and "Walker " in line)
    assert "dma_sac.py --env-id Walker --seed 1 --kl-beta 0.4" in line


def test_jobs_are_the_cores_whatever_threads_a_user_has_set(tmp_path):  # nproc obeys OMP_NUM_THREADS
    env = {k: v for k, v in os.environ.items() if k != "JOBS"} | {"OMP_NUM_THREADS": "77", "RUNNER": "cloud"}
    process = subprocess.run(["bash", "-x", ROOT / "runs.sh"], env=env, cwd=tmp_path, capture_output=True, text=True)
    cores = subprocess.check_output(["env", "-u", "OMP_NUM_THREADS", "nproc"], text=True)
    assert f"+ JOBS={cores.strip()}" in process.stderr.splitlines()


@pytest.mark.parametrize(("jobs", "array"), [("", "0-3"), ("2", "0-3%2")])
def test_slurm_gets_one_array_and_how_many_may_run_at_once(tmp_path, jobs, array):
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    settings = {"ENVS": "DI", "METHODS": "DR Concat", "SEEDS": "1 2", "RUNNER": "slurm", "SBATCH": "--mem=4G"}
    process = grid(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", JOBS=jobs, **settings)
    told = process.stdout.splitlines()
    assert f"--array={array}" in told and "--mem=4G" in told and told[-2] == "array", process.stderr
    assert len(Path(tmp_path, told[-1]).read_text().splitlines()) == 4


def test_every_methods_flags_make_that_method():
    text = (ROOT / "runs.sh").read_text()
    methods = re.findall(r"^ *([A-Z][A-Za-z0-9-]*)\) echo \w+\.py", text, re.MULTILINE)
    assert len(methods) >= 25
    for method in methods:
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{method}) echo "))
        script, *flags = line.split(" echo ")[1].removesuffix(";;").split()
        code = "import sys, importlib, aib_tools; m = importlib.import_module(sys.argv[1].removesuffix('.py')); "
        code += "sys.argv = sys.argv[1:]; print(m.method_name(aib_tools.parse_args(m.Args, '')))"
        command = [sys.executable, "-c", code, script, *flags]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert out.stdout.strip() == method, out.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"METHODS": "DR SAC"}, "unknown method SAC; allowed: DR Concat"),
        ({"ENVS": "Cheeta"}, "unknown task 'Cheeta' (did you mean Cheetah?)"),
        ({"STEPS": "many"}, "'many'"),
        ({"FLAGS": "--gama 1"}, "--gamma"),
        ({"RUNNER": "cloud"}, "RUNNER must be local or slurm; got cloud"),
        ({"JOBS": "0"}, "JOBS must be a number from 1 to 9999; got 0"),
        ({"JOBS": "9223372036854775808"}, "JOBS must be a number from 1 to 9999"),
        ({"ENVS": "\t"}, "ENVS, METHODS and SEEDS must not be empty"),
        ({"RUN_DIR": "my runs"}, "RUN_DIR must not have spaces or any of *?[, nor begin with -; got 'my runs'"),
        ({"RUN_DIR": "r[a]"}, "RUN_DIR must not have spaces"),
        ({"RUN_DIR": "-x"}, "RUN_DIR must not have spaces"),
        ({"FLAGS": "--help"}, "FLAGS cannot have --help"),
        ({"FLAGS": "--seed=5"}, "FLAGS cannot have --seed"),
        ({"FLAGS": "--cuda\n--run_dir x"}, "FLAGS cannot have --run-dir"),
        ({"FLAGS": "--context-aware"}, "DR of runs.sh is Concat to method_name in dr_sac.py with these flags"),
        ({"RUN_DIR": "/dev/null/runs"}, "/dev/null"),
    ],
)
def test_wrong_settings_get_one_line(settings, message, tmp_path):
    process = grid(tmp_path, **{"ENVS": "DI", "METHODS": "DR", "SEEDS": "1"} | settings)
    assert process.returncode == 2 and message in process.stderr and len(process.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("runs/*__*"))


def test_grid_on_this_machine(tmp_path):
    settings = {"ENVS": "DI", "METHODS": "DR Concat", "SEEDS": "1 2"}
    # Concat with seed 2 cannot go on: its checkpoint is damaged
    broken = grid(tmp_path, ENVS="DI", METHODS="Concat", SEEDS="2", STEPS="1", FLAGS=SHORT + " --keep-checkpoint")
    assert broken.returncode == 0, broken.stderr
    (run,) = (tmp_path / "runs").glob("*__*")
    (run / "results.json").unlink()
    (run / "checkpoint.pt").write_bytes(b"nothing")
    config = json.loads((run / "config.json").read_text())
    config["args"]["total_timesteps"] = 300
    (run / "config.json").write_text(json.dumps(config))

    planned = grid(tmp_path, DRY="1", **settings)
    assert [s[0] for s in statuses(planned)] == [
        "new",
        "new",
        "new",
        "resume",
    ] and f"--resume runs/{run.name}" in planned.stdout
    first = grid(tmp_path, **settings)
    assert first.returncode == 1
    failed = [line for line in first.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1 and f"cannot use runs/{run.name}/checkpoint.pt" in failed[0]
    assert "(runs/logs/DI__Concat__2.log)" in failed[0] and len(runs_in(tmp_path / "runs")) == 3

    shutil.rmtree(run)
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    second = grid(tmp_path, **settings)
    assert second.returncode == 0 and [s[0] for s in statuses(second)] == ["done", "done", "done", "new"]
    assert len({path.name for path in (tmp_path / "runs").iterdir()} - names) == 1
    assert "nothing to do" in grid(tmp_path, **settings).stdout
    for other in ({"STEPS": "301"}, {"FLAGS": SHORT + " --gamma 0.9"}, {"ENVS": "DI-Perm"}, {"SEEDS": "3"}):
        assert {s[0] for s in statuses(grid(tmp_path, DRY="1", **settings | other))} == {"new"}
    (line,) = statuses_lines(grid(tmp_path, DRY="1", **settings | {"SEEDS": "3", "METHODS": "DR", "STEPS": "100000"}))
    assert 0.01 < float(line.split()[1]) < 10  # hours, by the speed of the two runs that there are


def test_two_grids_at_once_share_the_work(tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "FLAGS": SHORT, "STEPS": "300", "JOBS": "1", "ENVS": "DI"}
    env |= {"METHODS": "DR", "SEEDS": "1 1 2"}
    command = [str(ROOT / "runs.sh")]
    both = [subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    texts = [process.communicate(timeout=900)[0] for process in both]
    assert len(runs_in(tmp_path / "runs")) == len(list((tmp_path / "runs").glob("*__*"))) == 2, texts


def test_damaged_files_do_not_lose_a_run_or_stop_the_grid(tmp_path):
    settings = {"ENVS": "DI", "METHODS": "DR", "SEEDS": "1"}
    assert grid(tmp_path, **settings, FLAGS=SHORT + " --keep-checkpoint").returncode == 0
    (run,) = (tmp_path / "runs").glob("*__*")
    for name, content in {"a": "{}", "b": "[]", "c": '{"script": "dr_sac.py"}', "d": "{"}.items():
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "config.json").write_text(content)
    (run / "results.json").write_text("{")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"global_step": 7')
    process = grid(tmp_path, DRY="1", **settings)
    assert process.returncode == 0 and [s[0] for s in statuses(process)] == ["resume"]
    assert process.stderr.count("is left aside") == 4 and "Traceback" not in process.stderr
    (run / "metrics.jsonl").unlink()
    process = grid(tmp_path, DRY="1", **settings)
    assert [s[0] for s in statuses(process)] == ["resume"] and "Traceback" not in process.stderr


def test_a_run_of_the_defaults_is_done_when_it_has_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    args = vars(hyperdynamics.Args(env_id="DI"))
    (tmp_path / "a").mkdir()
    config = {"script": "hyperdynamics.py", "method": "HyperDynamics", "args": args}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    planned = lambda: next(aib_tools.plan(str(tmp_path), ["DI HyperDynamics 1 hyperdynamics.py"])).split()[0]
    assert planned() == "resume"
    (tmp_path / "a" / "results.json").write_text(json.dumps({"args": args}))
    assert planned() == "done"


def test_ctrl_c_stops_the_grid_with_checkpoints(tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "FLAGS": SHORT, "STEPS": "100000", "JOBS": "2"}
    env |= {"ENVS": "DI", "METHODS": "DR", "SEEDS": "1 2 3"}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # the tests may have been started where it is ignored
    options = {"cwd": tmp_path, "env": env, "start_new_session": True, "preexec_fn": heard}
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen([str(ROOT / "runs.sh")], stdout=out, stderr=out, **options)
    wait_for(lambda: len(lines_of(tmp_path / "runs")) == 2 and min(lines_of(tmp_path / "runs").values()) > 1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert len(list((tmp_path / "runs").glob("*/checkpoint.pt"))) == 2  # and seed 3 has not begun
    text = (tmp_path / "out").read_text()
    assert text.count("STOPPED") == 3 and text.count("go on with: python") == 2 and text.count("not started") == 1


def lines_of(directory):
    return {path.parent.name: len(path.read_text().splitlines()) for path in directory.glob("*/metrics.jsonl")}


def wait_for(condition, seconds=900):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.1)


# --------------------------------------------------------- Slurm -----------------------------------------------------


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
        code = subprocess.run([script, str(directory), "2"], env=env, stdout=log, stderr=log, check=False).returncode
    if code:
        subprocess.run([script, str(directory), "stop"], check=False, capture_output=True)
        pytest.skip((directory / "start.log").read_text().strip())
    yield {"SLURM_CONF": str(directory / "slurm.conf")}
    subprocess.run([script, str(directory), "stop"], check=False)


def test_slurm_array_survives_a_requeue_a_time_limit_and_a_kill(tmp_path, slurm):
    settings = {"ENVS": "DI", "METHODS": "DR DMAstar-SH", "SEEDS": "1 2 3", "STEPS": "1200"}
    submitted = grid(tmp_path, RUNNER="slurm", TIME="10", **settings, **slurm)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split()[-1]
    runs, logs = tmp_path / "runs", tmp_path / "runs" / "logs"

    def tool(*command, check=True):
        env = os.environ | slurm
        return subprocess.run(command, env=env, capture_output=True, text=True, check=check).stdout

    def begun(name):
        return any(run.startswith(name) and lines > 1 for run, lines in lines_of(runs).items())

    def over():
        for task in (0, 1, 3):  # Slurm would wait two minutes before it starts a requeued job again
            tool("scontrol", "update", f"JobId={job}_{task}", "StartTime=now", check=False)
        time.sleep(1)
        return not tool("squeue", "--noheader")

    wait_for(lambda: begun("DI__DR__1"))
    tool("scontrol", "requeue", f"{job}_0")  # what an administrator or a pre-emption does
    wait_for(lambda: begun("DI__DR__2"))
    pids = tool("pgrep", "-f", "^[^ ]*python[^ ]* .*dr_sac.py --env-id DI --seed 2 ").split()
    (pid,) = [int(pid) for pid in pids if os.readlink(f"/proc/{pid}/cwd") == str(tmp_path)]  # and nobody else's
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: begun("DI__DMAstar-SH__1"))
    # What Slurm sends two minutes before the time limit. (scancel goes on trying after it has been delivered.)
    warning = subprocess.Popen(
        ["scancel", "--batch", "--signal=USR1", f"{job}_3"], env=os.environ | slurm, stderr=subprocess.DEVNULL
    )
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    assert grid(undisturbed, **settings).returncode == 0
    wait_for(over)
    warning.kill()
    warning.wait()

    text = {path.stem: path.read_text() for path in logs.glob("*.log")}
    assert len(text) == 6 and all(log.count("results: ") == 1 for log in text.values())
    assert "go on with: python" in text["DI__DR__1"] and "requeued" not in text["DI__DR__1"]
    assert "exit code 137: requeued" in text["DI__DR__2"] and "exit code 143: requeued" in text["DI__DMAstar-SH__1"]
    ours, theirs = runs_in(runs), runs_in(undisturbed / "runs")
    assert ours.keys() == theirs.keys() and len(ours) == 6
    assert all(outcome(ours[key]) == outcome(theirs[key]) for key in ours)
    assert len(list(runs.glob("*__*"))) == 6  # all went on in their own directories

    run = ours["DI", "DR", 1]  # a damaged checkpoint is nothing that a requeue could mend
    (run / "results.json").unlink()
    (run / "checkpoint.pt").write_bytes(b"nothing")
    assert grid(tmp_path, RUNNER="slurm", TIME="10", **settings, **slurm).returncode == 0
    wait_for(lambda: not tool("squeue", "--noheader"))
    log = (logs / "DI__DR__1.log").read_text()
    assert log.count("cannot use runs") == 1 and "requeued" not in log
