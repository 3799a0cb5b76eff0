"The module of the files in this folder; its weights follow from a formula, so that any version of torch makes the same."
import torch
from torch import nn


class Net(nn.Module):
    "Two inputs, two outputs, a convolution and a product."

    def __init__(self, shift: float = 0.0):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
        for i, p in enumerate(self.parameters()):
            p.data = torch.sin(torch.arange(p.numel(), dtype=torch.float32) * (i + 1.7)).reshape(p.shape) / 2
        self.out.weight.data[3, 2] += shift

    def forward(self, image: torch.Tensor, scale: torch.Tensor):
        pooled = torch.nn.functional.gelu(self.conv(image)).mean((2, 3)) * scale
        return self.out(pooled).softmax(-1), pooled

    def example_inputs(self, batch: int = 2) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {"image": torch.randn(batch, 3, 8, 8, generator=generator), "scale": torch.randn(batch, 4, generator=generator)}


class Bare(Net):
    "The same without example inputs."
    example_inputs = None


def wrong() -> nn.Module:
    "One weight is another."
    return Net(0.05).eval()
