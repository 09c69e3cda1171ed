"""Tasks of lm-evaluation-harness that read the public files of GSM8K, MATH-500, HumanEval and MBPP from here.

The yaml files of `assets/lm_eval/` name them. They ask and score as `decode.eval` does, with the same wordings and
rules, and need no network. `metadata` of such a task has

- `task`, `chat`: which wording, see `dllm_jax/evals/public.py`;
- `path`: the file, instead of the one that the yaml file names;
- `code_seconds`, `code_memory_mb`: limits of programs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask

from dllm_jax.errors import UsageError
from dllm_jax.evals import public, scorers
from dllm_jax.evals.sandbox import CodeLimits


class PublicTask(ConfigurableTask):
    """One of `public.TASKS`.

    Args:
        config: of the yaml file.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        about = config["metadata"]
        self.name: str = about["task"]
        self.words = public.wording(self.name, chat=about["chat"])
        known = {name: about[name] for name in ("code_seconds", "code_memory_mb") if name in about}
        self.limits = CodeLimits(
            known.get("code_seconds", CodeLimits.seconds), known.get("code_memory_mb", CodeLimits.memory_mb)
        )
        readings = ["accuracy", *(["accuracy_strict"] if self.name in scorers.STRICT else [])]
        settled = {
            "dataset_path": "json",
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": self.words.asked,
            "doc_to_target": self._target,
            "target_delimiter": "",
            "fewshot_delimiter": public.BETWEEN,
            "num_fewshot": self.words.shots,
            "fewshot_config": {"sampler": "first_n", "samples": list(self.words.examples)},
            "process_results": self._score,
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in readings],
            "generation_kwargs": {"until": list(self.words.stop), "do_sample": False},
            "unsafe_code": self.name in scorers.CODE_TASKS,
        }
        given = {name: value for name, value in config.items() if name != "class"}
        if about.get("path"):
            given["dataset_kwargs"] = {"data_files": {"test": about["path"]}}
        for file in given["dataset_kwargs"]["data_files"].values():
            if not Path(file).is_file():
                raise UsageError(f"input.path: expected the file of {given['task']}, got {file!r} (no such file)")
        super().__init__(config=settled | given)

    def _target(self, doc: Mapping[str, Any]) -> str:
        """What would be answered to a line, as far as it says."""
        try:
            return self.words.answered(doc)
        except KeyError:
            return ""

    def _score(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        """The readings of a text: 1.0 if it is right."""
        reference = public.reference_of(self.name, doc)
        strict = scorers.strict_scorer_for(self.name, reference)
        right = scorers.scorer_for(self.name, reference, limits=self.limits)(results[0])
        return {"accuracy": float(right), **({"accuracy_strict": float(strict(results[0]))} if strict else {})}
