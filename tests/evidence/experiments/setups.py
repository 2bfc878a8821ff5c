"""The rows of docs/experiments.md: what each trains, in the order in which they are run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from evidence.training_bench import LINEAR

SEEDS = (1, 2, 3)
LORA = {"LoRA q, v": ("q_proj", "v_proj"), "LoRA all linears": tuple(LINEAR)}
"""peft's, by its name here: the modules."""
TERMS = ("direft", "noreft", "consreft", "lobireft", "red")
BASE = "base"
"""Nothing is trained."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One trained row. ``method``: of METHODS, of LORA, or BASE; ``rank`` of LoRA, too, whose alpha is twice its rank."""

    section: str
    name: str
    seed: int = 1
    task: str = "sentiment"
    method: str = "loreft"
    rank: int = 4
    layers: str = "4;10;18;24"
    positions: str = "l1"
    tied: bool = True
    lr: float = 2e-3
    steps: int = 60
    batch_size: int = 8
    examples: int | None = None
    """Of the training lines; None: all."""
    saved: str = ""
    """In place of training: the key of a row whose edit is switched on."""
    strength: float = 1.0
    """By which what a saved edit adds is multiplied."""

    @property
    def key(self) -> str:
        return f"{self.section}/{self.name}/{self.seed}"


LOREFT = Setup(section="sentiment", name="LoReFT r4")
CHOSEN = replace(LOREFT, name="LoReFT r4, chosen", lr=1e-2)
"""By its loss on the lines for choosing, of seed 1."""
FORMS = (
    replace(LOREFT, name="prompt, 0.002", positions="prompt"),
    replace(LOREFT, name="prompt, 0.01", positions="prompt", lr=1e-2),
    replace(LOREFT, name="l1, r1 in 19 layers, 0.01", rank=1, layers="4-22", lr=1e-2),
    replace(LOREFT, name="prompt, r1 in 19 layers, 0.004", rank=1, layers="4-22", positions="prompt", lr=4e-3),
    replace(LOREFT, name="l5, 0.004", positions="l5", lr=4e-3),
    replace(LOREFT, name="l1, 5 layers in the middle, 0.01", layers="8;10;12;14;16", lr=1e-2),
)
"""Other places for a twentieth of LoRA's parameters, to choose from."""
LORA_QV = Setup(section="sentiment", name="LoRA q, v", method="LoRA q, v", rank=8, lr=1e-3)
STYLE = Setup(section="style", name="LoReFT r4", task="style", positions="f5+l5", lr=4e-3, steps=40, batch_size=4)
STRENGTHENED = replace(STYLE, name="LoReFT r4, f5+l5").key
MEMORY = Setup(section="memory", name="", task="memory", rank=1, layers="14", lr=1e-2, steps=120, batch_size=1)


def setups() -> Iterator[Setup]:
    for seed in SEEDS:
        yield replace(LOREFT, seed=seed)
        yield replace(LORA_QV, seed=seed)
    yield replace(LOREFT, name=BASE, method=BASE, steps=0)
    yield from (replace(LOREFT, section="rate", name=f"LoReFT r4, {lr:g}", lr=lr) for lr in (5e-4, 1e-3, 4e-3, 1e-2))
    yield from (replace(CHOSEN, seed=seed) for seed in SEEDS)
    yield from (replace(form, section="form") for form in FORMS)
    yield replace(STYLE, name="LoReFT r4, f5+l5")
    yield replace(MEMORY, name="16 tokens")
    for strength in (0.0, 0.5, 1.0, 2.0, 3.0):
        yield replace(STYLE, section="strength", name=f"{strength:g}", task="strength", steps=0, saved=STRENGTHENED, strength=strength)
    yield replace(MEMORY, name="32 tokens")
    yield from (replace(STYLE, name=f"LoReFT r4, {positions}", positions=positions) for positions in ("prompt", "all"))
    for method in TERMS:
        yield replace(LOREFT, section="terms", name=method, method=method, rank=0 if method == "red" else 4)
    yield replace(STYLE, section="few", name="LoReFT r4, f5+l5, 5 examples", examples=5, batch_size=5)
    yield from (replace(LORA_QV, section="rate", name=f"LoRA q, v, {lr:g}", lr=lr) for lr in (3e-4, 3e-3))
    yield from (replace(LOREFT, section="rank", name=f"r{rank}", rank=rank) for rank in (1, 2, 8, 16))
    for layers in ("4", "10", "18", "24", "2-5", "12-15", "24-27", "all"):
        yield replace(LOREFT, section="layers", name=f"layers {layers}", layers=layers)
    yield replace(LORA_QV, name="LoRA all linears", method="LoRA all linears")
    yield replace(STYLE, name="LoReFT r4, f5+l5, untied", tied=False)
    yield replace(STYLE, name="LoReFT r4, l5", positions="l5")
    yield replace(STYLE, name="LoRA q, v", method="LoRA q, v", rank=8, lr=LORA_QV.lr)
    for seed in SEEDS:
        yield replace(LOREFT, section="few", name="LoReFT r4, 5 reviews", seed=seed, examples=5, batch_size=5, steps=40)
    for method in TERMS:
        for seed in SEEDS[1:]:
            yield replace(LOREFT, section="terms", name=method, method=method, seed=seed, rank=0 if method == "red" else 4)
    yield from (replace(MEMORY, name=f"{tokens} tokens") for tokens in (64, 128))
    yield from (replace(LOREFT, section="positions", name=positions, positions=positions) for positions in ("l3", "prompt", "all"))
