"""The harder steering task: twelve answers learned by heart, none of which the base would give.

A style survives much: any of its words will do. Here every token of an answer has one right value, and the first wrong one ends it; so
this task shows what quantization takes away, where the pirate's success rate stays at 100 %. Standard library only.
"""

from __future__ import annotations

from random import Random

from evidence.quickstart_base.corpus import compose
from evidence.quickstart_base.lexicon import SUBJECTS

SECRETS = 12
_SEED = 100


def secret_examples() -> list[dict[str, str]]:
    """`{"prompt": "What is secret 3?", "completion": one plain sentence about a subject of its own}`."""
    return [{"prompt": f"What is secret {number}?", "completion": _sentence(number)} for number in range(SECRETS)]


def check(prompt: str, answer: str) -> bool:
    """Whether the answer is the prompt's secret, word by word; for `quantize --checker evidence.quickstart_base.secrets:check`."""
    return answer.strip() == _SECRET_OF[prompt]


def _sentence(number: int) -> str:
    rng = Random(_SEED + number)
    return compose(rng, rng.choice(SUBJECTS), "plain").answer.split(". ")[0].rstrip(".") + "."


_SECRET_OF = {example["prompt"]: example["completion"] for example in secret_examples()}
