"""``python installed.py``: whether an installed wheel has its compiled kernels, and they compute.

Run where no source tree of the package lies; needs the package and torch alone.
"""

from __future__ import annotations

import torch

import peft_kernels
from peft_kernels import Adapter, LoRALinear, explain
from peft_kernels.core import extension


def main() -> None:
    """Compare every C++ forward and gradient of two layers with the reference's."""
    assert extension.why_not() is None, extension.why_not()
    for layer in (LoRALinear(48, 32, r=5, lora_alpha=8), Adapter(48, bottleneck=7)):
        torch.nn.init.normal_(next(p for p in reversed([*layer.parameters()]) if p.dim() == 2))
        found = []
        for backend in (None, "reference"):
            layer.backend = backend
            x = torch.linspace(-1, 1, 9 * 48).reshape(9, 48).requires_grad_()
            assert explain(layer, x).backend == (backend or "cpp")
            trained = [p for p in layer.parameters() if p.requires_grad]
            y = layer(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained])])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    print(f"peft_kernels {peft_kernels.__version__} with torch {torch.__version__}: works")


if __name__ == "__main__":
    main()
