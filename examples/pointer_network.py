"""A pointer network that finds convex hulls (Vinyals, Fortunato and Jaitly, 2015).

    pip install matplotlib
    python examples/pointer_network.py

As in the paper, points are drawn evenly from the unit square, and the answer is a sequence of
points: the corners of their hull, counter-clockwise. A score of attn_ext.additive_scores for each
point, normalised by log_softmax, is the log-probability that the hull goes on there. Unlike the
paper's, the points are sorted from left to right, by which minutes of training are enough.
"""

import torch
from beside import compare, read_options
from matplotlib.figure import Figure
from torch import nn

import attn_ext

FEWEST, MOST = 5, 20  # points, in training


def convex_hull(points):
    """Numbers of the corners, counter-clockwise from the first point (Andrew's monotone chain).

    Args:
        points: (x, y) sorted by x.
    """

    def chain(numbers):
        """The hull below the points, of which each is reached by a turn to the left."""
        corners = []
        for number in numbers:
            x, y = points[number]
            while len(corners) > 1:
                (x0, y0), (x1, y1) = points[corners[-2]], points[corners[-1]]
                if (x1 - x0) * (y - y0) > (y1 - y0) * (x - x0):
                    break
                corners.pop()
            corners.append(number)
        return corners[:-1]

    numbers = range(len(points))
    return chain(numbers) + chain(reversed(numbers))


def area(points, corners):
    """Of the polygon with these corners, by the shoelace formula."""
    x, y = points[corners].unbind(-1)
    return ((x * y.roll(-1)).sum() - (y * x.roll(-1)).sum()).item() / 2


def make_batch(count, fewest, most):
    """Points (count, N, 2), how many are real (count,), and hulls (count, T), -1 past the end.

    A hull begins with point 0, the leftmost, and ends where it is back.
    """
    lengths = torch.randint(fewest, most + 1, (count,))
    points = torch.rand(count, int(lengths.max()), 2)
    hulls = []
    for row, length in zip(points, lengths.tolist()):
        row[:length] = row[row[:length, 0].argsort()]
        hulls.append(torch.tensor([*convex_hull(row[:length].tolist()), 0]))
    return points, lengths, nn.utils.rnn.pad_sequence(hulls, batch_first=True, padding_value=-1)


class PointerNetwork(nn.Module):
    def __init__(self, scores=attn_ext.additive_scores, width=128):
        super().__init__()
        self.scores = scores
        self.encoder = nn.LSTM(2, width // 2, batch_first=True, bidirectional=True)
        self.place = nn.Linear(2, width)
        self.decoder = nn.LSTM(width, width, batch_first=True)
        self.query_proj = nn.Linear(width, width)
        self.key_proj = nn.Linear(width, width, bias=False)
        self.score_weight = nn.Parameter(torch.randn(width) * width**-0.5)

    def encode(self, points, lengths):
        """A row for each point (B, N, width), and the state that the decoder begins with."""
        places = points - 0.5
        rows = nn.utils.rnn.pack_padded_sequence(
            places, lengths, batch_first=True, enforce_sorted=False
        )
        rows, state = self.encoder(rows)
        rows, _ = nn.utils.rnn.pad_packed_sequence(rows, batch_first=True)
        # Both directions side by side, (1, B, width).
        state = tuple(part.transpose(0, 1).flatten(1).unsqueeze(0) for part in state)
        return rows + self.place(places), state

    def forward(self, points, lengths, corners):
        """Log-probabilities (B, Tq, N) of the next corner after each of corners (B, Tq)."""
        rows, state = self.encode(points, lengths)
        batch = torch.arange(len(points)).unsqueeze(1)
        states, _ = self.decoder(rows[batch, corners], state)
        keys, queries = self.key_proj(rows), self.query_proj(states)
        return self.scores(queries, keys, self.score_weight, key_lengths=lengths).log_softmax(-1)

    @torch.no_grad()
    def find(self, points, lengths):
        """The hulls, each a list of corners, by going to the most probable corner next."""
        rows, state = self.encode(points, lengths)
        keys, batch = self.key_proj(rows), torch.arange(len(points))
        here, path = torch.zeros(len(points), dtype=torch.long), []
        visited = torch.zeros(points.shape[:2], dtype=torch.bool)
        for _ in range(points.size(1)):
            path.append(here)
            states, state = self.decoder(rows[batch, here].unsqueeze(1), state)
            query = self.query_proj(states.squeeze(1))
            scores = self.scores(query, keys, self.score_weight, key_lengths=lengths)  # (B, N)
            here = scores.masked_fill(visited, -torch.inf).argmax(-1)
            visited[batch, here] = here != 0  # back at point 0 the hull is closed
        paths = torch.stack(path, 1).tolist()
        return [corners[: [*corners[1:], 0].index(0) + 1] for corners in paths]


def plain_scores(query, key, score_weight, *, key_lengths):
    """attn_ext.additive_scores as one would write it by hand."""
    scores = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ score_weight
    is_padding = torch.arange(key.size(1)) >= key_lengths[:, None, None]
    return scores.masked_fill(is_padding, -torch.inf)


def train_step(model, optimizer, points, lengths, hulls):
    log_probabilities = model(points, lengths, hulls[:, :-1].clamp(min=0))
    target = hulls[:, 1:].flatten()
    loss = nn.functional.nll_loss(log_probabilities.flatten(0, 1), target, ignore_index=-1)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def draw(path, examples):
    """True hulls are dashed, found ones blue, or red where they are wrong."""
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    for axes, (points, hull, found) in zip(figure.subplots(2, 4).flat, examples):
        points = points.numpy()
        axes.plot(*points[[*hull, 0]].T, "--", color="0.6", linewidth=4)
        axes.plot(*points[[*found, 0]].T, color="tab:blue" if found == hull else "tab:red")
        axes.plot(*points.T, "k.")
        title = f"{len(points)} points, {'right' if found == hull else 'wrong'}"
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=[], yticks=[], title=title)
        axes.set_aspect("equal")
    figure.savefig(path, dpi=80, format="png")


def main(arguments=None):
    options = read_options(__doc__, "pointer_network.png", arguments)
    steps, tests = (20, 20) if options.fast else (3000, 500)
    model = PointerNetwork()
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in range(1, steps + 1):
        batch = make_batch(64, FEWEST, MOST)
        loss = train_step(model, optimizer, *batch)
        schedule.step()
        if step == 1 or step % (steps // 5) == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)

    drawn = []
    for count in (5, 10, 20, 50):
        points, lengths, hulls = make_batch(tests, count, count)
        hulls = [hull[: hull.index(0, 1)] for hull in hulls.tolist()]
        found = model.find(points, lengths)
        right = sum(map(list.__eq__, found, hulls)) / tests
        covered = [area(p, f) / area(p, h) for p, f, h in zip(points, found, hulls)]
        print(f"{count} points{' (more than in training)' * (count > MOST)}: ", end="")
        print(f"{right:.1%} of hulls exactly, {sum(covered) / tests:.2%} of their area")
        # A wrong one of each, where there is any, and right ones.
        cases = sorted(zip(points, hulls, found), key=lambda case: case[1] == case[2])
        drawn += {5: [], 10: cases[:1] + cases[-1:]}.get(count, cases[:1] + cases[-2:])
    draw(options.out, drawn)
    compare(train_step, model, PointerNetwork(plain_scores), batch, 2 if options.fast else 50)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
