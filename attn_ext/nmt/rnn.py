"""LSTMs and GRUs over jagged rows, without padding, in eager mode and within torch.compile."""

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence


def run_rnn(rnn, sequences):
    """The outputs of an LSTM or GRU over jagged rows (total, input) as jagged rows.

    Args:
        rnn: nn.LSTM or nn.GRU, starting from zeros.
        sequences: Jagged.
    """
    if not torch.compiler.is_compiling():
        return sequences.like(outputs(rnn, sequences.values, sequences.lengths))
    options = [rnn.mode, rnn.hidden_size, rnn.num_layers, rnn.bidirectional]
    dropout = rnn.dropout if rnn.training else 0.0
    seed = torch.randint(2**62, (1,), device="cpu") if dropout else None
    weights = list(rnn.parameters())
    return sequences.like(
        opaque_rnn(sequences.values, sequences.lengths, weights, seed, dropout, *options)
    )


def outputs(rnn, values, lengths):
    """The outputs (total, directions * hidden) over rows (total, input) of sequences of `lengths`.

    torch's packed form wants the rows ordered by step, longest sequence first; going there and back
    are two gathers.
    """
    ordered, order = lengths.sort(descending=True, stable=True)
    steps = torch.arange(int(ordered[:1].sum()))  # of the longest sequence, if there is one
    alive = steps[:, None] < ordered  # (steps, B): a prefix of each row
    starts = (lengths.cumsum(0) - lengths)[order]
    rows = (steps[:, None] + starts)[alive]  # packed position -> jagged row
    back = torch.empty_like(rows)
    back[rows] = torch.arange(len(rows))
    packed = PackedSequence(values.index_select(0, rows.to(values.device)), alive.sum(1))
    return rnn(packed)[0].data.index_select(0, back.to(values.device))


# The compiler cannot trace a packed RNN, whose steps depend on the lengths. It gets one op instead,
# which keeps nothing for backward, but runs the RNN once more there.


class _Outputs(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, values, lengths):
        return outputs(self.rnn, values, lengths)


def _from_weights(values, lengths, weights, seed, dropout, mode, hidden, layers, bidirectional):
    """`outputs` of an RNN with these weights, in the order of its parameters."""
    with torch.device("meta"):
        kind = {"LSTM": nn.LSTM, "GRU": nn.GRU}[mode]
        rnn = kind(values.size(-1), hidden, layers, dropout=dropout, bidirectional=bidirectional)
    rnn = _Outputs(rnn)
    named = dict(zip((name for name, _ in rnn.named_parameters()), weights, strict=True))
    if seed is None:
        return torch.func.functional_call(rnn, named, (values, lengths))
    generators = torch.cuda.default_generators if values.is_cuda else [torch.default_generator]
    generator = generators[values.device.index or 0]
    state = generator.get_state()
    try:
        generator.manual_seed(seed.item())
        return torch.func.functional_call(rnn, named, (values, lengths))
    finally:
        generator.set_state(state)


_LIBRARY = torch.library.Library("attn_ext_nmt", "DEF")
_ARGUMENTS = (
    "Tensor values, Tensor lengths, Tensor[] weights, Tensor? seed, float dropout, str mode, "
    "int hidden, int layers, bool bidirectional"
)
_LIBRARY.define(f"rnn({_ARGUMENTS}) -> Tensor")
_LIBRARY.define(f"rnn_backward(Tensor doutput, {_ARGUMENTS}) -> Tensor[]")
opaque_rnn = torch.ops.attn_ext_nmt.rnn.default


def _rnn(*arguments):
    return _from_weights(*arguments).contiguous()


def _rnn_fake(values, lengths, weights, seed, dropout, mode, hidden, layers, bidirectional):
    return values.new_empty(values.size(0), hidden * (2 if bidirectional else 1))


def _rnn_backward(doutput, values, lengths, weights, *options):
    # Within an op autograd is switched off, and must be on to differentiate here.
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set() & torch._C._after_autograd_keyset
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (values, *weights)]
        output = _from_weights(leaves[0], lengths, leaves[1:], *options)
        return [gradient.contiguous() for gradient in torch.autograd.grad(output, leaves, doutput)]


def _rnn_backward_fake(doutput, values, lengths, weights, *options):
    return [tensor.new_empty(tensor.shape) for tensor in (values, *weights)]


def _keep(ctx, inputs, output):
    values, lengths, weights, seed, *ctx.options = inputs
    ctx.save_for_backward(values, lengths, seed, *weights)


def _differentiate(ctx, doutput):
    values, lengths, seed, *weights = ctx.saved_tensors
    dvalues, *dweights = torch.ops.attn_ext_nmt.rnn_backward(
        doutput, values, lengths, weights, seed, *ctx.options
    )
    return dvalues, None, dweights, None, *(None for _ in ctx.options)


_LIBRARY.impl("rnn", _rnn, "CompositeExplicitAutograd")
_LIBRARY.impl("rnn_backward", _rnn_backward, "CompositeExplicitAutograd")
torch.library.register_fake("attn_ext_nmt::rnn", _rnn_fake, lib=_LIBRARY)
torch.library.register_fake("attn_ext_nmt::rnn_backward", _rnn_backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "attn_ext_nmt::rnn", _differentiate, setup_context=_keep, lib=_LIBRARY
)
