"""Runs a grid. runs.sh starts it and explains its settings, which come as environment variables.

On this machine: JOBS processes at a time, a line for each that ends, and the result. On Slurm: submits one job array,
each task of which comes back here ("array") and runs one job.
"""

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import plan
from tools.plan import refuse

ELSEWHERE = 75  # exit code of a Slurm task whose run is in use
REQUEUES = 3  # of a Slurm task, at most
STARTED = "--- started "  # begins the line in a log that a run's output follows
PATIENCE = 120  # seconds that a requeued task waits for its own lock, which a file server keeps a while after a crash


class Output:
    """stdout (1) or stderr (2), of which any may be closed, full or gone: that is no reason to stop the runs."""

    def __init__(self, number):
        self.number = number
        try:
            os.fstat(number)
        except OSError:
            self.lose()

    def write(self, text):
        try:
            os.write(self.number, text.encode(errors="backslashreplace"))  # directories may have any name
        except OSError:
            self.lose()

    def flush(self):
        pass

    def lose(self):
        """From now on, what is written there is lost, here and in the processes that inherit it."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.number)
        os.set_inheritable(self.number, True)


def say(text):
    print(text, flush=True)


class Settings:
    """The settings of runs.sh that are about running; plan.py reads those that are about what to run."""

    def __init__(self, env):
        self.python = env.get("PYTHON") or sys.executable
        self.dry = env.get("DRY", "").strip().lower()
        if self.dry not in ("", "0", "no", "false", "1", "yes", "true"):
            refuse(f"DRY is 0 or 1; got {self.dry!r}")
        self.dry = self.dry in ("1", "yes", "true")
        self.runner = env.get("RUNNER", "local").strip()
        if self.runner not in ("local", "slurm"):
            refuse(f"RUNNER is local or slurm; got {self.runner!r}")
        jobs = env.get("JOBS", "").strip()
        if not re.fullmatch("([1-9][0-9]{0,3})?", jobs):
            refuse(f"JOBS is a number from 1 to 9999; got {jobs!r}")
        self.at_once = f"%{jobs}" if jobs else ""  # for Slurm: as many as it likes
        self.jobs = int(jobs or cores())
        run_dir = env.get("RUN_DIR", "runs")
        if not run_dir.strip() or run_dir.startswith("-") or not run_dir.isprintable():
            refuse(f"RUN_DIR is a directory that does not begin with -; got {run_dir!r}")
        self.run_dir = Path(os.path.expanduser(run_dir))
        self.logs = self.run_dir / "logs"
        self.time = env.get("TIME") or "24:00:00"
        try:
            self.sbatch = shlex.split(env.get("SBATCH", ""))
        except ValueError as error:
            refuse(f"SBATCH cannot be read as words: {error}")

    def log_of(self, job):
        return self.logs / "{task}__{method}__{seed}.log".format(**job)

    def make_logs(self):
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse(f"RUN_DIR: cannot make {self.logs}: {error.strerror}")


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def planned(settings, **env):
    """The jobs that the settings ask for. plan.py is a process of its own, so that this one stays small."""
    command = [settings.python, str(ROOT / "tools" / "plan.py")]
    process = subprocess.run(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        sys.exit(exit_code(process))
    return [json.loads(line) for line in process.stdout.splitlines()]


# ------------------------------------------------------- One run, anywhere -------------------------------------------


class Busy(Exception):
    """Another process has this run."""


def start(settings, job, **options):
    """Starts a run from whatever state it is in; None if it is done. Its log is locked for as long as it lives, so that
    no other grid starts it, too. Raises Busy, or OSError if the log cannot be written."""
    with open(settings.log_of(job), "a") as log, open(settings.log_of(job), "a") as locked:
        if not plan.lock(locked):
            raise Busy
        (row,) = plan.look([job], plan.read_runs(settings.run_dir))
        if row.status == "running":
            raise Busy
        if row.status == "done":
            return None
        script, *flags = row.command(settings.run_dir)
        command = shlex.join([script, *flags])
        log.write("\n" * bool(log.tell()) + f"{STARTED}{time.strftime('%Y-%m-%d %H:%M:%S')}: {command}\n")
        log.flush()
        options |= {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "pass_fds": [locked.fileno()]}
        return subprocess.Popen([settings.python, str(ROOT / script), *flags], **options)


def exit_code(process):
    """As a shell has it: 128 and the signal's number if one has ended it."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


