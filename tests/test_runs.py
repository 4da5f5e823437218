"""A run's life: changed scripts, killed, stopped, resumed, extended, looked at, tracked, broken."""

import contextlib
import dataclasses
import datetime
import enum
import errno
import fcntl
import io
import json
import os
import pty
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

import aib_envs
import aib_run

ROOT = Path(__file__).parent.parent
SCRIPTS = ["dr_sac.py", "da_sac.py", "dma_sac.py", "dmah_sac.py", "dmash_sac.py", "rsac.py"]
SHORT = ["--env-id", "DI", "--total-timesteps", "200", "--learning-starts", "100", "--eval-every", "100"]
SHORT += ["--eval-rollouts", "1", "--batch-size", "32", "--buffer-size", "2000"]


class Process:
    """A script in a process of its own. It is a fork of this one, which has imported everything (3 s)."""

    def __init__(self, script, *flags, cwd, before=None, stdout=None, stderr=None):
        self.out = cwd / f".{time.time_ns()}.out"
        self.err = self.out.with_suffix(".err")
        argv = [str(ROOT / script), *map(str, flags)]
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                for number, path in ((1, stdout or self.out), (2, stderr or self.err)):
                    descriptor = path if isinstance(path, int) else os.open(path, os.O_WRONLY | os.O_CREAT)
                    os.dup2(descriptor, number)
                code = self._child(argv, cwd, before)
            os._exit(code)
        self.code = None

    def _child(self, argv, cwd, before):
        sys.stdin = sys.__stdin__
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(cwd)
        sys.argv = argv
        try:
            if before:
                before()
            runpy.run_path(argv[0], run_name="__main__")
            return 0
        except SystemExit as stop:
            return stop.code or 0
        except BaseException:
            try:
                sys.excepthook(*sys.exc_info())
                return 1
            except SystemExit as stop:
                return stop.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def ended(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, condition=lambda: False, seconds=300):
        """Until it has ended, or `condition` is true. Returns its exit code."""
        end = time.monotonic() + seconds
        while not self.ended() and not condition():
            assert time.monotonic() < end, self.err.read_text()
            time.sleep(0.005)
        return self.code

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)


def run(script, *flags, cwd, code=0, **options):
    """What a script prints to stdout and stderr; it must end with `code`, and if that is not 0 with one line."""
    process = Process(script, *flags, cwd=cwd, **options)
    process.wait()
    out, err = (path.read_text() if path.exists() else "" for path in (process.out, process.err))
    assert process.code == code and "Traceback" not in err, err
    if code:
        assert err.splitlines()[-1].startswith(f"{Path(script).name}: "), err
        return out, err.splitlines()[-1]
    return out, err


def only_run(cwd, runs="runs"):
    (directory,) = (cwd / runs).iterdir()
    return directory


def begun(cwd, runs="runs"):
    """Whether a run has its first line of metrics. A directory with a dot is about to get its name."""
    return any(path.read_text() for path in (cwd / runs).glob("[!.]*/metrics.jsonl"))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcome(directory):
    """All that a run has learned and written, without what depends on time."""
    metrics = [{k: v for k, v in line.items() if k != "seconds"} for line in lines(directory / "metrics.jsonl")]
    curves = [{k: v for k, v in line.items() if k != "charts/SPS"} for line in lines(directory / "train.jsonl")]
    returns = json.loads((directory / "results.json").read_text())["returns"]
    weights = torch.load(directory / "agent.pt", weights_only=True)
    return metrics, curves, returns, {name: x.tolist() for name, x in weights.items()}


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_args(path, **changes):
    edit(path, args=json.loads(path.read_text())["args"] | changes)


def slowly():
    """Every gradient step takes 20 ms more, so that there is time to disturb the run."""
    advance = aib_run.Run.advance

    def slow(self, losses):
        time.sleep(0.02)
        advance(self, losses)

    aib_run.Run.advance = slow


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A function: the directory of a script's finished run of 200 steps, with its checkpoint. Not to be changed."""
    made = {}

    def get(script):
        if script not in made:
            cwd = tmp_path_factory.mktemp(script)
            run(script, *SHORT, "--keep-checkpoint", cwd=cwd)
            made[script] = only_run(cwd)
        return made[script]

    return get


@pytest.fixture
def copy_of(finished, tmp_path):
    """A function that gives a copy of a script's finished run."""
    return lambda script: Path(shutil.copytree(finished(script), tmp_path / finished(script).name))


# ------------------------------------------------- Changing a script -----------------------------------------------


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Number(enum.IntEnum):
    ONE = 1
    TWO = 2


@dataclasses.dataclass
class Inner:
    rate: float = 5.0
    widths: tuple[int, ...] = (3,)


@dataclasses.dataclass
class Other:
    momentum: float = 0.5


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (float, 5.0),
        (float, -1e-30),
        (int, 0),
        (int, -7),
        (str, "--odd one"),
        (bool, False),
        (bool | None, True),
        (typing.Literal["a", 3], 3),
        (float | None, 2.5),
        (int | None, None),
        (tuple[int, ...], (256, 256)),
        (tuple[int, ...], ()),
        (tuple[int, float, str], (1, 0.1, "x")),
        (tuple[tuple[int, str], ...], ((1, "a"), (2, "b"))),
        (tuple[int, ...] | None, (1, 2)),
        (list[str], ["a", "b c"]),
        (set[int], {1, 2}),
        (dict[str, float], {"a": 0.1, "b": -2.0}),
        (dict[Colour, int], {Colour.RED: 3}),
        (Path, Path("/a b/c")),
        (Colour, Colour.BLUE),
        (Number, Number.TWO),
        (tuple[Colour, ...], (Colour.RED, Colour.BLUE)),
        (datetime.date, datetime.date(2020, 1, 2)),
        (Inner, Inner(0.0, (1, 2))),
        (Inner | None, Inner(1.0)),
        (Inner | Other, Other(0.9)),
    ],
)
def test_a_field_of_any_type_is_restored(hint, value):
    saved = json.loads(json.dumps(aib_run.plain(value)))
    found = aib_run.restore(hint, saved)
    assert found == value and type(found) is type(value)
    cls = dataclasses.make_dataclass("Args", [("own", hint, dataclasses.field(default_factory=lambda: value))])
    config = {"args": {"own": saved}, "script": "x.py"}
    args = aib_run.args_of(cls, "runs/x", config)
    assert aib_run.read_flags(cls, [], args).own == value  # tyro takes it as a default


