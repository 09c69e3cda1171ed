"""Prompts in, `DecodeResult` out: the host side of decoding."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax import hosts
from dllm_jax import mesh as meshes
from dllm_jax.config import Config, validate
from dllm_jax.decoding.blocks import Blocks
from dllm_jax.decoding.build import build_axes, build_geometry, build_stop, suited
from dllm_jax.decoding.caching import CacheStrategy, shorter_canvases
from dllm_jax.decoding.canvas import Geometry, bucketed_prompt_length, pad_prompts
from dllm_jax.decoding.driver import decode
from dllm_jax.decoding.engine import Engine, classes
from dllm_jax.decoding.policies.base import Parts
from dllm_jax.decoding.policies.build import RECIPES, checked
from dllm_jax.decoding.prediction import Sampler
from dllm_jax.decoding.results import joined, result
from dllm_jax.decoding.sampling import KeyedNoise, Noise
from dllm_jax.decoding.state import DecodeResult, DecodeState, Timing
from dllm_jax.decoding.streaming import Finished, stream
from dllm_jax.errors import UsageError
from dllm_jax.memory import bytes_per_device, check_fits, exhaustion_told, placed, plan_bytes
from dllm_jax.models.attention import key_multiple
from dllm_jax.models.model import Model, computing, with_causal_block
from dllm_jax.settings import block_schedule, token_ids
from dllm_jax.timing import CompileCount

BATCH_SIZE = "decode.batch_size"  # the setting that memory goes with


class Decoder:
    """Decodes batches of prompts with one model and one configuration.

    Args:
        model: a diffusion model.
        config: what to do; checked here.
        end_ids: the tokens that end a text, EoS first; default: those of the model's config.
        companions: the networks that the policy brings along, by name (verifier, ...); see `policies/companions.py`.

    Raises:
        UsageError: a setting is wrong or does not suit the model.
    """

    def __init__(
        self, model: Model, config: Config, *, end_ids: tuple[int, ...] | None = None, **companions: Any
    ) -> None:
        validate(config)
        mask_id = model.config.mask_id
        if mask_id is None:
            hint = " without a mask (add mask_token_id to config.json)" if model.config.block_causal else ""
            raise UsageError(
                f"model.path: expected a masked diffusion model, got the {model.config.family} model{hint}"
            )
        self.config = config = suited(config, model.config)
        if model.config.block_causal:
            model = with_causal_block(model, config.decode.block_length)
        self.model = model
        self.companions = checked(companions, config, model=model)
        check_blocks(config, model=model)
        self.models = (model, *(each for each in self.companions.values() if isinstance(each, Model)))
        self.max_length = min(each.config.max_length for each in self.models)
        self.end_ids = model.config.end_ids if end_ids is None else end_ids
        self.mask_id = mask_id
        self.block_length, steps = block_schedule(config.decode)
        steps_per_block = steps // -(-config.decode.gen_length // self.block_length)
        # The released dual-cache loop stops after the scheduled forwards even when a policy left masks in the block.
        limited = config.decode.compat == "reference" and config.decode.cache == "dual"
        self.block_limit = jnp.int32(steps_per_block) if limited else None
        self.noise: Noise = KeyedNoise(jax.random.key(config.decode.seed))
        self.axes = build_axes(config, model.config)
        self.axes_of_slots = build_axes(config, model.config, in_step=False)
        recipe = RECIPES[config.decode.policy]
        self.sampler = recipe.sampler(config, Sampler.from_settings(config.decode, model.config, end_ids=self.end_ids))
        parts = Parts(
            sampler=self.sampler,
            end_ids=self.end_ids,
            mask_id=self.mask_id,
            companions=self.companions,
            block_length=config.decode.block_length if model.config.block_causal else self.block_length,
            block_causal=model.config.block_causal,
        )
        self.policy = recipe.make(config, parts)
        if self.policy.wants.attention > model.config.num_layers:
            raise UsageError(
                f"{config.decode.policy}.layers: expected at most {model.config.num_layers}, those of the model, "
                f"got {self.policy.wants.attention}"
            )
        self.stop = build_stop(config, end_ids=self.end_ids)
        platform = model.mesh.devices.flat[0].platform
        self.length_multiple, self.key_multiple = length_multiple(platform), key_multiple(platform)
        self._prepared: set[Any] = set()  # programs that are compiled: structure of the engine, rows

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that the models take with this generation; below 1: none."""
        return self.max_length - self.config.decode.gen_length

    def check(self, prompt: Sequence[int]) -> None:
        """Refuses a prompt that cannot be decoded.

        Raises:
            UsageError: it is empty, too long for the model, or has an id outside the vocabulary.
        """
        limit = self.longest_prompt
        if not prompt:
            raise UsageError("prompt: expected at least one token, got an empty prompt")
        if len(prompt) > limit:
            raise UsageError(
                f"prompt: expected at most {limit} tokens (max_sequence_length {self.max_length} less "
                f"decode.gen_length {self.config.decode.gen_length}), got {len(prompt)}"
            )
        wrong = next((token for token in prompt if not 0 <= token < self.model.config.vocab_size), None)
        if wrong is not None:
            raise UsageError(f"prompt: expected token ids from 0 to {self.model.config.vocab_size - 1}, got {wrong}")

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of prompts to decode together: `decode.batch_size` of them, the shortest first.

        Every batch but the last is full, whatever buckets its prompts would have alone: it runs in that of its longest.
        Which prompts are together, and in which bucket, is the same for all decoders of a sweep.
        """
        order = sorted(range(len(lengths)), key=lambda index: lengths[index])
        size = self.config.decode.batch_size
        return [order[at : at + size] for at in range(0, len(order), size)]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        lengths: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        halted: Callable[[], bool] = lambda: False,
    ) -> Iterator[Finished]:
        """Decodes any number of prompts and hands them over as they are done.

        Args:
            prompts: token ids; a sequence that reads them when they are asked for is asked once for each.
            lengths: of the prompts, if they are known.
            rows: index of every prompt in the whole job, on which its random draws depend; default 0, 1, ...
            halted: asked now and then; once it is true no more prompts are begun, those that are begun are finished.
        """
        return stream(self, prompts, lengths=lengths, rows=rows, halted=halted)

    def __call__(self, prompts: Sequence[Sequence[int]], *, rows: Sequence[int] | None = None) -> DecodeResult:
        """Decodes one batch.

        Args:
            prompts: token ids; at least one prompt. The batch is filled up to `decode.batch_size` with idle rows.
            rows: index of every prompt in the whole job, on which its random draws depend; default 0, 1, ...

        Raises:
            UsageError: see `check`.
        """
        for prompt in prompts:
            self.check(prompt)
        engine = self.engine(max(map(len, prompts)))
        with self.running():
            compiled = self.prepare(engine, Decoder.program, rows=len(prompts))
            state = self.start(prompts, range(len(prompts)) if rows is None else rows, engine.geometry)
            started = time.perf_counter()
            final = jax.block_until_ready(decode(engine, state))
        timing = compiled + Timing(0.0, time.perf_counter() - started, 0, 0)
        return self.result(hosts.fetch(final), engine.geometry, timing, slots=range(len(prompts)))

    def prompt_length(self, longest: int) -> int:
        """Columns for the prompts of a batch whose longest has this many tokens."""
        return bucketed_prompt_length(
            longest,
            self.config.decode.gen_length,
            multiple=self.length_multiple,
            waste=self.config.decode.bucket_waste,
            most=self.longest_prompt,
        )

    def engine(self, longest: int, *, in_step: bool = True) -> Engine:
        """The program's argument for a batch.

        Args:
            longest: tokens of its longest prompt.
            in_step: all its rows begin at the same time.
        """
        decode, axes = self.config.decode, self.axes if in_step else self.axes_of_slots
        geometry = build_geometry(self.config, self.model.config, prompt_length=self.prompt_length(longest))
        geometry = with_slack(geometry, axes.cache, axes.blocks, multiple=self.key_multiple)
        # With a cache rows end in the block that they decode, which is then their last: no full forward follows.
        shrinks = "eot" in decode.stop and decode.cache == "none"
        canvases = shorter_canvases(geometry, multiple=self.length_multiple) if shrinks else (geometry,)
        return Engine(
            graphdef=self.model.graphdef,
            params=self.model.params,
            policy=self.policy,
            blocks=axes.blocks,
            sampler=self.sampler,
            noise=self.noise,
            stop=self.stop,
            block_limit=self.block_limit,
            canvases=canvases,
            cache=axes.cache,
            mask_id=self.mask_id,
            kinds=classes((self.policy, axes.blocks, self.stop, self.noise)),
        )

    def prepare(self, engine: Engine, compiles: Callable[..., object], *, rows: int) -> Timing:
        """Compiles a program, for its call to find it, unless that was done before.

        Args:
            engine: from `engine`.
            compiles: `Decoder.program`, or what compiles another one.
            rows: prompts in the batch.

        Returns:
            What it took.
        """
        begin, before = time.perf_counter(), CompileCount.now()
        key = (compiles, jax.tree.structure(engine), self.batch(rows))
        if key not in self._prepared:
            compiles(self, engine, rows=rows)
            self._prepared.add(key)
        made = CompileCount.now() - before
        return Timing(time.perf_counter() - begin, 0.0, made.programs, made.cache_hits)

    def program(self, engine: Engine, *, rows: int) -> jax.stages.Compiled:
        """Compiles the program of a batch, of which nothing is allocated yet.

        Args:
            engine: from `engine`.
            rows: prompts in the batch.

        Raises:
            UsageError: the batch does not fit into memory.
        """
        state = self.state_shapes(engine.geometry, rows=rows)
        return self.compiled(engine, decode, state, batch=self.batch(rows))

    def compiled(self, engine: Engine, function: Any, *arguments: Any, batch: int) -> jax.stages.Compiled:
        """Compiles a function of an engine and other arguments, unless they cannot fit into memory.

        Args:
            engine: from `engine`.
            function: jitted.
            arguments: shapes on the mesh.
            batch: rows of the batch, idle ones included.

        Raises:
            UsageError: the batch does not fit into memory.
        """
        mesh, config = self.model.mesh, self.model.config
        shapes = jax.tree.leaves(arguments)
        needed = bytes_per_device(shapes, [x.sharding for x in shapes])
        rows, columns = batch // meshes.batch_multiple(mesh), engine.geometry.columns
        hidden = rows * columns * config.embed_dim * self.model.dtype.itemsize
        check_fits(needed + hidden, mesh, field=BATCH_SIZE, got=batch)  # at least so much, before compiling
        program: jax.stages.Compiled = function.lower(engine, *arguments).compile()
        check_fits(needed + plan_bytes(program), mesh, field=BATCH_SIZE, got=batch)
        return program

    def state_shapes(self, geometry: Geometry, *, rows: int) -> DecodeState:
        """What `start` returns for this many prompts, as shapes on the mesh."""
        batch = self.batch(rows)

        def integers(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        start = functools.partial(DecodeState.start, geometry=geometry)
        live_B = jax.ShapeDtypeStruct((batch,), jnp.bool_)
        shapes = jax.eval_shape(
            start, integers(batch, geometry.columns), pad_B=integers(batch), row_B=integers(batch), live_B=live_B
        )
        return placed(shapes, meshes.batch_shardings(shapes, self.model.mesh))

    def batch(self, rows: int) -> int:
        """The rows of a batch on the mesh, idle ones included, for this many prompts."""
        multiple = meshes.batch_multiple(self.model.mesh)
        return -(-max(self.config.decode.batch_size, rows) // multiple) * multiple

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        geometry: Geometry,
        *,
        slots: Sequence[int] | None = None,
    ) -> DecodeState:
        """The state of a batch on the mesh; idle rows repeat the first prompt.

        Args:
            prompts: token ids, at least one prompt.
            rows: index of every prompt in the whole job.
            geometry: of the canvas.
            slots: row of the batch for every prompt (default: the first ones).
        """
        batch = self.batch(len(prompts))
        slots = range(len(prompts)) if slots is None else slots
        place_B = [0] * batch
        for place, slot in enumerate(slots):
            place_B[slot] = place
        tokens_BL, pad_B = pad_prompts(
            [prompts[place] for place in place_B], geometry, mask_id=self.mask_id, pad_id=self.model.config.eos_id
        )
        state = DecodeState.start(
            jnp.asarray(tokens_BL),
            pad_B=jnp.asarray(pad_B),
            row_B=jnp.asarray([rows[place] for place in place_B], jnp.int32),
            live_B=jnp.asarray(np.isin(np.arange(batch), slots)),
            geometry=geometry,
        )
        return hosts.place(state, meshes.batch_shardings(state, self.model.mesh))

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Inside it the program is compiled and run: on the model's mesh, with the precision of the configuration."""
        return computing(self.model.mesh, precision=self.config.model.matmul_precision)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """`computing`, where memory may run out."""
        with self.computing(), exhaustion_told(field=BATCH_SIZE, got=self.config.decode.batch_size):
            yield

    def result(self, final: DecodeState, geometry: Geometry, timing: Timing, *, slots: Sequence[int]) -> DecodeResult:
        """Some rows of a batch, which are finished."""
        shape = dataclasses.replace(geometry, gen_length=self.config.decode.gen_length)
        return result(final, shape, timing, slots=slots, end_ids=self.end_ids, mask_id=self.mask_id)


