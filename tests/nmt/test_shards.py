import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_data import synthetic_pairs

from attn_ext.nmt import data, prepare
from attn_ext.nmt.cli import UsageError
from attn_ext.nmt.shards import InMemory, load_prepared


def test_in_memory():
    examples = [([5, 6], [7]), ([8], []), ([9], [3, 4, 5])]
    pairs = InMemory(examples)
    assert len(pairs) == 3 and pairs.shards == 1
    assert pairs.lengths(0).tolist() == [[2, 1], [1, 0], [1, 3]]
    assert pairs.examples(0, np.array([2, 0])) == [examples[2], examples[0]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "a.tsv").write_text("".join(f"{s}\t{t}\n" for s, t in synthetic_pairs(600)))
    options = ["--vocab-size", "300", "--shard-pairs", "100", "--workers", "1"]
    assert prepare.main([str(folder / "a.tsv"), "--out", str(folder / "out"), *options]) == 0
    return folder / "out"


@pytest.fixture
def folder(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "out")
    return tmp_path / "out"


def test_epochs_read_each_pair_once_and_map_few_shards(prepared):
    found = load_prepared(prepared)
    pairs, mapped = [], []
    for shard in data.shard_order(found.train.shards, 1, 0):
        lengths = found.train.lengths(shard)
        for rows in data.epoch_batches(lengths, 300, 1, 0, shard):
            examples = found.train.examples(shard, rows)
            assert [tuple(map(len, example)) for example in examples] == [
                *map(tuple, lengths[rows])
            ]
            batch = data.make_batch(examples, found.vocabulary)
            pairs += zip(batch.source.split(), batch.target_output.split())
        maps = Path("/proc/self/maps").read_text()
        mapped.append(len(set(re.findall(r"shard-\d+.tokens.npy", maps))))
    assert found.train.shards > 4 and max(mapped) == 2
    texts = {tuple(map(found.vocabulary.decode, map(torch.Tensor.tolist, p))) for p in pairs}
    assert len(texts) == len(pairs) == len(found.train)
    assert all(target.split() == source.split()[::-1] for source, target in texts)


def test_equal_folders_have_equal_fingerprints(prepared, folder):
    before = load_prepared(prepared).fingerprint
    assert load_prepared(folder).fingerprint == before
    index = json.loads((folder / "index.json").read_text())
    index["files"]["shard-00000.tokens.npy"]["sha256"] = "0" * 64
    (folder / "index.json").write_text(json.dumps(index))
    assert load_prepared(folder).fingerprint != before


class TestRefuses:
    def refuses(self, folder, message):
        with pytest.raises(UsageError, match=message) as error:
            load_prepared(folder)
        assert "\n" not in str(error.value)

    def test_what_is_not_there(self, folder):
        self.refuses(folder / "none", "holds no index.json")
        (folder / "shard-00001.tokens.npy").unlink()
        self.refuses(folder, "cannot read .*shard-00001.tokens.npy: No such file")

    def test_a_shard_that_is_cut_off(self, folder):
        path = folder / "shard-00001.tokens.npy"
        path.write_bytes(path.read_bytes()[:-1])
        self.refuses(folder, "shard-00001.tokens.npy is cut off or damaged: it has")

    @pytest.mark.parametrize("name", ["dev.tsv", "subwords.model"])
    def test_small_files_that_have_changed(self, folder, name):
        content = bytearray((folder / name).read_bytes())
        content[5] ^= 1
        (folder / name).write_bytes(content)
        self.refuses(folder, f"{name} is cut off or damaged")

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", '{"format": 1}', "\xff", '{"format": 1, "files": 3}']
    )
    def test_another_index(self, folder, content):
        (folder / "index.json").write_bytes(content.encode("latin-1"))
        self.refuses(folder, "index.json is not an index of")

    def test_another_format(self, folder):
        (folder / "index.json").write_text('{"format": 2}')
        self.refuses(folder, "has format 2; this version reads format 1")
