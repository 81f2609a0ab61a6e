"""``attn_ext.AdditiveAttention`` wrapped: hooks, adapters and shards, of which memory() knows."""

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from test_module import KEY_DIM, QUERY_DIM, B, make_module, make_tensors
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from attn_ext import AdditiveAttention


def no_warning(function: Callable) -> Callable:
    def call(*arguments: object, **keywords: object):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch's own deprecation
            return function(*arguments, **keywords)

    return call


SETTERS = {
    "weight_norm": no_warning(lambda m: nn.utils.weight_norm(m, "score_weight", dim=None)),
    "weight_norm_of_heads": no_warning(lambda m: nn.utils.weight_norm(m, "score_weight", dim=0)),
    "spectral_norm": no_warning(lambda m: nn.utils.spectral_norm(m, "score_weight")),
    "pruned": lambda m: prune.random_unstructured(m, "score_weight", 0.5),
    "pruned_twice": lambda m: [prune.random_unstructured(m, "score_weight", 0.3) for _ in "12"],
    "parametrised": lambda m: parametrizations.weight_norm(m, "score_weight"),
}


@pytest.mark.parametrize("name", SETTERS)
def test_memory_of_a_module_whose_score_weight_is_computed(name: str):
    """By hooks before a call: of loaded parameters, and in every step of an optimizer."""
    module, other = (make_module("heads").double().eval() for _ in range(2))
    for one in (module, other):
        torch.manual_seed(1)  # prune alike
        SETTERS[name](one)
    other.load_state_dict(module.state_dict())
    query, key, _ = make_tensors(torch.float64)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    with torch.no_grad():
        expected = module(query[:, 0], key)
    for _ in range(2):
        context = other.memory(key).attend(query[:, 0])
        torch.testing.assert_close(context, expected)
        context.sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            expected = other(query[:, 0], key)


@pytest.mark.parametrize("with_kwargs", [False, True])
def test_memory_runs_forward_pre_hooks(with_kwargs: bool):
    """As whatever sets parameters before a call may be one."""
    module, source = make_module("plain"), make_module("plain").score_weight.detach()
    query, key, value = make_tensors()
    lengths, seen = torch.tensor([6, 2, 0]), []

    def set_score_weight(module: AdditiveAttention, *arguments: object) -> None:
        seen.append(arguments)
        module.score_weight.data = source

    module.register_forward_pre_hook(set_score_weight, with_kwargs=with_kwargs)
    context = module.memory(key, value, key_lengths=lengths).attend(query[:, 0])
    assert module.score_weight.data_ptr() == source.data_ptr()
    torch.testing.assert_close(context, module(query[:, 0], key, value, key_lengths=lengths))
    assert seen[0][0] == (key, value)
    if with_kwargs:
        assert seen[0][1]["key_lengths"] is lengths


def test_attend_runs_forward_hooks(backend: str):
    """With its query and result, which they may replace, as in a call of the module."""
    module, (query, key, value) = make_module("heads"), make_tensors()
    seen = []

    def double(module: AdditiveAttention, arguments: tuple, result: tuple) -> tuple:
        seen.append(arguments[0])
        return 2 * result[0], result[1]

    def keep_options(module: AdditiveAttention, arguments: tuple, keywords: dict, result: tuple):
        assert keywords["need_weights"] is True

    module.register_forward_hook(double)
    module.register_forward_hook(keep_options, with_kwargs=True)
    memory = module.memory(key, value, backend=backend)
    assert not seen
    parts = (memory, slice(0, B)), (memory.select(torch.tensor([1])), slice(1, 2))
    for part, sequences in parts:
        actual = part.attend(query[sequences, 0], need_weights=True)
        assert torch.equal(seen[-1], query[sequences, 0])
        tensors = query[sequences, 0], key[sequences], value[sequences]
        expected = module(*tensors, need_weights=True, backend=backend)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["full_backward", "full_backward_pre"])
def test_memory_refuses_backward_hooks(kind: str):
    module = make_module("plain")
    getattr(module, f"register_{kind}_hook")(print)
    with pytest.raises(ValueError, match="^memory: expected .* without backward hooks, got print"):
        module.memory(make_tensors()[1])


@pytest.mark.parametrize("with_kwargs", [False, True])
def test_memory_refuses_pre_hooks_that_change_its_arguments(with_kwargs: bool):
    """Whose first is no query: it would be taken for one, and the query of a step left as it is."""
    module = make_module("plain")

    def scale(module: AdditiveAttention, arguments: tuple, *keywords: dict):
        scaled = 2 * arguments[0], *arguments[1:]
        return (scaled, *keywords) if with_kwargs else scaled

    module.register_forward_pre_hook(scale, with_kwargs=with_kwargs)
    query, key, _ = make_tensors()
    module(query, key)
    with pytest.raises(ValueError, match="^memory: expected forward pre-hooks .*got .*scale"):
        module.memory(key)


