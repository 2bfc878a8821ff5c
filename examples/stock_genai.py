"""A steered bundle in stock onnxruntime-genai (`pip install 'reft-export[genai]'`). Nothing of this project is imported.

`python examples/stock_genai.py [BUNDLE [PROMPT]]`, after examples/train_and_export.py.
"""

import sys
from pathlib import Path

import onnxruntime_genai as genai

PROMPT = "<s><|user|>Tell me about the bright island.<|assistant|>"  # as the base's chat template renders it
folder, prompt = (*sys.argv[1:], *("examples-out/bundle", PROMPT)[len(sys.argv) - 1 :])

model = genai.Model(folder)
tokenizer = genai.Tokenizer(model)
adapters = genai.Adapters(model)
tokens = tokenizer.encode(prompt)
for path in (None, *sorted(Path(folder).glob("adapters/*.onnx_adapter"))):
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(tokens) + 48, do_sample=False)
    generator = genai.Generator(model, parameters)
    if path is not None:
        adapters.load(str(path), path.stem)
        generator.set_active_adapter(adapters, path.stem)
    generator.append_tokens(tokens)  # the whole prompt in one call, by which the graph tells the positions to edit
    while not generator.is_done():
        generator.generate_next_token()
    print(f"{path.stem if path else 'base'}: {tokenizer.decode(generator.get_sequence(0)[len(tokens) :])}")
