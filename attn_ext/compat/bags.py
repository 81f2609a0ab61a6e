"""Scores of the rows of bags, shared by the replacements for multiple-instance learning."""

from torch import Tensor, nn

from ..functional import additive_scores
from .plain import is_plain


def scores_of_rows(
    key: Tensor,
    score_weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    feature_dropout_p: float | tuple[float, float] = 0.0,
    backend: str | None = None,
) -> Tensor:
    """``(tanh(key) * sigmoid(gate)) @ score_weight.T + bias``, storing nothing between.

    Args:
        key: ``(..., D)``, the rows of whatever bags.
        score_weight: ``(K, D)``, and bias ``(K,)``, as of an ``nn.Linear``.
        gate: as key, or None for no gate.
        feature_dropout_p: as :func:`attn_ext.additive_pool`.
        backend: as :func:`attn_ext.additive_attention`.

    Returns:
        ``(..., K)``, in key's dtype.
    """
    scores = additive_scores(
        None,
        key.reshape(1, -1, key.size(-1)),
        score_weight,
        gate=None if gate is None else gate.reshape(1, -1, gate.size(-1)),
        feature_dropout_p=feature_dropout_p,
        backend=backend,
    )
    scores = scores.squeeze(0).t().to(key.dtype)  # [rows, K]
    if bias is not None:
        scores = scores + bias.to(key.dtype)
    return scores.reshape(*key.shape[:-1], scores.size(-1))


def are_plain(layers: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a Sequential is plain, and its layers after the first, which is called, are, too."""
    if not is_plain(layers, nn.Sequential) or len(layers) != 1 + len(kinds):  # type: ignore[arg-type]
        return False
    return all(map(is_plain, list(layers)[1:], kinds))  # type: ignore[call-overload]
