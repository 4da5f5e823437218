"""The life of a run: command line, directory, checkpoint, signals, progress, tracking, video.

It knows nothing about any method. A script uses it so:

    run = aib_run.Run(args, method_name(args), agent, buffer)  # goes on from its checkpoint, if it has one
    run.add_env_steps(n)                                       # after every step of the environments
    run.advance(losses)                                        # after every gradient step
    run.log_evaluation(returns, diverged, diagnostics)         # now and then
    run.end_episode(history)                                   # a checkpoint where one is due; ends here on Ctrl-C
    run.finish(returns, diverged, diagnostics)                 # agent.pt, results.json

A run's directory holds config.json, metrics.jsonl (evaluations), train.jsonl (curves between them), checkpoint.pt while
it runs, and at the end agent.pt and results.json.
"""

import collections
import contextlib
import dataclasses
import enum
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
import typing
import zipfile
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

import aib_envs

ROOT = Path(__file__).resolve().parent
LOG_EVERY = 200  # gradient steps between two lines of losses in train.jsonl
FORMAT = 3  # of checkpoint.pt

# ----------------------------------------------------- Command line ---------------------------------------------------


class Bounds(typing.NamedTuple):
    """What a number on the command line may be. It stands at the field that needs it:
    `beta: Annotated[float, aib_run.Bounds(0, 10)] = 0.4`. `low` None: the steps of the task's episode."""

    low: float | None
    high: float


Fraction = typing.Annotated[float, Bounds(0, 1)]
Count = typing.Annotated[int, Bounds(1, 2**32 - 1)]
EpisodeOrMore = typing.Annotated[int, Bounds(None, 2**32 - 1)]
Seed = typing.Annotated[int, Bounds(0, 2**32 - 1)]


# What may be given anew with --resume and --eval-only: it is about this call, or does not change what is learned.
NOT_SAVED = {"resume", "eval_only", "context"}
FREE = NOT_SAVED | {"total_timesteps", "eval_rollouts", "cuda", "cuda_graph", "keep_checkpoint"}
FREE |= {"eval_every", "capture_video", "flip_at", "track"}


@dataclasses.dataclass
class Args:
    """The flags that every script has. A script adds its own, of any type that tyro takes. `free` is no flag."""

    free = FREE

    env_id: str = "DI"  # the task: DI, ODE, Cartpole, Cheetah, ... (docs/benchmark.md), or module:Task of your own file
    seed: Seed = 1  # seed of the run
    total_timesteps: Count | None = None  # vector steps (one in every context) = gradient steps; default: the task's
    cuda: bool = True  # use a GPU if there is one
    cuda_graph: bool = False  # record the gradient step as a CUDA graph (never tried on a GPU yet)
    run_dir: str = "runs"  # where the run's own directory is made
    eval_every: Count = 5_000  # steps between evaluations with 1 rollout per context
    eval_rollouts: Count = 10  # rollouts per context of the last evaluation
    resume: str | None = None  # directory of a run to go on with; more --total-timesteps extend a finished one
    keep_checkpoint: bool = False  # keep the checkpoint of a finished run, so that it can be extended
    eval_only: str | None = None  # directory of a run whose agent is evaluated again
    context: tuple[str, ...] = ()  # with --eval-only: the one context to roll out in, as in length=1.3 inversion=-1
    capture_video: bool = False  # at the end, record an episode as video.gif: in --context, or in both modes
    flip_at: Count | None = None  # in the video, reverse (or swap) the actuators at this step
    track: bool = False  # send metrics and video to Weights & Biases


def fail(message, code=2):
    """Ends the program with one line. Codes: 2 where the user has to change something, 3 where learning broke down."""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()  # so that the message is the last line
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


def flag(name):
    """total_timesteps -> --total-timesteps"""
    return "--" + name.replace("_", "-")


def plain(value):
    """`value` as JSON can hold it: dataclasses as objects, enum members by name, tuples and sets as lists, all that
    JSON does not know as text."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, dict):
        return {str(plain(key)): plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(x) for x in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def restore(hint, value, default=None):
    """The value of type `hint` that `plain` has turned into `value`. What a dataclass has no value for is as in
    `default`. Raises ValueError."""
    if value == plain(default):
        return default
    if isinstance(value, dict):
        for cls in (hint, *typing.get_args(hint)):  # the dataclass itself, or one of a union
            if dataclasses.is_dataclass(cls) and value.keys() <= typing.get_type_hints(cls).keys():
                hints = typing.get_type_hints(cls)
                return cls(**{name: restore(hints[name], x, getattr(default, name, None)) for name, x in value.items()})
    if type(value) is hint:
        return value
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(hint, args=_words(value))
    except SystemExit:
        raise ValueError(f"{value!r} is not of type {hint}") from None


def _words(value):
    """A `plain` value as the words of a command line: {"a": [1, 2]} -> ["a", "1", "2"]."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        return [word for part in value for word in _words(part)]
    return [str(value)]


def saved_args(args):
    """The arguments of a run (dict) as config.json holds them."""
    return {name: value for name, value in plain(args).items() if name not in NOT_SAVED}


def args_of(cls, directory, config):
    """The arguments of the run in `directory` as an instance of the dataclass `cls`. What the run has no value for
    counts as its default; ends the program with one line if it has a value that `cls` does not take."""
    hints = typing.get_type_hints(cls)
    args = cls()
    for name, value in config["args"].items():
        if name not in hints:
            fail(f"{directory} has {flag(name)}, which {config['script']} lacks; {origin_of(config)}")
        try:
            setattr(args, name, restore(hints[name], value, getattr(args, name)))
        except (ValueError, TypeError) as error:
            fail(f"{directory}/config.json: {flag(name)}: {error}; {origin_of(config)}")
    return args


def origin_of(config):
    """Of which code a run is, in words."""
    changed = " and uncommitted changes" if config.get("changed") else ""
    return f"the run is of commit {config.get('commit') or 'unknown'}{changed}"


