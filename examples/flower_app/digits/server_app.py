"""What the server does: average what nodes make of the weights."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from digits.task import accuracy, first_weights, load_data
from fedsim import UserLevelDP

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and tell the accuracy on points that belong to no node."""
    config = context.run_config
    points, classes = load_data(-1, size=2000)

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"accuracy": accuracy(arrays.to_numpy_ndarrays(), points, classes)})

    strategy = UserLevelDP(
        population_size=int(config["population-size"]),
        sampling_probability=float(config["sampling-probability"]),
        clip_norm=float(config["clip-norm"]),
        epsilon=float(config["epsilon"]),
        delta=float(config["delta"]),
        output=str(config["output"]),
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(first_weights()),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=evaluate,
    )
