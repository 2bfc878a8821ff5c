"""A device: open a bundle, prove it, and answer with and without its adapter. No torch, no transformers, no onnx.

`python examples/device.py [BUNDLE [PROMPT]]`, after examples/train_and_export.py.
"""

import sys

from runtimes import check_golden, generate, open_artifact, open_session
from runtimes.generation import GenerationSettings
from runtimes.text.chat import template_for
from runtimes.text.prompts import encode
from runtimes.text.tokenizer import Tokenizer

folder, prompt = (*sys.argv[1:], *("examples-out/bundle", "Tell me about the bright island.")[len(sys.argv) - 1 :])
settings = GenerationSettings(max_new_tokens=48)

bundle = open_artifact(folder)
tokenizer = Tokenizer.load(bundle.folder, bundle.manifest.model)
with open_session(bundle) as session:
    report = check_golden(bundle, session)
    report.require()  # raises ParityError, which lists every figure
    print(f"parity: {len(report.rungs)} comparisons pass, on {session.provider} with the {session.kernel} kernel")
    for adapter in (None, *bundle.adapter_names):
        session.set_adapter(adapter)
        # Through the chat template, where the bundle has one and the adapter was trained so.
        tokens = encode([{"role": "user", "content": prompt}], tokenizer, template_for(bundle, adapter), system=None)
        (answer,) = generate(session, tokenizer, [tokens], settings)
        print(f"{adapter or 'base'}: {answer.text}")

heavy = sorted({"torch", "transformers", "onnx"} & set(sys.modules))
print(f"imported of torch, transformers, onnx: {', '.join(heavy) or 'none'}")
