"""Programs from answers to HumanEval and MBPP: the code in a text, together with its tests."""

import re
from collections.abc import Mapping
from typing import Any

from dllm_jax.evals.sandbox import PASSED, CodeLimits, outcome

_FENCED = re.compile(r"^[ \t]*```[ \t]*[\w+-]*[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)


def code_in(text: str, name: str = "") -> str:
    """The code of an answer: of its Markdown, the block that defines `name`, else the first; else all of it.

    An answer that goes on in a block which its prompt began has only the end of that block.
    """
    fences = list(_FENCE.finditer(text))
    if not fences:
        return text
    if (
        len(fences) == 1
        and text[fences[0].end() :].split("\n", 1)[0].strip() == ""
        and text[: fences[0].start()].strip()
    ):
        return text[: fences[0].start()]
    blocks = _FENCED.findall(text)
    return next((block for block in blocks if name and _defines(block, name)), blocks[0] if blocks else text)


def human_eval(text: str, doc: Mapping[str, Any]) -> str:
    """The program of HumanEval: the function, as a whole or from where the prompt leaves off, and its test.

    Args:
        text: what the model wrote.
        doc: `prompt`, `test` and `entry_point`.
    """
    prompt, name = doc["prompt"], doc["entry_point"]
    code = code_in(text, name)
    whole = _defines(code, name)  # the prompt, a function of nothing but its text, brings imports and helpers
    return f"{prompt}{chr(10) if whole else ''}{code}\n\n{doc['test']}\n\ncheck({name})\n"


def mbpp(text: str, doc: Mapping[str, Any]) -> str:
    """The program of MBPP: what comes before the tests, the code, the tests.

    Args:
        text: what the model wrote.
        doc: `test_list`, and `test_setup_code` or `test_imports` if it has them.
    """
    tests = doc["test_list"]
    called = re.search(r"(\w+)\s*\(", tests[0].removeprefix("assert").lstrip(" (")) if tests else None
    code = code_in(text.split("[BEGIN]")[-1].split("[DONE]")[0], called[1] if called else "")
    before = [*(doc.get("test_imports") or []), doc.get("test_setup_code") or ""]
    return "\n".join([*before, code, *tests]) + "\n"


def passes(program: str, limits: CodeLimits) -> bool:
    """Whether a program comes to its end."""
    return outcome(program, limits) == PASSED


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^(?:async )?def {re.escape(name)}\b", code, re.MULTILINE) is not None
