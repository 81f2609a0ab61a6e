"""What ``attn_ext.compat`` replaces: the peers, how each is called, and the comparison with them.

The peers are the originals where they are installed (without what they depend on, which the
attention does not need), and always the same modules rewritten from their papers.
"""

import ast
import copy
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_within_budget
from torch import Tensor, nn
from yardstick import Results

from attn_ext import compat

B, TQ, TK, D = 3, 5, 7, 24
QUERY_DIM, KEY_DIM = 12, 18
LENGTH_LIST = [7, 3, 1]
LENGTHS = torch.tensor(LENGTH_LIST)
IGNORED = torch.arange(TK) >= LENGTHS[:, None]


# ---- The peers, rewritten ----


class MlpGlobalAttention(nn.Module):
    """Luong et al. 2015's concat score, v . tanh(W_a query + U_a memory), and its output layer."""

    def __init__(self):
        super().__init__()
        self.dim, self.attn_type, self.attn_func = D, "mlp", "softmax"
        self.linear_context = nn.Linear(D, D, bias=False)
        self.linear_query = nn.Linear(D, D, bias=True)
        self.v = nn.Linear(D, 1, bias=False)
        self.linear_out = nn.Linear(2 * D, D)

    def forward(self, src: Tensor, enc_out: Tensor, src_len: Tensor):
        queries = src if src.dim() == 3 else src.unsqueeze(1)
        hidden = self.linear_query(queries).unsqueeze(2) + self.linear_context(enc_out).unsqueeze(1)
        align = self.v(torch.tanh(hidden)).squeeze(-1)  # [B, Tq, Tk]
        ignored = torch.arange(enc_out.size(1)) >= src_len[:, None]
        weights = align.masked_fill(ignored.unsqueeze(1), -torch.inf).softmax(-1)
        output = self.linear_out(torch.cat([torch.bmm(weights, enc_out), queries], -1))
        return (output, weights) if src.dim() == 3 else (output.squeeze(1), weights.squeeze(1))


class ProjectedKeysAttention(nn.Module):
    """Bahdanau et al. 2015, A.1.2, for a decoder that hands over the keys before its steps."""

    def __init__(self):
        super().__init__()
        self.key_layer = nn.Linear(KEY_DIM, D, bias=False)
        self.query_layer = nn.Linear(QUERY_DIM, D, bias=False)
        self.energy_layer = nn.Linear(D, 1, bias=False)

    def compute_proj_keys(self, keys: Tensor) -> None:
        self.keys = self.key_layer(keys)

    def forward(self, query: Tensor, mask: Tensor, values: Tensor):
        scores = self.energy_layer(torch.tanh(self.query_layer(query) + self.keys)).squeeze(2)
        weights = scores.unsqueeze(1).masked_fill(mask == 0, -torch.inf).softmax(-1)
        return weights @ values, weights


class StepwiseAdditive(nn.Module):
    """e = g . tanh(M enc + N dec), sharpened before the softmax, and summed over the encoder."""

    def __init__(self):
        super().__init__()
        self.eprojs, self.dunits, self.att_dim, self.han_mode = KEY_DIM, QUERY_DIM, D, False
        self.mlp_enc = nn.Linear(KEY_DIM, D)
        self.mlp_dec = nn.Linear(QUERY_DIM, D, bias=False)
        self.gvec = nn.Linear(D, 1)
        self.reset()

    def reset(self) -> None:
        self.prepared = None

    def forward(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling: float = 2.0):
        if self.prepared is None:  # once an utterance
            self.prepared = self.mlp_enc(enc_hs_pad)
        if dec_z is None:
            dec_z = enc_hs_pad.new_zeros(len(enc_hs_pad), QUERY_DIM)
        scores = self.gvec(torch.tanh(self.prepared + self.mlp_dec(dec_z).unsqueeze(1))).squeeze(2)
        ignored = torch.arange(enc_hs_pad.size(1)) >= torch.tensor(enc_hs_len)[:, None]
        weights = (scaling * scores.masked_fill(ignored, -torch.inf)).softmax(1)
        return (enc_hs_pad * weights.unsqueeze(-1)).sum(1), weights


