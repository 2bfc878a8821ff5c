"""Requests on stock onnxruntime-genai, one by one, each with its own .onnx_adapter: a process of another environment (many_adapters_bench).

    PYTHON genai_requests.py FOLDER THREADS ADAPTER...

stdin: the prompts of as many requests as there are adapters, a line of JSON, then commands {"count": requests, "new": tokens of each}.
stdout: for each a line {"seconds", "steps": milliseconds of each decode step, "answers": greedy tokens}.
"""

import json
import sys
import time

import numpy as np
import onnxruntime_genai as og


def main() -> None:
    folder, threads, *files = sys.argv[1:]
    config = og.Config(folder)
    options = {"intra_op_num_threads": int(threads), "inter_op_num_threads": 1}
    # Without a stop token answers are of one length.
    config.overlay(json.dumps({"model": {"eos_token_id": [], "decoder": {"session_options": options}}}))
    model = og.Model(config)
    adapters = og.Adapters(model)
    for number, file in enumerate(files):
        adapters.load(file, str(number))
    prompts = [np.array([prompt], np.int32) for prompt in json.loads(sys.stdin.readline())]
    for line in sys.stdin:
        command = json.loads(line)
        answers, steps = [], []
        started = time.perf_counter()
        for request in range(command["count"]):
            parameters = og.GeneratorParams(model)
            parameters.set_search_options(max_length=prompts[request].size + command["new"], do_sample=False)
            generator = og.Generator(model, parameters)
            generator.set_active_adapter(adapters, str(request))
            generator.append_tokens(prompts[request])
            for made in range(command["new"]):
                before = time.perf_counter()
                generator.generate_next_token()
                if made:  # the first one is chosen from the prompt's logits
                    steps.append((time.perf_counter() - before) * 1e3)
            answers.append([int(token) for token in generator.get_sequence(0)[prompts[request].size :]])
        print(json.dumps({"seconds": time.perf_counter() - started, "steps": steps, "answers": answers}), flush=True)


if __name__ == "__main__":
    main()
