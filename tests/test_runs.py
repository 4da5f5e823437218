"""A run's life: killed, stopped, resumed, extended, evaluated again, tracked, broken."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import aib_render
import imageio
import numpy as np
import pytest
import torch

import aib_envs
import aib_tools

ROOT = Path(__file__).parent.parent
SCRIPTS = ["dr_sac.py", "da_sac.py", "dma_sac.py", "dmah_sac.py", "dmash_sac.py"]
SHORT = ["--env-id", "DI", "--total-timesteps", "400", "--learning-starts", "200", "--eval-every", "100"]
SHORT += ["--eval-rollouts", "2", "--batch-size", "32"]


def start(script, *flags, cwd, **env):
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env = ours | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(script, *flags, cwd, code=0, **env):
    """What the script prints to stdout and stderr; it must end with `code`."""
    process = start(script, *flags, cwd=cwd, **env)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code and "Traceback" not in err, err
    return out, err.splitlines()[-1] if code else err


def only_run(cwd):
    (directory,) = (cwd / "runs").iterdir()
    return directory


def outcome(directory):
    """What a run has learned, without what depends on time."""
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((directory / "results.json").read_text())
    return [{k: v for k, v in m.items() if k != "seconds"} for m in metrics], results["returns"]


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def kill_when(condition, process):
    wait_for(condition, process)
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Directories of finished runs by script, with their checkpoints. Not to be changed."""
    made = {}
    for script in SCRIPTS:
        cwd = tmp_path_factory.mktemp(script)
        run(script, *SHORT, "--keep-checkpoint", cwd=cwd)
        made[script] = only_run(cwd)
    return made


@pytest.fixture
def copy_of(finished, tmp_path):
    """A function that gives a copy of a script's finished run."""
    return lambda script: Path(shutil.copytree(finished[script], tmp_path / finished[script].name))


@pytest.mark.parametrize("script", SCRIPTS)
def test_config_says_what_has_run_where(script, finished):
    config = json.loads((finished[script] / "config.json").read_text())
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert config["script"] == script and config["commit"] == git.stdout.strip()
    assert config["threads"] == 1 and bool(config["gpu"]) == torch.cuda.is_available()  # `start` sets the threads
    assert config["processor"] == torch.backends.cpu.get_cpu_capability()
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert aib_tools.provenance()["commit"] == ""


