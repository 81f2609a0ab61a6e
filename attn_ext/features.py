"""One more additive term of scores, ``e_j = w . tanh(q + k_j + f_j U)``, for every backend.

The term is added to the keys, which the kernels then see as any others. Of location-sensitive
attention (Chorowski et al. 2015, "Attention-Based Models for Speech Recognition") the features f
are convolutions of earlier weights; of coverage (See, Liu and Manning 2017, "Get To The Point"),
their sum.
"""

from typing import Any

import torch
from torch import Tensor

from . import autograd
from .checks import check_beside_key, mismatch, runs_eagerly, shape_of, without_autocast
from .layout import RAW, KeySide, QuerySide, row_text
from .nested import without_nesting
from .ops import GRADS


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
    rows = key.reshape(-1, weight.size(1))
    with without_autocast(key.device.type):
        return torch.addmm(rows, features.flatten(0, 1), weight, out=out).view(key.shape)


def with_features(
    keys: KeySide,
    features: Tensor | None,
    feature_weight: Tensor | None,
    queries: QuerySide,
    backend: str,
) -> KeySide:
    """Keys with what features add to them, where both arguments are given."""
    if features is None and feature_weight is None:
        return keys
    if features is None or feature_weight is None:
        missing, given = "features", "feature_weight"
        if features is not None:
            missing, given = given, missing
        raise mismatch(missing, f"a tensor beside {given}", "None")
    weight = check_feature_weight(feature_weight, keys)
    return with_term(keys, check_features(features, weight, keys, queries), weight, backend)


def with_term(keys: KeySide, features: Tensor, feature_weight: Tensor, backend: str) -> KeySide:
    """Keys with the term in them, or beside them where :func:`attend_with_term` is to add it."""
    # The reference may be differentiated twice.
    if backend == "reference" or not torch.is_grad_enabled() or not runs_eagerly():
        return keys.with_key(shifted_keys(keys.key, features, feature_weight))
    return keys._replace(
        features=features, feature_weight=feature_weight, exp_key=None, key_bound=None
    )


def attend_with_term(**arguments: Any) -> tuple[Tensor, Tensor]:
    """Context and weights of the forward op, of keys that have their term beside them."""
    return _AttendWithTerm.apply(*(arguments.pop(name) for name in _INPUTS), arguments)


_INPUTS = ("query", "key", "value", "score_weight", "features", "feature_weight")
_OTHER_TENSORS = ("cu_seqlens_k", "key_lengths", "key_padding_mask", "dropout_seed")


class _AttendWithTerm(torch.autograd.Function):
    """Keeps for backward key, features and feature_weight, not their sum, of the size of key."""

    @staticmethod
    def forward(ctx, query, key, value, score_weight, features, feature_weight, options):
        keep_scores = any(ctx.needs_input_grad) and not options["weights_layout"] & RAW
        options = options | {"keep_scores": keep_scores}
        context, weights, *kept = autograd.forward(
            **options,
            query=query,
            key=shifted_keys(key, features, feature_weight),
            value=value,
            score_weight=score_weight,
        )
        others = [options.pop(name) for name in _OTHER_TENSORS]
        ctx.save_for_backward(
            query, key, value, score_weight, features, feature_weight, *kept, *others
        )
        ctx.options = options
        ctx.set_materialize_grads(False)
        return context, weights

    @staticmethod
    def backward(ctx, dcontext, dweights):
        if dcontext is None and dweights is None:
            return (None,) * 7
        query, key, value, score_weight, features, feature_weight, *more = ctx.saved_tensors
        stats, scores, *others = more
        wanted = dict(zip(_INPUTS, ctx.needs_input_grad))
        mask = sum(GRADS[name] for name in _INPUTS[:4] if wanted[name])
        if wanted["features"] or wanted["feature_weight"]:
            mask |= GRADS["key"]
        dquery, dkey, dvalue, dscore_weight = autograd.backward(
            **ctx.options,
            **dict(zip(_OTHER_TENSORS, others)),
            dcontext=dcontext,
            dweights=dweights if ctx.options["weights_layout"] else None,
            query=query,
            key=shifted_keys(key, features, feature_weight),
            value=value,
            score_weight=score_weight,
            stats=stats,
            scores=scores,
            grad_mask=mask,
        )
        dfeatures, dfeature_weight = None, None
        if wanted["features"]:
            dfeatures = features_gradient(dkey, features, feature_weight)
        if wanted["feature_weight"]:
            dfeature_weight = feature_weight_gradient(dkey, features).view_as(feature_weight)
            dfeature_weight = dfeature_weight.to(feature_weight.dtype)
        gradients = (dquery, dkey, dvalue, dscore_weight, dfeatures, dfeature_weight)
        return *(g if needed else None for g, needed in zip(gradients, wanted.values())), None


def features_gradient(dkey: Tensor, features: Tensor, feature_weight: Tensor) -> Tensor:
    """Of the features of a term, given that of the keys that it is in."""
    weight = feature_weight.to(dkey.dtype).flatten(1)  # [F, H * D]
    with without_autocast(dkey.device.type):
        return (_rows(dkey, weight.size(1)) @ weight.t()).view(features.shape)


def feature_weight_gradient(dkey: Tensor, features: Tensor) -> Tensor:
    """Of the feature weight as ``[F, H * D]``."""
    with without_autocast(dkey.device.type):
        return _rows(features, features.size(2)).t() @ _rows(dkey, dkey.size(2) * dkey.size(3))


def _rows(tensor: Tensor, width: int) -> Tensor:
    """``[Bk * Nk, width]``; vmap of a backward pass knows no flatten()."""
    return tensor.reshape(tensor.size(0) * tensor.size(1), width)
