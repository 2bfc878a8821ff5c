"""A GGUF file with other weights: every key of a packaged one, its tensors those of a model folder, as float32.

    PYTHONPATH=tests python -m evidence.float_gguf real-models/smollm2.gguf FOLDER/ OUT.gguf

``FOLDER`` is what models.relabel makes of the same file. What llama.cpp quantizes of OUT was never on a 4-bit grid.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
from models.gguf_files import as_converted
from safetensors.numpy import load_file
from transformers import AutoConfig

ALL_F32 = 0


def write(source: Path, folder: Path, target: Path) -> Path:
    """``target``: the keys of ``source``, the tensors of ``folder`` under GGUF's names, in GGUF's order of rows.

    Raises ValueError where the two have other tensors or shapes.
    """
    reader, config = gguf.GGUFReader(source), AutoConfig.from_pretrained(folder)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE):
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    writer.add_file_type(ALL_F32)
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    for name, values in sorted(load_file(folder / "model.safetensors").items()):
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if (there := shapes.pop(stored or "", None)) != values.shape:
            raise ValueError(f"{folder}: {name} {values.shape} is no tensor of {source}, where {stored} is {there}")
        writer.add_tensor(str(stored), as_converted(name, values.astype(np.float32), config))
    if shapes:
        raise ValueError(f"{folder} lacks {next(iter(shapes))} of {source}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path)
    asked = parser.parse_args()
    print(write(asked.source, asked.folder, asked.target))


if __name__ == "__main__":
    main()
