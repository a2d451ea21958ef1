"""Text that a language model goes on with."""

import logging
from typing import Any

import torch

from fedsim.errors import InvalidInput
from fedsim.models.decoding import Decoding, Messages
from fedsim.models.load import LoadedModel
from fedsim.models.quiet import quiet_transformers

logger = logging.getLogger(__name__)


def continued(loaded: LoadedModel, prompt: str | Messages, decoding: Decoding, place: int = 0) -> list[str]:
    """What the model goes on with after a prompt, the prompt left out.

    The same seed, prompt and place give the same text on the same machine, whatever other prompts there are.

    Args:
        loaded: A causal language model.
        prompt: Text, or a conversation that the tokenizer's chat template writes out for the assistant to answer.
        decoding: How tokens are chosen.
        place: Number of the prompt, from 0: each draws from its own stream.

    Raises:
        InvalidInput: The prompt fills the model's context, is empty where the tokenizer has no token to begin with, or
            is a conversation where the tokenizer has no chat template.
    """
    with quiet_transformers():  # which warns of a prompt that is refused here
        tokens = _tokens(loaded, prompt)
    room = decoding.max_new_tokens
    if loaded.context is not None:
        room = min(room, loaded.context - tokens.shape[1])
        if room < 1:
            allowed = f"fewer tokens than the {loaded.context} that the model can read"
            raise InvalidInput("prompt", f"{tokens.shape[1]} tokens", allowed)
        if room < decoding.max_new_tokens:
            logger.warning(
                "prompt %d: %d tokens fit the model's context, not %d", place, room, decoding.max_new_tokens
            )
    model: Any = loaded.model
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if decoding.temperature:
        sampling = {
            "do_sample": True,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k,
        }
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode(), quiet_transformers():
        if decoding.seed is not None:
            torch.manual_seed(decoding.seed + place)
        else:
            torch.seed()
        found = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=room,
            num_return_sequences=decoding.number,
            pad_token_id=loaded.pad_token,
            **sampling,
        )
    read, *texts = loaded.tokenizer.batch_decode([tokens[0], *found], skip_special_tokens=True)
    alone = loaded.tokenizer.batch_decode(found[:, tokens.shape[1] :], skip_special_tokens=True)
    # By itself a continuation would lose the blank that it begins with.
    return [text.removeprefix(read) if text.startswith(read) else own for text, own in zip(texts, alone, strict=True)]


def _tokens(loaded: LoadedModel, prompt: str | Messages) -> torch.Tensor:
    """int64 [1, tokens]."""
    tokenizer: Any = loaded.tokenizer
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif not getattr(tokenizer, "chat_template", None):
        allowed = "left out: the tokenizer has no chat template"
        raise InvalidInput("chat", True, allowed, "Write the prompt as the model was trained to read it.")
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise InvalidInput("prompt", prompt, "at least one token: the tokenizer has none to begin a text with")
        ids = [first]
    return torch.tensor([ids], dtype=torch.long)
