"""Records on disk and their division: whole shards or none, no prompt in two parts, one line for what is damaged."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from dllm_jax.errors import UsageError
from dllm_jax.training.filter import records as module
from dllm_jax.training.filter.records import RecordFolder, Records, concatenate, split, split_prompts
from tests.training.filter.synthetic import synthetic

GOOD = synthetic(prompts=2, steps=3)


def same(one: Records, other: Records) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_shards_come_back_in_their_order(tmp_path: Path) -> None:
    shards = [synthetic(prompts=1, steps=steps, first=steps) for steps in (3, 1, 2)]
    folder = RecordFolder(tmp_path / "deep" / "records", {}, overwrite=False)
    for shard in (2, 0, 1):
        assert shard in folder.missing(3)
        folder.write(shard, shards[shard], shards=3)
    assert folder.missing(3) == []
    assert folder.missing(2) == [0, 1]  # another division is another collection
    found = folder.read(3)
    assert same(found, concatenate(shards))
    assert (found.size, found.block_length) == (6, 8)
    names = sorted(path.name for path in folder.folder.glob("*.safetensors"))
    assert names == [f"records-0000{shard}-of-00003.safetensors" for shard in range(3)]


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path, {}, overwrite=False)
    turned = Records(*(np.asarray(array)[::-1] for array in GOOD))
    folder.write(0, turned._replace(confidence_RQ=np.asfortranarray(turned.confidence_RQ)), shards=1)
    assert same(folder.read(1), turned)


def test_an_interrupted_write_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RecordFolder(tmp_path, {}, overwrite=False)
    folder.write(0, GOOD, shards=2)

    def power_cut(*_: object) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            folder.write(1, GOOD, shards=2)
    assert folder.missing(2) == [1]
    folder.write(1, GOOD, shards=2)
    assert folder.read(2).size == 2 * GOOD.size
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_take_chooses_by_mask_and_by_index() -> None:
    by_mask, by_index = GOOD.take(GOOD.step_R == 1), GOOD.take(np.array([1, 4]))
    assert same(by_mask, by_index)
    assert by_mask.prompt_R.tolist() == [0, 1]


def changed(**arrays: np.ndarray) -> Callable[[Path], None]:
    return lambda path: save_file({**GOOD._asdict(), **arrays}, path)


def cut(path: Path) -> None:
    path.write_bytes(save(GOOD._asdict())[:-7])


def unknown_dtype(path: Path) -> None:
    content = save({name: GOOD.confidence_RQ for name in ("a",)})
    path.write_bytes(content.replace(b'"F32"', b'"F99"'))


NAN = np.where(GOOD.step_R[:, None] == 1, np.nan, GOOD.confidence_RQ).astype(np.float32)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "expected a readable file, got No such file or directory"),
        (lambda path: path.write_bytes(b""), "expected a complete safetensors file of records, got "),
        (lambda path: path.write_text("no records\n" * 9), "expected a complete safetensors file of records, got "),
        (cut, "expected a complete safetensors file of records, got "),
        (unknown_dtype, "expected a complete safetensors file of records, got "),
        (
            lambda path: save_file({f"w{i}": np.zeros(1) for i in range(99)}, path),
            "expected the arrays confidence_RQ, correct_RQ, masked_RQ, prompt_R, block_R, step_R, got w0, w1, w10, ",
        ),
        (lambda path: save_file({}, path), "step_R, got none"),
        (changed(more=np.zeros(1)), "got block_R, confidence_RQ, correct_RQ, masked_RQ, more, prompt_R, step_R"),
        (changed(prompt_R=GOOD.prompt_R[1:]), "prompt_R: expected int32 [6], got int32 [5]"),
        (changed(masked_RQ=GOOD.masked_RQ[:, 1:]), "masked_RQ: expected bool [6, 8], got bool [6, 7]"),
        (changed(step_R=GOOD.step_R.astype(np.int64)), "step_R: expected int32 [6], got int64 [6]"),
        (changed(confidence_RQ=np.zeros(6, np.float32)), "confidence_RQ: expected records of at least 1 position"),
        (changed(confidence_RQ=np.zeros((6, 0), np.float32)), "confidence_RQ: expected records of at least 1 position"),
        (changed(confidence_RQ=GOOD.confidence_RQ + 1), "confidence_RQ: expected 0 to 1, got 1."),
        (changed(confidence_RQ=-GOOD.confidence_RQ), "confidence_RQ: expected 0 to 1, got -0."),
        (changed(confidence_RQ=NAN), "confidence_RQ: expected 0 to 1, got nan"),
        (
            lambda path: save_file(synthetic(prompts=1, steps=2, block_length=4)._asdict(), path),
            "expected blocks of 8 positions as in the shards before, got 4",
        ),
    ],
)
def test_a_damaged_shard_is_named_in_one_line(tmp_path: Path, damage: Callable[[Path], None], expected: str) -> None:
    folder = RecordFolder(tmp_path, {}, overwrite=False)
    for shard in range(2):
        folder.write(shard, GOOD, shards=2)
    path = folder.path(1, shards=2)
    damage(path)
    with pytest.raises(UsageError) as error:
        folder.read(2)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message


def test_what_read_would_refuse_is_not_written(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path, {}, overwrite=False)
    with pytest.raises(UsageError, match="expected 0 to 1, got nan"):
        folder.write(0, GOOD._replace(confidence_RQ=NAN), shards=1)
    assert not list(tmp_path.glob("*.safetensors*"))


@given(prompts=st.integers(3, 300), seed=st.integers(0, 2**32))
def test_parts_share_no_prompt(prompts: int, seed: int) -> None:
    indices = np.arange(prompts, dtype=np.int32) * 3
    parts = split_prompts(np.concatenate([indices[::-1], indices]), seed=seed)
    assert np.array_equal(np.sort(np.concatenate(parts)), indices)
    training, validation, test = map(len, parts)
    assert validation == test == max(1, round(prompts / 10))
    assert training >= 1


def test_records_follow_their_prompts() -> None:
    records = synthetic(prompts=20, steps=5)
    parts = split(records, seed=3)
    assert [part.size for part in parts] == [80, 10, 10]
    prompts = split_prompts(records.prompt_R, seed=3)
    for part, expected in zip(parts, prompts, strict=True):
        assert np.array_equal(np.unique(part.prompt_R), expected)
        assert all(same(part.take(part.prompt_R == p), records.take(records.prompt_R == p)) for p in expected)


def test_the_seed_alone_divides() -> None:
    records = synthetic(prompts=30, steps=2)
    backwards = records.take(np.arange(records.size)[::-1])
    test = [split(r, seed=seed).test.prompt_R for r, seed in ((records, 0), (backwards, 0), (records, 1))]
    assert set(test[0]) == set(test[1]) != set(test[2])


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^data\.prompts: expected at least 3 .*, got 2$"):
        split(GOOD, seed=0)
    assert len(split(synthetic(prompts=3, steps=1), seed=0)) == module.MIN_PROMPTS
