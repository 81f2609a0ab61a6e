"""What results are compared with: float64, and as wrong as hand-written PyTorch makes them.

Written from the formulas of the paper, one sequence at a time and independently of ``attn_ext``.
"""

from collections.abc import Callable, Sequence

import torch
from layouts import INPUT_NAMES, Inputs
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def slope_of_tanh(x: Tensor) -> Tensor:
    """1 / cosh(x)^2, which stays exact where 1 - tanh(x)^2 cancels."""
    return 1 / x.cosh().square()


class _ExactTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * slope_of_tanh(x)


exact_tanh = _ExactTanh.apply


class RandomRounding:
    """Arithmetic in which every result is rounded, up or down at random.

    To float32 up by as large a chance as it lies near to the number above (stochastic rounding, a
    Monte Carlo arithmetic as of Parker 1997): so one calculation stands for all that round,
    whatever the luck of the numbers at hand, and what float32 holds exactly stays exact. Gradients
    are rounded likewise. As with any rounding, results of an operation that are about equal err
    alike. Numbers are kept in float64.

    In float64 itself, what is lost cannot be told from the result: it is moved to a neighbour as
    often as gives the same mean error, unless it is short enough to be exact.

    Calculations take turns in what hand-written code may choose: the order of the features, whether
    gradients are summed over queries or keys first, and whether tanh has the slope 1 - tanh^2,
    which is exactly 0 where tanh rounds to 1, or 1 / cosh^2.
    """

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32):
        self.queries_first = seed % 2 == 0
        self.slope_by_tanh = seed % 4 < 2
        self.dtype = dtype
        self.seed = seed
        self.operation = seed << 20

    def vary(self, x: Tensor) -> Tensor:
        self.operation += 1
        bits = x.contiguous().view(torch.int64) >> 29  # those that float32 has
        bits = bits + self.operation * 0x5851F42D4C957F2D % 2**63
        for _ in range(2):  # mixes them: the high ones then depend on all
            bits = (bits ^ (bits >> 29)) * 0x369DEA0F31A53F85
        chance = (bits >> 33).double() / 2**31  # from -1/2 to 1/2
        exponent = x.frexp().exponent
        if self.dtype == torch.float32:
            last_place = torch.ldexp(torch.ones_like(x), exponent.clamp(min=-125) - 24)
            moved = (x + chance * last_place).float().double()
        else:
            # Rounding moves it where |1.2 chance| > 1/2, a time in six: the variance is 1/6 too.
            moved = x + 1.2 * chance * torch.ldexp(torch.ones_like(x), exponent - 53)
        return torch.where(x.float().double() == x, x, moved)

    def __call__(self, x: Tensor) -> Tensor:
        return _Varied.apply(x, self, False)

    def sum(self, x: Tensor, axis: int) -> Tensor:
        """By pairs, sums of pairs and so on, each of which is rounded."""
        while x.size(axis) > 1:
            even = x.size(axis) // 2 * 2
            pairs, last = x.split([even, x.size(axis) - even], axis)
            x = torch.cat([self(pairs.unflatten(axis, (-1, 2)).sum(axis + 1)), last], axis)
        return x.sum(axis)

    def tanh(self, x: Tensor) -> Tensor:
        return _VariedTanh.apply(x, self)

    def expand(self, x: Tensor, queries: int, keys: int) -> Tensor:
        """``[queries, keys, ...]``; its gradient is summed over either of them first."""
        if self.queries_first:
            return self.input(self.input(x).expand(keys, *x.shape)).expand(queries, keys, *x.shape)
        by_query = self.input(self.input(x).expand(queries, *x.shape))
        return by_query.unsqueeze(1).expand(queries, keys, *x.shape)

    def order(self, features: int) -> Tensor:
        """A permutation: which keys share partial sums, and so their errors, is up to the order."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        return torch.randperm(features, generator=generator, device="cpu")

    def input(self, x: Tensor) -> Tensor:
        """The same numbers, of which only gradients are rounded."""
        return _Varied.apply(x, self, True)

    def softmax(self, x: Tensor) -> Tensor:
        """Over axis 1, which may be empty."""
        powers = _VariedExp.apply(x - x.detach().amax(1, keepdim=True), self) if x.size(1) else x
        return self(powers / self.sum(powers, 1).unsqueeze(1))


class _Varied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rounding: RandomRounding, is_exact: bool) -> Tensor:
        ctx.rounding = rounding
        return x.view_as(x) if is_exact else rounding.vary(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return ctx.rounding.vary(gradient), None, None


class _VariedExp(torch.autograd.Function):
    """Whose derivative is the rounded result: a softmax's gradient has its subnormal weights."""

    @staticmethod
    def forward(ctx, x: Tensor, rounding: RandomRounding) -> Tensor:
        ctx.rounding = rounding
        result = rounding.vary(x.exp())
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (result,) = ctx.saved_tensors
        return ctx.rounding.vary(ctx.rounding.vary(gradient) * result), None


