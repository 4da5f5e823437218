"""What a grid has to do: which runs are asked for, how far each of them is, and how long the rest will take.

tools/grid.py, which runs.sh starts, asks here: `identity` is the one definition of "the same run".
As a program it prints the jobs that the settings of runs.sh ask for, one JSON object a line. Only that needs the
scripts, and with them PyTorch; everything else here is light.
"""

import collections
import contextlib
import difflib
import errno
import fcntl
import hashlib
import importlib
import io
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.methods import METHODS

# These arguments decide neither what is learned nor what the last evaluation measures.
NOT_COUNTED = {"run_dir", "resume", "eval_only", "context", "cuda", "cuda_graph", "keep_checkpoint"}
NOT_COUNTED |= {"eval_every", "eval_epochs", "capture_video", "flip_at", "track"}
# With hyperzero.py's --dataset these are the data set's, whatever the command line says.
OF_DATASET = {"total_timesteps", "learning_starts", "buffer_size", "batch_size", "gamma", "tau", "expert_lr"}
OF_DATASET |= {"noise_steps", "rollouts"}
# The grid decides these itself.
NOT_IN_FLAGS = {"--help", "-h", "--env-id", "--seed", "--run-dir", "--resume", "--eval-only", "--"}
SETTINGS = ("ENVS", "METHODS", "SEEDS", "STEPS", "FLAGS", "RUN_DIR", "JOBS", "DRY", "RUNNER", "TIME", "SBATCH")
FEWEST_STEPS = 5_000  # a shorter run says nothing about speed
MAX_SEED = 2**32 - 1


def refuse(message):
    """Ends the program with one line: the user has to change something."""
    print(f"runs.sh: {message}", file=sys.stderr)
    sys.exit(2)


_noted = set()


def note(message):
    """Says something once."""
    if message not in _noted:
        print(f"runs.sh: {message}", file=sys.stderr)
    _noted.add(message)


# ------------------------------------------------------- The same run ------------------------------------------------


def identity(method, args, defaults=None):
    """What decides what a run learns and measures, as a dict. Two runs with equal ones are the same run.

    `args`: its arguments as they stand in config.json. `defaults`: those of its script, for arguments that it lacks,
    because the script has got them since.
    """
    args = {**(defaults or {}), **args}
    ignored = NOT_COUNTED | OF_DATASET if args.get("dataset") else NOT_COUNTED
    counted = {name: value for name, value in args.items() if name not in ignored}
    return {"method": method, **json.loads(json.dumps(counted, default=str))}  # a tuple is a list in config.json


# --------------------------------------------------- What is asked for (jobs) ----------------------------------------


def name_of_task(env_id):
    """The task's own name: "Cart" of "cart_tasks:Cart"."""
    return env_id.rpartition(":")[2]


def words(name, text):
    """The words of a setting. None if it is not set; set but empty, as by a misspelt variable, it is refused."""
    if text is not None and not text.split():
        refuse(f"{name} is set, but empty")
    return text and list(dict.fromkeys(text.split()))


def pick(name, asked, known):
    """Refuses what is not known, with the nearest that is. `known`: {what may be asked for: what that is}."""
    for word in asked:
        if word not in known:
            lower = {one.lower(): one for one in known}
            near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.5)
            hint = f"did you mean {lower[near[0]]}? " if near else ""
            hint = "several are separated by spaces; " if "," in word else hint
            refuse(f"{name} has {word!r}, which is unknown ({hint}{name}=list ./runs.sh names all)")
    return list(dict.fromkeys(known[word] for word in asked))


def refuse_slips(env):
    """Refuses METHOD for METHODS, RUNDIR, steps or TASKS: the default would go unnoticed."""
    plain = lambda name: name.upper().replace("_", "").removesuffix("S")
    meant = {plain(name): name for name in SETTINGS} | {"TASK": "ENVS"}
    for name, value in env.items():
        setting = meant.get(plain(name), name)
        is_path = name == "ENV" and "/" in value  # a file of the shell
        if name not in SETTINGS and setting != name and value and not env.get(setting) and not is_path:
            refuse(f"{name} is set, but no setting; did you mean {setting}? (unset {name}, if it is of something else)")


