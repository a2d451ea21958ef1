"""DPTrainer (JetBrains Research) as its README fine-tunes a causal language model: a Trainer with privacy arguments.

Gradients are not accumulated, as there: Trainer's loss is then a mean over the rows at hand. Where they are, it is
divided by the rows of all accumulated batches, and a row's gradient depends on their number before it is clipped.
"""

import tempfile

import numpy as np
from datasets import Dataset
from dptrainer import DPTrainer, PrivacyArguments
from side import Clock, leave, load_model, load_rows, opened, versions
from transformers import TrainingArguments, default_data_collator

PARTS = 1.5
"""Of a Poisson sample on average: one that is larger than expected comes in two, and Trainer takes each for a step."""


def main():
    folder, task = opened()
    rows, users = load_rows(folder)
    batches = -(-len(rows) // task.gradients)
    model = load_model(folder).train()
    privacy = PrivacyArguments(
        target_epsilon=task.epsilon, target_delta=task.delta, per_sample_max_grad_norm=task.clip_norm
    )
    with tempfile.TemporaryDirectory() as output:
        trainer = DPTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=output,
                num_train_epochs=PARTS * task.steps / batches,
                per_device_train_batch_size=task.gradients,
                learning_rate=task.learning_rate,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                seed=task.seed,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
            privacy_args=privacy,
            data_collator=default_data_collator,
        )
        clock = Clock()
        trainer.train()
        times = clock.read()
    history = trainer.dp_callback.accountant.history
    steps = sum(count for _, _, count in history)
    leave(
        folder,
        trainer.detach_model(),
        **times,
        gradients=steps * task.gradients,
        stated_epsilon=trainer.dp_callback.accountant.get_epsilon(task.delta),
        mechanism={
            "kind": "poisson-rows",
            "probability": 1 / batches,
            "noise_multiplier": history[0][0],
            "steps": steps,
            "most_rows": int(np.bincount(users).max()),
        },
        versions=versions("opacus", "dptrainer", "accelerate"),
    )


if __name__ == "__main__":
    main()
