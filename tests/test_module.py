"""``attn_ext.AdditiveAttention``: projections, normalisation, heads, dropout and the memory."""

import functools
from collections.abc import Callable

import pytest
import torch
from helpers import assert_within_budget, require_backend, require_dtype
from layouts import offsets_of
from torch import Tensor
from yardstick import Results

import attn_ext
from attn_ext import AdditiveAttention

B, TQ, TK = 3, 4, 6
QUERY_DIM, KEY_DIM, ATTN_DIM = 5, 8, 12

CONFIGURATIONS = {
    "plain": {},
    "bias": {"bias": True},
    "normalize": {"normalize": True},
    "heads": {"num_heads": 2},
    "everything": {"num_heads": 4, "bias": True, "normalize": True},
}


def make_module(name: str, **options: object) -> AdditiveAttention:
    module = AdditiveAttention(QUERY_DIM, KEY_DIM, ATTN_DIM, **CONFIGURATIONS[name], **options)
    with torch.no_grad():  # away from initial zeros and ones
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def make_tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((B, TQ, QUERY_DIM), (B, TK, KEY_DIM), (B, TK, 4))
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)


def by_hand(
    parameters: dict[str, Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """What the module computes, from its parameters, a head at a time."""
    query = query @ parameters["query_proj.weight"].T + parameters.get("query_proj.bias", 0)
    key = key @ parameters["key_proj.weight"].T + parameters.get("key_proj.bias", 0)
    score_weight = parameters["score_weight"]
    heads = score_weight.size(0) if score_weight.dim() == 2 else 1
    vectors = score_weight.reshape(heads, -1)
    biases = parameters["b"].reshape(heads, -1) if "b" in parameters else torch.zeros(heads, 1)
    gains = parameters["g"].reshape(heads) if "g" in parameters else None
    contexts, weights = [], []
    for h, (q, k, v) in enumerate(
        zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1))
    ):
        vector = vectors[h]
        if gains is not None:  # g v / |v|
            vector = gains[h] * vector / vector.square().sum().sqrt()
        hidden = torch.tanh(q.unsqueeze(2) + k.unsqueeze(1) + biases[h].to(q.dtype))
        alpha = (hidden * vector).sum(-1).softmax(-1)
        contexts.append(alpha @ v)
        weights.append(alpha)
    stacked = torch.stack(weights, 1)
    return torch.cat(contexts, -1), stacked if score_weight.dim() == 2 else stacked.squeeze(1)


