"""What figures of runs show and what they leave out, read from the figures themselves."""

import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from experiments.report.arms.arm import label
from experiments.report.arms.times import times_table
from experiments.report.command import Report
from experiments.report.figures import curves, sweep, vector
from experiments.report.figures.style import COLOURS, OTHER_COLOURS
from experiments.report.run import verdict
from fedsim.errors import InvalidInput

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures in the order in which they are drawn."""
    drawn: list[Figure] = []

    def keep(figure: Figure, *rest: Any, **options: Any) -> Any:
        drawn.append(figure)
        return vector.vector(figure, *rest, **options)

    for module in (curves, sweep):
        monkeypatch.setattr(module, "vector", keep)
    return drawn


def metrics(*lines: tuple[int, float | None, float | None]) -> list[dict[str, Any]]:
    return [
        {"round": round, "epsilon": epsilon, "gradient_evaluations": 64 * round}
        | ({} if loss is None else {"loss": loss})
        for round, epsilon, loss in lines
    ]


A_LINE_A_ROUND = metrics((0, 0.0, 4.0), (1, 3.0, None), (2, 3.4, None), (3, 3.7, 3.5), (4, 3.9, 3.2))


def test_what_the_first_round_cost_is_drawn_where_lines_tell_of_it(figures: list[Figure]) -> None:
    drawings = curves.training_figures({"ULS": A_LINE_A_ROUND})
    _, against_epsilon, spent = figures
    bought, way, rug, pretrained = against_epsilon.axes[0].get_lines()
    assert list(bought.get_xdata()) == [3.7, 3.9]
    assert list(way.get_xdata()) == [0, 3.0, 3.7]
    assert list(way.get_ydata()) == [4.0, 4.0, 3.5]
    assert list(rug.get_xdata()) == [3.0, 3.4, 3.7, 3.9]
    assert pretrained.get_ydata()[0] == 4.0
    assert against_epsilon.axes[0].get_xlim()[0] == 0
    (line,) = spent.axes[0].get_lines()
    assert list(line.get_xdata()) == [0, 1, 2, 3, 4]
    assert list(line.get_ydata()) == [0.0, 3.0, 3.4, 3.7, 3.9]
    assert line.get_drawstyle() == "steps-post"
    assert "first rounds cost ULS ε = 3.000 by round 1" in drawings[1].alt


def test_between_evaluations_that_are_all_that_is_told_of_no_step_is_claimed(figures: list[Figure]) -> None:
    curves.training_figures({"ULS": metrics((0, 0.0, 4.0), (4, 3.0, 3.5), (8, 3.6, 3.2))})
    assert figures[2].axes[0].get_lines()[0].get_drawstyle() == "default"
    assert list(figures[0].axes[0].get_lines()[0].get_xdata()) == [0, 4, 8]


def test_markers_are_whole_where_arms_spent_nearly_the_same(figures: list[Figure]) -> None:
    arms = {name: metrics((0, 0.0, 4.0), (8, epsilon, 3.2)) for name, epsilon in (("ULS", 3.6), ("ELS", 3.601))}
    curves.training_figures(arms)
    assert figures[1].axes[0].get_xlim()[1] > 3.7


def test_a_run_without_privacy_has_no_figure_of_epsilon() -> None:
    (drawing,) = curves.training_figures({"ELS without privacy": metrics((0, None, 4.0), (4, None, 3.5))})
    assert drawing.caption == "Loss on held-out users against rounds"


@pytest.mark.parametrize("lines", [[], metrics((0, 0.0, 4.0)), metrics((0, 0.0, 4.0), (1, 2.0, None))])
def test_a_run_that_has_hardly_begun_has_what_figures_there_can_be(lines: list[dict[str, Any]]) -> None:
    assert len(curves.training_figures({"ULS": lines})) == min(2, len(lines))


def test_arms_that_compute_unlike_are_compared_by_compute(figures: list[Figure]) -> None:
    other = [line | {"gradient_evaluations": 32 * line["round"]} for line in A_LINE_A_ROUND]
    curves.training_figures({"ULS": A_LINE_A_ROUND, "ELS": other})
    assert figures[0].axes[0].get_xlabel() == "gradient evaluations"


def test_noise_and_signal_of_releases_are_told_apart(figures: list[Figure]) -> None:
    lines = [line | {"released_norm": 5.0, "noise_norm": 3.0} for line in A_LINE_A_ROUND[1:]]
    drawing = curves.training_figures({"ULS": [A_LINE_A_ROUND[0], *lines]})[-1]
    assert "Share of signal: ULS 64.0%" in drawing.alt
    released, noise = figures[-1].axes[0].get_lines()
    assert (set(released.get_ydata()), set(noise.get_ydata())) == ({5.0}, {3.0})


def test_an_algorithms_first_arm_has_its_colour_and_no_two_share_one() -> None:
    names = ["ULS with 8 bands", "ULS", "ELS", "ELS without privacy", "ELS layer-noise"]
    styles = curves._styles({name: [] for name in names})
    colours = [styles[name]["color"] for name in names]
    assert colours[:4] == [COLOURS["uls"], OTHER_COLOURS[0], COLOURS["els"], COLOURS["nonprivate"]]
    assert len(set(colours)) == len(names)


def test_a_figure_is_a_part_of_the_page_in_its_colours() -> None:
    lines = [line | {"released_norm": 5.0, "noise_norm": 3.0} for line in A_LINE_A_ROUND]
    drawings = curves.training_figures(
        {"ULS": lines, "a <b> & $c$": lines, "ELS without privacy": metrics((0, None, 4))}
    )
    assert len(drawings) == 4
    ids: list[str] = []
    for drawing in drawings:
        root = ElementTree.fromstring(str(drawing.svg))
        assert (root.get("role"), root.get("aria-label")) == ("img", drawing.alt)
        assert not re.findall(r"#[0-9a-fA-F]{3,8}\b", re.sub(r'(?:url\(|href=")#[^)"]*', "", str(drawing.svg)))
        assert "var(--uls)" in str(drawing.svg)
        assert "currentColor" in str(drawing.svg)
        own = [element.get("id", "") for element in root.iter() if element.get("id")]
        for used in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', str(drawing.svg)):
            assert next(filter(None, used)) in own
        ids += own
        words = ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]
        assert "a <b> & $c$" in words
        assert all(len(row) == len(drawing.headings) for row in drawing.rows)
    assert len(ids) == len(set(ids))


def test_each_point_tells_its_numbers() -> None:
    drawing = curves.training_figures({"ULS": A_LINE_A_ROUND})[0]
    titles = [element.text for element in ElementTree.fromstring(str(drawing.svg)).iter(f"{SVG}title")]
    assert titles == [
        "ULS, round 0: loss 4.0000, 0 gradients",
        "ULS, round 3: loss 3.5000, 192 gradients",
        "ULS, round 4: loss 3.2000, 256 gradients",
    ]


def test_a_colour_that_the_page_does_not_know_is_found() -> None:
    figure, axes = plt.subplots()
    axes.plot([0, 1], color="#123456")
    with pytest.raises(KeyError, match="#123456"):
        vector.vector(figure, "", {})


def test_an_arm_without_privacy_is_called_so() -> None:
    private = {"algorithm": "els", "epsilon": 8.0, "test_loss_before": 4.0, "test_loss_after": 3.5}
    free = private | {"epsilon": None, "test_loss_after": 3.0}
    assert label(private) == "ELS"
    assert label(private | {"mechanism": "layer-noise"}) == "ELS layer-noise"
    assert label(free) == "ELS without privacy"
    assert verdict([private, free]).startswith("ELS without privacy did better")


def test_one_run_says_whether_the_loss_fell_or_rose() -> None:
    run = {"algorithm": "uls", "epsilon": 8.0, "test_loss_before": 4.0, "test_loss_after": 3.5}
    assert verdict([run]) == "ULS: the loss on held-out users fell by 0.5000 nats a token."
    assert verdict([run | {"test_loss_after": 4.25}]).endswith("rose by 0.2500 nats a token.")
    assert verdict([run | {"test_loss_after": 3.99999}]).endswith("hardly changed: by less than 0.0001 nats a token.")
    assert verdict([run | {"test_loss_after": math.nan}]).endswith("is no number.")


def cell(arm: str, epsilon: float, gradients: int, groups: tuple[int, ...], bands: str = "1") -> dict[str, Any]:
    settings = [
        {
            "group_size": group,
            "bands": bands,
            "seeds": 2,
            "loss": 3.0 + 0.01 * group,
            "half_width": 0.01,
            "validation_loss": 3.0,
        }
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


def test_an_axis_with_a_single_place_gets_no_figure(tmp_path: Path) -> None:
    one = [cell("uls", 8.0, 64, (1,)), cell("els", 8.0, 64, (4,)), cell("nonprivate", float("inf"), 64, (1,))]
    assert sweep.draw(tmp_path, one, 4.0) == []
    compute = [cell(arm, 8.0, gradients, (1,)) for arm in ("uls", "els") for gradients in (64, 128, 256, 512)]
    drawings = sweep.draw(tmp_path, compute, 4.0)
    assert [drawing.caption.partition(" ")[0] for drawing in drawings] == ["Loss", "Perplexity"]
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "loss_against_compute.png",
        "perplexity_against_compute.png",
    }


def test_a_panel_with_a_single_place_is_left_out(figures: list[Figure], tmp_path: Path) -> None:
    sweep.draw(tmp_path, [cell("uls", 8.0, 64, (1,)), cell("uls", 2.0, 64, (1,)), cell("uls", 8.0, 128, (1,))], 4.0)
    titles = [[axes.get_title() for axes in figure.axes] for figure in figures]
    assert titles == [["64 gradients a round"]] * 2 + [["ε = 8"]] * 2


def test_group_sizes_of_both_algorithms_are_on_one_labelled_scale(figures: list[Figure], tmp_path: Path) -> None:
    cells = [cell(arm, epsilon, 64, (1, 4)) for arm in ("uls", "els") for epsilon in (2.0, 8.0)]
    sweep.draw(tmp_path, [*cells, cell("uls", 32.0, 64, (1,))], 4.0)
    panels = [axes for axes in figures[-1].axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["ε = 2, 64 gradients a round", "ε = 8, 64 gradients a round"]
    assert {axes.get_ylabel() for axes in panels} == {"loss on held-out users (nats)"}
    assert all(tick.label1.get_visible() for axes in panels for tick in axes.yaxis.get_major_ticks())
    (legend,) = figures[-1].legends
    assert {text.get_text() for text in legend.get_texts()} == {"ULS", "ELS"}
    assert panels[0].get_ylim() == panels[1].get_ylim()


def test_bands_that_arms_differ_in_have_a_line_each(figures: list[Figure], tmp_path: Path) -> None:
    cells = []
    for epsilon in (2.0, 8.0):
        both = cell("uls", epsilon, 64, (1, 4))
        other = cell("uls", epsilon, 64, (1, 4), bands="8")["settings"]
        cells += [both | {"settings": both["settings"] + other}, cell("els", epsilon, 64, (1, 4))]
        cells.append(cell("nonprivate", float("inf"), 64, (1,)))
    drawings = sweep.draw(tmp_path, cells, 4.0)
    lines = {"ULS, 1 band", "ULS, 8 bands", "ELS"}
    assert {text.get_text() for text in figures[-1].legends[0].get_texts()} == lines
    assert {text.get_text() for text in figures[0].legends[0].get_texts()} == {*lines, "no privacy", "pre-trained"}
    assert {row[0] for row in drawings[0].rows} == {*lines, "no privacy"}


def test_a_sweeps_report_is_not_written_over_with_that_of_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(InvalidInput, match="Run the sweep again"):
        Report(folder=tmp_path).run()
