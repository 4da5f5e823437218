"""The life of a run: command line, directory, checkpoint, signals, progress, tracking, video.

Every script uses it, and it knows nothing about any method. In a script it looks like this:

    run = aib_run.Run(args, method_name(args), agent, buffer)  # goes on from its checkpoint, if it has one
    run.advance(losses)                                        # after every gradient step
    run.log_evaluation(returns, diverged, diagnostics)         # now and then
    run.end_episode(history)                                   # a checkpoint where one is due; ends here on Ctrl-C
    run.finish(returns, diverged)                              # agent.pt, results.json

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
    """What a number on the command line may be. It stands at the field: `gamma: aib_run.Fraction = 0.99`."""

    low: float
    high: float


Fraction = typing.Annotated[float, Bounds(0, 1)]
Count = typing.Annotated[int, Bounds(1, 2**32 - 1)]
Seed = typing.Annotated[int, Bounds(0, 2**32 - 1)]


# What may be given again with --resume and --eval-only, since it does not change what is learned.
FREE = {
    *("total_timesteps", "eval_rollouts", "cuda", "cuda_graph", "keep_checkpoint"),
    *("capture_video", "flip_at", "track", "resume", "eval_only", "context"),
}


@dataclasses.dataclass
class Args:
    """The flags that every script has. A script adds its own. `free` is no flag: it is a script's own `FREE`."""

    free = FREE

    env_id: str = "DI"  # the task: DI, DI-Friction, DI-Perm, ODE, Cartpole, Cheetah, Reacher-E, ... (docs/benchmark.md)
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


NOT_SAVED = {"resume", "eval_only", "context"}  # they are about this call, not about the run


def fail(message, code=2):
    """Ends the program with one line. Codes: 2 where the user has to change something, 3 where learning broke down."""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()  # so that the message is the last line
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


def flag(name):
    return "--" + name.replace("_", "-")


def plain(value):
    """`value` as JSON can hold it: enum members by name, paths as text, tuples as lists."""
    return json.loads(json.dumps(value, default=lambda x: x.name if isinstance(x, enum.Enum) else str(x)))


def saved_args(args):
    """The arguments of a run as config.json holds them."""
    return plain({name: value for name, value in dataclasses.asdict(args).items() if name not in NOT_SAVED})


def as_flags(cls, saved, prefix=""):
    """The command line that makes a dataclass `cls` from what `saved_args` returned."""
    hints = typing.get_type_hints(cls)
    flags = []
    for name, value in saved.items():
        if name not in hints:
            raise ValueError(f"this script has no {flag(prefix + name)} any more")
        if dataclasses.is_dataclass(hints[name]):
            flags += as_flags(hints[name], value, f"{prefix}{name}.")
        elif hints[name] is bool:
            flags.append(flag(prefix + name) if value else flag(f"{prefix}no_{name}"))
        elif isinstance(value, list | dict):
            pairs = value.items() if isinstance(value, dict) else value
            flags += [flag(prefix + name), *map(str, np.ravel(list(pairs)).tolist())]
        else:
            flags.append(f"{flag(prefix + name)}={value}")
    return flags


def read_flags(cls, argv, description=None):
    """`tyro.cli`, but for a wrong flag one line instead of tyro's box."""
    console = io.StringIO()
    try:
        with contextlib.redirect_stderr(console):
            return tyro.cli(cls, args=argv, description=description)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│╰╯─ ") for line in console.getvalue().splitlines()[1:]]  # a box below its title
        fail(" ".join(line for line in lines if line.strip("-")))  # "-" is what "─" is without Unicode


