"""The colours of a canvas, in pages, pictures and terminals alike.

They differ in lightness, not in hue alone, and every state has a second sign (a stroke, a frame, a dash), so that they
are told apart without colour vision and in grey. Hues are those of Okabe and Ito, darker or lighter for text on them.
"""

from dllm_jax.viewer.trace import State

PAGE, CARD, INK, FAINT, LINE = "#f6f7f9", "#ffffff", "#16191d", "#5b6470", "#d5dae0"
MASK, FAR = "#e3e7ec", "#f0f2f5"  # of a masked token in the open range, and outside of it
BLOCK, CLUSTER, FILTER, HATCH = "#56b4e9", "#7b3294", "#00876c", "#b9c1ca"
SEED = ("#1a1300", "#f0b429")
STATES = {  # ink, paper
    State.MASKED: ("#8b95a1", MASK),
    State.REJECTED: ("#9c3a00", "#fdeadf"),
    State.RETRACTED: ("#ffffff", "#c25400"),
    State.NOW: ("#ffffff", "#0b5fa5"),
    State.EARLIER: (INK, "#f4f6f8"),
    State.CUT: (HATCH, CARD),
}


def variables() -> str:
    """The colours as custom properties of a style sheet."""
    named = {"page": PAGE, "card": CARD, "ink": INK, "faint": FAINT, "line": LINE, "far": FAR, "block": BLOCK}
    named |= {"cluster": CLUSTER, "filter": FILTER, "hatch": HATCH, "seed-ink": SEED[0], "seed": SEED[1]}
    for state, name in zip(STATES, ("mask", "rejected", "retracted", "now", "earlier", "cut"), strict=True):
        named[f"{name}-ink"], named[name] = STATES[state]
    return ":root { " + " ".join(f"--{name}: {value};" for name, value in named.items()) + " }\n"
