"""Sample metrics against closed forms and second implementations, and the shipped classifier."""

import itertools
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.testing import assert_close

from ddpm_tutorial.data import ImageData, load_fashion_mnist, to_model_range
from ddpm_tutorial.metrics import (
    Classifier,
    InceptionV3,
    balanced_subset,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    label_agreement,
    look,
    nearest_figures,
    nearest_neighbours,
    of_subsets,
    precision_recall,
    real_figures,
    sample_figures,
    spread,
    train_classifier,
)


def features(count, seed, dim=8, scale=1.0, shift=0.0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) * scale + shift


# ------------------------------------------------------------------------------------- Fréchet distance
def test_frechet_distance_is_the_formula_with_a_matrix_square_root():
    real, generated = features(500, 1), features(300, 2, scale=1.5, shift=0.3) @ features(8, 3)
    a, b = real.double().numpy(), generated.double().numpy()
    c, s = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + s - 2 * scipy.linalg.sqrtm(c @ s).real)
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(generated, real) == pytest.approx(expected, rel=1e-6)  # a distance is symmetric


def test_frechet_distance_of_a_shift_is_its_squared_length_and_of_a_scale_known():
    real = features(400, 1)
    shift = torch.arange(8.0) / 4
    assert frechet_distance(real, real + shift) == pytest.approx(shift.square().sum().item(), rel=1e-5)
    centred = real - real.mean(0)
    trace = centred.double().T.cov().trace().item()
    assert frechet_distance(centred, 3 * centred) == pytest.approx((3 - 1) ** 2 * trace, rel=1e-5)
    assert abs(frechet_distance(real, real)) < 1e-6


# -------------------------------------------------------------------------------------- kernel distance
def test_kernel_distance_is_the_unbiased_mmd_of_a_cubic_kernel():
    real, generated = features(60, 1), features(60, 2, shift=0.5)  # fewer than 1,000: every subset is the whole set

    def kernel(a, b):
        return (a.double() @ b.double().T / 8 + 1) ** 3

    def off_diagonal_mean(k):
        return (k.sum() - k.trace()) / (60 * 59)

    expected = off_diagonal_mean(kernel(real, real)) + off_diagonal_mean(kernel(generated, generated))
    expected -= 2 * kernel(real, generated).mean()
    mean, deviation = kernel_distance(real, generated, num_subsets=3)
    assert mean == pytest.approx(expected.item(), rel=1e-4) and deviation < 1e-4 * mean


