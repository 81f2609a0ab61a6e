"""What holds for every call, whatever is in it: each property takes a :class:`Case`.

The first, ``budget``, compares with the float64 yardstick; the others compare a call with another
that must give the same, bit for bit where the backend promises that, or else within the same budget
of the same yardstick.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from calls import Call, finished, incoming_of, inputs_of, result_shapes
from helpers import LOOKS, assert_within_budget, compare
from helpers import call as attend
from layouts import Inputs, draw_keep, make_inputs
from torch import Tensor
from yardstick import Results, differentiate, yardsticks

import attn_ext

DROPOUT_SEED = 5


class Case:
    """A call on a backend: its tensors, results and yardstick, each made when first asked for."""

    def __init__(self, call: Call, backend: str):
        self.call = call
        self.backend = backend
        self.dropout_p = call.dropout / 100
        self.samples = 0
        self.inputs = inputs_of(call)
        self.incoming = incoming_of(call, self.inputs)

    @property
    def repeats(self) -> bool:
        """Whether equal work gives equal bits."""
        return self.backend != "reference" and self.call.deterministic is not False

    def run(
        self, inputs: Inputs, incoming: dict[str, Tensor], function: Callable | None = None
    ) -> Results:
        """Results and gradients of other inputs, with all else as in this call."""
        keywords = {"backend": self.backend, "need_weights": self.call.need_weights}
        if self.dropout_p:
            torch.manual_seed(DROPOUT_SEED)
            keywords["dropout_p"] = self.dropout_p
        return differentiate(
            lambda leaves: (function or attend)(inputs, leaves, **keywords),
            inputs.leaves,
            incoming,
            self.call.wanted,
        )

    @cached_property
    def results(self) -> Results:
        return self.run(self.inputs, self.incoming)

    @cached_property
    def exact_and_eager(self) -> tuple[Results, Results]:
        return self.measure(self.inputs)

    def look(self, samples: int) -> None:
        """Estimate eager's error from at least so many more calculations, which take their time."""
        if samples > self.samples:
            self.samples = samples
            self.__dict__.pop("exact_and_eager", None)

    def measure(self, inputs: Inputs) -> tuple[Results, Results]:
        """The yardsticks of inputs that get this call's incoming gradients."""
        keep = None
        if self.dropout_p:
            keep = draw_keep(inputs, self.dropout_p, DROPOUT_SEED)
        wanted, incoming = self.call.wanted, self.incoming
        return yardsticks(inputs, incoming, wanted, keep, self.dropout_p, self.samples)


class OtherBits(AssertionError):
    """Results that had to be equal are not."""


def same_bits(name: str, actual: Tensor, expected: Tensor) -> None:
    if not torch.equal(actual, expected):
        raise OtherBits(f"{name}: other bits")


# ---- Results by sequence ----


def by_sequence(inputs: Inputs, results: Results) -> list[Results]:
    """What of results belongs to each sequence: rows of its queries or of its keys that are not
    ignored, weights as ``[H, Tq, Tk]``. The gradient of score_weight belongs to all."""
    parts = []
    for b, (query_rows, key_rows) in enumerate(zip(inputs.query_rows, inputs.key_rows)):
        part = {}
        for name, result in results.items():
            if name in ("context", "dquery", "query"):
                part[name] = result[query_rows]
            elif name in ("dkey", "dvalue", "key", "value"):
                part[name] = result[key_rows]
        if "weights" in results:
            weights = with_all_axes(inputs, results["weights"])
            if inputs.weights_are_jagged:
                part["weights"] = weights[key_rows].T.unsqueeze(1)
            else:
                queries = len(inputs.leaves["query"][query_rows])
                part["weights"] = weights[b, :, :queries, inputs.columns[b]]
        parts.append(part)
    return parts


def with_all_axes(inputs: Inputs, weights: Tensor) -> Tensor:
    """A view of weights as ``[B, H, Tq, Tk]``, or ``[total_k, H]``."""
    if not inputs.has_heads:
        weights = weights.unsqueeze(-1 if inputs.weights_are_jagged else 1)
    if inputs.is_one_step and not inputs.weights_are_jagged:
        weights = weights.unsqueeze(2)
    return weights


