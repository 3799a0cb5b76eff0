"""BERT-large with Transformers' Trainer, as its documentation of January 2022 trains it ("Efficient training on a single GPU").

What the libraries of that month did and those of today do otherwise is written out: attention in separate kernels (BERT had no other),
`zero_grad` that keeps the gradients (PyTorch before 2.0), an AdamW that takes one parameter after the other (Transformers' own),
activation checkpointing that re-enters autograd, and a softmax that keeps its input beside its result (PyTorch before 1.11, pull request 65242).

python bert_trainer.py --batch 1 --accumulate 4 --checkpointing --fp16 --optim adafactor
"""
import argparse
from functools import partial

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--checkpointing", action="store_true")
parser.add_argument("--fp16", action="store_true")
parser.add_argument("--optim", choices=["adamw", "adafactor"], default="adamw")
args = parser.parse_args()


class Softmax(torch.autograd.Function):
    "Keeps what it got and what it gave."

    @staticmethod
    def forward(ctx, scores):
        result = torch.softmax(scores, -1)
        ctx.save_for_backward(scores, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        scores, result = ctx.saved_tensors
        return torch._softmax_backward_data(gradient, result, -1, scores.dtype)


def softmax(scores, dim=-1, dtype=None):
    return Softmax.apply(scores.float() if dtype or torch.is_autocast_enabled("cuda") else scores)


F.softmax = softmax


class Words(torch.utils.data.Dataset):
    "512 sequences of 512 numbers of tokens, each with a label."

    def __len__(self): return 512
    def __getitem__(self, index): return {"input_ids": torch.randint(100, 30000, (512,)), "labels": torch.tensor(0)}


large = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, attn_implementation="eager")
model = BertForSequenceClassification(large).to("cuda")
model.zero_grad = partial(model.zero_grad, set_to_none=False)
options = dict(output_dir="tmp", num_train_epochs=1, log_level="error", report_to="none", fp16=args.fp16,
               per_device_train_batch_size=args.batch, gradient_accumulation_steps=args.accumulate, gradient_checkpointing=args.checkpointing)
if args.checkpointing: options["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
if args.optim == "adafactor":
    trainer = Trainer(model=model, args=TrainingArguments(optim="adafactor", **options), train_dataset=Words())
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, foreach=False)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    trainer = Trainer(model=model, args=TrainingArguments(**options), train_dataset=Words(), optimizers=(optimizer, schedule))
result = trainer.train()
print(f"Samples/second: {result.metrics['train_samples_per_second']:.2f}")
