"""Where the op library is looked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from runtimes.native_library import library_name


def find_in(folder: Path) -> str:
    """find_op_library() where runtimes.native is the package at ``folder``."""
    # An editable install's finder would answer before the path does: finders of that kind are objects, Python's own are classes.
    code = (
        "import sys, types, runtimes; runtimes.__path__.insert(0, sys.argv[1]);"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)];"
        "from runtimes.native_library import find_op_library; print(find_op_library())"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True, timeout=120)
    return run.stdout.strip()


def test_a_library_in_the_package_is_found_and_its_absence_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "native" / "lib").mkdir(parents=True)
    (tmp_path / "native" / "__init__.py").touch()
    assert find_in(tmp_path) == "None"
    library = tmp_path / "native" / "lib" / library_name()
    library.touch()
    assert find_in(tmp_path) == str(library)
