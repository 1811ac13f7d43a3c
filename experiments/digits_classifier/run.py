"""Train the digits classifier whose features and logits ``jaxdiff.eval`` uses by default.

    python experiments/digits_classifier/run.py                # retrain, replace the shipped weights
    python experiments/digits_classifier/run.py --check        # only measure the shipped weights

The 1437 training images of ``jaxdiff.data.digits`` are the only ones seen; nothing is chosen on the 360 held-out ones
(the last step's weights are kept, whatever they score). About half a minute on two CPU cores.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import data, eval
from jaxdiff.eval import classifier

FOLDER = pathlib.Path(__file__).resolve().parent
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, DROPOUT, SMOOTHING = 80, 96, 2e-3, 0.02, 0.3, 0.05
HALF_BIN = 1.0 / 17  # 17 grey levels on [-1, 1]


def augment(key, images):
    """Move each image by -1, 0 or 1 pixels a side (0 half of the time) and jitter values inside their grey level."""
    key_shift, key_noise = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1.0 + HALF_BIN)
    shift = jax.random.choice(key_shift, jnp.array([0, 1, 1, 2]), (len(images), 2))
    moved = jax.vmap(lambda image, by: jax.lax.dynamic_slice(image, (by[0], by[1], 0), (8, 8, 1)))(padded, shift)
    return moved + jax.random.uniform(key_noise, images.shape, minval=-HALF_BIN, maxval=HALF_BIN)


def loss(params, key, images, labels):
    key_augment, key_drop = jax.random.split(key)
    keep = jax.random.bernoulli(key_drop, 1 - DROPOUT, (len(images), 64)) / (1 - DROPOUT)
    logits = classifier.apply(params, augment(key_augment, images), keep=keep).logits
    targets = optax.smooth_labels(jax.nn.one_hot(labels, classifier.CLASSES), SMOOTHING)
    return optax.softmax_cross_entropy(logits, targets).mean()


def train(seed, images, labels):
    """Parameters after ``EPOCHS`` passes in seeded order, and the mean loss of each epoch."""
    per_epoch = len(images) // BATCH
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, EPOCHS * per_epoch)
    decayed = {name: name.endswith("kernel") for name in classifier.SHAPES}
    optimiser = optax.adamw(schedule, weight_decay=WEIGHT_DECAY, mask=decayed)

    @jax.jit
    def epoch(params, state, key):
        key_order, key_steps = jax.random.split(key)
        order = jax.random.permutation(key_order, len(images))[: per_epoch * BATCH].reshape(per_epoch, BATCH)

        def step(carry, inputs):
            params, state = carry
            key, rows = inputs
            value, gradient = jax.value_and_grad(loss)(params, key, images[rows], labels[rows])
            updates, state = optimiser.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, state), values = jax.lax.scan(step, (params, state), (jax.random.split(key_steps, per_epoch), order))
        return params, state, values.mean()

    key_init, key_epochs = jax.random.split(jax.random.key(seed))
    params = classifier.init(key_init)
    state, losses = optimiser.init(params), []
    for key in jax.random.split(key_epochs, EPOCHS):
        params, state, value = epoch(params, state, key)
        losses.append(float(value))
    return params, losses


def measure(path):
    """Accuracies of a weights file, and the Frechet floor its features give at 360 images a side."""
    network = eval.digits_network(path)
    known, new = data.digits("train").examples(), data.digits("test").examples()
    result = eval.report(
        known["x0"],
        new["x0"],
        known["x0"],
        sample_labels=known["label"],
        heldout_labels=new["label"],
        train_labels=known["label"],
        network=network,
        subsets=50,
    )
    floor = result["metrics"]["frechet"]
    return {
        "train_accuracy": round(eval.class_agreement(network, known["x0"], known["label"]), 4),
        "heldout_accuracy": round(eval.class_agreement(network, new["x0"], new["label"]), 4),
        "frechet_floor": round(floor["floor"], 4),
        "frechet_floor_spread": round(floor["floor_spread"], 4),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=classifier.WEIGHTS, help="weights file to write")
    parser.add_argument("--check", action="store_true", help="measure the weights file, train nothing")
    options = parser.parse_args()
    if options.check:
        print(json.dumps(measure(options.out), indent=1))
        return

    known, new = data.digits("train").examples(), data.digits("test").examples()
    start = time.perf_counter()
    params, losses = train(options.seed, jnp.asarray(known["x0"]), jnp.asarray(known["label"]))
    seconds = time.perf_counter() - start
    stored = {name: jnp.asarray(np.asarray(value, np.float16), jnp.float32) for name, value in params.items()}
    found = classifier.apply(stored, jnp.asarray(new["x0"]))
    metadata = {
        "accuracy": eval.agreement_of_logits(found.logits, new["label"]),
        "seed": options.seed,
        "split": "jaxdiff.data.digits: 1437 train, 360 test (every fifth example in class order)",
        "input": "(N, 8, 8, 1), level k of 17 as 2 (k + 1/2) / 17 - 1",
        "epochs": EPOCHS,
    }
    classifier.save(options.out, params, metadata)
    results = measure(options.out)
    if options.out == classifier.WEIGHTS:
        recorded = {"seed": options.seed, "epochs": EPOCHS, "final_loss": round(losses[-1], 4), **results}
        (FOLDER / "results.json").write_text(json.dumps(recorded, indent=1) + "\n")
        title = f"digits classifier, held-out accuracy {results['heldout_accuracy']:.4f}"
        eval.loss_curves({"loss": (range(1, EPOCHS + 1), losses)}, FOLDER / "loss.png", title=title, x_label="epoch")
    print(f"{seconds:.0f} s, loss {losses[0]:.3f} -> {losses[-1]:.3f}, {options.out.stat().st_size} bytes")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
