"""The translation model: a bidirectional LSTM or GRU encoder and two attention decoders.

Nothing is padded: states are jagged rows (total, D) with offsets, the form `attn_ext` takes.

- "rnnsearch": input feeding. At each step the decoder's state attends once through an
  `AttentionMemory`, and what it read goes into the next step (Bahdanau et al. 2015, with the
  state of the same step as the query: Luong et al. 2015).
- "gnmt": the first decoder layer runs ahead over the whole target; its outputs query all steps at
  once, and the contexts feed the layers above (Wu et al. 2016).
"""

import functools
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import attn_ext

from .rnn import run_rnn

# Logits in memory at once when a loss is computed: of 32,000 words and all tokens of a large batch
# they would take more than all else, several times over.
LOGITS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    decoder: str = "rnnsearch"
    embedding: int = 256
    hidden: int = 256
    encoder_cell: str = "lstm"
    encoder_layers: int = 1
    decoder_layers: int = 1
    dropout: float = 0.2

    @property
    def state_dim(self):
        """Features of an encoder state."""
        return 2 * self.hidden + self.embedding

    def as_dict(self):
        return asdict(self)


class Seq2Seq(nn.Module):
    """Encoder, decoder and one embedding matrix for source, target and output.

    Args:
        config: sizes, see ModelConfig.
        backend: of `attn_ext`; None is the best available. No parameter depends on it.
    """

    def __init__(self, config, backend=None):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding)
        nn.init.normal_(self.embedding.weight, std=config.embedding**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = Encoder(config)
        self.decoder = DECODERS[config.decoder](config, backend)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.recompute = False  # in backward, what encoder and decoder computed, to save memory

    def forward(self, batch, label_smoothing=0.0):
        """Teacher-forced sums over target tokens: (smoothed loss, negative log-likelihood).

        Logits beyond LOGITS_AT_ONCE are computed part by part, and once more in backward.
        """
        features, targets = self._features(batch), batch.target_output.values
        rows = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        if len(features) <= rows:
            loss, nll = self._losses(features, targets, label_smoothing)
            return loss, nll.detach()
        parts = [
            checkpoint(
                self._losses,
                *part,
                label_smoothing,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing is drawn
            )
            for part in zip(features.split(rows), targets.split(rows), strict=True)
        ]
        losses, nlls = zip(*parts, strict=True)
        return sum(losses), sum(nlls).detach()

    def logits(self, batch):
        """(total target tokens, vocabulary)."""
        return self.project(self._features(batch))

    def _features(self, batch):
        """Output features (total target tokens, embedding) of the targets given."""
        encode, decode = self.encode, self.decoder
        if self.recompute and torch.is_grad_enabled():
            encode = functools.partial(checkpoint, encode, use_reentrant=False)
            decode = functools.partial(checkpoint, decode, use_reentrant=False)
        states = encode(batch.source)
        features, _ = decode(self._embed(batch.target_input), states)
        return features

    def _losses(self, features, targets, label_smoothing):
        logits = self.project(features)
        at_least = torch.promote_types(logits.dtype, torch.float32)
        log_probs = logits.to(at_least).log_softmax(-1)
        nll = nn.functional.nll_loss(log_probs, targets, reduction="sum")
        if not label_smoothing:
            return nll, nll
        uniform = -log_probs.mean(-1).sum()
        return (1 - label_smoothing) * nll + label_smoothing * uniform, nll

    def alignments(self, batch):
        """Attention weights of each sentence, one (target, source) matrix each."""
        states = self.encode(batch.source)
        _, weights = self.decoder(self._embed(batch.target_input), states, need_weights=True)
        return weights

    def encode(self, source):
        """Source tokens to encoder states, jagged (total source tokens, state_dim)."""
        return self.encoder(self._embed(source))

    def embed(self, tokens):
        """Tokens (N,) to their embeddings (N, embedding), scaled to unit variance."""
        return self.dropout(self.embedding(tokens) * self.config.embedding**0.5)

    def project(self, features):
        return nn.functional.linear(features, self.embedding.weight, self.output_bias)

    def _embed(self, tokens):
        return tokens.like(self.embed(tokens.values))


ENCODER_CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


class Encoder(nn.Module):
    """Bidirectional LSTM or GRU over jagged rows; a state is both directions and the embedding.

    That the attended token's own embedding is in the context makes names and placeholders easy to
    copy, source and output sharing the embedding matrix, and alignments sharp.
    """

    def __init__(self, config):
        super().__init__()
        self.rnn = ENCODER_CELLS[config.encoder_cell](
            config.embedding,
            config.hidden,
            config.encoder_layers,
            bidirectional=True,
            dropout=config.dropout if config.encoder_layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, embedded):
        hidden = self.dropout(run_rnn(self.rnn, embedded).values)
        return embedded.like(torch.cat([hidden, embedded.values], -1))


class Decoder(nn.Module):
    """What the decoders share: how the hidden state and what it read become output features.

    A subclass makes `backend`, `attention`, `readout` and `dropout`, in its own order: the
    parameters' random start depends on it. It can run over whole targets (`forward`) or step by
    step (`remember`, `start`, `step`, `select`), with equal results.
    """

    def remember(self, states):
        """Jagged encoder states, prepared for steps that attend to them."""
        return self.attention.memory(
            states.values,
            cu_seqlens_k=states.cu_seqlens,
            max_seqlen_k=states.max_seqlen,
            backend=self.backend,
        )

    def read(self, hidden, context):
        """Features (..., embedding) of states (..., hidden) and contexts (..., state_dim)."""
        return self.dropout(torch.tanh(self.readout(torch.cat([hidden, context], -1))))


class RNNSearchDecoder(Decoder):
    """LSTM with input feeding: one attention a step, its result part of the next step's input."""

    def __init__(self, config, backend):
        super().__init__()
        self.backend = backend
        hidden, state_dim = config.hidden, config.state_dim
        sizes = [config.embedding * 2] + [hidden] * (config.decoder_layers - 1)
        self.cells = nn.ModuleList(nn.LSTMCell(size, hidden) for size in sizes)
        self.attention = attn_ext.AdditiveAttention(hidden, state_dim, hidden)
        self.readout = nn.Linear(hidden + state_dim, config.embedding)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, embedded, states, need_weights=False):
        """Decode whole targets.

        Args:
            embedded: Jagged target inputs (total_q, embedding).
            states: Jagged encoder states (total_k, state_dim).
            need_weights: also return the attention weights.

        Returns:
            (features (total_q, embedding), weights (Tq, Tk) of each sentence or None)
        """
        attend = self.remember(states).attend
        # Steps run over a rectangle: a sentence that has ended repeats its last token, and the
        # rows it makes from there on are dropped.
        lengths = embedded.lengths.to(embedded.values.device)
        steps = torch.arange(embedded.max_seqlen, device=lengths.device)[:, None]
        starts = lengths.cumsum(0) - lengths
        rows = (starts + steps.minimum(lengths - 1)).flatten()  # (steps * B,)
        inputs = embedded.values.index_select(0, rows).unflatten(0, (len(steps), -1))
        state = self.start(states, len(lengths))
        features, weights = [], []
        for row in inputs:
            row, state, step_weights = self.step(row, state, attend, need_weights)
            features.append(row)
            weights.append(step_weights)
        total = embedded.values.size(0)
        sentence = torch.arange(len(lengths), device=lengths.device)
        sentence = sentence.repeat_interleave(lengths, output_size=total)  # of each target token
        step = torch.arange(total, device=lengths.device) - starts[sentence]
        features = torch.stack(features, 1)[sentence, step]
        if not need_weights:
            return features, None
        weights = torch.stack(weights).split(states.lengths.tolist(), dim=1)
        lengths = embedded.lengths.tolist()
        return features, [w[:length] for w, length in zip(weights, lengths, strict=True)]

    def start(self, states, rows):
        """State before the first step: per layer (h, c), and the fed-back readout."""
        zeros = states.values.new_zeros(rows, self.cells[0].hidden_size)
        fed = states.values.new_zeros(rows, self.readout.out_features)
        return [(zeros, zeros) for _ in self.cells], fed

    def step(self, embedded, state, attend, need_weights=False):
        """One token of each row.

        Args:
            embedded: (rows, embedding).
            state: from `start`, `select` or the step before.
            attend: queries (rows, hidden) to contexts (rows, state_dim).

        Returns:
            (features (rows, embedding), new state, weights or None)
        """
        layers, fed = state
        hidden, new_layers = torch.cat([embedded, fed], -1), []
        for cell, layer in zip(self.cells, layers, strict=True):
            hidden, memory = cell(hidden, layer)
            new_layers.append((hidden, memory))
            hidden = self.dropout(hidden)
        weights = None
        if need_weights:
            context, weights = attend(hidden, need_weights=True)
        else:
            context = attend(hidden)
        features = self.read(hidden, context)
        return features, (new_layers, features), weights

    def select(self, state, rows):
        """The state of hypotheses `rows`."""
        layers, fed = state
        return [(h[rows], c[rows]) for h, c in layers], fed[rows]


