"""What figures show and what they leave out, read from the figures themselves."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from experiments.report import curves, sweep_figures
from experiments.report.command import Report
from experiments.report.run import label, verdict
from experiments.report.sweep import draw
from experiments.report.times import times_table
from fedsim.errors import InvalidInput


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures by file name, kept instead of written."""
    drawn: dict[str, Figure] = {}

    def keep(figure: Figure, path: Path) -> Path:
        drawn[path.name] = figure
        plt.close(figure)
        return path

    for module in (curves, sweep_figures):
        monkeypatch.setattr(module, "save", keep)
    return drawn


def metrics(*lines: tuple[int, float | None, float]) -> list[dict[str, Any]]:
    return [
        {"round": round, "epsilon": epsilon, "gradient_evaluations": 64 * round, "loss": loss}
        for round, epsilon, loss in lines
    ]


def test_the_line_against_epsilon_does_not_hide_what_the_first_rounds_cost(figures: dict[str, Figure]) -> None:
    curves.plot_run({"ULS": metrics((0, 0.0, 4.0), (4, 3.0, 3.5), (8, 3.6, 3.2))}, Path())
    (axes,) = figures["loss_against_epsilon.png"].axes
    line, pretrained = axes.get_lines()
    assert list(line.get_xdata()) == [3.0, 3.6]
    assert pretrained.get_ydata()[0] == 4.0
    assert axes.get_xlim()[0] == 0
    line, _ = figures["loss_against_compute.png"].axes[0].get_lines()
    assert list(line.get_xdata()) == [0, 256, 512]


def test_markers_are_whole_where_arms_spent_nearly_the_same(figures: dict[str, Figure]) -> None:
    arms = {name: metrics((0, 0.0, 4.0), (8, epsilon, 3.2)) for name, epsilon in (("ULS", 3.6), ("ELS", 3.601))}
    curves.plot_run(arms, Path())
    (axes,) = figures["loss_against_epsilon.png"].axes
    assert axes.get_xlim()[1] > 3.7


def test_a_run_without_privacy_has_no_figure_against_epsilon(figures: dict[str, Figure]) -> None:
    curves.plot_run({"ELS without privacy": metrics((0, None, 4.0), (4, None, 3.5))}, Path())
    assert set(figures) == {"loss_against_compute.png"}


def test_an_arm_without_privacy_is_called_so() -> None:
    private = {"algorithm": "els", "epsilon": 8.0, "test_loss_before": 4.0, "test_loss_after": 3.5}
    free = private | {"epsilon": None, "test_loss_after": 3.0}
    assert label(private) == "ELS"
    assert label(private | {"mechanism": "layer-noise"}) == "ELS layer-noise"
    assert label(free) == "ELS without privacy"
    assert verdict([private, free]).startswith("ELS without privacy did better")


def cell(arm: str, epsilon: float, gradients: int, groups: tuple[int, ...]) -> dict[str, Any]:
    settings = [
        {"group_size": group, "loss": 3.0 + 0.01 * group, "half_width": 0.01, "validation_loss": 3.0}
        for group in groups
    ]
    return {
        "arm": arm,
        "epsilon": epsilon,
        "gradients_per_round": gradients,
        "best": settings[0],
        "settings": settings,
    }


def test_the_table_of_times_adds_up_over_lines_and_leaves_out_arms_without() -> None:
    phases = [
        {"rounds": 3, "seconds": {"compute": 5.0, "noise": 1.0}, "noise_beside": 0.5},
        {"rounds": 1, "seconds": {"compute": 1.0, "evaluation": 1.0}, "noise_beside": 0.0},
    ]
    timed = [{"not_private": {}}, *({"not_private": {"units": 3.0, "phases": one}} for one in phases)]
    assert times_table({"ULS": timed, "ELS": [{"not_private": {}}], "old": [{}]}) == [
        ["seconds a round", "ULS"],
        ["compute", "1.5 (75%)"],
        ["noise", "0.25 (12%)"],
        ["evaluation", "0.25 (12%)"],
        ["in all", "2 (100%)"],
        ["noise drawn in the background, no part of the above", "0.125"],
    ]
    assert times_table({"ELS": [{"not_private": {}}]}) == []


def test_an_axis_with_a_single_place_gets_no_figure(figures: dict[str, Figure]) -> None:
    one = [cell("uls", 8.0, 64, (1,)), cell("els", 8.0, 64, (4,)), cell("nonprivate", float("inf"), 64, (1,))]
    assert draw(Path(), one, 4.0) == {}
    draw(Path(), [*one, cell("uls", 2.0, 64, (1,))], 4.0)
    assert set(figures) == {"loss_against_epsilon.png", "perplexity_against_epsilon.png"}


def test_group_sizes_of_both_algorithms_are_on_one_labelled_scale(figures: dict[str, Figure]) -> None:
    cells = [cell(arm, epsilon, 64, (1, 4)) for arm in ("uls", "els") for epsilon in (2.0, 8.0)]
    draw(Path(), [*cells, cell("uls", 32.0, 64, (1,))], 4.0)
    panels = [axes for axes in figures["group_sizes.png"].axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["ε = 2, 64 gradients a round", "ε = 8, 64 gradients a round"]
    assert panels[0].get_ylabel() == "loss on held-out users (nats)"
    assert {text.get_text() for text in panels[0].get_legend().get_texts()} == {"ULS", "ELS"}
    assert panels[0].get_ylim() == panels[1].get_ylim()


def test_a_sweeps_report_is_not_written_over_with_that_of_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(InvalidInput, match="Run the sweep again"):
        Report(folder=tmp_path).run()