# -------------------------------------------------------- On this machine --------------------------------------------


class Local:
    """Runs jobs, as many at a time as JOBS says.

    Ctrl-C and SIGTERM reach the runs as SIGTERM, so that they end with a checkpoint; after that, Ctrl-C as what it is,
    which ends them at once. A lost terminal ends nothing.
    """

    def __init__(self, settings, rows):
        self.settings, self.rows = settings, rows
        self.running = []  # [(job, process)]
        self.failures = {}  # {name of a run: why it has failed}
        self.started = set()  # names of runs
        self.busy = set()  # those that another process had
        self.stopped = False
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.stop)

    def stop(self, number, _):
        at_once = self.stopped and number == signal.SIGINT
        self.stopped = True
        for _, process in self.running:
            process.send_signal(signal.SIGINT if at_once else signal.SIGTERM)

    def run(self):
        waiting = [row.job for row in self.rows if row.status in ("new", "resume")]
        told = False
        while self.running or (waiting and not self.stopped):
            while waiting and len(self.running) < self.settings.jobs and not self.stopped:
                self.begin(waiting.pop(0))
            time.sleep(0.2)
            if self.stopped and not told:
                told = True
                say("stopping with checkpoints; start again to go on. Ctrl-C again stops at once")
            for job, process in list(self.running):
                if process.poll() is not None:
                    self.running.remove((job, process))
                    self.ended(job, exit_code(process))

    def begin(self, job):
        try:
            process = start(self.settings, job, start_new_session=True)  # where no Ctrl-C of the terminal reaches it
        except Busy:
            self.ended(job, ELSEWHERE)
        except OSError as error:
            self.ended(job, 1, str(error))
        else:
            if process:
                self.started.add(plan.name_of(job))
                self.running.append((job, process))
                if self.stopped:  # in just this moment
                    process.terminate()
            else:
                self.ended(job, 0)

    def ended(self, job, code, reason=None):
        """Prints a line about a run that has ended, and what is left of the grid."""
        rows = plan.look([row.job for row in self.rows], plan.read_runs(self.settings.run_dir), probe=False)
        (row,) = [row for row in rows if row.job == job]
        if row.status == "done":
            text = f"{row.name}: {scores(row)}"
        elif code == ELSEWHERE:
            self.busy.add(row.name)
            text = f"{row.name}: another process runs it"
        elif code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            text = f"{row.name}: stopped; start again to go on"
        else:
            self.failures[row.name] = reason or why(code, self.settings.log_of(job))
            text = f"{row.name}: failed: {self.failures[row.name]}"
        done = sum(row.status == "done" for row in rows)
        say(f"{time.strftime('%H:%M')}  {text}; {done} of {len(rows)} done{self.time_left(rows)}")

    def time_left(self, rows):
        hours = [row.hours for row in rows if row.status != "done"]
        known = [hour for hour in hours if hour is not None]
        if self.stopped or not known:
            return ""
        text = f", about {duration(max(sum(known) / self.settings.jobs, max(known)), 'hours', 'minutes')} left"
        unknown = len(hours) - len(known)
        return text + (f", and {unknown} of unknown speed" if unknown else "")


def duration(hours, long="h", short="min"):
    """In hours, or below one in minutes."""
    return f"{hours:.1f} {long}" if hours >= 1 else f"{math.ceil(60 * hours)} {short}"


def scores(row):
    """The AER of a finished run on each set."""
    try:
        returns = json.loads((row.run.directory / "results.json").read_text())["returns"]
        means = []
        for split, contexts in returns.items():
            values = [value for context in contexts for value in context]
            means.append(f"{split} {sum(values) / len(values):.1f}")
        return "AER " + ", ".join(means)
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError, AttributeError):
        return "AER unknown"


def why(code, log):
    """Why a run has ended with this exit code: a signal's name, or what it has said last."""
    if code > 128:
        with contextlib.suppress(ValueError):
            name = signal.Signals(code - 128).name
            hint = ", perhaps since memory was full" if name == "SIGKILL" else ""
            return f"ended by {name} (exit code {code}{hint})"
    return f"{last_line(log)} (exit code {code})"


