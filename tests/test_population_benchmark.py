"""The benchmark of the paper's population, with few users and in one process."""

import json
from pathlib import Path

from benchmarks.population import PopulationBenchmark
from fedsim.phases import Times


def test_the_way_from_texts_to_a_model_is_told_phase_by_phase(tmp_path: Path, capfd) -> None:
    settings = {"users": 300, "rows": 900, "cohort": 5, "rounds": 1, "workers": 0, "folder": tmp_path}
    result = PopulationBenchmark(**settings).run()
    printed = capfd.readouterr().out
    line = json.loads(printed.splitlines()[-1])
    assert line == json.loads(json.dumps(result))
    passes, training = line["ingest"]["passes"], line["training"]
    assert list(passes)[1:] == [
        "Reading and encoding",
        "Sorting by user",
        "Grouping by user",
        "Comparing users",
        "Writing the store",
    ]
    assert all(one["peak_mib"] > 0 for one in passes.values())
    times = Times.from_json(training["phases"])
    assert times.rounds == 1
    assert {"load", "compute", "transport", "noise", "optimizer", "sampling", "charge", "other"} <= set(times.seconds)
    assert times.whole <= training["rounds_seconds"] * 1.01
    assert 0 < training["epsilon"] <= 2
    assert all(phase in printed for phase in (*passes, *times.seconds))
    assert list(tmp_path.iterdir()) == []