def read_flags(cls, argv, default=None, description=None):
    """`tyro.cli`, but for a wrong flag one line instead of tyro's box."""
    console = io.StringIO()
    try:
        with contextlib.redirect_stderr(console):
            return tyro.cli(cls, args=argv, default=default, description=description)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│╰╯─ ") for line in console.getvalue().splitlines()[1:]]  # a box below its title
        message = " ".join(line for line in lines if line.strip("-"))  # "-" is what "─" is without Unicode
        end = r"\.? (?:Got errors|Arguments?|Perhaps you meant|For full helptext)\b"
        message = re.split(end, message)[0]
        similar = [line for line in lines if re.match(r"--\w", line)]  # flags, each above its help
        if similar and message.startswith("Unrecognized"):
            message += f"; did you mean {', or '.join(similar)}?"
        fail(message)


def parse_args(cls, argv=None, description=None):
    """An instance of the dataclass `cls` from a command line, checked; ends the program with one line if it is wrong.

    With --resume and --eval-only the arguments of that run are the defaults, and only `cls.free` may change.
    `total_timesteps` None becomes the task's own; `context`, a tuple of "key=value", becomes a dict or None.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = read_flags(cls, argv, description=description)
    if "" in (args.resume, args.eval_only):
        fail("--resume and --eval-only take the directory of a run; got nothing")
    if args.eval_only and (args.resume or args.track):
        fail("--eval-only goes neither with --resume nor with --track")
    if args.context and not args.eval_only:
        fail("--context needs --eval-only")
    if not args.context and any(word.partition("=")[0] == "--context" for word in argv):
        fail("--context takes key=value, as in length=1.3 inversion=-1; got nothing")

    directory = args.resume or args.eval_only
    if directory:
        directory = os.path.expanduser(directory)
        saved = args_of(cls, directory, read_config(directory))
        args = read_flags(cls, argv, saved, description)
        for name in vars(args).keys() - cls.free:
            if getattr(args, name) != getattr(saved, name):
                free = " ".join(flag(name) for name in sorted(cls.free))
                fail(f"{directory} has {flag(name)} {getattr(saved, name)}; what can change is {free}")
    for name in ("run_dir", "resume", "eval_only"):
        path = getattr(args, name)
        setattr(args, name, path and os.path.expanduser(path))
    check_args(args)
    return args


def check_args(args):
    """Fills in what depends on the task. Ends the program with one line where the arguments do not go together."""
    try:
        task = aib_envs.get_task(args.env_id)
        args.context = read_context(args.env_id, args.context)
    except ValueError as error:
        fail(error)
    _check_bounds(args, task)
    if args.total_timesteps is None:
        args.total_timesteps = task.total_timesteps
    if args.flip_at:
        if not args.capture_video:
            fail("--flip-at needs --capture-video")
        if aib_envs.modes(args.env_id) == [{}]:
            fail(f"--flip-at reverses or swaps actuators, which {args.env_id} cannot")
        if args.flip_at >= task.steps:
            fail(f"--flip-at must be below {task.steps}, the steps of {args.env_id}'s episode; got {args.flip_at}")
    if args.track and not importlib.util.find_spec("wandb"):
        fail("--track needs Weights & Biases: pip install wandb")


def _check_bounds(args, task, prefix=""):
    """Ends the program with one line if a number is outside the `Bounds` of its field."""
    for name, hint in typing.get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        if dataclasses.is_dataclass(value):
            _check_bounds(value, task, f"{prefix}{name}.")
        numbers = value if isinstance(value, tuple) else (value,)
        for part in (hint, *typing.get_args(hint)):  # Count, or the Count in Count | None and in tuple[Count, ...]
            for bounds in getattr(part, "__metadata__", ()):
                if isinstance(bounds, Bounds):
                    _check_numbers(flag(prefix + name), numbers, bounds, task)


def _check_numbers(name, numbers, bounds, task):
    """Ends the program with one line if a number of the flag `name` is outside `bounds`; None is inside."""
    low = task.steps if bounds.low is None else bounds.low
    for x in numbers:
        if x is not None and not low <= x <= bounds.high:
            why = " (an episode)" if bounds.low is None else ""
            fail(f"{name} must be from {low}{why} to {bounds.high}; got {x}")


def read_context(env_id, pairs):
    """("length=1.1", "inversion=-1") as a complete context (dict), or None. Raises ValueError."""
    if not pairs:
        return None
    context = dict(pair.split("=") for pair in pairs if re.fullmatch(r"\w+=[-+.\w]+", pair))
    if len(context) < len(pairs):
        raise ValueError(f"--context takes key=value, each key once; got {' '.join(pairs)}")
    for key, value in context.items():
        try:
            context[key] = float(value)
        except ValueError:
            raise ValueError(f"--context {key} takes a number; got {value}") from None
    return aib_envs.complete_context(env_id, context)


# ------------------------------------------------------- Main program -------------------------------------------------


def main(cls, train, make_envs, make_agent):
    """What a script does when it is started: trains, or with --eval-only evaluates a trained agent.

    cls: its dataclass of arguments. train(args) -> Run. make_envs(args, contexts, **options) -> vector environment.
    make_agent(args, envs) -> agent with `act` and `window_size`. The script's docstring is what --help begins with.
    """
    keep_going_without_terminal()
    sys.excepthook = _on_error
    args = parse_args(cls, description=sys.modules["__main__"].__doc__)
    if args.capture_video:  # can it draw here? It should say so before hours of training
        envs = make_envs(args, [{}], render_mode="rgb_array")
        envs.reset(seed=0)
        envs.render()
        envs.close()
    run = None
    if args.eval_only:
        directory = Path(args.eval_only)
        agent = make_agent(args, make_envs(args, [{}]))
        method = train.__globals__["method_name"](args)  # the script's
        check_script(directory, any_config(directory), Path(sys.argv[0]), method)
        unfinished_at = load_weights(agent, directory)
        evaluate_only(args, make_envs, agent, unfinished_at)
    else:
        run = train(args)
        directory = run.directory
        agent = run.agent
    if args.capture_video:
        contexts = [args.context] if args.context else aib_envs.modes(args.env_id)
        frames, rewards = film(make_envs(args, contexts, render_mode="rgb_array"), agent, args.flip_at)
        write_gif(directory / "video.gif", frames)
        print(f"video: {directory / 'video.gif'}{_around_flip(rewards, args.flip_at)}")
    if run:
        run.close()


def _around_flip(rewards, flip_at):
    """The return before and after the flip, in words. `rewards`: [environments, steps]."""
    if flip_at is None:
        return ""
    before, after = (" and ".join(f"{x.sum():.0f}" for x in part) for part in np.split(rewards, [flip_at], 1))
    return f", flipped at step {flip_at}: return {before} before, {after} after"


def _on_error(kind, error, trace):
    """`sys.excepthook`: one line for a full disk, full memory, a full GPU, a read-only directory and Ctrl-C."""
    message = str(error).partition("\n")[0]
    if isinstance(error, KeyboardInterrupt):
        fail("stopped at once", 130)
    if "can't allocate memory" in message:  # PyTorch says it with a mere RuntimeError
        fail(message.rpartition("DefaultCPUAllocator: ")[2])
    if isinstance(error, OSError | MemoryError | torch.OutOfMemoryError):
        fail(message or "out of memory")
    sys.__excepthook__(kind, error, trace)


def keep_going_without_terminal():
    """A terminal that goes away, a closed pipe or a full disk under stdout or stderr does not end the program."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # it was closed from the start
            _to_nowhere(number)
            stream = open(number, "w", closefd=False)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)  # each line is seen at once, in a file as well
        setattr(sys, name, Terminal(stream))