class NormedAttention(nn.Module):
    """score = g v/|v| . tanh(W_q q + W_k k + b), as GNMT's implementations write it out."""

    def __init__(
        self,
        normalize: bool = True,
        batch_first: bool = True,
        query_size: int = QUERY_DIM,
        key_size: int = KEY_DIM,
        num_units: int = D,
    ):
        super().__init__()
        self.num_units, self.normalize, self.batch_first = num_units, normalize, batch_first
        self.linear_q = nn.Linear(query_size, num_units, bias=False)
        self.linear_k = nn.Linear(key_size, num_units, bias=False)
        self.linear_att = nn.Parameter(torch.randn(num_units) * 0.5)
        if normalize:
            self.normalize_scalar = nn.Parameter(torch.randn(1))
            self.normalize_bias = nn.Parameter(torch.randn(num_units))

    def set_mask(self, context_len: Tensor, context: Tensor) -> None:
        self.ignored = torch.arange(context.size(int(self.batch_first))) >= context_len[:, None]

    def forward(self, query: Tensor, keys: Tensor):
        if not self.batch_first:
            keys = keys.transpose(0, 1)
        steps = query.unsqueeze(1) if query.dim() == 2 else query
        if not self.batch_first and query.dim() == 3:
            steps = query.transpose(0, 1)
        hidden = self.linear_q(steps).unsqueeze(2) + self.linear_k(keys).unsqueeze(1)
        vector = self.linear_att
        if self.normalize:
            hidden = hidden + self.normalize_bias
            vector = vector / vector.norm() * self.normalize_scalar
        scores = torch.tanh(hidden).matmul(vector).masked_fill(self.ignored.unsqueeze(1), -65504)
        weights = scores.softmax(-1)
        context = torch.bmm(weights, keys)
        if query.dim() == 2:
            return context.squeeze(1), weights.squeeze(1)
        if not self.batch_first:
            return context.transpose(0, 1), weights.transpose(0, 1)
        return context, weights


# ---- The peers themselves ----


class Shell(types.ModuleType):
    """A package whose ``__init__.py`` is not run, but read for what it takes from where."""

    def __getattr__(self, name: str) -> object:
        init = Path(self.__path__[0], "__init__.py")
        for node in ast.walk(ast.parse(init.read_text())):
            for alias in node.names if isinstance(node, ast.ImportFrom) else []:
                if (alias.asname or alias.name) == name:
                    source = "." * node.level + (node.module or "")
                    module = importlib.import_module(source, self.__name__)
                    return getattr(module, alias.name)
        raise AttributeError(name)


def find_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have imports find what `make` installed beside the environment for these tests alone."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(sys.prefix, "peers"))])


def original(
    monkeypatch: pytest.MonkeyPatch,
    full_name: str,
    stand_ins: dict[str, dict[str, object]] | None = None,
) -> type[nn.Module]:
    """A class of an installed package, none of whose ``__init__.py`` is run; or a visible skip.

    Args:
        full_name: with the module that the class is in.
        stand_ins: of other modules that are imported there and not needed, or not installed, the
            names that are asked for.
    """
    module_name, _, class_name = full_name.rpartition(".")
    find_installed(monkeypatch)
    top = module_name.partition(".")[0]
    if isinstance(sys.modules.get(top), Shell):  # of a call before
        root = Path(sys.modules[top].__path__[0])
    else:
        spec = importlib.util.find_spec(top)
        if spec is None:
            pytest.skip(f"{module_name} is not installed")
        root = Path(spec.submodule_search_locations[0])
    for init in [root / "__init__.py", *root.rglob("__init__.py")]:
        parts = (root.name, *init.parent.relative_to(root).parts)
        package = Shell(".".join(parts))
        package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None, is_package=True)
        package.__path__ = package.__spec__.submodule_search_locations
        package.__path__.append(str(init.parent))
        monkeypatch.setitem(sys.modules, package.__name__, package)
    for name, names in (stand_ins or {}).items():
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        vars(sys.modules[name]).update(names)
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError:
        if root.name != "espnet":
            raise
        moved = full_name.replace("espnet.", "espnet2.legacy.", 1)  # since 202611
        return original(monkeypatch, moved, stand_ins)