def results_of(
    attend: Callable[..., tuple[Tensor, Tensor]],
    module: AdditiveAttention,
    tensors: tuple[Tensor, ...],
    dtype: torch.dtype,
) -> Results:
    """Results and all gradients of ``attend(parameters, query, key, value)``."""
    leaves = {name: p.detach().to(dtype).requires_grad_() for name, p in module.named_parameters()}
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    context, weights = attend(leaves, *inputs)
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (result * torch.randn(result.shape, generator=generator).to(dtype)).sum()
        for result in (context, weights)
    )
    leaves |= dict(zip(("query", "key", "value"), inputs))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    results = {"context": context.detach(), "weights": weights.detach()}
    return results | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_formula(backend: str, name: str):
    module, tensors = make_module(name), make_tensors()

    def by_module(parameters: dict[str, Tensor], query: Tensor, key: Tensor, value: Tensor):
        keywords = {"need_weights": True, "backend": backend}
        return torch.func.functional_call(module, parameters, (query, key, value), keywords)

    actual = results_of(by_module, module, tensors, torch.float32)
    exact = results_of(by_hand, module, tensors, torch.float64)
    eager = results_of(by_hand, module, tensors, torch.float32)
    for result_name, result in actual.items():
        assert_within_budget(result_name, result, exact[result_name], eager[result_name])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_memory_equals_forward(backend: str, name: str):
    module, tensors = make_module(name), make_tensors()

    def by_forward(parameters: dict[str, Tensor], query: Tensor, key: Tensor, value: Tensor):
        return by_hand(parameters, query, key, value)

    def by_memory(parameters: dict[str, Tensor], query: Tensor, key: Tensor, value: Tensor):
        holder = make_module(name)
        for parameter_name, parameter in parameters.items():
            owner, _, leaf = parameter_name.rpartition(".")
            target = holder.get_submodule(owner)
            del target._parameters[leaf]
            setattr(target, leaf, parameter)
        memory = holder.memory(key, value, backend=backend)
        steps = [memory.attend(query[:, t], need_weights=True) for t in range(TQ)]
        contexts, weights = zip(*steps)
        return torch.stack(contexts, 1), torch.stack(weights, -2)

    actual = results_of(by_memory, module, tensors, torch.float32)
    exact = results_of(by_forward, module, tensors, torch.float64)
    eager = results_of(by_forward, module, tensors, torch.float32)
    for result_name, result in actual.items():
        assert_within_budget(result_name, result, exact[result_name], eager[result_name])


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_value_defaults_to_key(backend: str, name: str):
    module, (query, key, _) = make_module(name), make_tensors()
    implied, given = module(query, key, backend=backend), module(query, key, key, backend=backend)
    assert implied.shape == (B, TQ, KEY_DIM)
    assert torch.equal(implied, given)
    step = query[:, 0]
    implied = module.memory(key, backend=backend).attend(step)
    assert torch.equal(implied, module.memory(key, key, backend=backend).attend(step))


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_layouts_pass_through(backend: str, name: str):
    """Lengths, a mask, offsets and nested tensors give the same contexts."""
    module, (query, key, value) = make_module(name), make_tensors()
    lengths = torch.tensor([6, 2, 0])
    valid = torch.arange(TK) < lengths[:, None]
    expected = module(query, key, value, key_lengths=lengths, backend=backend)
    assert (expected[2] == 0).all()
    masked = module(query, key, value, key_padding_mask=~valid, backend=backend)
    torch.testing.assert_close(masked, expected)
    cu_q, cu_k = offsets_of([TQ] * B), offsets_of(lengths.tolist())
    flat, keys, values = query.flatten(0, 1), key[valid], value[valid]
    jagged = module(
        flat,
        keys,
        values,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=TQ,
        max_seqlen_k=TK,
        backend=backend,
    )
    torch.testing.assert_close(jagged.view_as(expected), expected)
    nest = torch.nested.nested_tensor_from_jagged
    nested = module(nest(flat, cu_q), nest(keys, cu_k), nest(values, cu_k), backend=backend)
    assert nested.is_nested
    torch.testing.assert_close(nested.values().view_as(expected), expected)
    for keywords in ({"key_lengths": lengths}, {"key_padding_mask": ~valid}):
        memory = module.memory(key, value, backend=backend, **keywords)
        torch.testing.assert_close(memory.attend(query[:, 1]), expected[:, 1])
    mixed = module(query, keys, values, cu_seqlens_k=cu_k, backend=backend)
    torch.testing.assert_close(mixed, expected)
    mixed = module(flat, key, value, cu_seqlens_q=cu_q, key_lengths=lengths, backend=backend)
    torch.testing.assert_close(mixed.view_as(expected), expected)
    memory = module.memory(keys, values, cu_seqlens_k=cu_k, max_seqlen_k=TK, backend=backend)
    torch.testing.assert_close(memory.attend(query[:, 1]), expected[:, 1])


def test_dropout_only_in_training(backend: str):
    module, (query, key, value) = make_module("plain", dropout=0.5), make_tensors()
    without = make_module("plain")
    without.load_state_dict(module.state_dict())
    expected = without(query, key, value, backend=backend)

    module.eval()
    assert torch.equal(module(query, key, value, backend=backend), expected)
    memory = module.memory(key, value, backend=backend)
    torch.testing.assert_close(memory.attend(query[:, 0]), expected[:, 0])

    module.train()
    _, weights = module(query, key, value, need_weights=True, backend=backend)
    assert (weights == 0).any()
    memory = module.memory(key, value, backend=backend)
    dropped = torch.stack([memory.attend(query[:, 0], need_weights=True)[1] for _ in range(9)])
    assert 0.3 < (dropped == 0).double().mean() < 0.7