def last_line(log):
    """What a run has said since it was started last."""
    try:
        lines = re.split(r"[\r\n]+", log.read_text(errors="replace"))
    except OSError as error:
        return error.strerror
    starts = [number for number, line in enumerate(lines) if line.startswith(STARTED)]
    lines = lines[starts[-1] + 1 :] if starts else lines
    return next((line.strip() for line in reversed(lines) if line.strip()), "it has said nothing")


def print_result(settings, rows, local):
    """A line for each job that is not done. Returns the exit code."""
    rest = [row for row in rows if row.status != "done"]
    say(f"--- result: {len(rows) - len(rest)} of {len(rows)} done")
    for row in rest:
        log = settings.log_of(row.job)
        if row.status == "running":
            say(f"RUNNING {row.name}: elsewhere")
        elif row.name in local.failures:
            say(f"FAILED  {row.name}: {local.failures[row.name]} ({log})")
        elif row.name in local.started and row.status == "new":
            say(f"STOPPED {row.name}: before it had begun")
        elif row.name in local.started:
            say(f"STOPPED {row.name}: {last_line(log)} ({log})")
        elif local.stopped and row.name not in local.busy:
            say(f"WAITING {row.name}: not started")
        else:
            say(f"FAILED  {row.name}: in another process: {last_line(log)} ({log})")
    if not rest:
        return 0
    return 130 if local.stopped else 1


# ----------------------------------------------------------- On Slurm ------------------------------------------------


def sbatch_command(settings, count, jobs_file):
    """The command that submits `count` jobs, which stand in `jobs_file`."""
    options = {"--job-name": "aib", "--array": f"0-{count - 1}{settings.at_once}", "--time": settings.time}
    options |= {"--open-mode": "append", "--signal": "B:USR1@120", "--cpus-per-task": 1, "--export": "ALL"}
    out = str(jobs_file.with_suffix(".out"))  # of Slurm, and for what goes wrong before a run has its log
    options["--output"] = out.replace("%", "%%")
    words = [f"{name}={value}" for name, value in options.items()]
    return ["sbatch", "--requeue", *words, *settings.sbatch, str(ROOT / "runs.sh"), "array", str(jobs_file)]


def submit(settings, rows):
    """Writes the list of jobs, a line each, and submits them as one array. Returns sbatch's exit code."""
    settings.make_logs()
    jobs_file = settings.logs / f"grid-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09}.txt"
    try:
        lines = ["{args[env_id]} {method} {seed}\n".format(**row.job) for row in rows]
        jobs_file.write_text("".join(lines))
    except OSError as error:
        refuse(f"RUN_DIR: cannot write {jobs_file}: {error.strerror}")
    return subprocess.run(sbatch_command(settings, len(rows), jobs_file), check=False).returncode