def _to_nowhere(descriptor):
    """From now on, what is written there is lost."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    if nowhere != descriptor:
        os.close(nowhere)


class Terminal:
    """stdout or stderr, which may go away."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        self._or_nowhere(self._stream.write, text)
        return len(text)

    def flush(self):
        self._or_nowhere(self._stream.flush)

    def _or_nowhere(self, function, *args):
        try:
            function(*args)
        except OSError:
            _to_nowhere(self._stream.fileno())


def device(args):
    """Where to learn (torch.device): on the GPU if there is one and --cuda, else on the CPU."""
    torch.set_flush_denormal(True)  # numbers below 1e-38 would be a hundred times slower than others
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


# -------------------------------------------------------- Files -------------------------------------------------------


def write(path, content):
    """Writes text, tensors if `path` ends in .pt, or JSON: a whole file or none. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            if path.suffix == ".pt":
                torch.save(content, file)
            else:
                text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
                file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except RuntimeError as error:  # what torch.save makes of an OSError, and of Ctrl-C
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise OSError(f"cannot write {path}: is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path, advice=""):
    """Ends the program with one line if `path` is not what is expected there; torch's errors are of many kinds."""
    try:
        yield path
    except Exception as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        fail(f"cannot use {path}: {type(error).__name__}: {reason}{advice}")


def read_tensors(path):
    """What `write` has put into a .pt file. Nothing but tensors and plain values is unpickled."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file) or zipfile.ZipFile(file).testzip():  # by checksums, which torch ignores
            raise ValueError("it is damaged, or no file of this kind")
    return torch.load(path, map_location="cpu", weights_only=True)


def any_config(directory):
    """The config.json (dict) of a run of any script; ends the program with one line if it is none."""
    path = Path(directory) / "config.json"
    if not path.exists():
        fail(f"{directory} is no run's directory (no config.json)")
    with reading(path):
        config = json.loads(path.read_text())
    if not isinstance(config, dict) or not {"run", "script", "method", "args"} <= config.keys():
        fail(f"{path} is no run's config.json")
    if not isinstance(config["args"], dict):
        fail(f"{path} is no run's config.json: its args are no object")
    return config | {"run": str(config["run"]), "script": str(config["script"]), "method": str(config["method"])}


def read_config(directory):
    """The config.json (dict) of a run of this script; ends the program with one line if it is not that."""
    script = Path(sys.argv[0]).name
    config = any_config(directory)
    if config["script"] != script:
        path = Path(sys.argv[0]).with_name(config["script"])
        more = f": {shlex.join(['python', str(path), *sys.argv[1:]])}" if path.exists() else f", not of {script}"
        fail(f"{directory} is a run of {config['script']}{more}")
    return config


def check_script(directory, config, script, method):
    """Ends the program with one line if `method`, which `script` makes with these arguments, is not the run's. A line
    on stderr if the file is not, to the byte, what made the run or went on with it last."""
    if config["method"] != method:
        fail(f"{directory} is a run of {config['method']}; {script} makes {method}")
    made_by = (config.get("resumed") or [config])[-1].get("script_sha256")
    if made_by and made_by != hashlib.sha256(script.read_bytes()).hexdigest():
        print(f"note: {script} has changed since the run {directory}, or is another file of that name", file=sys.stderr)


def fit(module, weights, path):
    """Puts `weights`, {name: tensor}, of a run's file `path` into a module. Ends the program with one line if they are
    of other networks."""
    own = module.state_dict()
    for name in [*own, *weights]:
        if name not in weights:
            reason = f"they have no {name}"
        elif name not in own:
            reason = f"the script has no {name}"
        elif weights[name].shape != own[name].shape:
            reason = f"{name} is {list(weights[name].shape)}, in the script {list(own[name].shape)}"
        else:
            continue
        fail(f"the weights of {path} do not fit this script: {reason}; {origin_of(any_config(path.parent))}")
    module.load_state_dict(weights)


def has_checkpoint(args):
    """Does --resume name a run that goes on from a checkpoint?"""
    return args.resume is not None and (Path(args.resume) / "checkpoint.pt").exists()


def last_metrics(directory):
    """The last whole line (dict) of a run's metrics.jsonl."""
    with contextlib.suppress(OSError):
        for line in reversed((Path(directory) / "metrics.jsonl").read_text().splitlines()):
            with contextlib.suppress(ValueError):
                return json.loads(line)
    return {"global_step": 0, "seconds": {}}


