"""The default model: made on first use, then found in the cache."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from filelock import FileLock
from transformers import GPT2Config, GPT2LMHeadModel

from fedsim.cache import written_to
from fedsim.errors import InvalidInput
from fedsim.models.config import SmallModelConfig
from fedsim.models.pretrain import pack_rows, pretrain
from fedsim.models.quiet import quiet_transformers
from fedsim.models.tokenizer import train_tokenizer

INITIAL_SPREAD = 0.04
"""Standard deviation of the initial weights; twice GPT-2's, since few steps follow."""

RECIPE = 1
"""Raised whenever the same configuration and text would give other weights, so that stale caches are not found."""


def small_model_folder(
    config: SmallModelConfig,
    *,
    texts: Callable[[], Iterable[str]],
    cache: Path,
    seed: int = 0,
    threads: int = 2,
    progress: bool = True,
) -> Path:
    """The folder of the default model in Hugging Face format, pre-trained now if it is not there yet.

    The folder is named by a hash of the configuration, the seed and the text, and appears complete or not at all.
    Processes that ask for the same model at the same time wait for the one that makes it.

    Args:
        config: Shape and pre-training.
        texts: Gives the public texts. The model repeats what it reads: nothing private may be among them.
        cache: Folder for models; made if need be.
        seed: Seed of initialisation and order.
        threads: CPU threads; does not change the weights.
        progress: Show a progress bar while training.

    Raises:
        InvalidInput: There is no public text, or the cache cannot be written.
    """
    public = list(texts())
    if not any(text.strip() for text in public):
        raise InvalidInput("public_texts", f"{len(public)} texts", "at least one text that is not empty")
    folder = cache / "models" / f"small-{_key(config, seed, public)}"
    if folder.exists():
        return folder
    with written_to(cache):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    try:
        if not folder.exists():
            _make(folder, config, public, seed, threads, progress)
    finally:
        lock.release()
    return folder


def _key(config: SmallModelConfig, seed: int, texts: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=10)
    digest.update(json.dumps([RECIPE, seed, dataclasses.asdict(config)], sort_keys=True).encode())
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _make(folder: Path, config: SmallModelConfig, texts: list[str], seed: int, threads: int, progress: bool) -> None:
    tokenizer = train_tokenizer(texts, config.vocabulary_size)
    tokenizer.model_max_length = config.context
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    rows = pack_rows(encoded, config.context, tokenizer.eos_token_id, seed)
    model = _initialised(config, len(tokenizer), tokenizer.eos_token_id, seed)
    history = pretrain(model, rows, config, seed=seed, threads=threads, progress=progress)
    unfinished = Path(tempfile.mkdtemp(prefix=".small-", dir=folder.parent))
    try:
        # Known from here on: in training nothing is padded, and transformers would look for padding in every batch.
        model.config.pad_token_id = tokenizer.pad_token_id
        with quiet_transformers():
            model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        record = {"config": dataclasses.asdict(config), "seed": seed, "texts": len(texts), "training_loss": history}
        (unfinished / "pretraining.json").write_text(json.dumps(record))
        os.chmod(unfinished, 0o755)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _initialised(config: SmallModelConfig, vocabulary: int, end_of_text: int, seed: int) -> GPT2LMHeadModel:
    shape = GPT2Config(
        vocab_size=vocabulary,
        n_positions=config.context,
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.heads,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        initializer_range=INITIAL_SPREAD,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(shape)
    model.train(False)
    return model
