"""Output lines with traces, made by hand."""

from typing import Any

EOS = 0
TEXT = ["def", " f", "(x)", ":", "\n", "    ", "return", " x"]


def line(**given: Any) -> dict[str, Any]:
    """A line of eight tokens in blocks of four, committed two per forward, and what is given instead."""
    steps = [
        {"block": [0, 4], "end": 8, "open": [0, 1, 2, 3], "draft": [1, 2, 3, 4], "confidence": [0.9, 0.8, 0.4, 0.3]},
        {"block": [0, 4], "end": 8, "open": [2, 3], "draft": [3, 4], "confidence": [0.7, 0.6]},
        {"block": [4, 8], "end": 8, "open": [4, 5, 6, 7], "draft": [5, 6, 7, 8], "confidence": [0.9, 0.8, 0.4, 0.3]},
        {"block": [4, 8], "end": 8, "open": [6, 7], "draft": [7, 8], "confidence": [0.7, 0.6]},
    ]
    return {
        "id": "a",
        "text": "".join(TEXT),
        "output_ids": [1, 2, 3, 4, 5, 6, 7, 8],
        "num_tokens": 8,
        "nfe": 4,
        "commit_step": [1, 1, 2, 2, 3, 3, 4, 4],
        "finish_reason": "length",
        "steps": steps,
        "prompt_ids": [9, 9],
        "prompt_text": "Write f.",
        "pieces": TEXT,
        "piece_by_id": {str(i): piece for i, piece in enumerate(TEXT, 1)},
        "special_ids": [EOS],
        "confidence": [0.9, 0.8, 0.7, 0.6, 0.9, 0.8, 0.7, 0.6],
        "end": 8,
        "block_length": 4,
        "decoder": {"policy": "threshold", "cache": "dual", "blocks": "aligned", "stop": "none", "settings": {}},
    } | given


def apd() -> dict[str, Any]:
    """APD drafts four, accepts two, then drafts the right ones and ends the row."""
    steps = [
        {"block": [0, 4], "end": 8, "open": [0, 1, 2, 3], "draft": [1, 2, 8, 7], "confidence": [0.9, 0.8, 0.4, 0.3]},
        {"block": [2, 6], "end": 8, "open": [2, 3, 4, 5], "draft": [3, 4, 0, 0], "confidence": [0.9, 0.9, 0.9, 0.8]},
    ]
    return line(
        output_ids=[1, 2, 3, 4, 0, 0, 0, 0],
        commit_step=[1, 1, 2, 2, 2, 0, 0, 0],
        pieces=[*TEXT[:4], *["<|endoftext|>"] * 4],
        nfe=2,
        end=5,
        steps=steps,
        finish_reason="eos",
        num_tokens=4,
        decoder={"policy": "apd", "cache": "window", "blocks": "aligned", "stop": "none", "settings": {}},
    )


def dico() -> dict[str, Any]:
    """Two seeds with a cluster each, then all the rest."""
    everything = {
        "block": [0, 8],
        "end": 8,
        "open": list(range(8)),
        "draft": list(range(1, 9)),
        "confidence": [0.9] * 8,
    }
    rest = {"block": [0, 8], "end": 8, "open": [0, 2, 3, 4, 5, 7], "draft": [1, 3, 4, 5, 6, 8], "confidence": [0.9] * 6}
    forwards = [
        {"phase": "divide", "seeds": [1, 6], "clusters_before": [], "clusters_after": [[0, 2], [6, 6]]},
        {"phase": "conquer", "seeds": [], "clusters_before": [[0, 2], [6, 6]], "clusters_after": []},
    ]
    decoder = {"policy": "dico", "cache": "none", "blocks": "aligned", "stop": "none", "settings": {}}
    commits = [2, 1, 2, 2, 2, 2, 1, 2]
    return line(nfe=2, commit_step=commits, steps=[everything, rest], forwards=forwards, decoder=decoder)


def wino() -> dict[str, Any]:
    """Commits all in its first forward, takes one back in the second and commits another in its place."""
    everything = {
        "block": [0, 8],
        "end": 8,
        "open": list(range(8)),
        "draft": [8, *range(2, 9)],
        "confidence": [0.9] * 8,
    }
    back = {"block": [0, 8], "end": 8, "open": [], "draft": [], "confidence": [], "retracted": [[0, 8, 1]]}
    again = {"block": [0, 8], "end": 8, "open": [0], "draft": [1], "confidence": [0.8]}
    decoder = {"policy": "wino", "cache": "none", "blocks": "aligned", "stop": "none", "settings": {}}
    return line(nfe=3, commit_step=[3, 1, 1, 1, 1, 1, 1, 1], steps=[everything, back, again], decoder=decoder)


def learn2pd() -> dict[str, Any]:
    """A filter that says something of every open position; the row is cut behind its fourth token, with a later one."""
    first = {"block": [0, 8], "end": 8, "open": list(range(8)), "draft": list(range(1, 9)), "confidence": [0.9] * 8}
    second = {"block": [0, 8], "end": 6, "open": [2, 3, 5], "draft": [3, 4, 6], "confidence": [0.9] * 3}
    steps = [first | {"filter": [0.99, 0.98] + [0.1] * 6}, second | {"filter": [0.97, 0.5, 0.4]}]
    decoder = {"policy": "learn2pd", "cache": "none", "blocks": "aligned", "stop": "eot", "settings": {}}
    commits = [1, 1, 2, 2, 0, 0, 0, 0]
    return line(
        nfe=2,
        commit_step=commits,
        steps=steps,
        end=4,
        lost=[[4, 8, 1]],
        output_ids=[1, 2, 3, 4, 0, 0, 0, 0],
        decoder=decoder,
    )
