"""``PYTHONPATH=tests python -m evidence.first_token BUNDLE [ROUNDS]``: an idle ``serve`` against a session in this process.

Both have one thread, both are warm, no prompt comes twice, and the answer is one token. They take turns, so that what else the machine does
falls on both; a ratio is of one turn. Seconds are from the messages to the first piece of text: template, tokens, prefill, one token, its
text, and for the server HTTP both ways. On a busy machine they are noise, and seconds of the processor are not: of the server's process and
of its client's.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from runtimes.generation import GenerationSettings, generate
from runtimes.open import open_artifact, open_session
from runtimes.session import Session
from runtimes.text.chat import ChatTemplate
from runtimes.text.prompts import encode
from runtimes.text.tokenizer import Tokenizer

WORDS = (4, 100, 400)
"""Of a prompt, about as many tokens."""
VOCABULARY = "river stone light morning garden window paper silver market winter engine letter music shadow harbor valley".split()


@dataclass(frozen=True, kw_only=True)
class Seconds:
    clock: float
    processor: float


class Process:
    """The session in this process."""

    def __init__(self, session: Session, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._session, self._tokenizer, self._template = session, tokenizer, template

    def first(self, prompt: str) -> Seconds:
        start, processor = time.perf_counter(), time.process_time()
        ids = encode([{"role": "user", "content": prompt}], self._tokenizer, self._template, None)
        generate(self._session, self._tokenizer, [ids], GenerationSettings(max_new_tokens=1))
        return Seconds(clock=time.perf_counter() - start, processor=time.process_time() - processor)


class Server:
    """``serve``, by a connection of its own for each request."""

    def __init__(self, url: str, process: int) -> None:
        self._place, self._process = urlsplit(url), process

    def first(self, prompt: str) -> Seconds:
        body = {"model": "base", "messages": [{"role": "user", "content": prompt}], "max_tokens": 1, "temperature": 0, "stream": True}
        processor, start = self._processor(), time.perf_counter()
        connection = http.client.HTTPConnection(self._place.hostname or "", self._place.port, timeout=120)
        connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        answer, took = connection.getresponse(), 0.0
        while line := answer.readline():
            if not took and line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                took = time.perf_counter() - start
        connection.close()
        return Seconds(clock=took or time.perf_counter() - start, processor=self._processor() - processor)

    def _processor(self) -> float:
        """Of the server and of this process."""
        threads = Path(f"/proc/{self._process}/task").glob("*/schedstat")
        return time.process_time() + sum(int(each.read_text().split()[0]) for each in threads) / 1e9


@contextmanager
def server(bundle: Path) -> Iterator[Server]:
    command = [sys.executable, "-m", "reft_export.cli.main", "serve", str(bundle), "--port", "0", "--threads", "1", "--prefix-mb", "0"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    try:
        yield Server(running.stderr.readline().rpartition(" at ")[2].strip(), running.pid)
    finally:
        running.terminate()
        running.communicate()


def prompt_of(random: np.random.Generator, words: int) -> str:
    return " ".join(random.choice(VOCABULARY, words))


def main(bundle: Path, rounds: int = 20) -> None:
    opened = open_artifact(bundle)
    tokenizer, random = Tokenizer.load(opened.folder, opened.manifest.model), np.random.default_rng(0)
    with open_session(opened, threads=1) as session, server(bundle) as served:
        here = Process(session, tokenizer, ChatTemplate.load(opened.folder))
        for words in WORDS:
            for each in (here, served) * 2:  # warm
                each.first(prompt_of(random, words))
            pairs = []
            for i in range(rounds):
                pair = {each: each.first(prompt_of(random, words)) for each in ((here, served), (served, here))[i % 2]}
                pairs.append((pair[here], pair[served]))
                time.sleep(0.05)  # the server is idle again
            told = [_told(name, [(getattr(a, name), getattr(b, name)) for a, b in pairs]) for name in ("clock", "processor")]
            print(f"{words} words, {rounds} pairs: {'; '.join(told)}", flush=True)


def _told(name: str, pairs: list[tuple[float, float]]) -> str:
    own, other = 1000 * np.median(pairs, 0)
    low, middle, high = np.quantile([b / a for a, b in pairs], [0.25, 0.5, 0.75])
    return f"{name} {own:.1f} ms here, {other:.1f} of serve, ratio {middle:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