def lock(file):
    """Keeps other processes from an open file until it is closed; ends the program if one has it for longer than a
    second: tools/plan.py has it for a moment when it looks. On a file system without locks there is one warning. (NFS
    wants the file open for writing, too.)"""
    directory = Path(file.name).parent
    patience = time.monotonic() + 1
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > patience:
                fail(f"{directory} is in use by another process")
            time.sleep(0.02)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            print(f"{directory}: no locks on this file system; start no second process on this run", file=sys.stderr)
            return


def git(*command):
    """What git says about the directory of this file. Raises OSError, or CalledProcessError with `stderr`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip()


def commit_of(files):
    """The commit (text) of the repository that holds this file, or "unknown (why)", and whether one of `files` differs
    from it (None where it is unknown)."""
    try:
        git("ls-files", "--error-unmatch", "aib_run.py")  # else it lies in another project's repository
        commit = git("rev-parse", "HEAD")
        own = [file for file in files if file.is_relative_to(ROOT)]
        changed = git("status", "--porcelain", "--ignored", "--", *map(str, own))
        return commit, bool(changed) or own != files
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().partition("\n")[0]
        return f"unknown ({reason})", None


def provenance():
    """What a run's bits depend on besides its arguments (dict): packages, commit, code, threads, processor, GPU."""
    script = Path(sys.argv[0]).resolve()
    loaded = [Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
    files = sorted({path for path in (script, *loaded) if path.parent in (ROOT, script.parent) and path.exists()})
    commit, changed = commit_of(files)
    packages = ("torch", "numpy", "mujoco", "dm_control", "gymnasium")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit,
        "changed": changed,  # does the script, or a module beside it, differ from that commit?
        "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest() if script.is_file() else "",
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else "",
    }


# ------------------------------------------------------- Training -----------------------------------------------------