FIELDS = """
class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass
class Optimiser:
    rate: float = 5.0
    betas: tuple[float, ...] = (0.9, 0.999)


@dataclass
class Args(aib_run.Args):
    temperature: float = 5.0
    delay: int = 0
    note: str = "a note"
    fast: bool = True
    kind: Literal["a", "b"] = "a"
    limit: float | None = 2.0
    hidden: tuple[int, ...] = (256, 256)
    where: Path = Path("some/where")
    colour: Colour = Colour.RED
    weights: dict[str, float] = field(default_factory=lambda: {"a": 1.0})
    optimiser: Optimiser = field(default_factory=Optimiser)
"""
GIVEN = "--temperature 7.5 --delay -3 --no-fast --kind b --limit 3 --hidden 64 64 64 --where /else --colour BLUE"
GIVEN += " --weights.a 2 --optimiser.rate 0.5 --optimiser.betas 0.5 0.6"


def changed_script(tmp_path, fields=FIELDS, name="mine_sac.py"):
    """dr_sac.py with other fields in front of its own, in a directory of the user's."""
    text = (ROOT / "dr_sac.py").read_text()
    imports = "import enum\nfrom dataclasses import field\nfrom pathlib import Path\nfrom typing import Literal\n"
    text = text.replace("import copy\n", f"import copy\n{imports}", 1)
    text = text.replace("@dataclass\nclass Args(aib_run.Args):", fields.strip("\n"), 1)
    assert fields.strip("\n") in text
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_a_changed_script_trains_and_is_resumed_and_evaluated(tmp_path):
    script = changed_script(tmp_path)
    flags = [*SHORT, "--total-timesteps", 20, "--keep-checkpoint", *GIVEN.split()]
    run(script, *flags, cwd=tmp_path)
    directory = only_run(tmp_path)
    saved = json.loads((directory / "config.json").read_text())
    assert saved["changed"] is True  # the script is no part of the repository
    assert saved["args"]["hidden"] == [64, 64, 64] and saved["args"]["optimiser"]["betas"] == [0.5, 0.6]
    out, _ = run(script, "--eval-only", directory, cwd=tmp_path)
    assert "AER" in out
    run(script, "--resume", directory, "--total-timesteps", 30, cwd=tmp_path)
    after = json.loads((directory / "config.json").read_text())["args"]
    assert after == saved["args"] | {"total_timesteps": 30}
    out, _ = run(script, "--help", cwd=tmp_path)
    assert "--optimiser.rate" in out and "--hidden" in out
    _, err = run(script, "--resume", directory, "--delay", 4, cwd=tmp_path, code=2)
    assert "--delay" in err

    # A field that is new since then counts as its default; one that is gone gets one line with the run's commit.
    changed_script(tmp_path, FIELDS + "    newer: int = 9\n")
    run(script, "--resume", directory, "--total-timesteps", 40, cwd=tmp_path)
    after = json.loads((directory / "config.json").read_text())
    assert after["args"] == saved["args"] | {"total_timesteps": 40, "newer": 9}
    changed_script(tmp_path, FIELDS.replace("    delay: int = 0\n", ""))
    for flag in ("--resume", "--eval-only"):
        _, err = run(script, flag, directory, cwd=tmp_path, code=2)
        assert "--delay" in err and saved["commit"] in err


def narrower(path):
    path.write_text(path.read_text().replace("WIDTH = 256", "WIDTH = 64"))


def another_network(path):
    path.write_text(
        path.read_text().replace("self.log_alpha = ", "self.mine = nn.Linear(1, 1)\n        self.log_alpha = ")
    )


@pytest.mark.parametrize(("change", "named"), [(narrower, "[64, "), (another_network, "mine.weight")])
def test_a_run_from_before_its_networks_were_changed_gets_one_line(change, named, copy_of, tmp_path):
    directory = copy_of("dr_sac.py")
    commit = json.loads((directory / "config.json").read_text())["commit"]
    script = tmp_path / "dr_sac.py"
    shutil.copy(ROOT / "dr_sac.py", script)
    change(script)
    before = contents(directory)
    for flags in (["--eval-only", directory], ["--resume", directory, "--total-timesteps", 600]):
        _, err = run(script, *flags, cwd=tmp_path, code=2)
        assert "do not fit this script" in err and named in err and commit in err
    assert before == contents(directory)


def test_another_script_of_the_same_name_is_noticed(copy_of, tmp_path):
    directory, more = copy_of("dr_sac.py"), ("--total-timesteps", 220)
    script = tmp_path / "dr_sac.py"
    text = (ROOT / "dr_sac.py").read_text()
    for path in (ROOT / "dr_sac.py", script):
        script.write_text(text + "# edited\n")
        _, err = run(path, "--eval-only", directory, cwd=tmp_path)
        assert len(err.splitlines()) == (path == script) and (str(path) in err) == (path == script)
    script.write_text(text.replace('return "DR"', 'return "Mine"'))
    before = contents(directory)
    for flags in (("--resume", directory, *more), ("--eval-only", directory)):
        _, err = run(script, *flags, cwd=tmp_path, code=2)
        assert "Mine" in err and before == contents(directory)
    script.write_text(text + "# edited\n")
    for noticed in (True, False):  # the second time it is the file that went on with it last
        _, err = run(script, "--resume", directory, *more, "--keep-checkpoint", cwd=tmp_path)
        assert (f"note: {script}" in err) == noticed
        more = ("--total-timesteps", 240)