STATE = {
    "plain": ["key_proj.weight", "query_proj.weight", "score_weight"],
    "bias": [
        "key_proj.bias",
        "key_proj.weight",
        "query_proj.bias",
        "query_proj.weight",
        "score_weight",
    ],
    "normalize": ["b", "g", "key_proj.weight", "query_proj.weight", "score_weight"],
}


@pytest.mark.parametrize("name", STATE)
def test_state_dict(name: str):
    module = make_module(name)
    state = module.state_dict()
    assert sorted(state) == STATE[name]
    assert state["score_weight"].shape == (ATTN_DIM,)
    assert state["query_proj.weight"].shape == (ATTN_DIM, QUERY_DIM)
    assert state["key_proj.weight"].shape == (ATTN_DIM, KEY_DIM)
    other = AdditiveAttention(QUERY_DIM, KEY_DIM, ATTN_DIM, **CONFIGURATIONS[name])
    other.load_state_dict(state)
    query, key, value = make_tensors()
    assert torch.equal(other(query, key, value), module(query, key, value))


def test_shapes_with_heads():
    state = make_module("everything").state_dict()
    assert state["score_weight"].shape == state["b"].shape == (4, ATTN_DIM // 4)
    assert state["g"].shape == (4,)


def test_fresh_normalized_module_is_the_plain_one():
    """The bias starts at 0 and the gain at the norm that leaves scores of the usual size."""
    module = AdditiveAttention(QUERY_DIM, KEY_DIM, ATTN_DIM, normalize=True)
    assert (module.b == 0).all()
    assert module.g.item() == pytest.approx(ATTN_DIM**-0.5)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_parameter_learns(backend: str, name: str):
    module, (query, key, value) = make_module(name), make_tensors()
    module(query, key, value, backend=backend).square().sum().backward()
    for parameter_name, parameter in module.named_parameters():
        # A bias of the keys adds to that of the queries: both learn, and the same.
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


def test_reset_parameters_draws_anew():
    module = make_module("normalize")
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    module.reset_parameters()
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert parameter.isfinite().all(), name


def test_dtypes_and_copies(backend: str):
    require_dtype(backend, torch.float64)
    module = make_module("everything").double()
    query, key, value = make_tensors(torch.float64)
    context = module(query, key, value, backend=backend)
    assert context.dtype == torch.float64
    half = make_module("plain").bfloat16()
    tensors = (tensor.bfloat16() for tensor in make_tensors())
    assert half(*tensors, backend=backend).dtype == torch.bfloat16


def test_autocast(backend: str):
    module, (query, key, value) = make_module("everything"), make_tensors()
    with torch.autocast("cpu", torch.bfloat16):
        context = module(query, key, value, backend=backend)
        step = module.memory(key, value, backend=backend).attend(query[:, 0])
    assert context.dtype == step.dtype == torch.bfloat16
    expected = module(query, key, value, backend=backend)
    assert (context.float() - expected).abs().max() < 0.05 * expected.abs().max()
    context.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_grad_scaler(backend: str):
    """float16 autocast with a scaled loss takes the steps that float32 takes."""
    device = torch.get_default_device().type
    start, tensors = make_module("everything").state_dict(), make_tensors()
    trained = []
    for enabled in (True, False):
        module = make_module("everything")
        module.load_state_dict(start)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**8, enabled=enabled)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast(device, torch.float16, enabled=enabled):
                context = module(*tensors, backend=backend)
                assert context.dtype == (torch.float16 if enabled else torch.float32)
                loss = context.float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        trained.append(module.state_dict())
    for name, parameter in trained[0].items():
        assert parameter.dtype == torch.float32
        step = trained[1][name] - start[name]
        assert (parameter - start[name] - step).abs().max() < 0.05 * step.abs().max(), name


