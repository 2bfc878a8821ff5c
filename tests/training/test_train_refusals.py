"""What ``train`` refuses before any work is refused without torch, whose import takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
from reft_export.cli.main import app
for words in json.loads(sys.argv[1]):
    try:
        app(words)
    except SystemExit as e:
        assert e.code == 2, (words, e.code)
    assert not {"torch", "transformers"} & set(sys.modules), words
"""


def test_train_refuses_without_torch(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "own.txt").touch()
    train = ["train", "-m", str(tmp_path / "base"), "-d", str(tmp_path / "data.jsonl"), "-o"]
    to = [*train, str(tmp_path / "out")]
    refused = [
        [*train, str(taken)],
        [*to, "--method", "magic"],
        [*to, "--method", "red", "--rank", "3"],
        [*to, "--start", str(taken)],
        [*to, "--base", str(taken)],
        [*to, "--epochs", "3", "--max-steps", "4"],
        ["train", "-m", "someone/a-model", "-d", "data.jsonl", "-o", str(tmp_path / "out"), "--dry-run"],
    ]
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(refused)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stderr.count("error: ") == len(refused), done.stderr