class SlurmTask:
    """A task of the array: one run, which is requeued before the time limit or after a crash."""

    def __init__(self, settings, jobs_file):
        self.settings, self.jobs_file = settings, jobs_file
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self.process, self.stopped, self.requeue = None, False, True
        signal.signal(signal.SIGUSR1, self.stop)  # the time limit is near
        signal.signal(signal.SIGTERM, self.stop)  # scancel, or Slurm requeues by itself

    def stop(self, number, _):
        self.stopped = True
        self.requeue = number == signal.SIGUSR1
        if self.process:
            self.process.terminate()

    def run(self):
        """Runs the job, and returns its exit code. From here on, all that is said is in the job's log."""
        line = self.jobs_file.read_text().splitlines()[int(os.environ["SLURM_ARRAY_TASK_ID"])]
        task, method, seed = line.split()
        with open(self.settings.log_of({"task": plan.name_of_task(task), "method": method, "seed": seed}), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        (job,) = planned(self.settings, ENVS=task, METHODS=method, SEEDS=seed)
        patience = time.monotonic() + (PATIENCE if self.restarts else 0)
        while not self.stopped:
            try:
                self.process = start(self.settings, job)
                break
            except Busy:
                if time.monotonic() > patience:
                    say("another process runs this")
                    return ELSEWHERE
                time.sleep(1)
        else:
            return 128 + signal.SIGTERM
        if not self.process:  # it is done
            return 0
        if self.stopped:  # in just this moment
            self.process.terminate()
        self.process.wait()
        return exit_code(self.process)

    def main(self):
        try:
            code = self.run()
        except SystemExit as error:  # of plan.py
            code = error.code
        except OSError as error:  # a file server has its moods
            say(f"{type(error).__name__}: {error}")
            code = 1
        # Nothing that another try would mend: done; wrong flag or full disk; not finite; in use elsewhere.
        if code not in (0, 2, 3, ELSEWHERE) and self.requeue and self.restarts < REQUEUES:
            say(f"exit code {code}: requeued")
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
            time.sleep(60)  # until Slurm ends this one
        return code


# ------------------------------------------------------------- Main --------------------------------------------------


def print_plan(settings, rows, runs):
    counts = {status: sum(row.status == status for row in rows) for status in ("new", "resume", "done", "running")}
    for row in rows:
        hours = "?" if row.hours is None else f"{'~' if row.estimated else ''}{duration(row.hours)}"
        command = row.run.directory if row.status == "done" else shlex.join(row.command(settings.run_dir))
        say("{:<7} {:>8}  {task:<15} {method:<12} seed {seed:<3} {}".format(row.status, hours, command, **row.job))
    hours = [row.hours for row in rows]
    text = f"{counts['new']} new, {counts['resume']} to resume, {counts['done']} done"
    text += f": {duration(sum(hour or 0 for hour in hours), 'core-hours', 'core-minutes')}"
    if counts["running"]:
        text += f", {counts['running']} running elsewhere"
    if None in hours:
        text += f", and {hours.count(None)} of unknown speed"
    if any(row.estimated for row in rows):
        text += " (~: estimated from the runs in results/, on another machine)"
    if settings.runner == "local":
        text += f"; {settings.jobs} at a time"
        known = [hour or 0 for hour in hours]
        if any(known):
            text += f", about {duration(max(sum(known) / settings.jobs, *known), 'hours', 'minutes')}"
    say(text)
    unknown = dict.fromkeys(row.job["method"] for row in rows if row.hours is None)
    if unknown:
        say(f"?: no run of {', '.join(unknown)} has {plan.FEWEST_STEPS:,} steps yet; shorter ones are no measure")
    others, flags = plan.with_other_settings(jobs=[row.job for row in rows], runs=runs)
    if others:
        words = "1 run here has" if others == 1 else f"{others} runs here have"
        say(f"note: {words} other settings ({', '.join(flags)}) and {'is' if others == 1 else 'are'} left alone")
    scripts = {row.job["method"]: row.job["script"] for row in rows}
    for method, number in plan.of_another_version(rows).items():
        runs = "1 run that is done is" if number == 1 else f"{number} runs that are done are"
        say(f"note: {runs} of another version of {scripts[method]} than the present one ({method})")


def main(arguments):
    sys.stdout = Output(1)
    sys.stderr = Output(2)
    on_slurm = len(arguments) == 2 and arguments[0] == "array" and "SLURM_ARRAY_TASK_ID" in os.environ
    if arguments and not on_slurm:
        refuse(f"takes no arguments but --help; its settings are environment variables; got {arguments[0]!r}")
    settings = Settings(os.environ)
    if on_slurm:
        return SlurmTask(settings, Path(arguments[1])).main()
    if settings.runner == "slurm" and not settings.dry and not shutil.which("sbatch"):
        refuse("RUNNER=slurm needs sbatch, which is not here; log in where Slurm is, or use RUNNER=local")
    if "list" in (os.environ.get("METHODS", "").strip(), os.environ.get("ENVS", "").strip()):
        return subprocess.run([settings.python, str(ROOT / "tools" / "plan.py")], check=False).returncode

    jobs = planned(settings)
    runs = plan.read_runs(settings.run_dir)
    rows = plan.look(jobs, runs)
    print_plan(settings, rows, runs)
    todo = [row for row in rows if row.status in ("new", "resume")]
    if settings.dry:
        if todo and settings.runner == "slurm":
            say(shlex.join(sbatch_command(settings, len(todo), settings.logs / "grid-DATE.txt")))
        return 0
    if not todo:
        say("nothing to do")
        return 0 if all(row.status == "done" for row in rows) else 1
    if settings.runner == "slurm":
        return submit(settings, todo)
    settings.make_logs()
    local = Local(settings, rows)
    local.run()
    return print_result(settings, plan.look(jobs, plan.read_runs(settings.run_dir)), local)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
