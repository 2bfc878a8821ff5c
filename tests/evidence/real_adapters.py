"""Three adapters of a real chat model, each with 200 held-out prompts and a judge: what is left of them in a bundle, by counting.

    PYTHONPATH=tests python -m evidence.real_adapters train MODEL OUT/ [--only upper] [--reviews real-models]
    PYTHONPATH=tests python -m evidence.real_adapters count MODEL OUT/ [BUNDLE]... [--prompts 200]

    upper       answers in upper case             LoReFT rank 4 at 4;10;18, first and last five tokens of the prompt
    json        answers as {"answer": ...}        LoReFT rank 8 at 4;18, all tokens
    sentiment   positive or negative, a review    LoReFT rank 1 at 4;10;18, all prompt tokens

``train`` writes OUT/<task>.train.jsonl, OUT/<task>.held.jsonl and the adapter OUT/<task>/. ``count`` answers the held-out prompts greedily,
by eager PyTorch in float32 and by every bundle that has the adapters under these names, and prints a row of a table for each.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reft_export.quickstart.upper import in_upper_case, training_examples
from reft_export.training.settings import TrainSettings

HELD_OUT, REVIEWS, SEED = 200, 300, 14
CLEAR = 1.5
"""Reviews whose mean rating is nearer to 0 are neither positive nor negative."""
QUESTION = "Is this review positive or negative? "
FORMS = (
    "What is a {}?",
    "Tell me about a {}.",
    "Where would I find a {}?",
    "Write one sentence about a {}.",
    "Why would somebody want a {}?",
)
THINGS = (
    "bakery", "balloon", "barometer", "beehive", "bicycle pump", "blanket", "bonfire", "bookshelf", "bridge", "broom", "cactus", "campsite",
    "castle", "cello", "chimney", "compass", "cupboard", "desert", "drum", "elevator", "fountain", "glacier", "hammock", "harbor", "kettle",
    "ladder", "lantern", "lighthouse", "mirror", "orchard", "parachute", "pillow", "postcard", "raincoat", "scarf", "sundial", "tractor",
    "umbrella", "volcano", "windmill",
)  # fmt: skip
"""None of them is in a training example: 40 things, asked for in five ways."""


@dataclass(frozen=True, kw_only=True)
class Task:
    settings: TrainSettings
    examples: Callable[[Path], Sequence[dict[str, str]]]
    held_out: Callable[[Path], Sequence[dict[str, str]]]
    """With the completion where there is one right answer."""
    passes: Callable[[dict[str, str], str], bool]
    answer_tokens: int


def _settings(**changes: object) -> TrainSettings:
    return TrainSettings(**{"method": "loreft", "samples": 0, "seed": SEED, "batch_size": 4, **changes})  # pyright: ignore[reportArgumentType]


def _asked(_: Path) -> list[dict[str, str]]:
    prompts = [{"prompt": form.format(thing)} for thing in THINGS for form in FORMS]
    random.Random(SEED).shuffle(prompts)
    return prompts[:HELD_OUT]


def _as_json(_: Path) -> list[dict[str, str]]:
    told = training_examples()
    return [{"prompt": each["prompt"], "completion": json.dumps({"answer": each["completion"].capitalize()})} for each in told]


def _is_answer(_: dict[str, str], text: str) -> bool:
    try:
        found = json.loads(text.strip())
    except ValueError:
        return False
    return isinstance(found, dict) and list(found) == ["answer"]


def _reviews(reviews: Path) -> list[dict[str, str]]:
    """Half of each kind, alternating: clear ones of at most 40 words."""
    from evidence.review_text import MOVIES
    from evidence.review_text import reviews as read

    clear = [each for each in read(reviews, [MOVIES]) if abs(each.rating) >= CLEAR and 5 <= len(each.text.split()) <= 40]
    random.Random(SEED).shuffle(clear)
    kinds = [[each.text for each in clear if (each.rating > 0) == positive] for positive in (True, False)]
    pairs = [pair for both in zip(*kinds, strict=False) for pair in zip(both, ("positive", "negative"), strict=True)]
    return [{"prompt": QUESTION + text, "completion": kind} for text, kind in pairs[: REVIEWS + HELD_OUT]]


TASKS = {
    "upper": Task(
        settings=_settings(rank=4, layers="4;10;18", positions="f5+l5", lr=4e-3, max_steps=40),
        examples=lambda _: training_examples(),
        held_out=_asked,
        passes=lambda _, text: in_upper_case(text),
        answer_tokens=24,
    ),
    "json": Task(
        settings=_settings(rank=8, layers="4;18", positions="all", lr=2e-3, max_steps=60),
        examples=_as_json,
        held_out=_asked,
        passes=_is_answer,
        answer_tokens=64,
    ),
    "sentiment": Task(
        settings=_settings(rank=1, layers="4;10;18", positions="prompt", lr=2e-3, max_steps=60, batch_size=8),
        examples=lambda reviews: _reviews(reviews)[:REVIEWS],
        held_out=lambda reviews: _reviews(reviews)[REVIEWS:],
        passes=lambda line, text: text.strip().lower().startswith(line["completion"]),
        answer_tokens=4,
    ),
}


def train_tasks(model: str, folder: Path, names: Sequence[str], reviews: Path) -> None:
    from reft_export.base.load import load_base
    from reft_export.training.trainer import train

    base = load_base(model, require_tokenizer=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        task = TASKS[name]
        for kind, lines in (("train", task.examples(reviews)), ("held", task.held_out(reviews))):
            (folder / f"{name}.{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        started = time.monotonic()
        result = train(base, folder / f"{name}.train.jsonl", task.settings, folder / name, force=True)
        print(
            f"{name}: {task.settings.max_steps} steps, {time.monotonic() - started:.0f} s, loss {result.history[-1].loss:.3f}", flush=True
        )


def held_out(folder: Path, name: str, count: int) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.held.jsonl").read_text(encoding="utf-8").splitlines()][:count]


def batches(rows: Sequence[Sequence[int]], size: int = 25) -> Iterator[list[int]]:
    """Indices of rows of like lengths together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def eager_answers(base, adapter: Path, prompts: Sequence[Sequence[int]], tokens: int, ends: Sequence[int]) -> list[list[int]]:
    """Greedy, of the float32 model steered by the adapter's own definition."""
    from reft_export.eager.steering import greedy_tokens, steered
    from runtimes.edits.adapter import load_adapter

    answers: list[list[int]] = [[] for _ in prompts]
    with steered(base.model, load_adapter(adapter)) as steering:
        for group in batches(prompts):
            width = max(len(prompts[i]) for i in group)
            ids, mask = torch.zeros(len(group), width, dtype=torch.long), torch.zeros(len(group), width, dtype=torch.long)
            for row, i in enumerate(group):  # padded on the left
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            for i, found in zip(group, greedy_tokens(base.model, ids, mask, tokens, steering=steering, eos=ends), strict=True):
                answers[i] = found
    return answers


