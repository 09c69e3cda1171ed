"""Converted checkpoints: written whole or not at all, verified, restored; the commands and their errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from dllm_jax.checkpoints import convert as convert_command
from dllm_jax.checkpoints import layout, store
from dllm_jax.checkpoints import verify as verify_command
from dllm_jax.checkpoints.convert import convert
from dllm_jax.checkpoints.load import load_model
from dllm_jax.errors import UsageError
from tests.checkpoints.folders import GQA, SHARDED, TINY, copied, in_dtype, same_bits, tensors

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted checkpoint, not to be changed."""
    target = tmp_path_factory.mktemp("converted") / "gqa"
    convert(GQA, target, to="orbax", dtype="keep", overwrite=False)
    return target


@pytest.fixture
def damaged(converted, tmp_path):
    """A converted checkpoint to be changed."""
    return Path(shutil.copytree(converted, tmp_path / "damaged"))


def array_file(folder):
    """The file that holds most of the weights."""
    return max((folder / "params").rglob("*"), key=lambda path: path.stat().st_size)


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def params_of(path, **options):
    return {name: np.asarray(param) for name, param in layout.flatten(load_model(path, **options).params).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_converted_model_loads_equal(converted, dtype):
    assert same_bits(params_of(GQA, dtype=dtype), params_of(converted, dtype=dtype))
    assert load_model(GQA).config == load_model(converted).config


def test_a_folder_that_was_written_at_once_still_loads(converted, tmp_path):
    """As conversions wrote it before they wrote groups."""
    folder = Path(shutil.copytree(converted, tmp_path / "m"))
    shutil.rmtree(folder / "params")
    store.save_params(folder / "params", layout.flatten(load_model(GQA).params))
    convert_command.write_manifest(folder)
    assert same_bits(params_of(converted), params_of(folder))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__)
def test_to_orbax_and_back_bit_for_bit(dtype, tmp_path):
    source = in_dtype(SHARDED, tmp_path / "source", dtype)
    convert(source, tmp_path / "orbax", to="orbax", dtype="keep", overwrite=False)
    convert(tmp_path / "orbax", tmp_path / "hf", to="hf", dtype="keep", overwrite=False)
    assert same_bits(tensors(source), tensors(tmp_path / "hf"))
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "hf" / "config.json").read_text())


def test_dtype_and_tokenizer_are_written(tmp_path):
    done = convert("llada-tiny", tmp_path / "m", to="orbax", dtype="float32", overwrite=False)
    assert {leaf.dtype for leaf in store.stored_params(tmp_path / "m" / "params").values()} == {np.dtype(np.float32)}
    assert {path.name for path in (tmp_path / "m").iterdir()} >= {"config.json", "manifest.json", "tokenizer.json"}
    assert done.parameters == sum(param.size for param in params_of("llada-tiny").values())
    assert done.file_bytes > 4 * done.parameters


def test_a_flipped_byte_is_named(damaged, capsys):
    bad = array_file(damaged)
    flip_byte(bad)
    with pytest.raises(UsageError, match=f"{bad.name} .corrupted"):
        load_model(damaged)
    assert verify_command.main(["verify", str(damaged)]) == 2
    assert one_error(capsys).endswith(f"1 bad: {bad.relative_to(damaged)} (corrupted: another checksum)")


def test_checksums_are_left_out_on_request(damaged):
    config = damaged / "config.json"
    config.write_text(config.read_text().replace("4.46.3", "4.46.4"))
    with pytest.raises(UsageError, match=r"config\.json .corrupted"):
        load_model(damaged)
    load_model(damaged, verify=False)


def test_every_bad_file_is_named(damaged, capsys):
    (damaged / "config.json").write_text("{}")
    array_file(damaged).unlink()
    flip_byte(damaged / "params" / "state" / "_METADATA")
    assert verify_command.main(["verify", str(damaged)]) == 2
    told = one_error(capsys)
    assert "3 bad" in told
    assert all(part in told for part in ("config.json (expected", "(missing)", "_METADATA (corrupted"))


