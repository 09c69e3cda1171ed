"""DiCo in plain Python, line by line as its specification: one row, lists and loops, Python's own float64."""

import dataclasses
from typing import Any

import numpy as np

from dllm_jax.settings import DicoSettings

Clusters = list[tuple[int, int]]  # first and last position, sorted


def scan(start: int, stop: int, step: int, *, hit: Any, tolerance: int) -> int | None:
    """The last hit on the way from `start` (looked at) to `stop` (not), before more misses in a row than tolerated."""
    misses, last = 0, None
    for i in range(start, stop, step):
        if hit(i):
            misses, last = 0, i
        elif (misses := misses + 1) > tolerance:
            break
    return last


def merged(clusters: Clusters) -> Clusters:
    done: Clusters = []
    for left, right in sorted(clusters):
        if done and done[-1][1] + 1 >= left:
            done[-1] = (done[-1][0], max(done[-1][1], right))
        else:
            done.append((left, right))
    return done


def shrunk(cluster: tuple[int, int], is_open: np.ndarray) -> Clusters:
    kept = [i for i in range(cluster[0], cluster[1] + 1) if is_open[i]]
    return [(kept[0], kept[-1])] if kept else []


@dataclasses.dataclass
class Reference:
    """Decodes with given predictions: those of forward i, at every position, are the i-th rows."""

    settings: DicoSettings
    confidence_FG: np.ndarray
    margin_FG: np.ndarray
    block_length: int
    forwards: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def decode(self) -> None:
        length = self.confidence_FG.shape[1]
        self.is_open, self.commit_step = np.ones(length, bool), np.zeros(length, int)
        for start in range(0, length, self.block_length):
            self.start, self.end = start, start + self.block_length
            for _ in range(int(self.block_length * self.settings.gate)):
                clusters = self.divide(min(self.settings.max_divide_steps, length - len(self.forwards)))
                if not clusters:
                    break
                self.conquer(clusters)
                if self.is_open[self.start : self.end].sum() / self.block_length < 1 - self.settings.gate:
                    break
            self.finalize()

    def forward(self, phase: str, clusters: Clusters) -> np.ndarray:
        c = np.where(self.is_open, self.confidence_FG[len(self.forwards)], -np.inf).astype(np.float32)
        c[: self.start] = c[self.end :] = -np.inf
        step = {"phase": phase, "seeds": [], "clusters_before": clusters, "clusters_after": clusters}
        self.forwards.append(step)
        return c

    def commit(self, chosen: list[int]) -> None:
        self.is_open[chosen] = False
        self.commit_step[chosen] = len(self.forwards)

    def score(self, c: np.ndarray) -> np.ndarray:
        s, size = self.settings, self.block_length
        if s.weighting == "none" or not np.isfinite(c).any():
            return c
        if s.weighting == "static":
            return c * np.float32(np.exp(np.log(s.beta) / (size - 1) * len(self.forwards)))
        first = int(np.isfinite(c).argmax())
        n = self.end - first
        least = min(1, s.beta + s.alpha * (1 - self.is_open.mean()))
        if n == 1:
            weight = np.full(1, s.max_weight, np.float32)
        elif s.weighting == "linear":
            weight = np.linspace(s.max_weight, least, n, dtype=np.float32)
        else:
            rate = -np.log(np.float32(least / s.max_weight)) / np.float32(n - 1)
            weight = np.float32(s.max_weight) * np.exp(-rate * np.arange(n, dtype=np.float32))
        score = c.copy()
        score[first : self.end] *= weight
        return score

    def seeds(self, score: np.ndarray) -> list[int]:
        s, size, threshold = self.settings, self.block_length, np.float32(self.settings.seed_threshold)
        wanted, seeds = min(s.num_seeds, int((score > 0).sum())), []
        if s.seed_method == "soft_nms":
            left, distance = score.copy(), np.arange(len(score), dtype=np.float32)
            for _ in range(wanted):
                best = int(left.argmax())
                if left[best] <= 0 or score[best] < threshold:
                    break
                seeds.append(best)
                kept = 1 - np.exp(-((distance - best) ** 2) / np.float32(size / s.sigma_divisor) ** 2)
                left = np.where(left > 0, left * kept, left)
        else:
            for a in range(wanted):
                first, behind = self.start + a * size // wanted, self.start + (a + 1) * size // wanted
                if first < behind and score[best := first + int(score[first:behind].argmax())] > threshold:
                    seeds.append(best)
        return seeds

    def divide(self, cap: int) -> Clusters:
        s, clusters, patience = self.settings, [], 0
        for t in range(cap):
            score = self.score(self.forward("divide", clusters))
            seeds = self.seeds(score)
            if not seeds:
                break
            self.forwards[-1]["seeds"] = seeds

            def hit(i: int, score: np.ndarray = score) -> bool:
                return score[i] >= np.float32(s.seed_threshold)

            grown, touched, is_new = [], [], False
            for seed in seeds:
                home = [cluster for cluster in clusters if cluster[0] <= seed <= cluster[1]]
                is_new |= not home
                touched += home
                left, right = home[0] if home else (seed, seed)
                first = scan(left - 1, self.start - 1, -1, hit=hit, tolerance=s.tolerance)
                last = scan(right + 1, self.end, 1, hit=hit, tolerance=s.tolerance)
                grown.append((left if first is None else first, right if last is None else last))
            old, clusters = clusters, merged(grown + [cluster for cluster in clusters if cluster not in touched])
            self.forwards[-1]["clusters_after"] = clusters
            self.commit(seeds)
            ratios = [(b[1] - b[0] + 1) / (a[1] - a[0] + 1) for a, b in zip(old, clusters, strict=False)]
            grew = t == 0 or len(clusters) != len(old) or any(ratio >= 1 + s.growth_ratio for ratio in ratios)
            patience = 0 if is_new or grew else patience + 1
            if patience >= s.patience or self.density(score, clusters) >= s.low_threshold:
                break
        return [kept for cluster in clusters for kept in shrunk(cluster, self.is_open)]

    def density(self, score: np.ndarray, clusters: Clusters) -> float:
        inside = [score[i] for left, right in clusters for i in range(left, right + 1) if self.is_open[i]]
        return float(np.mean(np.array(inside, np.float32))) if inside else 0.0

    def conquer(self, clusters: Clusters) -> None:
        s = self.settings
        low, high, auto = (np.float32(x) for x in (s.low_threshold, s.high_threshold, s.auto_commit))
        while True:
            c = self.forward("conquer", clusters)
            ruled = []
            for left, right in clusters:
                inside = sorted((i for i in range(left, right + 1) if np.isfinite(c[i])), key=lambda i, c=c: (-c[i], i))
                if s.parallel_rule == "factor":
                    counts = [n for n, i in enumerate(inside, 1) if int(s.factor / (1 - float(c[i]) + 1e-6) - 1) >= n]
                    ruled += inside[: max(counts, default=0)]
                else:
                    ruled += [i for i in inside if c[i] > high]
            chosen = set(ruled) | set(np.flatnonzero(c > auto).tolist())
            if not ruled and c[c.argmax()] >= low:
                chosen.add(int(c.argmax()))
            self.commit(sorted(chosen))

            def hit(i: int, c: np.ndarray = c) -> bool:
                return c[i] > low

            moved = []
            for a, (left, right) in enumerate(clusters):
                before = clusters[a - 1][1] if a else self.start - 1
                behind = clusters[a + 1][0] if a + 1 < len(clusters) else self.end
                first = scan(left - 1, before, -1, hit=hit, tolerance=s.tolerance)
                last = scan(right + 1, behind - 1, 1, hit=hit, tolerance=s.tolerance)
                ends = (left if first is None else first, right if last is None else last)
                moved += shrunk(ends, self.is_open)
            clusters = merged(moved)
            self.forwards[-1]["clusters_after"] = clusters
            if not clusters or self.density(c, clusters) < s.low_threshold:
                return

    def finalize(self) -> None:
        s, masks = self.settings, int(self.is_open[self.start : self.end].sum())
        for _ in range(-(-masks // s.finalize_tokens)):
            c = self.forward("finalize", [])
            margin = np.where(np.isfinite(c), self.margin_FG[len(self.forwards) - 1], 0).astype(np.float32)
            chosen = np.flatnonzero((margin > np.float32(s.margin)) | (c > np.float32(s.auto_commit))).tolist()
            if not chosen:
                best = np.argsort(-c, kind="stable")[: s.finalize_tokens]
                chosen = [int(i) for i in best if np.isfinite(c[i])]
            self.commit(chosen)
            if not self.is_open[self.start : self.end].any():
                return
