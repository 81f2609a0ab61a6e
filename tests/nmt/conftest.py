"""Tiny synthetic data and models: everything here trains in seconds."""

import contextlib

import pytest
import torch
from nursery import Nursery, few_pictures
from toy_data import synthetic_pairs

from attn_ext.nmt import data
from attn_ext.nmt.model import ModelConfig, Seq2Seq
from attn_ext.nmt.vocab import Vocabulary


@pytest.fixture(scope="module", autouse=True)
def pictures():
    """One at the end of a training, which takes as long as all of its steps, instead of four."""
    with pytest.MonkeyPatch.context() as patch:
        few_pictures(patch.setattr)
        yield


@pytest.fixture(scope="session")
def tsv(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    path.write_text("".join(f"{s}\t{t}\n" for s, t in synthetic_pairs(150)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def vocabulary():
    texts = [text for pair in synthetic_pairs(150) for text in pair]
    return Vocabulary.train(texts, 320)


@pytest.fixture
def examples(vocabulary):
    return [
        (vocabulary.encode(source), vocabulary.encode(target))
        for source, target in synthetic_pairs(40, seed=1)
    ]


@pytest.fixture(params=["rnnsearch", "gnmt"])
def model(request, vocabulary):
    torch.manual_seed(0)
    config = ModelConfig(
        len(vocabulary), request.param, embedding=12, hidden=10, encoder_layers=2, decoder_layers=2
    )
    return Seq2Seq(config).eval()


@pytest.fixture
def batch(examples, vocabulary):
    return data.make_batch(examples[:7], vocabulary)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    with contextlib.closing(Nursery(tmp_path_factory.mktemp("nursery"))) as nursery:
        yield nursery
