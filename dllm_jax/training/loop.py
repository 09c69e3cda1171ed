"""The training loop: steps, metrics, measurements, checkpoints; continues where an interrupted run stopped."""

from collections.abc import Callable, Mapping

import grain

from dllm_jax.checkpoints.store import TrainingCheckpoints
from dllm_jax.data.packing import Batch
from dllm_jax.training.report import Reporter
from dllm_jax.training.run import RunFolder
from dllm_jax.training.trainer import Trainer, TrainState

Evaluate = Callable[[TrainState], Mapping[str, float]]


def fit(
    trainer: Trainer, batches: grain.DatasetIterator[Batch], *, run: RunFolder, evaluate: Evaluate
) -> tuple[TrainState, Mapping[str, float]]:
    """Trains to the last step.

    An interrupted run that is started again ends with the same parameters, bit for bit, as if it had not been: a
    checkpoint holds the whole state of the training and the place in the data, and nothing else decides a step.

    Args:
        trainer: model, optimizer and settings.
        batches: training data from the beginning; moved to its place if the run continues.
        run: the folder of checkpoints and metrics.
        evaluate: measurements on held-out data, made every `train.eval_every` steps and at the end.

    Returns:
        The last state and the last measurements.
    """
    settings = trainer.settings
    checkpoints = TrainingCheckpoints(run.checkpoints)
    start = checkpoints.latest() or 0
    if start:
        state, place = checkpoints.restore(trainer.abstract)
        batches.set_state(place)
    else:
        state = trainer.init()
    with Reporter(run.folder, start=start, steps=settings.steps) as report:
        for step in range(start + 1, settings.steps + 1):
            batch = next(batches)
            state, metrics = trainer.step(state, batch)
            report.step(metrics, tokens=int((batch.segments_BT > 0).sum()))
            last = step == settings.steps
            measure = step % settings.eval_every == 0 and not last
            if step % settings.log_every == 0 or measure or last:
                report.training(step, learning_rate=float(trainer.schedule(step - 1)))
            if measure:
                report.held_out(step, evaluate(state))
            if step % settings.checkpoint_every == 0 or last:
                checkpoints.save(step, state, iterator=batches.get_state())
        measured = evaluate(state)
        report.held_out(settings.steps, measured)
    checkpoints.close()
    return state, measured
