import numpy as np

from attn_ext.nmt.shards import InMemory


def test_in_memory():
    examples = [([5, 6], [7]), ([8], []), ([9], [3, 4, 5])]
    pairs = InMemory(examples)
    assert len(pairs) == 3 and pairs.shards == 1
    assert pairs.lengths(0).tolist() == [[2, 1], [1, 0], [1, 3]]
    assert pairs.examples(0, np.array([2, 0])) == [examples[2], examples[0]]
