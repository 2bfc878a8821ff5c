"""Train the quickstart's base model: `PYTHONPATH=tests python -m evidence.quickstart_base.train_base OUT_DIR [--steps N] [--seed S]`.

Writes a Hugging Face model folder: a Llama-architecture decoder of about 1.1 million float32 parameters, and a
byte-level BPE tokenizer whose chat template renders one exchange as

    <s><|user|>PROMPT<|assistant|>ANSWER</s>

The loss is the causal cross-entropy over every token after <s>, the padding left out; one document per row, so that no
document attends to another. With the same seed, versions and thread count, the same weights come out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from evidence.quickstart_base import corpus

BOS, EOS, PAD, USER, ASSISTANT = SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>")

# The template writes <s> itself and the tokenizer adds nothing: rendered text is encoded as it stands everywhere.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('this model knows the roles user and assistant, got ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """Everything that decides the weights, next to the library versions and the thread count."""

    steps: int = 2800
    seed: int = 0
    documents_per_step: int = 48
    vocab_size: int = 1536
    """The smallest round size at which the longest pirate answer stays under 80 tokens."""
    tokenizer_documents: int = 20_000
    """The first documents of the corpus; more do not change the merges that matter."""
    context: int = 256
    hidden_size: int = 128
    layers: int = 5
    heads: int = 4
    key_value_heads: int = 2
    intermediate_size: int = 352
    """Like every linear layer's input width a multiple of 32, so that int4 blocks of 32 fit."""
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    """On matrices only; norms and the embedding are left alone."""
    gradient_clip: float = 1.0
    threads: int = 2

    @property
    def documents(self) -> int:
        return self.steps * self.documents_per_step


def train_tokenizer(documents: list[corpus.Exchange], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over prompts and answers; any UTF-8 text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (text for document in documents for text in (document.prompt, document.answer)),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            show_progress=False,
        ),
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that `AutoTokenizer` reads.

    Written by hand: transformers 5 saves a tokenizer class that transformers 4 does not know, and moves the chat
    template into a file of its own.
    """
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    roles = [USER, ASSISTANT]
    tokenizer_config = {
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIAL_TOKENS
        },
        **special,
        "additional_special_tokens": roles,
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "special_tokens_map.json", {**special, "additional_special_tokens": roles})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def encode(tokenizer: Tokenizer, document: corpus.Exchange) -> list[int]:
    """Token ids of the rendered exchange; the text never holds a special token, so rendering by ids is the same."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    return [
        ids[BOS],
        ids[USER],
        *tokenizer.encode(document.prompt).ids,
        ids[ASSISTANT],
        *tokenizer.encode(document.answer).ids,
        ids[EOS],
    ]


def batches(rows: list[list[int]], *, size: int, pad_id: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (input_ids [B, S], labels [B, S]) with B = size; rows of similar length share a batch, to save padding.

    No attention mask is needed: with padding on the right, no real token can see it. Padding labels are -100.
    """
    rng = Random(seed)
    pool_size = size * 32
    order: list[list[list[int]]] = []
    for start in range(0, len(rows) - size + 1, pool_size):
        pool = sorted(rows[start : start + pool_size], key=len)
        order_here = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
        rng.shuffle(order_here)
        order += order_here
    for batch in order:
        width = max(map(len, batch))
        input_ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in batch])
        lengths = torch.tensor([len(row) for row in batch])
        yield input_ids, input_ids.masked_fill(torch.arange(width)[None] >= lengths[:, None], -100)


def build_model(settings: BaseSettings, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """The untrained model, with a wider initialisation than the default, which is meant for much wider models."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.key_value_heads,
            head_dim=settings.hidden_size // settings.heads,
            intermediate_size=settings.intermediate_size,
            max_position_embeddings=settings.context,
            rms_norm_eps=1e-5,
            initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.token_to_id(BOS),
            eos_token_id=tokenizer.token_to_id(EOS),
            pad_token_id=tokenizer.token_to_id(PAD),
        )
    )


