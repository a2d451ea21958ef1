"""ULS against ELS at two ε and two amounts of compute, and what came out as a table.

    python examples/sweep.py [FOLDER] [MODEL]

Interrupted, it goes on when it is called again with the same folder.
"""

import sys

import pandas as pd
from own_text import made_up

from fedsim import sweep


def main(folder: str = "runs/example-sweep", model: str = "default") -> None:
    swept = sweep(
        model,
        made_up(),
        output=folder,
        epsilons=[2, 8],
        compute=[32, 128],
        uls_group_sizes=[1, 4],
        els_group_sizes=[4],
        learning_rates=[3e-3],
        seeds=1,
        delta=1e-3,
        rounds=4,
        max_rows=200,
        test_rows=200,
    )
    points = pd.DataFrame(swept.points)
    table = points.pivot_table(
        index=["arm", "group_size"], columns=["epsilon", "gradients_per_round"], values="test_loss"
    )
    print(table.round(3).to_string())
    print(f"figures and tables: {swept.report}")


if __name__ == "__main__":
    main(*sys.argv[1:])
