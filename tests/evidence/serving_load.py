"""``PYTHONPATH=tests python -m evidence.serving_load [SECONDS]``: a thousand streams at once against ``serve`` on the toy bundle.

Rounds of 1,000 requests over four adapters (one of them none), every fifth held to a JSON schema, each answer against ``generate`` for it
alone; client and server share one process. Prints a line a round: answers that were right, seconds to the first piece of text, seconds
between two, memory.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

from served import ADAPTERS, Served, ServeSettings, serving, toy  # noqa: E402

from runtimes.artifacts.bundle import Bundle  # noqa: E402
from runtimes.generation import GenerationSettings, generate  # noqa: E402
from runtimes.ort.session import OrtSession  # noqa: E402
from runtimes.text.grammars import Grammars  # noqa: E402
from runtimes.text.tokenizer import Tokenizer  # noqa: E402

STREAMS = 1000
KINDS = 40
"""Different requests."""
SCHEMA = {"type": "string", "pattern": "^[a-f]{3,8}$"}


@dataclass(frozen=True, kw_only=True)
class Request:
    body: dict[str, object]
    answer: str


@dataclass(kw_only=True)
class Heard:
    right: bool = False
    first: float = 0.0
    between: list[float] = field(default_factory=list)


def requests(bundle: Bundle) -> list[Request]:
    session, tokenizer = OrtSession(bundle, threads=1), Tokenizer.load(bundle.folder, bundle.manifest.model)
    grammar = Grammars(tokenizer, bundle.manifest.model.vocab_size).json_schema(SCHEMA)
    form = {"type": "json_schema", "json_schema": {"name": "letters", "schema": SCHEMA}}
    made = []
    for i in range(KINDS):
        name, prompt = (None, *ADAPTERS)[i % 4], "The quick brown fox jumps"[: 2 + i % 20]
        held = i % 5 == 4
        settings = GenerationSettings(max_new_tokens=20 + i % 20, temperature=i % 2, seed=i, grammar=grammar if held else None)
        session.set_adapter(name)
        answer = generate(session, tokenizer, [prompt], settings)[0].text
        body = {"model": name or "base", "prompt": prompt, "max_tokens": settings.max_new_tokens, "temperature": i % 2, "seed": i}
        body |= {"stream": True, **({"response_format": form} if held else {})}
        made.append(Request(body=body, answer=answer))
    return made


async def hear(client: httpx.AsyncClient, request: Request) -> Heard:
    start, last, text, heard = time.perf_counter(), 0.0, "", Heard()
    async with client.stream("POST", "/v1/completions", json=request.body) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            text += json.loads(line[len("data: ") :])["choices"][0]["text"]
            now = time.perf_counter()
            if last:
                heard.between.append(now - last)
            else:
                heard.first = now - start
            last = now
    heard.right = text == request.answer
    return heard


async def rounds(served: Served, made: list[Request], seconds: float) -> None:
    limits, end = httpx.Limits(max_connections=STREAMS + 10, max_keepalive_connections=0), time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=served.url, limits=limits, timeout=600) as client:
        while time.monotonic() < end:
            start = time.perf_counter()
            heard = await asyncio.gather(*(hear(client, made[i % KINDS]) for i in range(STREAMS)))
            took, between = time.perf_counter() - start, np.concatenate([each.between for each in heard])
            first = np.median([each.first for each in heard])
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
            print(
                f"right {sum(each.right for each in heard)} of {STREAMS} in {took:.1f} s; first p50 {first:.2f} s; "
                f"between p50 {np.median(between):.4f} p99 {np.quantile(between, 0.99):.4f} s; {memory:.0f} MB",
                flush=True,
            )


def main(seconds: float = 60) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * STREAMS, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with tempfile.TemporaryDirectory() as folder:
        bundle = toy(Path(folder) / "bundle")
        made = requests(bundle)
        with serving(bundle, ServeSettings(concurrency=2 * STREAMS), queue=2 * STREAMS) as served:
            asyncio.run(rounds(served, made, seconds))


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
