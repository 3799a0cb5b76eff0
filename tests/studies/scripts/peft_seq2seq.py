"""T5 of 3 billion parameters (T0_3B) on short texts with Accelerate, whole or with PEFT's LoRA, as PEFT's example of sequence to sequence trains it.

python peft_seq2seq.py --lora
"""
import argparse

import torch
from accelerate import Accelerator
from transformers import T5Config, T5ForConditionalGeneration, get_linear_schedule_with_warmup

parser = argparse.ArgumentParser()
parser.add_argument("--lora", action="store_true")
args = parser.parse_args()


class Tweets(torch.utils.data.Dataset):
    "50 texts of at most 64 tokens, with an answer of a few."

    def __len__(self): return 50

    def __getitem__(self, index):
        words = torch.randint(1, 32000, (64,))
        return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": torch.randint(1, 32000, (5,))}


accelerator = Accelerator()
loader = torch.utils.data.DataLoader(Tweets(), shuffle=True, batch_size=8, pin_memory=True)
model = T5ForConditionalGeneration(T5Config(d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, vocab_size=32128,
                                            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                                            decoder_start_token_id=0, pad_token_id=0))
if args.lora:
    from peft import LoraConfig, TaskType, get_peft_model
    model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=8, lora_alpha=32, lora_dropout=0.1))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)  # as before PyTorch 2.0
schedule = get_linear_schedule_with_warmup(optimizer, 0, len(loader) * 5)
model, loader, optimizer, schedule = accelerator.prepare(model, loader, optimizer, schedule)
for epoch in range(5):
    model.train()
    total = 0
    for batch in loader:
        loss = model(**batch).loss
        total += loss.detach().float()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(torch.cuda.max_memory_allocated() >> 20)
