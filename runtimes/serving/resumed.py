"""A stream of events that another replica begins anew: what the client has already is passed over, and the rest goes on.

With its seed a request is answered alike by every replica, but for the stream's id and time, and for how the events of its answers (``n``)
are mixed. So each answer's events are counted, and held to what was said before.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

from runtimes.serving.refusals import Refusal, json_text

DONE = "[DONE]"
HEAD = ("id", "created")


class Resumed:
    """What was said of one stream."""

    def __init__(self) -> None:
        self._said: defaultdict[int | None, list[Any]] = defaultdict(list)
        """Of each answer; of None, the events that are of none."""
        self._heard: Counter[int | None] = Counter()
        """Of this replica."""
        self._head: dict[str, Any] = {}
        self._ended = False
        """The client was told that it is done."""

    def again(self) -> None:
        """Another replica begins."""
        self._heard.clear()

    def new(self, data: str) -> str | None:
        """What the client is told of an event; None: it has that. Raises Refusal where the replica says other than the one before."""
        if data == DONE:
            ended, self._ended = self._ended, True
            return None if ended else data
        event = json.loads(data)
        if "error" in event:
            return data
        choice = event["choices"][0] if event["choices"] else None
        index = None if choice is None else choice["index"]
        number = self._heard[index]
        self._heard[index] += 1
        said = None if choice is None else [choice.get("delta"), choice.get("text"), choice["finish_reason"]]
        if number < len(self._said[index]):
            if said != self._said[index][number]:
                raise Refusal(503, "the replica that answered was lost, and another one goes on otherwise; ask again", code="replica_lost")
            return None
        self._said[index].append(said)
        if not self._head:
            self._head = {key: event[key] for key in HEAD}
            return data
        return data if all(event[key] == value for key, value in self._head.items()) else json_text(event | self._head)