@pytest.mark.parametrize("name", ["My/Rew", "My__Rew", "My Rew", ""])
def test_what_a_method_cannot_be_called(name, tmp_path):
    script = tmp_path / "mine_sac.py"
    script.write_text((ROOT / "dr_sac.py").read_text().replace('return "DR"', f'return "{name}"'))
    _, err = run(script, *SHORT, cwd=tmp_path, code=2)
    assert repr(name) in err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("losses", [None, {"loss": 1.0}, {"loss": torch.ones(2)}], ids=str)
def test_losses_of_another_kind_are_refused(losses):
    run = object.__new__(aib_run.Run)
    run.losses = {}
    with pytest.raises(TypeError, match="losses"):
        run.add_losses(losses)


def test_bounds_stand_at_the_field(capsys):
    @dataclasses.dataclass
    class Bounded(aib_run.Args):
        beta: typing.Annotated[float, aib_run.Bounds(0, 10)] = 5.0
        free: float = 100.0
        warm: aib_run.EpisodeOrMore = 1000
        inner: Inner = dataclasses.field(default_factory=Inner)
        betas: tuple[aib_run.Fraction, aib_run.Fraction] = (0.9, 0.99)

    assert aib_run.parse_args(Bounded, ["--beta", "9", "--free", "-3", "--inner.rate", "-1"]).free == -3
    assert aib_run.parse_args(Bounded, ["--env-id", "DI", "--warm", "100"]).warm == 100
    for name, *flags in (
        ["--beta", "--beta", "11"],
        ["--warm", "--env-id", "DI", "--warm", "99"],
        ["--warm", "--env-id", "ODE", "--warm", "199"],
        ["--betas", "--betas", "0.5", "2"],
    ):
        with pytest.raises(SystemExit) as stop:
            aib_run.parse_args(Bounded, flags)
        assert stop.value.code == 2 and f"{name} must be" in capsys.readouterr().err


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with aib_run.py and a script, of which `aib_run.commit_of` will speak."""
    directory = tmp_path / "clone"
    directory.mkdir()
    for name in ("aib_run.py", "dr_sac.py"):
        shutil.copy(ROOT / name, directory)
    git(directory, "init", "-q")
    commit(directory)
    monkeypatch.setattr(aib_run, "ROOT", directory)
    return directory


def git(directory, *command):
    command = ["git", "-C", directory, "-c", "safe.directory=*", "-c", "user.name=x", "-c", "user.email=x@x", *command]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(directory):
    git(directory, "add", ".")
    git(directory, "commit", "-qm", "x")


def test_the_commit_and_whether_the_script_differs_from_it(clone, tmp_path, monkeypatch):
    head = git(clone, "rev-parse", "HEAD")
    files = [clone / "aib_run.py", clone / "dr_sac.py"]
    assert aib_run.commit_of(files) == (head, False)
    (clone / "new_sac.py").write_text("")
    assert aib_run.commit_of(files) == (head, False)
    assert aib_run.commit_of([*files, clone / "new_sac.py"]) == (head, True)  # untracked
    (clone / ".gitignore").write_text("new*\n")
    assert aib_run.commit_of([*files, clone / "new_sac.py"]) == (head, True)  # ignored
    assert aib_run.commit_of([*files, tmp_path / "else.py"]) == (head, True)  # outside
    (clone / "dr_sac.py").write_text("changed")
    assert aib_run.commit_of(files) == (head, True)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    git(elsewhere, "init", "-q")
    (elsewhere / "x").write_text("")
    commit(elsewhere)
    monkeypatch.setenv("GIT_DIR", str(elsewhere / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(elsewhere))
    assert aib_run.commit_of(files) == (head, True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_the_commit_of_a_clone_that_another_user_owns(clone):
    head = git(clone, "rev-parse", "HEAD")
    for path in (clone, *clone.rglob("*")):
        os.chown(path, 1234, 1234)
    assert aib_run.commit_of([clone / "dr_sac.py"]) == (head, False)


def test_an_unknown_commit_has_a_reason(clone, monkeypatch):
    shutil.rmtree(clone / ".git")
    assert re.fullmatch(r"unknown \(.+\)", aib_run.commit_of([])[0])
    git(clone, "init", "-q")
    (clone / "x").write_text("")
    git(clone, "add", "x")
    git(clone, "commit", "-qm", "another project's, which holds these files unversioned")
    assert re.fullmatch(r"unknown \(.+\)", aib_run.commit_of([])[0])
    monkeypatch.setenv("PATH", "")
    assert re.fullmatch(r"unknown \(.+git.+\)", aib_run.commit_of([])[0])


def test_config_says_what_has_run_where(finished):
    config = json.loads((finished("dr_sac.py") / "config.json").read_text())
    assert config["script"] == "dr_sac.py"
    if (ROOT / ".git").exists():
        assert config["commit"] == git(ROOT, "rev-parse", "HEAD") and config["changed"] in (False, True)
    assert config["threads"] == torch.get_num_threads() and config["gpu"] == ""
    assert config["processor"] == torch.backends.cpu.get_cpu_capability()
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


# ----------------------------------------------- Killed, stopped, resumed, extended --------------------------------


def test_stopped_and_resumed_it_is_the_same_run(finished, tmp_path):
    (tmp_path / "my runs").mkdir()
    process = Process("dmash_sac.py", *SHORT, "--run-dir", "my runs", cwd=tmp_path, before=slowly)
    process.wait(lambda: begun(tmp_path, "my runs"))
    directory = only_run(tmp_path, "my runs")
    process.kill(signal.SIGINT)
    assert process.wait() == 130
    err = process.err.read_text()
    assert "Traceback" not in err and "Ctrl-C" in err  # it says that a second one ends at once
    command = shlex.split(err.splitlines()[-1].partition("go on with: ")[2])
    assert command == ["python", str(ROOT / "dmash_sac.py"), "--resume", f"my runs/{directory.name}"]

    # Meanwhile one can look at it.
    before = contents(directory)
    out, _ = run("dmash_sac.py", "--eval-only", directory, cwd=tmp_path)
    assert re.search(r"AER .*unfinished.* 100", out) and contents(directory) == before

    torch.set_num_threads(2)  # this, too, leaves a trace
    try:
        run("dmash_sac.py", *command[2:], cwd=tmp_path, before=lambda: torch.set_num_threads(1))
    finally:
        torch.set_num_threads(1)
    assert outcome(directory) == outcome(finished("dmash_sac.py"))
    names = ["agent.pt", "config.json", "metrics.jsonl", "results.json", "train.jsonl"]
    assert sorted(contents(directory)) == names
    (resumed,) = json.loads((directory / "config.json").read_text())["resumed"]
    assert resumed["global_step"] == 100 and {"commit", "threads", "processor", "versions", "changed"} < resumed.keys()


def test_killed_before_its_first_checkpoint_it_begins_anew(finished, tmp_path):
    process = Process("dr_sac.py", *SHORT, cwd=tmp_path, before=slowly)
    process.wait(lambda: begun(tmp_path))
    process.kill()
    process.wait()
    directory = only_run(tmp_path)
    _, err = run("dr_sac.py", "--eval-only", directory, cwd=tmp_path, code=2)
    assert "agent.pt" in err and "checkpoint.pt" in err
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"global_step": 3')  # as if it had been killed in the middle of a line
    run("dr_sac.py", "--resume", directory, cwd=tmp_path)
    assert outcome(directory) == outcome(finished("dr_sac.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_random_moments_it_is_the_same_run(script, finished, tmp_path):
    """Four kills each: twenty in all."""
    undisturbed = outcome(finished(script))
    moments = random.Random(script)
    flags = SHORT
    kills = 0
    while kills < 4:
        moment = time.monotonic() + moments.uniform(0.5, 4)
        process = Process(script, *flags, cwd=tmp_path, before=slowly)
        process.wait(lambda moment=moment: time.monotonic() > moment)
        if process.ended():
            assert process.code == 0, process.err.read_text()
        else:
            process.kill()
            process.wait()
            kills += 1
        named = list((tmp_path / "runs").glob("[!.]*"))
        if named and (named[0] / "results.json").exists():  # it has ended, perhaps a moment before it was killed
            assert outcome(only_run(tmp_path)) == undisturbed
        elif named:
            flags = ["--resume", only_run(tmp_path)]
            continue
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        flags = SHORT
    run(script, *flags, cwd=tmp_path)
    assert outcome(only_run(tmp_path)) == undisturbed


def test_killed_before_it_has_a_config_it_leaves_nothing(tmp_path):
    def before():
        def write(path, content):
            os._exit(9)

        aib_run.write = write

    process = Process("dr_sac.py", *SHORT, cwd=tmp_path, before=before)
    assert process.wait() == 9
    assert not [path for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")]


def test_a_second_ctrl_c_ends_it_at_once(tmp_path):
    process = Process("dr_sac.py", *SHORT, cwd=tmp_path, before=slowly)
    process.wait(lambda: begun(tmp_path))
    process.kill(signal.SIGINT)
    process.wait(lambda: "Ctrl-C" in process.err.read_text())
    process.kill(signal.SIGINT)
    assert process.wait() == 130
    assert process.err.read_text().splitlines()[-1] == "dr_sac.py: stopped at once"
    assert not (only_run(tmp_path) / "checkpoint.pt").exists()


@pytest.mark.parametrize("steps", [150, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_of_any_length_can_be_extended(steps, finished, tmp_path):
    """150 steps end in the middle of an episode, 200 at the end of one."""
    short = [*SHORT, "--total-timesteps", steps, "--keep-checkpoint"]
    run("dr_sac.py", *short, cwd=tmp_path)
    directory = only_run(tmp_path)
    first = outcome(directory)
    states = tmp_path / "states"

    def before():  # what lies there before each change of a file, that is at whatever moment it may be killed
        def watch(function):
            def watched(path, *args, **options):
                with open(states, "a") as file, contextlib.suppress(FileNotFoundError):
                    agent = torch.load(directory / "agent.pt", weights_only=True)
                    results = json.loads((directory / "results.json").read_text())
                    bias = agent["actor.head.bias"].tolist()
                    file.write(json.dumps([results["args"]["total_timesteps"], bias]) + "\n")
                return function(path, *args, **options)

            return watched

        for name in ("replace", "unlink", "rename"):
            setattr(Path, name, watch(getattr(Path, name)))

    run("dr_sac.py", "--resume", directory, "--total-timesteps", 250, cwd=tmp_path, before=before)
    (tmp_path / "longer").mkdir()
    run("dr_sac.py", *SHORT, "--total-timesteps", 250, cwd=tmp_path / "longer")
    assert outcome(directory) == outcome(only_run(tmp_path / "longer")) != first
    assert (directory / "checkpoint.pt").exists() and not (only_run(tmp_path / "longer") / "checkpoint.pt").exists()
    bias = {steps: first[-1]["actor.head.bias"], 250: outcome(directory)[-1]["actor.head.bias"]}
    seen = lines(states)
    assert len(seen) >= 3 and all(agent == bias[steps] for steps, agent in seen)


# ------------------------------------------------------- Locks ------------------------------------------------------


def test_a_run_in_use_is_left_alone(copy_of):
    directory = copy_of("dr_sac.py")
    before = contents(directory)
    with open(directory / "metrics.jsonl", "a") as file:
        aib_run.lock(file)
        _, err = run("dr_sac.py", "--resume", directory, "--total-timesteps", 600, cwd=directory.parent, code=2)
    assert str(directory) in err and before == contents(directory)


def test_who_only_looks_for_a_moment_does_not_end_a_run(tmp_path, monkeypatch):
    probe = open(tmp_path / "metrics.jsonl", "a")
    fcntl.flock(probe, fcntl.LOCK_EX)
    monkeypatch.setattr(time, "sleep", lambda seconds: probe.close())  # it is gone when the run looks again
    with open(tmp_path / "metrics.jsonl", "a") as file:
        aib_run.lock(file)
        with open(tmp_path / "metrics.jsonl", "a") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it has the lock now


def nfs(file, operation):
    """NFS turns flock into a lock of bytes, which wants a descriptor that can write."""
    if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")


def no_locks(file, operation):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize(("flock", "warnings"), [(nfs, 0), (no_locks, 1)])
def test_file_systems_with_other_locks_or_none(flock, warnings, copy_of):
    directory = copy_of("dr_sac.py")
    flags = ["--resume", directory, "--total-timesteps", 210]
    _, err = run("dr_sac.py", *flags, cwd=directory.parent, before=lambda: setattr(fcntl, "flock", flock))
    assert sum(str(directory) in line for line in re.split("[\r\n]", err)) == warnings


# ----------------------------------------------------- The terminal ------------------------------------------------


@pytest.mark.parametrize("lost", ["full device", "closed pipe", "closed from the start", "hangup"])
def test_a_lost_terminal_does_not_end_it(lost, finished, tmp_path):
    before = None
    if lost == "full device":
        out = err = os.open("/dev/full", os.O_WRONLY)
    elif lost == "closed pipe":
        reader, out = os.pipe()
        os.close(reader)
        err = out
    elif lost == "closed from the start":
        out = err = None

        def before():
            os.close(1)
            os.close(2)
            sys.stdout = sys.stderr = None
    else:
        terminal, out = pty.openpty()
        err = out

        def before():
            slowly()

    flags = SHORT if lost == "hangup" else [*SHORT, "--total-timesteps", 20, "--keep-checkpoint"]
    process = Process("dr_sac.py", *flags, cwd=tmp_path, before=before, stdout=out, stderr=err)
    if lost == "hangup":
        os.close(out)
        process.wait(lambda: begun(tmp_path))
        os.close(terminal)
        process.kill(signal.SIGHUP)
    assert process.wait() == 0
    assert (only_run(tmp_path) / "results.json").exists()
    if lost == "hangup":
        assert outcome(only_run(tmp_path)) == outcome(finished("dr_sac.py"))
    else:
        assert (only_run(tmp_path) / "checkpoint.pt").exists()


def test_what_it_shows_is_narrow_and_little(tmp_path):
    out, err = run("dr_sac.py", *SHORT, cwd=tmp_path)
    shown = [line for line in re.split("[\r\n]", out + err) if not line.startswith(("run: ", "results: "))]
    assert max(map(len, shown)) <= 80 and len(err) < 1500
    assert [int(step) for step in re.findall(r"step (\d+): AER", out)] == [0, 100, 200]
    assert "random" in err and "qf_loss" in err


# ------------------------------------------------ What a run writes ------------------------------------------------


def test_curves_between_evaluations(finished):
    directory = finished("dmash_sac.py")
    curves = lines(directory / "train.jsonl")
    losses = [line for line in curves if "charts/SPS" in line]
    names = {"dynamics_loss", "qf_loss", "actor_loss", "alpha_loss", "alpha"}
    assert [line["global_step"] for line in losses] == [200] and losses[0]["charts/SPS"] > 0
    assert {name for name in losses[0] if name.startswith("losses/")} == {f"losses/{name}" for name in names}
    returns = [line for line in curves if "charts/episodic_return" in line]
    assert [line["global_step"] for line in returns] == [100, 200]
    assert [line["env_steps"] for line in returns] == [20 * (100 + (100 + 24) * i + 24) for i in (1, 2)]
    assert all(0 <= line["charts/episodic_return_worst_mode"] <= line["charts/episodic_return"] for line in returns)


def test_returns_of_training_episodes(tmp_path):
    """Against the rewards themselves: 1 a step in contexts of one mode, 3 in the other's."""
    made = SimpleRun(tmp_path)
    modes = [context["inversion"] for context in aib_envs.context_set("DI", "train")]
    made._log_returns(np.array([100.0 if mode == 1 else 300.0 for mode in modes]))
    made._train.close()
    (line,) = lines(tmp_path / "train.jsonl")
    assert line["charts/episodic_return"] == np.mean([100.0 if mode == 1 else 300.0 for mode in modes])
    assert line["charts/episodic_return_worst_mode"] == 100


