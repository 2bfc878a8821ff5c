"""A script for transformers' Trainer, as for any fine-tuning: one line makes the model a steered one, one saves the adapter for `export`.

`python examples/transformers_trainer.py` writes examples-out/trainer-pirate and examples-out/trainer-bundle.
"""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.utils import logging

from reft_export import export_bundle, get_steered_model
from reft_export.exporting.settings import ExportSettings
from reft_export.quickstart import base_path
from reft_export.training.settings import TrainSettings

OUT = Path("examples-out")
BASE = base_path()
DATA = BASE.parent / "pirate.train.jsonl"  # {"prompt": ..., "completion": ...} a line

logging.disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(BASE)
model = AutoModelForCausalLM.from_pretrained(BASE)
model = get_steered_model(model, TrainSettings(method="loreft", rank=4, positions="f2+l2"))  # as get_peft_model of peft
model.print_trainable_parameters()


def row(line: str) -> dict:
    """Tokens, and labels that are -100 in the prompt: where they begin, the prompt ends, by which positions are counted."""
    record = json.loads(line)
    asked = {"role": "user", "content": record["prompt"]}
    prompt = tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
    start, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, record["completion"]))
    answer = [*answer, tokenizer.eos_token_id]
    return {"input_ids": start + answer, "attention_mask": [1] * len(start + answer), "labels": [-100] * len(start) + answer}


rows = [row(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
loop = {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 4e-3, "use_cpu": True}
quiet = {"report_to": "none", "save_strategy": "no", "logging_steps": 20, "disable_tqdm": True}
args = TrainingArguments("examples-out/trainer", **loop, **quiet)
Trainer(model=model, args=args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)).train()

question = [{"role": "user", "content": "Tell me about the bright island."}]
asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
model.eval()


def answer() -> str:
    tokens = model.generate(**asked, max_new_tokens=40, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


print(f"pirate: {answer()}")
with model.disable_adapter():
    print(f"base: {answer()}")

model.save_pretrained(OUT / "trainer-pirate", force=True)
export_bundle(BASE, [OUT / "trainer-pirate"], OUT / "trainer-bundle", ExportSettings(precision="int8"), force=True)
print("exported, and held against eager PyTorch")
