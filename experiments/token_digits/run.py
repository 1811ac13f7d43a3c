"""Digits as tokens: train a small network on the masked bound, measure it on held-out images, sample it.

    python experiments/token_digits/run.py

scikit-learn's 8x8 digits are 64 tokens of 17 grey levels. The 1437 training images are the only ones seen; settings were chosen
on every fifth of *them* (``--validate``), and the last step's average is kept. Writes results.json, loss.png and samples.png.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import data, discrete, eval, guidance, solver, train
from jaxdiff.network.dit import ZEROS, DiTBlock, modulated_norm, patchify, position_table, unpatchify
from jaxdiff.network.embedding import SMALL, labels_of
from jaxdiff.objective import Ctx
from jaxdiff.solver import grid

FOLDER = pathlib.Path(__file__).resolve().parent
LEVELS, CLASSES, SHAPE = 17, 10, (8, 8)
STEPS, BATCH, RATE, DECAY, DROPOUT, LABEL_DROP = 1600, 64, 3e-3, 0.05, 0.1, 0.1
PER_CLASS, DRAWS = 50, 64  # samples of each digit; draws of the bound for each held-out image
PROCESS = discrete.masked(LEVELS)


class TokenNet(nn.Module):
    """Tokens (B, 8, 8), 17 for masked -> logits (B, 8, 8, 17); told the label and no time."""

    width: int = 64
    depth: int = 3
    heads: int = 4
    patch: int = 2
    num_classes: int = CLASSES

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: Any, cond: Any = None) -> jax.Array:
        """Embedding and a 3x3 convolution, then transformer blocks on patches, under the label."""
        p, (rows, columns) = self.patch, SHAPE
        drop = nn.Dropout(DROPOUT, deterministic=not self.has_rng("dropout"))
        h = nn.Embed(LEVELS + 1, self.width // 2, embedding_init=SMALL, name="token")(x)
        h = patchify(h + nn.Conv(self.width // 2, (3, 3), name="neighbours")(h), p)
        h = nn.Dense(self.width, name="patch_embed")(h)
        h = h + position_table(rows // p, columns // p, self.width).astype(h.dtype)
        label = nn.Embed(self.num_classes + 1, self.width, embedding_init=SMALL, name="label")
        c = nn.silu(label(labels_of(cond, self.num_classes)))[:, None]
        for i in range(self.depth):
            h = drop(DiTBlock(self.heads, 4.0, jnp.float32, jnp.float32, name=f"block_{i}")(h, c))
        shift, scale = jnp.split(nn.Dense(2 * self.width, kernel_init=ZEROS, name="final_modulation")(c), 2, axis=-1)
        h = modulated_norm(h, shift, scale, jnp.float32)
        return unpatchify(nn.Dense(p * p * LEVELS, kernel_init=ZEROS, name="final")(h), rows, columns, p)


NET = TokenNet()


def tokens_of(split):
    """Tokens (N, 8, 8) and labels (N,) of a split of the digits."""
    examples = data.digits(split).examples()
    return data.to_levels(examples["x0"][..., 0], LEVELS), examples["label"]


class Losses:
    """Keeps what training logs."""

    def __init__(self):
        self.rows = []

    def write(self, step, row):
        """Record one row."""
        if "loss" in row:
            self.rows.append((step, row["loss"]))

    def close(self):
        """Nothing is open."""


def fit(tokens, labels, seed):
    """Averaged parameters after STEPS steps, and the logged losses."""
    # the pipeline's x0 is floating point; the tokens travel beside it
    values = {"x0": np.zeros((len(tokens), 1), np.float32), "tokens": tokens, "label": labels}
    source = data.arrays(values, num_classes=CLASSES)
    loss = discrete.masked_elbo(
        PROCESS,
        NET.apply,
        data_key="tokens",
        cond_key="label",
        label_drop=LABEL_DROP,
        null_label=CLASSES,
        rngs=("dropout",),
        seed=seed,
    )
    rule = train.optimiser(
        "adamw",
        learning_rate=RATE,
        schedule="cosine",
        steps=STEPS,
        warmup=100,
        clip=1.0,
        weight_decay=DECAY,
    )
    game = {"model": train.Player(loss, rule, ema=train.averages(0.995))}
    init = lambda key: {"model": NET.init(key, jnp.zeros((1, *SHAPE), jnp.int32), 0.0, jnp.zeros(1, jnp.int32))}
    kept = Losses()
    batches = data.pipeline(source, BATCH, seed=seed)
    out = train.train(game, init, batches, steps=STEPS, seed=seed, log_every=10, writers=[kept], progress_every=250)
    return jax.device_get(out.state.ema["model"][0]), kept.rows


def bound(params, tokens, labels):
    """Nats a pixel of every image (N,): the bound, each from DRAWS stratified draws of its own."""
    loss = discrete.masked_elbo(PROCESS, NET.apply, cond_key="label", label_drop=0.0)

    @jax.jit
    def one(params, image, label, i):
        index = i * DRAWS + jnp.arange(DRAWS)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), index)
        x0 = jnp.broadcast_to(image, (DRAWS, *SHAPE))
        batch = {"x0": x0, "label": jnp.full(DRAWS, label), "index": index}
        return loss(params, batch, keys, Ctx(step=jnp.int32(0)))[0]

    params = jax.device_put(params)
    return np.array([one(params, *each) for each in zip(jnp.asarray(tokens), labels, np.arange(len(labels)))])


def counted(train_set, heldout):
    """Nats a pixel of every held-out image under laws that are only counted, each smoothed by the one before it.

    ``p_k(v | context) = (n(v, context) + 17 p_{k-1}(v | shorter context)) / (n(context) + 17)`` at every pixel, in raster
    order, from the uniform law: its own marginal, then given the label, then the pixel to the left too, then the one above.
    """

    def contexts(tokens, labels):
        left, up = np.zeros_like(tokens), np.zeros_like(tokens)
        left[:, :, 1:], up[:, 1:] = tokens[:, :, :-1], tokens[:, :-1]
        label = np.broadcast_to(labels[:, None, None], tokens.shape)
        return [np.stack(parts) for parts in ([0 * label], [label], [label, left], [label, left, up])]

    seen, new = contexts(*train_set), contexts(*heldout)
    tokens, wanted = train_set[0], heldout[0]
    law = np.full((*wanted.shape, LEVELS), 1 / LEVELS)
    found = {}
    for name, known, asked in zip(("own", "label", "label, left", "label, left, above"), seen, new):
        counts = np.zeros((len(wanted), *SHAPE, LEVELS))
        for i in range(len(wanted)):
            same = np.all(known == asked[:, i][:, None], 0)
            for v in range(LEVELS):
                counts[i, ..., v] = np.sum(same & (tokens == v), 0)
        law = (counts + LEVELS * law) / (counts.sum(-1, keepdims=True) + LEVELS)
        found[name] = -np.log(np.take_along_axis(law, wanted[..., None].astype(int), -1)[..., 0]).mean((1, 2))
    return found


def drawn(params, steps, scale, seed=0):
    """PER_CLASS samples of every digit, class after class within each ten, and their labels."""
    labels = np.arange(PER_CLASS * CLASSES, dtype=np.int32) % CLASSES
    d = discrete.denoiser(PROCESS, NET.apply, params)
    if scale != 1:
        d = guidance.cfg(d, scale, null=jnp.int32(CLASSES))
    table = discrete.ancestral(PROCESS, grid.uniform(PROCESS, steps))
    x = solver.sample(table, d, jax.random.key(seed), (len(labels), *SHAPE), cond=jnp.asarray(labels))
    return data.from_levels(np.asarray(x), LEVELS)[..., None], labels


def nats(values):
    """Mean and standard error over images."""
    return {"mean": round(float(values.mean()), 4), "error": round(float(values.std() / np.sqrt(len(values))), 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate", action="store_true", help="hold out every fifth training image; write nothing")
    options = parser.parse_args()
    known, new = tokens_of("train"), tokens_of("test")
    if options.validate:
        fifth = np.arange(len(known[1])) % 5 == 0
        known, new = tuple(v[~fifth] for v in known), tuple(v[fifth] for v in known)
    start = time.perf_counter()
    params, losses = fit(*known, options.seed)
    print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)
    result = {
        "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(params)),
        "nats_per_pixel": {
            "uniform": round(float(np.log(LEVELS)), 4),
            **{f"counted: {name}": nats(values) for name, values in counted(known, new).items()},
            "bound, told no label": nats(bound(params, new[0], np.full(len(new[1]), CLASSES))),
            "bound": nats(bound(params, *new)),
            "bound, training images": nats(bound(params, *(v[::4] for v in known))),
        },
    }
    print(json.dumps(result, indent=1), f"{time.perf_counter() - start:.0f} s", flush=True)
    if options.validate:
        return

    network = eval.digits_network()
    real = [data.from_levels(tokens, LEVELS)[..., None] for tokens in (known[0], new[0])]
    result["class_agreement"] = {"held-out images": round(eval.class_agreement(network, real[1], new[1]), 4)}
    for scale, steps in ((1, 64), (1, 16), (1, 4), (2, 64)):
        samples, labels = drawn(params, steps, scale)
        agreement = eval.class_agreement(network, samples, labels)
        result["class_agreement"][f"{steps} steps, guidance scale {scale}"] = round(agreement, 4)
        if (scale, steps) == (1, 64):
            found = eval.report(
                samples, real[1], real[0], sample_labels=labels, heldout_labels=new[1], train_labels=known[1]
            )
            ratios = {name: found["metrics"][name]["ratio"] for name in ("frechet", "sliced_w2")}
            copies = found["memorisation"]["pixels"]["ratio"]
            result["ratio_to_floor"] = {k: round(float(v), 2) for k, v in ratios.items()}
            result["nearest_training_neighbour_ratio"] = round(float(copies), 2)
            rows = np.arange(100).reshape(10, 10).T.ravel()  # a digit a row
            eval.image_grid(samples[rows], 10, 10, FOLDER / "samples.png")
    (FOLDER / "results.json").write_text(
        json.dumps({"seed": options.seed, "steps": STEPS, **result}, indent=1) + "\n"
    )
    steps, values = zip(*losses)
    title = f"nats a pixel in training; held-out {result['nats_per_pixel']['bound']['mean']:.3f}"
    eval.loss_curves({"nats a pixel": (steps, values)}, FOLDER / "loss.png", title=title)
    print(json.dumps(result, indent=1))
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
