"""Run inside vLLM's own environment: load a model directory as an engine does and print what it computes, as JSON.

    python vllm_engine.py PATH generate|embed [LOAD_FORMAT [RANKS]]

``generate``: the token ids that greedy decoding adds to fixed prompts of token ids (no tokenizer is needed).
``embed``: the embeddings of fixed texts, as hexadecimal floats.
"""

from __future__ import annotations

import json
import os
import sys
import time

PROMPTS = ([1, 5, 9, 42], [7, 7, 7], list(range(2, 40)))
TEXTS = ("a pipeline of weights", "größer als gedacht", "the quick brown fox jumps over the lazy dog")


def main() -> None:
    from vllm import LLM, SamplingParams

    path, kind = sys.argv[1], sys.argv[2]
    load_format = sys.argv[3] if len(sys.argv) > 3 else "auto"
    ranks = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    started = time.perf_counter()
    options = {"enforce_eager": True, "load_format": load_format, "seed": 0, "gpu_memory_utilization": 0.2}
    options["tensor_parallel_size"] = ranks
    if kind == "embed":
        engine = LLM(model=path, runner="pooling", max_model_len=128, **options)
    else:
        engine = LLM(model=path, skip_tokenizer_init=True, max_model_len=256, **options)
    seconds = time.perf_counter() - started
    if kind == "embed":
        found = [[value.hex() for value in output.outputs.embedding] for output in engine.embed(list(TEXTS))]
    else:
        sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
        outputs = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in PROMPTS], sampling)
        found = [list(output.outputs[0].token_ids) for output in outputs]
    print("RESULT " + json.dumps({"seconds": round(seconds, 2), "found": found}), flush=True)
    engine.llm_engine.engine_core.shutdown()
    # Its threads sometimes abort the interpreter's own end ("terminate called without an active exception").
    os._exit(0)


if __name__ == "__main__":
    main()
