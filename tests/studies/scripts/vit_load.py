"""Putting torchvision's ViT-L/16 on the GPU in 16 bits: whole and then narrowed, or made there.

python vit_load.py [--made-there]
"""
import argparse

import torch
from torchvision.models import vit_l_16

parser = argparse.ArgumentParser()
parser.add_argument("--made-there", action="store_true")
args = parser.parse_args()
if args.made_there:
    from lightning import Fabric
    fabric = Fabric(accelerator="cuda", devices=1, precision="16-true")
    with fabric.init_module(): model = vit_l_16()
else:
    model = vit_l_16()
    model.to(torch.device("cuda")).to(torch.float16)
print(f"{torch.cuda.max_memory_reserved() / 1e9:.2f} GB")
