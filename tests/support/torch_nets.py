"""Small networks of torch's: convolutions, and experts kept as one parameter. Needs torch."""

from typing import Any

import numpy as np
import torch


class ConvNet(torch.nn.Module):
    """Two convolutions, a mean over the window, a linear layer."""

    def __init__(self, dims: int, groups: int = 1):
        super().__init__()
        conv: Any = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dims - 1]
        self.conv1 = conv(4, 8, (3, 2, 3)[:dims], stride=2, padding=1)
        self.conv2 = conv(8, 6, 1, groups=groups)
        self.fc = torch.nn.Linear(6, 5)

    def forward(self, x):
        x = self.conv2(torch.relu(self.conv1(x)))
        return self.fc(x.flatten(2).mean(-1))


class Experts(torch.nn.Module):
    """Experts as transformers 5 keeps them: (E, out, in), or (E, in, out) where transposed."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], transposed: bool):
        super().__init__()
        self.is_transposed = transposed
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))

    def forward(self, x, weights):
        up = self.gate_up_proj if self.is_transposed else self.gate_up_proj.mT
        down = self.down_proj if self.is_transposed else self.down_proj.mT
        hidden = torch.tanh(torch.einsum("td,edf->tef", x, up))
        return torch.einsum("te,ted->td", weights, torch.einsum("tef,efd->ted", hidden, down))


class Moe(torch.nn.Module):
    """Layers of experts, each with a linear router."""

    def __init__(self, layers: int, shapes: dict[str, tuple[int, ...]], transposed: bool):
        super().__init__()
        experts, inner = shapes["gate_up_proj"][0], shapes["down_proj"][2 if transposed else 1]
        self.layers = torch.nn.ModuleList()
        for _ in range(layers):
            layer: Any = torch.nn.Module()
            layer.experts = Experts(shapes, transposed)
            layer.router = torch.nn.Linear(inner, experts, bias=False)
            self.layers.append(layer)

    def forward(self, x):
        layer: Any
        for layer in self.layers:
            x = x + layer.experts(x, torch.softmax(layer.router(x), -1))
        return x


def with_weights(net: torch.nn.Module, weights: dict[str, np.ndarray]) -> torch.nn.Module:
    """The network with the weights of a state."""
    net.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return net.eval()


def output(net: torch.nn.Module, x) -> np.ndarray:
    """What a network gives for an array."""
    with torch.no_grad():
        return net.eval()(torch.tensor(x)).numpy()
