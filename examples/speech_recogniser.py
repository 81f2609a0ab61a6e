"""A tiny speech recogniser, a listener and a speller, for spoken strings of digits.

    pip install matplotlib
    python examples/speech_recogniser.py

espeak-ng speaks them where it is installed; else three tones follow the formants of the words.
Attention is location-sensitive (Chorowski et al. 2015): a convolution of the weights of the step
before adds to the scores, through attn_ext.AttentionMemory's attend(query, features=...).
"""

import random
import shutil
import subprocess
from functools import cache

import numpy as np
import torch
from beside import compare, read_options
from matplotlib.figure import Figure
from torch import nn

import attn_ext

RATE, HOP, BANDS = 22_050, 256, 40  # samples a second, samples a frame, bands of frequencies
END, START = 10, 11  # the tokens beside the ten digits
VOICES = "en en+f2 en+f4 en+m3 en+m5 en+m7 en-us en-us+f3 en-us+m2 en-gb-scotland".split()
WORDS = "zero one two three four five six seven eight nine".split()
SOUNDS = "zIro wAn tu Tri for faIv sIks sevAn eIt naIn".split()  # of the words
FORMANTS = {  # of the sounds, in Hz
    "z": (300, 1800, 5500), "I": (400, 2000, 2550), "r": (350, 1200, 1600), "o": (500, 900, 2400),
    "w": (300, 650, 2300), "A": (700, 1200, 2500), "n": (280, 1700, 2600), "t": (400, 3000, 4500),
    "u": (320, 950, 2250), "T": (400, 1500, 6500), "i": (300, 2300, 3000), "f": (400, 1100, 7500),
    "a": (750, 1300, 2500), "v": (300, 1100, 5000), "s": (400, 4500, 6000), "e": (530, 1850, 2500),
    "k": (400, 1700, 2300), " ": (500, 1500, 2500),
}  # fmt: skip


def speak(digits, rng):
    """Samples from espeak-ng, by a voice and at a speed and pitch chosen at random."""
    command = ["espeak-ng", "--stdout", "-v", rng.choice(VOICES), "-s", str(rng.randint(130, 200))]
    command += ["-p", str(rng.randint(30, 70)), " ".join(WORDS[digit] for digit in digits)]
    wave = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(wave, np.int16, offset=44) / 32768  # after the header of the wave file


def hum(digits, rng):
    """Samples of three tones that follow the formants, at a speed and pitch chosen at random."""
    sounds = " " + "".join(SOUNDS[digit] + rng.choice(["", " "]) for digit in digits) + " "
    ends = np.cumsum([rng.uniform(0.05, 0.15) for _ in sounds])
    seconds = np.arange(int(ends[-1] * RATE)) / RATE
    noise = np.random.default_rng(rng.randrange(2**32)).standard_normal((4, len(seconds)))
    voice = np.interp(seconds, ends, [sound not in " tTfsk" for sound in sounds])
    hiss = np.interp(seconds, ends, [sound in "zvtTfsk" for sound in sounds])
    voice *= 1 + np.cos(2 * np.pi * rng.uniform(90, 220) * seconds)  # the pitch
    samples, size = 0.02 * noise[3], 2 * np.pi * rng.uniform(0.85, 1.2) / RATE  # of the mouth
    for number, formant in enumerate(zip(*(FORMANTS[sound] for sound in sounds))):
        steps = size * np.interp(seconds, ends, formant) + 0.6 * noise[number] * hiss
        samples += np.sin(np.cumsum(steps)) * (voice / (number + 1) + hiss) / 8
    return samples


def spectrogram(samples):
    """The logarithm of the energy in bands of frequencies, (frames, BANDS), about -1 to 2."""
    samples, window = torch.tensor(samples, dtype=torch.float32), torch.hann_window(2 * HOP)
    energy = torch.stft(samples, 2 * HOP, HOP, window=window, return_complex=True).abs() ** 2
    return (nn.functional.avg_pool1d(energy.T, 6)[:, :BANDS] + 1e-4).log() / 4 + 1


def record(count, rng):
    """Pairs of a spectrogram and its digits, of which no two are the same."""
    voice, strings = speak if shutil.which("espeak-ng") else hum, set()
    print(f"{count} strings, by {'the voices of espeak-ng' if voice is speak else 'three tones'}")
    while len(strings) < count:
        strings.add(tuple(rng.randrange(10) for _ in range(rng.randint(3, 7))))
    return [(spectrogram(voice(digits, rng)), digits) for digits in strings]


def make_batch(recordings):
    """Spectrograms (B, frames, BANDS), their lengths (B,), and tokens (B, Tq), -1 past the end."""
    sounds, strings = zip(*recordings)
    tokens = [torch.tensor([*digits, END]) for digits in strings]
    return (
        nn.utils.rnn.pad_sequence(sounds, batch_first=True, padding_value=-1.3),
        torch.tensor([len(sound) for sound in sounds]),
        nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-1),
    )


