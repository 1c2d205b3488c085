"""Train a small convolutional network on handwritten digits, on GPU nodes outside the zone, with PyTorch.

    make torch                                   # once: adds PyTorch to .venv
    ray-gpu up --zone openlab
    python examples/digits_cnn.py --seed 1

Data-parallel: each sandbox keeps the rows that it was sent, once, and answers with its part of a mini-batch's gradient.
The zone adds the parts, steps, watches a validation segment, and keeps a checkpoint after each epoch: started again, it
goes on from there. A row's mini-batch follows from the row itself, so this is the same training as one in the zone, up
to rounding. The test segment never leaves: the zone's policy does not allow it.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

import ray_gpu

CLASSES, SIDE = 10, 8
#: Mini-batches of an epoch.
STEPS = 12
EPOCHS, PATIENCE, RATE = 40, 12, 6e-3
TRAIN, VALIDATION, TEST = [f"train/fold-{number}" for number in range(1, 5)], "train/fold-5", "test"

Gradient = Callable[[Any, int, int], list[dict[str, Any]]]


class Worker:
    """Some of the rows, and the network."""

    def __init__(self, seed: int) -> None:
        import torch

        torch.manual_seed(seed)
        nn = torch.nn
        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * SIDE * SIDE, 48), nn.ReLU(), nn.Linear(48, CLASSES)]
        self.network = nn.Sequential(*layers).double().to(self.device)
        self.images = torch.empty((0, 1, SIDE, SIDE), dtype=torch.float64, device=self.device)
        self.labels = torch.empty(0, dtype=torch.int64, device=self.device)
        self.keys = np.empty(0, np.uint64)

    def weights(self) -> Any:
        """Return the network's weights ``float64[n]``."""
        vector = self.torch.nn.utils.parameters_to_vector(self.network.parameters())
        return vector.detach().cpu().numpy()

    def take(self, batch: ray_gpu.Batch) -> int:
        """Keep a batch's rows for all epochs; return how many there are."""
        torch = self.torch
        images = torch.as_tensor(batch["pixels"].copy(), dtype=torch.float64, device=self.device)
        images = images.reshape(-1, 1, SIDE, SIDE)
        labels = torch.as_tensor(batch["label"].copy(), device=self.device)
        rows = zip(images.cpu().numpy(), labels.cpu().numpy(), strict=True)
        # What says which mini-batch a row is of, wherever and in whatever order it comes.
        digests = [hashlib.sha256(image.tobytes() + label.tobytes()).digest() for image, label in rows]
        keys = np.array([int.from_bytes(digest[:8], "big") for digest in digests], np.uint64)
        self.images, self.labels = torch.cat([self.images, images / 16]), torch.cat([self.labels, labels])
        self.keys = np.concatenate([self.keys, keys])
        return len(self.keys)

    def gradient(self, weights: Any, epoch: int, step: int) -> dict[str, Any]:
        """Return the loss and its gradient ``float64[n]``, summed over those rows here that are of a mini-batch."""
        functional = self.torch.nn.functional
        mixed = self.keys * np.uint64(2 * epoch + 1) >> np.uint64(32)
        chosen = self.torch.as_tensor(np.flatnonzero(mixed % np.uint64(STEPS) == step), device=self.device)
        self._load(weights)
        self.network.zero_grad()
        loss = functional.cross_entropy(self.network(self.images[chosen]), self.labels[chosen], reduction="sum")
        loss.backward()
        parts = [one.grad.reshape(-1) for one in self.network.parameters()]
        return {"rows": len(chosen), "loss": loss.item(), "gradient": self.torch.cat(parts).cpu().numpy()}

    def accuracy(self, weights: Any) -> float:
        """Return how many of the rows here are classified right, of 1."""
        self._load(weights)
        with self.torch.no_grad():
            return float((self.network(self.images).argmax(1) == self.labels).double().mean())

    def _load(self, weights: Any) -> None:
        vector = self.torch.as_tensor(np.array(weights), dtype=self.torch.float64, device=self.device)
        self.torch.nn.utils.vector_to_parameters(vector, self.network.parameters())


