"""Shows trained agents side by side, as an animated GIF.

    python tools/watch.py agents/DI__DR agents/DI__DMAstar-SH --flip-at 50

Each agent gets a picture of its own, in the same context and from the same start; --flip-at reverses (or swaps) the
actuators at that step.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import aib_run


@dataclass
class Args:
    agents: tyro.conf.Positional[tuple[str, ...]]  # directories of runs on the same task
    context: tuple[str, ...] = ()  # the context to roll out in, as in length=1.3 inversion=-1
    flip_at: int | None = None  # the step at which the actuators are reversed (or swapped)
    out: str = "video.gif"  # the file to write


def main(args):
    if not args.agents:
        aib_run.fail("give the directories of trained agents on the same task")
    loaded = {directory: aib_run.load_agent(directory) for directory in args.agents}
    tasks = {run_args.env_id for _, run_args, _ in loaded.values()}
    if len(tasks) > 1:
        aib_run.fail(f"the agents must be of the same task; got {', '.join(sorted(tasks))}")
    films = []
    for directory, (agent, run_args, make_envs) in loaded.items():
        run_args.context = args.context
        run_args.flip_at = args.flip_at
        run_args.capture_video = True
        aib_run.check_args(run_args)
        envs = make_envs(run_args, [run_args.context or {}], render_mode="rgb_array")
        title = aib_run.any_config(directory)["method"].replace("DMAstar", "DMA*")
        frames, _ = aib_run.film(envs, agent, args.flip_at, title)
        films.append(frames)
    try:
        aib_run.write_gif(Path(args.out), [np.hstack(pictures) for pictures in zip(*films, strict=True)])
    except OSError as error:
        aib_run.fail(error)
    print(args.out)


if __name__ == "__main__":
    main(aib_run.read_flags(Args, sys.argv[1:], description=__doc__))
