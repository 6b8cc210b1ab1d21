"""Algorithm 1 against PyTorch's batch norm.

How far may two honest computations be from each other? With u, the unit roundoff, a sum of N
numbers in any order is within N u of the exact one, relative to the sum of their absolute values
(Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 4.2); any other operation
rounds once. So a mean is within (N + a few) u max|x| of the exact one, and x_hat within that over
the standard deviation, however well the rest is computed: units that lie far from 0, as measured in
standard deviations, lose digits. `Problem.tolerances` carries this into each result. PyTorch, which
sums float32 in float64, is held to the same.
"""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F  # noqa: N812 - as everyone calls it

from mnist_batchnorm.network.model import Architecture
from tests.network.batchnorm_reference import (
    BatchNorm,
    Running,
    Transform,
    backward,
    infer,
    normalize,
    scale_and_shift,
    update_running,
)

FEW = 8  # roundings besides a sum's
DTYPES = (torch.float32, torch.float64)
Layer = BatchNorm | nn.BatchNorm1d
LAYERS: tuple[type[Layer], ...] = (BatchNorm, nn.BatchNorm1d)


@dataclass(frozen=True)
class Problem:
    """A mini-batch, a gradient that arrives from above, and a layer's parameters; of one dtype."""

    x: Tensor
    d_y: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float

    def to(self, dtype: torch.dtype) -> "Problem":
        x, d_y, gamma, beta = (t.to(dtype) for t in (self.x, self.d_y, self.gamma, self.beta))
        return Problem(x, d_y, gamma, beta, self.eps)

    def double(self) -> "Problem":
        return self.to(torch.float64)

    def layer(self, kind: type[Layer], momentum: float | None = 0.1) -> Layer:
        layer = kind(self.x.shape[1], eps=self.eps, momentum=momentum).to(self.x.dtype)
        with torch.no_grad():
            layer.weight.copy_(self.gamma)
            layer.bias.copy_(self.beta)
        return layer

    @property
    def roundoff(self) -> float:
        """Relative error of a sum over the mini-batch; the reference's, in float64, included."""
        u = (torch.finfo(self.x.dtype).eps + torch.finfo(torch.float64).eps) / 2
        return (len(self.x) + FEW) * u

    def tolerances(self) -> dict[str, Tensor]:
        """Bound each result's distance from the exact one, to first order in u."""
        exact = self.double()
        x, d_y, gamma, beta = (t.abs() for t in (exact.x, exact.d_y, exact.gamma, exact.beta))
        variance, mean = torch.var_mean(exact.x, 0, correction=0)
        inverse_std = (variance + self.eps).rsqrt()
        x_hat = ((exact.x - mean) * inverse_std).abs()
        steepness = 1 + x.amax(0) * inverse_std
        in_x_hat = (1 + x_hat) * steepness
        natural = {
            "y": gamma * in_x_hat + beta,
            "d_x": 2 * gamma * inverse_std * d_y.amax(0) * (1 + x_hat.amax(0)) ** 2 * steepness,
            "d_gamma": (d_y * in_x_hat).sum(0),
            "d_beta": d_y.sum(0),
            "mean": x.amax(0),
            "variance": variance + 2 * variance.sqrt() * x.amax(0),
        }
        return {name: self.roundoff * scale for name, scale in natural.items()}