def rearranged(case: Case, order: list[int], layout: str) -> tuple[Inputs, dict[str, Tensor]]:
    """The sequences ``order`` of a call's batch in another layout, and their incoming gradients."""
    call, inputs = case.call, case.inputs
    old = by_sequence(inputs, inputs.leaves)
    mask = inputs.keywords.get("key_padding_mask")
    keeps_mask = mask is not None and layout == inputs.layout
    keys = [mask.size(1) if keeps_mask else len(old[b]["key"]) for b in order]
    new = make_inputs(
        layout,
        lengths_q=[len(old[b]["query"]) for b in order],
        lengths_k=keys,
        features=call.features,
        value_features=call.value_features,
        heads=call.heads,
        dtype=torch.float64,
        index_dtype=getattr(torch, call.index_dtype),
        key_padding_mask=mask[order].cpu() if keeps_mask else None,
        tail_rows=call.tail_rows,
    )
    for place, b in enumerate(order):
        for name in ("key", "value"):
            new.leaves[name][new.key_rows[place]] = old[b][name].double()
    # Queries that only the new layout has, as padding, are of the size of the others.
    new.leaves["query"] *= 10 ** (call.magnitudes[0] / 10)
    for place, b in enumerate(order):
        new.leaves["query"][new.query_rows[place]][: len(old[b]["query"])] = old[b]["query"]
    leaves = {**new.leaves, "score_weight": inputs.leaves["score_weight"]}
    new = finished(call, new.with_leaves(**leaves))

    incoming = {}
    pieces = by_sequence(inputs, case.incoming)
    for name, shape in result_shapes(new, call.need_weights).items():
        incoming[name] = torch.zeros(shape).to(case.incoming[name])
        for place, b in enumerate(order):
            piece, query_rows = pieces[b][name], new.query_rows[place]
            if name == "context":
                incoming[name][query_rows][: len(piece)] = piece
            elif new.weights_are_jagged:
                with_all_axes(new, incoming[name])[new.key_rows[place]] = piece[:, 0].T
            else:
                rows = with_all_axes(new, incoming[name])[place, :, : piece.size(1)]
                rows[..., new.columns[place]] = piece
    return new, incoming


def hold_equal(case: Case, others: list[tuple[list[int], Inputs, Results]], bitwise: bool) -> None:
    """Compare results by sequence; of several calls that together have all sequences of one."""
    ours = by_sequence(case.inputs, case.results)
    exact, eager = (by_sequence(case.inputs, results) for results in case.exact_and_eager)
    theirs = {
        b: part
        for order, inputs, results in others
        for b, part in zip(order, by_sequence(inputs, results))
    }
    for name in ours[0] if ours else ():
        for b, part in enumerate(ours):  # padded queries may be more
            if name in ("context", "dquery"):
                theirs[b][name] = theirs[b][name][: len(part[name])]
            elif name == "weights":
                theirs[b][name] = theirs[b][name][:, : part[name].size(1)]
            if bitwise:
                same_bits(name, theirs[b][name], part[name])
        actual, true, wrong = (
            torch.cat([parts[b][name].flatten() for b in range(len(ours))])
            for parts in (theirs, exact, eager)
        )
        assert_within_budget(name, actual, true, wrong)
    if "dscore_weight" in case.results and len(others) == 1:
        name, (exact_results, eager_results) = "dscore_weight", case.exact_and_eager
        assert_within_budget(name, others[0][2][name], exact_results[name], eager_results[name])


# ---- The properties; each returns False where it says nothing of a case ----


def budget(case: Case) -> bool:
    """Results and gradients are within the budget of the float64 yardstick."""
    compare(case.inputs, case.results, *case.exact_and_eager)
    return True


def weights_sum_to_one(case: Case) -> bool:
    """The weights of each query and head sum to 1, or to 0 if there is no key."""
    if not case.call.need_weights or case.dropout_p:
        return False
    for part in by_sequence(case.inputs, case.results):
        weights = part["weights"]  # [H, Tq, Tk]
        expected = torch.full(weights.shape[:2], float(weights.size(2) > 0)).double()
        sums = weights.double().sum(-1).to(weights.dtype)
        assert_within_budget("weights", sums, expected, expected)
        assert (weights >= 0).all(), "weights: negative"
    return True