def test_training_contexts_of_three_modes():
    contexts = aib_envs.context_set("relatives.aib_signs:DI-Signs", "train")
    found = aib_run._modes_of("relatives.aib_signs:DI-Signs", contexts)
    signs = [(context["inversion_x"], context["inversion_y"]) for context in contexts]
    assert len(set(found)) == len(set(signs)) == len(set(zip(found, signs, strict=True))) == 3


class SimpleRun(aib_run.Run):
    """Only what writes lines."""

    def __init__(self, directory):
        self.args = aib_run.Args(env_id="DI")
        self.global_step = self.env_steps = 0
        self._train = open(directory / "train.jsonl", "a")


def test_logging_changes_nothing(finished, tmp_path):
    run("dr_sac.py", *SHORT, cwd=tmp_path, before=lambda: setattr(aib_run, "LOG_EVERY", 1))
    metrics, curves, *learned = outcome(only_run(tmp_path))
    expected = outcome(finished("dr_sac.py"))
    assert [metrics, *learned] == [expected[0], *expected[2:]] and len(curves) == 202


def diverge(in_context):
    """Makes DI diverge at the first step in the contexts for which that is true."""
    step = aib_envs.DoubleIntegrator._step

    def diverging(self, action):
        if in_context(self.context):
            raise ArithmeticError("too fast")
        return step(self, action)

    aib_envs.DoubleIntegrator._step = diverging


