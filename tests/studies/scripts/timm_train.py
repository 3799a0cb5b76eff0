"""An image classifier as timm's train.py trains it: its loader, optimizer, schedule, validation and checkpoints.

python timm_train.py --model resnet50 --batch-size 32
"""
import argparse
import os

import torch
from PIL import Image
from timm import create_model
from timm.data import create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, accuracy


class Pictures(torch.utils.data.Dataset):
    "Images of the usual size, decoded and then cropped by the loader's transform."
    transform = None

    def __len__(self): return 4000
    def __getitem__(self, index): return self.transform(Image.new("RGB", (500, 375))), index % 1000


parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--batch-size", type=int, default=128)
args = parser.parse_args()
device = torch.device("cuda:0")
torch.backends.cudnn.benchmark = True
model = create_model(args.model, num_classes=1000).to(device)
config = resolve_data_config({}, model=model)
common = dict(batch_size=args.batch_size, use_prefetcher=True, num_workers=4, device=device,
              **{key: config[key] for key in ("input_size", "interpolation", "mean", "std")})
train = create_loader(Pictures(), is_training=True, hflip=0.5, color_jitter=0.4, **common)
check = create_loader(Pictures(), is_training=False, crop_pct=config["crop_pct"], **common)
optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=2e-5, momentum=0.9)
schedule, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=3)
loss_of, loss_of_check = torch.nn.CrossEntropyLoss().to(device), torch.nn.CrossEntropyLoss().to(device)
os.makedirs("output", exist_ok=True)
saver = CheckpointSaver(model=model, optimizer=optimizer, args=args, checkpoint_dir="output", recovery_dir="output")


def train_one_epoch() -> None:
    model.train()
    losses = AverageMeter()
    optimizer.zero_grad()
    for images, labels in train:
        loss = loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), len(images))
        optimizer.zero_grad()
        torch.cuda.synchronize()


def validate() -> float:
    model.eval()
    losses, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    with torch.inference_mode():
        for images, labels in check:
            output = model(images)
            losses.update(loss_of_check(output, labels).item(), len(images))
            first, fifth = accuracy(output, labels, topk=(1, 5))
            top1.update(first.item(), len(images))
            top5.update(fifth.item(), len(images))
    return top1.avg


for epoch in range(epochs):
    train_one_epoch()
    metric = validate()
    saver.save_checkpoint(epoch, metric=metric)
    schedule.step(epoch + 1, metric)