@pytest.mark.parametrize("layer", ["query_proj", "key_proj"])
def test_layers_may_be_wrapped(layer: str):
    """An adapter need not have the attributes of a layer; it is called, also by a memory."""
    module = make_module("plain")
    inner = getattr(module, layer)

    class Doubled(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return 2 * inner(features)

    setattr(module, layer, Doubled())
    query, key, _ = make_tensors()
    expected = module(query[:, 0], key)
    with torch.no_grad():
        inner.weight.mul_(2)
    setattr(module, layer, inner)
    torch.testing.assert_close(module(query[:, 0], key), expected)
    setattr(module, layer, Doubled())
    with torch.no_grad():
        inner.weight.div_(2)
    torch.testing.assert_close(module.memory(key).attend(query[:, 0]), expected)


class Decoder(nn.Module):
    """Two steps over one memory."""

    def __init__(self):
        super().__init__()
        self.attention = make_module("everything").double()
        self.output = nn.Linear(KEY_DIM, QUERY_DIM, dtype=torch.float64)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        memory = self.attention.memory(key)
        return memory.attend(self.output(memory.attend(query)))


@pytest.fixture
def group() -> Iterator[None]:
    """Of this process alone."""
    if not dist.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    importlib.import_module("torch.distributed.fsdp")  # which torch.distributed leaves to others

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = Decoder()

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return self.decoder(query, key)


def shard(module: nn.Module) -> None:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.fsdp.fully_shard(module, mesh=mesh)


def test_fully_shard_of_the_module_around(group: None):
    alone = Model()
    sharded = copy.deepcopy(alone)
    shard(sharded.decoder)
    shard(sharded)  # the root stays gathered, the decoder does not
    query, key, _ = make_tensors(torch.float64)
    for _ in range(2):
        contexts = [model(query[:, 0], key) for model in (alone, sharded)]
        torch.testing.assert_close(*contexts)
        for context, model in zip(contexts, (alone, sharded)):
            context.sin().sum().backward()
            torch.optim.SGD(model.parameters(), 0.1).step()
        for ours, theirs in zip(sharded.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
        alone.zero_grad(), sharded.zero_grad()


class TwoMemories(nn.Module):
    """Steps over two memories by turns, so that gradients of both are pending at once."""

    def __init__(self, name: str):
        super().__init__()
        self.attention = make_module(name).double()
        self.output = nn.Linear(KEY_DIM, QUERY_DIM, dtype=torch.float64)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        memories = self.attention.memory(key), self.attention.memory(2 * key)
        for memory in (*memories, memories[0]):
            query = query + self.output(memory.attend(query))
        return query


@pytest.mark.parametrize("key_learns", [False, True], ids=["fixed_key", "learnt_key"])
@pytest.mark.parametrize("registered", [False, True], ids=["", "registered"])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_fully_shard_of_the_attention_itself(
    group: None, name: str, registered: bool, key_learns: bool
):
    """Its parameters are gathered for the memory and for each step, and freed in between."""
    alone = TwoMemories(name)
    sharded = copy.deepcopy(alone)
    shard(sharded.attention)
    if registered:  # as for any other method that users call
        torch.distributed.fsdp.register_fsdp_forward_method(sharded.attention, "memory")
    shard(sharded)
    query, key, _ = make_tensors(torch.float64)
    for _ in range(2):
        keys = [key.detach().requires_grad_(key_learns) for _ in range(2)]
        contexts = [model(query[:, 0], k) for model, k in zip((alone, sharded), keys)]
        assert type(sharded.attention.score_weight.data).__name__ == "DTensor"
        torch.testing.assert_close(*contexts)
        for context, model in zip(contexts, (alone, sharded)):
            context.sin().sum().backward()
            torch.optim.SGD(model.parameters(), 0.1).step()
        for ours, theirs in zip(sharded.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
        torch.testing.assert_close(keys[1].grad, keys[0].grad)
        alone.zero_grad(), sharded.zero_grad()


def test_steps_out_of_the_forward_that_gathers_are_refused(group: None):
    model = Model()
    shard(model.decoder)
    shard(model)
    query, key, _ = make_tensors(torch.float64)
    model(query[:, 0], key)
    with pytest.raises(ValueError, match=r"^key_proj\.weight: expected a whole .*got a shard"):
        model.decoder.attention.memory(key)