def test_diverged_simulations_are_in_the_files(tmp_path):
    heavy = lambda context: context["mass"] > 1.0
    out, _ = run("dr_sac.py", *SHORT, "--total-timesteps", 20, cwd=tmp_path, before=lambda: diverge(heavy))
    directory = only_run(tmp_path)
    results = json.loads((directory / "results.json").read_text())
    for split, contexts in results["contexts"].items():
        assert [rollouts == [True] for rollouts in results["diverged"][split]] == [*map(heavy, contexts)]
        number = sum(map(heavy, contexts))
        assert number > 0 and {line["diverged"][split] for line in lines(directory / "metrics.jsonl")} == {number}
    assert "diverged" in out


def test_every_simulation_diverged(tmp_path):
    for script in SCRIPTS:
        _, err = run(script, *SHORT, cwd=tmp_path, code=3, before=lambda: diverge(lambda context: True))
        assert "diverged" in err


@pytest.mark.parametrize("script", ["dr_sac.py", "dmash_sac.py"])
def test_what_is_not_finite_stops_the_run(script, copy_of, tmp_path):
    path = copy_of(script) / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    for name, number, reason in (("qf2.head.bias", 1e30, "qf_loss"), ("actor.head.bias", float("nan"), "actor.head")):
        good = state["agent"][name].clone()
        state["agent"][name][:] = number  # the square of 1e30 is not finite
        torch.save(state, path)
        before = path.read_bytes()
        _, err = run(script, "--resume", path.parent, "--total-timesteps", 600, cwd=tmp_path, code=3)
        assert reason in err and path.read_bytes() == before
        assert reason in broke_down(path.parent)
        state["agent"][name][:] = good
    torch.save(state, path)
    run(script, "--resume", path.parent, "--total-timesteps", 600, cwd=tmp_path)
    assert broke_down(path.parent) is None


