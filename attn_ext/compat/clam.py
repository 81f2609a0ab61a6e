"""CLAM's attention networks, classes that are copied from repository to repository."""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import mismatch
from .bags import are_plain, scores_of_rows
from .plain import original_class_name, readable_weight, warn_of_calls
from .replacement import Replacement

_DROPOUT = 0.25  # CLAM's, whatever number its constructors are given
_ROWS = 32  # that results are compared on


class _CLAM(Replacement):
    """What both share: they are known by class name and layers, and their results are compared.

    Of Lu et al., "Data-efficient and weakly supervised computational pathology on whole-slide
    images" (Nature Biomedical Engineering 2021).
    """

    package = "CLAM's repository and its copies"
    needs = "CLAM's results on a few rows, which are compared"
    # The Sequentials that it has, with what their second layers are, and its other layers.
    activations: ClassVar[dict[str, type[nn.Module]]]
    layers: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def replaces(cls) -> str:
        return f"any class `{cls.original}` with the layers `{', '.join(cls._names())}`"

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        """Whether a class of that name has those layers, of the expected activations."""
        if original_class_name(module).rpartition(".")[2] != cls.original:
            return False
        branches = [getattr(module, name, None) for name in cls.activations]
        return set(cls._names()) == set(module._modules) and all(
            isinstance(layers, nn.Sequential) and len(layers) > 1 and isinstance(layers[1], kind)
            for layers, kind in zip(branches, cls.activations.values())
        )

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        return (*cls.activations, *cls.layers)

    @classmethod
    def _scorer_of(cls, module: Any) -> str:
        """The path of the layer that scores."""
        raise NotImplementedError

    @classmethod
    def _layers(cls, module: Any) -> dict[str, type[nn.Module] | str]:
        found: dict[str, type[nn.Module] | str] = {}
        for name, activation in cls.activations.items():
            found |= {name: nn.Sequential, f"{name}.0": nn.Linear, f"{name}.1": activation}
            if _has_dropout(getattr(module, name)):
                found[f"{name}.2"] = nn.Dropout
        return {**found, cls._scorer_of(module): nn.Linear}

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        layers = getattr(module, next(iter(cls.activations)))
        return {
            "L": layers[0].in_features,
            "D": layers[0].out_features,
            "dropout": _has_dropout(layers),
            "n_classes": module.get_submodule(cls._scorer_of(module)).out_features,
            "dropout_p": layers[2].p if _has_dropout(layers) else _DROPOUT,
        }

    @classmethod
    def from_original(
        cls, module: nn.Module, *, backend: str | None = None, path: str = "module"
    ) -> Any:
        """As of other replacements; and as copies may differ, results are compared.

        Raises:
            ValueError: also where results differ, or are none, as on the meta device.
        """
        if not cls.recognises(module):
            raise mismatch(
                path, f"a module like CLAM's {cls.original}", original_class_name(module)
            )
        ours = super().from_original(module, backend=backend, path=path)
        weight = next(ours.parameters())
        if weight.is_meta:
            raise mismatch(path, "parameters with values, to compare results", "meta tensors")
        _check_same_results(path, cls.original, cls._scorer_of(module), module, ours)
        return ours


def _check_same_results(
    path: str, original: str, scorer: str, module: nn.Module, ours: nn.Module
) -> None:
    """Check that two modules score rows alike, in training and in evaluation.

    Copies of both are compared, without dropout and with parameters that give large scores of both
    signs, so that whatever a class does to scores or to rows shows.
    """
    peer, copied = (copy.deepcopy(net) for net in (module, ours))
    copied.backend = "reference"  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    weight = next(copied.parameters())
    rows = torch.randn(_ROWS, weight.size(1), generator=generator).to(weight)
    expected = f"the results of CLAM's {original}"
    way_out = "nothing was replaced: under another name the class is left as it is"
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            values = torch.randn(parameter.shape, generator=generator).to(parameter)
            values *= 100 if name.startswith(f"{scorer}.") else 1
            for net in (peer, copied):
                net.get_parameter(name).copy_(values)
        for net in (peer, copied):
            for layer in net.modules():
                if isinstance(layer, nn.Dropout):
                    layer.p = 0.0
        for training in (False, True):
            try:
                found = peer.train(training)(rows)
            except Exception as error:
                raise mismatch(path, expected, f"an error; {way_out}") from error
            if not _are_close(found, copied.train(training)(rows)):
                raise mismatch(path, expected, f"others; {way_out}")


