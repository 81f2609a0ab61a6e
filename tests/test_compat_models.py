"""Whole models of other packages, with and without the replacements of ``attn_ext.compat``."""

import copy
import re
from pathlib import Path

import pytest
import torch
from compat_peers import original
from compat_pictures import DOCTR_STAND_INS, of_transformers
from torch import Tensor, nn

from attn_ext import compat

REQUIREMENTS = Path(__file__).parent.parent / "requirements"


def with_replacements(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy of a model with the attentions of these names replaced."""
    ours = copy.deepcopy(model)
    assert compat.replace_attention(ours) == names
    return ours


def table_recognition(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """SLANeXt with a small encoder, for tables of at most 20 tokens."""
    package = "transformers.models.slanext"
    make_config = of_transformers(monkeypatch, f"{package}.configuration_slanext.SLANeXtConfig")
    kind = of_transformers(monkeypatch, f"{package}.modeling_slanext.SLANeXtForTableRecognition")
    vision = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_dim": 64,
        "global_attn_indexes": [1],
    }
    model = kind(
        make_config(
            vision_config=vision,
            post_conv_in_channels=16,
            post_conv_out_channels=32,
            hidden_size=32,
            max_text_length=20,
        )
    )
    for name, parameter in model.named_parameters():  # as drawn, all tokens would be the same
        nn.init.normal_(parameter, std=1.0 if ".rnn.weight" in name else 0.3)
    model.head.structure_attention_cell.rnn.bias_ih[32:64].data -= 16  # it takes each new state
    return model.eval()


def test_slanext_reads_the_same_table(monkeypatch: pytest.MonkeyPatch):
    """Tokens, their probabilities and the attentions that the model returns if it is asked to."""
    theirs = table_recognition(monkeypatch)
    ours = with_replacements(theirs, ["head.structure_attention_cell"])
    picture = torch.randn(1, 3, 512, 512)
    with torch.no_grad():
        expected, found = (m(picture, output_attentions=True) for m in (theirs, ours))
    tokens = [output.last_hidden_state.argmax(-1) for output in (found, expected)]
    assert torch.equal(*tokens) and len(tokens[0].unique()) > 1
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    assert len(found.head_attentions) == len(expected.head_attentions) == tokens[0].size(1)
    torch.testing.assert_close(found.head_attentions, expected.head_attentions)
    with pytest.raises(ValueError, match="attention_cell: expected a module without hooks"):
        compat.replace_attention(theirs)  # whose attentions were asked for


def test_slanet_decodes_the_same_table(monkeypatch: pytest.MonkeyPatch):
    package = "transformers.models.slanet"
    config = of_transformers(monkeypatch, f"{package}.configuration_slanet.SLANetConfig")()
    config.hidden_size, config.post_conv_out_channels, config.max_text_length = 32, 24, 20
    theirs = of_transformers(monkeypatch, f"{package}.modeling_slanet.SLANetSLAHead")(config).eval()
    ours = with_replacements(theirs, ["structure_attention_cell"])
    states = torch.randn(2, 100, 24)
    expected, found = (m(states).last_hidden_state for m in (theirs, ours))
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(m(states).last_hidden_state.square().sum(), [*m.parameters()])
        for m in (theirs, ours)
    ]
    torch.testing.assert_close(*gradients)


class Columns(nn.Module):
    """Eight by eight pixels of a picture as 512 features each, in place of a ResNet."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 512, 8, stride=8)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        return {"features": self.patches(pictures)}


def test_sar_reads_the_same_words(monkeypatch: pytest.MonkeyPatch):
    """And has the same gradients where it is taught words."""
    name = "doctr.models.recognition.sar.pytorch.SAR"
    kind = original(monkeypatch, name, DOCTR_STAND_INS)
    theirs = kind(Columns(), vocab="abcdefghijklmnopqrstuvwxyz", max_length=5).double().eval()
    nn.init.normal_(theirs.decoder.embed.weight), nn.init.normal_(theirs.decoder.embed_tgt.weight)
    ours = with_replacements(theirs, ["decoder.attention_module"])
    pictures = torch.randn(2, 3, 32, 128, dtype=torch.float64)
    with torch.no_grad():
        expected, found = (m(pictures, return_model_output=True) for m in (theirs, ours))
    torch.testing.assert_close(found["out_map"], expected["out_map"])
    words = [[word for word, _ in output["preds"]] for output in (found, expected)]
    assert words[0] == words[1] and len(set("".join(words[0]))) > 1
    features, holistic = torch.randn(2, 512, 4, 16).double(), torch.randn(2, 512).double()
    letters = torch.randint(26, (2, 6))
    gradients = []
    for decoder in (theirs.decoder.train(), ours.decoder.train()):
        logits = decoder(features, holistic, gt=letters)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), letters.flatten())
        gradients.append(torch.autograd.grad(loss, [*decoder.parameters()]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_torchmil_trains_alike(monkeypatch: pytest.MonkeyPatch, gated: bool):
    stand_ins = {"tensordict": {"TensorDict": dict}}
    kind = original(monkeypatch, "torchmil.models.abmil.ABMIL", stand_ins)
    theirs = kind(in_shape=(20,), att_dim=16, gated=gated)
    ours = with_replacements(theirs, ["pool"])
    bags, labels, mask = torch.randn(4, 30, 20), torch.tensor([0, 1, 1, 0]), torch.ones(4, 30)
    mask[1:, 12:] = 0
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        for _ in range(3):
            loss = sum(model.compute_loss(labels, bags, mask)[1].values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    torch.testing.assert_close(losses[3:], losses[:3])
    assert losses[2] < losses[0]
    torch.testing.assert_close(ours.predict(bags, mask), theirs.predict(bags, mask))


@pytest.mark.parametrize("mode", ["att", "att_trans"])
def test_monai_classifies_alike(monkeypatch: pytest.MonkeyPatch, mode: str):
    kind = original(monkeypatch, "monai.networks.nets.milmodel.MILModel")
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 32))
    options = {"pretrained": False, "backbone": backbone, "backbone_num_features": 32}
    theirs = kind(2, mode, trans_blocks=1, **options)
    assert compat.replace_attention(kind(2, "max", **options)) == []
    ours = with_replacements(theirs, ["attention"])
    pictures = torch.randn(2, 10, 3, 8, 8)
    results = []
    for model in (theirs, ours):
        output = model(pictures)
        gradients = torch.autograd.grad(output.square().sum(), [*model.parameters()])
        results.append((output, *gradients))
    torch.testing.assert_close(*results)


# ---- The table ----


def locked(package: str) -> set[str]:
    """The versions of a package that `make` installs, for whichever Python."""
    pins = "".join(path.read_text() for path in REQUIREMENTS.glob("locked*.txt"))
    return set(re.findall(rf"^{package.lower()}==(\S+)", pins, re.MULTILINE))


def test_supported(capsys: pytest.CaptureFixture[str]):
    """Has all classes; where their originals are on an index, the version is one that is tested."""
    compat.supported()
    header, line, *rows = capsys.readouterr().out.splitlines()
    kinds = [name for name in compat.__all__ if name[0].isupper()]
    assert header.count("|") == line.count("|") == 5
    assert sorted(row.split("`")[1] for row in rows) == sorted(kinds)
    for row in rows:
        _, _, replaced, package, _, _ = (cell.strip() for cell in row.split("|"))
        assert replaced and package
        if "(on no index)" not in package:
            name, version = package.split(" ")
            assert version in locked(name), row