def broke_down(directory):
    """Why a run could not go on, as its config.json says."""
    return json.loads((directory / "config.json").read_text()).get("broke_down")


# -------------------------------------------- Looking at an agent, videos ------------------------------------------


def test_eval_only_repeats_the_last_evaluation(tmp_path):
    short = [*SHORT, "--env-id", "ODE", "--total-timesteps", 10, "--learning-starts", 200]  # any action earns something
    out, _ = run("dmash_sac.py", *short, cwd=tmp_path)
    directory = only_run(tmp_path)
    aer = re.search("step 10: (.*)", out)[1]
    before = contents(directory)
    assert run("dmash_sac.py", "--eval-only", directory, cwd=tmp_path)[0] == aer + "\n"
    assert before == contents(directory)

    # A run from before there were some of the flags and files
    config = json.loads((directory / "config.json").read_text())
    for name in ("cuda_graph", "flip_at"):
        del config["args"][name]
    for name in ("changed", "script_sha256"):
        del config[name]
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "train.jsonl").unlink()
    assert run("dmash_sac.py", "--eval-only", directory, cwd=tmp_path)[0] == aer + "\n"


def test_eval_only_in_one_context_with_a_video(copy_of):
    import imageio

    directory = copy_of("dmash_sac.py")
    flags = ["--eval-only", directory, "--eval-rollouts", 3, "--context", "mass=1.3", "inversion=-1"]
    out, _ = run("dmash_sac.py", *flags, "--capture-video", "--flip-at", 60, cwd=directory.parent)
    first, second = out.splitlines()
    assert re.fullmatch(r"mass 1.3, actuators reversed: return [\d.]+, from [\d.]+ to [\d.]+ in 3 episodes", first)
    flipped = re.fullmatch(r"video: (.*), flipped at step 60: return (\d+) before, (\d+) after", second)
    assert flipped[1] == str(directory / "video.gif")
    frames = imageio.mimread(directory / "video.gif", memtest=False)
    assert len(frames) > 50 and frames[0].shape[:2] == (292, 320)
    assert (directory / "video.gif").stat().st_size < 1_000_000


def red(frame, left=0):
    """Is the line above this picture red?"""
    r, g, b = frame[2, left + 2, :3].astype(int)
    return r > g + 100 and r > b + 100


def test_the_film_says_when_actuators_are_reversed():
    agent = type("Still", (), {"window_size": 24, "act": lambda self, obs, history: np.zeros((len(obs), 2))})()
    envs = aib_envs.make_vec("DI", aib_envs.modes("DI"), render_mode="rgb_array")
    frames, rewards = aib_run.film(envs, agent, flip_at=40)
    assert rewards.shape == (2, 100)
    assert len(frames) == 100 and frames[0].shape == (292, 640, 3) and frames[0].dtype == np.uint8
    assert [red(frame) for frame in frames] == [t < 40 for t in range(100)]  # the left one begins reversed
    assert [red(frame, 320) for frame in frames] == [t >= 40 for t in range(100)]


def test_returns_around_a_flip_in_words():
    rewards = np.array([[1.0] * 4 + [2.0] * 6, [0.0] * 10])
    assert aib_run._around_flip(rewards, 4) == ", flipped at step 4: return 4 and 0 before, 12 and 0 after"
    assert aib_run._around_flip(rewards, None) == ""


def test_a_wrong_number_gets_a_short_line(capsys):
    with pytest.raises(SystemExit):
        aib_run.parse_args(aib_run.Args, ["--total-timesteps", "1e5"])
    line = one_line(capsys)
    assert "--total-timesteps" in line and "1e5" in line and len(line) < 150


def test_contexts_in_words():
    assert aib_run.in_words({"length": 1.1, "inversion": -1}) == "length 1.1, actuators reversed"
    assert aib_run.in_words({"mass": 1.0, "permutation": 0}) == "mass 1, actuators normal"
    assert aib_run.in_words({"inversion_x": -1, "inversion_back_leg": 1}) == "x reversed, back leg normal"


@pytest.mark.slow
def test_without_opengl_there_is_one_line(tmp_path):
    flags = [*SHORT, "--env-id", "Cheetah", "--learning-starts", "1000", "--capture-video"]
    nowhere = {
        "MUJOCO_GL": "glfw",
        "DISPLAY": "",
        "WAYLAND_DISPLAY": "",
        "XDG_SESSION_TYPE": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "dr_sac.py"), *flags]
    process = subprocess.run(
        command, cwd=tmp_path, env=os.environ | nowhere, capture_output=True, text=True, check=False
    )
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1 and "MUJOCO_GL" in process.stderr
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------- Bad input --------------------------------------------------