def test_kernel_distance_leaves_the_global_generator_alone_and_repeats():
    real, generated = features(1500, 1), features(1500, 2)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = kernel_distance(real, generated, num_subsets=5, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert kernel_distance(real, generated, num_subsets=5, seed=1) == first
    assert kernel_distance(real, generated, num_subsets=5, seed=2) != first
    assert abs(first[0]) < 4 * first[1]  # one distribution: zero within its own spread


# ------------------------------------------------------------------------------------- Inception Score
def test_inception_score_from_one_to_the_number_of_classes():
    assert inception_score(torch.zeros(50, 10)) == pytest.approx(1)
    sure = 50 * torch.eye(10).repeat(5, 1)
    assert inception_score(sure) == pytest.approx(10, rel=1e-6)
    assert inception_score(sure[:1].repeat(20, 1)) == pytest.approx(1)  # sure, but always of the same class


def test_inception_score_is_its_formula():
    p = features(200, 1, dim=10, scale=2.0).double().softmax(1)
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    assert inception_score(p.log()) == pytest.approx(expected, rel=1e-6)


# ----------------------------------------------------------------------------------- precision and recall
def test_precision_and_recall_see_what_is_missing():
    near, far = features(200, 1, dim=2), features(200, 2, dim=2, shift=50.0)
    real = torch.cat([near, far])
    assert precision_recall(real, real.clone()) == (1.0, 1.0)
    assert precision_recall(near, far) == (0.0, 0.0)
    precision, recall = precision_recall(real, near + 1e-4)  # one of two modes: all of it good, half missing
    assert precision == 1.0 and recall == pytest.approx(0.5, abs=0.01)
    precision, recall = precision_recall(near, torch.cat([near + 1e-4, far]))  # all there, half of it wrong
    assert precision == pytest.approx(0.5) and recall == 1.0


def test_precision_counts_points_inside_a_ball_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # with k = 1 the radii are 1, 1, 2, 4
    generated = torch.tensor([[-0.9], [-1.1], [5.5], [11.5], [2.5]])
    precision, _ = precision_recall(real, generated, k=1)
    assert precision == pytest.approx(3 / 5)  # −0.9 by 0's ball, 5.5 by 7's, 2.5 by 3's


def test_density_and_coverage_count_balls_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # with k = 1 the balls are −1…1, 0…2, 1…5, 3…11
    generated = torch.tensor([[0.5], [4.0], [20.0]])  # in 2, in 2, in none
    assert density_coverage(real, generated, k=1) == (pytest.approx(4 / 3), 1.0)
    assert density_coverage(real, generated[[0, 0]], k=1) == (2.0, 0.5)
    assert density_coverage(real, generated[[2, 2]], k=1) == (0.0, 0.0)


def test_density_and_coverage_of_one_law_are_one_and_nearly_all_and_strays_do_not_help():
    real, generated = features(1500, 1, dim=2), features(1500, 2, dim=2)
    for k in (1, 5):  # eq. 12: 1 − (N − 1) … (N − k) / (2N − 1) … (2N − k)
        density, coverage = density_coverage(real, generated, k)
        assert density == pytest.approx(1, abs=0.1) and coverage == pytest.approx(1 - 0.5**k, abs=0.04)
    half = features(1500, 3, dim=2, scale=0.2)
    strays = torch.cat([half[3:], torch.tensor([[-6.0, -6.0], [6.0, -6.0], [0.0, 8.0]])])
    assert precision_recall(real, strays)[1] > precision_recall(real, half)[1] + 0.2
    assert density_coverage(real, strays)[1] <= density_coverage(real, half)[1] < 0.6


# --------------------------------------------------------------------- labels, neighbours, wrong inputs
def test_label_agreement():
    logits = torch.eye(4)
    assert label_agreement(logits, torch.tensor([0, 1, 2, 0])) == 0.75


def test_nearest_neighbours_find_planted_copies_beyond_the_first_chunk():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12_000, 1, 4, 4), dtype=torch.uint8, generator=generator)
    distances, indices = nearest_neighbours(images[[11_500, 3]] ^ 1, images)  # each grey level changed by one
    assert indices.tolist() == [11_500, 3]
    assert_close(distances, torch.ones(2))
    large = torch.randint(0, 256, (600, 1, 28, 28), dtype=torch.uint8, generator=generator)
    assert not nearest_neighbours(large, large)[0].any()  # 0, and not only nearly


