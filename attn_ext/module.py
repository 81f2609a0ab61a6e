"""Additive attention as a module that holds its projections."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import layout
from .checks import (
    check_count,
    check_probability,
    check_tensor,
    mismatch,
    shape_of,
    wrong_type,
)
from .functional import additive_attention
from .layout import QuerySide
from .memory import AttentionMemory

_SHARDING = "with FSDP call memory() and attend() within the forward of what is sharded"


class AdditiveAttention(nn.Module):
    """Additive attention with learned projections of query and key.

    ``e_ij = w . tanh(W_q query_i + W_k key_j)`` (Bahdanau et al. 2015). With ``normalize`` the
    score is ``g * v / |v| . tanh(W_q query_i + W_k key_j + b)``, the weight-normalised form of GNMT
    (Wu et al. 2016; Salimans and Kingma 2016).

    What ignored rows hold, padding or rows past the last offset, NaN too, changes no result and no
    gradient; but those past the last offset of a nested tensor reach the projections.

    Args:
        query_dim: features of a query.
        key_dim: features of a key.
        attn_dim: features of the projections, all heads together.
        num_heads: heads; divides ``attn_dim`` and the features of a value.
        bias: whether the projections have biases.
        normalize: normalise the score weight, with a gain ``g`` and a bias ``b``.
        dropout: probability to drop an attention weight in training.

    Attributes:
        query_proj, key_proj: ``nn.Linear`` to ``attn_dim``.
        score_weight: ``(attn_dim,)``, or ``(num_heads, attn_dim // num_heads)``.
        g: gain, ``()``, or ``(num_heads,)``; None without ``normalize``.
        b: bias, shaped as score_weight; None without ``normalize``.
    """

    num_heads: int
    dropout: float
    query_proj: nn.Linear
    key_proj: nn.Linear
    score_weight: nn.Parameter
    g: nn.Parameter | None
    b: nn.Parameter | None

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attn_dim: int,
        *,
        num_heads: int = 1,
        bias: bool = False,
        normalize: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        for name, size in (("query_dim", query_dim), ("key_dim", key_dim), ("attn_dim", attn_dim)):
            check_count(name, size, 1)
        if attn_dim % check_count("num_heads", num_heads, 1):
            raise mismatch("num_heads", f"a divisor of attn_dim = {attn_dim}", str(num_heads))
        self.num_heads = num_heads
        self.dropout = check_probability("dropout", dropout)
        self.query_proj = nn.Linear(query_dim, attn_dim, bias=bias)
        self.key_proj = nn.Linear(key_dim, attn_dim, bias=bias)
        shape = (attn_dim,) if num_heads == 1 else (num_heads, attn_dim // num_heads)
        self.score_weight = nn.Parameter(torch.empty(shape))
        self.g = nn.Parameter(torch.empty(shape[:-1])) if normalize else None
        self.b = nn.Parameter(torch.empty(shape)) if normalize else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.query_proj.reset_parameters()
        self.key_proj.reset_parameters()
        bound = self.score_weight.size(-1) ** -0.5
        nn.init.uniform_(self.score_weight, -bound, bound)
        if self.g is not None and self.b is not None:
            nn.init.constant_(self.g, bound)
            nn.init.zeros_(self.b)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, normalize={self.g is not None}, dropout={self.dropout}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        key_padding_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        need_weights: bool = False,
        deterministic: bool | None = None,
        backend: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Project query and key and attend.

        Args:
            query: ``query_dim`` wide, in a layout of :func:`attn_ext.additive_attention` without
                heads.
            key: likewise, ``key_dim`` wide.
            value: as key, any width that ``num_heads`` divides; None takes key.
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_padding_mask, key_lengths,
                need_weights, deterministic, backend: as :func:`attn_ext.additive_attention`.

        Returns:
            The context, as wide as value, and with ``need_weights`` the weights (with an H axis
            when ``num_heads`` > 1).

        Raises:
            TypeError, ValueError: as :func:`attn_ext.additive_attention`.
        """
        query = layout.clear_ignored("query", query, cu_seqlens_q)
        key = layout.clear_ignored("key", key, cu_seqlens_k, key_lengths, key_padding_mask)
        result = additive_attention(
            self._project_query(query),
            self._project_key(key),
            self._split(key if value is None else value),
            self._normed_score_weight(),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            key_padding_mask=key_padding_mask,
            key_lengths=key_lengths,
            dropout_p=self.dropout if self.training else 0.0,
            need_weights=need_weights,
            deterministic=deterministic,
            backend=backend,
        )
        return self._join_context(result)

    def memory(
        self,
        key: Tensor,
        value: Tensor | None = None,
        *,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
        key_padding_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        deterministic: bool | None = None,
        backend: str | None = None,
    ) -> AttentionMemory:
        """Prepare keys and values once for a decoder that attends step by step.

        Whether attention weights are dropped is decided here, by ``self.training``.

        Args:
            key, value, cu_seqlens_k, max_seqlen_k, key_padding_mask, key_lengths, deterministic,
                backend: as :meth:`forward`.

        Returns:
            An :class:`attn_ext.AttentionMemory` whose ``attend`` and ``scores`` take unprojected
            queries, ``(B, query_dim)`` or ``(B, n, query_dim)``.

        Raises:
            TypeError, ValueError: as :func:`attn_ext.additive_attention`; also a ValueError for
                backward hooks of the module and for pre-hooks that return other arguments.

        Forward pre-hooks of the module, such as those of ``torch.nn.utils`` that norm or prune a
        parameter, run here, once, with this method's arguments. Forward hooks run in each
        ``attend``, with its query and what it returns. Where ``fully_shard`` was called with the
        module itself, its parameters are gathered here and for the query of each step.
        """
        options: dict[str, Any] = {
            "cu_seqlens_k": cu_seqlens_k,
            "max_seqlen_k": max_seqlen_k,
            "key_padding_mask": key_padding_mask,
            "key_lengths": key_lengths,
            "deterministic": deterministic,
            "backend": backend,
        }
        keys = _gathering(self, "_key_side")(key, value, options)
        dropout_p = self.dropout if self.training else 0.0
        return _ProjectingMemory(self, *keys, dropout_p=dropout_p, **options)

    def _key_side(
        self, key: Tensor, value: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a memory is made of: projected key, value and score weight."""
        self._run_pre_hooks((key, value), options)
        offsets, lengths, mask = (
            options[name] for name in ("cu_seqlens_k", "key_lengths", "key_padding_mask")
        )
        key = layout.clear_ignored("key", key, offsets, lengths, mask)
        score_weight = self._normed_score_weight()
        if _is_sharded(self):
            score_weight = score_weight.clone()  # FSDP frees what it gathered
        return self._project_key(key), self._split(key if value is None else value), score_weight

    def _step_query(self, query: Tensor) -> Tensor:
        """The projected query of a memory's step: apart from forward, around which FSDP gathers."""
        return self._project_query(query)

    def _run_pre_hooks(self, arguments: tuple, keywords: dict[str, Any]) -> None:
        """As a call of the module does; refuse hooks that only a call could honour."""
        backward = (*self._backward_pre_hooks.values(), *self._backward_hooks.values())
        if backward:
            got = f"{_names(backward)}, which only a call of the module runs"
            raise mismatch("memory", "a module without backward hooks", got)
        for number, hook in self._forward_pre_hooks.items():
            if _is_of_fsdp(hook):
                continue
            if number in self._forward_pre_hooks_with_kwargs:
                result = hook(self, arguments, keywords)
            else:
                result = hook(self, arguments)
            if result is not None:
                got = f"{_names([hook])}, which returns others"
                raise mismatch("memory", "forward pre-hooks that leave arguments as they are", got)

    def _run_forward_hooks(self, query: Tensor, keywords: dict[str, Any], result: Any) -> Any:
        """As a call of the module does; a hook may return another result."""
        for number, hook in self._forward_hooks.items():
            if _is_of_fsdp(hook):
                continue
            if number in self._forward_hooks_with_kwargs:
                other = hook(self, (query,), keywords, result)
            else:
                other = hook(self, (query,), result)
            result = result if other is None else other
        return result

    def _project_query(self, query: Tensor) -> Tensor:
        projected = self._split(_project("query", query, self.query_proj))
        return projected if self.b is None else projected + self.b

    def _project_key(self, key: Tensor) -> Tensor:
        return self._split(_project("key", key, self.key_proj))

    def _normed_score_weight(self) -> Tensor:
        if self.g is None:
            return self.score_weight
        return nn.functional.normalize(self.score_weight, dim=-1) * self.g.unsqueeze(-1)

    def _split(self, features: Tensor) -> Tensor:
        if self.num_heads == 1:
            return features
        check_tensor("value", features)
        if features.dim() == 0 or features.size(-1) % self.num_heads:
            expected = f"features that num_heads = {self.num_heads} divides"
            got = str(features.size(-1)) if features.dim() else "shape ()"
            raise mismatch("value", expected, got)
        if torch.jit.is_tracing():  # ONNX's exporter of traces makes constants of sizes elsewhere
            return features.reshape(*features.shape[:-1], self.num_heads, -1)
        return features.unflatten(-1, (self.num_heads, -1))

    def _join_context(self, result: Tensor | tuple[Tensor, Tensor]):
        if self.num_heads == 1:
            return result
        if isinstance(result, tuple):
            context, weights = result
            return self._join_context(context), weights
        if torch.jit.is_tracing():  # as in _split
            return result.reshape(*result.shape[:-2], -1)
        return result.flatten(-2)


def _project(name: str, tensor: Tensor, projection: nn.Linear) -> Tensor:
    """``projection(tensor)``, whose errors name the argument."""
    check_tensor(name, tensor)
    features = getattr(projection, "in_features", None)  # an adapter around it may have none
    if features is not None and (tensor.dim() == 0 or tensor.size(-1) != features):
        raise mismatch(name, f"{features} features in its last axis", f"shape {shape_of(tensor)}")
    try:
        return projection(tensor)
    except RuntimeError as error:  # checked first, hooks that cast or move would be for nothing
        weight = getattr(projection, "weight", None)
        if type(weight).__name__ == "DTensor" and type(tensor).__name__ != "DTensor":
            got = f"a shard, out of the forward that gathers it; {_SHARDING}"
            raise mismatch(f"{name}_proj.weight", "a whole parameter", got) from error
        if isinstance(weight, Tensor) and tensor.device != weight.device:
            expected = f"device {weight.device}, as {name}_proj"
            raise mismatch(name, expected, str(tensor.device)) from error
        if isinstance(weight, Tensor) and tensor.dtype != weight.dtype:
            raise wrong_type(name, f"dtype {weight.dtype}, as {name}_proj", tensor.dtype) from error
        raise


def _is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called with the module itself."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _gathering(module: nn.Module, method: str) -> Callable[..., Any]:
    """The method, around which FSDP gathers the parameters of a module that it has sharded.

    Also around its backward: what it returns must be tensors, on whose gradients FSDP waits.
    """
    if _is_sharded(module) and method not in vars(module):
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(module, method)
    return getattr(module, method)


def _is_of_fsdp(hook: Any) -> bool:
    """Whether it is one of those that gather and free parameters; see :func:`_gathering`."""
    return type(getattr(hook, "__self__", None)).__name__ == "FSDPState"


def _names(hooks: Iterable[Any]) -> str:
    return ", ".join(getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks)


class _ProjectingMemory(AttentionMemory):
    """An attention memory whose queries pass through the module's projection."""

    def __init__(self, module: AdditiveAttention, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self._module = module

    def _check_query(self, query: Tensor) -> QuerySide:
        return super()._check_query(_gathering(self._module, "_step_query")(query))

    def attend(  # type: ignore[override]  # the overloads are inherited
        self, query: Tensor, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Project the query and attend: see :class:`AttentionMemory`."""
        result = self._module._join_context(super().attend(query, **options))
        return self._module._run_forward_hooks(query, options, result)
