"""Collects what a filter learns from: prompts decoded one token at a time, then again by the oracle that knows how."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.progress
from jaxtyping import Int

from dllm_jax import hosts
from dllm_jax.decoding import driver
from dllm_jax.decoding.generate import Decoder
from dllm_jax.decoding.policies.oracle import Oracle, ReplayLog
from dllm_jax.mesh import batch_shardings
from dllm_jax.progress import for_people
from dllm_jax.training.filter.records import RecordFolder, Records


def collect(
    decoder: Decoder, prompts: Sequence[Sequence[int]], *, folder: Path, identity: Mapping[str, Any], overwrite: bool
) -> Records:
    """The records of all prompts: decoded now, or read where an earlier collection wrote them.

    Args:
        decoder: of the answers to agree with (the baseline).
        prompts: token ids.
        folder: for the records, one file for every batch; an interrupted collection continues with the next.
        identity: section -> field -> value of everything that decides the records; JSON.
        overwrite: discard records of another identity.

    Raises:
        UsageError: there are records of another identity and `overwrite` is off, or they are damaged.
    """
    shards = hosts.from_first(lambda: RecordFolder(folder, identity, overwrite=overwrite))
    batches = decoder.batches([len(prompt) for prompt in prompts])
    with rich.progress.Progress(**for_people()) as progress:
        missing = hosts.from_first(lambda: shards.missing(len(batches)))
        bar = progress.add_task("collecting", total=len(batches), completed=len(batches) - len(missing))
        for shard in missing:
            rows = batches[shard]
            batch = [prompts[row] for row in rows]
            answer_BG = decoder(batch, rows=rows).tokens_BG
            records = replay(decoder, batch, answer_BG, rows=rows)
            if hosts.is_first():
                shards.write(shard, records, shards=len(batches))
            progress.advance(bar)
    return hosts.from_first(lambda: shards.read(len(batches)))


def replay(
    decoder: Decoder, prompts: Sequence[Sequence[int]], answer_BG: Int[np.ndarray, "B G"], *, rows: Sequence[int]
) -> Records:
    """Decodes a batch again by the oracle.

    Args:
        decoder: with the baseline's settings.
        prompts: token ids.
        answer_BG: tokens of the baseline.
        rows: index of every prompt in the job.

    Returns:
        One record for every forward of every prompt, prompt by prompt.
    """
    engine = decoder.engine(max(map(len, prompts)))
    state = decoder.start(prompts, rows, engine.geometry)
    idle = np.zeros((len(state.row_B) - len(prompts), engine.geometry.gen_length), np.int32)
    padded_BG = np.concatenate([answer_BG, idle])
    policy = Oracle(hosts.place(padded_BG, batch_shardings(padded_BG, decoder.model.mesh)))
    with decoder.computing():
        final = hosts.fetch(driver.decode(dataclasses.replace(engine, policy=policy), state))
    log = final.log
    assert isinstance(log, ReplayLog)
    is_forward_BF = np.arange(log.step_BF.shape[1])[None, :] < np.asarray(final.nfe_B)[:, None]
    is_forward_BF[len(prompts) :] = False
    prompt_BF = np.broadcast_to(np.asarray(final.row_B)[:, None], is_forward_BF.shape)
    arrays = (log.confidence_BFQ, log.correct_BFQ, log.masked_BFQ, prompt_BF, log.block_BF, log.step_BF)
    return Records(*(np.asarray(array)[is_forward_BF] for array in arrays))