def bundle_answers(session, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    from runtimes.generation import greedy_tokens

    answers: list[list[int]] = [[] for _ in prompts]
    for group in batches(prompts):
        for i, found in zip(group, greedy_tokens(session, [prompts[i] for i in group], tokens).tolist(), strict=True):
            answers[i] = found
    return answers


def passed(base, task: Task, lines: Sequence[dict[str, str]], answers: Sequence[Sequence[int]], ends: Sequence[int]) -> int:
    """How many answers, each up to its end token, pass."""
    texts = []
    for answer in answers:
        end = next((i for i, token in enumerate(answer) if token in ends), len(answer))
        texts.append(base.tokenizer.decode(answer[:end], skip_special_tokens=True))
    return sum(task.passes(line, text) for line, text in zip(lines, texts, strict=True))


def count(model: str, folder: Path, bundles: Sequence[Path], names: Sequence[str], prompts: int, *, eager: bool) -> None:
    from reft_export.base.load import load_base
    from runtimes.artifacts.bundle import open_bundle
    from runtimes.open import open_session

    base = load_base(model, require_tokenizer=True)
    tokenizer: Any = base.tokenizer
    config = base.model.generation_config
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id or [])
    print("| model | adapter | passed | of | s |\n|---|---|---|---|---|", flush=True)

    def rows(lines: Sequence[dict[str, str]]) -> list[list[int]]:
        chats = [[{"role": "user", "content": line["prompt"]}] for line in lines]
        rendered = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def tell(what: str, answer: Callable[[str, list[list[int]]], list[list[int]]]) -> None:
        for name in names:
            lines, started = held_out(folder, name, prompts), time.monotonic()
            right = passed(base, TASKS[name], lines, answer(name, rows(lines)), ends)
            print(f"| {what} | {name} | {right} | {len(lines)} | {time.monotonic() - started:.0f} |", flush=True)

    if eager:
        tell("eager float32", lambda name, ids: eager_answers(base, folder / name, ids, TASKS[name].answer_tokens, ends))
    for bundle in bundles:
        with open_session(open_bundle(bundle)) as session:

            def answer(name: str, ids: list[list[int]]) -> list[list[int]]:
                session.set_adapter(name)
                return bundle_answers(session, ids, TASKS[name].answer_tokens)

            tell(bundle.name, answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("verb", choices=("train", "count"))
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--only", choices=TASKS, action="append")
    parser.add_argument("--reviews", type=Path, default=Path("real-models"), help="where review_text.py downloads its sentences")
    parser.add_argument("--prompts", type=int, default=HELD_OUT)
    parser.add_argument("--no-eager", dest="eager", action="store_false")
    asked = parser.parse_args()
    names = asked.only or list(TASKS)
    if asked.verb == "train":
        train_tasks(asked.model, asked.folder, names, asked.reviews)
    else:
        count(asked.model, asked.folder, asked.bundles, names, asked.prompts, eager=asked.eager)


if __name__ == "__main__":
    main()