def _are_close(found: object, expected: tuple[Tensor, Tensor]) -> bool:
    """Whether both are scores, up to rounding, and rows."""
    scores, rows = expected
    if not isinstance(found, tuple) or [type(part) for part in found] != [Tensor, Tensor]:
        return False
    if found[0].shape != scores.shape or not torch.equal(found[1], rows):
        return False
    tolerance = torch.finfo(scores.dtype).eps ** 0.5 * scores.abs().max()
    return bool(((found[0] - scores).abs() <= tolerance).all())


class CLAMAttnNetGated(_CLAM):
    """``Attn_Net_Gated`` of CLAM, and of the repositories that its class was copied to.

    Parameters: ``attention_a``, ``attention_b``, ``attention_c``. As there, it scores the rows of
    a bag and returns them, too; the model weighs and sums. Dropout has the probability of the
    module that is replaced, and other random numbers.
    """

    original = "Attn_Net_Gated"
    activations: ClassVar[dict[str, type[nn.Module]]] = {
        "attention_a": nn.Tanh,
        "attention_b": nn.Sigmoid,
    }
    layers: ClassVar[tuple[str, ...]] = ("attention_c",)
    attention_a: nn.Sequential
    attention_b: nn.Sequential
    attention_c: nn.Linear

    def __init__(
        self,
        L: int = 1024,
        D: int = 256,
        dropout: bool | float = False,
        n_classes: int = 1,
        *,
        dropout_p: float = _DROPOUT,
        backend: str | None = None,
    ):
        super().__init__()
        self.backend = backend
        dropouts = [nn.Dropout(dropout_p) for _ in range(2 if dropout else 0)]
        self.attention_a = nn.Sequential(nn.Linear(L, D), nn.Tanh(), *dropouts[:1])
        self.attention_b = nn.Sequential(nn.Linear(L, D), nn.Sigmoid(), *dropouts[1:])
        self.attention_c = nn.Linear(D, n_classes)

    @classmethod
    def _scorer_of(cls, module: Any) -> str:
        return "attention_c"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Score the rows of a bag.

        Args:
            x: ``(N, L)``, or with more axes before L.

        Returns:
            The scores ``(N, n_classes)``, and ``x``.
        """
        score_weight = readable_weight(self.attention_c)
        branches = self.attention_a, self.attention_b
        if score_weight is None or not all(map(_is_plain, branches, self.activations.values())):
            warn_of_calls(self)
            return self.attention_c(self.attention_a(x) * self.attention_b(x)), x
        scores = scores_of_rows(
            self.attention_a[0](x),
            score_weight,
            self.attention_c.bias,
            gate=self.attention_b[0](x),
            feature_dropout_p=(_dropout_of(self.attention_a), _dropout_of(self.attention_b)),
            backend=self.backend,
        )
        return scores, x


class CLAMAttnNet(_CLAM):
    """``Attn_Net`` of CLAM, the same without a gate. Parameters: ``module``."""

    original = "Attn_Net"
    activations: ClassVar[dict[str, type[nn.Module]]] = {"module": nn.Tanh}
    module: nn.Sequential

    def __init__(
        self,
        L: int = 1024,
        D: int = 256,
        dropout: bool | float = False,
        n_classes: int = 1,
        *,
        dropout_p: float = _DROPOUT,
        backend: str | None = None,
    ):
        super().__init__()
        self.backend = backend
        dropouts = [nn.Dropout(dropout_p)] if dropout else []
        self.module = nn.Sequential(nn.Linear(L, D), nn.Tanh(), *dropouts, nn.Linear(D, n_classes))

    @classmethod
    def _scorer_of(cls, module: Any) -> str:
        return f"module.{len(module.module) - 1}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`CLAMAttnNetGated.forward`."""
        layer: Any = self.module[-1]
        score_weight = readable_weight(layer)
        if score_weight is None or not _is_plain(self.module, nn.Tanh, nn.Linear):
            warn_of_calls(self)
            return self.module(x), x
        scores = scores_of_rows(
            self.module[0](x),
            score_weight,
            layer.bias,
            feature_dropout_p=_dropout_of(self.module),
            backend=self.backend,
        )
        return scores, x


def _has_dropout(layers: nn.Sequential) -> bool:
    """Whether dropout follows the activation."""
    return len(layers) > 2 and isinstance(layers[2], nn.Dropout)


def _dropout_of(layers: nn.Sequential) -> float:
    """The probability of it now."""
    dropout: Any = layers[2] if _has_dropout(layers) else None
    return dropout.p if dropout is not None and dropout.training else 0.0


def _is_plain(layers: nn.Sequential, activation: type[nn.Module], *more: type[nn.Module]) -> bool:
    return are_plain(layers, activation, *[nn.Dropout] * _has_dropout(layers), *more)
