"""The training step of both networks in JAX: an epoch is one compiled `jax.lax.scan`.

Nothing here is imported where JAX is not installed (extra ``bench``); benchmarks/training.py
compares it with the others. PyTorch's conventions throughout: batch norm normalizes with the
batch's biased variance and remembers the unbiased one; tensors are named as in ``state_dict``.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import PREPARED
from mnist_batchnorm.training.loop import architecture

if TYPE_CHECKING:
    from benchmarks.training_job import Job, Stopwatch
    from mnist_batchnorm.core.params import TrainParams

Arrays = dict[str, Array]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch.optim.Adam's defaults


class State(NamedTuple):
    """What training changes: the network, Adam's two moments and its count of steps."""

    weights: Arrays
    statistics: Arrays
    first: Arrays
    second: Arrays
    steps: Array


def initial_state(state_dict: Mapping[str, npt.NDArray[Any]]) -> State:
    """Start from a PyTorch network's weights."""
    arrays = {name: jnp.asarray(array) for name, array in state_dict.items()}
    statistics = {name: array for name, array in arrays.items() if "running_" in name}
    weights = {name: a for name, a in arrays.items() if name.endswith((".weight", ".bias"))}
    zeros = jax.tree.map(jnp.zeros_like, weights)
    # not `zeros` twice: buffers are donated, and one cannot be given away two times
    return State(weights, statistics, zeros, jax.tree.map(jnp.copy, zeros), jnp.asarray(0))


def forward(
    params: "TrainParams", weights: Arrays, statistics: Arrays, images: Array, training: bool
) -> tuple[Array, Arrays]:
    """Return the logits, and the running statistics as they are afterwards."""
    last = len(params.hidden) + 1
    after = dict(statistics)
    hidden = images
    for i in range(1, last):
        hidden = hidden @ weights[f"linear{i}.weight"].T + weights[f"linear{i}.bias"]
        if f"bn{i}.weight" in weights:
            mean, variance = statistics[f"bn{i}.running_mean"], statistics[f"bn{i}.running_var"]
            if training:
                n, keep = len(images), 1 - params.bn_momentum
                old_mean, old_variance = mean, variance
                mean, variance = hidden.mean(axis=0), hidden.var(axis=0)
                after[f"bn{i}.running_mean"] = keep * old_mean + params.bn_momentum * mean
                unbiased = variance * (n / (n - 1))
                after[f"bn{i}.running_var"] = keep * old_variance + params.bn_momentum * unbiased
            hidden = (hidden - mean) * jax.lax.rsqrt(variance + params.bn_eps)
            hidden = hidden * weights[f"bn{i}.weight"] + weights[f"bn{i}.bias"]
        hidden = jax.nn.relu(hidden)
    return hidden @ weights[f"linear{last}.weight"].T + weights[f"linear{last}.bias"], after


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Return each image's loss (nats)."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -chosen[:, 0]


def adam(lr: float, state: State, gradients: Arrays, statistics: Arrays) -> State:
    """Update the weights as Kingma & Ba 2015, algorithm 1, in the order that PyTorch rounds in."""
    steps = state.steps + 1
    correction1, correction2 = 1 - BETA1**steps, 1 - BETA2**steps
    first, second, weights = {}, {}, {}
    for name, gradient in gradients.items():
        first[name] = BETA1 * state.first[name] + (1 - BETA1) * gradient
        second[name] = BETA2 * state.second[name] + (1 - BETA2) * gradient**2
        root = jnp.sqrt(second[name]) / jnp.sqrt(correction2) + EPSILON
        weights[name] = state.weights[name] - lr / correction1 * first[name] / root
    return State(weights, statistics, first, second, steps)


def train_epoch(
    params: "TrainParams", state: State, images: Array, labels: Array, order: Array
) -> State:
    """Take one step for each row of ``order``, indices ``[steps, batch]``."""

    def loss(weights: Arrays, statistics: Arrays, batch: Array) -> tuple[Array, Arrays]:
        logits, after = forward(params, weights, statistics, images[batch], training=True)
        return cross_entropy(logits, labels[batch]).mean(), after

    def step(state: State, batch: Array) -> tuple[State, None]:
        gradients, after = jax.grad(loss, has_aux=True)(state.weights, state.statistics, batch)
        return adam(params.lr, state, gradients, after), None

    trained: State = jax.lax.scan(step, state, order)[0]
    return trained


def evaluate(
    params: "TrainParams", state: State, images: Array, labels: Array
) -> tuple[Array, Array]:
    """Return mean cross-entropy (nats) and accuracy (0 to 1), in eval mode."""
    logits, _ = forward(params, state.weights, state.statistics, images, training=False)
    right = logits.argmax(axis=1) == labels
    return cross_entropy(logits, labels).mean(), right.mean()


def final_state(
    params: "TrainParams",
    state_dict: Mapping[str, npt.NDArray[Any]],
    images: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
    orders: list[npt.NDArray[np.int64]],
) -> dict[str, npt.NDArray[np.float64]]:
    """Train in float64, an epoch for each of the orders, and return the network's tensors."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        train = jax.jit(partial(train_epoch, params), donate_argnums=0)
        state = initial_state(state_dict)
        for order in orders:
            state = train(state, jnp.asarray(images), jnp.asarray(labels), jnp.asarray(order))
        return {name: np.asarray(a) for name, a in (state.weights | state.statistics).items()}
    finally:
        jax.config.update("jax_enable_x64", before)


def run(job: "Job", watch: "Stopwatch") -> None:
    """Measure the epochs of the job's networks, one network after another.

    Raises:
        UserError: This JAX cannot use the job's device.
    """
    try:
        device = jax.devices(job.device)[0]
    except RuntimeError:
        raise UserError(f"this JAX has no {job.device} plug-in") from None
    with jax.default_device(device):
        for variant in job.variants:
            run_network(job, watch, variant)


def run_network(job: "Job", watch: "Stopwatch", variant: str) -> None:
    """Measure one network's epochs; the first one compiles."""
    params = job.params
    # no jax.device_put: an array that is not committed follows the default device
    (images, labels), valid = (
        (jnp.asarray(network_input(split.images)), jnp.asarray(split.labels.astype("int32")))
        for split in (load_split(PREPARED / f"{name}.safetensors") for name in ("train", "valid"))
    )
    images, labels = images[: job.images], labels[: job.images]
    network = architecture(variant, params).build(params.seed).state_dict()
    state = initial_state({name: tensor.numpy() for name, tensor in network.items()})
    train = jax.jit(partial(train_epoch, params), donate_argnums=0)
    measure = jax.jit(partial(evaluate, params))
    generator = np.random.default_rng(params.seed)
    steps = len(labels) // params.batch_size
    watch.lap()
    for _ in range(params.epochs):
        order = generator.permutation(len(labels))[: steps * params.batch_size]
        order = order.astype("int32").reshape(steps, params.batch_size)
        state = jax.block_until_ready(train(state, images, labels, jnp.asarray(order)))
        training = watch.lap()
        for split in ((images, labels), valid):
            loss, accuracy = measure(state, *split)
            float(loss), float(accuracy)  # a caller waits for them, as the others' do
        watch.record(variant, training, watch.lap())
