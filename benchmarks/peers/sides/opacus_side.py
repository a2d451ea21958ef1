"""Opacus as its tutorials fine-tune language models: PrivacyEngine around model, Adam and a loader of rows.

Where the task gives a noise multiplier, `make_private` with it on some rows of each user: what one who wants a
guarantee for users can make of it.
"""

import numpy as np
import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from side import Clock, at_most, leave, load_model, load_rows, opened, row_losses, versions
from torch.utils.data import DataLoader, TensorDataset

PHYSICAL_BATCH = 64


def train(model, adam, loader, steps):
    """Take so many steps; returns the rows that they took, which differ from step to step."""
    done = evaluated = 0
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=PHYSICAL_BATCH, optimizer=adam) as parts:
        while done < steps:
            for (rows,) in parts:
                adam.zero_grad()
                row_losses(model, rows).mean().backward()
                adam.step()
                evaluated += len(rows)
                done += not adam._is_last_step_skipped
                if done == steps:
                    break
    return evaluated


def main():
    folder, task = opened()
    torch.manual_seed(task.seed)
    rows, users = load_rows(folder)
    kept = np.arange(len(rows))
    if task.noise_multiplier is not None:
        kept = at_most(rows, users, task.group_size, task.seed)
    loader = DataLoader(TensorDataset(torch.from_numpy(rows[kept])), batch_size=task.gradients)
    epochs = (task.steps + 0.5) / len(loader)  # it takes the whole steps in them
    model = load_model(folder).train()
    adam = torch.optim.Adam(model.parameters(), lr=task.learning_rate)
    engine = PrivacyEngine()
    parts = {"module": model, "optimizer": adam, "data_loader": loader, "max_grad_norm": task.clip_norm}
    if task.noise_multiplier is None:
        model, adam, loader = engine.make_private_with_epsilon(
            **parts, target_epsilon=task.epsilon, target_delta=task.delta, epochs=epochs
        )
    else:
        model, adam, loader = engine.make_private(**parts, noise_multiplier=task.noise_multiplier)
    clock = Clock()
    evaluated = train(model, adam, loader, task.steps)
    leave(
        folder,
        model,
        **clock.read(),
        gradients=evaluated,
        stated_epsilon=engine.get_epsilon(task.delta),
        mechanism={
            "kind": "poisson-rows",
            "probability": loader.sample_rate,
            "noise_multiplier": adam.noise_multiplier,
            "steps": task.steps,
            "most_rows": int(np.bincount(users[kept]).max()),
        },
        versions=versions("opacus"),
    )


if __name__ == "__main__":
    main()
