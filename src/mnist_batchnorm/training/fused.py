"""The training step written out: forward, backward and Adam into buffers that are made once.

Autograd and `torch.optim` spend most of a small network's step outside its arithmetic. Here a step
is a fixed row of some twenty operators that write into preallocated tensors. Parameters, gradients
and moments are parts of one flat tensor each, so Adam is one operator. The same row trains one
network or several replicas side by side: their matrix products as one batch, the channels of all
as one batch norm. On a GPU a hundred steps are one CUDA graph.

tests/test_engine.py holds the step to `nn.Module`, autograd and `torch.optim.Adam`; a network that
`blocks_of` does not know is trained by these (fit.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

ADAM: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}  # torch.optim.Adam's defaults
CHUNK = 100  # steps between two looks at progress; on a GPU, steps of one graph
CACHE_LINE = 64  # bytes; parts of a flat tensor are aligned as tensors of their own would be

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.out
_relu_backward = torch.ops.aten.threshold_backward.grad_input


@dataclass(frozen=True)
class Block:
    """A linear layer and what follows it: batch norm and ReLU, ReLU alone, or nothing at the end.

    Attributes:
        linear: name of the linear layer in its network.
        units: its outputs.
        norm: name of the batch norm, or None.
        momentum, eps: the batch norm's.
    """

    linear: str
    units: int
    norm: str | None = None
    momentum: float = 0.0
    eps: float = 0.0


def blocks_of(model: nn.Module) -> list[Block] | None:
    """Take apart a network that the engine knows.

    It knows an `nn.Sequential` of Linear, BatchNorm1d or none, ReLU, over and over, and a last
    Linear: each of exactly that type, with what PyTorch gives it by default (bias, affine, running
    statistics) and without hooks, which a step that calls no module would leave out; everything
    trainable, no tensor used twice, all of one floating-point type.

    Returns:
        The blocks in order, the last without ReLU, or None for any other network.
    """
    if type(model) is not nn.Sequential or any(_has_hooks(module) for module in model.modules()):
        return None
    blocks: list[Block] = []
    layers = [(name, layer) for name, layer in model._modules.items() if layer]  # repeated ones too
    while layers:
        name, linear = layers.pop(0)
        if type(linear) is not nn.Linear or linear.bias is None:
            return None
        block = Block(name, linear.out_features)
        if layers and type(layers[0][1]) is nn.BatchNorm1d:
            norm_name, norm = layers.pop(0)
            assert isinstance(norm, nn.BatchNorm1d)
            if not norm.affine or not norm.track_running_stats or norm.momentum is None:
                return None
            block = Block(name, linear.out_features, norm_name, norm.momentum, norm.eps)
        blocks.append(block)
        if not layers:
            break
        if type(layers.pop(0)[1]) is not nn.ReLU or not layers:
            return None
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    known = (
        blocks
        and blocks[-1].norm is None
        and all(p.requires_grad and not _has_hooks(p) for p in model.parameters())
        and len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
        and {tensor.dtype for tensor in tensors} in ({torch.float32}, {torch.float64})
    )
    return blocks if known else None


def _has_hooks(owner: nn.Module | Tensor) -> bool:
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_post_accumulate_grad_hooks",
    )
    return any(getattr(owner, kind, None) for kind in kinds)


def _lay_out(shapes: Mapping[str, torch.Size], like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Make one flat tensor of zeros and name its parts, each aligned to a cache line."""
    line = CACHE_LINE // like.element_size()
    sizes = {name: -(-shape.numel() // line) * line for name, shape in shapes.items()}
    flat = like.new_zeros(sum(sizes.values()))
    pieces = torch.split(flat, list(sizes.values()))
    return flat, {
        name: piece[: shape.numel()].view(shape)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def on_gpu(tensor: Tensor) -> bool:
    """Whether steps can be recorded where the tensor lies."""
    return tensor.is_cuda


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record what the work asks of a GPU, without doing it, and return what does it.

    The work must have been done once, so that CUDA's libraries have set themselves up:
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    graph = torch.cuda.CUDAGraph()
    # the current device may be another than the data's
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
        work()
    replay: Callable[[], None] = graph.replay
    return replay


class _Layer:
    """A block of all R replicas: views of their tensors, and buffers for one step.

    Buffers are ``[batch, R * units]``, the form of batch norm and of the elementwise operators;
    ``_m`` marks the same memory as ``[R, batch, units]``, or ``[batch, units]`` for one replica,
    the form of the matrix products.
    """

    def __init__(self, trainer: "FusedTrainer", block: Block, below: "_Layer | None") -> None:
        self.below = below
        self.norm = block.norm is not None
        self.momentum, self.eps = block.momentum, block.eps
        self.product = torch.mm if trainer.replicas == 1 else torch.bmm
        parameters, gradients = trainer.parameters, trainer.gradients
        self.weight_m = trainer.one_or_all(parameters[f"{block.linear}.weight"])
        self.weight_mt = self.weight_m.mT
        self.weight_gradient_m = trainer.one_or_all(gradients[f"{block.linear}.weight"])
        self.bias = parameters[f"{block.linear}.bias"].view(-1)
        self.bias_gradient = gradients[f"{block.linear}.bias"].view(1, -1)
        self.ones = trainer.batch.new_ones(1, trainer.batch_size)

        self.input_m = below.output_m if below else trainer.product_form(trainer.batch)
        shape = (trainer.batch_size, len(self.bias))
        self.sums = self.output = trainer.batch.new_zeros(shape)  # ReLU in place
        self.output_gradient = self.sums_gradient = trainer.batch.new_zeros(shape)
        if self.norm:
            self.output, self.sums_gradient = trainer.batch.new_zeros((2, *shape))
            self.gamma = parameters[f"{block.norm}.weight"].view(-1)
            self.beta = parameters[f"{block.norm}.bias"].view(-1)
            self.gamma_gradient = gradients[f"{block.norm}.weight"].view(-1)
            self.beta_gradient = gradients[f"{block.norm}.bias"].view(-1)
            self.running_mean = trainer.buffers[f"{block.norm}.running_mean"].view(-1)
            self.running_var = trainer.buffers[f"{block.norm}.running_var"].view(-1)
            self.batches = trainer.buffers[f"{block.norm}.num_batches_tracked"]
            self.mean, self.inverse_deviation = self.bias.clone(), self.bias.clone()
        self.sums_m = trainer.product_form(self.sums)
        self.output_m: Tensor = trainer.product_form(self.output)
        self.output_gradient_m: Tensor = trainer.product_form(self.output_gradient)
        self.sums_gradient_m = trainer.product_form(self.sums_gradient)
        self.sums_gradient_mt = self.sums_gradient_m.mT

    def affine(self) -> None:
        """Compute the sums x W^T + b of the output below."""
        self.product(self.input_m, self.weight_mt, out=self.sums_m)
        self.sums.add_(self.bias)

    def forward(self) -> None:
        """Compute the output from the output below, and update the running statistics."""
        self.affine()
        if self.norm:
            torch.native_batch_norm(
                self.sums,
                self.gamma,
                self.beta,
                self.running_mean,
                self.running_var,
                True,
                self.momentum,
                self.eps,
                out=(self.output, self.mean, self.inverse_deviation),
            )
        self.output.relu_()

    def backward(self) -> None:
        """Turn the output's gradient into that of the sums, the parameters and the output below."""
        _relu_backward(self.output_gradient, self.output, 0, grad_input=self.output_gradient)
        if self.norm:
            _batch_norm_backward(
                self.output_gradient,
                self.sums,
                self.gamma,
                self.running_mean,
                self.running_var,
                self.mean,
                self.inverse_deviation,
                True,
                self.eps,
                [True, True, True],
                out0=self.sums_gradient,
                out1=self.gamma_gradient,
                out2=self.beta_gradient,
            )
        self.affine_backward()

    def affine_backward(self) -> None:
        """Pass the gradient of the sums on to the parameters and to the output below."""
        # A bias before batch norm moves the mean that is subtracted again: its gradient is 0.
        # Autograd finds rounding noise there, which Adam magnifies to whole steps.
        if not self.norm:
            torch.mm(self.ones, self.sums_gradient, out=self.bias_gradient)  # faster than a sum
        self.product(self.sums_gradient_mt, self.input_m, out=self.weight_gradient_m)
        if self.below:
            self.product(self.sums_gradient_m, self.weight_m, out=self.below.output_gradient_m)


class FusedTrainer:
    """Trains R replicas of one network, on batches of their own, with cross-entropy and Adam.

    The networks' parameters and buffers become views of the trainer's tensors: whenever `run` has
    returned, they are the trained networks.

    Attributes:
        tensors: everything that a step changes, by name, ``[R, ...]`` each, to be saved or to be
            filled with what was saved.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        inputs: Tensor,
        labels: Tensor,
        batch_size: int,
        lr: float,
    ) -> None:
        """Take over the networks.

        Args:
            models: R networks that differ in their numbers alone, on the device of the data.
            inputs: ``[n, features]``, of the networks' dtype.
            labels: int64 ``[n]``.
            batch_size: rows of the data that a replica sees in a step.
            lr: Adam's step size.

        Raises:
            ValueError: The engine does not know these networks, or they are not alike.
        """
        blocks = blocks_of(models[0])
        if blocks is None or any(blocks_of(model) != blocks for model in models):
            raise ValueError("networks that the engine does not know, or that are not alike")
        self.replicas, self.batch_size, self.lr = len(models), batch_size, lr
        self._inputs, self._labels = inputs, labels
        self._adopt(models)

        self.batch = inputs.new_zeros(batch_size, self.replicas * inputs.shape[1])
        self._images = self.batch.view(batch_size * self.replicas, -1)  # one image a row
        self._layers: list[_Layer] = []
        for block in blocks:
            self._layers.append(_Layer(self, block, self._layers[-1] if self._layers else None))

        # classes come first here: a softmax over the first axis is the one that is vectorized
        last = self._layers[-1]
        shape = (blocks[-1].units, batch_size, self.replicas)
        self._output = last.sums.view(*shape[1:], -1).permute(2, 0, 1)
        self._output_gradient = last.sums_gradient.view(*shape[1:], -1).permute(2, 0, 1)
        self._logits, self._targets = inputs.new_zeros(2, CHUNK, *shape)
        self._softmax = torch.zeros_like(self._targets[0])
        self._rows, self._answers = labels.new_zeros(2, CHUNK, batch_size * self.replicas)
        self._classes = torch.arange(shape[0], device=labels.device).view(-1, 1, 1)
        self._share = 1 / batch_size
        self._steps = list(zip(self._rows, self._targets, self._logits, strict=True))
        self._replays: dict[int, Callable[[], None]] = {}

    def _adopt(self, models: Sequence[nn.Module]) -> None:
        shapes = {
            name: torch.Size((len(models), *parameter.shape))
            for name, parameter in models[0].named_parameters()
        }
        like = next(models[0].parameters()).detach()
        self._flat, self.parameters = _lay_out(shapes, like)
        self._flat_gradient, self.gradients = _lay_out(shapes, like)
        self._first, first = _lay_out(shapes, like)
        self._second, second = _lay_out(shapes, like)
        self._count = torch.zeros((), device=like.device)  # Adam's, of steps
        self.buffers = {
            name: torch.stack([model.get_buffer(name) for model in models])
            for name, _ in models[0].named_buffers()
        }
        for replica, model in enumerate(models):
            for name, parameter in model.named_parameters():
                self.parameters[name][replica].copy_(parameter.detach())
                parameter.data = self.parameters[name][replica]
            for name, buffer in self.buffers.items():
                layer, _, key = name.rpartition(".")
                setattr(model.get_submodule(layer), key, buffer[replica])
        self.tensors = {
            **self.parameters,
            **self.buffers,
            **{f"{name}.exp_avg": part for name, part in first.items()},
            **{f"{name}.exp_avg_sq": part for name, part in second.items()},
            "step": self._count,
        }

    def one_or_all(self, stacked: Tensor) -> Tensor:
        """Give ``[R, ...]`` the form of the matrix products."""
        return stacked[0] if self.replicas == 1 else stacked

    def product_form(self, buffer: Tensor) -> Tensor:
        """Give a buffer ``[batch, R * units]`` the form of the matrix products."""
        return self.one_or_all(buffer.view(self.batch_size, self.replicas, -1).transpose(0, 1))

    @torch.no_grad()
    def run(self, order: Tensor, progress: Callable[[int], None] = lambda _: None) -> Tensor:
        """Take a step for each batch.

        Args:
            order: int64 ``[R, steps, batch]``, rows of the data, on any device.
            progress: told how many steps have been taken since it was last told.

        Returns:
            The mean cross-entropy (nats) of each batch before its step, ``[R, steps]``.
        """
        steps = order.shape[1]
        rows = order.permute(1, 2, 0).reshape(steps, -1).to(self._rows.device)
        losses: Tensor = self._logits.new_empty(steps, self.replicas)
        for start in range(0, steps, CHUNK):
            chunk = rows[start : start + CHUNK]
            taken = len(chunk)
            self._rows[:taken].copy_(chunk)
            self._launch(taken)
            answers = self._answers[:taken].view(taken, self.batch_size, self.replicas)
            loss = F.cross_entropy(self._logits[:taken], answers, reduction="none")
            losses[start : start + taken] = loss.mean(1)
            progress(taken)
        for layer in self._layers:
            if layer.norm:
                layer.batches.add_(steps)
        return losses.transpose(0, 1)

    def _launch(self, steps: int) -> None:
        """Take the steps that `_rows` holds; on a GPU as one graph from the second time on."""
        if steps in self._replays:
            self._replays[steps]()
            return
        self._take(steps)
        if on_gpu(self._rows):
            self._replays[steps] = captured(lambda: self._take(steps), self._rows.device)

    def _take(self, steps: int) -> None:
        torch.index_select(
            self._labels, 0, self._rows[:steps].flatten(), out=self._answers[:steps].flatten()
        )
        # the gradient of the mean of -log softmax is (softmax - one-hot) / batch
        answers = self._answers[:steps].view(steps, 1, self.batch_size, self.replicas)
        self._targets[:steps].copy_(answers == self._classes).mul_(-self._share)
        for step in self._steps[:steps]:
            self._step(*step)

    def _step(self, rows: Tensor, target: Tensor, logits: Tensor) -> None:
        *hidden, last = self._layers
        torch.index_select(self._inputs, 0, rows, out=self._images)
        for layer in hidden:
            layer.forward()
        last.affine()
        logits.copy_(self._output)
        torch.softmax(logits, 0, out=self._softmax)
        torch.add(target, self._softmax, alpha=self._share, out=self._output_gradient)
        last.affine_backward()
        for layer in reversed(hidden):
            layer.backward()
        self._count.add_(1)
        torch._fused_adam_(
            [self._flat],
            [self._flat_gradient],
            [self._first],
            [self._second],
            [],
            [self._count],
            lr=self.lr,
            **ADAM,
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
        )