def order_of_sequences(case: Case) -> bool:
    """Permuted sequences have permuted results."""
    batch = len(case.inputs.key_rows)
    if batch < 2 or case.dropout_p:
        return False
    generator = torch.Generator("cpu").manual_seed(case.call.seed)
    order = torch.randperm(batch, generator=generator, device="cpu").tolist()
    if order == sorted(order):
        order.reverse()
    inputs, incoming = rearranged(case, order, case.call.layout)
    hold_equal(case, [(order, inputs, case.run(inputs, incoming))], bitwise=case.repeats)
    return True


def split_batch(case: Case) -> bool:
    """A batch in two calls gives what it gives in one; score_weight's gradient is of all of it."""
    batch = len(case.inputs.key_rows)
    if batch < 2 or case.dropout_p:
        return False
    first = 1 + case.call.seed % (batch - 1)
    others = []
    for order in (list(range(first)), list(range(first, batch))):
        inputs, incoming = rearranged(case, order, case.call.layout)
        others.append((order, inputs, case.run(inputs, incoming)))
    # Kernels on GPUs cut their work by the longest sequences, which they need not read.
    bounds = {(i.max_seqlen_q, i.max_seqlen_k) for i in (case.inputs, *(o[1] for o in others))}
    cut_alike = case.backend == "cpu" or len(bounds) == 1
    hold_equal(case, others, bitwise=case.repeats and cut_alike)
    return True


def padded_and_jagged(case: Case) -> bool:
    """A padded call equals its jagged one, and the other way round."""
    inputs = case.inputs
    if not inputs.key_rows or case.dropout_p:
        return False
    is_padded = inputs.offsets_k is None and "cu_seqlens_k" not in inputs.keywords
    if inputs.is_one_step:
        layout = "jagged_one_step" if is_padded else "one_step_lengths"
    else:
        layout = "jagged" if is_padded else "padded_lengths"
    order = list(range(len(inputs.key_rows)))
    other, incoming = rearranged(case, order, layout)
    results = case.run(other, incoming)
    hold_equal(case, [(order, other, results)], bitwise=False)
    compare_nobody(other, results)
    return True


def compare_nobody(inputs: Inputs, results: Results) -> None:
    """Rows of no sequence, and ignored keys, have exactly zero gradients."""
    for name, rows in (("dkey", inputs.key_rows), ("dvalue", inputs.key_rows)):
        if name in results:
            nobody = ~inputs.owned("key", rows)
            assert (results[name][nobody] == 0).all(), f"{name}: of nobody's rows not exactly 0"


def constant_added_to_scores(case: Case) -> bool:
    """A feature of which all keys of a sequence have the same adds a constant to all scores.

    It changes no result, and its query's gradient is 0. Where it is saturated, its tanh is 1 for
    every query too. (Its weight's gradient is the sum of all score gradients, of which nothing but
    roundings is left, which eager code happens to have in common for queries alike.)
    """
    if case.dropout_p:
        return False
    seed, features = case.call.seed, case.call.features
    constant = (-30.0, -1.0, 0.3, 1.0, 30.0)[seed % 5]
    generator = torch.Generator("cpu").manual_seed(seed + 2000)
    leaves = dict(case.inputs.leaves)
    for name, leaf in leaves.items():
        if name == "value":
            continue
        column = torch.full((*leaf.shape[:-1], 1), {"query": 50.0, "key": 1.0}.get(name, constant))
        if name == "query" and seed % 2:
            column = torch.randn(column.shape, generator=generator, device="cpu")
        column = column.to(leaf)
        if name != "score_weight":
            rows = case.inputs.query_rows if name == "query" else case.inputs.key_rows
            column[~case.inputs.owned(name, rows)] = torch.nan
        leaves[name] = torch.cat([leaf, column], -1)
    inputs = case.inputs.with_leaves(**leaves)
    results = case.run(inputs, case.incoming)
    exact, eager = case.measure(inputs)
    for name, result in case.exact_and_eager[0].items():
        if name in ("dquery", "dkey", "dscore_weight"):
            exact[name][..., :features] = result
        else:
            exact[name] = result
    if "dscore_weight" in results:
        name = "dscore_weight"
        results[name][..., features:] = exact[name][..., features:].to(results[name])
    compare(inputs, results, exact, eager)
    return True


