"""The shipped classifier, and the report with its floor."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import data, metric
from jaxdiff import eval as ev
from jaxdiff.eval import classifier
from jaxdiff.eval.report import quotas


@pytest.fixture(scope="module")
def digits():
    train, heldout = data.digits("train").examples(), data.digits("test").examples()
    return train["x0"], train["label"], heldout["x0"], heldout["label"]


def labelled(digits, samples=None, sample_labels=None, **options):
    """The report on digits; by default the "generated" images are a training subset."""
    train, train_labels, heldout, heldout_labels = digits
    samples = train[:900] if samples is None else samples
    sample_labels = train_labels[:900] if sample_labels is None else sample_labels
    options = {"subsets": 3, **options}
    return ev.report(
        samples,
        heldout,
        train,
        sample_labels=sample_labels,
        heldout_labels=heldout_labels,
        train_labels=train_labels,
        **options,
    )


def test_shipped_weights_reproduce_their_stated_accuracy(digits):
    _, metadata = classifier.load()
    assert classifier.WEIGHTS.stat().st_size < 300_000
    accuracy = ev.class_agreement(ev.digits_network(), digits[2], digits[3])
    assert len(digits[2]) == 360 and accuracy == metadata["accuracy"]
    assert accuracy >= 0.985
    results = pathlib.Path(__file__).parents[2] / "experiments" / "digits_classifier" / "results.json"
    assert json.loads(results.read_text())["heldout_accuracy"] == pytest.approx(accuracy, abs=1e-4)


def test_classifier_equals_its_definition_written_with_loops():
    params, _ = classifier.load()
    image = np.random.default_rng(0).uniform(-1, 1, size=(8, 8, 1))

    def silu(x):
        return x / (1 + np.exp(-x))

    def conv(x, name, stride):
        # SAME: one zero pixel on both sides at stride 1, on the far side alone at stride 2
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)) if stride == 1 else ((0, 1), (0, 1), (0, 0)))
        side = x.shape[0] // stride
        out = np.empty((side, side, params[f"{name}/bias"].size))
        for i in range(side):
            for j in range(side):
                window = padded[i * stride : i * stride + 3, j * stride : j * stride + 3]
                out[i, j] = np.tensordot(window, params[f"{name}/kernel"], 3) + params[f"{name}/bias"]
        return silu(out)

    hidden = conv(conv(image, "conv1", 1), "conv2", 2).ravel()
    features = silu(hidden @ params["hidden/kernel"] + params["hidden/bias"])
    found = metric.extract(ev.digits_network(), image[None])
    np.testing.assert_allclose(found.features[0], features, atol=1e-5)


def test_classifier_features_are_the_layer_below_the_logits(digits):
    network = ev.digits_network()
    found = metric.extract(network, digits[2][:20])
    assert found.features.shape == (20, 64)
    by_hand = found.features @ network.params["logits/kernel"] + network.params["logits/bias"]
    np.testing.assert_allclose(found.logits, by_hand, atol=2e-5)


def test_labels_must_match_for_agreement(digits):
    network = ev.digits_network()
    wrong = ev.class_agreement(network, digits[2], (digits[3] + 1) % 10)
    assert wrong < 0.02


def test_weights_round_trip_and_damage_is_named(tmp_path):
    params, metadata = classifier.load()
    for copy in ("a", "b"):
        classifier.save(tmp_path / copy, params, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == classifier.WEIGHTS.read_bytes()
    (tmp_path / "cut").write_bytes(classifier.WEIGHTS.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors"):
        classifier.load(tmp_path / "cut")
    from safetensors.numpy import save

    (tmp_path / "other").write_bytes(save({**params, "hidden/bias": np.zeros(63, np.float32)}))
    with pytest.raises(ValueError, match="differing tensors: hidden/bias"):
        classifier.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"run\.py makes it"):
        classifier.load(tmp_path / "none")


def test_quotas_keep_proportions_and_the_count():
    labels = np.repeat([0, 1, 3], [10, 20, 70])
    np.testing.assert_array_equal(quotas(labels, 100), [10, 20, 0, 70])
    np.testing.assert_array_equal(quotas(labels, 10), [1, 2, 0, 7])
    assert quotas(labels, 33).sum() == 33


def test_real_images_sit_at_the_floor(digits):
    """The floor compared with itself: another draw of training images has ratio near 1."""
    result = labelled(digits, subsets=10)
    assert result["count"] == 360 and result["stratified"] and result["features"] == "digits_classifier"
    assert 0.8 < result["metrics"]["frechet"]["ratio"] < 1.25
    assert 0.9 < result["metrics"]["sliced_w2"]["ratio"] < 1.1
    assert abs(result["metrics"]["kid"]["samples"] - result["metrics"]["kid"]["floor"]) < 0.003
    for share in ("precision", "recall"):
        assert abs(result["metrics"][share]["samples"] - result["metrics"][share]["floor"]) < 0.05


def test_copies_pass_every_distance_and_only_the_memorisation_check_tells(digits):
    result = labelled(digits)
    for where in ("pixels", "features"):
        assert result["memorisation"][where]["ratio"] == 0.0
        assert result["memorisation"][where]["copied"] == 1.0


def test_unseen_images_are_not_called_copies(digits):
    train, _, heldout, _ = digits
    seen = np.arange(len(train)) % 2 == 0
    result = ev.report(train[~seen], heldout, train[seen], subsets=1)
    for where in ("pixels", "features"):
        assert 0.85 < result["memorisation"][where]["ratio"] < 1.15
        assert result["memorisation"][where]["copied"] < 0.04


def test_few_of_many_samples_are_checked_for_copies_whatever_their_order():
    """Samples in order of class, as `jaxdiff eval` draws them: the first few are of the narrowest."""
    widths = np.repeat(np.arange(1.0, 11.0), 200)[:, None]
    samples, heldout, train = np.random.default_rng(0).normal(size=(3, 2000, 4)) * widths
    found = ev.report(samples, heldout, train, subsets=1, pairwise_limit=200)["memorisation"]["pixels"]
    assert 0.7 < found["ratio"] < 1.4 and found["count"] == 200


def test_noise_and_a_missing_class_rise_above_the_floor(digits):
    train, train_labels, *_ = digits
    noisy = train[:900] + 0.5 * np.random.default_rng(0).normal(size=train[:900].shape)
    assert labelled(digits, noisy)["metrics"]["frechet"]["ratio"] > 2
    assert labelled(digits, noisy)["metrics"]["precision"]["samples"] < 0.6
    kept = train_labels != 3
    dropped = ev.report(train[kept], digits[2], train, subsets=3)
    assert not dropped["stratified"] and dropped["metrics"]["frechet"]["ratio"] > 1.7


def test_report_is_reproducible_json_and_prints(digits):
    first, again = labelled(digits), labelled(digits)
    assert json.dumps(first) == json.dumps(again)
    assert labelled(digits, seed=1)["metrics"] != first["metrics"]
    table = ev.report_table(first)
    assert "frechet" in table and "class agreement" in table and max(map(len, table.splitlines())) < 90
    assert first["class_agreement"]["difference"] == pytest.approx(
        first["class_agreement"]["samples"] - first["class_agreement"]["heldout"]
    )


def test_count_shrinks_to_what_every_class_can_fill(digits):
    train, train_labels, *_ = digits
    rows = np.concatenate([np.flatnonzero(train_labels == c)[:10] for c in range(10)])
    result = labelled(digits, train[rows], train_labels[rows])
    assert result["stratified"] and 90 <= result["count"] <= 100
    with pytest.raises(ValueError, match="count: 200; allowed"):
        labelled(digits, train[rows], train_labels[rows], count=200)


def test_points_of_any_shape_fall_back_to_pixels():
    generator = np.random.default_rng(0)
    samples, heldout, train = generator.normal(size=(3, 300, 2))
    result = ev.report(samples, heldout, train, subsets=2, pairwise_limit=100)
    assert result["features"] == "pixels" and list(result["memorisation"]) == ["pixels"]
    assert result["class_agreement"] is None and result["metrics"]["mmd"]["count"] == 100
    assert "pixels" in ev.report_table(result)


def test_a_network_of_ones_own(digits):
    network = metric.FeatureNetwork(
        lambda params, images: (images.reshape(len(images), 64) @ params, None),
        jnp.asarray(np.random.default_rng(0).normal(size=(64, 5)) / 8, jnp.float32),
        "projection",
    )
    result = labelled(digits, network=network, subsets=1)
    assert result["features"] == "projection" and result["class_agreement"] is None
    assert result["metrics"]["frechet"]["floor"] < 0.2


@pytest.mark.parametrize(
    "change, words",
    [
        ({"samples": np.zeros((50, 4, 4, 1))}, r"samples: shape \(50, 4, 4, 1\)"),
        ({"samples": np.full((900, 8, 8, 1), np.nan)}, "samples: 900 of 900 hold NaN"),
        ({"sample_labels": np.zeros(5, int)}, "samples labels"),
        ({"sample_labels": np.zeros(900)}, "float64; expected 900 integers"),
        ({"subsets": 0}, "subsets: 0"),
        ({"count": 1}, "count: 1"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(digits, change, words):
    with pytest.raises(ValueError, match=words) as caught:
        labelled(digits, **change)
    assert "\n" not in str(caught.value)


def test_the_classifier_refuses_other_image_sizes():
    with pytest.raises(ValueError, match=r"takes \(N, 8, 8, 1\)"):
        ev.class_agreement(ev.digits_network(), np.zeros((2, 28, 28, 1)), np.array([0, 1]))