class Run:
    """One training run: where it is, what it writes, and how it ends.

    agent: a module; its optimizers are its attributes. buffer: an object with tensors and plain values as attributes.
    Both go into the checkpoint, with torch's random numbers; environments do not, since episodes begin with a reset by
    seed. `global_step` counts gradient steps, `env_steps` steps of environments, `episode` episodes.

    stage_1: for a method with two stages, the (agent, buffer) of the first; they stand for the others until
    `begin_stage_2`. `stage` is 1 until then, else 2. total_steps: where `global_step` ends, if not at
    --total-timesteps.
    """

    def __init__(self, args, method, agent, buffer, stage_1=None, total_steps=None):
        self.args = args
        self.agent = agent
        self.buffer = buffer
        self.stage = 2
        self._stage_2 = (agent, buffer)
        if stage_1:
            self.stage = 1
            self.agent, self.buffer = stage_1
        self.total_steps = total_steps or args.total_timesteps
        self.device = device(args)
        self.global_step = 0
        self.env_steps = 0
        self.episode = 0
        self.losses = {}
        self.seconds = {"train": 0.0, "eval": 0.0, "save": 0.0}
        self.signal = None  # the one that has asked for an end
        self._check_buffer()
        lengths = [0, 0]  # bytes of metrics.jsonl and train.jsonl that belong to the checkpoint
        if args.resume:
            self._open(method)
            lengths = self._restore(lengths)
        else:
            self._create(method)
        if args.cuda_graph and self.device.type == "cuda":
            agent.update = CudaGraph(agent.update)
        self._saved = self.global_step
        self._last_log = (self.global_step, self.seconds["train"])
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._tracker = _start_tracking(self.directory, lengths) if args.track else None
        print(f"run: {self.directory}")
        self._bar = self._make_bar()
        self._clock = time.perf_counter()

    def _make_bar(self):
        """A line on stderr that says how far the run is: on a terminal every second, in a file every minute."""
        interval = 1 if sys.stderr.isatty() else 60
        layout = "{percentage:3.0f}% {n_fmt}/{total_fmt} [{rate_noinv_fmt}, {remaining} left{postfix}]"
        steps = {"initial": self.global_step, "total": self.total_steps, "unit": " steps"}
        return tqdm(**steps, bar_format=layout, ncols=79, mininterval=interval, maxinterval=interval)

    def _check_buffer(self):
        """Raises TypeError for what a checkpoint cannot hold, now and not when the run is to go on."""
        for name, value in vars(self.buffer).items():
            if not isinstance(value, torch.Tensor | bool | int | float | str | list | tuple | dict | None):
                raise TypeError(f"buffer.{name} is a {type(value).__name__}; checkpoints hold tensors and plain values")

    # The directory

    def _create(self, method):
        """Makes and locks a new directory, which has its config.json from its first moment."""
        args = self.args
        if not re.fullmatch(r"[\w.+-]+", method) or "__" in method:
            fail(f"method_name says {method!r}; a name has letters, digits, and . + - _ (not two _ in a row)")
        task = aib_envs.task_name(args.env_id)
        name = f"{task}__{method}__{args.seed}__{time.time_ns() // 1_000_000}"
        self.config = {"run": name, "script": Path(sys.argv[0]).name, "method": method} | provenance()
        self.config["args"] = saved_args(args)
        self.directory = Path(args.run_dir) / name
        hidden = self.directory.with_name("." + name)
        hidden.mkdir(parents=True)
        write(hidden / "config.json", self.config)
        self._open_lines(hidden, os.O_CREAT)
        hidden.rename(self.directory)

    def _open(self, method):
        """Takes the directory of --resume."""
        self.directory = Path(self.args.resume)
        self.config = read_config(self.directory)
        if not (self.directory / "train.jsonl").exists():
            fail(f"{self.directory} cannot go on: it is a copy without train.jsonl, as in results/")
        check_script(self.directory, self.config, Path(sys.argv[0]), method)
        self._open_lines(self.directory)

    def _open_lines(self, directory, flags=0):
        """Opens metrics.jsonl and train.jsonl to append lines; the first is the run's lock."""

        def opener(path, _):
            return os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o666)

        self._metrics = open(directory / "metrics.jsonl", "a", opener=opener)
        lock(self._metrics)
        self._train = open(directory / "train.jsonl", "a", opener=opener)

    def _restore(self, lengths):
        """Goes on from the checkpoint, or begins anew where there is none yet. Returns the lengths of metrics.jsonl
        and train.jsonl [bytes] that belong to it."""
        checkpoint = self.directory / "checkpoint.pt"
        self._check_extendable(checkpoint.exists())
        if checkpoint.exists():
            with reading(checkpoint, self._anew()):
                state = read_tensors(checkpoint)
                self._check_origin(state["origin"])
                self._load(state)
                lengths = state["lengths"]
        if self.global_step > self.total_steps:
            fail(f"{self.directory} is at step {self.global_step}; --total-timesteps is {self.args.total_timesteps}")
        files = (self._metrics, self._train)
        for file, length in zip(files, lengths, strict=True):
            if os.fstat(file.fileno()).st_size < length:
                fail(f"{file.name} has lost lines since the checkpoint was written{self._anew()}")
        for file, length in zip(files, lengths, strict=True):
            file.truncate(length)  # what was written after the checkpoint will be written again
        self.config["args"] = saved_args(self.args)
        self.config.pop("broke_down", None)
        self.config.setdefault("resumed", []).append({"global_step": self.global_step} | provenance())
        write(self.directory / "config.json", self.config)
        return lengths

    def _check_extendable(self, has_checkpoint):
        """Ends the program with one line if the run has finished and cannot go on, or has lost its checkpoint."""
        results = self.directory / "results.json"
        if results.exists():
            with reading(results, self._anew()):
                done = int(json.loads(results.read_text())["args"]["total_timesteps"])
            text = f"{self.directory} has finished its {done} steps"
            if not has_checkpoint:
                fail(f"{text}; without --keep-checkpoint it cannot be extended")
            if done >= self.args.total_timesteps:
                advice = "; more --total-timesteps extend it" if "total_timesteps" in self.args.free else ""
                fail(f"{text}{advice}")
        elif not has_checkpoint:
            first = self.args.eval_every + aib_envs.get_task(self.args.env_id).steps  # there is one from then on
            if last_metrics(self.directory)["global_step"] >= first:
                fail(f"{self.directory} has lost its checkpoint.pt{self._anew()}")

    def _anew(self):
        return f"; to begin anew, remove {shlex.quote(str(self.directory))}"

    # Checkpoints

    def _origin(self):
        """What a checkpoint must have in common with its run's configuration (dict)."""
        fixed = {name: value for name, value in saved_args(self.args).items() if name not in self.args.free}
        return {"format": FORMAT, "run": self.config["run"], "script": self.config["script"], "args": fixed}

    def _check_origin(self, found):
        """Raises ValueError if the `_origin` in a checkpoint is another run's. A flag that it lacks is newer."""
        for name, wanted in self._origin().items():
            if name == "args":
                wanted = {flag: value for flag, value in wanted.items() if flag in found["args"]}
            if found.get(name) != wanted:
                raise ValueError(f"its {name} should be {wanted}, not {found.get(name)}")

    def _save(self):
        self._check_finite("weight or loss", self.agent.state_dict() | self.losses)
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        state = {
            "origin": self._origin(),
            "progress": [self.global_step, self.env_steps, self.episode],
            "stage": self.stage,
            "losses": self.losses,
            "seconds": self.seconds,
            "lengths": [os.fstat(file.fileno()).st_size for file in (self._metrics, self._train)],
            "agent": self.agent.state_dict(),
            "optimizers": {name: x.state_dict() for name, x in _optimizers(self.agent).items()},
            "buffer": vars(self.buffer),
            "generators": [torch.get_rng_state(), *cuda],
        }
        write(self.directory / "checkpoint.pt", state)
        self._saved = self.global_step
        self._lap("save")

    def _load(self, state):
        self.global_step, self.env_steps, self.episode = state["progress"]
        if state["stage"] == 2:
            self.stage = 2
            self.agent, self.buffer = self._stage_2
        self.losses = state["losses"]
        self.seconds = state["seconds"]
        fit(self.agent, state["agent"], self.directory / "checkpoint.pt")
        for name, optimizer in _optimizers(self.agent).items():
            optimizer.load_state_dict(state["optimizers"][name])
        for name, value in state["buffer"].items():
            setattr(self.buffer, name, value.to(self.device) if torch.is_tensor(value) else value)
        torch.set_rng_state(state["generators"][0])
        if torch.cuda.is_initialized() and state["generators"][1:]:
            torch.cuda.set_rng_state_all(state["generators"][1:])

    # While it goes on

    def _on_signal(self, number, frame):
        """SIGTERM and Ctrl-C ask for an end at the next safe point; after that, Ctrl-C ends at once."""
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        again = "Ctrl-C again" if number == signal.SIGINT else "Ctrl-C"
        text = "\nstopping after this episode, or after the last evaluation. "
        text += f"{again} stops at once, back at step {self._saved}\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # print could meet itself here

    def _lap(self, part):
        """Adds the time since the last lap to `part`."""
        now = time.perf_counter()
        self.seconds[part] += now - self._clock
        self._clock = now

    def _write_line(self, file, values):
        """A line of metrics.jsonl or train.jsonl."""
        file.write(json.dumps({"global_step": self.global_step, "env_steps": self.env_steps} | values) + "\n")
        file.flush()

    def _check_finite(self, kind, tensors):
        """Ends the program if a tensor of {name: tensor} is not finite."""
        for name, x in tensors.items():
            if not x.isfinite().all():
                advice = "A checkpoint, if there is one, is from before that"
                self._break_down(f"step {self.global_step}: the {kind} {name} is not finite", advice)

    def _break_down(self, reason, advice):
        """Ends the program with code 3. config.json has the reason until the run goes on."""
        self.config["broke_down"] = reason
        with contextlib.suppress(OSError):  # on a full disk the reason is printed all the same
            write(self.directory / "config.json", self.config)
        fail(f"{reason}. {advice}", 3)

    def add_env_steps(self, number):
        """Counts steps of environments: those of warm-ups, of random actions, of training."""
        self.env_steps += number
        if self.global_step == 0:
            self._bar.set_postfix_str(f"random steps, in all environments: {self.env_steps:,}", refresh=False)
            self._bar.update(0)  # shows it where a second, or a minute, is over

    def add_losses(self, losses, check=True):
        """Takes the newest losses, {name: tensor []}. With `check`, ends the program if one is not finite. Raises
        TypeError if they are anything else."""
        values = losses.values() if isinstance(losses, dict) else [losses]
        if not all(isinstance(x, torch.Tensor) and x.numel() == 1 for x in values):
            raise TypeError("the losses of a gradient step must be a dict {name: tensor of one number}")
        self.losses |= losses
        if check:
            self._check_finite("loss", self.losses)

    def advance(self, losses):
        """Counts one gradient step. losses: {name: tensor []}."""
        self.add_losses(losses, check=self.device.type == "cpu" or self.global_step % 100 == 0)  # it waits for a GPU
        self.global_step += 1
        self._lap("train")
        if self.global_step == 1:  # it has collected enough
            self._bar.set_postfix_str("", refresh=False)
        if self.global_step % LOG_EVERY == 0:
            self._log_losses()
        self._bar.update()

    def _log_losses(self):
        """A line of train.jsonl, with the names that CleanRL's users filter by. SPS: gradient steps a second."""
        step, seconds = self._last_log
        self._last_log = (self.global_step, self.seconds["train"])
        speed = (self.global_step - step) / (self.seconds["train"] - seconds)
        losses = {name: value.item() for name, value in self.losses.items()}
        line = {"charts/SPS": round(speed, 2)} | {f"losses/{name}": value for name, value in losses.items()}
        self._write_line(self._train, line)
        first_two = list(losses.items())[:2]  # there is room for them
        self._bar.set_postfix_str(", ".join(f"{name} {value:.2g}" for name, value in first_two), refresh=False)

    def end_episode(self, history):
        """After an episode: its returns, a checkpoint where one is due, and the end where a signal has asked for it.

        history: an `aib_envs.History` of the training contexts, in their order."""
        if not history.lengths.any():
            reason = "every simulation diverged at its first step"
            reason += " (its physics failed, or its reward or an observation is not finite)"
            self._break_down(reason, "There is nothing to learn from")
        self.episode += 1
        if self.global_step > 0:
            self._log_returns(history.rewards.sum(1))
        steps = history.rewards.shape[1]
        due = self.global_step // self.args.eval_every > self._saved // self.args.eval_every
        # Of a run that may be extended, the last episode that is sure to be finished
        last = self.args.keep_checkpoint and self.global_step + steps > self.total_steps
        self.safe_point(due or last)

    def begin_stage_2(self, global_step, env_steps):
        """The second stage's agent and buffer take the place of the first's; the counters are set."""
        self.stage = 2
        self.agent, self.buffer = self._stage_2
        self.losses = {}
        self._bar.update(global_step - self.global_step)
        self.global_step = global_step
        self.env_steps = env_steps
        self.safe_point(True)

    def safe_point(self, due):
        """Where a run can go on: a checkpoint if one is `due`, and the end where a signal has asked for it."""
        if self.signal or due:
            self._save()
        if self.signal and self.global_step < self.total_steps:
            command = shlex.join(["python", sys.argv[0], "--resume", str(self.directory)])
            fail(f"at step {self.global_step}; go on with: {command}", 128 + self.signal)

    def _log_returns(self, returns):
        """Mean return of a training episode over the contexts [n], and over those of the worse mode."""
        modes = _modes_of(self.args.env_id, aib_envs.context_set(self.args.env_id, "train"))
        worst = min(returns[modes == mode].mean() for mode in set(modes))
        values = {"charts/episodic_return": returns.mean(), "charts/episodic_return_worst_mode": worst}
        self._write_line(self._train, {name: round(float(value), 4) for name, value in values.items()})

    def log_evaluation(self, returns, diverged, diagnostics=None):
        """Writes and shows one evaluation. returns, diverged: [60, rollouts], of `aib_envs.evaluate` in
        `aib_envs.eval_contexts`. diagnostics: {name: number}."""
        self._check_finite("weight", self.agent.state_dict())
        by_split = aib_envs.by_split(returns)
        metrics = {
            "aer": {split: values.mean() for split, values in by_split.items()},  # average episodic return
            "returns": {split: values.mean(1).tolist() for split, values in by_split.items()},  # in each context
            "diverged": {split: int(x.sum()) for split, x in aib_envs.by_split(diverged).items()},  # simulations
        }
        self.log(metrics | (diagnostics or {}), aer_text(returns, diverged))

    def log(self, metrics, text):
        """Writes `metrics`, {name: plain value}, with losses and times as a line of metrics.jsonl, and shows `text`."""
        self._lap("eval")
        more = {
            "losses": {name: loss.item() for name, loss in self.losses.items()},
            "seconds": {part: round(value, 2) for part, value in self.seconds.items()},
        }
        self._write_line(self._metrics, metrics | more)
        self._bar.write(f"step {self.global_step}: {text}", file=sys.stdout)

    def finish(self, returns, diverged, diagnostics=None, **more):
        """The last evaluation: logs it, writes agent.pt and results.json. Then the run is finished.

        more: plain values that go into results.json, too."""
        self.log_evaluation(returns, diverged, diagnostics)
        self._bar.close()
        contexts = {split: aib_envs.context_set(self.args.env_id, split) for split in aib_envs.SPLITS}
        results = {
            "method": self.config["method"],
            "args": self.config["args"],
            "contexts": contexts,
            "returns": {split: x.tolist() for split, x in aib_envs.by_split(returns).items()},  # [20, rollouts]
            "diverged": {split: x.tolist() for split, x in aib_envs.by_split(diverged).items()},
        }
        results |= more
        (self.directory / "results.json").unlink(missing_ok=True)  # an extended run's are not those of this agent
        write(self.directory / "agent.pt", self.agent.state_dict())
        write(self.directory / "results.json", results)
        if not self.args.keep_checkpoint:
            (self.directory / "checkpoint.pt").unlink(missing_ok=True)
        print(f"results: {self.directory / 'results.json'}")

    def close(self):
        """Waits until Weights & Biases has got everything, a minute at most."""
        if self._tracker:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._tracker.communicate(timeout=60)


