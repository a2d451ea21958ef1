"""What a node does: train on its own points."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits.task import load_data, train
from fedsim import user_level_clip_mod

app = ClientApp(mods=[user_level_clip_mod])


@app.train()
def train_on_own_points(message: Message, context: Context) -> Message:
    """Some local epochs from the weights that came."""
    points, classes = load_data(int(context.node_config["partition-id"]))
    weights = message.content["arrays"].to_numpy_ndarrays()
    config = context.run_config
    train(weights, points, classes, int(config["local-epochs"]), float(config["learning-rate"]))
    metrics = MetricRecord({"num-examples": len(classes)})
    return Message(RecordDict({"arrays": ArrayRecord(weights), "metrics": metrics}), reply_to=message)
