"""Which digit decides? Attention pooling of bags, of which only the whole has a label.

    pip install scikit-learn matplotlib
    python examples/attention_pooling.py

The bags are those of Ilse, Tomczak and Welling ("Attention-based Deep Multiple Instance Learning",
2018), with scikit-learn's 8x8 digits for MNIST's: a bag is positive if it holds a 9, and nobody
says where. Bags of 5 to 100 digits lie one after the other, without padding: attn_ext.AdditivePool
takes the offsets where they begin.
"""

import sys

import torch
from beside import compare, read_options
from matplotlib.figure import Figure
from torch import nn

import attn_ext

try:
    from sklearn.datasets import load_digits
except ImportError:
    sys.exit("The package scikit-learn is missing: pip install scikit-learn matplotlib")

NINE = 9  # makes a bag positive
SMALLEST, LARGEST = 5, 100  # digits of a bag
TRAINING = 1200  # of the 1797 images; the others are for bags to test with


def make_bags(digits, images, count, largest=LARGEST):
    """Draw bags, every other one with a single 9.

    Args:
        digits: (N,) what the images show.
        images: (N,) their numbers, of those to draw from.

    Returns:
        images (total,), one bag after the other; offsets (count + 1,), where bags begin and end;
        labels (count,), 1 for positive bags.
    """
    nines, others = images[digits[images] == NINE], images[digits[images] != NINE]
    sizes = torch.randint(SMALLEST, largest + 1, (count,))
    offsets = nn.functional.pad(sizes.cumsum(0), (1, 0))
    bags = others[torch.randint(len(others), (int(offsets[-1]),))]
    labels = torch.arange(count) % 2
    places = offsets[:-1] + (torch.rand(count) * sizes).long()  # one in each bag
    bags[places[labels == 1]] = nines[torch.randint(len(nines), (int(labels.sum()),))]
    return bags, offsets, labels.float()


class BagClassifier(nn.Module):
    def __init__(self, pool=attn_ext.AdditivePool, width=64):
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(128, width), nn.ReLU(), nn.Dropout(0.2),
        )  # fmt: skip
        self.pool = pool(width, width)
        self.output = nn.Linear(width, 1)

    def forward(self, pixels, offsets):
        """Scores (B,) of bags and weights (total,) of what is in them, ``pixels`` (total, 64)."""
        bags, weights = self.pool(self.embed(pixels), cu_seqlens_k=offsets, need_weights=True)
        return self.output(bags).squeeze(-1), weights


class PlainPool(attn_ext.AdditivePool):
    """Gated attention pooling with the same parameters, as one would write it by hand."""

    def forward(self, key, *, cu_seqlens_k, need_weights):
        count, total = len(cu_seqlens_k) - 1, len(key)
        bag = torch.arange(count).repeat_interleave(cu_seqlens_k.diff(), output_size=total)
        hidden = torch.tanh(self.key_proj(key)) * torch.sigmoid(self.gate_proj(key))
        scores = hidden @ self.score_weight
        largest = scores.detach().new_full((count,), -torch.inf)
        largest = largest.scatter_reduce(0, bag, scores.detach(), "amax")
        exponentials = (scores - largest[bag]).exp()
        weights = exponentials / scores.new_zeros(count).index_add(0, bag, exponentials)[bag]
        bags = key.new_zeros(count, key.size(1))
        return bags.index_add(0, bag, key * weights.unsqueeze(1)), weights


class MeanPool(nn.Module):
    """Every digit weighs the same."""

    def __init__(self, *_):
        super().__init__()

    def forward(self, key, *, cu_seqlens_k, need_weights):
        sizes = cu_seqlens_k.diff()
        weights = (1 / sizes).repeat_interleave(sizes)
        return torch.segment_reduce(key, "mean", lengths=sizes, axis=0), weights


def train_step(model, optimizer, pixels, offsets, labels):
    scores, _ = model(pixels, offsets)
    loss = nn.functional.binary_cross_entropy_with_logits(scores, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def train(model, digits, pixels, steps):
    """Train, each step on new bags, and return the losses."""
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    losses = []
    for _ in range(steps):
        bags, offsets, labels = make_bags(digits, torch.arange(TRAINING), 32)
        losses.append(train_step(model, optimizer, pixels[bags], offsets, labels))
        schedule.step()
    return losses


def draw(path, pixels, offsets, labels, scores, weights):
    """One bag a row; the redder a digit, the more it weighs."""
    sizes = offsets.diff().tolist()
    figure = Figure(figsize=(0.6 * max(sizes) + 1.5, 0.95 * len(sizes)), layout="constrained")
    bags = zip(pixels.split(sizes), weights.split(sizes), labels, scores.sigmoid())
    for axes, (images, shares, label, score) in zip(figure.subplots(len(sizes)), bags):
        paper = torch.ones(len(images), 8, 8, 3)
        paper[..., 1:] -= 0.7 * shares[:, None, None, None]  # from white to red
        images = paper * (1 - images.view(-1, 8, 8, 1))
        images = nn.functional.pad(images, (0, 0, 0, 2), value=1)  # a gap of two columns
        axes.imshow(images.transpose(0, 1).flatten(1, 2).numpy())  # side by side
        for number, share in enumerate(shares.tolist()):
            axes.text(10 * number + 3.5, -1, f"{share:.2f}", ha="center", fontsize=8)
        name = f"{'with' if label else 'without'} a 9\np = {score:.3f}"
        axes.text(-3, 3.5, name, ha="right", va="center")
        axes.set_xlim(-0.5, 10 * max(sizes))
        axes.axis("off")
    figure.savefig(path, dpi=100, format="png")


def main(arguments=None):
    options = read_options(__doc__, "attention_pooling.png", arguments)
    steps, tests = (60, 200) if options.fast else (1500, 1000)
    data = load_digits()
    order = torch.randperm(len(data.target))
    digits = torch.tensor(data.target)[order]
    pixels = torch.tensor(data.images[order], dtype=torch.float32).flatten(1) / 16
    held_out = torch.arange(TRAINING, len(digits))

    bags, offsets, labels = make_bags(digits, held_out, tests)
    models = {"attention": BagClassifier(), "mean": BagClassifier(MeanPool)}
    for name, model in models.items():
        losses = train(model, digits, pixels, steps)
        with torch.no_grad():
            scores, weights = model.eval()(pixels[bags], offsets)
        # Of a positive and a negative bag, how often the positive one has the larger score.
        auc = (scores[labels == 1].unsqueeze(1) > scores[labels == 0]).float().mean()
        print(f"{name} pooling: loss {losses[0]:.3f} -> {sum(losses[-20:]) / 20:.3f}, ", end="")
        print(f"AUC {auc:.4f} on bags of images never seen", flush=True)
        if name == "attention":
            heaviest = [part.argmax() for part in weights.split(offsets.diff().tolist())]
            found = digits[bags[offsets[:-1] + torch.stack(heaviest)]][labels == 1] == NINE
            print(f"in {found.float().mean():.1%} of the positive bags the 9 weighs most")

    few = make_bags(digits, held_out, 6, largest=12)
    with torch.no_grad():
        scores, weights = models["attention"](pixels[few[0]], few[1])
    draw(options.out, pixels[few[0]], *few[1:], scores, weights)

    bags, offsets, labels = make_bags(digits, torch.arange(TRAINING), 256)
    plain, batch = BagClassifier(PlainPool).eval(), (pixels[bags], offsets, labels)
    compare(train_step, models["attention"], plain, batch, 2 if options.fast else 20)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
