"""dp-transformers (Microsoft) as its author-level example fine-tunes on Reddit: its trainer with a mapping of authors.

An epoch takes one row of each author once. Epochs are as many as make up the gradient evaluations.
"""

import tempfile

import dp_transformers
import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from dp_transformers.dp_utils import OpacusDPTrainer, create_author_mapping
from side import Clock, leave, load_model, load_rows, opened, versions

# Released before Trainer wrapped optimizers: its callback speaks to Opacus's through the wrapper.
AcceleratedOptimizer.signal_skip_step = lambda self, do_skip=True: self.optimizer.signal_skip_step(do_skip)


def collate(examples):
    """Rows of equal length, and positions as the library's own collator makes them for Opacus."""
    ids = torch.tensor([example["input_ids"] for example in examples])
    places = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": places}


def main():
    folder, task = opened()
    rows, users = load_rows(folder)
    labelled = Dataset.from_dict({"input_ids": rows, "author": users})
    authors = create_author_mapping(labelled, author="author")
    batches = len(authors) // task.gradients
    epochs = max(1, round(task.steps / batches))
    with tempfile.TemporaryDirectory() as output:
        trainer = OpacusDPTrainer(
            args=dp_transformers.TrainingArguments(
                output_dir=output,
                num_train_epochs=epochs,
                per_device_train_batch_size=task.gradients,
                learning_rate=task.learning_rate,
                lr_scheduler_type="constant",
                max_grad_norm=0,
                save_strategy="no",
                report_to="none",
                no_cuda=True,
                seed=task.seed,
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            model=load_model(folder).train(),
            train_dataset=labelled.remove_columns("author"),
            privacy_args=dp_transformers.PrivacyArguments(
                target_epsilon=task.epsilon, target_delta=task.delta, per_sample_max_grad_norm=task.clip_norm
            ),
            author_mapping=authors,
            data_collator=collate,
        )
        clock = Clock()
        trainer.train()
        times = clock.read()
    leave(
        folder,
        trainer.model,
        **times,
        gradients=trainer.state.global_step * task.gradients,
        stated_epsilon=trainer.get_prv_epsilon(),
        mechanism={
            "kind": "shuffled-epochs",
            "epochs": epochs,
            "noise_multiplier": trainer.privacy_args.noise_multiplier,
        },
        versions=versions("opacus", "dp-transformers", "prv-accountant"),
    )


if __name__ == "__main__":
    main()