def seeds_of(text):
    """[1, 2, 3, 7] of "1-3 7"."""
    seeds = {}
    for word in words("SEEDS", text):
        match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MAX_SEED or last - first >= 10_000:
            refuse(f'SEEDS takes numbers and ranges, such as "1-3 7"; got {word!r}')
        seeds |= dict.fromkeys(range(first, last + 1))
    return list(seeds)


def import_script(script):
    """The module of a script, imported as if it were started."""
    path = ROOT / script
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:
        refuse(f"cannot import {script} with {sys.executable}: {type(error).__name__}: {error}".partition("\n")[0])
    if Path(module.__file__).resolve() != path.resolve():
        refuse(f"{script} and {module.__file__} have the same name; give one of them another")
    return module


def check_task(task):
    """Refuses what is neither a task of the benchmark nor the module:Task of a file that can be imported."""
    if "," in task:
        refuse(f"ENVS has {task!r}; several are separated by spaces")
    try:
        import_script("aib_envs.py").get_task(task)
    except ValueError as error:
        refuse(f"ENVS: {error}")


def grids_tasks():
    """The tasks of the default grid: the benchmark's, but for ODE-1 to ODE-20, of which ODE is one."""
    return [task for task in import_script("aib_envs.py").TASKS if not re.fullmatch(r"ODE-\d+", task)]


def print_list(name):
    """What ENVS=list or METHODS=list prints."""
    if name == "METHODS":
        for method in METHODS.values():
            print(f"{method.name:<{max(map(len, METHODS))}}  {method.script} {method.flags}".rstrip())
    else:
        print("\n".join(import_script("aib_envs.py").TASKS))


def parsed(method, task, seed, flags, more=()):
    """Checked arguments of a run, from the command line that it will get, and those of its script by default. `more`:
    the FLAGS, which come after its own `flags`."""
    module = import_script(method.script)
    aib_run = import_script("aib_run.py")
    for name in ("Args", "method_name"):
        if not hasattr(module, name):
            refuse(f"{method.script} has no {name}")
    said, argv = io.StringIO(), sys.argv
    sys.argv = [method.script, "--env-id", task, "--seed", str(seed), *flags, *more]
    try:
        with contextlib.redirect_stderr(said):
            args = aib_run.parse_args(module.Args)
            name = module.method_name(args)
    except SystemExit:
        message = " ".join(said.getvalue().split())
        refuse(f"{method.name} on {task} does not take STEPS and FLAGS as they are: {message}")
    finally:
        sys.argv = argv
    if name != method.name:
        start = "with these FLAGS " if more else ""
        end = "" if more else f"; let that return {method.name}, or the row have its name"
        end = f"; give METHODS={name}" if more and name in METHODS else end
        refuse(f"{start}{method.name} of tools/methods.py is {name} to method_name in {method.script}{end}")
    return aib_run.saved_args(args), aib_run.saved_args(module.Args())


def jobs(env):
    """The jobs that the settings in `env` ask for: a dict for each run, with its task, method, seed, script, flags, all
    of its arguments, and the defaults of its script."""
    refuse_slips(env)
    methods = words("METHODS", env.get("METHODS")) or [name for name, method in METHODS.items() if not method.extra]
    labels = {method.label: method.name for method in METHODS.values()}  # DMA*-SH
    methods = [METHODS[name] for name in pick("METHODS", methods, labels | {name: name for name in METHODS})]
    tasks = list(dict.fromkeys(words("ENVS", env.get("ENVS")) or grids_tasks()))
    for task in tasks:
        check_task(task)
    seeds = seeds_of(env.get("SEEDS", "1-10"))
    steps = env.get("STEPS", "").strip()
    if steps and not re.fullmatch("0*[1-9][0-9]*", steps):
        refuse(f"STEPS takes a number of vector steps; got {steps!r}")
    try:
        flags = shlex.split(env.get("FLAGS", ""))
    except ValueError as error:
        refuse(f"FLAGS cannot be read as words: {error}")
    taken = NOT_IN_FLAGS | ({"--total-timesteps"} if steps else set())
    taken &= {flag.partition("=")[0].replace("_", "-") for flag in flags}
    if taken:
        refuse(f"FLAGS cannot have {', '.join(sorted(taken))}")

    planned = []
    for task in tasks:
        for method in methods:
            own = [*method.flags.split(), *(["--total-timesteps", steps] if steps else [])]
            args, defaults = parsed(method, task, seeds[0], own, flags)
            job = {"task": name_of_task(task), "method": method.name, "script": method.script}
            job |= {"flags": [*own, *flags], "defaults": defaults}
            planned += [{**job, "seed": seed, "args": {**args, "seed": seed}} for seed in seeds]
    return planned