# -------------------------------------------------------- resume ----------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_it_is_the_same_run(script, finished, tmp_path):
    process = start(script, *SHORT, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    directory = only_run(tmp_path)
    # then in the middle of an episode, or while the second checkpoint is being written
    lines = lambda: len((directory / "metrics.jsonl").read_text().splitlines())
    kill_when((lambda: lines() > 2) if script == "dr_sac.py" else (directory / "checkpoint.tmp").exists, process)
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"global_step": 3')  # as if it had been killed in the middle of a line
    run(script, "--resume", directory, cwd=tmp_path)
    assert outcome(directory) == outcome(finished[script])
    assert sorted(path.name for path in directory.iterdir()) == [
        "agent.pt",
        "config.json",
        "metrics.jsonl",
        "results.json",
    ]


def test_killed_before_its_first_checkpoint_it_begins_anew(finished, tmp_path):
    process = start("dr_sac.py", *SHORT, cwd=tmp_path)
    kill_when(lambda: any(path.read_text() for path in tmp_path.glob("runs/*/metrics.jsonl")), process)
    run("dr_sac.py", "--resume", only_run(tmp_path), cwd=tmp_path)
    assert outcome(only_run(tmp_path)) == outcome(finished["dr_sac.py"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_with_a_checkpoint(number, finished, tmp_path):
    process = start("dmash_sac.py", *SHORT, cwd=tmp_path)
    wait_for(lambda: any(path.read_text() for path in tmp_path.glob("runs/*/metrics.jsonl")), process)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number and "Traceback" not in err
    last = err.splitlines()[-1]
    assert re.fullmatch(r"dmash_sac.py: at step [123]00; go on with: python \S+dmash_sac.py --resume \S+", last.strip())
    run("dmash_sac.py", *last.split()[-2:], cwd=tmp_path)
    assert outcome(only_run(tmp_path)) == outcome(finished["dmash_sac.py"])


def test_a_second_ctrl_c_ends_it_at_once(tmp_path):
    process = start("dmash_sac.py", "--env-id", "Cheetah", "--learning-starts", 1000, cwd=tmp_path)
    while "update/s" not in process.stderr.readline():  # the bar, before which signals have got their handlers
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    while "stopping" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and err.splitlines()[-1] == "dmash_sac.py: stopped at once", err


def test_a_full_gpu_gets_one_line(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.optim, "Adam", full)
    monkeypatch.setattr(sys, "argv", ["dr_sac.py", "--env-id", "DI", "--run-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "dr_sac.py"), run_name="__main__")
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("dr_sac.py: CUDA out of memory")


@pytest.mark.parametrize(
    ("statement", "code", "line"),
    [
        ("torch.empty(10**15)", 2, r"dr_sac.py: can't allocate memory: you tried to allocate 4000000000000000 bytes.*"),
        ("raise RuntimeError('else')", 1, "RuntimeError: else"),
    ],
)
def test_full_memory_gets_one_line_and_other_errors_a_traceback(statement, code, line):
    program = f"import aib_tools, dr_sac, torch; aib_tools.parse_args(dr_sac.Args, ''); {statement}"
    setup = "import sys; sys.argv = ['dr_sac.py']; sys.path.insert(0, '.'); "
    process = subprocess.run(
        [sys.executable, "-c", setup + program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == code and re.fullmatch(line, process.stderr.splitlines()[-1])
    assert (len(process.stderr.splitlines()) == 1) == (code == 2)


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    class Interrupted(io.FileIO):
        def write(self, data):
            if len(data) > 1000:  # a tensor
                raise KeyboardInterrupt
            return super().write(data)

    monkeypatch.setattr(aib_tools, "open", Interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        aib_tools.write(tmp_path / "checkpoint.pt", {"weights": torch.ones(100_000)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["dr_sac.py", "dmash_sac.py"])
def test_more_steps_extend_a_finished_run(script, copy_of, tmp_path):
    longer = copy_of(script)
    old = outcome(longer)
    run(script, "--resume", longer, "--total-timesteps", 600, cwd=tmp_path)
    run(script, *SHORT, "--total-timesteps", 600, cwd=tmp_path)
    assert outcome(longer) == outcome(only_run(tmp_path)) != old
    assert json.loads((longer / "config.json").read_text())["args"]["total_timesteps"] == 600
    assert (longer / "checkpoint.pt").exists() and not (only_run(tmp_path) / "checkpoint.pt").exists()


def test_a_run_in_use_is_left_alone(copy_of):
    directory = copy_of("dr_sac.py")
    before = {path: path.read_bytes() for path in directory.iterdir()}
    with aib_tools.lock(directory / "metrics.jsonl", new=False):
        _, err = run("dr_sac.py", "--resume", directory, "--total-timesteps", 600, cwd=directory.parent, code=2)
    assert err == f"dr_sac.py: {directory} is in use by another process"
    assert before == {path: path.read_bytes() for path in directory.iterdir()}


def test_checkpoints_hold_tensors_and_plain_values_only(finished):
    for directory in finished.values():
        state = torch.load(directory / "checkpoint.pt", weights_only=True)
        assert (
            state["progress"][0] == 400
            and torch.load(directory / "agent.pt", weights_only=True).keys() == state["agent"].keys()
        )


# -------------------------------------------- evaluation of a trained agent, videos ---------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_eval_only_repeats_the_last_evaluation(script, tmp_path):
    run(script, *SHORT, "--env-id", "ODE", "--total-timesteps", 10, cwd=tmp_path)  # where any action earns something
    directory = only_run(tmp_path)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    out, _ = run(script, "--eval-only", directory, cwd=directory.parent)
    aer = {split: np.mean(r) for split, r in outcome(directory)[1].items()}
    assert out.strip() == "AER " + ", ".join(f"{split} {value:.1f}" for split, value in aer.items())
    assert before == {path: path.read_bytes() for path in directory.iterdir()}


def test_eval_only_in_one_context(copy_of):
    directory = copy_of("dmash_sac.py")
    flags = ("--eval-only", directory, "--eval-rollouts", 3, "--context", "mass=1.3", "inversion=-1", "--capture-video")
    out, _ = run("dmash_sac.py", *flags, cwd=directory.parent)
    assert re.fullmatch(r"\{'mass': 1.3, 'inversion': -1\}: return [\d.]+, from [\d.]+ to [\d.]+\n", out)
    frames = imageio.mimread(directory / "video.gif", memtest=False)
    assert 10 < len(frames) <= 100 and frames[0].shape[:2] == (240, 320)


def test_a_run_can_end_with_a_video(tmp_path):
    run("dr_sac.py", *SHORT, "--total-timesteps", 1, "--context-aware", "--capture-video", cwd=tmp_path)
    frames = imageio.mimread(only_run(tmp_path) / "video.gif", memtest=False)
    assert 10 < len(frames) <= 100 and frames[0].shape[:2] == (240, 640)  # both modes, side by side


@pytest.mark.parametrize("env_id", ["DI", "ODE", "ODE-3"])
def test_pictures_show_the_state(env_id):
    env = aib_envs.gym.make(f"AIB/{env_id}-v0", render_mode="rgb_array").unwrapped
    env.reset(seed=0)
    env.state[:2] = (0.5, -0.5)[: len(env.state)]
    picture = env.render()
    assert picture.shape == (240, 320, 3) and picture.dtype == np.uint8
    y, x = np.argwhere(picture[..., 0] == 0).mean(0)
    assert abs(x - (159.5 + (0.5 if env_id == "DI" else 0.25) * 239 / 2.2)) < 1
    assert abs(y - (119.5 + (0.5 if env_id == "DI" else 0) * 239 / 2.2)) < 1
    assert aib_envs.gym.make(f"AIB/{env_id}-v0").unwrapped.render() is None


def test_mujocos_pictures():
    code = """
import numpy as np, aib_render, aib_envs
tasks = [id for id in aib_envs.TASKS if not id.startswith(("DI", "ODE"))]
try:
    aib_render.check("Cheetah")
except OSError as error:
    raise SystemExit(f"skip: {error}")
for id in tasks:
    envs = aib_envs.make_vec(id, aib_render.modes(id), render_mode="rgb_array")
    envs.reset(seed=0)
    first = envs.render()
    for _ in range(20):
        envs.step(np.ones(envs.action_space.shape, np.float32))
    assert all(a.shape == (240, 320, 3) and a.std() > 5 and (a != b).any() for a, b in zip(first, envs.render()))
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    last = process.stderr.splitlines()[-1:]  # libEGL may have its own say before
    if last and last[0].startswith("skip"):
        pytest.skip(last[0])
    assert process.returncode == 0, process.stderr


def test_without_opengl_there_is_one_line(tmp_path):
    flags = (*SHORT, "--env-id", "Cheetah", "--learning-starts", 1000, "--capture-video")
    nowhere = {"MUJOCO_GL": "glfw", "DISPLAY": "", "WAYLAND_DISPLAY": "", "XDG_SESSION_TYPE": ""}
    _, err = start("dr_sac.py", *flags, cwd=tmp_path, **nowhere).communicate(timeout=300)
    assert len(err.splitlines()) == 1
    assert err.startswith("dr_sac.py: MuJoCo cannot draw here") and "set MUJOCO_GL to egl or osmesa" in err
    assert not list(tmp_path.iterdir())


def test_modes():
    assert aib_render.modes("DI-Perm") == [{"permutation": 0}, {"permutation": 1}]
    assert aib_render.modes("Walker") == [{}]


# ------------------------------------------------------- bad input --------------------------------------------------


def damage(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_args(path, **changes):
    edit(path, args=json.loads(path.read_text())["args"] | changes)


def change_origin(path, **changes):
    state = torch.load(path, weights_only=True)
    state["origin"] |= changes
    torch.save(state, path)


@pytest.mark.parametrize(
    ("prepare", "flags", "message"),
    [
        (None, "--resume nowhere", "cannot use nowhere/config.json: FileNotFoundError"),
        (lambda d: (d / "config.json").unlink(), "--resume {d}", "config.json: FileNotFoundError"),
        (lambda d: damage(d / "config.json"), "--resume {d}", "config.json: JSONDecodeError"),
        (
            lambda d: edit(d / "config.json", script="dr_sac.py"),
            "--resume {d}",
            "ValueError: this is a run of dr_sac.py",
        ),
        (lambda d: edit(d / "config.json", args=3), "--resume {d}", "config.json: TypeError"),
        (None, "--resume {d}", "{d} has finished"),
        (None, "--resume {d} --total-timesteps 399", "{d} has finished"),
        (
            lambda d: (d / "checkpoint.pt").unlink(),
            "--resume {d} --total-timesteps 600",
            "only one with --keep-checkpoint",
        ),
        (
            lambda d: damage(d / "checkpoint.pt"),
            "--resume {d} --total-timesteps 600",
            "checkpoint.pt: ValueError: it is damaged",
        ),
        (
            lambda d: flip(d / "checkpoint.pt"),
            "--resume {d} --total-timesteps 600",
            "checkpoint.pt: ValueError: it is damaged",
        ),
        (lambda d: flip(d / "agent.pt"), "--eval-only {d}", "agent.pt: ValueError: it is damaged"),
        (
            lambda d: (d / "checkpoint.pt").write_text("hi"),
            "--resume {d} --total-timesteps 600",
            "it is damaged, or no file",
        ),
        (
            lambda d: torch.save({"format": 2}, d / "checkpoint.pt"),
            "--resume {d} --total-timesteps 600",
            "checkpoint.pt: KeyError: 'origin'",
        ),
        (
            lambda d: change_origin(d / "checkpoint.pt", env_id="Cheetah"),
            "--resume {d} --total-timesteps 600",
            "checkpoint.pt: ValueError: it was made with env_id Cheetah, which should be DI",
        ),
        (
            lambda d: change_origin(d / "checkpoint.pt", script="dr_sac.py"),
            "--resume {d} --total-timesteps 600",
            "it was made with script dr_sac.py, which should be dmash_sac.py",
        ),
        (
            lambda d: change_origin(d / "checkpoint.pt", format=0),
            "--resume {d} --total-timesteps 600",
            "it was made with format 0, which should be 2",
        ),
        (
            lambda d: edit_args(d / "config.json", buffer_size=50_000),
            "--resume {d} --total-timesteps 600",
            "it was made with buffer_size 100000, which should be 50000",
        ),
        (
            lambda d: edit_args(d / "config.json", batch_size="32"),
            "--resume {d}",
            "config.json: ValueError: batch_size cannot be '32'",
        ),
        (
            lambda d: edit_args(d / "config.json", total_timesteps="abc"),
            "--resume {d}",
            "config.json: ValueError: total_timesteps cannot be 'abc'",
        ),
        (
            lambda d: edit_args(d / "results.json", total_timesteps="z"),
            "--resume {d} --total-timesteps 600",
            "results.json: ValueError",
        ),
        (lambda d: damage(d / "results.json"), "--resume {d} --total-timesteps 600", "results.json: JSONDecodeError"),
        (
            lambda d: [(d / name).unlink() for name in ("results.json", "checkpoint.pt")],
            "--resume {d}",
            "{d} has lost its checkpoint.pt",
        ),
        (
            lambda d: (d / "results.json").unlink(),
            "--resume {d} --total-timesteps 399",
            "{d} is at step 400 already; --total-timesteps is 399",
        ),
        (lambda d: (d / "metrics.jsonl").unlink(), "--resume {d} --total-timesteps 600", "No such file or directory"),
        (
            lambda d: torch.save(Path(), d / "checkpoint.pt"),
            "--resume {d} --total-timesteps 600",
            "checkpoint.pt: UnpicklingError: Weights only load failed",
        ),
        (
            lambda d: (d / "metrics.jsonl").write_text(""),
            "--resume {d} --total-timesteps 600",
            "metrics.jsonl has lost lines since the checkpoint was written",
        ),
        (None, "--resume {d} --gamma 0.9", "{d} has --gamma 0.99; what can change is --capture-video, "),
        (None, "--resume {d} --env-id Cheetah", "{d} has --env-id DI"),
        (None, "--resume {d} --eval-only {d}", "--eval-only, which goes neither with --resume nor with --track"),
        (None, "--resume=", "--resume and --eval-only take the directory of a run; got nothing"),
        (None, "--eval-only=", "--resume and --eval-only take the directory of a run; got nothing"),
        (None, "--context mass=1", "--context needs --eval-only"),
        (None, "--eval-only {d} --track", "--eval-only, which goes neither with --resume nor with --track"),
        (None, "--eval-only {d} --context weight=1", "unknown context key for DI 'weight'; allowed: mass, inversion"),
        (None, "--eval-only {d} --context mass=nan", "context mass must be a finite number from 0.001 to 1000.0"),
        (None, "--eval-only {d} --context inversion=0", "context inversion must be -1 or 1; got 0.0"),
        (None, "--eval-only {d} --context mass", "--context takes key=value, each key once; got mass"),
        (
            None,
            "--eval-only {d} --context mass=1 mass=2",
            "--context takes key=value, each key once; got mass=1 mass=2",
        ),
        (lambda d: (d / "agent.pt").unlink(), "--eval-only {d}", "agent.pt: FileNotFoundError"),
        (lambda d: damage(d / "agent.pt"), "--eval-only {d}", "cannot use {d}/agent.pt"),
        (lambda d: torch.save({}, d / "agent.pt"), "--eval-only {d}", "agent.pt: RuntimeError: Error(s) in loading"),
        (None, "--buffer-size 4000000000", "--buffer-size 4000000000 takes "),
    ],
)
def test_bad_input_gets_one_clear_line_and_nothing_is_overwritten(prepare, flags, message, copy_of, tmp_path):
    directory = copy_of("dmash_sac.py")
    if prepare:
        prepare(directory)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    flags = flags.replace("{d}", str(directory)).split()
    process = start("dmash_sac.py", *flags, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and message.replace("{d}", str(directory)) in err, err
    assert err.startswith("dmash_sac.py: ") and len(err.splitlines()) == 1 and not out
    assert before == {path: path.read_bytes() for path in directory.iterdir()}
    assert not (tmp_path / "runs").exists()


def test_a_run_of_another_script_is_refused(finished, tmp_path):
    _, err = run("dma_sac.py", "--resume", finished["dmash_sac.py"], cwd=tmp_path, code=2)
    assert "this is a run of dmash_sac.py" in err


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    _, err = run("dr_sac.py", *SHORT, "--run-dir", tmp_path / "locked" / "runs", cwd=tmp_path, code=2)
    assert "Permission denied" in err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 80 MiB: room for one checkpoint of DR on DI (60 MB), and not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", disk]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_ends_the_run_with_one_line_and_nothing_is_lost(small_disk, finished):
    _, err = run("dr_sac.py", *SHORT, cwd=small_disk, code=2)
    directory = only_run(small_disk)
    assert err == f"dr_sac.py: cannot write runs/{directory.name}/checkpoint.pt: is the disk full?"
    assert sorted(path.name for path in directory.iterdir()) == ["checkpoint.pt", "config.json", "metrics.jsonl"]
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    run("dr_sac.py", "--resume", directory, cwd=small_disk)
    assert outcome(directory) == outcome(finished["dr_sac.py"])


def test_write_leaves_the_old_file_when_it_fails(small_disk):
    path = small_disk / "checkpoint.pt"
    aib_tools.write(path, {"x": torch.ones(5_000_000)})  # 20 MB
    before = path.read_bytes()
    with pytest.raises(OSError, match="is the disk full"):
        aib_tools.write(path, {"x": torch.ones(20_000_000)})
    assert path.read_bytes() == before and [p.name for p in small_disk.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_not_finite_stops_the_run(script, copy_of, tmp_path):
    path = copy_of(script) / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["agent"]["qf2.head.bias"][:] = 1e30  # its square is not finite
    torch.save(state, path)
    before = path.read_bytes()
    _, err = run(script, "--resume", path.parent, "--total-timesteps", 600, cwd=tmp_path, code=3)
    assert err == f"{script}: step 400: the loss qf is not finite. The last checkpoint is from before that"
    assert path.read_bytes() == before

    state["agent"]["qf2.head.bias"][:] = 0
    state["agent"]["actor.trunk.0.weight"][3, 1] = float("nan")
    torch.save(state, path)
    _, err = run(script, "--resume", path.parent, "--total-timesteps", 600, cwd=tmp_path, code=3)
    assert err.startswith(f"{script}: step 400: the weight actor.trunk.0.weight is not finite")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite(value, capsys):
    aib_tools.check_finite("loss", {"a": torch.ones(3)}, 7)
    with pytest.raises(SystemExit) as stop:
        aib_tools.check_finite("loss", {"a": torch.ones(3), "qf": torch.tensor([1.0, value])}, 7)
    assert stop.value.code == 3 and "step 7: the loss qf is not finite" in capsys.readouterr().err


# -------------------------------------------------------- tracking --------------------------------------------------

TINY = [*SHORT, "--total-timesteps", "2", "--eval-rollouts", "1", "--track"]


def test_tracking_offline(tmp_path):
    run("dr_sac.py", *TINY, "--capture-video", cwd=tmp_path, WANDB_MODE="offline")
    (log,) = only_run(tmp_path).glob("wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"aer" in content and b"eval-out" in content and b"video" in content and b"learning_starts" in content


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"WANDB_API_KEY": "", "HOME": "{tmp}", "NETRC": "{tmp}/no"}, "No API key configured"),
        ({"WANDB_API_KEY": 40 * "a", "WANDB_BASE_URL": "http://127.0.0.1:9"}, ""),  # wandb's wording depends on time
    ],
)
def test_tracking_that_fails_does_not_touch_the_run(env, reason, tmp_path):
    env = {name: value.replace("{tmp}", str(tmp_path)) for name, value in env.items()}
    _, err = run("dr_sac.py", *TINY, cwd=tmp_path, WANDB_MODE="online", **env)
    assert (only_run(tmp_path) / "results.json").exists()
    assert re.search(f"Weights & Biases gets nothing more of .*, which goes on: .*{reason}", err)


def test_tracking_into_a_full_directory_does_not_touch_the_run(small_disk, tmp_path):
    with pytest.raises(OSError), open(small_disk / "full", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1_000_000))
    run("dr_sac.py", *TINY, cwd=tmp_path, WANDB_MODE="offline", WANDB_DIR=str(small_disk))
    assert (only_run(tmp_path) / "results.json").exists()
