"""Train a small BERT with Hugging Face's Trainer, and teleport it at the start of two epochs."""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import teleport
from teleport.integrations.transformers import TeleportCallback

# Sentences of eight tokens out of thirty: does the first one come again?
torch.manual_seed(0)
tokens = torch.randint(30, (256, 8))
again = (tokens[:, 1:] == tokens[:, :1]).any(1).long()
data = [{"input_ids": x, "labels": y} for x, y in zip(tokens, again, strict=True)]

config = BertConfig(
    vocab_size=30, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=128, max_position_embeddings=8, num_labels=2,
)  # fmt: skip
settings = TrainingArguments(
    "runs/with_transformers", num_train_epochs=2, per_device_train_batch_size=2,
    gradient_accumulation_steps=2, learning_rate=1e-3, logging_steps=32, save_strategy="no",
    use_cpu=True, report_to=[],
)  # fmt: skip
trainer = Trainer(BertForSequenceClassification(config), settings, train_dataset=data)
callback = TeleportCallback(teleport.Schedule(epochs=2), trainer=trainer, growth=1.5)
trainer.add_callback(callback)
trainer.train()
for step, report in callback.reports:
    print(f"after step {step}: {report}")