def parse_args(cls, argv=None, description=None):
    """An instance of the dataclass `cls` from a command line, checked; ends the program with one line if it is wrong.

    With --resume and --eval-only the arguments of that run are the defaults, and only `cls.free` may change.
    `total_timesteps` None becomes the task's own; `context`, a tuple of "key=value", becomes a dict or None.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = read_flags(cls, argv, description)
    if "" in (args.resume, args.eval_only):
        fail("--resume and --eval-only take the directory of a run; got nothing")
    if args.eval_only and (args.resume or args.track):
        fail("--eval-only goes neither with --resume nor with --track")
    if args.context and not args.eval_only:
        fail("--context needs --eval-only")
    directory = args.resume or args.eval_only
    if directory:
        args = _args_of_run(cls, directory, argv, description)
    _check(cls, args)
    return args


def _args_of_run(cls, directory, argv, description):
    """The arguments of the run in `directory`, with what the command line may change."""
    config = read_config(directory)
    try:
        saved = as_flags(cls, config["args"])
    except ValueError as error:
        fail(f"{directory}: {error}; the run is of commit {config.get('commit') or 'unknown'}")
    old = read_flags(cls, saved)
    new = read_flags(cls, [*saved, *argv], description)
    for name in vars(new).keys() - cls.free:
        if getattr(new, name) != getattr(old, name):
            allowed = " ".join(flag(name) for name in sorted(cls.free))
            fail(f"{directory} has {flag(name)} {getattr(old, name)}; what can change is {allowed}")
    return new


def _check(cls, args):
    """Bounds, the task, and the --context."""
    try:
        task = aib_envs.get_task(args.env_id)
        args.context = _read_context(args.env_id, args.context)
    except ValueError as error:
        fail(error)
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        for part in (hint, *typing.get_args(hint)):  # Count, or the Count in Count | None
            for bounds in getattr(part, "__metadata__", ()):
                value = getattr(args, name)
                if isinstance(bounds, Bounds) and value is not None and not bounds.low <= value <= bounds.high:
                    fail(f"{flag(name)} must be from {bounds.low} to {bounds.high}; got {value}")
    if args.total_timesteps is None:
        args.total_timesteps = task.total_timesteps
    if args.flip_at and not args.capture_video:
        fail("--flip-at needs --capture-video")
    if args.flip_at and aib_envs.modes(args.env_id) == [{}]:
        fail(f"--flip-at reverses or swaps actuators, which {args.env_id} cannot")
    if args.track and not importlib.util.find_spec("wandb"):
        fail("--track needs Weights & Biases: pip install wandb")
    args.run_dir = os.path.expanduser(args.run_dir)


def _read_context(env_id, pairs):
    """("length=1.1", "inversion=-1") as a complete context (dict), or None."""
    if not pairs:
        return None
    context = dict(pair.split("=") for pair in pairs if re.fullmatch(r"\w+=[-+.\w]+", pair))
    if len(context) < len(pairs):
        raise ValueError(f"--context takes key=value, each key once; got {' '.join(pairs)}")
    return aib_envs.complete_context(env_id, {key: float(value) for key, value in context.items()})


def main(cls, train, make_envs, make_agent):
    """What a script does when it is started: trains, or with --eval-only evaluates a trained agent.

    cls: its dataclass of arguments. train(args) -> Run. make_envs(args, contexts, **options) -> vector environment.
    make_agent(args, envs) -> agent with `act` and `window_size`. The script's docstring is what --help begins with.
    """
    sys.stdout, sys.stderr = Terminal(sys.stdout), Terminal(sys.stderr)
    sys.excepthook = _on_error
    args = parse_args(cls, description=sys.modules["__main__"].__doc__)
    if args.capture_video:  # before hours of training
        envs = make_envs(args, [{}], render_mode="rgb_array")
        envs.reset(seed=0)
        envs.render()
    if args.eval_only:
        agent, step = load_weights(make_agent(args, make_envs(args, [{}])), args.eval_only)
        evaluate_only(args, make_envs, agent, step)
        directory = Path(args.eval_only)
    else:
        run = train(args)
        agent, directory = run.agent, run.directory
    if args.capture_video:
        contexts = [args.context] if args.context else aib_envs.modes(args.env_id)
        frames = film(make_envs(args, contexts, render_mode="rgb_array"), agent, args.flip_at)
        write_gif(directory / "video.gif", frames)
        print(f"video: {directory / 'video.gif'}")
    if not args.eval_only:
        run.close()


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


class Terminal:
    """stdout or stderr, which may go away (a closed pipe, a full disk) without ending the run."""

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
        except OSError:  # from now on into the void
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def device(args):
    """Where to learn: on the GPU if there is one and --cuda, else on the CPU."""
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
                file.write((content if isinstance(content, str) else json.dumps(content, indent=1)).encode())
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
def reading(path):
    """Ends the program with one line if `path` is not what is expected there; torch's errors are of many kinds."""
    try:
        yield path
    except Exception as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        fail(f"cannot use {path}: {type(error).__name__}: {reason}")