def ignored_contents(case: Case) -> bool:
    """What ignored keys and rows of nobody hold changes no bit; their gradients are 0."""
    inputs = case.inputs
    leaves, found = dict(inputs.leaves), False
    for name in ("query", "key", "value"):
        rows = inputs.query_rows if name == "query" else inputs.key_rows
        nobody = ~inputs.owned(name, rows)
        found = found or bool(nobody.any())
        leaves[name] = leaves[name].clone()  # with its strides, where they are dense
        generator = torch.Generator("cpu").manual_seed(case.call.seed)
        contents = torch.randn(leaves[name].shape, generator=generator, device="cpu") * 100
        leaves[name][nobody] = contents.to(leaves[name])[nobody]
    if not found:
        return False
    results = case.run(inputs.with_leaves(**leaves), case.incoming)
    for name, result in case.results.items():
        same_bits(name, results[name], result)
    compare_nobody(inputs, results)
    return True


def repeated_call(case: Case) -> bool:
    """A call made again gives the same bits, whatever gradients are asked for besides."""
    if not case.repeats:
        return False
    for name, result in case.run(case.inputs, case.incoming).items():
        same_bits(name, case.results[name], result)
    return True


def memory(case: Case) -> bool:
    """Attending with one query a sequence after the other gives what one call with all gives."""
    layout = case.call.layout
    takes_steps = case.inputs.is_one_step or layout.startswith("padded")
    if layout == "nested_keys":  # its steps return jagged weights
        takes_steps = not case.call.need_weights
    if not takes_steps or case.dropout_p or case.inputs.max_seqlen_q == 0:
        return False
    if case.backend == "reference" and not {"float16", "bfloat16"}.isdisjoint(case.call.dtypes):
        return False  # autograd sums the gradients of its steps in low precision
    results = case.run(case.inputs, case.incoming, step_by_step)
    compare(case.inputs, results, *case.exact_and_eager)
    return True


def step_by_step(
    inputs: Inputs, leaves: dict[str, Tensor], need_weights: bool, **keywords: object
) -> tuple[Tensor, Tensor | None]:
    """As :func:`helpers.call`, by an ``AttentionMemory``."""
    query, key, value, score_weight = inputs.arguments(leaves)
    given = {name: given for name, given in inputs.keywords.items() if name != "max_seqlen_q"}
    memory = attn_ext.AttentionMemory(key, value, score_weight, **given, **keywords)
    steps = [query] if inputs.is_one_step else query.unbind(1)
    results = [memory.attend(step, need_weights=need_weights) for step in steps]
    contexts, weights = zip(*results) if need_weights else (results, None)
    if inputs.is_one_step:
        return contexts[0], weights and weights[0]
    return torch.stack(contexts, 1), weights and torch.stack(weights, -2)


PROPERTIES: dict[str, Callable[[Case], bool]] = {
    function.__name__: function
    for function in (
        budget,
        weights_sum_to_one,
        order_of_sequences,
        split_batch,
        padded_and_jagged,
        constant_added_to_scores,
        ignored_contents,
        repeated_call,
        memory,
    )
}


# How many calls were within the budget at each of LOOKS, since this was cleared.
looks_taken: Counter[int] = Counter()


def holds(name: str, call: Call, backend: str) -> bool:
    """Whether a property says something of a call; an AssertionError if it does not hold."""
    case = Case(call, backend)
    for samples in LOOKS:
        case.look(samples)
        try:
            says_something = PROPERTIES[name](case)
        except OtherBits:
            raise
        except AssertionError:  # eager may have been right by luck
            if samples == LOOKS[-1]:
                raise
        else:
            break
    if name == "budget":
        looks_taken[samples] += 1
    return says_something


def examine(call: Call, backend: str, names: Iterable[str] = ()) -> dict[str, str | bool]:
    """By property, of all or some: whether it says something of the call, or how it fails."""
    found: dict[str, str | bool] = {}
    for name in names or PROPERTIES:
        try:
            found[name] = holds(name, call, backend)
        except Exception as error:  # not only a failed assertion is a failure
            found[name] = f"{type(error).__name__}: {error}"
    return found