def test_a_few_copies_at_the_end_of_a_set_show_in_a_low_quantile():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4000, 1, 4, 4), dtype=torch.uint8, generator=generator)
    made, train = images[:2000].clone(), images[2000:]
    without = nearest_figures(made, train)
    made[-40:] = train[:40]  # 2%
    found = nearest_figures(made, train)
    assert found["nearest_1_percent"] < 1 < without["nearest_1_percent"]
    assert found["nearest_median"] == pytest.approx(without["nearest_median"], rel=0.01)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: frechet_distance(features(8, 1), features(50, 2)), "at least 9 images are needed .* got 8 and 50"),
        (lambda: frechet_distance(features(50, 1), features(50, 2, dim=5)), r"got \(50, 8\) and \(50, 5\)"),
        (lambda: frechet_distance(features(50, 1), features(50, 2) / 0), "finite"),
        (lambda: precision_recall(features(3, 1), features(50, 2)), "at least 4 images"),
        (lambda: density_coverage(features(5, 1), features(50, 2)), "at least 6 images"),
        (lambda: nearest_neighbours(torch.zeros(1, 1, 4, 4), torch.zeros(2, 3, 4, 4)), "one shape"),
        (lambda: look(torch.zeros(2, 3, 28, 28).byte(), Classifier().eval()), r"\(N, 1, H, W\), got \(2, 3"),
        (lambda: look(torch.zeros(2, 1, 28, 28), Classifier().eval()), "uint8"),
        (lambda: look(torch.zeros(2, 1, 28, 28).byte(), Classifier()), r"training mode: call its eval\(\)"),
    ],
)
def test_wrong_inputs_say_what_was_given(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------ the classifier
def test_a_short_training_learns_and_repeats():
    data = load_fashion_mnist("train", source="sample")

    def run(num_steps=None):
        torch.manual_seed(0)
        model = Classifier(num_features=16)
        steps = train_classifier(model, data.images[:640], data.labels[:640], num_epochs=3, batch_size=64)
        return model, torch.stack([loss for _, loss in itertools.islice(steps, num_steps)])

    model, losses = run()
    assert len(losses) == 30 and losses[-5:].mean() < 0.8 * losses[:5].mean()
    assert not model.training
    assert_close(run(12)[1], losses[:12])  # into the second epoch


def test_look_gives_the_features_under_the_logits_in_batches():
    torch.manual_seed(0)
    model, images = Classifier().eval(), load_fashion_mnist("test", source="sample").images[:7]
    seen = look(images, model, batch_size=3)
    assert seen.features.shape == (7, 96) and seen.logits.shape == (7, 10)
    assert_close(seen.logits, model(to_model_range(images)))
    assert_close(seen.logits, model.head(seen.features))


def test_a_balanced_subset_has_each_class_as_often_and_is_random():
    labels = torch.arange(1000) % 3  # 334, 333, 333
    chosen = balanced_subset(labels, 100, torch.Generator().manual_seed(0))
    assert len(set(chosen.tolist())) == 100
    assert sorted(torch.bincount(labels[chosen]).tolist()) == [33, 33, 34]
    other = balanced_subset(labels, 100, torch.Generator().manual_seed(1))
    assert len(set(chosen.tolist()) & set(other.tolist())) < 30  # 10 are expected


def test_spread_is_the_mean_and_the_deviation_of_each_figure():
    sets = [{"a": 1.0, "b": 5.0}, {"a": 2.0, "b": 5.0}, {"a": 6.0, "b": 5.0}]
    assert spread(sets) == {"a": {"mean": 3.0, "deviation": 7**0.5}, "b": {"mean": 5.0, "deviation": 0.0}}
    assert spread(sets[:1])["a"] == {"mean": 1.0, "deviation": None}


def test_real_figures_are_those_of_ten_random_balanced_subsets_or_of_all():
    labels, seen = torch.arange(60) % 3, []
    found = of_subsets(lambda chosen, seed: seen.append(chosen) or {"a": seed}, labels, 30, seed=1)
    assert found["a"]["mean"] == 5.5  # each with its own seed, 1 … 10
    assert len(seen) == len({tuple(chosen.tolist()) for chosen in seen}) == 10
    assert all(torch.bincount(labels[chosen]).tolist() == [10, 10, 10] for chosen in seen)
    of_subsets(lambda chosen, seed: seen.append(chosen) or {"a": seed}, labels, 60, seed=1)
    assert len(seen) == 11 and sorted(seen[-1].tolist()) == list(range(60))

    data = load_fashion_mnist("test", source="sample")
    test, reference = ImageData(data.images[:120], data.labels[:120], data.class_names), look(data.images[120:300])
    found = real_figures(test, reference, 120, seed=3)
    expected = sample_figures(look(test.images), test.labels, reference, seed=3)
    assert {name: figure["mean"] for name, figure in found.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_inception_sees_grey_images_as_papers_do(monkeypatch):
    """The network itself is not downloaded here: what reaches it is looked at."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    class Untrained(torch.nn.Module):
        def __init__(self, name, features):
            super().__init__()
            assert (name, features) == ("inception-v3-compat", ["2048", "logits_unbiased"])
            self.seen = []

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1:] == (3, 28, 28)
            self.seen.append(x)
            return torch.randn(len(x), 2048), torch.randn(len(x), 1008)

    monkeypatch.setattr(fidelity, "FeatureExtractorInceptionV3", Untrained)
    judge = InceptionV3()
    images = load_fashion_mnist("test", source="sample").images[:5]
    seen = look(images, judge, batch_size=3)
    assert seen.features.shape == (5, 2048) and seen.logits.shape == (5, 1008)
    assert all((torch.cat(judge.network.seen)[:, c] == images[:, 0]).all() for c in range(3))


def test_without_torch_fidelity_inception_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        InceptionV3()
