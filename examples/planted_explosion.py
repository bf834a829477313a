"""Draw the picture in the README: in a network of 6 layers, the gradient of one explodes at step 37.

python examples/planted_explosion.py --out docs/planted_explosion.png
"""

from __future__ import annotations

import argparse
import pathlib

import torch
from torch import nn

import steadygrad as sg


def train() -> sg.Stabilizer:
    """Take 120 steps, with the gradient of one layer's weight 10,000 times too large at step 37."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [nn.Linear(64, 64), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(64, 1))
    opt = sg.Stabilizer(torch.optim.AdamW(model.named_parameters(), lr=3e-4), max_norm=1.0)
    for step in range(120):
        inputs = torch.randn(64, 64)
        opt.zero_grad()
        (model(inputs) - inputs.mean(1, keepdim=True)).square().mean().backward()
        exploding = model[4].weight.grad
        if step == 37 and isinstance(exploding, torch.Tensor):
            exploding *= 1e4
        opt.step()
    return opt


def main() -> None:
    """Train, and draw what happened."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("planted_explosion.png"))
    train().plot(parser.parse_args().out)


if __name__ == "__main__":
    main()
