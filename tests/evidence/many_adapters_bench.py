"""Requests that each want another adapter: a bundle's batch beside llama.cpp with a LoRA for each, and stock onnxruntime-genai.

    PYTHONPATH=tests python -m evidence.many_adapters_bench BUNDLE real-models/smollm2.gguf [--threads 2] [--threads 1] [--rounds 3]

BUNDLE and the GGUF file are of one base. All requests come at once, random tokens, greedy, of one length. The ways take turns, forward and
backward, each in a process that waits while the others run:

    ours        Batcher and AdapterBank: one batch, a row of it an adapter
    ours, base  the same without adapters
    genai       stock onnxruntime-genai (an environment is made) on the same bundle: a request at a time, its adapter set before it
    swapped     llama.cpp: a request at a time, its LoRA set before it. That is what llama-server does with them: a batch takes slots of
                equal LoRA alone, beginning with the first slot that generates, and so that one until it is done (llama.cpp v0.5.0,
                tools/server/server-context.cpp: can_batch_with, pre_decode)
    regrouped   llama.cpp: a token of each request in turn, its LoRA set before each
    batched     llama.cpp without LoRA: all requests in one batch, which no LoRA for each request can have

The adapters are random: LoReFT at every token on all plain nodes of the bundle; LoRA on q and v of every layer. Held before anything is
timed: at accuracy level 1 the batch answers what genai answers request by request, by onnxruntime's own swap of the same adapters;
llama.cpp's two ways with LoRA answer alike; every answer of ours and of llama.cpp is another one without adapters, and with the next
request's adapter. Every timed round answers what the first one did.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np

from evidence.bank_bench import write_adapters
from evidence.llama_cpp import VERSION, LlamaCpp, llama_cpp
from evidence.lora_gguf import write_lora
from graph_passes.external import load_graph
from graph_passes.slots.add import rule_names
from reft_export.bundling.files import write_adapter
from reft_export.parity.ladder import with_float_activations
from runtimes.artifacts.bundle import Bundle, bank_file, open_bundle
from runtimes.bank import AdapterBank
from runtimes.batching import Batcher
from runtimes.edits.adapter import load_adapter
from runtimes.generation import GenerationSettings
from runtimes.ort.session import OrtSession
from runtimes.text.tokenizer import Tokenizer

GENAI = ("onnxruntime==1.31.1", "onnxruntime-genai==0.18.0", "numpy")
WARM_UP = 10
"""New tokens of the round that is not counted: enough for all requests to be in our batch at once, which takes prompts in chunks."""
CHECKED = 16
"""New tokens of the rounds that are held before anything is timed."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """``steps``: milliseconds of each decode step of as many requests as the way batches; prompts are in ``seconds`` alone."""

    seconds: float
    steps: tuple[float, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def speed(self) -> float:
        """New tokens a second of all requests."""
        return sum(map(len, self.answers)) / self.seconds


Way = Callable[[int, int], Round]
"""(requests, new tokens of each) -> what they took."""


def table(rounds: Mapping[str, Sequence[Round]], rows: Mapping[str, int]) -> list[str]:
    """A line of each way, the first one's speed over it by round. ``rows``: requests of one of its steps.

    | way | tokens a second: median (least to most) | the first way over it: median of rounds | a step, ms | a token of every request, ms |
    """
    first = next(iter(rounds.values()))
    lines = []
    for name, found in rounds.items():
        speeds = [each.speed for each in found]
        ratio = np.median([ours.speed / each.speed for ours, each in zip(first, found, strict=True)])
        step = float(np.median(np.concatenate([each.steps for each in found])))
        every = step * len(found[0].answers) / rows[name]
        speed = f"{np.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
        lines.append(f"| {name} | {speed} | {ratio:.2f} | {step:.1f} | {every:.0f} |")
    return lines


def differing(one: Round, other: Round) -> list[int]:
    """Requests whose answers are not the same."""
    return [number for number, (a, b) in enumerate(zip(one.answers, other.answers, strict=True)) if a != b]


def hold_equal(what: str, one: Round, other: Round) -> None:
    if found := differing(one, other):
        sys.exit(f"{what}: the answers of requests {found} differ, expected none; nothing was timed")


def hold_others(what: str, one: Round, other: Round) -> None:
    """Every answer of a request is another one."""
    if same := sorted(set(range(len(one.answers))) - set(differing(one, other))):
        sys.exit(f"{what}: the answers of requests {same} are the same, expected others; nothing was timed")


class Ours:
    """Requests on one Batcher; ``names``: the adapter of each, None for the base."""

    def __init__(self, session: OrtSession, bank: AdapterBank, prompts: Sequence[list[int]]) -> None:
        self._prompts = prompts
        tokenizer = Tokenizer.load(session.bundle.folder, session.bundle.manifest.model)
        endless = replace(tokenizer, stop_token_ids=frozenset())  # answers are of one length
        self.batcher = Batcher(session, endless, bank, most_rows=len(prompts), queue=len(prompts), prefix_bytes=0)

    def run(self, names: Sequence[str | None], count: int, new: int) -> Round:
        settings, steps = GenerationSettings(max_new_tokens=new), []
        started = time.perf_counter()
        asked = zip(self._prompts[:count], names, strict=False)
        tickets = [self.batcher.submit(prompt, settings, adapter=name) for prompt, name in asked]
        more = True
        while more:
            load, before = self.batcher.load, time.perf_counter()
            more = self.batcher.step()
            if load.decoding == count:  # no prompt was fed in this step
                steps.append((time.perf_counter() - before) * 1e3)
        seconds = time.perf_counter() - started
        return Round(seconds=seconds, steps=tuple(steps), answers=tuple(tuple(ticket.result(0).tokens) for ticket in tickets))


class Worker:
    """Another process that answers a line for a line."""

    def __init__(self, command: Sequence[object], environment: Mapping[str, str] | None = None) -> None:
        whole = None if environment is None else {**os.environ, **environment}
        self._name = Path(str(command[0])).name
        self._process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=whole
        )

    def write(self, *lines: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.writelines(f"{line}\n" for line in lines)
        self._process.stdin.flush()

    def read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self._name} ended with {self._process.wait()} before it answered; its reason stands above")
        return line

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Genai:
    def __init__(self, python: Path, folder: Path, threads: int, adapters: Sequence[Path], prompts: Sequence[list[int]]) -> None:
        self._worker = Worker([python, Path(__file__).with_name("genai_requests.py"), folder, threads, *adapters])
        self._worker.write(json.dumps(prompts))
        self.close = self._worker.close

    def run(self, count: int, new: int) -> Round:
        self._worker.write(json.dumps({"count": count, "new": new}))
        found = json.loads(self._worker.read())
        return Round(seconds=found["seconds"], steps=tuple(found["steps"]), answers=tuple(map(tuple, found["answers"])))


class Llama:
    def __init__(self, built: LlamaCpp, file: Path, threads: int, adapters: Sequence[Path], prompts: Sequence[list[int]]) -> None:
        self._worker = Worker([built.program, "requests", file, threads, *adapters], built.environment)
        self._worker.write(*(" ".join(map(str, prompt)) for prompt in prompts))
        self.close = self._worker.close

    def run(self, how: str, count: int, new: int, shift: int = 0) -> Round:
        self._worker.write(f"{how} {count} {new} {shift}")
        seconds, *steps = map(float, self._worker.read().split())
        answers = tuple(tuple(map(int, self._worker.read().split())) for _ in range(count))
        return Round(seconds=seconds, steps=tuple(steps), answers=answers)


def genai_files(bundle: Bundle, folders: Sequence[Path], target: Path) -> list[Path]:
    """The adapters as the bundle would hold them, outside of it."""
    (target / "adapters").mkdir(parents=True)
    rules = rule_names(load_graph(bundle.graph_path).graph)
    files = []
    for folder in folders:
        adapter = load_adapter(folder)
        write_adapter(target, folder.name, adapter, bundle.nodes, precision=bundle.manifest.precision, rules=rules)
        files.append(target / bank_file(folder.name, adapter.where))
    return files


def stock_genai(home: Path) -> Path:
    """The interpreter of an environment with onnxruntime-genai and nothing of ours, made once."""
    environment = home / "genai-0.18.0"
    if not (environment / "ready").exists():
        shutil.rmtree(environment, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run([environment / "bin" / "python", "-m", "pip", "-q", "install", *GENAI], check=True)
        (environment / "ready").touch()
    return environment / "bin" / "python"


@dataclass(frozen=True, kw_only=True)
class Made:
    """What every process is given."""

    bundle: Bundle
    adapters: Path
    """Their folders are in it."""
    names: tuple[str, ...]
    onnx_adapters: tuple[Path, ...]
    gguf: Path
    loras: tuple[Path, ...]
    prompts: list[list[int]]
    new: int

    def bank(self, bundle: Bundle) -> AdapterBank:
        bank = AdapterBank(bundle)
        bank.scan(self.adapters)
        for name in self.names:
            bank.load(name)
        return bank

    @property
    def count(self) -> int:
        return len(self.prompts)


def make(asked: argparse.Namespace, folder: Path) -> Made:
    bundle, count = open_bundle(asked.bundle), asked.requests
    write_adapters(bundle, folder / "adapters", count, asked.rank)
    names = tuple(f"a{number}" for number in range(count))
    base = gguf.GGUFReader(asked.gguf)
    loras = tuple(write_lora(folder / f"lora{number}.gguf", base, rank=asked.lora_rank, seed=number) for number in range(count))
    size = bundle.manifest.model.vocab_size, (count, asked.prompt_tokens)
    return Made(
        bundle=bundle,
        adapters=folder / "adapters",
        names=names,
        onnx_adapters=tuple(genai_files(bundle, [folder / "adapters" / name for name in names], folder / "genai")),
        gguf=asked.gguf,
        loras=loras,
        prompts=np.random.default_rng(0).integers(0, *size).tolist(),
        new=asked.new_tokens,
    )


def check_exact(made: Made, python: Path, threads: int) -> None:
    """Our batch at accuracy level 1 against stock genai, whose adapters onnxruntime swaps, each request by itself."""
    with with_float_activations(made.bundle) as exact:
        for file in made.bundle.folder.glob("*.json"):
            if not (exact.folder / file.name).exists():
                shutil.copyfile(file, exact.folder / file.name)
        with OrtSession(exact, threads=threads) as session:
            ours = Ours(session, made.bank(exact), made.prompts)
            batch = ours.run(made.names, made.count, CHECKED)
            ours.batcher.close()
        genai = Genai(python, exact.folder, threads, made.onnx_adapters, made.prompts)
        alone = genai.run(made.count, CHECKED)
        genai.close()
    hold_equal("our batch against each request by itself, accuracy level 1", batch, alone)
    print(f"accuracy level 1: the {made.count} answers of our batch are those of stock genai, one by one", flush=True)


@contextmanager
def opened(made: Made, python: Path, built: LlamaCpp, threads: int) -> Iterator[tuple[Ours, Genai, Llama]]:
    with ExitStack() as stack, OrtSession(made.bundle, threads=threads) as session:
        print(f"kernel {session.kernel}", flush=True)
        ours = Ours(session, made.bank(made.bundle), made.prompts)
        stack.callback(ours.batcher.close)
        genai = Genai(python, made.bundle.folder, threads, made.onnx_adapters, made.prompts)
        stack.callback(genai.close)
        llama = Llama(built, made.gguf, threads, made.loras, made.prompts)
        stack.callback(llama.close)
        yield ours, genai, llama


def check(made: Made, ours: Ours, genai: Genai, llama: Llama) -> None:
    """Every way's answers are its adapters', and ours are as near to those of one row as level 4 leaves them."""
    count, new = made.count, CHECKED
    batch = ours.run(made.names, count, new)
    hold_others("ours with adapters, and without", batch, ours.run([None] * count, count, new))
    hold_others("ours, each with its own adapter and the next one's", batch, ours.run([*made.names[1:], made.names[0]], count, new))
    same = count - len(differing(batch, genai.run(count, new)))
    print(f"accuracy level 4: {same} of {count} answers of our batch are stock genai's, one by one", flush=True)
    swapped, base = llama.run("swapped", count, new), llama.run("alone", count, new)
    hold_equal("llama.cpp swapped and regrouped", swapped, llama.run("regrouped", count, new))
    hold_others("llama.cpp with LoRA, and without", swapped, base)
    hold_others("llama.cpp, each with its own LoRA and the next one's", swapped, llama.run("swapped", count, new, 1))
    same = count - len(differing(base, llama.run("batched", count, new)))
    print(f"llama.cpp without LoRA: {same} of {count} answers of one batch are those of one by one", flush=True)


def measure(ways: Mapping[str, Way], count: int, new: int, turns: int) -> dict[str, list[Round]]:
    for way in ways.values():
        way(count, WARM_UP)
    rounds: dict[str, list[Round]] = {name: [] for name in ways}
    for turn in range(turns):
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            found = ways[name](count, new)
            rounds[name].append(found)
            if wrong := differing(rounds[name][0], found):
                sys.exit(f"{name}: in round {turn} the answers of requests {wrong} are others than in round 0; its figures are of no use")
            print(f"round {turn}, {name}: {found.speed:.1f} tokens/s", file=sys.stderr, flush=True)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=1, help="of our adapters")
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--home", type=Path, default=Path("real-models"), help="where llama.cpp and stock genai are downloaded")
    asked = parser.parse_args()
    threads = asked.threads or [2, 1]
    built, python = llama_cpp(asked.home), stock_genai(asked.home)
    with tempfile.TemporaryDirectory() as scratch:
        made = make(asked, Path(scratch))
        print(f"{asked.bundle}, {VERSION} on {asked.gguf.name}, {', '.join(GENAI[:2])}; {made.count} requests", flush=True)
        check_exact(made, python, threads[0])
        for number, each in enumerate(threads):
            with opened(made, python, built, each) as (ours, genai, llama):
                if number == 0:
                    check(made, ours, genai, llama)
                ways: dict[str, Way] = {
                    "ours": lambda count, new, ours=ours: ours.run(made.names, count, new),
                    "ours, base": lambda count, new, ours=ours: ours.run([None] * count, count, new),
                    "genai": genai.run,
                    **{how: lambda *asked, how=how, llama=llama: llama.run(how, *asked) for how in ("swapped", "regrouped", "batched")},
                }
                rounds = measure(ways, made.count, made.new, asked.rounds)
            print(f"\n| {each} thread(s) | tokens/s | ours over it | a step, ms | a token of every request, ms |\n|---|---|---|---|---|")
            rows = {name: made.count if name in ("ours", "ours, base", "batched") else 1 for name in ways}
            print("\n".join(table(rounds, rows)), flush=True)


if __name__ == "__main__":
    main()
