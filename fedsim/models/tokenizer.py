"""The default model's tokenizer: byte-level BPE, learnt from public text."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""The one special token: begins and ends a text, and fills a batch up where its mask is 0."""


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE tokenizer (Sennrich et al. 2016, over bytes as in GPT-2).

    Every string can be encoded and decodes to itself, whatever its script. The result depends on the texts and the
    size alone. It must be learnt from public text: its vocabulary repeats what it has read.

    Args:
        texts: Public texts.
        vocabulary_size: Most tokens, at least 257: the 256 bytes and the end-of-text token. Little text gives fewer.

    Returns:
        A Hugging Face tokenizer whose end-of-text token has id 0 and serves as bos, eos, pad and unk token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it without types
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