def damage(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_origin(path, **changes):
    state = torch.load(path, weights_only=True)
    state["origin"] |= changes
    torch.save(state, path)


MORE = "--resume {d} --total-timesteps 600"


@pytest.mark.parametrize(
    ("prepare", "flags", "named"),
    [
        (None, "--resume nowhere", "nowhere is no run's directory (no config.json)"),
        (lambda d: (d / "config.json").unlink(), "--resume {d}", "config.json"),
        (lambda d: damage(d / "config.json"), "--resume {d}", "config.json"),
        (
            lambda d: edit(d / "config.json", script="dr_sac.py"),
            "--resume {d}",
            f": python {shlex.quote(str(ROOT / 'dr_sac.py'))} --resume ",
        ),
        (lambda d: edit(d / "config.json", script="a.py"), "--resume {d}", "is a run of a.py, not of dmash_sac.py"),
        (lambda d: edit(d / "config.json", args=3), "--resume {d}", "config.json"),
        (lambda d: (d / "config.json").write_text("[]"), "--resume {d}", "no run's config"),
        (lambda d: (d / "config.json").write_text("{}"), "--eval-only {d}", "no run's config"),
        (lambda d: edit_args(d / "config.json", batch_size="many"), "--resume {d}", "--batch-size"),
        (lambda d: edit_args(d / "config.json", total_timesteps="abc"), "--eval-only {d}", "--total-timesteps"),
        (lambda d: edit_args(d / "config.json", gone=1), "--resume {d}", "--gone"),
        (lambda d: edit_args(d / "config.json", buffer_size=5_000), MORE, "checkpoint.pt"),
        (None, "--resume {d}", "{d}"),
        (None, "--resume {d}", "more --total-timesteps extend it"),
        (None, "--resume {d} --total-timesteps 199", "--total-timesteps"),
        (lambda d: (d / "checkpoint.pt").unlink(), MORE, "--keep-checkpoint"),
        (lambda d: (d / "checkpoint.pt").unlink(), "--resume {d}", "--keep-checkpoint"),
        (lambda d: damage(d / "checkpoint.pt"), MORE, "checkpoint.pt"),
        (lambda d: flip(d / "checkpoint.pt"), MORE, "checkpoint.pt"),
        (lambda d: (d / "checkpoint.pt").write_text("hi"), MORE, "checkpoint.pt"),
        (lambda d: torch.save({"format": 2}, d / "checkpoint.pt"), MORE, "checkpoint.pt"),
        (lambda d: torch.save(Path(), d / "checkpoint.pt"), MORE, "checkpoint.pt"),
        (lambda d: change_origin(d / "checkpoint.pt", run="another"), MORE, "checkpoint.pt"),
        (lambda d: change_origin(d / "checkpoint.pt", format=2), MORE, "checkpoint.pt"),
        (lambda d: edit_args(d / "results.json", total_timesteps="z"), MORE, "results.json"),
        (lambda d: damage(d / "results.json"), MORE, "results.json"),
        (lambda d: [(d / x).unlink() for x in ("results.json", "checkpoint.pt")], "--resume {d}", "checkpoint.pt"),
        (lambda d: (d / "results.json").unlink(), "--resume {d} --total-timesteps 199", "--total-timesteps"),
        (lambda d: (d / "metrics.jsonl").unlink(), MORE, "metrics.jsonl"),
        (lambda d: (d / "metrics.jsonl").write_text(""), MORE, "metrics.jsonl"),
        (lambda d: (d / "train.jsonl").write_text(""), MORE, "train.jsonl"),
        (lambda d: (d / "train.jsonl").unlink(), MORE, "copy without train.jsonl"),
        (lambda d: [(d / x).unlink() for x in ("agent.pt", "checkpoint.pt")], "--eval-only {d}", "agent.pt"),
        (lambda d: damage(d / "agent.pt"), "--eval-only {d}", "agent.pt"),
        (lambda d: flip(d / "agent.pt"), "--eval-only {d}", "agent.pt"),
        (lambda d: torch.save({}, d / "agent.pt"), "--eval-only {d}", "agent.pt"),
        (lambda d: torch.save(3, d / "agent.pt"), "--eval-only {d}", "agent.pt"),
        (None, "--resume {d} --gamma 0.9", "--gamma"),
        (None, "--resume {d} --env-id Cheetah", "--env-id"),
        (None, "--resume {d} --eval-only {d}", "--eval-only"),
        (None, "--resume=", "--resume"),
        (None, "--eval-only=", "--eval-only"),
        (None, "--context mass=1", "--eval-only"),
        (None, "--eval-only {d} --track", "--track"),
        (None, "--eval-only {d} --context weight=1", "weight"),
        (None, "--eval-only {d} --context mass=nan", "mass"),
        (None, "--eval-only {d} --context inversion=0", "inversion"),
        (None, "--eval-only {d} --context mass=abc", "--context mass takes a number"),
        (None, "--eval-only {d} --context", "--context"),
        (None, "--eval-only {d} --context mass", "--context"),
        (None, "--eval-only {d} --context mass=1 mass=2", "--context"),
        (None, "--flip-at 10", "--capture-video"),
        (None, "--flip-at 100 --capture-video", "--flip-at"),
        (None, "--flip-at 10 --capture-video --env-id ODE", "--flip-at"),
        (None, "--buffer-size 4000000000", "allocate"),
        (None, "--eval-every 0", "--eval-every"),
        (None, "--env-id ODE --learning-starts 199", "--learning-starts"),
        (None, "--env-id ODE --buffer-size 199", "--buffer-size"),
        (None, "--run-dir /dev/null/x", "/dev/null"),
    ],
)
def test_bad_input_gets_one_line_and_changes_nothing(prepare, flags, named, copy_of, tmp_path):
    directory = copy_of("dmash_sac.py")
    if prepare:
        prepare(directory)
    before = contents(directory)
    flags = [flag.replace("{d}", str(directory)) for flag in flags.split()]
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))  # some machines promise any memory
    process = Process("dmash_sac.py", *flags, cwd=tmp_path, before=limit)
    assert process.wait() == 2, process.err.read_text()
    err = process.err.read_text()
    assert len(err.splitlines()) == 1 and named.replace("{d}", str(directory)) in err
    assert err.startswith("dmash_sac.py: ") and not process.out.read_text()
    assert before == contents(directory) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "wrong", "similar"),
    [
        ("--env Cheetah", {"--env"}, {"--env-id"}),
        ("--sed 1 --env DI", {"--sed", "--env"}, {"--seed", "--env-id"}),
        ("--foo", {"--foo"}, set()),
        ("--seed x", {"--seed"}, set()),
    ],
)
def test_a_wrong_flag_is_named_beside_similar_ones_without_their_help(flags, wrong, similar, capsys):
    with pytest.raises(SystemExit):
        aib_run.read_flags(aib_run.Args, flags.split())
    line = one_line(capsys)
    assert set(re.findall(r"--[\w-]+", line)) == wrong | similar and "default" not in line


