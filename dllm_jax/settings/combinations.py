"""What goes together, as data: the commands print this table, and refuse what it does not hold."""

from typing import Any, NamedTuple

from dllm_jax.errors import UsageError

DREAM_ORDERS = ("entropy", "maskgit_plus", "topk_margin")
OF_BLOCKS = ("dynamic", "sequential", "edit")  # policies of models whose attention is causal by blocks
BLOCK_STOPS = ("block_eos", "early_eos")
STOPS = ("none", "eot", "settled", "eot+settled", *BLOCK_STOPS)
BLOCKS_CACHES = {  # the caches of every kind of blocks
    "aligned": ("none", "prefix", "dual", "window", "block"),
    "sliding": ("none", "sliding"),
    "growing": ("none", "sliding"),
    "adaptive": ("none", "prefix", "dual"),
    "pipelined": ("none",),
}
BLOCKS = tuple(BLOCKS_CACHES)
CACHES = ("none", "prefix", "dual", "window", "sliding", "block")


class Fits(NamedTuple):
    """What a policy goes together with."""

    caches: tuple[str, ...] = ("none", "prefix", "dual", "sliding", "block")
    blocks: tuple[str, ...] = BLOCKS
    stops: tuple[str, ...] = STOPS
    compat: tuple[str, ...] = ("none",)  # with a dual cache: a bug of Fast-dLLM's loop, which others do not have
    dense: bool = False  # attention whose scores are in memory
    block_causal: bool = True  # models whose attention is causal by blocks


FAST_DLLM = Fits(compat=("none", "reference"))
ONE_GRID = Fits(caches=("none", "prefix", "dual", "block"), blocks=("aligned",))
POLICY_FITS = {
    "low_confidence": FAST_DLLM,
    "random": FAST_DLLM,
    "threshold": FAST_DLLM,
    "factor": FAST_DLLM,
    **dict.fromkeys(
        DREAM_ORDERS,
        ONE_GRID._replace(caches=("none", "prefix", "dual"), compat=("none", "reference"), block_causal=False),
    ),
    **dict.fromkeys(("frechet", "klass", "local_leap", "r2", "hierarchy", "credit", "eb", "entropy_threshold"), Fits()),
    **dict.fromkeys(("dawn", "clad"), Fits(caches=("none",), dense=True)),
    "wino": Fits(caches=("none",), blocks=("aligned", "adaptive"), dense=True, block_causal=False),
    "apd": Fits(caches=("none", "window"), blocks=("aligned",), stops=("none",)),
    "learn2pd": ONE_GRID,
    "dico": ONE_GRID,
    **dict.fromkeys(("dynamic", "sequential"), ONE_GRID),
    "edit": ONE_GRID._replace(caches=("none", "block")),
}
POLICIES = tuple(POLICY_FITS)


def check_combination(*, policy: str, cache: str, blocks: str, stop: str, compat: str) -> None:
    """Refuses a combination that the tables do not hold.

    Raises:
        UsageError: naming the setting.
    """
    fits = POLICY_FITS[policy]
    for name, value, allowed in (
        ("cache", cache, fits.caches),
        ("blocks", blocks, fits.blocks),
        ("stop", stop, fits.stops),
    ):
        _check(name, value, allowed, f"decode.policy {policy}")
    _check("cache", cache, BLOCKS_CACHES[blocks], f"decode.blocks {blocks}")
    if cache == "dual":
        _check("compat", compat, fits.compat, f"decode.policy {policy} and decode.cache dual")
        if stop != "none" or blocks != "aligned":
            other = f"decode.stop {stop}" if stop != "none" else f"decode.blocks {blocks}"
            _check("compat", compat, ("none",), f"{other} and decode.cache dual")


def check_model(decode: Any, *, family: str, block_causal: bool) -> None:
    """Refuses settings that do not suit a model.

    Args:
        decode: the settings of the decode.
        family: of the model, to be told.
        block_causal: its attention is causal by blocks; else it sees the whole canvas.

    Raises:
        UsageError: naming the setting.
    """
    beside = f"a model of the family {family}"
    if not block_causal:
        _check("cache", decode.cache, tuple(cache for cache in CACHES if cache != "block"), beside)
        _check("stop", decode.stop, tuple(stop for stop in STOPS if stop not in BLOCK_STOPS), beside)
        if decode.sub_block_length:
            raise UsageError(f"decode.sub_block_length: expected 0 with {beside}, got {decode.sub_block_length}")
        return
    fits = POLICY_FITS[decode.policy]
    policies = tuple(policy for policy in POLICIES if POLICY_FITS[policy].block_causal)
    _check("policy", decode.policy, policies, beside)
    _check("cache", decode.cache, tuple(cache for cache in ("none", "block") if cache in fits.caches), beside)
    _check("blocks", decode.blocks, ("aligned",), beside)
    _check("stop", decode.stop, tuple(stop for stop in ("none", *BLOCK_STOPS) if stop in fits.stops), beside)
    _check("compat", decode.compat, ("none",), beside)


def _check(name: str, value: str, allowed: tuple[str, ...], beside: str) -> None:
    if value not in allowed:
        expected = allowed[0] if len(allowed) == 1 else f"one of {', '.join(allowed)}"
        raise UsageError(f"decode.{name}: expected {expected} with {beside}, got {value!r}")


def policy_table() -> list[tuple[str, str, str, str]]:
    """Policies with the caches, blocks and stop rules they go together with; policies that are alike share a line."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for policy, fits in POLICY_FITS.items():
        axes = (", ".join(fits.caches), _told(fits.blocks, BLOCKS), _told(fits.stops, STOPS))
        lines.setdefault(axes, []).append(policy)
    return [(", ".join(policies), *axes) for axes, policies in lines.items()]


def blocks_table() -> list[tuple[str, str]]:
    """Blocks with the caches they go together with."""
    return [(blocks, ", ".join(caches)) for blocks, caches in BLOCKS_CACHES.items()]


def _told(values: tuple[str, ...], every: tuple[str, ...]) -> str:
    return "all" if values == every else ", ".join(values)
