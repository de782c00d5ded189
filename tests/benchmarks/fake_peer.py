"""Stands in for ik_llama.cpp: speaks the protocol of `peer/worker.py` and computes nothing.

The file that it is told to open says how it behaves: lines of "request = behaviour".
"""

from __future__ import annotations

import json
import os
import sys
import time


def reply(request: dict[str, object]) -> dict[str, object]:
    if request["do"] == "open":
        return {"version": "9.9"}
    if request["do"] == "run":
        prompt, steps = request["prompt"], request["steps"]
        assert isinstance(prompt, list) and isinstance(steps, list)
        nbytes = 100 * (len(prompt) + len(steps))
        return {"prefill_s": len(prompt) / 1000, "decode_s": len(steps) / 10, "kv_bytes": nbytes}
    tokens, caches = request["tokens"], request["caches"]
    assert isinstance(tokens, list) and isinstance(caches, list)
    scored = len(tokens) - int(str(request["middle"]))
    return {
        "scores": {
            cache: {
                "kl": [float(i)] * scored, "same": [float(not i)] * scored,
                "nll_base": [2.0] * scored, "nll": [2.0 + i] * scored,
            }
            for i, cache in enumerate(caches)
        }
    }  # fmt: skip


def main() -> None:
    behaviour: dict[str, str] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "open":
            with open(request["file"], encoding="utf-8") as file:
                behaviour = dict(row.strip().split(" = ") for row in file if row.strip())
        match behaviour.get(request["do"]):
            case "crash":
                print("noise\nfa.h:12: GGML_ASSERT(S > 0) failed\nmore noise", file=sys.stderr)
                sys.stderr.flush()
                os.abort()
            case "exit":
                sys.exit(3)
            case "hang":
                time.sleep(60)
            case "missing":
                print(json.dumps({"error": "No module named 'x'", "missing": True}), flush=True)
            case "fail":
                print(json.dumps({"error": "RuntimeError: no room"}), flush=True)
            case "babble":
                print("Hello.", flush=True)
            case _:
                print(json.dumps(reply(request)), flush=True)


main()
