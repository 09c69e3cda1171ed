"""The settings of evaluations: how tasks are asked, and what scoring them may do."""

import dataclasses
from typing import Any

from dllm_jax.errors import UsageError
from dllm_jax.settings.base import Section, setting


@dataclasses.dataclass(frozen=True)
class EvalSettings(Section):
    """How tasks with known answers are asked and scored (decode.eval, decode.sweep, decode.lm_eval)."""

    full: bool = setting(False, "all 500 bundled tasks where input.path names none, instead of 20 of each kind")
    shots: int = setting(
        -1, "solved examples in front of lines of GSM8K, MATH, HumanEval and MBPP (-1: as many as usual)", least=-1
    )
    run_code: bool = setting(
        False, "run the code that the model writes, for HumanEval and MBPP; in a process of its own with limits"
    )
    code_seconds: float = setting(10.0, "how long such a program may run", above=0)
    code_memory_mb: int = setting(2048, "memory that it may take, in MiB", least=64)
    mc_num: int = setting(128, "draws of masks per likelihood (decode.lm_eval)", least=1)
    mc_batch_size: int = setting(8, "draws per forward; divides eval.mc_num", least=1)
    is_greedy: bool = setting(
        False, "decode.lm_eval also decodes every continuation, to say whether it is the greedy one (lambada)"
    )

    def check(self, name: str, config: Any) -> None:
        """Draws come in whole batches."""
        if self.mc_num % self.mc_batch_size:
            raise UsageError(f"{name}.mc_num: expected a multiple of {self.mc_batch_size}, got {self.mc_num}")
