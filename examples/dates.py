"""A date normaliser, "5 March 2021" to "2021-03-05": the smallest sequence-to-sequence model.

    pip install matplotlib
    python examples/dates.py

In training the decoder knows all its inputs (teacher forcing), so that one call of
attn_ext.AdditiveAttention serves all its steps. When it writes a date by itself, memory() prepares
the source once and attend() is called step by step. The picture shows which characters of the
source each character of the date was written from.
"""

import random
from datetime import date, timedelta

import torch
from beside import compare, read_options
from matplotlib.figure import Figure
from torch import nn

import attn_ext

MONTHS = "January February March April May June July August September October November December"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
PADDING, START = 0, 1  # below the numbers of the characters
DATE_LENGTH = len("2021-03-05")


def random_date(rng, held_out=False):
    """A date as somebody might write it, and as ISO 8601 has it; every tenth day is held out."""
    number = rng.randrange(4_400) * 10 + (0 if held_out else rng.randrange(1, 10))
    day = date(1930, 1, 1) + timedelta(days=number)
    month, weekday = MONTHS.split()[day.month - 1], DAYS.split()[day.weekday()]
    ending = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}.get(day.day, "th")
    written = rng.choice([
        f"{day.day} {month} {day.year}",
        f"{month} {day.day}, {day.year}",
        f"{month[:3]} {day.day}{ending}, {day.year}",
        f"{weekday}, {month} {day.day}, {day.year}",
        f"{weekday[:3]} {day.day} {month[:3]} {day.year}",
        f"the {day.day}{ending} of {month}, {day.year}",
        f"{day.day}.{day.month}.{day.year}",
        f"{day.year}/{day.month:02}/{day.day:02}",
    ])  # fmt: skip
    return written, day.isoformat()


def encode(texts):
    """Numbers of the characters (B, longest), padded with 0, and the lengths (B,)."""
    rows = [torch.tensor([ord(character) for character in text]) for text in texts]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
    return padded, torch.tensor([len(text) for text in texts])


def examples(rng, count):
    """Sources (B, Tk), their lengths (B,) and targets (B, Tq)."""
    written, iso = zip(*(random_date(rng) for _ in range(count)))
    return *encode(written), encode(iso)[0]


class DateNormaliser(nn.Module):
    def __init__(self, attention=attn_ext.AdditiveAttention, width=64):
        super().__init__()
        self.embedding = nn.Embedding(128, width)  # ASCII
        self.encoder = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.attention = attention(width, width, width)
        self.output = nn.Linear(2 * width, 128)

    def encode(self, source, lengths):
        rows = nn.utils.rnn.pack_padded_sequence(
            self.embedding(source), lengths, batch_first=True, enforce_sorted=False
        )
        return nn.utils.rnn.pad_packed_sequence(self.encoder(rows)[0], batch_first=True)[0]

    def forward(self, source, lengths, target):
        """Scores of the characters (B, Tq, 128) at all steps, the characters before being known."""
        states = self.encode(source, lengths)  # (B, Tk, width)
        before = nn.functional.pad(target[:, :-1], (1, 0), value=START)
        queries, _ = self.decoder(self.embedding(before))  # (B, Tq, width)
        context = self.attention(queries, states, key_lengths=lengths)
        return self.output(torch.cat([queries, context], -1))

    @torch.no_grad()
    def write(self, source, lengths):
        """The most probable characters (B, Tq), one by one, and attention (B, Tq, Tk)."""
        memory = self.attention.memory(self.encode(source, lengths), key_lengths=lengths)
        character = torch.full((len(source), 1), START)
        state, written, alignment = None, [], []
        for _ in range(DATE_LENGTH):
            query, state = self.decoder(self.embedding(character), state)
            context, weights = memory.attend(query[:, 0], need_weights=True)
            character = self.output(torch.cat([query[:, 0], context], -1)).argmax(-1, keepdim=True)
            written.append(character)
            alignment.append(weights)
        return torch.cat(written, 1), torch.stack(alignment, 1)


class PlainAttention(attn_ext.AdditiveAttention):
    """The same with the same parameters, as one would write it by hand."""

    def forward(self, query, key, *, key_lengths):
        queries, keys = self.query_proj(query), self.key_proj(key)
        scores = torch.tanh(queries.unsqueeze(2) + keys.unsqueeze(1)) @ self.score_weight
        is_padding = torch.arange(key.size(1)) >= key_lengths[:, None, None]
        return scores.masked_fill(is_padding, -torch.inf).softmax(-1) @ key


def train_step(model, optimizer, source, lengths, target):
    scores = model(source, lengths, target)  # (B, Tq, 128)
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def draw(path, written, iso, weights):
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="read", ylabel="written")
    image = axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(written)), written)
    axes.set_yticks(range(len(iso)), iso)
    figure.colorbar(image, label="attention")
    figure.savefig(path, dpi=100, format="png")


def main(arguments=None):
    options = read_options(__doc__, "dates.png", arguments)
    rng = random.Random(0)
    steps, tests = (20, 100) if options.fast else (600, 500)

    model = DateNormaliser()
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, steps)
    for step in range(1, steps + 1):
        batch = examples(rng, 64)
        loss = train_step(model, optimizer, *batch)
        schedule.step()
        if step == 1 or step % (steps // 5) == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)

    held_out = [random_date(rng, held_out=True) for _ in range(tests)]
    source, lengths = encode([written for written, _ in held_out])
    numbers, alignment = model.write(source, lengths)
    found = ["".join(map(chr, row)) for row in numbers.tolist()]
    right = sum(text == iso for text, (_, iso) in zip(found, held_out))
    print(f"dates never seen in training: {right} of {len(held_out)} right, such as")
    for text, (written, _) in zip(found, held_out[:5]):
        print(f"  {written} -> {text}")

    longest = max(range(len(held_out)), key=lambda number: len(held_out[number][0]))
    written, text = held_out[longest][0], found[longest]
    draw(options.out, written, text, alignment[longest, :, : len(written)])
    compare(train_step, model, DateNormaliser(PlainAttention), batch, 2 if options.fast else 50)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
