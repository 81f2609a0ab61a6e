"""The attention of Tacotron and Tacotron 2 in coqui-tts."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import mismatch, records_lengths
from .plain import is_plain, masked_softmax, weigh
from .scoring import Rows, Scoring

_LAYERS = "TTS.tts.layers.tacotron"
_TANH_GAIN = nn.init.calculate_gain("tanh")


def _linear(in_features: int, out_features: int, bias: bool, gain: float) -> nn.Sequential:
    """A layer with the parameter names and the initialisation of coqui's ``Linear``."""
    layer = nn.Linear(in_features, out_features, bias)
    nn.init.xavier_uniform_(layer.weight, gain)
    return nn.Sequential(OrderedDict(linear_layer=layer))


class _LocationLayer(nn.Module):
    """Two rows of earlier weights, convolved and projected."""

    location_conv1d: nn.Conv1d
    location_dense: nn.Sequential

    def __init__(self, attention_dim: int, filters: int, kernel_size: int):
        super().__init__()
        self.location_conv1d = nn.Conv1d(
            2, filters, kernel_size, padding=(kernel_size - 1) // 2, bias=False
        )
        self.location_dense = _linear(filters, attention_dim, bias=False, gain=_TANH_GAIN)

    def features(self, attention_cat: Tensor) -> Tensor:
        """What is projected of weights ``[B, 2, Tk]``: ``[B, Tk, filters]``."""
        return self.location_conv1d(attention_cat).transpose(1, 2)

    def forward(self, attention_cat: Tensor) -> Tensor:
        return self.location_dense(self.features(attention_cat))