def _modes_of(env_id, contexts):
    """Which of the task's modes each context [n] is of: its place in `aib_envs.modes`."""
    modes = aib_envs.modes(env_id)
    return np.array([[mode.items() <= context.items() for mode in modes].index(True) for context in contexts])


def _optimizers(agent):
    """{name: optimizer or learning rate scheduler} of an agent."""
    kinds = torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler
    return {name: x for name, x in vars(agent).items() if isinstance(x, kinds)}


def aer_text(returns, diverged):
    """An evaluation in words: the average episodic return of each set. Both [60, rollouts]."""
    aer = ", ".join(f"{split} {values.mean():.1f}" for split, values in aib_envs.by_split(returns).items())
    if diverged.any():
        aer += f" ({diverged.sum()} of {diverged.size} simulations diverged)"
    return f"AER {aer}"


class CudaGraph:
    """A function of tensors on a GPU that is recorded as a CUDA graph after three calls and replayed from then on, so
    that no time goes into launching its kernels one by one. What it returns is overwritten by its next call with the
    same bools; no Python of it runs then.

    Arguments: tensors, tuples of tensors, and bools; each combination of bools has a graph of its own. Shapes must not
    change, and nothing may wait for the GPU. The first three calls are made as usual.
    """

    def __init__(self, function):
        self.function = function
        self.calls = collections.Counter()
        self.graphs = {}
        self.stream = torch.cuda.Stream()

    def __call__(self, *args):
        key = tuple(x for x in args if isinstance(x, bool))
        if key not in self.graphs and self.calls[key] < 3:
            self.calls[key] += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                out = self.function(*args)
            torch.cuda.current_stream().wait_stream(self.stream)
            return out
        if key not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            inputs = self._copy(args)
            with torch.cuda.graph(graph, stream=self.stream):  # recorded, not run
                out = self.function(*inputs)
            self.graphs[key] = graph, inputs, out
        graph, inputs, out = self.graphs[key]
        self._copy(args, inputs)
        graph.replay()
        return out

    def _copy(self, args, into=None):
        """Copies of the tensors in `args`, or their values into those of earlier copies."""
        if isinstance(args, tuple):
            return tuple(self._copy(x, into and into[i]) for i, x in enumerate(args))
        if isinstance(args, bool):
            return args
        return args.clone() if into is None else into.copy_(args)


