"""The training loop: steps, metrics, measurements, checkpoints; continues where an interrupted run stopped."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import grain

from dllm_jax.checkpoints.store import TrainingCheckpoints
from dllm_jax.errors import Stopped
from dllm_jax.stops import on_sigterm
from dllm_jax.training.report import Reporter
from dllm_jax.training.run import RunFolder
from dllm_jax.training.trainer import Trainer, TrainState

Evaluate = Callable[[TrainState], Mapping[str, float]]


def fit(
    trainer: Trainer,
    batches: grain.DatasetIterator[Any],
    *,
    run: RunFolder,
    evaluate: Evaluate,
    first: Callable[[], TrainState],
) -> tuple[TrainState, Mapping[str, float]]:
    """Trains to the last step.

    An interrupted run that is started again ends with the same parameters, bit for bit, as if it had not been: a
    checkpoint holds the whole state of the training and the place in the data, and nothing else decides a step. After
    SIGTERM the step that runs is finished, and a checkpoint written of it. One is written before every measurement as
    well; a measurement that was cut off is made when the run continues.

    Args:
        trainer: model, optimizer and settings.
        batches: training data from the beginning, with `num_tokens`; moved to its place if the run continues.
        run: the folder of checkpoints and metrics.
        evaluate: measurements on held-out data, made every `train.eval_every` steps and at the end.
        first: makes the state before the first step.

    Returns:
        The last state and the last measurements.

    Raises:
        Stopped: the process was asked to end.
    """
    settings = trainer.settings

    def is_due(step: int) -> bool:
        """Whether a step is followed by a measurement; the last one is measured in any case."""
        return step % settings.eval_every == 0 and step < settings.steps

    with contextlib.closing(TrainingCheckpoints(run.checkpoints)) as checkpoints, on_sigterm() as stop:
        start = checkpoints.latest() or 0
        if start:
            state, place = checkpoints.restore(trainer.abstract)
            batches.set_state(place)
        else:
            state = first()
        del first  # with the weights that it may hold
        with Reporter(run.folder, start=start, steps=settings.steps) as report:
            if start and is_due(start) and not report.has_measured:
                report.held_out(start, evaluate(state))
            for step in range(start + 1, settings.steps + 1):
                batch = next(batches)
                state, metrics = trainer.step(state, batch)
                report.step(metrics, tokens=batch.num_tokens)
                last = step == settings.steps
                stopping = stop() and not last
                measure = is_due(step) and not stopping
                if step % settings.log_every == 0 or measure or last or stopping:
                    report.training(step, learning_rate=float(trainer.schedule(step - 1)))
                if step % settings.checkpoint_every == 0 or measure or last or stopping:
                    checkpoints.save(step, state, iterator=batches.get_state())
                if stopping:
                    raise Stopped(
                        f"stopped after step {step} of {settings.steps}; start the same command again to go on"
                    )
                if measure:
                    report.held_out(step, evaluate(state))
            measured = evaluate(state)
            report.held_out(settings.steps, measured)
    return state, measured
