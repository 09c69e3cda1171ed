r"""Runs tasks of lm-evaluation-harness with a diffusion language model, decoded as a configuration says.

usage: python -m decode.lm_eval [--config=NAME|FILE] --tasks=NAME,... [--config.SECTION.FIELD=VALUE ...]

  python -m decode.lm_eval --config=threshold --config.model.path=LLaDA-8B-Instruct --config.decode.gen_length=256 \
      --tasks=gsm8k_local_chat --config.input.path=gsm8k_test.jsonl --apply_chat_template --output_path=results
  python -m decode.lm_eval --config=vanilla --tasks=my_task --include_path=my_tasks --limit=10

  --tasks=NAME,...             tasks, groups and tags; of local files: gsm8k_local, math500_local, humaneval_local,
                               mbpp_local, and the same names with _chat, worded for --apply_chat_template
  --include_path=FOLDER        more tasks (yaml files)
  --apply_chat_template        contexts become chats, by the template of the tokenizer
  --fewshot_as_multiturn=BOOL  examples become turns of the chat (true) or stand in one message (false)
  --system_instruction=TEXT    a system message
  --num_fewshot=N              examples in front (else: eval.shots, or what the task says)
  --gen_kwargs=K=V,...         generation settings of the requests: until, and max_gen_toks, a budget of tokens
  --limit=N                    the first N samples of every task only
  --output_path=FOLDER         results as JSON
  --log_samples                and every sample

It needs pip install 'dllm_jax[eval]'. Tasks of local files read the file that their yaml file names, from the working
directory, or input.path; they ask and score as decode.eval does. HumanEval, MBPP and other tasks that run code need
eval.run_code=true. A request decides where a text stops and how many tokens it may have; decode.* decides the rest.
Likelihoods are estimated from eval.mc_num draws of masks. Other tasks come with lm-evaluation-harness; their data is
fetched only with HF_HUB_OFFLINE=0 in the environment.
"""

import argparse
import difflib
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dllm_jax import cli
from dllm_jax.config import Config
from dllm_jax.data.tasks import ASSETS
from dllm_jax.errors import UsageError
from dllm_jax.evals import scorers

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from dllm_jax.evals.harness.model import DiffusionLM

TASKS = ASSETS / "lm_eval"
DEFAULT = "vanilla"


class _Parser(argparse.ArgumentParser):
    """Flags that are no settings."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of leaving."""
        raise UsageError(message)


def flags() -> argparse.ArgumentParser:
    """Those of lm-evaluation-harness, under its names."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in ("--tasks", "--include_path", "--system_instruction", "--gen_kwargs", "--output_path"):
        parser.add_argument(name, default="")
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--apply_chat_template", action="store_true")
    parser.add_argument("--fewshot_as_multiturn", choices=("true", "false"), default="true", type=str.lower)
    parser.add_argument("--log_samples", action="store_true")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the tasks and returns the exit code.

    Args:
        argv: the command line, program name first.
    """
    given = argparse.Namespace()
    rest: list[str] = []

    def parse() -> None:
        rest.extend(flags().parse_known_args(argv[1:], namespace=given)[1])

    return cli.guarded(parse) or cli.execute(
        functools.partial(evaluate, given=given), [argv[0], *rest], description=__doc__ or "", default_config=DEFAULT
    )


def evaluate(config: Config, *, given: argparse.Namespace) -> None:
    """Opens the model, runs the tasks, prints the table and the cost, and writes the results."""
    if not given.tasks:
        raise UsageError("--tasks: expected the names of tasks, got none")
    if given.log_samples and not given.output_path:
        raise UsageError("--log_samples: expected --output_path with it, got none")
    if config.input.prompt:
        raise UsageError(f"input.prompt: expected none, as tasks have their own prompts, got {config.input.prompt!r}")
    cli.require("lm_eval", "math_verify", extra="eval")
    from lm_eval.utils import make_table

    from dllm_jax import hosts

    found = find(given.tasks.split(","), given.include_path, config)
    lm = open_model(config, chat=given.apply_chat_template)
    results = run(lm, config, *found, given=given)
    if not hosts.is_first():
        return
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    info = lm.get_model_info()
    if info["nfe_sum"]:
        print(
            f"{lm.texts} texts: {info['num_tokens']} tokens in {info['nfe_sum']} forwards, "
            f"{info['tokens_per_forward']:.2f} tokens per forward"
        )


