"""Divide and conquer (DiCo, arXiv 2602.23792): clusters of sure positions are decoded in parallel, then the rest.

A block goes through rounds of two phases. Divide commits a few seeds per forward, far from each other, and grows
clusters around them. Conquer commits many positions per forward inside the clusters, whose borders follow the
confidence. When few masks are left, Finalize commits by margin, or one at a time. Every number is as in the released
code; what it compares in float64 is compared here with the least float32 or integer that passes, found on the host.

A row takes at most 2 G + 1 forwards for G tokens. Divide only begins while fewer than G are spent, and may use no more
than are missing to G. From then on a row ends the Conquer phase it is in, whose forwards all write a token but the
last, and spends at most one forward of Finalize per mask: G + 1.

Shape letters: Q positions of a block, W widths of a cluster from 0. Phases are functions of one row, mapped over all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.decoding.canvas import Geometry
from dllm_jax.decoding.policies import dico_clusters as clusters
from dllm_jax.decoding.policies.base import Commit, Policy, Reported, Sizes, View
from dllm_jax.decoding.policies.dico_log import Forward, PhaseLog
from dllm_jax.decoding.policies.dico_seeds import (
    SEED_METHODS,
    WEIGHTINGS,
    Block,
    SeedMethod,
    Trajectory,
    Weighting,
    place_in_group,
)
from dllm_jax.decoding.prediction import Prediction
from dllm_jax.decoding.sampling import Noise, rank
from dllm_jax.decoding.state import DecodeState
from dllm_jax.settings import DicoSettings

DIVIDE, CONQUER, FINALIZE = range(3)  # as in dico_log.PHASES
ONE_BITS = int(np.float32(1).view(np.int32))  # of the largest confidence


class Row(NamedTuple):
    """Where a row stands in its block, before its next forward."""

    phase: Int[Array, ""]
    rounds: Int[Array, ""]  # of Divide and Conquer that are over
    steps_left: Int[Array, ""]  # forwards that Divide, or Finalize, may still take
    patience: Int[Array, ""]  # forwards of Divide without progress, in a row
    cluster_Q: Bool[Array, "Q"]


class DicoState(NamedTuple):
    """The policy's state: where every row stands, and its log."""

    row: Row
    log: Reported


class Step(NamedTuple):
    """What a phase makes of a forward."""

    chosen_Q: Bool[Array, "Q"]  # to commit
    seed_Q: Int[Array, "Q"]  # k for the k-th seed, 0 elsewhere
    cluster_Q: Bool[Array, "Q"]
    row: Row  # before the next forward