# ------------------------------------------------- What there is (runs on the disk) ----------------------------------


@dataclass
class Run:
    """A run as its files tell."""

    directory: Path
    method: str
    args: dict  # of config.json
    finished: dict  # the arguments in results.json; {} if it has not finished
    metrics: dict  # of the last evaluation
    script_sha256: str = ""  # of the script that has made it

    @property
    def task(self):
        return name_of_task(self.args["env_id"])

    @property
    def steps(self):
        return self.metrics["global_step"]


def last_metrics(run):
    """The last whole line of a run's metrics.jsonl."""
    lines = []
    with contextlib.suppress(OSError):
        lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            metrics = json.loads(line)
            return {**metrics, "global_step": int(metrics["global_step"]), "seconds": dict(metrics["seconds"])}
    return {"global_step": 0, "seconds": {}}


def read_runs(run_dir, pattern="*"):
    """The runs in a directory, finished or not. What has a config.json that is not a run's is left aside, and said."""
    runs = []
    for directory in sorted(Path(run_dir).glob(pattern)):
        if directory.name.startswith("."):  # it is just being made
            continue
        try:
            config = json.loads((directory / "config.json").read_text())
            args, metrics = dict(config["args"]), last_metrics(directory)
            run = Run(directory, str(config["method"]), args, {}, metrics, str(config.get("script_sha256") or ""))
            run.args["env_id"] = str(run.args["env_id"])
        except (FileNotFoundError, NotADirectoryError):  # not a run
            continue
        except (OSError, ValueError, LookupError, TypeError) as error:
            note(f"{directory} is left aside: its config.json cannot be used ({error!r})")
            continue
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # else it has not finished
            run.finished = dict(json.loads((directory / "results.json").read_text())["args"])
        runs.append(run)
    return runs


def lock(file):
    """Locks an open file until it is closed, here and in the processes that inherit it: True, or False if another
    process has it. A file system without locks: True, and a line about it. NFS wants the file open for writing."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        note(f"no locks on this file system ({error.strerror}): never start two grids with the same RUN_DIR at once")
    return True


def in_use(run):
    """Is this run's directory in use by a process?"""
    path = Path(run) / "metrics.jsonl"
    try:
        with open(path, "r+") as file:
            return not lock(file)
    except FileNotFoundError:
        return False
    except OSError as error:
        note(f"cannot write {path}: {error.strerror}")
        return False  # the run itself will say so


# --------------------------------------------------------- The plan --------------------------------------------------


class Speeds:
    """Seconds a step of each method on each task: of `runs`, else of those in results/."""

    def __init__(self, runs):
        self.here = self._measured(runs)
        self.published = None

    def _measured(self, runs):
        """{(method, task), (script, task), method or script: mean seconds a step}."""
        seconds, steps = collections.Counter(), collections.Counter()
        for run in runs:
            if run.steps < FEWEST_STEPS:
                continue
            script = METHODS[run.method].script if run.method in METHODS else None
            with contextlib.suppress(TypeError):
                total = sum(run.metrics["seconds"].values())
                for key in ((run.method, run.task), (script, run.task), run.method, script):
                    seconds[key] += total
                    steps[key] += run.steps
        return {key: seconds[key] / steps[key] for key in seconds}

    def of(self, method, script, task):
        """(seconds a step or None, is that an estimate?). An estimate is from results/, that is from another machine,
        and where this method has not run there on this task, from what is most like it."""
        if (method, task) in self.here:
            return self.here[method, task], False
        if self.published is None:
            self.published = self._measured(read_runs(ROOT / "results", "*/*"))
        for key in ((method, task), (script, task), method, script):
            if key in self.published:
                return self.published[key], True
        return None, False


def name_of(job):
    return "{task} {method} seed {seed}".format(**job)