def test_a_half_written_checkpoint_is_refused(damaged, capsys):
    (damaged / "manifest.json").unlink()
    for verify in (True, False):
        with pytest.raises(UsageError, match=r"without manifest\.json \(half-written"):
            load_model(damaged, verify=verify)
    assert verify_command.main(["verify", str(damaged)]) == 2
    assert "half-written" in one_error(capsys)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": {}}', '{"files": {"config.json": 3}}'])
def test_a_malformed_manifest_is_refused(text, damaged):
    (damaged / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match=r"manifest\.json: expected"):
        load_model(damaged)


def test_a_config_of_another_model_is_refused(damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"n_layers": 4, "vocab_size": 319, "embedding_size": 319}))
    convert_command.write_manifest(damaged)
    with pytest.raises(UsageError, match=r"missing: layers\.3.* wrong shape: embedding"):
        load_model(damaged)


def test_a_failed_conversion_leaves_the_old_target(monkeypatch, tmp_path):
    target = tmp_path / "m"
    convert(GQA, target, to="orbax", dtype="keep", overwrite=False)
    before = params_of(target)

    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(convert_command, "write_manifest", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(TINY, target, to="orbax", dtype="keep", overwrite=True)
    assert same_bits(before, params_of(target))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_overwrite_replaces_the_target(tmp_path):
    target = copied(GQA, tmp_path / "m")
    convert(TINY, target, to="orbax", dtype="keep", overwrite=True)
    assert same_bits(params_of(TINY), params_of(target))
    assert not (target / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--source={GQA}"], "--target: expected a folder, got none"),
        (["--target={new}"], "--source: expected a folder, got none"),
        (["--source={GQA}", "--target={new}", "--dtype=int8"], "--dtype=int8"),
        (["--source={GQA}", "--target={new}", "--to=torch"], "--to=torch"),
        (["--source={GQA}", "--target={new}", "--bogus=1"], "bogus"),
        (["--source={GQA}", "--target={new}", "extra"], "extra"),
        (["--source=nowhere", "--target={new}"], "--source: expected a folder or one of llada-tiny"),
        (["--source={empty}", "--target={new}"], "expected config.json, got no such file"),
        (["--source={GQA}", "--target={copy}"], "--overwrite"),
        (["--source={GQA}", "--target={empty}", "--overwrite"], "without config.json or filter.safetensors"),
        (["--source={copy}", "--target={copy}", "--overwrite"], "apart from --source"),
        (["--source={GQA}", "--target={copy}/config.json/x"], "expected a place to write"),
    ],
)
def test_bad_usage_is_one_line(arguments, told, tmp_path, capsys):
    paths = {"GQA": GQA, "new": tmp_path / "new", "empty": tmp_path / "empty", "copy": copied(GQA, tmp_path / "copy")}
    paths["empty"].mkdir()
    assert convert_command.main(["convert", *(argument.format(**paths) for argument in arguments)]) == 2
    assert told in one_error(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "empty"]


def test_ctrl_c_leaves_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(convert_command, "open_checkpoint", mock.Mock(side_effect=KeyboardInterrupt))
    assert convert_command.main(["convert", f"--source={GQA}", f"--target={tmp_path / 'm'}"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not list(tmp_path.iterdir())


def test_commands_from_a_shell(tmp_path):
    command = [
        "-m",
        "dllm_jax.checkpoints.convert",
        f"--source={GQA}",
        f"--target={tmp_path / 'm'}",
        "--dtype=bfloat16",
    ]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "188,864 parameters in bfloat16" in done.stdout
    command = ["-m", "dllm_jax.checkpoints.verify", str(tmp_path / "m")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "files match manifest.json" in done.stdout


def test_help(capsys):
    assert convert_command.main(["convert", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"--{name}" in told for name in ("source", "target", "to", "dtype", "overwrite", "help"))


def one_error(capsys) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]
