"""From a finished batch on the devices to `DecodeResult`."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.state import DecodeResult, DecodeState, Timing


def result(
    final: DecodeState,
    geometry: Geometry,
    timing: Timing,
    *,
    slots: Sequence[int],
    end_ids: tuple[int, ...],
    mask_id: int,
) -> DecodeResult:
    """Cuts a batch to some of its rows, which are finished, and to its generated columns.

    Args:
        final: arrays of the host.
        geometry: of the canvas.
        timing: of these rows.
        slots: the rows, in the order of the result.
        end_ids: the tokens that end a text, EoS first.
        mask_id: of [MASK].
    """
    generated, chosen = slice(geometry.prompt_length, geometry.length), np.asarray(slots)

    def host(array: jax.Array) -> np.ndarray:
        return np.asarray(array)[chosen]

    end_B = np.minimum(host(final.end_B), geometry.length) - geometry.prompt_length
    is_behind_BG = np.arange(geometry.gen_length)[None, :] >= end_B[:, None]
    tokens_BG = np.where(is_behind_BG, end_ids[0], host(final.tokens_BL)[:, generated])
    is_mask_BG = tokens_BG == mask_id
    text_end_B, reasons = finish(tokens_BG, end_ids=end_ids, failed_B=host(final.failed_B))
    is_text_BG = np.arange(geometry.gen_length)[None, :] < text_end_B[:, None]
    return DecodeResult(
        tokens_BG=tokens_BG,
        nfe_B=host(final.nfe_B),
        commit_step_BG=np.where(is_behind_BG, 0, host(final.commit_step_BL)[:, generated]),
        confidence_BG=np.where(is_behind_BG, 0, host(final.confidence_BL)[:, generated]),
        end_B=end_B,
        text_end_B=text_end_B,
        num_tokens_B=(is_text_BG & ~is_mask_BG).sum(axis=1, dtype=np.int32),
        masks_left_B=is_mask_BG.sum(axis=1, dtype=np.int32),
        finish_reason=reasons,
        iterations=int(final.iterations),
        columns=int(final.columns),
        timing=timing,
        mask_id=mask_id,
        log=jax.tree.map(host, final.log),
    )


def finish(
    tokens_BG: np.ndarray, *, end_ids: tuple[int, ...], failed_B: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Where the text of every row ends, and why the row did.

    Args:
        tokens_BG: generated ids.
        end_ids: the tokens that end a text, EoS first.
        failed_B: rows that ended with an error.

    Returns:
        int32 [B], positions before the first of those tokens, else gen_length; and the reasons, see `DecodeResult`.
    """
    is_end_BG: np.ndarray = np.isin(tokens_BG, end_ids)
    has_end_B = np.asarray(is_end_BG.any(axis=1))
    first_B = is_end_BG.argmax(axis=1)
    text_end_B = np.where(has_end_B, first_B, tokens_BG.shape[1]).astype(np.int32)

    def reason(row: int) -> str:
        if failed_B[row]:
            return "error"
        if not has_end_B[row]:
            return "length"
        return "eos" if tokens_BG[row, first_B[row]] == end_ids[0] else "eot_id"

    return text_end_B, tuple(map(reason, range(len(tokens_BG))))


def joined(results: Sequence[DecodeResult], order: np.ndarray) -> DecodeResult:
    """The rows of several results as one.

    Args:
        results: at least one.
        order: int [rows], where every row of the joined result stands among those given.
    """
    reasons = [reason for result in results for reason in result.finish_reason]
    arrays = {
        field.name: np.concatenate([getattr(result, field.name) for result in results])[order]
        for field in dataclasses.fields(DecodeResult)
        if field.type is np.ndarray
    }
    return DecodeResult(
        **arrays,
        finish_reason=tuple(reasons[i] for i in order),
        iterations=sum(result.iterations for result in results),
        columns=sum(result.columns for result in results),
        timing=sum((result.timing for result in results), Timing(0.0, 0.0, 0, 0)),
        mask_id=results[0].mask_id,
        log=jax.tree.map(lambda *parts: np.concatenate(parts)[order], *[result.log for result in results]),
    )
