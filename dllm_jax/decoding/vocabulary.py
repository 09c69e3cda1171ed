"""Whether two models mean the same by a token id, as a diffusion model and a companion that reads its tokens must."""

from collections.abc import Mapping

from dllm_jax.errors import UsageError
from dllm_jax.models.model import Model


def check_shared(
    model: Model,
    other: Model,
    *,
    model_tokens: Mapping[str, int] | None,
    tokens: Mapping[str, int] | None,
    field: str,
    advice: str,
) -> None:
    """Refuses a model over other tokens than the diffusion model's; a shorter vocabulary that begins alike is fine.

    Args:
        model: the diffusion model.
        other: the one beside it.
        model_tokens: id of every token of the model's tokenizer; None without one.
        tokens: of the other's. Unless both are known only the sizes of the vocabularies are compared.
        field: the setting that names the other, for the error.
        advice: where to get a better one, for the error.

    Raises:
        UsageError: an id stands for two tokens, or the other model has more of them.
    """
    if model_tokens is None or tokens is None:
        ours, theirs = model.config.vocab_size, other.config.vocab_size
        if theirs > ours:
            raise UsageError(
                f"{field}: expected at most {ours} tokens, the model's vocabulary, got {theirs} ({advice})"
            )
        return
    ours_by_id = {i: token for token, i in model_tokens.items()}
    theirs_by_id = {i: token for token, i in tokens.items()}
    for i in sorted(ours_by_id.keys() & theirs_by_id.keys()):
        if ours_by_id[i] != theirs_by_id[i]:
            raise UsageError(
                f"{field}: expected the tokens of model.path, got {theirs_by_id[i]!r} for id {i}, "
                f"which is {ours_by_id[i]!r} there ({advice})"
            )