class _VariedTanh(torch.autograd.Function):
    """Whose derivative is, in half of the calculations, 1 - tanh^2 of the rounded tanh."""

    @staticmethod
    def forward(ctx, x: Tensor, rounding: RandomRounding) -> Tensor:
        ctx.rounding = rounding
        result = rounding.vary(x.tanh())
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, result = ctx.saved_tensors
        rounding = ctx.rounding
        if rounding.slope_by_tanh:
            slope = 1 - rounding.vary(result * result)
        else:
            slope = slope_of_tanh(x)
        return rounding.vary(gradient * rounding.vary(slope)), None


def formula(
    inputs: Inputs,
    leaves: dict[str, Tensor],
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    tanh: Callable[[Tensor], Tensor] = torch.tanh,
    reverse: bool = False,
    rounding: RandomRounding | None = None,
) -> tuple[Tensor, Tensor]:
    """Additive attention by the formulas of the paper, a sequence at a time, in leaves' dtype.

    Args:
        inputs: the layout.
        leaves: the tensors by INPUT_NAMES.
        keep: which attention weights ``[B, H, Tq, Tk]`` dropout keeps.
        dropout_p: the probability that they were dropped with.
        tanh: the function itself.
        reverse: sum over queries, keys and features in the opposite order.
        rounding: applied to every result; leaves are in float64.

    Returns:
        context and weights as the public function shapes them (nested ones as their values); the
        second are scores, 0 for absent ones, where ``inputs`` are of a call for scores.
    """
    if inputs.scores_alone:
        leaves = {name: leaf.to(compute_dtype(leaf.dtype)) for name, leaf in leaves.items()}
    query, key, value, score_weight = (leaves[name] for name in INPUT_NAMES)
    if not inputs.has_heads:
        query, key, value = (t.unsqueeze(-2) for t in (query, key, value))
        score_weight = score_weight.unsqueeze(0)
    if reverse:
        query, key, score_weight = query.flip(-1), key.flip(-1), score_weight.flip(-1)
    if rounding is not None:
        order = rounding.order(query.size(-1)).to(query.device)
        query, key, score_weight = query[..., order], key[..., order], score_weight[..., order]
    context = value.new_zeros(*query.shape[:-1], value.size(-1))
    dense = value.new_zeros(inputs.dense_weights_shape)
    jagged = value.new_zeros(key.shape[:-1])
    for b, (query_row, key_row) in enumerate(zip(inputs.query_rows, inputs.key_rows)):
        queries, keys, values = query[query_row], key[key_row], value[key_row]
        if reverse:
            queries, keys, values = queries.flip(0), keys.flip(0), values.flip(0)
        if rounding is None:
            hidden = tanh(queries[:, None] + keys[None])  # [Tq, Tk, H, D]
            scores = (hidden * score_weight).sum(-1)
            alpha = scores.softmax(1).to(value.dtype)  # [Tq, Tk, H]
        else:
            hidden = rounding.tanh(rounding(queries[:, None] + keys[None]))
            weight = rounding.expand(score_weight, *hidden.shape[:2])
            scores = rounding.sum(rounding(hidden * weight), 3)
            alpha = rounding.softmax(scores)
        if inputs.scores_alone:
            alpha = scores
        if keep is not None:
            kept = keep[b, :, : len(queries), inputs.columns[b]]  # [H, Tq, Tk]
            kept = kept.permute(1, 2, 0)
            alpha = alpha * (kept.flip(0, 1) if reverse else kept) / (1 - dropout_p)
        if rounding is None:
            contexts = torch.einsum("qkh,khv->qhv", alpha, values)
        else:
            contexts = rounding.sum(rounding(alpha.unsqueeze(-1) * values), 1)
        if reverse:
            contexts, alpha = contexts.flip(0), alpha.flip(0, 1)
        context[query_row] = contexts
        if inputs.weights_are_jagged:
            jagged[key_row] = alpha[0]
        else:
            dense[b, :, : len(queries), inputs.columns[b]] = alpha.permute(2, 0, 1)
    if inputs.weights_are_jagged:
        weights = jagged if inputs.has_heads else jagged.squeeze(-1)
    else:
        weights = dense.squeeze(2) if inputs.is_one_step else dense
        weights = weights if inputs.has_heads else weights.squeeze(1)
    return context if inputs.has_heads else context.squeeze(-2), weights


