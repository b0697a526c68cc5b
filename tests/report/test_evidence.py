import numpy as np
import pytest
import torch
from report.documents import CLEAN, ROBUST, images, seen

from edgekit.attacks.campaign import Outcome
from edgekit.errors import EdgekitError
from edgekit.report.evidence import Crossing, gather


def test_the_four_ways_to_agree_are_counted_as_a_table_of_two_answers():
    rng = np.random.default_rng(0)
    columns = {key: rng.random(719) < 0.6 for key in ("float_clean", "float_robust", "file_clean", "file_robust")}
    places = np.arange(719)
    one = gather(
        "a",
        images=images(),
        labels=places % 3,
        index=places,
        adversarial=images(),
        file_says=places % 3,
        float_says=places % 3,
        attacks=[""] * 719,
        sources=[""] * 719,
        **columns,
    )

    def counted(first, second):
        table, _, _ = np.histogram2d(first.astype(int), second.astype(int), bins=2)
        return Crossing(int(table[1, 1]), int(table[1, 0]), int(table[0, 1]), int(table[0, 0]))

    assert one.clean == counted(columns["float_clean"], columns["file_clean"])
    standing = [columns[f"{who}_clean"] & columns[f"{who}_robust"] for who in ("float", "file")]
    assert one.robust == counted(*standing)
    assert one.candidates == (standing[0] & columns["file_clean"] & ~columns["file_robust"]).sum()
    for place, count in enumerate(one.classes):
        here = places % 3 == place
        figures = (count.label, count.samples, count.file_clean, count.float_robust)
        assert figures == (place, here.sum(), columns["file_clean"][here].sum(), standing[0][here].sum())


def test_only_what_the_student_withstands_and_the_file_does_not_is_shown_a_class_at_a_time():
    labels = np.arange(719) // 5 % 10
    one = seen(robust=460, labels=labels, file_says=(labels + 1) % 10, float_says=labels)
    assert one.candidates == 40
    # Eight classes in runs of five: the first of each run, then the second of the first runs.
    assert [picture.index - 1000 for picture in one.pictures] == [*range(460, 500, 5), 461, 466, 471, 476]
    for picture in one.pictures:
        assert np.array_equal(picture.clean, images()[picture.index - 1000])
        assert 0 < np.abs(picture.adversarial - picture.clean).max() <= 8 / 255 + 1e-6
        assert (picture.file_says, picture.float_says) == ((picture.label + 1) % 10, picture.label)
    assert sum(one.won.values()) == 719
    assert one.won["clean", ""] == 39
    assert one.won["", ""] == 460


def test_a_file_without_a_student_has_counts_of_its_own_alone():
    one = seen(robust=460, student=False)
    assert (one.clean, one.robust) == (None, None)
    assert one.candidates == 680 - 460
    assert {count.float_robust for count in one.classes} == {None}
    assert {picture.float_says for picture in one.pictures} == {None}


def test_it_is_made_of_what_a_campaign_leaves():
    labels = torch.tensor([0, 1, 1, 0])
    clean = torch.nn.functional.one_hot(torch.tensor([0, 1, 0, 0]), 2).float()
    winner = torch.tensor([0, -1, -2, -1])
    batch = torch.rand(4, 3, 4, 4)
    outcome = Outcome(clean, {("pgd20", "twin"): torch.tensor([True, False, True, False])}, batch, winner, {})
    attacks, sources = outcome.won()
    one = gather(
        "a",
        images=batch,
        labels=labels,
        index=torch.arange(4),
        file_clean=outcome.clean.argmax(1) == labels,
        file_robust=outcome.robust,
        adversarial=outcome.adversarial,
        file_says=torch.tensor([1, 1, 0, 0]),
        attacks=attacks,
        sources=sources,
        float_clean=torch.ones(4, dtype=torch.bool),
        float_robust=torch.ones(4, dtype=torch.bool),
        float_says=labels,
    )
    assert one.robust == Crossing(both=2, only_float=2, only_file=0, neither=0)
    (picture,) = one.pictures
    assert (picture.index, picture.attack, picture.source, picture.file_says) == (0, "pgd20", "twin", 1)
    before = picture.clean.copy()
    batch.zero_()
    assert np.array_equal(picture.clean, before)


def test_samples_that_do_not_pair_are_refused():
    with pytest.raises(EdgekitError, match="do not pair"):
        seen(float_clean=CLEAN[:-1], float_robust=ROBUST)