# -------------------------------------------------- Looking at an agent -----------------------------------------------


def load_weights(agent, directory):
    """Puts the weights of a run into its agent: those of agent.pt, or if it has not finished those of checkpoint.pt.
    Returns the step of an unfinished run, else None; ends the program with one line if there are no weights."""
    weights = directory / "agent.pt"
    checkpoint = directory / "checkpoint.pt"
    if weights.exists() and (is_finished(directory) or not checkpoint.exists()):
        with reading(weights):
            fit(agent, read_tensors(weights), weights)
        return None
    if not checkpoint.exists():
        fail(f"{directory} has neither agent.pt nor, yet, checkpoint.pt")
    with reading(checkpoint):
        state = read_tensors(checkpoint)
        fit(agent, state["agent"], checkpoint)
        return state["progress"][0]


def is_finished(directory):
    """Are the results of all its steps there? A run that is being extended has those of fewer."""
    paths = [directory / "results.json", directory / "config.json"]
    if not paths[0].exists():
        return False
    with reading(paths[0]):
        steps = [json.loads(path.read_text())["args"].get("total_timesteps") for path in paths]
    return steps[0] == steps[1]


def load_script(name):
    """The module of a script, by its file name. Raises ValueError if there is none in the root, in relatives/ and in
    the working directory."""
    for folder in (ROOT, ROOT / "relatives", Path.cwd()):
        if (folder / name).exists():
            if str(folder) not in sys.path:
                sys.path.append(str(folder))  # for what it imports from its own folder
            spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), folder / name)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            return module
    raise ValueError(f"there is no {name} in {ROOT}, its relatives/ and the working directory; start beside it")


def load_agent(directory):
    """The agent of a run of any script: agent, args, and its script's make_envs(args, contexts, **options)."""
    directory = Path(directory)
    config = any_config(directory)
    with reading(directory / "config.json"):
        module = load_script(config["script"])
    args = args_of(module.Args, directory, config)
    check_args(args)
    check_script(directory, config, Path(module.__file__), module.method_name(args))
    agent = module.make_agent(args, module.make_envs(args, [{}]))
    load_weights(agent, directory)
    return agent, args, module.make_envs


def evaluate_only(args, make_envs, agent, unfinished_at):
    """Repeats the last evaluation of a run, or rolls out in the one --context, and prints what comes out."""
    contexts = [args.context] if args.context else aib_envs.eval_contexts(args.env_id)
    envs = make_envs(args, contexts)
    returns, diverged = aib_envs.evaluate(envs, agent.act, agent.window_size, args.eval_rollouts)
    text = aer_text(returns, diverged) if not args.context else ""
    if args.context:
        text = f"{in_words(args.context)}: return {returns.mean():.1f}"
        text += f", from {returns.min():.1f} to {returns.max():.1f} in {args.eval_rollouts} episodes"
        if diverged.any():
            text += f" ({diverged.sum()} diverged)"
    if unfinished_at is not None:
        text += f" (unfinished, at step {unfinished_at})"
    print(text)


