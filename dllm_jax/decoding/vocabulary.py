"""Whether two models mean the same by a token id, as APD's diffusion model and its verifier must."""

from collections.abc import Mapping

from dllm_jax.errors import UsageError
from dllm_jax.models.model import Model

ADVICE = "train/verifier.py trains one over the tokens of a model"


def check_shared(
    model: Model,
    verifier: Model,
    *,
    model_tokens: Mapping[str, int] | None,
    verifier_tokens: Mapping[str, int] | None,
) -> None:
    """Refuses a verifier over other tokens than the model's; a shorter vocabulary that begins alike is fine.

    Args:
        model: the diffusion model.
        verifier: the causal model.
        model_tokens: id of every token of the model's tokenizer; None without one.
        verifier_tokens: of the verifier's. Unless both are known only the sizes of the vocabularies are compared.

    Raises:
        UsageError: an id stands for two tokens, or the verifier has more of them than the model.
    """
    if model_tokens is None or verifier_tokens is None:
        ours, theirs = model.config.vocab_size, verifier.config.vocab_size
        if theirs > ours:
            raise UsageError(
                f"verifier.path: expected at most {ours} tokens, the model's vocabulary, got {theirs} ({ADVICE})"
            )
        return
    ours_by_id = {i: token for token, i in model_tokens.items()}
    theirs_by_id = {i: token for token, i in verifier_tokens.items()}
    for i in sorted(ours_by_id.keys() & theirs_by_id.keys()):
        if ours_by_id[i] != theirs_by_id[i]:
            raise UsageError(
                f"verifier.path: expected the tokens of model.path, got {theirs_by_id[i]!r} for id {i}, "
                f"which is {ours_by_id[i]!r} there ({ADVICE})"
            )