def read_tensors(path):
    """What `write` has put into a .pt file. Nothing but tensors and plain values is unpickled."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file) or zipfile.ZipFile(file).testzip():  # by checksums, which torch ignores
            raise ValueError("it is damaged, or no file of this kind")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_config(directory, script=None):
    """The config.json of a run of this script (dict); ends the program with one line if there is none."""
    script = script or Path(sys.argv[0]).name
    with reading(Path(directory) / "config.json") as path:
        config = json.loads(path.read_text())
        if config["script"] != script:
            raise ValueError(f"this is a run of {config['script']}")
        if not isinstance(config["args"], dict):
            raise ValueError("args must be an object")
        return config | {"run": str(config["run"]), "method": str(config["method"])}


def has_checkpoint(args):
    """Does --resume name a run that goes on from a checkpoint?"""
    return args.resume is not None and (Path(args.resume) / "checkpoint.pt").exists()


def last_metrics(directory):
    """The last whole line of a run's metrics.jsonl (dict)."""
    with contextlib.suppress(OSError):
        for line in reversed((Path(directory) / "metrics.jsonl").read_text().splitlines()):
            with contextlib.suppress(ValueError):
                return json.loads(line)
    return {"global_step": 0, "seconds": {}}


def git(*command):
    """What git says of the directory of these scripts; raises OSError or CalledProcessError."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip()


def provenance():
    """What a run's bits depend on, besides its arguments: packages, commit, script, threads, processor, GPU."""
    script = Path(sys.argv[0])
    files = [script, ROOT / "aib_envs.py", ROOT / "aib_run.py"]
    packages = ("torch", "numpy", "mujoco", "dm_control", "gymnasium")
    try:
        commit = git("rev-parse", "HEAD")
        changed = bool(git("status", "--porcelain", "--", *(str(path.resolve()) for path in files)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().partition("\n")[0]
        commit, changed = f"unknown ({reason})", None
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit,
        "changed": changed,  # do script, aib_envs.py and aib_run.py differ from that commit?
        "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest() if script.exists() else "",
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else "",
    }


def lock(path):
    """Opens a run's metrics.jsonl for appending. While it is open, no other process can open it so. A file system
    without locks gets one warning."""
    file = open(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666), "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{path.parent} is in use by another process")
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        print(f"{path.parent}: this file system has no locks; start no second process on this run", file=sys.stderr)
    return file


