"""The small task on fedsim: a client that computes clipped sums, and the server's few lines around the dispatcher.

Gradients are those of all of a user's sentences. One local step of learning rate η, clipped to C, is η times the
gradient clipped to C / η: so this is asked for, and the mean multiplied by η.
"""

import time

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from transformers import OPTConfig, OPTForCausalLM

from benchmarks.engine.small_task import PAD, Task, make_model, make_users
from fedsim.clip import Clip
from fedsim.engine.grid import WaitingGrid
from fedsim.engine.messages import TrainReply, TrainRequest
from fedsim.gradients import CausalLanguageModel, ParameterLayout, clipped_sum
from fedsim.rows import TokenRows
from server.dispatch import Dispatcher


def make_opt(task: Task) -> OPTForCausalLM:
    """The task's model as Hugging Face's, with the same initial weights."""
    config = OPTConfig(
        vocab_size=task.vocabulary,
        hidden_size=task.width,
        word_embed_proj_dim=task.width,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        ffn_dim=task.feed_forward,
        max_position_embeddings=task.length + 1,
        do_layer_norm_before=False,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=PAD,
    )
    model = OPTForCausalLM(config).eval()
    named = dict(make_model(task).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(opt_parameter(name, {n: p.detach().numpy() for n, p in named.items()})))
    return model


MICRO_BATCH_TOKENS = 2048
"""What is quickest for a model as small; --engine.max-tokens 2048 asks for it in a run."""
PARTS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
NAMES = {
    "self_attn.out_proj": "attention_out",
    "self_attn_layer_norm": "after_attention",
    "fc1": "mlp_in",
    "fc2": "mlp_out",
    "final_layer_norm": "after_mlp",
}


def opt_parameter(name: str, named: dict[str, np.ndarray]) -> np.ndarray:
    """A parameter of the Hugging Face model, made of those of the task's module."""
    inner = name.removeprefix("model.decoder.")
    if inner == "embed_tokens.weight":
        return named["words.weight"]
    if inner == "embed_positions.weight":  # the first two of its places are never used
        return np.concatenate([np.zeros_like(named["positions.weight"][:2]), named["positions.weight"]])
    _, block, rest = inner.split(".", 2)
    layer, _, kind = rest.rpartition(".")
    if (part := PARTS.get(layer.removeprefix("self_attn."))) is not None:
        return np.split(named[f"blocks.{block}.attention_in.{kind}"], 3)[part]
    return named[f"blocks.{block}.{NAMES[layer]}.{kind}"]


def client_app(task: Task) -> ClientApp:
    """A ClientApp that holds the model and all users."""
    model = make_opt(task)
    users = [[sentence.astype(np.int32) for sentence in sentences] for sentences in make_users(task)]
    layout = ParameterLayout.of(model)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        began = time.process_time(), time.perf_counter()
        request = TrainRequest.from_record(message.content)
        layout.load(model, torch.from_numpy(np.array(request.parameters)))
        rows, unit_ids = _rows_of([users[unit] for unit in request.units])
        result = clipped_sum(
            model,
            rows,
            unit_ids,
            request.clip,
            objective=CausalLanguageModel(),
            weighting="tokens",
            max_tokens=MICRO_BATCH_TOKENS,
        )
        reply = TrainReply(
            round=request.round,
            units=request.units,
            total=result.total.numpy(),
            statistics={
                "processor_seconds": time.process_time() - began[0],
                "seconds": time.perf_counter() - began[1],
            },
        )
        return Message(reply.to_record(), reply_to=message)

    return app


def _rows_of(users: list[list[np.ndarray]]) -> tuple[TokenRows, np.ndarray]:
    sentences = [sentence for user in users for sentence in user]
    offsets = np.concatenate([[0], np.cumsum([len(sentence) for sentence in sentences])])
    unit_ids = np.repeat(np.arange(len(users)), [len(user) for user in users])
    return TokenRows(tokens=np.concatenate(sentences), offsets=offsets), unit_ids


def train(grid: WaitingGrid, task: Task, rounds: int, noise_multiplier: float) -> tuple[np.ndarray, np.ndarray]:
    """Each round's seconds, and processor seconds of this process and all workers, [rounds, 2]; and the final flat
    parameters. Users come in order, cohort by cohort."""
    model = make_opt(task)
    flat = torch.nn.Parameter(ParameterLayout.of(model).flatten(model))
    adam = torch.optim.Adam([flat], task.learning_rate, betas=task.betas, eps=task.epsilon, fused=True)
    clip = Clip(norm=task.clip_norm / task.local_learning_rate)
    sizes = np.array([sum(map(len, sentences)) for sentences in make_users(task)])
    dispatcher = Dispatcher(grid)
    rng = np.random.default_rng(0)
    seconds = []
    for round in range(rounds):
        began = time.perf_counter(), time.process_time()
        units = np.arange(round * task.cohort, (round + 1) * task.cohort) % task.users
        request = TrainRequest(round=round, units=units, clip=clip, parameters=flat.detach().numpy())
        gathered = dispatcher.gather(request, sizes[units])
        total = gathered.total
        if noise_multiplier:
            total += noise_multiplier * clip.norm * rng.standard_normal(len(total), dtype=np.float32)
        total *= task.local_learning_rate / task.cohort
        flat.grad = torch.from_numpy(total)
        adam.step()
        of_workers = 0.0 if grid.in_process else gathered.statistics["processor_seconds"]
        seconds.append((time.perf_counter() - began[0], time.process_time() - began[1] + of_workers))
    return np.array(seconds), flat.detach().numpy()


def measure(grid: WaitingGrid, task: Task, rounds: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """As of `train`, and the parameters by name after one round without noise."""
    _, after_one = train(grid, task, 1, 0.0)
    seconds, _ = train(grid, task, rounds, task.noise_multiplier)
    layout = ParameterLayout.of(make_opt(task))
    return seconds, {name: view.numpy() for name, view in layout.views(torch.from_numpy(after_one)).items()}
