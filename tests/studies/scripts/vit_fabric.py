"""torchvision's ViT-L/16 fine-tuned on CIFAR-10 at 224 pixels, in plain PyTorch or with Lightning Fabric, in the steps of a published
series on memory: full precision, mixed, bfloat16, smaller batches, accumulated gradients, SGD.

python vit_fabric.py --precision bf16-true --batch 4 --accumulate 4 --optim sgd
"""
import argparse

import torch
import torch.nn.functional as F
import torchmetrics
from torchvision import datasets, transforms
from torchvision.models import vit_l_16

parser = argparse.ArgumentParser()
parser.add_argument("--precision", choices=["plain", "32-true", "16-mixed", "bf16-true"], default="plain")
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--accumulate", type=int, default=0)
parser.add_argument("--optim", choices=["adam", "sgd"], default="adam")
args = parser.parse_args()

change = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
data = datasets.CIFAR10("data", train=True, download=True, transform=change)
train = torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(45000)), batch_size=args.batch, num_workers=3, drop_last=True)
check = torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(45000, 50000)), batch_size=args.batch, num_workers=3)
model = vit_l_16()
model.heads.head = torch.nn.Linear(1024, 10)
fabric = None
if args.precision == "plain":
    device = torch.device("cuda")
    model.to(device)
else:
    from lightning import Fabric
    fabric = Fabric(accelerator="cuda", devices=1, precision=args.precision)
    fabric.launch()
    torch.set_float32_matmul_precision("high")
    device = fabric.device
    train, check = fabric.setup_dataloaders(train, check)
optimizer = torch.optim.Adam(model.parameters(), lr=5e-5) if args.optim == "adam" else torch.optim.SGD(model.parameters(), lr=0.01)
if fabric: model, optimizer = fabric.setup(model, optimizer)


def placed(*tensors):
    return tensors if fabric else tuple(tensor.to(device) for tensor in tensors)


def step(index: int, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    "One batch; what it predicted is returned."
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    if args.accumulate: loss = loss / args.accumulate
    else: optimizer.zero_grad()
    if fabric: fabric.backward(loss)
    else: loss.backward()
    if not args.accumulate: optimizer.step()
    elif index % args.accumulate == 0:
        optimizer.step()
        optimizer.zero_grad()
    if index % 300 == 0: print(f"batch {index} of {len(train)}: loss {loss:.4f}")
    return logits


right = torchmetrics.Accuracy(task="multiclass", num_classes=10).to(device)
for index, (images, labels) in enumerate(train):
    model.train()
    images, labels = placed(images, labels)
    logits = step(index, images, labels)
    model.eval()
    with torch.no_grad(): right.update(torch.argmax(logits, 1), labels)
model.eval()
with torch.no_grad():
    checked = torchmetrics.Accuracy(task="multiclass", num_classes=10).to(device)
    for images, labels in check:
        images, labels = placed(images, labels)
        checked.update(torch.argmax(model(images), 1), labels)
print(f"{right.compute() * 100:.2f} % {checked.compute() * 100:.2f} %, {torch.cuda.max_memory_reserved() / 1e9:.2f} GB")
