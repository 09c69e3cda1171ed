"""Compares answers to mathematical problems with math-verify, line by line. A script of its own, see `maths.py`.

It reads JSON arrays `[answer, text]` from stdin, one a line, and prints true or false for each.
"""

import contextlib
import json
import logging
import resource
import sys

MEMORY = 8 * 2**30  # of the address space: numbers can be asked for that fill any memory


def main() -> None:
    """Answers until stdin ends."""
    with contextlib.suppress(OSError, ValueError):  # not everywhere; the time is limited by who asks
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable()
    found_in = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    for line in sys.stdin:
        answer, text = json.loads(line)
        try:
            gold = parse(rf"\boxed{{{answer}}}", extraction_config=found_in, parsing_timeout=None)
            got = parse(text, extraction_config=found_in, parsing_timeout=None)
            right = bool(gold and got) and verify(gold, got, timeout_seconds=None)
        except Exception:  # of what cannot be computed it raises anything
            right = False
        print(json.dumps(right), flush=True)


if __name__ == "__main__":
    main()
