"""What decides the rows of a job, known before anything is loaded: an output is continued only by the same job."""

import dataclasses
import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dllm_jax.checkpoints import adapters, fingerprint
from dllm_jax.checkpoints.load import resolve
from dllm_jax.config import Config
from dllm_jax.data.outputs import VERSION
from dllm_jax.data.prompts import Prompt
from dllm_jax.decoding.policies.build import companions_of, every_companion
from dllm_jax.version import __version__

SCORING = ("code_seconds", "code_memory_mb")  # settings of `eval` that decide scores; the others decide prompts


def identity(config: Config, prompts: str, mesh: Mesh, *, command: str) -> dict[str, Any]:
    """What decides the rows: an output is continued, or taken for finished, only if all of it is the same.

    Settings, and the content of everything that is read instead of its path; nothing is loaded for it.

    Args:
        config: all settings.
        prompts: their digest.
        mesh: the devices.
        command: whose output lines these are.
    """
    return {
        **basis(config, mesh),
        "command": command,
        "output": {
            "trace": config.output.trace,
            "shard_lines": config.output.shard_lines,
            "stop": config.output.stop,
        },
        **({"eval": {name: getattr(config.eval, name) for name in SCORING}} if command == "decode.eval" else {}),
        "prompts": prompts,
    }


def basis(config: Config, mesh: Mesh, *, sections: Collection[str] = ()) -> dict[str, Any]:
    """What decides a decode besides its prompts: version, platform, the files of the checkpoints, settings.

    Args:
        config: all settings.
        mesh: the devices.
        sections: of the settings (default: all that a decode reads).
    """
    settings = dataclasses.asdict(config)
    for name in ("input", "output", "distributed", "eval", "bench", "plan"):
        del settings[name]
    for name in ("model", "tokenizer", *every_companion()):
        del settings[name]["path"]  # its content stands under files
    for name in ("adapter", "verify"):  # the content of the adapter stands there too
        del settings["model"][name]
    return {
        VERSION: __version__,
        "platform": mesh.devices.flat[0].platform,
        "files": fingerprint.fingerprint(sources(config)),
        **{name: section for name, section in settings.items() if not sections or name in sections},
    }


def sources(config: Config) -> dict[str, Path]:
    """Setting -> the file or folder it stands for, of every checkpoint that the job reads.

    Raises:
        UsageError: there is none.
    """
    found = {}
    if not config.model.preset:
        found["model.path"] = resolve(config.model.path)
    if config.model.adapter:
        found["model.adapter"] = adapters.resolve(config.model.adapter)
    if config.tokenizer.path:
        found["tokenizer.path"] = resolve(config.tokenizer.path, field="tokenizer.path")
    return found | {each.field: each.place(config) for each in companions_of(config) if each.is_named(config)}


def digest(prompts: Iterable[Prompt], *, with_answers: bool) -> str:
    """A checksum of prompts: what is asked, in which order and under which ids.

    Args:
        prompts: the prompts.
        with_answers: tasks and answers count too.
    """
    sha = Digest(with_answers=with_answers)
    for prompt in prompts:
        sha.add(prompt)
    return sha.hexdigest()


class Digest:
    """The checksum of prompts that come one after the other; see `digest`."""

    def __init__(self, *, with_answers: bool) -> None:
        left_out = {"line"} if with_answers else {"line", "task", "answer", "doc"}
        self._names = [field.name for field in dataclasses.fields(Prompt) if field.name not in left_out]
        self._sha = hashlib.sha256(b"[")
        self._between = b""

    def add(self, prompt: Prompt) -> None:
        """Adds a prompt."""
        asked = repr([getattr(prompt, name) for name in self._names])
        self._sha.update(self._between + asked.encode())
        self._between = b", "

    def hexdigest(self) -> str:
        """The checksum of all that were added."""
        sha = self._sha.copy()
        sha.update(b"]")
        return sha.hexdigest()
