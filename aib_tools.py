"""Command line, files and tracking of a run: what every script needs, and what no method is about.

As a program it tracks a run (`python aib_tools.py track runs/<dir>`, what --track does), and plans a grid for runs.sh.
"""

import collections
import contextlib
import fcntl
import importlib
import importlib.metadata
import io
import json
import logging
import os
import re
import select
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

import aib_envs

# What may be given again with --resume and --eval-only: it does not change what has been learned.
FREE = {"total_timesteps", "eval_rollouts", "cuda", "keep_checkpoint", "capture_video", "track"}
FORMAT = 2  # of checkpoint.pt: what it holds


def fail(message, code=2):
    """Ends the program with one line. Codes: 2 where the user has to change something, 3 where learning broke down."""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()  # so that the message is the last line
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


def on_error(kind, error, trace):
    """`sys.excepthook` of the scripts: one line where memory is full, which PyTorch says with a mere RuntimeError."""
    if "can't allocate memory" in str(error):
        fail(str(error).rpartition("DefaultCPUAllocator: ")[2])
    sys.__excepthook__(kind, error, trace)


# ---------------------------------------------------- Command line ---------------------------------------------------


def read_flags(cls, description, default):
    """`tyro.cli`, but for a wrong flag one line instead of tyro's box."""
    console = io.StringIO()
    try:
        with contextlib.redirect_stderr(console):
            return tyro.cli(cls, description=description, default=default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│╰╯─ ") for line in console.getvalue().splitlines()[1:]]  # a box below its title
        fail(" ".join(line for line in lines if line.strip("-")))  # "-" is what "─" is without Unicode


def parse_args(cls, description):
    """An instance of the dataclass `cls` from the command line, checked; ends the program with one line if it is wrong.

    With `--resume` and `--eval-only` the arguments of that run's config.json are the defaults, and only `FREE` may
    change. `total_timesteps` None becomes the task's own; `context`, tuple of "key=value", becomes a dict or None.
    """
    sys.excepthook = on_error
    args = read_flags(cls, description, cls())
    if (args.context and not args.eval_only) or (args.eval_only and (args.resume or args.track)):
        fail("--context needs --eval-only, which goes neither with --resume nor with --track")
    if "" in (args.resume, args.eval_only):
        fail("--resume and --eval-only take the directory of a run; got nothing")
    if directory := args.resume or args.eval_only:
        saved = read_config(directory, cls)["args"]
        args = read_flags(cls, description, cls(**saved))
        for name in saved.keys() - FREE:
            if getattr(args, name) != saved[name]:
                free = ", ".join(f"--{free.replace('_', '-')}" for free in sorted(FREE))
                fail(f"{directory} has --{name.replace('_', '-')} {saved[name]}; what can change is {free}")
    try:
        task = aib_envs.get_task(args.env_id)
        context = dict(pair.split("=") for pair in args.context if re.fullmatch(r"\w+=[-+.\w]+", pair))
        if len(context) < len(args.context):
            raise ValueError(f"--context takes key=value, each key once; got {' '.join(args.context)}")
        context = {key: float(value) for key, value in context.items()}
        args.context = aib_envs.complete_context(args.env_id, context) if context else None
    except ValueError as error:
        fail(error)
    if args.total_timesteps is None:
        args.total_timesteps = task.total_timesteps
    at_least = {"seed": 0, "learning_starts": task.steps, "buffer_size": task.steps}  # sampling needs a whole episode
    for name, value in vars(args).items():
        high = 4096 if name == "code_dim" else 2**32 - 1  # hyperdynamics.py has a model for each of its entries
        low, high = (0, 1) if isinstance(value, float) else (at_least.get(name, 1), high)
        if type(value) in (int, float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} must be from {low} to {high} for {args.env_id}; got {value}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    for name, steps in {"buffer_size": 1, "rollouts": task.steps}.items():  # of one of them, in one context
        size = getattr(args, name, 0)
        gib = 20 * 4 * size * steps * (task.obs_dim + task.act_dim + 1) * (1 + task.window / task.steps) / 2**30
        if gib > memory:
            fail(f"--{name.replace('_', '-')} {size} takes {gib:,.0f} GiB for {args.env_id}; here are {memory:,.0f}")
    if args.capture_video:
        try:
            importlib.import_module("aib_render").check(args.env_id)  # early, and before MuJoCo is imported
        except OSError as error:
            fail(error)
    return args


# -------------------------------------------------------- Files ------------------------------------------------------


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


def read_config(directory, cls):
    """The config.json of a run of this script, whose arguments are a `cls`."""
    with reading(Path(directory) / "config.json") as path:
        config = json.loads(path.read_text())
        if config["script"] != Path(sys.argv[0]).name:
            raise ValueError(f"this is a run of {config['script']}")
        for name, value in vars(cls(**config["args"])).items():
            kind = int if name == "total_timesteps" else type(getattr(cls(), name))
            if name in config["args"] and type(value) is not kind:
                raise ValueError(f"{name} cannot be {value!r}")
        return config | {"run": str(config["run"]), "method": str(config["method"])}


def provenance():
    """What a run's bits depend on, besides script and arguments: packages, machine, git commit ("" if unknown)."""
    packages = ("torch", "numpy", "mujoco", "dm_control", "gymnasium")
    found = {"versions": {name: importlib.metadata.version(name) for name in packages}, "commit": ""}
    with contextlib.suppress(OSError):  # there is no git
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        found["commit"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    found |= {"threads": torch.get_num_threads(), "processor": torch.backends.cpu.get_cpu_capability()}
    return found | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else ""}


def lock(path, new):
    """Opens a run's metrics.jsonl for appending. While it is open, no other process can open it so."""
    file = open(os.open(path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if new else 0), 0o666), "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{path.parent} is in use by another process")
    return file


