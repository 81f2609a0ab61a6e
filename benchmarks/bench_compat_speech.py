"""The cases of benchmarks.bench_compat that are of speech: SpeechBrain, ESPnet, coqui-tts.

python -m benchmarks.bench_compat_speech: all of bench_compat's and these (--only ... as there).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attn_ext import compat

from .bench_compat import (
    CASES,
    PATH,
    Case,
    leaf,
    main,
    original,
    stacked,
)  # it finds the tests, too

from compat_speech_peers import COQUI_OPTIONS, STAND_INS  # isort: skip


def made(kind, **arguments: Any) -> nn.Module:
    return original(PATH, kind.original, STAND_INS)(**arguments)


def lengths_of(states: Tensor) -> Tensor:
    return torch.linspace(states.size(1) // 2, states.size(1), states.size(0)).long()


def speechbrain(**more: Any) -> Callable[[type], Case]:
    """The widths of LibriSpeech's and TIMIT's recipes."""

    def make(kind) -> Case:
        states, queries = leaf(8, 400, 512), leaf(8, 50, 512)
        sizes = {"enc_dim": 512, "dec_dim": 512, "attn_dim": 512, "output_dim": 512}
        theirs, lengths = made(kind, **sizes, **more), lengths_of(states)

        def call(module: nn.Module) -> Tensor:
            module.reset()
            return stacked([module(states, lengths, query)[0] for query in queries.unbind(1)])

        return Case("50 steps, B 8, Tk 400, D 512", theirs, call, [states, queries], 50)

    return make


def espnet(**more: Any) -> Callable[[type], Case]:
    def make(kind) -> Case:
        states, queries = leaf(16, 300, 320), leaf(16, 50, 320)
        theirs = made(kind, eprojs=320, dunits=320, att_dim=320, **more)
        lengths = lengths_of(states).tolist()

        def call(module: nn.Module) -> Tensor:
            module.reset()
            earlier, contexts = None, []
            for query in queries.unbind(1):
                context, earlier = module(states, lengths, query, earlier)
                contexts.append(context)
            return stacked(contexts)

        return Case("50 steps, B 16, Tk 300, D 320", theirs, call, [states, queries], 50)

    return make


def coqui(kind) -> Case:
    """Tacotron 2's widths."""
    states, queries = leaf(32, 150, 512), leaf(32, 50, 1024)
    sizes = {"query_dim": 1024, "embedding_dim": 512, "attention_dim": 128}
    location = {"attention_location_n_filters": 32, "attention_location_kernel_size": 31}
    theirs = made(kind, **sizes, **location, **COQUI_OPTIONS)
    mask = torch.arange(150) < lengths_of(states)[:, None]

    def call(module: nn.Module) -> Tensor:
        module.init_states(states)
        keys = module.preprocess_inputs(states)
        return stacked([module(query, states, keys, mask) for query in queries.unbind(1)])

    return Case("50 steps, B 32, Tk 150, D 128, Dv 512", theirs, call, [states, queries], 50)


SPEECH_CASES: dict[type, Callable[[type], Case]] = {
    compat.SpeechBrainContentBasedAttention: speechbrain(),
    compat.SpeechBrainLocationAwareAttention: speechbrain(conv_channels=10, kernel_size=100),
    compat.ESPnetAttLoc: espnet(aconv_chans=10, aconv_filts=100),
    compat.ESPnetAttCov: espnet(),
    compat.CoquiOriginalAttention: coqui,
}

if __name__ == "__main__":
    CASES.extend(SPEECH_CASES.items())
    main()