def train(
    gradient: Gradient, state: dict[str, Any], validate: Callable[[Any], float], save: Callable[[Any], None]
) -> Any:
    """Train with Adam until validation gets no better; return the best weights. Runs in the zone.

    Args:
        gradient: Gives the parts of a mini-batch's gradient, for weights, epoch and step.
        state: Where to begin, as :func:`beginning` or a checkpoint says.
        validate: Accuracy of weights on the validation rows.
        save: Keeps a checkpoint.
    """
    while state["epoch"] < EPOCHS and state["epoch"] - state["best_epoch"] < PATIENCE:
        epoch = state["epoch"]
        for step in range(STEPS):
            # Arguments count towards what a session may send in small: half the digits do as well.
            parts = gradient(state["weights"].astype(np.float32), epoch, step)
            mean = sum(part["gradient"] for part in parts) / max(1, sum(part["rows"] for part in parts))
            count = epoch * STEPS + step + 1
            state["first"] = 0.9 * state["first"] + 0.1 * mean
            state["second"] = 0.999 * state["second"] + 0.001 * mean**2
            scale = np.sqrt(state["second"] / (1 - 0.999**count)) + 1e-8
            rate = RATE * (1 - epoch / EPOCHS)
            state["weights"] = state["weights"] - rate * state["first"] / (1 - 0.9**count) / scale
            # What steps end at on average errs less than where one of them happens to.
            state["average"] = 0.97 * state["average"] + 0.03 * state["weights"]
        accuracy = validate(state["average"])
        state["epoch"] = epoch + 1
        if accuracy > state["best_accuracy"]:
            state |= {"best_epoch": epoch, "best_accuracy": accuracy}
        if accuracy == state["best_accuracy"]:
            # Of several that validation cannot tell apart, the one that learned longest.
            state["best"] = state["average"]
        save(state)
    return state["best"]


def beginning(weights: Any) -> dict[str, Any]:
    """Return the state of a training that has not begun."""
    nothing = {"first": 0 * weights, "second": 0 * weights, "best": weights, "best_accuracy": 0.0, "best_epoch": 0}
    return {"epoch": 0, "weights": weights, "average": weights, **nothing}


def rows_here(seed: int, rows: ray_gpu.Handle) -> Worker:
    """Return a worker in the zone that has some rows."""
    worker = Worker(seed)
    worker.take(ray_gpu.Batch(rows.to_arrow()))
    return worker


def train_remotely(zone: ray_gpu.Session, seed: int, *, say: Callable[[str], None] = print, **options: Any) -> Any:
    """Train on two GPU actors, from a checkpoint if there is one; return the best weights."""
    digits = zone.read("digits")
    validation = rows_here(seed, digits.segment(VALIDATION))
    state = beginning(validation.weights())
    # Of this network, whatever was tried before.
    name = f"digits-cnn-{seed}-{len(state['weights'])}"
    if any(one["name"] == name for one in zone.saved()):
        state = zone.load(name)
    say(f"seed {seed}: begins with epoch {state['epoch'] + 1}")
    remote = ray_gpu.gpu_remote(concurrency=2, shard_bytes=64 << 10, session=zone, **options)(Worker)
    with remote.remote(seed) as workers:
        workers.take.map_reduce(digits.segment(*TRAIN), len)
        best = train(workers.gradient.every, state, validation.accuracy, lambda now: zone.save(name, now))
    zone.forget(name)
    return best


def train_here(zone: ray_gpu.Session, seed: int) -> Any:
    """Train the same in the zone, to compare; return the best weights."""
    digits = zone.read("digits")
    worker, validation = (rows_here(seed, digits.segment(*names)) for names in (TRAIN, [VALIDATION]))
    gradient = lambda *asked: [worker.gradient(*asked)]  # noqa: E731 - one worker is a list of one
    return train(gradient, beginning(validation.weights()), validation.accuracy, lambda state: None)


def main() -> None:
    """Train on borrowed GPUs and in the zone, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--environment", default="", help="name or digest of a published environment with PyTorch")
    given = parser.parse_args()
    with ray_gpu.attach("openlab", purpose="teaching") as zone:
        test = rows_here(given.seed, zone.read("digits").segment(TEST))
        there = test.accuracy(train_remotely(zone, given.seed, environment=given.environment))
        here = test.accuracy(train_here(zone, given.seed))
    print(f"of {len(test.keys)} test digits are classified right: {there:.2%} as trained remotely, {here:.2%} as here")


if __name__ == "__main__":
    main()