Results = dict[str, Tensor]  # "context", "weights", and gradients "dquery" ...


def differentiate(
    function: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor | None]],
    leaves: dict[str, Tensor],
    incoming: dict[str, Tensor],
    wanted: Sequence[str] = INPUT_NAMES,
) -> Results:
    """Call ``function`` on fresh leaves and collect its results and the ``wanted`` gradients."""
    leaves = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in leaves.items()}
    context, weights = function(leaves)
    results = {"context": context} if weights is None else {"context": context, "weights": weights}
    roots = [name for name in incoming if results[name].requires_grad]
    torch.autograd.backward(
        [results[name] for name in roots],
        [incoming[name].to(results[name].dtype) for name in roots],
    )
    for name in wanted:
        results[f"d{name}"] = leaves[name].grad
    return {name: None if result is None else result.detach() for name, result in results.items()}


def worst(exact: Results, *others: Results) -> Results:
    """The exact results off by the largest error, at every element, that ``others`` have."""
    errors = ([(other[name].double() - exact[name]).abs() for other in others] for name in exact)
    return {name: exact[name] + torch.stack(error).amax(0) for name, error in zip(exact, errors)}


def yardsticks(
    inputs: Inputs,
    incoming: dict[str, Tensor],
    wanted: Sequence[str] = INPUT_NAMES,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    samples: int = 0,
) -> tuple[Results, Results]:
    """Results in float64, and as wrong as hand-written PyTorch makes them in the inputs' dtypes.

    Rounding errors are random, and one element's may happen to be small. So eager code is run in
    two orders of summation, and the second results returned have at every element the larger error.

    That is enough where many elements share about the same error, not in a call of one or two
    elements, or whose results nearly cancel: sums of a few short numbers are exact, and what is
    added to itself and taken away again is too. ``samples`` then adds the errors of so many
    calculations whose every result is rounded at random (see :class:`RandomRounding`), to float32,
    as nobody expects more of low precision, or to float64; and that of hand-written float64.
    """

    def by_formula(
        leaves: dict[str, Tensor],
        incoming: dict[str, Tensor],
        dtype: torch.dtype | None = None,
        **how,
    ) -> Results:
        leaves = {name: leaf.to(dtype or leaf.dtype) for name, leaf in leaves.items()}
        results = differentiate(
            lambda leaves: formula(inputs, leaves, keep, dropout_p, **how),
            leaves,
            incoming,
            wanted,
        )
        for name in wanted:  # what no result depends on
            if results[f"d{name}"] is None:
                results[f"d{name}"] = torch.zeros_like(leaves[name])
        return {name: result.double() for name, result in results.items()}

    def errors(leaves: dict[str, Tensor], incoming: dict[str, Tensor]) -> tuple[Results, Results]:
        exact = by_formula(leaves, incoming, torch.float64, tanh=exact_tanh)
        eager = by_formula(leaves, incoming), by_formula(leaves, incoming, reverse=True)
        largest = {name: result - exact[name] for name, result in worst(exact, *eager).items()}
        if leaves["query"].dtype == torch.float64:
            # Most of eager's error is the yardstick's own, and not seen. In float32 it is.
            seen = errors({name: leaf.float() for name, leaf in leaves.items()}, incoming)[1]
            ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            largest = {name: error.maximum(ratio * seen[name]) for name, error in largest.items()}
        return exact, largest

    exact, largest = errors(inputs.leaves, incoming)
    if samples:
        # Where 1 - tanh^2 is but some of float64's last places, or 0, float64 itself is coarse.
        plain = by_formula(inputs.leaves, incoming, torch.float64)
        for name, result in plain.items():
            largest[name] = largest[name].maximum((result - exact[name]).abs())
    computed_in = compute_dtype(inputs.leaves["query"].dtype)
    for sample in range(samples):
        rounding = RandomRounding(sample, computed_in)
        rounded = by_formula(inputs.leaves, incoming, torch.float64, rounding=rounding)
        for name, result in rounded.items():
            largest[name] = largest[name].maximum((result - exact[name]).abs())
    return exact, {name: result + largest[name] for name, result in exact.items()}