class GNMTDecoder(Decoder):
    """LSTM layers of which the first queries the source, all steps in one call."""

    def __init__(self, config, backend):
        super().__init__()
        self.backend = backend
        hidden, state_dim = config.hidden, config.state_dim
        self.first = nn.LSTM(config.embedding, hidden)
        self.upper = nn.ModuleList(
            nn.LSTM(hidden + state_dim, hidden) for _ in range(config.decoder_layers - 1)
        )
        self.attention = attn_ext.AdditiveAttention(hidden, state_dim, hidden)
        self.readout = nn.Linear(hidden + state_dim, config.embedding)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, embedded, states, need_weights=False):
        """Decode whole targets.

        Args:
            embedded: Jagged target inputs (total_q, embedding).
            states: Jagged encoder states (total_k, state_dim).
            need_weights: also return the attention weights.

        Returns:
            (features (total_q, embedding), weights (Tq, Tk) of each sentence or None)
        """
        queries = embedded.like(self.dropout(run_rnn(self.first, embedded).values))
        result = self.attention(
            queries.values,
            states.values,
            cu_seqlens_q=queries.cu_seqlens,
            cu_seqlens_k=states.cu_seqlens,
            max_seqlen_q=queries.max_seqlen,
            max_seqlen_k=states.max_seqlen,
            need_weights=need_weights,
            backend=self.backend,
        )
        context, weights = result if need_weights else (result, None)
        hidden = queries
        for lstm in self.upper:
            above = hidden.like(torch.cat([hidden.values, context], -1))
            hidden = hidden.like(hidden.values + self.dropout(run_rnn(lstm, above).values))
        features = self.read(hidden.values, context)
        if not need_weights:
            return features, None
        sizes = zip(queries.lengths.tolist(), states.lengths.tolist(), strict=True)
        return features, [weights[b, :tq, :tk] for b, (tq, tk) in enumerate(sizes)]

    def start(self, states, rows):
        """State before the first step: per layer (h, c), each (1, rows, hidden)."""
        zeros = states.values.new_zeros(1, rows, self.first.hidden_size)
        return [(zeros, zeros) for _ in range(1 + len(self.upper))]

    def step(self, embedded, state, attend):
        """One token of each row.

        Args:
            embedded: (rows, embedding).
            state: from `start`, `select` or the step before.
            attend: queries (rows, hidden) to contexts (rows, state_dim).

        Returns:
            (features (rows, embedding), new state, weights or None)
        """
        hidden, first = self.first(embedded[None], state[0])
        hidden, new_state = self.dropout(hidden), [first]
        context = attend(hidden[0])[None]
        for lstm, layer in zip(self.upper, state[1:], strict=True):
            above, layer = lstm(torch.cat([hidden, context], -1), layer)
            hidden = hidden + self.dropout(above)
            new_state.append(layer)
        return self.read(hidden[0], context[0]), new_state, None

    def select(self, state, rows):
        """The state of hypotheses `rows`."""
        return [(h[:, rows], c[:, rows]) for h, c in state]


DECODERS = {"rnnsearch": RNNSearchDecoder, "gnmt": GNMTDecoder}
