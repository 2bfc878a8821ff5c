"""What can be asked of a build."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from runtimes.errors import InputError
from runtimes.tensorrt.library import module_name


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """``None`` leaves a choice to the bundle and the machine; see building/plan.py."""

    target: str
    compute_capabilities: tuple[str, ...] = ()
    freeze: str | None = None
    plugin: Path | None = None
    use_plugin: bool = True
    max_batch: int | None = None
    max_sequence: int | None = None
    context: int | None = None
    max_slots: int | None = None
    max_rank: int | None = None
    weight_streaming: bool = False
    timing_cache: Path | None = None
    workspace: int | None = None
    """MiB that the builder's layers may take for scratch; None leaves it to TensorRT, which takes what the GPU has."""

    def __post_init__(self) -> None:
        module_name(self.target)
        if self.plugin is not None and not self.use_plugin:
            raise InputError("--plugin and --no-plugin exclude each other; give one of them")
        bank = "--max-slots" if self.max_slots is not None else "--max-rank" if self.max_rank is not None else None
        if self.freeze is not None and bank is not None:
            raise InputError(f"{bank} bounds the adapters that swap, and with --freeze none does; leave one of the two out")
        if self.workspace is not None and self.workspace < 1:
            raise InputError(f"--workspace {self.workspace} is no memory; give MiB, at least 1")
        if self.timing_cache is not None and self.target == "tensorrt-rtx":
            raise InputError(
                "--timing-cache has no use with tensorrt-rtx, which times nothing while it builds: it compiles kernels on the device, at "
                "the first run; leave it out"
            )
        if self.timing_cache is not None and not self.timing_cache.absolute().parent.is_dir():
            raise InputError(f"--timing-cache {self.timing_cache}: its folder does not exist; make it first")
        if self.timing_cache is not None and self.timing_cache.is_dir():
            raise InputError(f"--timing-cache {self.timing_cache} is a folder; name the file that holds the timings, new or not")

    def command(self, source: Path, output: Path) -> str:
        """The command line that builds this engine again."""
        words = ["reft-export", "build", str(source), "--target", self.target]
        if self.target == "tensorrt-rtx":  # the other one builds for the GPU that is there
            words += [word for name in self.compute_capabilities for word in ("--sm", name.replace(".", ""))]
        for option, value in (
            ("--freeze", self.freeze),
            ("--plugin", self.plugin),
            ("--max-batch", self.max_batch),
            ("--max-sequence", self.max_sequence),
            ("--context", self.context),
            ("--max-slots", self.max_slots),
            ("--max-rank", self.max_rank),
            ("--timing-cache", self.timing_cache),
            ("--workspace", self.workspace),
        ):
            words += [] if value is None else [option, str(value)]
        words += [] if self.use_plugin else ["--no-plugin"]
        words += ["--weight-streaming"] if self.weight_streaming else []
        return shlex.join([*words, "-o", str(output), "--force"])


def parse_compute_capability(text: str) -> str:
    """ "8.6" of 86, 8.6, sm86 or sm_86; raises InputError."""
    digits = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    if not digits:
        raise InputError(f"--sm {text!r} is not a compute capability; give it like 86 or 8.6")
    return f"{digits[1]}.{digits[2]}"