def in_words(context):
    """{"length": 1.1, "inversion": -1} -> "length 1.1, actuators reversed"; {"inversion_x": -1} -> "x reversed"."""
    words = {("permutation", 1): "actuators swapped", ("permutation", 0): "actuators normal"}
    for key in context:
        if key.startswith("inversion"):
            part = key.removeprefix("inversion").replace("_", " ").strip() or "actuators"
            words |= {(key, -1): f"{part} reversed", (key, 1): f"{part} normal"}
    return ", ".join(words.get((key, value), f"{key} {value:g}") for key, value in context.items())


FRAMES = 200  # pictures of a video, at most


def film(envs, agent, flip_at=None, title=""):
    """One rollout of an agent, without the warm-up. Returns a list of pictures, uint8 [height, width, 3], environments
    side by side, and the rewards [environments, steps]. Every picture says task (or `title`), context, time and the
    return so far. At step `flip_at` the actuators are reversed (or swapped)."""
    frames = []
    rewards = None

    def policy(obs, history):
        nonlocal rewards
        rewards = history.rewards  # which the rollout fills
        t = history.t
        steps = history.rewards.shape[1]
        if flip_at is not None and t == flip_at:
            for env in envs.envs:
                env.unwrapped.flip()
        if t >= 0 and t % -(-steps // FRAMES) == 0:
            so_far = history.rewards[:, :t].sum(1)
            pictures = zip(envs.envs, so_far, strict=True)
            frames.append(np.hstack([_labelled(env.unwrapped, title, t, x) for env, x in pictures]))
        return agent.act(obs, history)

    aib_envs.evaluate(envs, policy, agent.window_size, rollouts=1)
    return frames, rewards


def _labelled(env, title, t, so_far):
    """A picture of an environment, uint8 [height, width, 3], with a line above it, which is red while the actuators are
    reversed or swapped, and one below it."""
    from PIL import Image, ImageDraw

    picture = env.render()
    height, width, _ = picture.shape
    band = 26
    image = Image.new("RGB", (width, height + 2 * band), "white")
    image.paste(Image.fromarray(picture), (0, band))
    draw = ImageDraw.Draw(image)
    context = in_words(env.context)
    changed = "reversed" in context or "swapped" in context
    draw.rectangle((0, 0, width, band - 1), fill="#b3001b" if changed else "#e8e8e8")
    above = f"{title or env.env_id}: {context}"
    _write_text(draw, (7, band / 2), above, width - 14, "white" if changed else "black", "lm")
    _write_text(draw, (7, height + 1.5 * band), f"step {t}", width / 2, "black", "lm")
    _write_text(draw, (width - 7, height + 1.5 * band), f"return {so_far:.0f}", width / 2, "black", "rm")
    return np.asarray(image)


def _write_text(draw, place, text, width, fill, anchor):
    """A line of text, smaller or cut where it is wider than `width` pixels."""
    from PIL import ImageFont

    for size in range(16, 10, -1):
        font = ImageFont.load_default(size)
        if draw.textlength(text, font) <= width:
            break
    while draw.textlength(text, font) > width:
        text = text.rstrip("…")[:-1] + "…"
    draw.text(place, text, fill=fill, font=font, anchor=anchor)


def write_gif(path, frames):
    """Writes pictures, uint8 [height, width, 3], as an animated GIF, 20 a second. One palette makes it small."""
    from PIL import Image

    sample = np.vstack(frames[:: max(1, len(frames) // 10)])
    palette = Image.fromarray(sample).quantize(128)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    images[0].save(path, "GIF", save_all=True, append_images=images[1:], duration=50, loop=0)


# ------------------------------------------------------- Tracking -----------------------------------------------------


def _start_tracking(directory, lengths):
    """Starts a process that sends the run's metrics to Weights & Biases until the run ends: a process of its own, so
    that nothing that goes wrong there can end or block the run. lengths: what is sent already, see `Run._restore`."""
    command = [sys.executable, __file__, "track", str(directory), *map(str, lengths)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def track(directory, lengths):
    """Sends metrics.jsonl and train.jsonl, from `lengths` [bytes] on and as they grow, and the video, until stdin is
    closed. What a resumed run writes again is sent again: the same points."""
    logging.raiseExceptions = False  # wandb's own log may find its disk full
    try:
        import wandb

        config = json.loads((directory / "config.json").read_text())
        settings = wandb.Settings(init_timeout=20, finish_timeout=40)
        where = os.environ.get("WANDB_DIR", directory)
        options = {"config": config, "dir": where, "resume": "allow", "settings": settings}
        tracked = wandb.init(project="dmash", id=config["run"], name=config["run"], **options)
        tracked.define_metric("*", step_metric="global_step")  # two files, whose steps interleave
        files = [open(directory / name) for name in ("metrics.jsonl", "train.jsonl")]
        for file, length in zip(files, lengths, strict=True):
            file.seek(length)
        over = False
        while not over:
            over = bool(select.select([sys.stdin], [], [], 1.0)[0])  # the end of stdin: the run has ended
            for line in (line for file in files for line in whole_lines(file)):
                tracked.log(json.loads(line))
        if (directory / "video.gif").exists():
            tracked.log({"video": wandb.Video(str(directory / "video.gif"))})
        tracked.finish()
    except Exception as error:
        fail(f"Weights & Biases gets nothing more of {directory}, which goes on: {str(error).partition(chr(10))[0]}")


def whole_lines(file):
    """The lines that an open file has got since the last call, without one that is just being written."""
    while True:
        place = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(place)
            return
        yield line


if __name__ == "__main__":
    if sys.argv[1:2] == ["track"] and len(sys.argv) == 5:
        track(Path(sys.argv[2]), [int(length) for length in sys.argv[3:]])
    else:
        fail("usage: aib_run.py track runs/<directory> 0 0, which --track does")