Call = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


def opennmt(module: nn.Module, queries: Tensor, states: Tensor):
    return module(queries, states, LENGTHS.to(states.device))


def joeynmt(module: nn.Module, queries: Tensor, states: Tensor):
    module.compute_proj_keys(states)
    mask = ~IGNORED.unsqueeze(1).to(states.device)
    steps = [module(query, mask, states) for query in queries.split(1, 1)]
    return tuple(torch.cat(column, 1) for column in zip(*steps))


def espnet(module: nn.Module, queries: Tensor, states: Tensor):
    module.reset()
    weights, steps = None, []
    for t in range(queries.size(1) + 1):
        query = queries[:, t - 1] if t else None
        context, weights = module(states, LENGTH_LIST, query, weights)
        steps.append((context, weights))
    return tuple(torch.stack(column, 1) for column in zip(*steps))


def gnmt(module: nn.Module, queries: Tensor, states: Tensor):
    module.set_mask(LENGTHS.to(states.device), states)
    return module(queries, states)


# name: how it is called, the rewrite, the original and its arguments, query and key features
PEERS = {
    "opennmt": (opennmt, MlpGlobalAttention, {"dim": D, "attn_type": "mlp"}, (D, D)),
    "joeynmt": (
        joeynmt,
        ProjectedKeysAttention,
        {"hidden_size": D, "key_size": KEY_DIM, "query_size": QUERY_DIM},
        (QUERY_DIM, KEY_DIM),
    ),
    "espnet": (
        espnet,
        StepwiseAdditive,
        {"eprojs": KEY_DIM, "dunits": QUERY_DIM, "att_dim": D},
        (QUERY_DIM, KEY_DIM),
    ),
    "gnmt": (
        gnmt,
        NormedAttention,
        {
            "query_size": QUERY_DIM,
            "key_size": KEY_DIM,
            "num_units": D,
            "normalize": True,
            "batch_first": True,
        },
        (QUERY_DIM, KEY_DIM),
    ),
}
REPLACEMENTS = {
    "opennmt": compat.OpenNMTGlobalAttention,
    "joeynmt": compat.JoeyNMTBahdanauAttention,
    "espnet": compat.ESPnetAttAdd,
    "gnmt": compat.GNMTBahdanauAttention,
}


def results_of(
    attend: Call, module: nn.Module, queries: Tensor, states: Tensor, dtype: torch.dtype
) -> Results:
    """Results, and the gradients of inputs and parameters, in a dtype."""
    module = module.to(dtype)
    leaves = {"queries": queries, "states": states}
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    context, weights = attend(module, *leaves.values())
    leaves |= dict(module.named_parameters())
    generator = torch.Generator("cpu").manual_seed(1)
    loss = sum(
        (result * torch.randn(result.shape, generator=generator, device="cpu").to(result)).sum()
        for result in (context, weights)
    )
    found = torch.autograd.grad(loss, list(leaves.values()))
    results = {"context": context.detach(), "weights": weights.detach()}
    return results | {f"d{name}": gradient for name, gradient in zip(leaves, found)}


def assert_parity(
    attend: Call, ours: nn.Module, peer: nn.Module, queries: Tensor, states: Tensor
) -> None:
    """Our float32 against the peer's float64, by the error of the peer's float32.

    That is the largest on a few inputs alike: a parameter of one element may be right by luck.
    """
    actual = results_of(attend, ours, queries, states, torch.float32)
    largest: Results = {}
    for factor in (1.003, 1.002, 1.001, 1.0):
        inputs = queries * factor, states * factor
        eager = results_of(attend, copy.deepcopy(peer), *inputs, torch.float32)
        exact = results_of(attend, copy.deepcopy(peer), *inputs, torch.float64)
        for name, result in eager.items():
            error = (result.double() - exact[name]).abs()
            largest[name] = error.maximum(largest.get(name, error))
    assert actual.keys() == exact.keys()
    for name, result in actual.items():
        assert_within_budget(name, result, exact[name], exact[name] + largest[name])
