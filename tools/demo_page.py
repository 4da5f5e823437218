"""Makes docs/demo.html, a page to play with: the double integrator and two trained agents, all in one file.

    python tools/demo_page.py agents/DI__DMAstar-SH agents/DI__DR

The page is tools/demo_page.html with the agents' weights put in. It opens from disk.
"""

import argparse
import base64
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import aib_run

TEMPLATE = Path(__file__).with_suffix(".html")
PLACE = "{{agents}}"  # where the weights go in the template

# What the page needs of each agent
PARTS = {"DMAstar-SH": ("encoder", "hypernetwork", "dynamics", "actor"), "DR": ("actor",)}


def read_agent(directory, method):
    """The weights {name: float tensor} that the page needs of a trained agent of `method` on DI; ends the program with
    one line if that is not there."""
    agent, args, _ = aib_run.load_agent(directory)
    found = aib_run.any_config(directory)["method"], args.env_id
    if found != (method, "DI"):
        aib_run.fail(f"{directory} is an agent of {found[0]} on {found[1]}; needed is {method} on DI")
    return {name: tensor for name, tensor in agent.state_dict().items() if name.split(".")[0] in PARTS[method]}


def encode(tensor):
    """A tensor as the page reads it: `data`, its numbers row by row as 24-bit integers (little-endian, base64) in units
    of `unit`. As close as float32; with float16 an action would be off by up to 0.003."""
    unit = max(tensor.abs().max().item(), 1e-30) / (2**23 - 1)
    numbers = (tensor.detach().double() / unit).round().numpy().astype("<i4")
    three_bytes = numbers.reshape(-1, 1).view(np.uint8)[:, :3]
    return {"unit": unit, "data": base64.b64encode(three_bytes.tobytes()).decode()}


def make_page(shared, dr):
    """The page as text, from the directories of two trained agents."""
    agents = {}
    for method, directory in {"DMAstar-SH": shared, "DR": dr}.items():
        agents[method] = {name: encode(tensor) for name, tensor in read_agent(directory, method).items()}
    return TEMPLATE.read_text().replace(PLACE, json.dumps(agents))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, help="directory of a trained agent of DMA*-SH on DI")
    parser.add_argument("dr", type=Path, help="directory of a trained agent of DR on DI")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "demo.html", help="where the page goes")
    args = parser.parse_args()
    try:
        page = make_page(args.shared, args.dr)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(page)
    except OSError as error:
        aib_run.fail(error)
    print(f"{args.out}: {len(page) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