@struct.dataclass
class Dico(Policy):
    """The numbers of the decoder; `build` makes them."""

    trajectory: Trajectory
    num_seeds: Int[Array, ""]
    seed_threshold: Float[Array, ""]
    sigma: Float[Array, ""]
    tolerance: Int[Array, ""]
    grown_width_W: Int[Array, "W"]  # the least width that a cluster of a given width has to reach to have grown
    patience: Int[Array, ""]
    low: Float[Array, ""]  # for a position
    low_density: Float[Array, ""]  # for a mean
    factor_Q: Float[Array, "Q"]  # the least c_(n) that commits n positions of a cluster, n = 1, ..., Q
    high: Float[Array, ""]
    auto_commit: Float[Array, ""]
    margin: Float[Array, ""]
    finalize_tokens: Int[Array, ""]
    max_divide_steps: Int[Array, ""]
    max_rounds: Int[Array, ""]
    least_masks: Int[Array, ""]  # that a further round is worth
    gen_length: Int[Array, ""]
    weighting: Weighting = struct.field(pytree_node=False)
    seed_method: SeedMethod = struct.field(pytree_node=False)
    by_factor: bool = struct.field(pytree_node=False)
    mask_id: int = struct.field(pytree_node=False)
    traced_forwards: int = struct.field(pytree_node=False)  # room for a trace, 0 without one

    def most_forwards(self, geometry: Geometry) -> int:
        """Two per position and one more, see above."""
        return 2 * geometry.gen_length + 1

    def init(self, state: DecodeState, geometry: Geometry, sizes: Sizes) -> DicoState:
        """Empty logs; where a row stands is set when it comes into a block."""
        log = PhaseLog.empty(forwards=self.traced_forwards, block_length=sizes.slots)
        one = DicoState(self._last_phase(jnp.zeros(sizes.slots, bool)), Reported(log))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(state.nfe_B), *x.shape)), one)

    def commit(self, policy_state: DicoState, prediction: Prediction, view: View, noise: Noise) -> Commit:
        """A forward of every row, each in its phase."""
        block = Block(
            open_Q=view.open_BQ,
            confidence_Q=jnp.where(view.open_BQ, prediction.confidence_BQ, -jnp.inf),
            margin_Q=prediction.margin_BQ,
            written_Q=prediction.token_BQ != self.mask_id,
            filled=view.filled_B,
            nfe=view.nfe_B,
            is_new=view.block_nfe_B == 0,
            start=view.position_BQ[:, 0],
        )
        mask_BQ, policy_state = jax.vmap(self._forward)(policy_state, block)
        leave_B = (policy_state.row.phase == FINALIZE) & (policy_state.row.steps_left == 0)
        return Commit(mask_BQ, prediction.token_BQ, leave_B, policy_state)

    def _forward(self, policy_state: DicoState, block: Block) -> tuple[Bool[Array, "Q"], DicoState]:
        """The step of the phase that a row is in, and its log."""
        row = choose(block.is_new, self._round(jnp.int32(0), block.nfe, block.open_Q), policy_state.row)
        steps = self.divide(row, block), self.conquer(row, block), self.finalize(row, block)
        step: Step = jax.tree.map(lambda *of_phases: jax.lax.select_n(row.phase, *of_phases), *steps)
        forward = Forward(row.phase, block.start, step.seed_Q, before_Q=row.cluster_Q, after_Q=step.cluster_Q)
        return step.chosen_Q, DicoState(step.row, Reported(policy_state.log.value.add(forward, nfe=block.nfe)))

    def divide(self, row: Row, block: Block) -> Step:
        """Commits seeds and grows clusters, until they are dense or stay as they are.

        Score s = W c, see `dico_seeds`. A seed grows over s >= h, or the cluster it lies in does.
        """
        score_Q = jnp.where(block.open_Q, self.weighting(self.trajectory, block) * block.confidence_Q, -jnp.inf)
        seed_Q = self.seed_method(score_Q, threshold=self.seed_threshold, sigma=self.sigma, count=self.num_seeds)
        chosen_Q = seed_Q > 0
        left_Q, right_Q = clusters.bounds(row.cluster_Q)
        hit_Q = score_Q >= self.seed_threshold
        ends = clusters.grown(left_Q, right_Q, hit_Q, tolerance=self.tolerance, first_Q=0, last_Q=len(hit_Q) - 1)
        cluster_Q = row.cluster_Q | clusters.union(chosen_Q, *ends)

        open_Q = block.left(chosen_Q)
        is_progress = (chosen_Q & ~row.cluster_Q).any() | self._has_grown(row.cluster_Q, cluster_Q)
        row = row._replace(
            steps_left=row.steps_left - 1, patience=jnp.where(is_progress, 0, row.patience + 1), cluster_Q=cluster_Q
        )
        is_over = (
            ~chosen_Q.any()
            | (row.patience >= self.patience)
            | (mean(score_Q, cluster_Q & open_Q) >= self.low_density)
            | (row.steps_left == 0)
        )
        inner_Q = clusters.union(clusters.heads(cluster_Q), *clusters.shrunk(*clusters.bounds(cluster_Q), open_Q))
        conquering = row._replace(phase=jnp.int32(CONQUER), cluster_Q=inner_Q)
        after = choose(is_over, choose(inner_Q.any(), conquering, self._last_phase(open_Q)), row)
        return Step(chosen_Q, seed_Q, cluster_Q, after)

    def conquer(self, row: Row, block: Block) -> Step:
        """Commits inside every cluster as many as its rule allows, while the clusters stay dense.

        The rule by factor takes the n surest, the largest n with f / (1 - c_(n) + 1e-6) - 1 >= n. As the bound rises
        with n, the n-th is taken if it passes its own. Where the rule takes none, the surest of the block is taken.
        """
        c_Q, index_Q = block.confidence_Q, jnp.arange(len(row.cluster_Q))
        by_factor_Q = c_Q >= self.factor_Q[place_in_group(c_Q, clusters.number(row.cluster_Q))]
        ruled_Q = block.open_Q & row.cluster_Q & (by_factor_Q if self.by_factor else c_Q > self.high)
        is_spare_Q = (index_Q == jnp.argmax(c_Q)) & (c_Q >= self.low) & ~ruled_Q.any()
        chosen_Q = ruled_Q | is_spare_Q | (c_Q > self.auto_commit)

        open_Q = block.left(chosen_Q)
        cluster_Q = self._moved_borders(row.cluster_Q, c_Q, open_Q)
        is_over = (
            (mean(c_Q, cluster_Q & open_Q) < self.low_density)
            | ~cluster_Q.any()
            | ~(chosen_Q & block.written_Q).any()  # nothing would change any more
        )
        is_worth = open_Q.sum() >= self.least_masks
        further = self._round(row.rounds + 1, block.nfe + 1, open_Q)
        after = choose(is_over, choose(is_worth, further, self._last_phase(open_Q)), row._replace(cluster_Q=cluster_Q))
        return Step(chosen_Q, jnp.zeros_like(index_Q), cluster_Q, after)

    def finalize(self, row: Row, block: Block) -> Step:
        """Commits what has a clear margin or is sure, else the surest."""
        sure_Q = block.open_Q & ((block.margin_Q > self.margin) | (block.confidence_Q > self.auto_commit))
        best_Q = block.open_Q & (rank(block.confidence_Q, block.open_Q) < self.finalize_tokens)
        chosen_Q = jnp.where(sure_Q.any(), sure_Q, best_Q)
        steps_left = jnp.where(block.left(chosen_Q).any(), row.steps_left - 1, 0)
        no_seeds_Q = jnp.zeros(len(chosen_Q), jnp.int32)
        return Step(chosen_Q, no_seeds_Q, row.cluster_Q, row._replace(steps_left=steps_left))

    def _round(self, rounds: Int[Array, ""], nfe: Int[Array, ""], open_Q: Bool[Array, "Q"]) -> Row:
        """At the beginning of a round, which Divide may refuse."""
        steps = jnp.minimum(self.max_divide_steps, self.gen_length - nfe)
        begin = Row(jnp.int32(DIVIDE), rounds, steps, jnp.int32(0), jnp.zeros_like(open_Q))
        return choose((rounds < self.max_rounds) & (steps > 0), begin, self._last_phase(open_Q))

    def _last_phase(self, open_Q: Bool[Array, "Q"]) -> Row:
        """At the beginning of Finalize. Without steps left (so with nothing to do) a row is done with its block."""
        zero, steps = jnp.int32(0), -(-open_Q.sum() // self.finalize_tokens)
        return Row(jnp.int32(FINALIZE), zero, steps, zero, jnp.zeros_like(open_Q))

    def _has_grown(self, old_Q: Bool[Array, "Q"], new_Q: Bool[Array, "Q"]) -> Bool[Array, ""]:
        """Whether there are more or fewer clusters, or one is wider by the growth ratio than the one in its place."""
        old_K, new_K = clusters.widths(old_Q), clusters.widths(new_Q)
        return ((new_K > 0) != (old_K > 0)).any() | (new_K >= self.grown_width_W[old_K]).any()

    def _moved_borders(
        self, cluster_Q: Bool[Array, "Q"], c_Q: Float[Array, "Q"], open_Q: Bool[Array, "Q"]
    ) -> Bool[Array, "Q"]:
        """Clusters grow over c > low up to their neighbours, then lose committed ends.

        As in the released code, the last position to the right, before a neighbour or the block's end, is not seen.
        """
        left_Q, right_Q = clusters.bounds(cluster_Q)
        ends = clusters.grown(
            left_Q,
            right_Q,
            c_Q > self.low,
            tolerance=self.tolerance,
            first_Q=clusters.before(cluster_Q)[left_Q] + 1,
            last_Q=clusters.behind(cluster_Q)[right_Q] - 2,
        )
        return clusters.union(clusters.heads(cluster_Q), *clusters.shrunk(*ends, open_Q))


def choose(condition: Bool[Array, ""], yes: Row, no: Row) -> Row:
    """One of two places to stand."""
    return jax.tree.map(lambda y, n: jnp.where(condition, y, n), yes, no)


def mean(x_Q: Float[Array, "Q"], which_Q: Bool[Array, "Q"]) -> Float[Array, ""]:
    """Over some positions; 0 over none."""
    return jnp.sum(jnp.where(which_Q, x_Q, 0)) / jnp.maximum(which_Q.sum(), 1)


def build(dico: DicoSettings, *, block_length: int, gen_length: int, mask_id: int, traced: bool) -> Dico:
    """The policy of the settings.

    Args:
        dico: the settings.
        block_length: positions that are open at once, B.
        gen_length: positions of the generation, G: also what Divide may spend in forwards.
        mask_id: of the model.
        traced: keep seeds and clusters of every forward.
    """
    ints = ("num_seeds", "tolerance", "patience", "finalize_tokens", "max_divide_steps")
    floats = ("seed_threshold", "auto_commit", "margin")
    share_of_masks = np.arange(block_length + 1) / block_length
    return Dico(
        trajectory=Trajectory(*map(jnp.float32, (dico.alpha, dico.beta, dico.max_weight, gen_length))),
        **{name: jnp.int32(getattr(dico, name)) for name in ints},
        **{name: jnp.float32(getattr(dico, name)) for name in floats},
        sigma=jnp.float32(block_length / dico.sigma_divisor),
        grown_width_W=jnp.asarray(grown_widths(block_length, ratio=dico.growth_ratio)),
        low=jnp.float32(dico.low_threshold),
        low_density=jnp.asarray(rounded_up(dico.low_threshold)),
        factor_Q=jnp.asarray(least_confidences(block_length, factor=dico.factor)),
        high=jnp.float32(dico.high_threshold),
        max_rounds=jnp.int32(block_length * dico.gate),
        least_masks=jnp.int32(np.sum(share_of_masks < 1 - dico.gate)),
        gen_length=jnp.int32(gen_length),
        weighting=WEIGHTINGS[dico.weighting],
        seed_method=SEED_METHODS[dico.seed_method],
        by_factor=dico.parallel_rule == "factor",
        mask_id=mask_id,
        traced_forwards=2 * gen_length + 1 if traced else 0,
    )


def rounded_up(value: float) -> np.float32:
    """The least float32 that is not below a float64."""
    near = np.float32(value)
    return near if float(near) >= value else np.nextafter(near, np.float32(np.inf))


def least_confidences(block_length: int, *, factor: float) -> Float[np.ndarray, "Q"]:
    """For n = 1, ..., Q the least float32 c with f / (1 - c + 1e-6) - 1 >= n in float64; inf where there is none.

    Found by bisection: the bits of the floats from 0 to 1 are in the same order as they are.
    """
    n_Q = np.arange(1, block_length + 1)

    def passes(bits_Q: np.ndarray) -> np.ndarray:
        return factor / (1 - bits_Q.view(np.float32).astype(np.float64) + 1e-6) - 1 >= n_Q

    low_Q, high_Q = np.zeros(block_length, np.int32), np.full(block_length, ONE_BITS, np.int32)
    while (low_Q < high_Q).any():
        middle_Q = low_Q + (high_Q - low_Q) // 2
        is_enough_Q = passes(middle_Q)
        low_Q = np.where(is_enough_Q, low_Q, np.minimum(middle_Q + 1, high_Q))
        high_Q = np.where(is_enough_Q, middle_Q, high_Q)
    return np.where(passes(high_Q), high_Q.view(np.float32), np.float32(np.inf))


def grown_widths(block_length: int, *, ratio: float) -> Int[np.ndarray, "W"]:
    """For widths w = 0, ..., Q the least width w' with w' / w >= 1 + ratio in float64; out of reach for w = 0."""
    width_W = np.arange(block_length + 1)
    is_enough_WW = width_W[None, :] / np.maximum(width_W, 1)[:, None] >= 1 + ratio
    least_W = np.where(is_enough_WW.any(axis=1), is_enough_WW.argmax(axis=1), block_length + 1)
    least_W[0] = block_length + 1
    return least_W.astype(np.int32)