def origin(config):
    """What a checkpoint must have in common with its run's configuration."""
    fixed = {name: value for name, value in config["args"].items() if name not in FREE}
    return fixed | {"run": config["run"], "script": config["script"], "format": FORMAT}


def check_origin(found, config):
    """Raises ValueError if the `origin` that stands in a checkpoint is not that of `config`."""
    for name, value in origin(config).items():
        if found.get(name) != value:
            raise ValueError(f"it was made with {name} {found.get(name)}, which should be {value}")


def check_resumable(run, args, global_step, length):
    """Ends the program with one line if the run cannot go on from its checkpoint's step, with the `length` bytes of
    metrics.jsonl that were there. One that was killed before its first checkpoint begins anew."""
    missing = not (run / "checkpoint.pt").exists()
    if (run / "results.json").exists():
        with reading(run / "results.json") as path:
            done = int(json.loads(path.read_text())["args"]["total_timesteps"])
        if done >= args.total_timesteps or missing:
            fail(f"{run} has finished; only one with --keep-checkpoint can be extended to more --total-timesteps")
    elif missing and last_metrics(run)["global_step"] >= args.eval_every + aib_envs.get_task(args.env_id).steps:
        fail(f"{run} has lost its checkpoint.pt")
    if global_step > args.total_timesteps:
        fail(f"{run} is at step {global_step} already; --total-timesteps is {args.total_timesteps}")
    if os.path.getsize(run / "metrics.jsonl") < length:
        fail(f"{run / 'metrics.jsonl'} has lost lines since the checkpoint was written")


def last_metrics(run):
    """The last whole line of a run's metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            return json.loads(line)
    return {"global_step": 0, "seconds": {}}


def check_finite(kind, tensors, global_step):
    """Ends the program with code 3 if a tensor of {name: tensor} is not finite."""
    for name, x in tensors.items():
        if not x.isfinite().all():
            fail(f"step {global_step}: the {kind} {name} is not finite. The last checkpoint is from before that", 3)


class CudaGraph:
    """A function of tensors on a GPU that is recorded as a CUDA graph after three calls and replayed from then on, so
    that no time goes into launching its kernels one by one. What it returns is overwritten by its next call with the
    same bools; no Python of it runs then.

    Arguments: tensors, tuples of tensors, and bools; each combination of bools has a graph of its own. Shapes must not
    change, and nothing may wait for the GPU. The first three calls are made as usual.
    """

    def __init__(self, function):
        self.function, self.calls, self.graphs, self.stream = function, collections.Counter(), {}, torch.cuda.Stream()

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
            graph, inputs = torch.cuda.CUDAGraph(), self._copy(args)
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


# ------------------------------------------------------- Tracking ----------------------------------------------------


def start_tracking(run):
    """Starts a process that sends the run's metrics.jsonl to Weights & Biases until `stop_tracking`, or until this
    program ends: a process of its own, so that nothing that goes wrong there can end or block the run."""
    command = [sys.executable, __file__, "track", str(run)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def stop_tracking(process):
    """Waits until all is sent, a minute at most."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=60)