class CoquiOriginalAttention(Scoring):
    """``TTS.tts.layers.tacotron.attentions.OriginalAttention`` of coqui-tts.

    Parameters: ``query_layer``, ``inputs_layer``, ``v``, with ``trans_agent`` ``ta``, with
    ``location_attention`` ``location_layer``. As there, ``init_states`` is called before the steps
    of a batch, and the weights of the last step are ``attention_weights``. The options are
    attributes that may be changed; ``windowing`` and ``forward_attn_mask`` act in ``eval`` mode.
    With ``norm="softmax"`` the bias of ``v`` changes no weight; its gradient is exactly 0.

    Location-sensitive attention is of Shen et al. 2018, "Natural TTS Synthesis by Conditioning
    WaveNet on Mel Spectrogram Predictions"; forward attention of Zhang, Ling and Dai 2018, "Forward
    Attention in Sequence-to-sequence Acoustic Modelling for Speech Synthesis".
    """

    original = f"{_LAYERS}.attentions.OriginalAttention"
    package = "coqui-tts"
    tested = "0.28.0"
    sizes: ClassVar[tuple[str, ...]] = (
        "location_attention",
        "windowing",
        "norm",
        "forward_attn",
        "trans_agent",
        "forward_attn_mask",
    )
    layers: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[tuple[str, ...]] = ("attention_weights", "attention_weights_cum", "alpha", "u")
    alpha: Tensor | None  # [B, Tk], the weights of the step before, of forward attention
    u: Tensor | None  # [B, 1], its probability to move on
    query_layer: nn.Sequential
    inputs_layer: nn.Sequential
    v: nn.Sequential
    ta: nn.Linear
    location_layer: _LocationLayer
    windowing: bool
    norm: str
    forward_attn: bool
    trans_agent: bool
    forward_attn_mask: bool
    location_attention: bool
    win_back: int
    win_front: int

    def __init__(
        self,
        query_dim: int,
        embedding_dim: int,
        attention_dim: int,
        location_attention: bool,
        attention_location_n_filters: int,
        attention_location_kernel_size: int,
        windowing: bool,
        norm: str,
        forward_attn: bool,
        trans_agent: bool,
        forward_attn_mask: bool,
        *,
        backend: str | None = None,
    ):
        super().__init__(backend)
        self.query_layer = _linear(query_dim, attention_dim, bias=False, gain=_TANH_GAIN)
        self.inputs_layer = _linear(embedding_dim, attention_dim, bias=False, gain=_TANH_GAIN)
        self.v = _linear(attention_dim, 1, bias=True, gain=1)
        if trans_agent:
            self.ta = nn.Linear(query_dim + embedding_dim, 1)
        if location_attention:
            self.location_layer = _LocationLayer(
                attention_dim, attention_location_n_filters, attention_location_kernel_size
            )
        self.windowing, self.norm = windowing, norm
        self.forward_attn, self.trans_agent = forward_attn, trans_agent
        self.forward_attn_mask, self.location_attention = forward_attn_mask, location_attention
        self.win_idx: int | None = None
        self.attention_weights: Tensor | None = None
        self.attention_weights_cum: Tensor | None = None
        self.alpha = self.u = None

    @classmethod
    def _layers(cls, module: Any) -> Mapping[str, type[nn.Module] | str]:
        layers: dict[str, type[nn.Module] | str] = {}
        linear = ["query_layer", "inputs_layer", "v"]
        if hasattr(module, "location_layer"):
            layers["location_layer"] = f"{_LAYERS}.attentions.LocationLayer"
            layers["location_layer.location_conv1d"] = nn.Conv1d
            linear.append("location_layer.location_dense")
        for name in linear:
            layers[name] = f"{_LAYERS}.common_layers.Linear"
            layers[f"{name}.linear_layer"] = nn.Linear
        return {**layers, "ta": nn.Linear} if hasattr(module, "ta") else layers

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        query, inputs = module.query_layer.linear_layer, module.inputs_layer.linear_layer
        has_location = hasattr(module, "location_layer")
        conv = module.location_layer.location_conv1d if has_location else None
        return {
            **super()._arguments(module),
            "query_dim": query.in_features,
            "embedding_dim": inputs.in_features,
            "attention_dim": query.out_features,
            "attention_location_n_filters": conv.out_channels if conv else 0,
            "attention_location_kernel_size": conv.kernel_size[0] if conv else 0,
        }

    # ---- What the decoder calls before its steps ----

    def init_states(self, inputs: Tensor) -> None:
        """Begin a batch of encoder states ``(B, Tk, embedding_dim)``."""
        self._forget()
        self.attention_weights = self._zeros(inputs)
        if self.location_attention:
            self.init_location_attention(inputs)
        if self.forward_attn:
            self.init_forward_attn(inputs)
        if self.windowing:
            self.init_win_idx()

    def init_location_attention(self, inputs: Tensor) -> None:
        """Forget the sum of earlier weights."""
        self.attention_weights_cum = self._zeros(inputs)

    def init_forward_attn(self, inputs: Tensor) -> None:
        """Begin at the first encoder state."""
        first = torch.arange(inputs.size(1), device=inputs.device) == 0
        self.alpha = torch.where(first, 1, self._zeros(inputs) + 1e-7)
        self.u = torch.full_like(self.alpha[:, :1], 0.5)

    def init_win_idx(self) -> None:
        """Begin with the window at the first encoder state."""
        self.win_idx, self.win_back, self.win_front = -1, 2, 6

    def preprocess_inputs(self, inputs: Tensor) -> Tensor:
        """Encoder states projected for the steps, ``(B, Tk, attention_dim)``."""
        return self.inputs_layer(inputs)

    @staticmethod
    def _zeros(inputs: Tensor) -> Tensor:
        """No weights yet. Sums of weights are at least float32."""
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        return torch.zeros(inputs.shape[:2], dtype=dtype, device=inputs.device)

    # ---- A step ----

    def forward(
        self, query: Tensor, inputs: Tensor, processed_inputs: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attend with one query a sequence.

        Args:
            query: ``(B, query_dim)``.
            inputs: ``(B, Tk, embedding_dim)``.
            processed_inputs: ``(B, Tk, attention_dim)``, from :meth:`preprocess_inputs`.
            mask: ``(B, Tk)`` bool, True = real, or None.

        Returns:
            The context ``(B, embedding_dim)``.
        """
        if self.norm not in ("softmax", "sigmoid"):
            raise mismatch("norm", "'softmax' or 'sigmoid'", repr(self.norm))
        if self.attention_weights is None:
            raise RuntimeError("init_states must be called before the first step")
        rows = Rows(processed_inputs, inputs, self.v, mask=mask)
        features = None
        if self.location_attention:
            rows, features = self._with_location(rows)
        step = self._step(rows, self.query_layer(query), features)
        windowed = self.windowing and not self.training
        if self.norm == "softmax" and not (windowed or self.forward_attn):
            context, weights = step.attend()
            self._add_weights(weights)
        else:
            scores = step.scores(biased=self.norm == "sigmoid")
            if windowed:
                scores = self._window(scores)
            if self.norm == "softmax":
                weights = masked_softmax(scores, scores.isneginf())
            else:
                weights = _shares(scores.sigmoid())
            self._add_weights(weights)
            if self.forward_attn:
                weights = self.alpha = self._move_forward(weights)
            context = weigh(weights, inputs)
        self.attention_weights = weights
        if self.forward_attn and self.trans_agent:
            self.u = torch.sigmoid(self.ta(torch.cat([context, query], -1)))
        return context

    def _with_location(self, rows: Rows) -> tuple[Rows, Tensor | None]:
        """With the term of where earlier steps attended."""
        assert self.attention_weights is not None and self.attention_weights_cum is not None
        earlier = torch.stack((self.attention_weights, self.attention_weights_cum), 1)
        earlier, layer = earlier.to(rows.values.dtype), self.location_layer
        if is_plain(layer, _LocationLayer):
            return rows._replace(feature_layer=layer.location_dense), layer.features(earlier)
        return rows._replace(keys=rows.keys + layer(earlier)), None

    def _add_weights(self, weights: Tensor) -> None:
        if self.location_attention:
            assert self.attention_weights_cum is not None
            self.attention_weights_cum = self.attention_weights_cum + weights

    def _window(self, scores: Tensor) -> Tensor:
        """Scores of a few keys around the best one of the step before, -inf elsewhere.

        As in the original, the first sequence of a batch moves the window of all.
        """
        if records_lengths():
            expected = "False while a graph is recorded, in which the window would be a constant"
            raise mismatch("windowing", expected, "True")
        assert self.win_idx is not None
        places = torch.arange(scores.size(1), device=scores.device)
        first, end = self.win_idx - self.win_back, self.win_idx + self.win_front
        scores = scores.masked_fill((places < first) | (places >= end), -torch.inf)
        if self.win_idx == -1:  # no step has been: the first key is made the best
            best = scores.max().expand(len(scores), 1)
            scores = torch.cat((best, scores[:, 1:]), 1)
        self.win_idx = int(scores[0].argmax())
        return scores

    def _move_forward(self, weights: Tensor) -> Tensor:
        """Forward attention's weights: each key's mass has stayed there or come from the left."""
        assert self.alpha is not None and self.u is not None
        before = nn.functional.pad(self.alpha[:, :-1], (1, 0))  # moved on by one
        alpha = ((1 - self.u) * self.alpha + self.u * before + 1e-8) * weights
        if self.forward_attn_mask and not self.training:
            alpha = _keep_near(alpha, before.argmax(1, keepdim=True))
        return _shares(alpha)


def _keep_near(alpha: Tensor, place: Tensor) -> Tensor:
    """Weights ``[B, Tk]`` near ``place`` ``[B, 1]`` alone, with a little of the best just before.

    The original cuts by Python's slices, whose negative bounds count from the end: just before the
    places 0 and 1 are the last two keys, and of more than 3 keys place 0 keeps none beside.
    """
    end = alpha.size(1)
    places = torch.arange(end, device=alpha.device)
    first = torch.where(place > 0, place - 1, end - 1)
    best = alpha.amax(1, keepdim=True)
    alpha = alpha.masked_fill((places < first) | (places >= place + 3), 0)
    return alpha.scatter(1, (place - 2) % end, 0.01 * best)


def _shares(weights: Tensor) -> Tensor:
    """Weights ``[B, Tk]`` that sum up to 1, or are all 0."""
    total = weights.sum(1, keepdim=True)
    return weights / total.where(total != 0, 1)