def check_finite(kind, tensors, global_step):
    """Ends the program with code 3 if a tensor of {name: tensor} is not finite."""
    for name, x in tensors.items():
        if not x.isfinite().all():
            fail(f"step {global_step}: the {kind} {name} is not finite. The last checkpoint is from before that", 3)


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
        self.global_step = 0
        self.env_steps = 0
        self.episode = 0
        self.losses = {}
        self.seconds = {"train": 0.0, "eval": 0.0, "save": 0.0}
        self.signal = None  # the one that has asked for an end
        self._clock = time.perf_counter()
        self._open(method)
        self._restore()
        write(self.directory / "config.json", self.config)
        if args.cuda_graph and device(args).type == "cuda":
            agent.update = CudaGraph(agent.update)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a lost terminal does not end a run
        self._tracker = _start_tracking(self.directory) if args.track else None
        self._saved = self.global_step
        self._last_log = (self.global_step, self.seconds["train"])
        self._bar = tqdm(initial=self.global_step, total=self.total_steps, unit="update", mininterval=5)
        self._bar.set_description(self.directory.name.rpartition("__")[0])

    # The directory

    def _open(self, method):
        """Makes a new directory, or takes that of --resume, and locks it."""
        args = self.args
        if args.resume:
            self.directory = Path(args.resume)
            self.config = read_config(args.resume)
            self._metrics = lock(self.directory / "metrics.jsonl")
        else:
            name = f"{args.env_id}__{method}__{args.seed}__{time.time_ns() // 1_000_000}"
            self.directory = Path(args.run_dir) / name
            self.config = {"run": name, "script": Path(sys.argv[0]).name, "method": method} | provenance()
            self.config["args"] = saved_args(args)
            hidden = self.directory.with_name("." + name)  # a run has its config.json from the first moment
            hidden.mkdir(parents=True)
            write(hidden / "config.json", self.config)
            hidden.rename(self.directory)
            self._metrics = lock(self.directory / "metrics.jsonl")
        self._train = open(self.directory / "train.jsonl", "a")

    def _restore(self):
        """Goes on from the checkpoint of --resume, or begins anew where there is none yet."""
        checkpoint = self.directory / "checkpoint.pt"
        lengths = [0, 0]  # bytes of metrics.jsonl and train.jsonl that belong to the checkpoint
        self._check_finished(checkpoint)
        if checkpoint.exists():
            with reading(checkpoint):
                state = read_tensors(checkpoint)
                self._check_origin(state["origin"])
                self._load(state)
                lengths = state["lengths"]
        if self.args.resume:
            self.config["args"] = saved_args(self.args)
            self.config.setdefault("resumed", []).append({"global_step": self.global_step} | provenance())
        if self.global_step > self.total_steps:
            fail(f"{self.directory} is at step {self.global_step}; --total-timesteps is {self.args.total_timesteps}")
        for file, length in zip((self._metrics, self._train), lengths, strict=True):
            if os.path.getsize(file.name if isinstance(file.name, str) else file.fileno()) < length:
                fail(f"{self.directory} has lost lines of metrics.jsonl or train.jsonl since its checkpoint")
            file.truncate(length)  # what was written after the checkpoint will be written again

    def _check_finished(self, checkpoint):
        """Ends the program if a finished run cannot be extended, or a checkpoint is lost."""
        results = self.directory / "results.json"
        if results.exists():
            with reading(results):
                done = int(json.loads(results.read_text())["args"]["total_timesteps"])
            if done >= self.args.total_timesteps:
                advice = "; more --total-timesteps extend it" if "total_timesteps" in self.args.free else ""
                fail(f"{self.directory} has finished its {done} steps{advice}")
            if not checkpoint.exists():
                fail(f"{self.directory} has finished without --keep-checkpoint, so it cannot be extended")
        elif not checkpoint.exists():
            first = self.args.eval_every + aib_envs.get_task(self.args.env_id).steps  # there is one from then on
            if last_metrics(self.directory)["global_step"] >= first:
                fail(f"{self.directory} has lost its checkpoint.pt")

    def _origin(self):
        """What a checkpoint must have in common with its run's configuration."""
        fixed = {name: value for name, value in saved_args(self.args).items() if name not in self.args.free}
        return {"run": self.config["run"], "script": self.config["script"], "format": FORMAT, "args": fixed}

    def _check_origin(self, found):
        """Raises ValueError if the `_origin` in a checkpoint is another run's. Flags that it lacks are newer."""
        wanted = self._origin()
        wanted["args"] = {name: value for name, value in wanted["args"].items() if name in found.get("args", {})}
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(f"its {name} should be {value}, not {found.get(name)}")

    # Checkpoints

    def _save(self):
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
        self.agent.load_state_dict(state["agent"])
        for name, optimizer in _optimizers(self.agent).items():
            optimizer.load_state_dict(state["optimizers"][name])
        where = device(self.args)
        for name, value in state["buffer"].items():
            setattr(self.buffer, name, value.to(where) if torch.is_tensor(value) else value)
        torch.set_rng_state(state["generators"][0])
        if torch.cuda.is_initialized():
            torch.cuda.set_rng_state_all(state["generators"][1:])

    # While it goes on

    def _on_signal(self, number, frame):
        """SIGTERM and Ctrl-C ask for an end at the next safe point; after that, Ctrl-C ends at once."""
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        text = f"\nstopping at the end of this episode. Ctrl-C again stops at once, back at step {self._saved}\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())

    def _lap(self, part):
        """Adds the time since the last lap to `part`."""
        now = time.perf_counter()
        self.seconds[part] += now - self._clock
        self._clock = now

    def add_env_steps(self, number):
        """Counts steps of environments: those of warm-ups, of random actions, of training."""
        self.env_steps += number
        if self.global_step == 0:
            self._bar.set_postfix_str(f"collecting random steps: {self.env_steps:,}", refresh=False)
            self._bar.update(0)

    def add_losses(self, losses, check=True):
        """Takes the newest losses, {name: tensor []}. With `check`, ends the program if one is not finite."""
        self.losses |= losses
        if check:
            check_finite("loss", self.losses, self.global_step)

    def advance(self, losses):
        """Counts one gradient step. losses: {name: tensor []}."""
        waits = device(self.args).type != "cpu"  # a check waits for a GPU
        self.add_losses(losses, check=not waits or self.global_step % 100 == 0)
        self.global_step += 1
        self._bar.update()
        self._lap("train")
        if self.global_step % LOG_EVERY == 0:
            self._log_losses()

    def _log_losses(self):
        """A line of train.jsonl, with the names that CleanRL's users filter by."""
        step, seconds = self._last_log
        self._last_log = (self.global_step, self.seconds["train"])
        speed = (self.global_step - step) / (self.seconds["train"] - seconds)
        losses = {f"losses/{name}": value.item() for name, value in self.losses.items()}
        self._write_line(self._train, {"charts/SPS": round(speed, 2)} | losses)
        self._bar.set_postfix_str(", ".join(f"{name[7:]} {value:.3g}" for name, value in losses.items()), refresh=False)

    def _write_line(self, file, values):
        file.write(json.dumps({"global_step": self.global_step, "env_steps": self.env_steps} | values) + "\n")
        file.flush()

    def end_episode(self, history):
        """After an episode: its returns, a checkpoint where one is due, and the end where a signal has asked for it.

        history: an `aib_envs.History` of the training contexts, in their order."""
        if not history.lengths.any():
            fail("every simulation diverged at its first step: there is nothing to learn from", 3)
        self.episode += 1
        if self.global_step > 0:
            self._log_returns(history.rewards.sum(1))
        crossed = self.global_step // self.args.eval_every > self._saved // self.args.eval_every
        last = self.args.keep_checkpoint and self.global_step + history.rewards.shape[1] > self.total_steps
        self.safe_point(crossed or last)

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
            check_finite("weight or loss", self.agent.state_dict() | self.losses, self.global_step)
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
        check_finite("weight", self.agent.state_dict(), self.global_step)
        self._lap("eval")
        by_split = aib_envs.by_split(returns)
        aer = {split: values.mean() for split, values in by_split.items()}
        metrics = {
            "aer": aer,  # average episodic return of each context set
            "returns": {split: values.mean(1).tolist() for split, values in by_split.items()},
        }
        if diverged.any():
            metrics["diverged"] = {split: int(x.sum()) for split, x in aib_envs.by_split(diverged).items()}
        text = ", ".join(f"{split} {value:.1f}" for split, value in aer.items())
        self.log(metrics | (diagnostics or {}), f"AER {text}")

    def log(self, metrics, text):
        """Writes `metrics`, {name: plain value}, with losses and times as a line of metrics.jsonl, and shows `text`."""
        self._lap("eval")
        more = {
            "losses": {name: loss.item() for name, loss in self.losses.items()},
            "seconds": {part: round(value, 2) for part, value in self.seconds.items()},
        }
        self._write_line(self._metrics, metrics | more)
        self._bar.write(f"step {self.global_step}: {text}", file=sys.stdout)
        self._lap("eval")

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
        } | more
        (self.directory / "results.json").unlink(missing_ok=True)  # an extended run has old ones: never two of a kind
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
    """The value of the task's binary dimension in each context [n]; 0 where it has none."""
    binary = [dimension.key for dimension in aib_envs.get_task(env_id).dimensions if dimension.values]
    return np.array([context[binary[0]] if binary else 0 for context in contexts])