def length_multiple(platform: str) -> int:
    """What the lengths of canvases are multiples of, at least."""
    return max(32, key_multiple(platform))


def with_slack(geometry: Geometry, cache: CacheStrategy, blocks: Blocks, *, multiple: int) -> Geometry:
    """The canvas with columns for every slice of a cache and for all slots, rounded up to a multiple."""
    columns = max(cache.columns(geometry), blocks.columns(geometry))
    return dataclasses.replace(geometry, slack=columns + -columns % multiple - geometry.length)


def check_blocks(config: Config, *, model: Model) -> None:
    """Refuses delimiters of blocks that are no tokens of the model.

    Raises:
        UsageError: naming the setting.
    """
    if config.decode.blocks != "adaptive":
        return
    vocab_size = model.config.vocab_size
    if wrong := [i for i in token_ids("adaptive.delimiters", config.adaptive.delimiters) if i >= vocab_size]:
        raise UsageError(f"adaptive.delimiters: expected ids from 0 to {vocab_size - 1}, got {wrong[0]}")


def decode_all(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> DecodeResult:
    """Decodes any number of prompts and returns them in the order given."""
    finished = list(decoder.stream(prompts))
    results = [each.result for each in finished]
    order = np.argsort([place for each in finished for place in each.places])
    return joined(results, order)
