"""Prompt lookup: tokens that followed the same words earlier are fed along with the next one, and kept as far as they are what is chosen.

The row chooses each token from the logits behind those that it chose before, as ever: greedy or sampled, with a penalty or a grammar. A
step of several tokens only computes those logits ahead of time; the columns of what was not chosen are overwritten by the next step. Which
tokens are edited follows from the prompt's length, which every step is told: none of these counts as prompt.

Source: Saxena 2023, prompt lookup decoding; transformers' ``prompt_lookup_num_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtimes.artifacts.artifact import Artifact
from runtimes.errors import InputError

LONGEST = 3
"""Tokens at the end of a context that are looked for, and down to SHORTEST where there are none: of one token the next is hardly known."""
SHORTEST = 2


def check_speculation(artifact: Artifact, most: int) -> None:
    """Raises InputError for a number below 0, and where ``most`` tokens ahead cannot be taken back or have no logits."""
    if most < 0:
        raise InputError(f"speculate is {most}, expected at least 1 token, or 0 for none")
    if not most:
        return
    if artifact.manifest.kv_cache != "in-place":  # nor is it of any engine, which `build` makes of the other graphs
        raise InputError(
            f"{artifact.folder} does not write its KV cache in place, and tokens ahead could not be taken back; run it without "
            "--speculate, or a bundle of export --target onnxruntime"
        )
    if artifact.manifest.logits == "last":
        raise InputError(
            f"{artifact.folder} has logits of the last token alone; run it without --speculate, or export it with --logits all"
        )


def proposed(tokens: Sequence[int], most: int) -> list[int]:
    """At most ``most`` tokens that followed the latest earlier place of the last LONGEST ``tokens``, or of fewer; of places that are
    followed by less than ``most``, the first."""
    ids = np.asarray(tokens, np.int64)
    for size in range(min(LONGEST, len(ids) - 1), SHORTEST - 1, -1):
        before = len(ids) - size
        same = np.logical_and.reduce([ids[i : before + i] == ids[before + i] for i in range(size)])
        places = np.flatnonzero(same) + size
        if places.size:
            followed = places[places + most <= len(ids)]
            start = int(followed[-1] if followed.size else places[0])
            return ids[start : start + most].tolist()
    return []