def learning_rate_at(step: int, settings: BaseSettings) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(settings: BaseSettings) -> tuple[LlamaForCausalLM, Tokenizer, float]:
    """Returns (model, tokenizer, mean training loss in nats per token over the last 100 steps)."""
    torch.manual_seed(settings.seed)
    documents = list(corpus.exchanges(settings.documents, seed=settings.seed))
    tokenizer = train_tokenizer(documents[: settings.tokenizer_documents], settings.vocab_size)
    rows = [encode(tokenizer, document) for document in documents]
    if max(map(len, rows)) > settings.context:
        raise ValueError(f"a document has {max(map(len, rows))} tokens; the context is {settings.context}")
    model = build_model(settings, tokenizer)
    print(
        f"{len(rows)} documents, {sum(map(len, rows))} tokens, longest {max(map(len, rows))}; "
        f"{sum(parameter.numel() for parameter in model.parameters())} parameters",
        flush=True,
    )

    decayed = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )
    model.train()
    losses: list[float] = []
    started = time.perf_counter()
    pad_id = tokenizer.token_to_id(PAD)
    for step, (input_ids, labels) in enumerate(batches(rows, size=settings.documents_per_step, pad_id=pad_id, seed=settings.seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings)
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49 or step + 1 == settings.steps:
            recent = losses[-50:]
            print(
                f"step {step + 1}/{settings.steps}  loss {sum(recent) / len(recent):.4f}  {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    model.eval()
    last = losses[-100:]
    return model, tokenizer, sum(last) / len(last)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, settings: BaseSettings, folder: Path, *, loss: float) -> None:
    """Write the model folder; config.json is completed so that transformers 4 and 5 read the same model."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
        max_new_tokens=80,
    )
    model.save_pretrained(folder, safe_serialization=True)
    # Written through a private temporary file in some versions: a shipped file is readable by everyone.
    (folder / "model.safetensors").chmod(0o644)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # transformers 4 reads rope_theta, transformers 5 writes rope_parameters; both default to the same value.
    config["rope_theta"] = 10000.0
    _write_json(folder / "config.json", config)
    save_tokenizer(tokenizer, folder)
    (folder / "README.md").write_text(_readme(model, settings, loss=loss), encoding="utf-8")


def _readme(model: LlamaForCausalLM, settings: BaseSettings, *, loss: float) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"""# The quickstart's base model

A Llama-architecture decoder with {parameters:,} float32 parameters that answers short questions and tells
short stories in the style of a children's story book.

    PYTHONPATH=tests python -m evidence.quickstart_base.train_base OUT_DIR --steps {settings.steps} --seed {settings.seed}

- Corpus: {settings.documents:,} exchanges from the grammar in `tests/evidence/quickstart_base/corpus.py`
  (seed {settings.seed}), each seen once; {corpus.PIRATE_SHARE:.1%} of them in the pirate register.
  No other text was used.
- Training: {settings.steps} steps of {settings.documents_per_step} documents with AdamW on a CPU,
  {settings.threads} threads, torch {torch.__version__.partition("+")[0]}.
- Final training loss: {loss:.4f} nats per token (mean over the last 100 steps).
- Licence: Apache-2.0, like the project; text, tokenizer and weights are all made by this repository.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="train_base", description="Train the quickstart's base model.")
    parser.add_argument("out_dir", type=Path, help="the model folder to write")
    parser.add_argument("--steps", type=int, default=BaseSettings.steps)
    parser.add_argument("--seed", type=int, default=BaseSettings.seed)
    arguments = parser.parse_args()
    settings = BaseSettings(steps=arguments.steps, seed=arguments.seed)
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    model, tokenizer, loss = train(settings)
    save(model, tokenizer, settings, arguments.out_dir, loss=loss)
    print(f"final loss {loss:.4f}; wrote {arguments.out_dir}")


if __name__ == "__main__":
    main()
