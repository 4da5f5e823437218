"""Makes docs/demo.html, a page to play with: the double integrator and two trained agents, all in one file.

    python tools/demo_page.py agents/DI__DMAstar-SH agents/DI__DR

The page is tools/demo_page.html with the agents' weights put in. It opens from disk.
"""

import argparse
import base64
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).with_suffix(".html")
PLACE = "{{agents}}"  # where the weights go in the template

LINEAR = {
    "dynamics": (6, 4),  # inputs, outputs: state and action -> change of the state
    "actor": (4, 4),  # state -> mean and log standard deviation of two actions
}


def mlp(name):
    """Names and shapes of the weights of a dynamics model or policy."""
    inputs, outputs = LINEAR[name]
    return {
        f"{name}.trunk.0.weight": (256, inputs),
        f"{name}.trunk.0.bias": (256,),
        f"{name}.trunk.2.weight": (256, 256),
        f"{name}.trunk.2.bias": (256,),
        f"{name}.head.weight": (outputs, 256),
        f"{name}.head.bias": (outputs,),
    }


ENCODER = {
    "encoder.embed.weight": (32, 10),
    "encoder.lstm.weight_ih_l0": (128, 32),
    "encoder.lstm.weight_hh_l0": (128, 32),
    "encoder.lstm.bias_ih_l0": (128,),
    "encoder.lstm.bias_hh_l0": (128,),
    "encoder.head.weight": (8, 32),
}
HYPERNETWORK = {
    "hypernetwork.embeddings": (33, 8),
    "hypernetwork.first.weight": (64, 16),
    "hypernetwork.first.bias": (64,),
    "hypernetwork.second.weight": (64, 64),
    "hypernetwork.second.bias": (64,),
    "hypernetwork.head.weight": (512, 64),
    "hypernetwork.head.bias": (512,),
}
METHODS = {  # what the page needs of each agent
    "DMAstar-SH": ENCODER | HYPERNETWORK | mlp("dynamics") | mlp("actor"),
    "DR": mlp("actor"),
}


class WrongAgent(Exception):
    """A directory that does not hold the agent that is asked for."""


def read_agent(directory, method):
    """The weights (dict of float tensors) that the page needs of a trained agent of `method` on DI."""
    try:
        config = json.loads((directory / "config.json").read_text())
        weights = torch.load(directory / "agent.pt", map_location="cpu", weights_only=True)
        found = config["method"], config["args"]["env_id"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise WrongAgent(f"{directory} holds no trained agent ({type(error).__name__})") from None
    if found != (method, "DI"):
        raise WrongAgent(f"{directory} is an agent of {found[0]} on {found[1]}; needed is {method} on DI")
    for name, shape in METHODS[method].items():
        tensor = weights.get(name) if isinstance(weights, dict) else None
        if not torch.is_tensor(tensor) or tuple(tensor.shape) != shape:
            raise WrongAgent(f"{directory}/agent.pt has no {name} of shape {list(shape)}")
        if not tensor.isfinite().all():
            raise WrongAgent(f"{directory}/agent.pt: {name} is not finite")
    return {name: weights[name] for name in METHODS[method]}


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
    except (WrongAgent, OSError) as error:
        print(f"demo_page.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: {len(page) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
