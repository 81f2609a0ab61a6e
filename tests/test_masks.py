"""Masks, lengths and offsets: which keys a query may attend to."""

import pytest
import torch
from helpers import call, check, compare, incoming_gradients, require_dtype
from layouts import Inputs, make_inputs, offsets_of, with_strides
from parameters import dtype_id, named
from torch import Tensor
from yardstick import differentiate, yardsticks

import attn_ext

pytestmark = pytest.mark.every_isa

BATCH, KEYS = 4, 11

MASKS = {
    "nothing": torch.zeros(BATCH, KEYS, dtype=torch.bool),
    "everything": torch.ones(BATCH, KEYS, dtype=torch.bool),
    "first": torch.arange(KEYS).expand(BATCH, KEYS) == 0,
    "last": torch.arange(KEYS).expand(BATCH, KEYS) == KEYS - 1,
    "all_but_first": torch.arange(KEYS).expand(BATCH, KEYS) > 0,
    "all_but_last": torch.arange(KEYS).expand(BATCH, KEYS) < KEYS - 1,
    "every_second": torch.arange(BATCH * KEYS).view(BATCH, KEYS) % 2 == 0,
    "holes": torch.arange(BATCH * KEYS).view(BATCH, KEYS) % 5 < 2,
    "one_sequence": (torch.arange(BATCH) == 2)[:, None].expand(BATCH, KEYS),
}


@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("layout", ["padded_mask", "one_step_mask"])
def test_masks(backend: str, layout: str, pattern: str):
    inputs = make_inputs(
        layout,
        lengths_q=(3,) * BATCH,
        lengths_k=(KEYS,) * BATCH,
        key_padding_mask=MASKS[pattern],
    )
    check(inputs, backend)


@pytest.mark.parametrize("strides", ["transposed", "sliced"])
def test_mask_strides(backend: str, strides: str):
    inputs = make_inputs("padded_mask")
    mask = inputs.keywords["key_padding_mask"]
    if strides == "sliced":
        mask = mask.repeat_interleave(2, 0).repeat_interleave(3, 1)[1::2, 2::3]
    else:
        mask = with_strides(mask, strides)
    assert not mask.is_contiguous()
    check(inputs.with_keywords(key_padding_mask=mask), backend)


def as_jagged(inputs: Inputs, leaves: dict[str, Tensor], nested: bool, backend: str):
    """The same call as a padded one with lengths, made with offsets or nested tensors."""
    valid = inputs.owned("key", inputs.key_rows)
    key, value = leaves["key"][valid], leaves["value"][valid]
    cu_k = offsets_of(inputs.keywords["key_lengths"].tolist()).to(key.device)
    step, query = inputs.is_one_step, leaves["query"]
    cu_q = offsets_of([inputs.max_seqlen_q] * len(inputs.query_rows)).to(key.device)
    keywords = {"need_weights": True, "backend": backend}
    if nested:
        nest = torch.nested.nested_tensor_from_jagged
        query = query if step else nest(query.flatten(0, 1), cu_q)
        key, value = nest(key, cu_k), nest(value, cu_k)
    else:
        keywords["cu_seqlens_k"] = cu_k
        if not step:
            query, keywords["cu_seqlens_q"] = query.flatten(0, 1), cu_q
    score_weight = leaves["score_weight"]
    context, weights = attn_ext.additive_attention(query, key, value, score_weight, **keywords)
    context = context.values() if context.is_nested else context
    if step:
        dense = weights.new_zeros(valid.shape + weights.shape[1:])
        dense[valid] = weights
        return context, dense.movedim(1, -1)
    return context.view(*leaves["query"].shape[:-1], -1), weights


@pytest.mark.parametrize("heads", [None, 2], ids=named("heads"))
@pytest.mark.parametrize("layout", ["padded_lengths", "one_step_lengths"])
def test_lengths_mask_offsets_and_nested_agree(backend: str, layout: str, heads: int | None):
    inputs = make_inputs(layout, heads=heads, lengths_q=(5,) * 4, lengths_k=(7, 4, 0, 13))
    mask = ~inputs.owned("key", inputs.key_rows)
    masked = Inputs(**{**vars(inputs), "keywords": {"key_padding_mask": mask}})
    incoming = incoming_gradients(inputs, need_weights=True)
    exact, eager = yardsticks(inputs, incoming)
    keywords = {"need_weights": True, "backend": backend}
    for attend in (
        lambda leaves: call(inputs, leaves, **keywords),
        lambda leaves: call(masked, leaves, **keywords),
        lambda leaves: as_jagged(inputs, leaves, False, backend),
        lambda leaves: as_jagged(inputs, leaves, True, backend),
    ):
        compare(inputs, differentiate(attend, inputs.leaves, incoming), exact, eager)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("layout", ["padded_lengths", "padded_mask", "one_step_mask", "jagged"])
def test_what_ignored_keys_hold_never_matters(
    backend: str, layout: str, dtype: torch.dtype, poison: float
):
    inputs = make_inputs(layout, heads=2, dtype=dtype)
    ignored = ~inputs.owned("key", inputs.key_rows)
    for name in ("key", "value"):
        inputs.leaves[name][ignored] = poison
    check(inputs, backend)


def test_bound_of_masked_keys(backend: str):
    """With a mask the longest sequence is not read off the shape."""
    inputs = make_inputs("padded_mask")
    actual, _ = call(inputs.with_keywords(max_seqlen_k=1), inputs.leaves, backend=backend)
    assert torch.equal(actual, call(inputs, inputs.leaves, backend=backend)[0])


def test_weights_sum_to_one_or_zero(backend: str):
    require_dtype(backend, torch.float64)
    inputs = make_inputs("jagged", heads=2, dtype=torch.float64)
    _, weights = call(inputs, inputs.leaves, backend=backend, need_weights=True)
    sums = weights.sum(-1)  # [B, H, max Tq]
    expected = torch.zeros_like(sums)
    for b, (queries, columns) in enumerate(zip(inputs.query_rows, inputs.columns)):
        expected[b, :, : queries[0].stop - queries[0].start] = float(len(columns) > 0)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", ["padded_mask", "one_step_mask"])
def test_a_single_key_is_ignored_amid_others(backend: str, layout: str):
    mask = torch.eye(5, dtype=torch.bool)[1:4]
    check(
        make_inputs(layout, lengths_q=(2,) * 3, lengths_k=(5,) * 3, key_padding_mask=mask), backend
    )