def _optimizers(agent):
    return {name: x for name, x in vars(agent).items() if isinstance(x, torch.optim.Optimizer)}


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
    """Puts the weights of a run into its agent. Returns agent and the step that they are of, None if finished."""
    directory = Path(directory)
    step = None
    if (directory / "agent.pt").exists() or not (directory / "checkpoint.pt").exists():
        with reading(directory / "agent.pt") as path:
            agent.load_state_dict(read_tensors(path))
    else:
        with reading(directory / "checkpoint.pt") as path:
            state = read_tensors(path)
            agent.load_state_dict(state["agent"])
            step = state["progress"][0]
    return agent, step


def load_script(name):
    """The module of a script, by its file name."""
    for folder in (ROOT, ROOT / "relatives", Path.cwd()):
        if (folder / name).exists():
            if str(folder) not in sys.path:
                sys.path.append(str(folder))  # for what it imports from its own folder
            spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), folder / name)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            return module
    raise ValueError(f"there is no script {name}")


def load_agent(directory):
    """The agent of a run: agent, args, and make_envs(args, contexts, **options) of its script."""
    with reading(Path(directory) / "config.json") as path:
        script = json.loads(path.read_text())["script"]
        module = load_script(script)
        saved = as_flags(module.Args, read_config(directory, script)["args"])
    args = parse_args(module.Args, saved)
    agent = module.make_agent(args, module.make_envs(args, [{}]))
    return load_weights(agent, directory)[0], args, module.make_envs


