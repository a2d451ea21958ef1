"""Fine-tune on text of your own, by user, and write with the private model.

    python examples/own_text.py                          # notes that are made up here
    python examples/own_text.py posts.jsonl MODEL        # your own: a line each, {"user_id": …, "text": …}

MODEL is a name on the Hugging Face hub or a folder; without it a small GPT-2 is pre-trained on public text, once.
"""

import random
import sys
from typing import Any

from fedsim import fine_tune


def made_up(users: int = 300, notes: int = 12) -> list[dict[str, Any]]:
    """Notes of users who each have a few topics that they come back to."""
    draw = random.Random(0)
    topics = ["the budget", "the new office", "the release", "the garden party", "the train to work", "lunch"]
    moods = ["is going well", "needs more time", "was moved to Friday", "is all we talk about", "is over at last"]
    rows = []
    for user in range(users):
        own = draw.sample(topics, 2)
        for _ in range(notes):
            text = f"A short note about {draw.choice(own)}: it {draw.choice(moods)}."
            rows.append({"user_id": f"user {user}", "text": text})
    return rows


def main(data: str | None = None, model: str = "default") -> None:
    tuned = fine_tune(
        model,
        made_up() if data is None else data,
        epsilon=8,
        delta=1e-3,
        rounds=8,
        gradients_per_round=128,
        learning_rate=3e-3,
        evaluation_every=2,
    )
    for record in tuned.metrics:
        if "loss" in record:
            print(f"round {record['round']}: held-out loss {record['loss']:.3f}, ε spent {record['epsilon']:.2f}")
    print(tuned)
    prompt = tuned.tokenizer("A short note about", return_tensors="pt").to(tuned.model.device)
    written = tuned.model.generate(**prompt, max_new_tokens=16, do_sample=True, top_p=0.9)
    print(tuned.tokenizer.decode(written[0], skip_special_tokens=True))
    print(f"the report: {tuned.report()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
