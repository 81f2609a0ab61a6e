"""The drop-ins for speech: SpeechBrain's, ESPnet's and coqui-tts's additive attentions."""

import copy

import pytest
import torch
from compat_peers import KEY_DIM, QUERY_DIM, TK, TQ, B, assert_parity
from compat_speech_peers import PEERS, original_of, rewritten
from torch import Tensor, nn


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(B, TQ, QUERY_DIM), torch.randn(B, TK, KEY_DIM)


def take_over(name: str, peer: nn.Module, backend: str | None = None) -> nn.Module:
    """Ours, with parameters of its own."""
    return PEERS[name].kind.from_original(copy.deepcopy(peer), backend=backend)


@pytest.mark.parametrize("source", ["rewritten", "original"])
@pytest.mark.parametrize("name", PEERS)
def test_peer(backend: str, monkeypatch: pytest.MonkeyPatch, name: str, source: str):
    """The steps of a decoder, each with the weights of those before, and their gradients."""
    peer = rewritten(name) if source == "rewritten" else original_of(monkeypatch, name)
    ours = take_over(name, peer, backend)
    assert list(ours.state_dict()) == list(peer.state_dict())
    assert_parity(PEERS[name].attend, ours, peer, *inputs())