@dataclass
class Row:
    """A job and how far it is."""

    job: dict
    status: str  # done, running, resume or new: the files decide that, not the names of directories
    hours: float | None  # what is left, if the speed is known
    estimated: bool  # from results/, that is from another machine?
    run: Run | None  # the run that is done, or that goes on

    @property
    def name(self):
        return name_of(self.job)

    def command(self, run_dir):
        """Script, from the project's root, and flags."""
        job = self.job
        if self.run:
            return [job["script"], "--resume", str(self.run.directory), *job["flags"]]
        start = [job["script"], "--env-id", job["args"]["env_id"], "--seed", str(job["seed"])]
        return [*start, *job["flags"], "--run-dir", str(run_dir)]


def look(planned, runs, probe=True):
    """A `Row` for each job, in their order. With `probe` False one that has begun is never `running`, but `resume`:
    the locks, which a run may just be taking, are not touched."""
    speeds = Speeds(runs)
    groups = collections.defaultdict(list)
    for run in runs:
        groups[run.method, run.task].append(run)
    rows = []
    for job in planned:
        own = identity(job["method"], job["args"], job["defaults"])
        alike = []
        for run in groups[job["method"], job["task"]]:
            found = identity(run.method, run.args, job["defaults"])
            removed = found.keys() - own.keys()
            if found == own:
                alike.append(run)
            elif removed and all(found[name] == value for name, value in own.items()):
                flags = ", ".join(f"{name} {found[name]}" for name in sorted(removed))
                note(f"{run.directory} is left aside: {job['script']} has no {flags} any more")
        done = [run for run in alike if run.finished and identity(run.method, run.finished, job["defaults"]) == own]
        # The run to go on with: one with a checkpoint, and of those the one that has come furthest.
        reached = lambda run: ((run.directory / "checkpoint.pt").exists(), run.steps)
        run = done[0] if done else max(alike, key=reached, default=None)
        if done:
            status, left = "done", 0
        elif not run:
            status, left = "new", job["args"]["total_timesteps"]
        else:
            status = "running" if probe and in_use(run.directory) else "resume"
            kept = run.steps if status == "running" or reached(run)[0] else 0
            left = max(job["args"]["total_timesteps"] - kept, 0)  # hyperzero.py's steps go on in stage 2
        speed, estimated = speeds.of(job["method"], job["script"], job["task"]) if left else (0, False)
        rows.append(Row(job, status, None if speed is None else left * speed / 3600, estimated, run))
    return rows


def with_other_settings(jobs, runs):
    """How many runs have method, task and seed of a job, but other settings, and which flags those are."""
    asked = {(job["method"], job["task"], job["seed"]): job for job in jobs}
    number, flags = 0, {}
    for run in runs:
        job = asked.get((run.method, run.task, run.args.get("seed")))
        if job:
            own = identity(job["method"], job["args"], job["defaults"])
            found = identity(run.method, run.args, job["defaults"])
            number += found != own
            names = sorted(own.keys() | found.keys())
            flags |= {"--" + x.replace("_", "-"): 0 for x in names if own.get(x) != found.get(x)}
    return number, list(flags)


def of_another_version(rows):
    """{method: how many of its runs that are done are of another version of its script than the present one}."""
    present = {}
    for script in {row.job["script"] for row in rows}:
        with contextlib.suppress(OSError):
            present[script] = hashlib.sha256((ROOT / script).read_bytes()).hexdigest()
    older = collections.Counter()
    for row in rows:
        version = row.run.script_sha256 if row.status == "done" else ""
        if version and version != present.get(row.job["script"], version):
            older[row.job["method"]] += 1
    return older


def main(env):
    """Prints the jobs of the grid, or the names of all methods or tasks."""
    lists = [name for name in ("METHODS", "ENVS") if (env.get(name) or "").split() == ["list"]]
    for name in lists:
        print_list(name)
    if not lists:
        for job in jobs(env):
            print(json.dumps(job, default=str))


if __name__ == "__main__":
    try:
        main(os.environ)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # nobody reads it any more, as with | head
        sys.stdout = None
    except OSError as error:  # the disk is full
        sys.stdout = None
        refuse(f"cannot write the list: {error.strerror}")
