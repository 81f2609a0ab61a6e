"""What benchmarks.bench_compat times: modules of the packages, and what a model does with them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from attn_ext import compat
from attn_ext.compat.replacement import Replacement

from .bench_family import leaf

TESTS = Path(__file__).resolve().parent.parent / "tests"
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))

from compat_peers import NormedAttention, original  # noqa: E402
from compat_pictures import (  # noqa: E402
    DOCTR_STAND_INS,
    GatedScores,
    PlainScores,
    of_transformers,
)

PATH = pytest.MonkeyPatch()  # as the tests find packages


class Case(NamedTuple):
    """A module to replace, as a model has it, and what a model does with it."""

    title: str
    theirs: nn.Module
    call: Callable[[nn.Module], Tensor]
    leaves: list[Tensor]  # what is given, to be differentiated by beside the parameters
    steps: int = 1  # of the call


def renamed(rewritten: type[nn.Module], full_name: str) -> type[nn.Module]:
    """A rewrite whose class goes by the name of the original."""
    module, _, name = full_name.rpartition(".")
    return type(name, (rewritten,), {"__module__": module})


def stacked(steps: list[Tensor]) -> Tensor:
    return torch.stack(steps, 1)


def opennmt(kind: type[Replacement]) -> Case:
    source, queries = leaf(16, 50, 512), leaf(16, 50, 512)
    lengths = torch.linspace(20, 50, 16).long()
    theirs = original(PATH, kind.original)(512, attn_type="mlp")
    return Case(
        "B 16, Tq 50, Tk 50, D 512",
        theirs,
        lambda module: module(queries, source, lengths)[0],
        [source, queries],
    )


def gnmt(kind: type[Replacement]) -> Case:
    source, queries = leaf(16, 50, 1024), leaf(16, 50, 1024)
    theirs = renamed(NormedAttention, kind.original)(query_size=1024, key_size=1024, num_units=1024)

    def call(module: nn.Module) -> Tensor:
        module.set_mask(torch.linspace(20, 50, 16).long(), source)
        return module(queries, source)[0]

    return Case("B 16, Tq 50, Tk 50, D 1024", theirs, call, [source, queries])


def joeynmt(kind: type[Replacement]) -> Case:
    states, queries = leaf(32, 50, 1024), leaf(32, 30, 512)
    mask = torch.ones(32, 1, 50, dtype=torch.bool)
    theirs = original(PATH, kind.original)(512, 1024, 512)

    def call(module: nn.Module) -> Tensor:
        module.compute_proj_keys(states)
        return stacked([module(query, mask, states)[0] for query in queries.split(1, 1)])

    return Case("30 steps, B 32, Tk 50, D 512, Dv 1024", theirs, call, [states, queries], 30)


def espnet(kind: type[Replacement]) -> Case:
    states, queries = leaf(16, 300, 320), leaf(16, 50, 320)
    theirs, lengths = original(PATH, kind.original)(320, 320, 320), torch.full((16,), 300)

    def call(module: nn.Module) -> Tensor:
        module.reset()
        return stacked([module(states, lengths, query, None)[0] for query in queries.unbind(1)])

    return Case("50 steps, B 16, Tk 300, D 320", theirs, call, [states, queries], 50)


def table(input_size: int, hidden_size: int) -> Callable[[type[Replacement]], Case]:
    def make(kind: type[Replacement]) -> Case:
        states, queries, tokens = leaf(1, 256, input_size), leaf(1, 100, hidden_size), torch.eye(50)
        theirs = of_transformers(PATH, kind.original)(input_size, hidden_size, 50)

        def call(module: nn.Module) -> Tensor:
            steps = enumerate(queries.unbind(1))
            return stacked([module(q, states, tokens[t % 50 : t % 50 + 1])[0] for t, q in steps])

        title = f"100 tokens, B 1, Tk 256, D {hidden_size}, Dv {input_size}"
        return Case(title, theirs, call, [states, queries], 100)

    return make


def doctr(kind: type[Replacement]) -> Case:
    features, queries = leaf(8, 512, 4, 32), leaf(8, 30, 512)
    theirs = original(PATH, kind.original, DOCTR_STAND_INS)(512, 512, 512)
    return Case(
        "30 characters, B 8, 4 x 32 places, D 512",
        theirs,
        lambda module: stacked([module(features, query) for query in queries.unbind(1)]),
        [features, queries],
        30,
    )


def torchmil(kind: type[Replacement]) -> Case:
    bag = leaf(1, 10_000, 512)
    theirs = original(PATH, kind.original)(in_dim=512, att_dim=256, gated=True)
    return Case("gated, 10,000 rows of 512, D 256", theirs, lambda module: module(bag), [bag])


def monai(kind: type[Replacement]) -> Case:
    bags = leaf(4, 500, 512)
    theirs = original(PATH, kind.original)(2, "att", False, nn.Identity(), 512)
    return Case(
        "4 bags of 500 rows of 512, D 2048", theirs, lambda module: module.calc_head(bags), [bags]
    )


def clam(rewritten: type[nn.Module]) -> Callable[[type[Replacement]], Case]:
    def make(kind: type[Replacement]) -> Case:
        rows = leaf(20_000, 512)
        theirs = renamed(rewritten, kind.original)(512, 256)

        def call(module: nn.Module) -> Tensor:
            scores, values = module(rows)
            return scores.t().softmax(-1) @ values

        return Case("20,000 rows of 512, D 256, the model's sum too", theirs, call, [rows])

    return make


def table_head(kind: type[Replacement]) -> Case:
    package = "transformers.models.slanext"
    config = of_transformers(PATH, f"{package}.configuration_slanext.SLANeXtConfig")()
    config.max_text_length = 99
    theirs = of_transformers(PATH, f"{package}.modeling_slanext.SLANeXtSLAHead")(config)
    theirs.structure_generator.fc2.bias.data[-1] = -1e4  # which would end the table
    states = leaf(1, 256, config.post_conv_out_channels)
    title = "SLANeXt's whole head, 100 tokens, B 1, Tk 256, D 512, Dv 512"
    return Case(title, theirs, lambda module: module(states).last_hidden_state, [states], 100)


def text_decoder(kind: type[Replacement]) -> Case:
    name = kind.original.rpartition(".")[0] + ".SARDecoder"
    theirs = original(PATH, name, DOCTR_STAND_INS)(512, 30, 120, 512, 512).eval()
    features, holistic = leaf(8, 512, 4, 32), leaf(8, 512)
    return Case(
        "SAR's whole decoder, 31 steps, B 8, 4 x 32 places, D 512",
        theirs,
        lambda module: module(features, holistic),
        [features, holistic],
        31,
    )


CASES: list[tuple[type[Replacement], Callable[[type[Replacement]], Case]]] = [
    (compat.OpenNMTGlobalAttention, opennmt),
    (compat.GNMTBahdanauAttention, gnmt),
    (compat.JoeyNMTBahdanauAttention, joeynmt),
    (compat.ESPnetAttAdd, espnet),
    (compat.TransformersSLANetAttentionGRUCell, table(96, 256)),
    (compat.TransformersSLANeXtAttentionGRUCell, table(512, 512)),
    (compat.TransformersSLANeXtAttentionGRUCell, table_head),
    (compat.DocTRAttentionModule, doctr),
    (compat.DocTRAttentionModule, text_decoder),
    (compat.TorchMILAttentionPool, torchmil),
    (compat.MONAIMILAttention, monai),
    (compat.CLAMAttnNetGated, clam(GatedScores)),
    (compat.CLAMAttnNet, clam(PlainScores)),
]