def test_repr_names_the_options():
    text = repr(make_module("everything", dropout=0.25))
    assert "num_heads=4, normalize=True, dropout=0.25" in text


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("num_heads", [1, 2], ids=lambda heads: f"heads={heads}")
def test_tensor_without_axes_is_refused_by_name(num_heads: int, name: str):
    module = AdditiveAttention(QUERY_DIM, KEY_DIM, ATTN_DIM, num_heads=num_heads)
    query, key, value = make_tensors()
    tensors = {"key": key, "value": value, name: torch.tensor(1.0)}
    with pytest.raises(ValueError, match=rf"^{name}: expected .*got .*\(\)"):
        module(query, **tensors)
    with pytest.raises(ValueError, match=rf"^{name}: expected .*got .*\(\)"):
        module.memory(**tensors)


def test_functions_agree(backend: str):
    """The module is its projections and the public function."""
    module, (query, key, value) = make_module("plain"), make_tensors()
    expected = attn_ext.additive_attention(
        module.query_proj(query), module.key_proj(key), value, module.score_weight, backend=backend
    )
    assert torch.equal(module(query, key, value, backend=backend), expected)


# ---- Rows that nobody attends to ----


def with_ignored_rows(layout: str, filling: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a call whose ignored rows hold ``filling``, and which those rows are."""
    torch.manual_seed(1)
    query, key, value = (tensor.detach() for tensor in make_tensors())
    lengths = torch.tensor([6, 2, 0])
    ignored = {"query": torch.zeros(B, TQ, dtype=torch.bool)}
    ignored["key"] = torch.arange(TK) >= lengths[:, None]
    if layout == "jagged":
        ignored = {name: torch.arange(rows.numel()) >= 8 for name, rows in ignored.items()}
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
        options = {"cu_seqlens_q": offsets_of([4, 0, 4]), "cu_seqlens_k": offsets_of([6, 2, 0])}
    elif layout == "lengths":
        options = {"key_lengths": lengths}
    else:
        options = {"key_padding_mask": ignored["key"]}
    ignored["value"] = ignored["key"]
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        tensor[ignored[name]] = filling
    return {**tensors, **options}, ignored


def by_call(module: AdditiveAttention, **arguments: object) -> Tensor:
    return module(**arguments)


def by_memory(module: AdditiveAttention, **arguments: object) -> Tensor:
    query = arguments.pop("query")
    arguments.pop("cu_seqlens_q", None)
    memory = module.memory(**arguments)
    return memory.attend(query[:, 0] if query.dim() == 3 else query[:B])


@pytest.mark.parametrize("value_is_key", [False, True], ids=["value", "value_is_key"])
@pytest.mark.parametrize("attend", [by_call, by_memory])
@pytest.mark.parametrize("layout", ["lengths", "mask", "jagged"])
def test_ignored_rows_may_hold_anything(
    backend: str, layout: str, attend: Callable, value_is_key: bool
):
    """They change no result and no gradient, that of a projection's weight above all."""
    module = make_module("bias")
    check_ignored_rows(module, functools.partial(attend, module), layout, backend, value_is_key)


@pytest.mark.parametrize("layout", ["lengths", "jagged"])
def test_ignored_rows_may_hold_anything_when_compiled(layout: str):
    module = make_module("bias")
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    check_ignored_rows(module, compiled, layout, require_backend("cpu"), value_is_key=True)


def check_ignored_rows(
    module: AdditiveAttention, attend: Callable, layout: str, backend: str, value_is_key: bool
) -> None:
    found = []
    for filling in (0.0, torch.nan, torch.inf):
        arguments, ignored = with_ignored_rows(layout, filling)
        leaves = {name: arguments[name].requires_grad_() for name in ignored}
        if value_is_key:
            del arguments["value"], leaves["value"]
        context = attend(**arguments, backend=backend)
        module.zero_grad()
        context.square().sum().backward()
        for name, leaf in leaves.items():
            assert (leaf.grad[ignored[name]] == 0).all(), name
        gradients = [tensor.grad for tensor in (*module.parameters(), *leaves.values())]
        found.append([context.detach(), *gradients])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(other, found[0], strict=True))
    assert found[0][0].isfinite().all() and module.key_proj.weight.grad.abs().max() > 0
