"""The traces as one HTML file that needs no server and no network.

Texts of models and prompts are not trusted: they are in the file as JSON without any markup, the script writes them as
text only, and the file's own policy allows no script, style or address but those that are written here.
"""

import base64
import hashlib
import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm_jax.viewer.choice import Race
from dllm_jax.viewer.colours import variables
from dllm_jax.viewer.trace import Trace

PARTS = Path(__file__).parent / "page"
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}  # the same strings, for a reader of JSON


def page(races: Sequence[Race], *, left_out: int) -> str:
    """The file.

    Args:
        races: what is shown, at least one.
        left_out: prompts that are not in it, for a note.
    """
    note = f"{left_out} more prompts are in the outputs (--ids or --most show others)." if left_out else ""
    shown = [{"id": race.id, "prompt": race.prompt, "traces": [_data(t) for t in race.traces]} for race in races]
    data = json.dumps({"races": shown, "note": note}, separators=(",", ":"), allow_nan=False)
    for character, escaped in _ESCAPED.items():
        data = data.replace(character, escaped)
    style, script = ((PARTS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    style = variables() + style
    frame = string.Template((PARTS / "page.html").read_text(encoding="utf-8"))
    return frame.substitute(
        style=style, script=script, data=data, style_hash=_digest(style), script_hash=_digest(script)
    )


def _digest(content: str) -> str:
    """As a content security policy names an inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _data(trace: Trace) -> dict[str, Any]:
    """A trace as the script reads it."""
    return {
        "label": trace.label,
        "policy": trace.decoder.get("policy", ""),
        "nfe": trace.nfe,
        "tokens": trace.tokens,
        "pieces": trace.pieces,
        "specials": sorted(trace.special_ids),
        "commitStep": trace.commit_step,
        "confidence": trace.confidence,
        "lastEnd": trace.last_end,
        "lost": trace.lost,
        "blockLength": trace.block_length,
        "steps": trace.steps,
        "phases": trace.phases,
        "pieceById": trace.piece_by_id,
        "finish": trace.finish_reason,
    }