class SpeechRecogniser(nn.Module):
    def __init__(self, memory=attn_ext.AttentionMemory, width=128, features=8):
        super().__init__()
        self.memory = memory
        self.convolution = nn.Conv1d(BANDS, width, 5, stride=2, padding=2)
        self.listener = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.speller = nn.GRUCell(2 * width, width)
        self.embedding = nn.Embedding(12, width)
        self.query_proj = nn.Linear(width, width)
        self.key_proj = nn.Linear(width, width, bias=False)
        self.location = nn.Conv1d(1, features, 15, padding=7, bias=False)
        self.feature_weight = nn.Parameter(torch.randn(features, width) * features**-0.5)
        self.score_weight = nn.Parameter(torch.randn(width) * width**-0.5)
        self.output = nn.Linear(2 * width, 11)

    def forward(self, sounds, lengths, tokens=None, steps=0):
        """Scores (B, Tq, 11) and attention (B, Tq, Tk); without tokens (B, Tq) by itself."""
        rows = self.convolution(sounds.transpose(1, 2)).relu().transpose(1, 2)
        states, lengths = self.listener(rows)[0], (lengths + 1) // 2
        keys = self.key_proj(states), states, self.score_weight
        memory = self.memory(*keys, key_lengths=lengths, feature_weight=self.feature_weight)
        token = torch.full((len(sounds),), START)
        state = context = states.new_zeros(len(sounds), states.size(-1))
        weights, scores, alignment = states.new_zeros(states.shape[:2]), [], []
        for step in range(steps if tokens is None else tokens.size(1)):
            state = self.speller(torch.cat([self.embedding(token), context], -1), state)
            features = self.location(weights.unsqueeze(1)).transpose(1, 2)  # (B, Tk, F)
            query = self.query_proj(state)
            context, weights = memory.attend(query, features=features, need_weights=True)
            scores.append(self.output(torch.cat([state, context], -1)))
            alignment.append(weights)
            token = scores[-1].argmax(-1) if tokens is None else tokens[:, step].clamp(min=0)
        return torch.stack(scores, 1), torch.stack(alignment, 1)


class PlainMemory:
    """The same attention as one would write it by hand."""

    def __init__(self, key, value, score_weight, *, key_lengths, feature_weight):
        self.key, self.value = key, value
        self.score_weight, self.feature_weight = score_weight, feature_weight
        self.is_padding = torch.arange(key.size(1)) >= key_lengths.unsqueeze(1)

    def attend(self, query, *, features, need_weights):
        sums = query.unsqueeze(1) + self.key + features @ self.feature_weight
        scores = torch.tanh(sums) @ self.score_weight
        weights = scores.masked_fill(self.is_padding, -torch.inf).softmax(-1)
        return (weights.unsqueeze(1) @ self.value).squeeze(1), weights


def train_step(model, optimizer, sounds, lengths, tokens):
    scores, _ = model(sounds, lengths, tokens)
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), tokens.flatten(), ignore_index=-1)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@cache
def distance(found, said):
    """How many digits to insert, remove or replace at least (Levenshtein)."""
    if not found or not said:
        return len(found) + len(said)
    replaced = distance(found[1:], said[1:]) + (found[0] != said[0])
    return min(replaced, distance(found[1:], said) + 1, distance(found, said[1:]) + 1)


def draw(path, sound, said, written, weights):
    weights = weights[: len(written) + 1, : (len(sound) + 1) // 2]
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    (above, below), seconds = figure.subplots(2, sharex=True), len(sound) * HOP / RATE
    above.imshow(sound.T.numpy(), origin="lower", aspect="auto", extent=(0, seconds, 0, BANDS))
    above.set(ylabel="band of frequencies", title="said: " + " ".join(map(str, said)))
    below.imshow(weights.numpy(), cmap="Blues", aspect="auto", extent=(0, seconds, len(weights), 0))
    below.set(xlabel="seconds", ylabel="digit written")
    below.set_yticks(np.arange(len(weights)) + 0.5, [*written, "end"])
    figure.savefig(path, dpi=100, format="png")


def main(arguments=None):
    options = read_options(__doc__, "speech_recogniser.png", arguments)
    rng = random.Random(0)
    count, steps = (18, 10) if options.fast else (1200, 600)
    recordings = record(count, rng)
    held_out, recordings = recordings[: count // 6], recordings[count // 6 :]
    model = SpeechRecogniser()
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for step in range(1, steps + 1):
        batch = make_batch(rng.sample(recordings, min(32, len(recordings))))
        loss = train_step(model, optimizer, *batch)
        schedule.step()
        if step == 1 or step % (steps // 5) == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)

    with torch.no_grad():
        scores, alignment = model(*make_batch(held_out)[:2], steps=10)
    found = [tuple(row[: [*row, END].index(END)]) for row in scores.argmax(-1).tolist()]
    wrong = sum(distance(written, said) for written, (_, said) in zip(found, held_out))
    total = sum(len(said) for _, said in held_out)
    print(f"token error rate on strings never heard: {wrong / total:.2%} of {total} digits")
    draw(options.out, *held_out[0], found[0], alignment[0])
    compare(train_step, model, SpeechRecogniser(PlainMemory), batch, 2 if options.fast else 20)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
