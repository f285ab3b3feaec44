from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from code_worker.data.datasets.examples import Skipped
from code_worker.errors import DatasetError
from code_worker.moderation.runtime import Runtime
from code_worker.settings import LimitSettings
from code_worker.training.evaluation.compare import compare
from code_worker.training.evaluation.evaluate import Evaluation, EvaluationPlan, evaluate
from code_worker.training.evaluation.page import render_page, worst_mistakes
from code_worker.training.evaluation.plots import histogram_plot
from tests.training.labelled_noise import mislabelled, noise_examples

LIMITS = LimitSettings()
_VOID = {"meta", "img", "input", "br", "link", "base"}


class Page(HTMLParser):
    """What a page consists of; refuses elements that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def evaluation(shallow_runtime: Runtime) -> Evaluation:
    """Forty images, of which some are labelled wrongly, so that there are mistakes to show."""
    return evaluate(
        mislabelled(noise_examples(40), [0, 3, 6, 11]),
        shallow_runtime,
        LIMITS,
        EvaluationPlan(resamples=20, presets=("clean", "delivery")),
        source="tests/<noise>",
        toy=True,
        skipped=[Skipped("shard.tar:<b>a</b>.jpg", "truncated")],
    )


@pytest.fixture(scope="module")
def text(evaluation: Evaluation) -> str:
    return render_page(evaluation, LIMITS)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


@pytest.fixture(scope="module")
def other(evaluation: Evaluation) -> Page:
    """Of a release that is no toy and missed a bound, beside another release, without pictures of images."""
    release = {**evaluation.report["release"], "toy": False}
    return Page(
        render_page(
            replace(evaluation, report={**evaluation.report, "release": release}),
            LIMITS,
            thumbnails=False,
            missed=["false alarms are 0.2, above 0.1"],
            compared=compare(evaluation, evaluation),
            against="r-before",
        )
    )


def addresses(page: Page) -> Iterator[str]:
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
            if name in attributes:
                yield attributes[name]


def test_the_page_needs_nothing_but_itself(page: Page, text: str) -> None:
    assert not page.all("script")
    assert not page.all("link")
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in addresses(page))
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)'\"]*)", text))
    (policy,) = (one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_every_reference_leads_somewhere(page: Page) -> None:
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    assert {address[1:] for address in addresses(page) if address.startswith("#")} <= ids.keys()
    labelled = {attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes}
    assert labelled <= ids.keys()


def test_the_page_shows_figures_curves_histograms_map_and_mistakes(page: Page, evaluation: Evaluation) -> None:
    pictures = [one["aria-label"] for one in page.all("svg")]
    assert [picture.split(" ")[0] for picture in pictures] == [
        "ROC",
        "precision-recall",
        "calibration",
        "histogram",
        "t-SNE",
    ]
    assert "balanced accuracy" in page.words
    for name in ("doubler", "enlarger", "camera", "scans", "768px_q60", "svm"):
        assert name in page.words
    accuracy = evaluation.report["results"][0]["deployed"]["balanced_accuracy"]
    assert f"{100 * accuracy['value']:.1f}" in page.words
    assert f"{100 * accuracy['low']:.1f} … {100 * accuracy['high']:.1f}" in page.words
    assert "clean_doubler:" in page.words
    assert evaluation.report["data"]["digest"] in page.words


def test_a_toy_is_called_one_and_text_of_the_data_stays_text(page: Page, other: Page) -> None:
    assert "This is a toy release" in page.words
    assert "toy release" not in other.words
    assert "tests/<noise>" in page.words
    assert "shard.tar:<b>a</b>.jpg" in page.words


def test_missed_bounds_are_said(page: Page, other: Page) -> None:
    assert "bound" not in page.words
    assert "1 bound missed false alarms are 0.2, above 0.1" in other.words


def test_another_release_is_shown_beside(page: Page, other: Page) -> None:
    assert "Compared with" not in page.words
    assert "Compared with r-before" in other.words
    assert "+0.0" in other.words


def test_mistakes_are_blurred_until_they_are_clicked_on(page: Page, text: str) -> None:
    pictures = page.all("img")
    assert 1 <= len(pictures) <= 24
    assert len([one for one in page.all("input") if one["type"] == "checkbox"]) == len(pictures)
    assert "filter: blur(" in text


def test_thumbnails_can_be_left_out(other: Page, evaluation: Evaluation) -> None:
    assert other.all("img") == []
    alarms, _ = worst_mistakes(evaluation.scored[0], (0.5, 0.5), LIMITS, thumbnails=False)
    assert alarms
    assert all(one.key in other.words for one in alarms), "they are listed all the same"


def test_the_worst_mistakes_come_first_and_are_mistakes(evaluation: Evaluation) -> None:
    scored = evaluation.scored[0]
    alarms, misses = worst_mistakes(scored, (0.4, 0.6), LIMITS, thumbnails=False)
    labels = {one.key: one.label for one in scored.examples}
    assert all(labels[one.key] == 0 and one.score >= 0.6 for one in alarms)
    assert all(labels[one.key] == 1 and one.score < 0.4 for one in misses)
    assert [one.score for one in alarms] == sorted((one.score for one in alarms), reverse=True)
    assert [one.score for one in misses] == sorted(one.score for one in misses)


def test_an_image_that_is_gone_meanwhile_costs_its_thumbnail_only(evaluation: Evaluation) -> None:
    def gone() -> bytes:
        raise DatasetError("gone")

    lead = evaluation.scored[0]
    lost = replace(lead, examples=tuple(replace(one, read=gone) for one in lead.examples))
    alarms, _ = worst_mistakes(lost, (0.5, 0.5), LIMITS, thumbnails=True)
    assert alarms
    assert {one.picture for one in alarms} == {None}


def test_one_class_and_few_images_make_a_page_without_curves(shallow_runtime: Runtime) -> None:
    reals = [one for one in noise_examples(8) if one.label == 0]
    page = Page(render_page(evaluate(reals, shallow_runtime, LIMITS, EvaluationPlan(resamples=0)), LIMITS))
    assert [one["aria-label"].split(" ")[0] for one in page.all("svg")] == ["calibration", "histogram"]
    assert "no intervals" in page.words


def test_the_same_evaluation_gives_the_same_page(evaluation: Evaluation, text: str) -> None:
    assert render_page(evaluation, LIMITS) == text


def test_more_generators_than_colours_still_fit(evaluation: Evaluation) -> None:
    lead = evaluation.scored[0]
    many = tuple(
        replace(one, generator=f"generator-{place:02}") if one.label else one
        for place, one in enumerate(lead.examples)
    )
    drawn = histogram_plot(replace(lead, examples=many), (0.4, 0.6))
    fakes = sum(one.label for one in many)
    assert f"{fakes - 12} others" in drawn
    assert drawn.count("generator-") == 12