def test_home_in_a_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert aib_run.parse_args(aib_run.Args, ["--run-dir=~/runs"]).run_dir == f"{tmp_path}/runs"


def one_line(capsys, code=2):
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 2),
        (RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: you tried"), 2),
        (OSError("No space left on device"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_a_user_can_mend_gets_one_line(error, code, capsys):
    with pytest.raises(SystemExit) as stop:
        aib_run._on_error(type(error), error, None)
    assert stop.value.code == code and len(capsys.readouterr().err.splitlines()) == 1


def test_an_error_in_the_code_keeps_its_traceback(tmp_path):
    def before():
        def wrong(self, *args):
            raise RuntimeError("else")

        aib_run.Run.advance = wrong

    process = Process("dr_sac.py", *SHORT, cwd=tmp_path, before=before)
    assert process.wait() == 1
    err = process.err.read_text()
    assert "Traceback" in err and err.splitlines()[-1] == "RuntimeError: else"


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    class Interrupted(io.FileIO):
        def write(self, data):
            if len(data) > 1000:  # a tensor
                raise KeyboardInterrupt
            return super().write(data)

    monkeypatch.setattr(aib_run, "open", Interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        aib_run.write(tmp_path / "checkpoint.pt", {"weights": torch.ones(100_000)})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 5 MiB: room for one checkpoint of DR on DI (4 MB), and not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", disk]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_ends_the_run_with_one_line_and_nothing_is_lost(small_disk, finished, tmp_path):
    _, err = run("dr_sac.py", *SHORT, "--run-dir", small_disk / "runs", cwd=tmp_path, code=2)
    directory = only_run(small_disk)
    assert str(directory / "checkpoint.pt") in err
    names = ["checkpoint.pt", "config.json", "metrics.jsonl", "train.jsonl"]
    assert sorted(contents(directory)) == names
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    run("dr_sac.py", "--resume", directory, cwd=tmp_path)
    assert outcome(directory) == outcome(finished("dr_sac.py"))


# -------------------------------------------------------- Tracking --------------------------------------------------

TINY = [*SHORT, "--total-timesteps", "2", "--track"]
needs_wandb = pytest.mark.skipif(not aib_run.importlib.util.find_spec("wandb"), reason="wandb is not installed")


def test_tracking_without_wandb_gets_one_line(monkeypatch, capsys):
    monkeypatch.setattr(aib_run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        aib_run.parse_args(aib_run.Args, ["--track"])
    assert stop.value.code == 2 and "--track" in one_line(capsys)


def test_tracking_sends_each_line_once(tmp_path):
    path = tmp_path / "train.jsonl"
    with open(path, "a") as writer, open(path) as reader:
        writer.write('{"a": 1}\n{"b"')
        writer.flush()
        assert list(aib_run.whole_lines(reader)) == ['{"a": 1}\n']
        writer.write(": 2}\n")
        writer.flush()
        assert list(aib_run.whole_lines(reader)) == ['{"b": 2}\n'] and not list(aib_run.whole_lines(reader))


@needs_wandb
@pytest.mark.slow
def test_tracking_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run("dr_sac.py", *SHORT, "--track", "--capture-video", cwd=tmp_path)
    (log,) = only_run(tmp_path).glob("wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for text in (b"aer", b"eval-out", b"video", b"learning_starts", b"charts/episodic_return", b"losses/qf_loss"):
        assert text in content


@needs_wandb
@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        {"WANDB_API_KEY": "", "HOME": "{tmp}", "NETRC": "{tmp}/no"},
        {"WANDB_API_KEY": 40 * "a", "WANDB_BASE_URL": "http://127.0.0.1:9"},
    ],
)
def test_tracking_that_fails_does_not_touch_the_run(env, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    for name, value in env.items():
        monkeypatch.setenv(name, value.replace("{tmp}", str(tmp_path)))
    _, err = run("dr_sac.py", *TINY, cwd=tmp_path)
    assert (only_run(tmp_path) / "results.json").exists() and "Weights & Biases" in err


@needs_wandb
@pytest.mark.slow
def test_tracking_into_a_full_directory_does_not_touch_the_run(small_disk, tmp_path, monkeypatch):
    with pytest.raises(OSError), open(small_disk / "full", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1_000_000))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(small_disk))
    run("dr_sac.py", *TINY, cwd=tmp_path)
    assert (only_run(tmp_path) / "results.json").exists()


def test_a_run_that_is_being_extended_is_not_finished(tmp_path):
    assert not aib_run.is_finished(tmp_path)
    for name, steps in (("config.json", 300), ("results.json", 300)):
        (tmp_path / name).write_text(json.dumps({"args": {"total_timesteps": steps}}))
    assert aib_run.is_finished(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"args": {"total_timesteps": 500}}))
    assert not aib_run.is_finished(tmp_path)
