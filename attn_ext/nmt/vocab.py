"""Subwords: one sentencepiece vocabulary for both languages."""

import io
import re

from attn_ext.nmt.cli import UsageError, require

LEAST_SIZE = 260  # the 256 bytes, three marks and the start of a word


class Vocabulary:
    """Text to subword ids and back. Without padding: nothing here is padded."""

    def __init__(self, model_bytes):
        sentencepiece = require("sentencepiece")
        self.model_bytes = bytes(model_bytes)
        if not self.model_bytes:  # sentencepiece would take that for no model yet
            raise UsageError("not a sentencepiece model: it is empty")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"not a sentencepiece model: {error}") from None
        self.bos = self._processor.bos_id()
        self.eos = self._processor.eos_id()

    @classmethod
    def train(cls, sentences, size):
        """Learn at most `size` subwords. One thread, so that equal data give equal subwords."""
        sentencepiece = require("sentencepiece")
        model = io.BytesIO()
        if size < LEAST_SIZE:
            raise UsageError(f"--vocab-size {size} is too small; at least {LEAST_SIZE} are needed")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                model_type="unigram",
                vocab_size=size,
                hard_vocab_limit=False,
                character_coverage=0.9999,
                byte_fallback=True,  # no unknown words: rare characters become bytes
                normalization_rule_name="identity",
                add_dummy_prefix=True,
                max_sentence_length=1 << 20,
                num_threads=1,
                pad_id=-1,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            # "Vocabulary size is smaller than required_chars. 280 vs 281. ..."
            if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
                raise UsageError(
                    f"--vocab-size {size} is too small: at least {least[1]} are needed for the "
                    "marks, bytes and characters of these data"
                ) from None
            raise UsageError(
                f"cannot learn {size} subwords from these data ({reason}); try --vocab-size"
            ) from None
        return cls(model.getvalue())

    def __len__(self):
        return self._processor.get_piece_size()

    def encode(self, text):
        return self._processor.encode(text)

    def encode_all(self, texts):
        """The ids of each text, in one thread: faster than one by one."""
        return self._processor.encode(texts, num_threads=1)

    def decode(self, ids):
        return self._processor.decode([int(i) for i in ids if i not in (self.bos, self.eos)])

    def pieces(self, ids):
        """What each id stands for, as a person would label it; `▁` marks the start of a word."""
        names = {self.bos: "<s>", self.eos: "</s>"}
        return [names.get(i, self._processor.id_to_piece(i)) for i in map(int, ids)]
