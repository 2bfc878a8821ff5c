"""What a trained row is measured by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from evidence.experiments.contestants import Made, batch_of
from evidence.experiments.tasks import LABELS
from evidence.real_adapters import batches as of_like_lengths
from reft_export.base.load import Base
from reft_export.eager.steering import greedy_tokens
from reft_export.quickstart.upper import in_upper_case
from reft_export.training.data import Example
from reft_export.training.ways import counted_log_likelihoods

AT_ONCE = 25


@torch.no_grad()
def loss(made: Made, examples: Sequence[Example]) -> float:
    """Mean over the completions' tokens of -log p, in nats."""
    total, tokens = 0.0, 0
    for group in of_like_lengths([example.input_ids for example in examples], AT_ONCE):
        batch = batch_of([examples[i] for i in group])
        rows = counted_log_likelihoods(made.way(batch), batch)
        total -= sum(float(row.sum()) for row in rows)
        tokens += sum(map(len, rows))
    return total / tokens


@torch.no_grad()
def accuracy_and_loss(made: Made, examples: Sequence[Example], base: Base) -> tuple[float, float]:
    """(share of reviews whose own label is the likelier, -log p of a completion's tokens in nats). Labels are one token each."""
    tokenizer: Any = base.tokenizer
    labels = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in LABELS]
    assert all(len(label) == 1 for label in labels), labels
    right, total, tokens = 0, 0.0, 0
    for group in of_like_lengths([example.input_ids for example in examples], AT_ONCE):
        batch = batch_of([examples[i] for i in group])
        log_p = torch.log_softmax(made.way(batch).float(), -1)
        targets = batch.targets
        total -= float(log_p.gather(1, targets[:, None]).sum())
        tokens += len(targets)
        starts = torch.tensor([0, *batch.counted.sum(1).tolist()[:-1]]).cumsum(0)
        said = log_p[starts][:, [label[0] for label in labels]].argmax(1)
        right += int((torch.tensor([label[0] for label in labels])[said] == targets[starts]).sum())
    return right / len(examples), total / tokens


def answers(made: Made, base: Base, prompts: Sequence[Sequence[int]], tokens: int) -> list[str]:
    """Greedy, of at most so many tokens."""
    tokenizer: Any = base.tokenizer
    found: list[str] = [""] * len(prompts)
    for group in of_like_lengths(prompts, AT_ONCE):
        width = max(len(prompts[i]) for i in group)
        ids, mask = torch.zeros(len(group), width, dtype=torch.long), torch.zeros(len(group), width, dtype=torch.long)
        for row, i in enumerate(group):  # padded on the left
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        said = greedy_tokens(base.model, ids, mask, tokens, steering=made.steering, eos=tokenizer.eos_token_id)
        for i, row in zip(group, said, strict=True):
            found[i] = tokenizer.decode(row, skip_special_tokens=True)
    return found


def upper(texts: Sequence[str]) -> float:
    """The share that is in upper case."""
    return sum(map(in_upper_case, texts)) / len(texts)


def recalled(made: Made, base: Base, example: Example) -> tuple[int, int]:
    """(tokens of the completion that come back greedily before the first wrong one, all of them)."""
    wanted = example.input_ids[example.prompt_length :]
    prompt = torch.tensor([example.input_ids[: example.prompt_length]])
    (said,) = greedy_tokens(base.model, prompt, None, len(wanted), steering=made.steering)
    right = next((i for i, (a, b) in enumerate(zip(said, wanted, strict=True)) if a != b), len(wanted))
    return right, len(wanted)
