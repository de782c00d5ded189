"""What every machine runs in tests of several: a model of which it may have a part, and replies.

Usage: part.py MODEL whole|heads|layers PROMPT TOKENS RESULTS KV...

A machine writes `RESULTS.RANK`, the JSON of what it saw with each KV.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
from mlx_lm import load, stream_generate
from mlx_lm.utils import sharded_load

from leankv_mlx import attach
from leankv_mlx.mlx_lm import make_caches, measure
from leankv_mlx.mlx_lm.group import machines_of, summed


def main(model: str, split: str, prompt: str, tokens: str, results: str, *texts: str) -> None:
    group = mx.distributed.init()
    if split == "whole":
        part, tokenizer = load(model)[:2]
    else:
        groups = (group, None) if split == "layers" else (None, group)
        part, tokenizer = sharded_load(model, *groups)
    found = {}
    for text in texts:
        with attach(part, text) as attachment:
            caches = make_caches(part)
            reply = [
                step.token
                for step in stream_generate(
                    part, tokenizer, json.loads(prompt), int(tokens), prompt_cache=caches
                )
            ]
            own = measure(caches)
            found[text] = {
                "machines": machines_of(part),
                "reply": reply,
                "own": asdict(own),
                "all": asdict(summed(own, "used", "fp16", "allocated")),
                "layers": [asdict(row) for row in attachment.report],
                "bits": [cache.config.k_bits for cache in caches],
            }
    Path(f"{results}.{group.rank()}").write_text(json.dumps(found))


main(*sys.argv[1:])