def evaluate_only(args, make_envs, agent, step):
    """Repeats the last evaluation of a run, or rolls out in the one --context."""
    note = "" if step is None else f" (unfinished, at step {step})"
    contexts = [args.context] if args.context else aib_envs.eval_contexts(args.env_id)
    envs = make_envs(args, contexts)
    returns, diverged = aib_envs.evaluate(envs, agent.act, agent.window_size, args.eval_rollouts)
    if args.context:
        print(f"{args.context}: return {returns.mean():.1f}, from {returns.min():.1f} to {returns.max():.1f}{note}")
    else:
        aer = {split: values.mean() for split, values in aib_envs.by_split(returns).items()}
        print("AER " + ", ".join(f"{split} {value:.1f}" for split, value in aer.items()) + note)
    if diverged.any():
        print(f"{diverged.sum()} of {diverged.size} simulations diverged")


def in_words(context):
    """{"length": 1.1, "inversion": -1} -> "length 1.1, actuators reversed"."""
    words = {("inversion", -1): "actuators reversed", ("inversion", 1): "actuators normal"}
    words |= {("permutation", 1): "actuators swapped", ("permutation", 0): "actuators normal"}
    return ", ".join(words.get((key, value), f"{key} {value:g}") for key, value in context.items())


def film(envs, agent, flip_at=None, title="", num_frames=200):
    """One rollout of an agent as a list of pictures: uint8 [height, width, 3], environments side by side, without the
    warm-up. Every picture says task, context, time and the return so far. At step `flip_at` the actuators are reversed
    (or swapped), and the pictures say so."""
    frames = []

    def policy(obs, history):
        t, steps = history.t, history.rewards.shape[1]
        if flip_at is not None and t == flip_at:
            for env in envs.envs:
                env.unwrapped.flip()
        if t >= 0 and t % -(-steps // num_frames) == 0:
            pictures = []
            for env, rewards in zip(envs.envs, history.rewards, strict=True):
                flipped = flip_at is not None and flip_at <= t < flip_at + steps // 5
                pictures.append(_labelled(env.unwrapped, title, t, rewards[:t].sum(), flipped))
            frames.append(np.hstack(pictures))
        return agent.act(obs, history)

    aib_envs.evaluate(envs, policy, agent.window_size, rollouts=1)
    return frames


def _labelled(env, title, t, so_far, flipped):
    """A picture of an environment with a line above it and one below it."""
    from PIL import Image, ImageDraw, ImageFont

    picture = env.render()
    height, width, _ = picture.shape
    image = Image.new("RGB", (width, height + 44), "white")
    image.paste(Image.fromarray(picture), (0, 22))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    above = f"{title or env.env_id}: {in_words(env.context)}"
    draw.rectangle((0, 0, width, 21), fill="#c1121f" if flipped else "white")
    draw.text((5, 3), above, fill="white" if flipped else "black", font=font)
    draw.text((5, height + 25), f"step {t}", fill="black", font=font)
    draw.text((width - 5, height + 25), f"return {so_far:.0f}", fill="black", font=font, anchor="ra")
    return np.asarray(image)


def write_gif(path, frames, fps=20):
    """Writes pictures, uint8 [height, width, 3], as an animated GIF."""
    import imageio

    with open(path, "wb") as file:
        imageio.mimsave(file, frames, format="GIF", fps=fps, loop=0)


# ------------------------------------------------------- Tracking -----------------------------------------------------


def _start_tracking(directory):
    """Starts a process that sends the run's metrics to Weights & Biases until the run ends: a process of its own, so
    that nothing that goes wrong there can end or block the run."""
    command = [sys.executable, __file__, "track", str(directory)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def track(directory):
    """Sends train.jsonl and metrics.jsonl, as they grow, and the video, until stdin is closed."""
    logging.raiseExceptions = False  # wandb's own log may find its disk full
    try:
        import wandb

        config = json.loads((directory / "config.json").read_text())
        settings = wandb.Settings(init_timeout=20, finish_timeout=40)
        where = os.environ.get("WANDB_DIR", directory)
        options = {"config": config, "dir": where, "resume": "allow", "settings": settings}
        tracked = wandb.init(project="dmash", id=config["run"], name=config["run"], **options)
        tracked.define_metric("*", step_metric="global_step")  # two files, whose steps interleave
        with open(directory / "train.jsonl") as train, open(directory / "metrics.jsonl") as metrics:
            over = False
            while not over:
                over = bool(select.select([sys.stdin], [], [], 1.0)[0])  # the end of stdin: the run has ended
                for line in (*train, *metrics):
                    tracked.log(json.loads(line))
        if (directory / "video.gif").exists():
            tracked.log({"video": wandb.Video(str(directory / "video.gif"))})
        tracked.finish()
    except Exception as error:
        fail(f"Weights & Biases gets nothing more of {directory}, which goes on: {str(error).partition(chr(10))[0]}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["track"] and len(sys.argv) == 3:
        track(Path(sys.argv[2]))
    else:
        fail("usage: aib_run.py track runs/<directory>, which --track does")