def random_problem(seed: int, n: int, units: int, eps: float = 1e-5) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Problem(normal(n, units), normal(n, units), normal(units), normal(units), eps)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Draw units that lie up to 1000 standard deviations from 0."""
    n, units = draw(st.integers(2, 40)), draw(st.integers(1, 6))
    scale = 10 ** draw(st.floats(-3, 3))
    offset = scale * draw(st.sampled_from([0, 1, 30, 1000]))
    drawn = random_problem(draw(st.integers(0, 2**32)), n, units, eps=10 ** draw(st.floats(-8, 0)))
    x = drawn.x
    x[0], x[1] = 1, -1  # by chance a unit would hardly vary, and first order would not be enough
    return replace(drawn, x=x * scale + offset).to(draw(st.sampled_from(DTYPES)))


def assert_within(tolerance: Tensor, actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert actual.shape == expected.shape, what
    worst = ((actual.double() - expected).abs() / tolerance).max()
    assert worst <= 1, f"{what}: {worst:.3g} times the tolerance"


def results(problem: Problem, layer: Layer) -> dict[str, Tensor]:
    x = problem.x.clone().requires_grad_()
    y = layer(x)
    d_x, d_gamma, d_beta = torch.autograd.grad(y, (x, layer.weight, layer.bias), problem.d_y)
    return {"y": y.detach(), "d_x": d_x, "d_gamma": d_gamma, "d_beta": d_beta}


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_by_hand() -> None:
    x = torch.tensor([[0], [0], [6], [6]], dtype=torch.float64)
    gamma, beta = x.new_tensor([6]), x.new_tensor([0.5])
    batch = normalize(x, eps=0)
    assert batch.mean.item() == 3
    assert batch.variance.item() == 9  # biased: 36 / 4
    assert batch.x_hat.flatten().tolist() == [-1, -1, 1, 1]
    assert scale_and_shift(batch.x_hat, gamma, beta).flatten().tolist() == [-5.5, -5.5, 6.5, 6.5]

    gradients = backward(x.new_tensor([[1], [0], [0], [0]]), batch, gamma)
    torch.testing.assert_close(gradients.x, x.new_tensor([[1], [-1], [0], [0]]))
    assert gradients.gamma.item() == -1
    assert gradients.beta.item() == 1

    running = update_running(Running(x.new_zeros(1), x.new_ones(1)), batch, momentum=0.25)
    assert running.mean.item() == 0.75
    assert running.variance.item() == 0.75 + 0.25 * 12  # unbiased: 36 / 3
    y = infer(x.new_tensor([[9]]), gamma, beta, Running(batch.mean, batch.variance), eps=0)
    assert y.item() == 6 * 2 + 0.5


@given(problems())
def test_train_mode(problem: Problem) -> None:
    exact = results(problem.double(), problem.double().layer(nn.BatchNorm1d))
    tolerances = problem.tolerances()
    for kind in LAYERS:
        for name, result in results(problem, problem.layer(kind)).items():
            assert result.dtype == problem.x.dtype
            assert_within(tolerances[name], result, exact[name], f"{name} of {kind}")


@given(problems())
def test_eval_mode(problem: Problem) -> None:
    trained = problem.layer(nn.BatchNorm1d)
    trained(problem.x)
    state = copied(trained)
    exact = problem.double().layer(nn.BatchNorm1d)
    exact.load_state_dict(state)
    expected = results(problem.double(), exact.eval())

    x, d_y = problem.double().x.abs(), problem.double().d_y.abs()
    inverse_std = (state["running_var"].double() + problem.eps).rsqrt()
    in_x_hat = (x + state["running_mean"].double().abs()) * inverse_std
    natural = {
        "y": problem.gamma.abs() * in_x_hat + problem.beta.abs(),
        "d_x": expected["d_x"].abs(),
        "d_gamma": (d_y * in_x_hat).sum(0),
        "d_beta": d_y.sum(0),
    }
    for kind in LAYERS:
        layer = problem.layer(kind).eval()
        layer.load_state_dict(state)
        for name, result in results(problem, layer).items():
            assert result.dtype == problem.x.dtype
            tolerance = problem.roundoff * natural[name]
            assert_within(tolerance, result, expected[name], f"{name} of {kind}")
        assert_same_bits(layer.state_dict(), state)


@given(problems(), st.none() | st.floats(0, 1), st.data())
def test_running_statistics(problem: Problem, momentum: float | None, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(2, len(problem.x)), min_size=1, max_size=5))
    batches = [(-2) ** i * problem.x[:size] for i, size in enumerate(sizes)]
    exact = problem.double().layer(nn.BatchNorm1d, momentum)
    for batch in batches:
        exact(batch.double())

    parts = [replace(problem, x=batch, d_y=problem.d_y[: len(batch)]) for batch in batches]
    tolerances = [part.tolerances() for part in parts]
    mean = torch.stack([tolerance["mean"] for tolerance in tolerances]).amax(0)
    variance = torch.stack([tolerance["variance"] for tolerance in tolerances]).amax(0)
    variance = 2 * variance + problem.roundoff  # N/(N-1) is at most 2; training starts from 1
    for kind in LAYERS:
        layer = problem.layer(kind, momentum)
        for batch in batches:
            layer(batch)
        state, expected = layer.state_dict(), exact.state_dict()
        assert_within(len(sizes) * mean, state["running_mean"], expected["running_mean"])
        assert_within(len(sizes) * variance, state["running_var"], expected["running_var"])
        assert state["num_batches_tracked"] == len(sizes)
        assert state["running_mean"].dtype == state["running_var"].dtype == problem.x.dtype


def test_running_statistics_without_momentum_are_the_papers_averages() -> None:
    """Algorithm 2, line 10."""
    batches = [3 * random_problem(0, n, 4).x + n for n in (2, 5, 9)]
    layer = BatchNorm(4, momentum=None).double()
    for batch in batches:
        layer(batch)
    torch.testing.assert_close(layer.running_mean, sum(x.mean(0) for x in batches) / 3)
    torch.testing.assert_close(layer.running_var, sum(x.var(0, correction=1) for x in batches) / 3)


@pytest.mark.parametrize("eps", [1e-3, 0.1])
@pytest.mark.parametrize(("n", "units"), [(2, 1), (2, 3), (5, 1), (7, 4)])
def test_gradients_are_those_of_finite_differences(n: int, units: int, eps: float) -> None:
    drawn = random_problem(0, n, units)
    inputs = [t.clone().requires_grad_() for t in (drawn.x, drawn.gamma, drawn.beta)]
    assert gradcheck(lambda *inputs: Transform.apply(*inputs, eps)[0], inputs)


@given(problems())
def test_gradient_put_together_is_the_chain_rule(problem: Problem) -> None:
    """What the docstring says that fast code computes."""
    exact = problem.double()
    batch = normalize(exact.x, exact.eps)
    d_x_hat = exact.d_y * exact.gamma
    along = (d_x_hat * batch.x_hat).mean(0)
    put_together = (d_x_hat - d_x_hat.mean(0) - batch.x_hat * along) * batch.inverse_std
    chain_rule = backward(exact.d_y, batch, exact.gamma).x
    assert_within(2 * exact.tolerances()["d_x"], chain_rule, put_together)


def test_second_derivative_is_refused_rather_than_wrong() -> None:
    drawn = random_problem(0, 4, 3)
    x = drawn.x.requires_grad_()
    y = BatchNorm(3).double()(x)
    (d_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(d_x.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 3, 40])
def test_unit_that_is_the_same_for_every_example(n: int, dtype: torch.dtype) -> None:
    drawn = random_problem(0, n, 3).to(dtype)
    constant = replace(drawn, x=torch.tensor([0, 0.1, -3], dtype=dtype).repeat(n, 1))
    layer = constant.layer(BatchNorm, momentum=1)
    ours = results(constant, layer)
    exact = {
        "y": constant.beta.expand(n, 3),
        "d_x": (drawn.d_y - drawn.d_y.mean(0)) * drawn.gamma / drawn.eps**0.5,
        "d_gamma": torch.zeros(3),
        "d_beta": drawn.d_y.sum(0),
    }
    for name, tolerance in constant.tolerances().items():
        if name in ours:
            assert_within(2 * tolerance, ours[name], exact[name].double(), name)
    assert (layer.state_dict()["running_var"] <= (constant.roundoff * constant.x[0]) ** 2).all()


@pytest.mark.parametrize("n", [0, 1])
def test_batch_without_variance_is_refused_in_train_mode(n: int) -> None:
    layer = BatchNorm(3)
    before = copied(layer)
    message = rf"more than 1 value per channel when training.*\[{n}, 3\].*drop_last.*eval\(\)"
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(n, 3))
    with pytest.raises(ValueError, match=message):
        normalize(torch.zeros(n, 3), 1e-5)
    assert_same_bits(layer.state_dict(), before)
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        nn.BatchNorm1d(3)(torch.zeros(1, 3))


def test_batch_of_one_is_fine_in_eval_mode() -> None:
    drawn = random_problem(0, 5, 3)
    layer = drawn.layer(BatchNorm)
    layer(drawn.x)
    layer.eval()
    one_by_one = torch.cat([layer(drawn.x[i : i + 1]) for i in range(5)])
    assert torch.equal(one_by_one, layer(drawn.x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3,), (4, 3, 2), (4, 3, 2, 2)])
def test_other_layouts_are_refused(shape: tuple[int, ...], training: bool) -> None:
    layer = BatchNorm(3).train(training)
    with pytest.raises(ValueError, match=rf"\[N, C\], got input size \[{shape[0]}"):
        layer(torch.zeros(shape))


def test_functions_leave_their_arguments_as_they_were() -> None:
    drawn = random_problem(0, 5, 3)
    running = Running(drawn.x.mean(0), drawn.x.var(0))
    batch = normalize(drawn.x, drawn.eps)
    arguments = (drawn.x, drawn.d_y, drawn.gamma, drawn.beta, *running, *batch)
    before = [tensor.clone() for tensor in arguments]
    normalize(drawn.x, drawn.eps)
    scale_and_shift(batch.x_hat, drawn.gamma, drawn.beta)
    backward(drawn.d_y, batch, drawn.gamma)
    update_running(running, batch, 0.1)
    infer(drawn.x, drawn.gamma, drawn.beta, running, drawn.eps)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_layer_begins_and_resets_like_pytorchs() -> None:
    theirs = nn.BatchNorm1d(3)
    layer = BatchNorm(3)
    assert (layer.eps, layer.momentum) == (theirs.eps, theirs.momentum)
    assert_same_bits(layer.state_dict(), theirs.state_dict())
    nn.init.constant_(layer.weight, 2)
    nn.init.constant_(layer.bias, 3)
    layer(torch.arange(12.0).reshape(4, 3))
    learned = copied(layer)
    layer.reset_running_stats()
    assert torch.equal(layer.weight, learned["weight"])
    assert torch.equal(layer.running_var, torch.ones(3))
    assert layer.num_batches_tracked == 0
    layer.reset_parameters()
    assert_same_bits(layer.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(("trained", "other"), [LAYERS, LAYERS[::-1]])
def test_state_dict_moves_both_ways(trained: type[Layer], other: type[Layer]) -> None:
    drawn = random_problem(0, 5, 3).to(torch.float32)
    layer = drawn.layer(trained)
    layer(drawn.x)
    twin = other(3)
    twin.load_state_dict(layer.state_dict())
    assert_same_bits(twin.state_dict(), layer.state_dict())
    torch.testing.assert_close(twin.eval()(drawn.x), layer.eval()(drawn.x))


def test_projects_network_computes_the_same_with_it() -> None:
    theirs = Architecture((12, 10, 8, 5), batch_norm=True).build().double()
    ours = copy.deepcopy(theirs)
    for name, layer in theirs.named_children():
        if isinstance(layer, nn.BatchNorm1d):
            swapped = BatchNorm(layer.num_features, layer.eps, layer.momentum).double()
            ours.set_submodule(name, swapped)
    assert sum(isinstance(layer, BatchNorm) for layer in ours) == 2
    ours.load_state_dict(theirs.state_dict())

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(16, 12, generator=generator, dtype=torch.float64)
    digits = torch.randint(5, (16,), generator=generator)
    losses = [F.cross_entropy(network.train()(images), digits) for network in (ours, theirs)]
    assert abs(losses[0] - losses[1]) <= 1e-12
    gradients = [
        torch.autograd.grad(loss, list(network.parameters()))
        for loss, network in zip(losses, (ours, theirs), strict=True)
    ]
    # of the network's largest: a bias before batch norm has the gradient 0, and shows roundoff
    scale = max(gradient.abs().max() for gradient in gradients[1])
    for (name, _), a, b in zip(theirs.named_parameters(), *gradients, strict=True):
        assert (a - b).abs().max() <= 1e-12 * scale, name
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-12, atol=1e-12)
