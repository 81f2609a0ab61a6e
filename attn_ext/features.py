"""One more additive term of scores, ``e_j = w . tanh(q + k_j + f_j U)``, for every backend.

The term is added to the keys, which the kernels then see as any others. Of location-sensitive
attention (Chorowski et al. 2015, "Attention-Based Models for Speech Recognition") the features f
are convolutions of earlier weights; of coverage (See, Liu and Manning 2017, "Get To The Point"),
their sum.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import check_beside_key, mismatch, runs_eagerly, shape_of
from .layout import KeySide, QuerySide, row_text
from .nested import without_nesting


def check_feature_weight(feature_weight: Tensor, keys: KeySide) -> Tensor:
    """Check ``(F, D)`` or ``(F, H, D)``; returns ``[F, H, D]``."""
    check_beside_key("feature_weight", feature_weight, keys.key)
    row = keys.key.shape[2 if keys.has_heads else 3 :]
    if feature_weight.dim() != 1 + len(row) or feature_weight.shape[1:] != row:
        expected = f"shape (F, {row_text(keys.has_heads)}), {tuple(row)} after F as in key"
        raise mismatch("feature_weight", expected, shape_of(feature_weight))
    return feature_weight if keys.has_heads else feature_weight.unsqueeze(1)


def check_features(
    features: Tensor, feature_weight: Tensor, keys: KeySide, queries: QuerySide
) -> Tensor:
    """Check ``(B, Tk, F)``, ``(total_k, F)`` or nested; returns ``[Bk, Nk, F]``, 0 if ignored."""
    if not queries.is_one_step:
        expected = f"None unless query is (B, {row_text(keys.has_heads)}), one query a sequence"
        raise mismatch("features", expected, f"a {type(features).__name__}")
    features = keys.checked("features", without_nesting("features", features, keys.cu_seqlens_k))
    jagged = keys.cu_seqlens_k is not None
    shape = (*keys.key.shape[1 if jagged else 0 : 2], feature_weight.size(0))
    if features.shape != shape:
        expected = f"shape {shape} = ({'total_k' if jagged else 'B, Tk'}, F)"
        raise mismatch("features", expected, shape_of(features))
    if jagged:
        features = features.unsqueeze(0)
    ignored = keys.ignored()  # may hold NaN, which no gradient of 0 would stop
    return features if ignored is None else features.masked_fill(ignored.unsqueeze(2), 0)


def shifted_keys(
    key: Tensor, features: Tensor, feature_weight: Tensor, out: Tensor | None = None
) -> Tensor:
    """``key + features @ feature_weight``, rounded once."""
    weight = feature_weight.to(key.dtype).flatten(1)  # [F, H * D]
    if out is not None:
        out = out.view(-1, weight.size(1))
    rows = torch.addmm(key.reshape(-1, weight.size(1)), features.flatten(0, 1), weight, out=out)
    return rows.view(key.shape)


def with_features(
    keys: KeySide,
    features: Tensor | None,
    feature_weight: Tensor | None,
    queries: QuerySide,
    backend: str,
) -> contextlib.AbstractContextManager[KeySide]:
    """Keys with what features add to them, where both arguments are given."""
    if features is None and feature_weight is None:
        return contextlib.nullcontext(keys)
    if features is None or feature_weight is None:
        missing, given = "features", "feature_weight"
        if features is not None:
            missing, given = given, missing
        raise mismatch(missing, f"a tensor beside {given}", "None")
    weight = check_feature_weight(feature_weight, keys)
    return added_to_keys(keys, check_features(features, weight, keys, queries), weight, backend)


@contextlib.contextmanager
def added_to_keys(
    keys: KeySide, features: Tensor, feature_weight: Tensor, backend: str
) -> Iterator[KeySide]:
    """Keys with the term in them. Attention keeps for backward what they were made of, not them."""
    shifted = shifted_keys(keys.key, features, feature_weight)
    with_term = keys.with_key(shifted)
    # The reference may be differentiated twice.
    if backend == "reference" or not torch.is_grad_enabled() or not runs_eagerly():
        yield with_term
        return
    parts = {"key": keys.key, "features": features, "feature_weight": feature_weight}
    parts = {name: tensor.detach() for name, tensor in parts.items()}
    versions = {name: t._version for name, t in parts.items() if not t.is_inference()}
    place = shifted.data_ptr(), shifted.shape

    def leave_out(saved: Tensor) -> Tensor | None:
        return None if (saved.data_ptr(), saved.shape) == place else saved

    def make_again(saved: Tensor | None) -> Tensor:
        if saved is not None:
            return saved
        for name, version in versions.items():
            if parts[name]._version != version:
                message = f"attn_ext: {name} was modified in place before the backward pass"
                raise RuntimeError(message)
        with torch.no_grad():
            return shifted_keys(*parts.values())

    with torch.autograd.graph.saved_tensors_hooks(leave_out, make_again):
        yield with_term