def track(run):
    """Sends metrics.jsonl, line by line as it grows, and the video to Weights & Biases, until stdin is closed."""
    logging.raiseExceptions = False  # wandb's own log may find its disk full
    try:
        import wandb

        config = json.loads((run / "config.json").read_text())
        settings = wandb.Settings(init_timeout=20, finish_timeout=40)
        where = os.environ.get("WANDB_DIR", run)
        options = {"config": config, "dir": where, "resume": "allow", "settings": settings}
        tracked = wandb.init(project="dmash", id=config["run"], name=config["run"], **options)
        with open(run / "metrics.jsonl") as lines:
            over = False
            while not over:
                over = bool(select.select([sys.stdin], [], [], 1.0)[0])  # the end of stdin: the run has ended
                for metrics in map(json.loads, lines):
                    tracked.log(metrics, step=metrics["global_step"])
        if (run / "video.gif").exists():
            tracked.log({"video": wandb.Video(str(run / "video.gif"))})
        tracked.finish()
    except Exception as error:
        fail(f"Weights & Biases gets nothing more of {run}, which goes on: {str(error).partition(chr(10))[0]}")


# -------------------------------------------------------- Grids ------------------------------------------------------


def read_runs(run_dir):
    """Of each run in `run_dir`: directory, (script, method, task), arguments, those of results.json or {}, metrics."""
    runs = []
    for path in sorted(Path(run_dir).glob("*/config.json")):
        try:
            run, config = path.parent, json.loads(path.read_text())
            finished = {}
            with contextlib.suppress(OSError, ValueError):  # then it has not finished
                finished = json.loads((run / "results.json").read_text())["args"]
            keys = config["script"], config["method"], config["args"]["env_id"]
            runs.append((run, keys, config["args"], finished, last_metrics(run)))
        except (OSError, ValueError, LookupError, TypeError) as error:
            print(f"{path.parent} is left aside: its config.json is not a run's ({error!r})", file=sys.stderr)
    return runs


def in_use(run):
    """Does a process hold the lock of this run?"""
    with contextlib.suppress(FileNotFoundError), open(run / "metrics.jsonl") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def plan(run_dir, jobs):
    """For each job, words "TASK METHOD SEED script flags ...", what is to be done: yields a line "STATUS HOURS TASK
    METHOD SEED command ...". Status: `done`, `running`, `resume` or `new`, which a run's files decide and not its name.
    Hours: what is left, by the speed of the longest run of this task and method; `?` where there is none."""
    runs = read_runs(run_dir)
    for task, method, seed, script, *flags in (job.split() for job in dict.fromkeys(jobs)):
        given = {flag.partition("=")[0].replace("_", "-") for flag in flags}
        if taken := {"--help", "-h", "--env-id", "--seed", "--run-dir", "--resume", "--eval-only"} & given:
            fail(f"FLAGS cannot have {', '.join(sorted(taken))}")
        sys.argv = [script, "--env-id", task, "--seed", seed, *flags]
        module = importlib.import_module(script.removesuffix(".py"))
        args = parse_args(module.Args, "")
        if (name := module.method_name(args)) != method:
            fail(f"{method} of runs.sh is {name} to method_name in {script} with these flags; the two must be the same")
        args, defaults = vars(args), vars(module.Args())  # a default stands for a flag that a run did not have yet
        own = args.keys() - FREE - {"run_dir", "resume", "eval_only", "context"} | {"total_timesteps", "eval_rollouts"}
        if args.get("dataset"):  # these flags are those of the data set's run
            own -= {*module.STAGE_1, "rollouts"}
        same = lambda other, own=own, args=args, defaults=defaults: all(
            other.get(name, defaults[name]) == args[name] for name in own
        )
        alike = [run for run in runs if run[1] == (script, method, task) and same(run[2])]
        done = any(finished and same(finished) for _, _, _, finished, _ in alike)
        # The run to go on with: one with a checkpoint, and of those the one that has come furthest.
        reached = lambda run: ((run[0] / "checkpoint.pt").exists(), run[4]["global_step"])
        started = max(alike, key=reached, default=None)
        steps = reached(started)[1] if started and reached(started)[0] else 0
        speeds = [
            (m["global_step"], sum(m["seconds"].values())) for _, keys, _, _, m in runs if keys[1:] == (method, task)
        ]
        n, seconds = max(speeds, default=(0, 0))
        left = 0 if done else max(args["total_timesteps"] - steps, 0)  # hyperzero.py's steps go on in stage 2
        hours = f"{left * seconds / n / 3600:.2f}" if n else "?" if left else "0.00"
        command = [script, "--resume", str(started[0]), *flags] if started else [*sys.argv, "--run-dir", run_dir]
        status = "done" if done else "new" if not started else "running" if in_use(started[0]) else "resume"
        yield " ".join([status, hours, task, method, seed, *command])


if __name__ == "__main__":
    if sys.argv[1:2] == ["track"] and len(sys.argv) == 3:
        track(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["plan"] and len(sys.argv) == 3:
        print("\n".join(plan(sys.argv[2], sys.stdin.read().splitlines())))
    else:
        fail("usage: aib_tools.py track runs/<dir>, or aib_tools.py plan runs/ < jobs")