def open_model(config: Config, *, chat: bool) -> "DiffusionLM":
    """The model of the configuration with all that decodes it.

    Args:
        config: all settings.
        chat: contexts will be chats.
    """
    from dllm_jax import opening
    from dllm_jax.decoding.policies.build import open_companions
    from dllm_jax.evals.harness.model import DiffusionLM
    from dllm_jax.placement import decode_mesh

    mesh = decode_mesh(config, prompt_length=config.decode.gen_length)
    companions = open_companions(config, mesh)
    model, codec, end_ids = opening.open_text_model(config, mesh)
    opening.check_tokens(model, companions, config=config, codec=codec)
    return DiffusionLM(model, config, codec=codec, end_ids=end_ids, companions=companions, chat=chat)


def run(
    lm: "DiffusionLM", config: Config, manager: "TaskManager", names: Sequence[str], *, given: argparse.Namespace
) -> dict[str, Any]:
    """Runs the tasks and writes the results.

    Args:
        lm: the model.
        config: all settings.
        manager: from `find`.
        names: likewise.
        given: the flags.

    Returns:
        What lm-evaluation-harness returns.

    Raises:
        UsageError: a task runs code that was not allowed.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    from dllm_jax import hosts

    tracker = EvaluationTracker(output_path=given.output_path or None) if hosts.is_first() else None
    shots = config.eval.shots if given.num_fewshot is None and config.eval.shots >= 0 else given.num_fewshot
    try:
        results: dict[str, Any] = simple_evaluate(
            model=lm,
            model_args=f"pretrained={Path(config.model.path).name}",  # the name of the folder of results
            tasks=list(names),
            task_manager=manager,
            num_fewshot=shots,
            limit=given.limit,
            log_samples=given.log_samples,
            evaluation_tracker=tracker,
            system_instruction=given.system_instruction or None,
            apply_chat_template=given.apply_chat_template,
            fewshot_as_multiturn=given.fewshot_as_multiturn == "true",
            gen_kwargs=given.gen_kwargs or None,
            torch_random_seed=None,
            confirm_run_unsafe_code=config.eval.run_code,
        )
    except ValueError as error:
        if "marked as unsafe" not in str(error):
            raise
        raise UsageError(
            "eval.run_code: expected true, as a task runs the code that the model writes, got false"
        ) from None
    if tracker and given.output_path:
        samples = results.pop("samples", None)
        tracker.save_results_aggregated(results=results, samples=samples)
        for name in results["configs"] if samples else ():
            tracker.save_results_samples(task_name=name, samples=samples[name])
    return results


def find(asked: Sequence[str], include_path: str, config: Config) -> tuple["TaskManager", list[str]]:
    """Looks tasks up: among ours and those of `include_path`, then among lm-evaluation-harness's, which takes a while.

    Args:
        asked: names, patterns of names, or yaml files.
        include_path: a folder of further tasks, or "".
        config: all settings.

    Returns:
        What loads them, and their names.

    Raises:
        UsageError: there is no such task, or it needs what is not allowed.
    """
    from lm_eval.tasks import TaskManager

    if include_path and not Path(include_path).is_dir():
        raise UsageError(f"--include_path: expected a folder, got {include_path!r}")
    about: dict[str, Any] = {"code_seconds": config.eval.code_seconds, "code_memory_mb": config.eval.code_memory_mb}
    if config.input.path:
        about["path"] = os.path.abspath(config.input.path)
    folders = [str(TASKS), *([include_path] if include_path else [])]
    for defaults in (False, True):
        manager = TaskManager(include_path=folders, include_defaults=defaults, metadata=about)
        found = {each: manager.match_tasks([each]) or ([each] if Path(each).is_file() else []) for each in asked}
        missing = [each for each, names in found.items() if not names]
        if not missing:
            break
    else:
        close = difflib.get_close_matches(missing[0], manager.all_tasks, n=1)
        hint = f"close to {close[0]}" if close else "see --help"
        raise UsageError(f"--tasks: expected names of tasks, got {missing[0]!r} ({hint})")
    names = [name for each in found.values() for name in each]
    local = [name for name in names if (TASKS / f"{name}.yaml").is_file()]
    for name in local:
        scorers.check_allowed(name.partition("_")[0], run_code=config.eval.run_code)
    if config.input.path and len(local) != 1:
        raise UsageError(f"input.path: expected one task of a local file to read it, got {', '.join(local) or 'none'}")
    return manager, names


if __name__ == "__main__":
    cli.leave(main(sys.argv))
