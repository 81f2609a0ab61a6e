"""How good a model is: BLEU and chrF next to two baselines, samples, pictures."""

import json

import torch

from attn_ext.nmt import heatmap
from attn_ext.nmt.cli import atomic_write, require
from attn_ext.nmt.model import Seq2Seq
from attn_ext.nmt.translator import Translator

RESULTS_FILE = "results.json"
SAMPLES = 10
PICTURES = 4


def bleu_chrf(outputs, references):
    """Corpus BLEU and chrF by sacrebleu."""
    metrics = require("sacrebleu.metrics")
    bleu = metrics.BLEU(effective_order=False).corpus_score(outputs, [references]).score
    chrf = metrics.CHRF().corpus_score(outputs, [references]).score
    return {"bleu": round(bleu, 2), "chrf": round(chrf, 2)}


def signatures():
    """What sacrebleu needs to be told to repeat our scores."""
    metrics = require("sacrebleu.metrics")
    result = {}
    for name, metric in (("bleu", metrics.BLEU(effective_order=False)), ("chrf", metrics.CHRF())):
        metric.corpus_score(["a"], [["a"]])  # it knows the number of references only then
        result[name] = str(metric.get_signature())
    return result


def greedy_bleu(vocabulary, pairs, device):
    """A function that scores a model on `pairs` by greedy search."""
    sources, references = [pair.source for pair in pairs], [pair.target for pair in pairs]

    def score(model):
        outputs = Translator(model, vocabulary, device).translate(sources, beam=1)
        return bleu_chrf(outputs, references)["bleu"]

    return score


def report(model, vocabulary, split, folder, *, beam, seed, backend, device):
    """Write results.json and pictures, then print scores, samples and the pictures' paths."""
    translator = Translator(model, vocabulary, device)
    results, outputs = {}, {}
    for name, width in (("dev", 1), ("test", beam)):
        pairs = getattr(split, name)
        sources = [pair.source for pair in pairs]
        references = [pair.target for pair in pairs]
        print(f"translating {len(pairs)} sentences of {name}, beam {width}", flush=True)
        outputs[name] = translator.translate(sources, width)
        results[name] = {
            "sentences": len(pairs),
            "beam": width,
            "trained": bleu_chrf(outputs[name], references),
            "source copied": bleu_chrf(sources, references),
        }
    torch.manual_seed(seed)
    untrained = Seq2Seq(model.config, backend).to(device).eval()
    print(f"the same for test with an untrained model, beam {width}", flush=True)
    translations = Translator(untrained, vocabulary, device).translate(sources, width)
    results["test"]["untrained"] = bleu_chrf(translations, references)

    results["sacrebleu"] = signatures()
    results["pictures"] = []
    for number, pair in enumerate(picture_pairs(split.test, vocabulary), start=1):
        path = folder / f"attention-{number}.png"
        attention = translator.attention(pair.source, beam=beam)
        heatmap.draw(path, attention, title=f"{pair.source}\n{attention.target}")
        results["pictures"].append(path.name)
    atomic_write(folder / RESULTS_FILE, json.dumps(results, indent=2) + "\n")

    print(f"\n{'':6}{'sentences':>10}  {'model':14}{'BLEU':>7}{'chrF':>7}")
    for name in outputs:
        result = results[name]
        for system in ("trained", "untrained", "source copied"):
            if system in result:
                scores = result[system]
                print(f"{name:6}{result['sentences']:>10}  {system:14}"
                      f"{scores['bleu']:>7.1f}{scores['chrf']:>7.1f}")  # fmt: skip

    for name, signature in results["sacrebleu"].items():
        print(f"{name} by sacrebleu, {signature}")

    print("\nHeld-out sentences:")
    phrases = [i for i, pair in enumerate(split.test) if len(pair.source.split()) >= 3]
    for index in spread(phrases or range(len(split.test)), SAMPLES):
        print(f"\n  source     {split.test[index].source}")
        print(f"  reference  {split.test[index].target}")
        print(f"  output     {outputs['test'][index]}")

    print("\nWhere the model looked:")
    for name in results["pictures"]:
        print(f"  {folder / name}")


def picture_pairs(pairs, vocabulary):
    """Sentences long enough to show an alignment and short enough to read."""
    fitting = [
        pair
        for pair in pairs
        if 5 <= len(pair.source.split()) <= 12 and len(vocabulary.encode(pair.source)) <= 18
    ]
    return spread(fitting or pairs, PICTURES)


def spread(items, count):
    """At most `count` items, evenly from all."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
