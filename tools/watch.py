"""Shows trained agents side by side, as an animated GIF.

    python tools/watch.py agents/DI__DR agents/DI__DMAstar-SH --context inversion=-1 --flip-at 50

Each agent gets a picture of its own, in the same context and from the same start; --flip-at reverses (or swaps) the
actuators at that step.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import aib_run


@dataclass
class Args:
    agents: tyro.conf.Positional[tuple[str, ...]]  # directories of runs on the same task
    context: tuple[str, ...] = ()  # the context to roll out in, as in length=1.3 inversion=-1
    flip_at: int | None = None  # the step at which the actuators are reversed (or swapped)
    out: str = "video.gif"  # the file to write
    frames: int = 200  # at most this many pictures


def main(args):
    films = []
    for directory in args.agents:
        agent, run_args, make_envs = aib_run.load_agent(directory)
        context = aib_run.read_context(run_args.env_id, args.context) or {}
        envs = make_envs(run_args, [context], render_mode="rgb_array")
        title = Path(directory).resolve().name.split("__")[1].replace("DMAstar", "DMA*")
        films.append(aib_run.film(envs, agent, args.flip_at, title, args.frames))
    if len({len(film) for film in films}) != 1:
        aib_run.fail("the agents must be of the same task")
    aib_run.write_gif(Path(args.out), [np.hstack(pictures) for pictures in zip(*films, strict=True)])
    print(args.out)


if __name__ == "__main__":
    main(aib_run.read_flags(Args, sys.argv[1:], __doc__))
