"""The fused training step: forward, backward and Adam, written out into preallocated buffers.

Autograd and `torch.optim` spend most of a small network's step outside its arithmetic. Here a step
is a fixed sequence of some twenty operators that write into preallocated tensors. Parameters,
gradients and moments are parts of one flat tensor each, so Adam is one operator. The same sequence
trains one network or several replicas: their matrix products as one batch, the channels of all as
one batch norm. On a GPU a hundred steps are one CUDA graph.

tests/training/test_fused.py compares the step with `nn.Module`, autograd and `torch.optim.Adam`;
any network that `fusible_blocks` rejects is trained by these (`autograd`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mnist_batchnorm.training.trainer import Progress, ignore_progress

ADAM_DEFAULTS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}  # torch.optim.Adam's
CHUNK_STEPS = 100  # steps between two progress reports; on a GPU, steps of one graph
CACHE_LINE_BYTES = 64  # parts of a flat tensor are aligned as separate tensors would be

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.out
_relu_backward = torch.ops.aten.threshold_backward.grad_input


@dataclass(frozen=True)
class Block:
    """A linear layer, followed by batch norm and ReLU, by ReLU alone, or last in its network."""

    linear: str  # name of the linear layer
    units: int  # its outputs
    norm: str | None = None  # name of the batch norm
    momentum: float = 0.0
    eps: float = 0.0


def fusible_blocks(model: nn.Module) -> list[Block] | None:
    """Return a network's blocks in order, or None if the fused step does not support it.

    Supported is an `nn.Sequential` of any number of Linear, optional BatchNorm1d and ReLU, and a
    last Linear: each of exactly that type, with PyTorch's defaults (bias, affine, running
    statistics) and without hooks, which the fused step would not call; everything trainable, no
    tensor used twice, all of one floating-point type.
    """
    if type(model) is not nn.Sequential or any(_has_hooks(module) for module in model.modules()):
        return None
    blocks: list[Block] = []
    # with repetitions, unlike named_children()
    layers = [(name, layer) for name, layer in model._modules.items() if layer]
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
    supported = (
        blocks
        and blocks[-1].norm is None
        and all(p.requires_grad and not _has_hooks(p) for p in model.parameters())
        and len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
        and {tensor.dtype for tensor in tensors} in ({torch.float32}, {torch.float64})
    )
    return blocks if supported else None


def _has_hooks(owner: nn.Module | Tensor) -> bool:
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_post_accumulate_grad_hooks",
    )
    return any(getattr(owner, kind, None) for kind in kinds)


def _allocate(shapes: Mapping[str, torch.Size], like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a flat tensor of zeros and its parts by name, each aligned to a cache line."""
    line = CACHE_LINE_BYTES // like.element_size()
    sizes = {name: -(-shape.numel() // line) * line for name, shape in shapes.items()}
    flat = like.new_zeros(sum(sizes.values()))
    pieces = torch.split(flat, list(sizes.values()))
    return flat, {
        name: piece[: shape.numel()].view(shape)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def is_capturable(tensor: Tensor) -> bool:
    """Whether steps on the tensor's device can be captured as a graph."""
    return tensor.is_cuda


def capture_graph(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture `work` as a CUDA graph, without running it, and return the graph's replay function.

    `work` must have run once before, so that CUDA's libraries are initialized:
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    graph = torch.cuda.CUDAGraph()
    # the current device may differ from the data's
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
        work()
    replay: Callable[[], None] = graph.replay
    return replay


class _Layer:
    """A block of all R replicas: views of their tensors, and buffers for one step.

    Buffers are ``[batch, R * units]``, the shape for batch norm and elementwise operators; ``_m``
    marks the same memory in the shape for matrix products, ``[R, batch, units]``, or
    ``[batch, units]`` for one replica.
    """

    def __init__(self, trainer: "FusedTrainer", block: Block, below: "_Layer | None") -> None:
        self.below = below
        self.norm = block.norm is not None
        self.momentum, self.eps = block.momentum, block.eps
        self.product = torch.mm if trainer.replicas == 1 else torch.bmm
        parameters, gradients = trainer.parameters, trainer.gradients
        self.weight_m = trainer.matrix_view(parameters[f"{block.linear}.weight"])
        self.weight_mt = self.weight_m.mT
        self.weight_gradient_m = trainer.matrix_view(gradients[f"{block.linear}.weight"])
        self.bias = parameters[f"{block.linear}.bias"].view(-1)
        self.bias_gradient = gradients[f"{block.linear}.bias"].view(1, -1)
        self.ones = trainer.batch.new_ones(1, trainer.batch_size)

        self.input_m = below.output_m if below else trainer.buffer_matrix_view(trainer.batch)
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
        self.sums_m = trainer.buffer_matrix_view(self.sums)
        self.output_m: Tensor = trainer.buffer_matrix_view(self.output)
        self.output_gradient_m: Tensor = trainer.buffer_matrix_view(self.output_gradient)
        self.sums_gradient_m = trainer.buffer_matrix_view(self.sums_gradient)
        self.sums_gradient_mt = self.sums_gradient_m.mT

    def affine(self) -> None:
        # sums = x W^T + b
        self.product(self.input_m, self.weight_mt, out=self.sums_m)
        self.sums.add_(self.bias)

    def forward(self) -> None:
        """Compute the output, and update the running statistics."""
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
        """Propagate the output's gradient to the sums, the parameters and the layer below."""
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
        # Batch norm subtracts the bias before it along with the mean, so its gradient is 0.
        # Autograd computes rounding noise instead, which Adam magnifies to whole steps.
        if not self.norm:
            torch.mm(self.ones, self.sums_gradient, out=self.bias_gradient)  # faster than a sum
        self.product(self.sums_gradient_mt, self.input_m, out=self.weight_gradient_m)
        if self.below:
            self.product(self.sums_gradient_m, self.weight_m, out=self.below.output_gradient_m)


class FusedTrainer:
    """Trains R replicas of one network with the fused step, each on its own batches.

    The networks' parameters and buffers become views of the trainer's tensors, so the networks are
    up to date whenever `run` returns.

    Attributes:
        tensors: everything that a step changes, by name, ``[R, ...]`` each.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        inputs: Tensor,
        labels: Tensor,
        batch_size: int,
        lr: float,
    ) -> None:
        """Prepare the buffers for R networks that differ in their weights only.

        ``inputs`` are ``[n, features]`` of the networks' dtype, ``labels`` int64 ``[n]``, all on
        one device. Raises a ValueError if the networks are not supported, or not alike.
        """
        blocks = fusible_blocks(models[0])
        if blocks is None or any(fusible_blocks(model) != blocks for model in models):
            raise ValueError("networks that the fused step does not support, or that are not alike")
        self.replicas, self.batch_size, self.lr = len(models), batch_size, lr
        self._inputs, self._labels = inputs, labels
        self._adopt(models)

        self.batch = inputs.new_zeros(batch_size, self.replicas * inputs.shape[1])
        self._images = self.batch.view(batch_size * self.replicas, -1)  # one image per row
        self._layers: list[_Layer] = []
        for block in blocks:
            self._layers.append(_Layer(self, block, self._layers[-1] if self._layers else None))

        # classes first: PyTorch vectorizes a softmax over the first axis only
        last = self._layers[-1]
        shape = (blocks[-1].units, batch_size, self.replicas)
        self._output = last.sums.view(*shape[1:], -1).permute(2, 0, 1)
        self._output_gradient = last.sums_gradient.view(*shape[1:], -1).permute(2, 0, 1)
        self._logits, self._targets = inputs.new_zeros(2, CHUNK_STEPS, *shape)
        self._softmax = torch.zeros_like(self._targets[0])
        self._rows, self._batch_labels = labels.new_zeros(2, CHUNK_STEPS, len(self._images))
        self._classes = torch.arange(shape[0], device=labels.device).view(-1, 1, 1)
        self._inverse_batch_size = 1 / batch_size
        self._steps = list(zip(self._rows, self._targets, self._logits, strict=True))
        self._replays: dict[int, Callable[[], None]] = {}

    def _adopt(self, models: Sequence[nn.Module]) -> None:
        shapes = {
            name: torch.Size((len(models), *parameter.shape))
            for name, parameter in models[0].named_parameters()
        }
        like = next(models[0].parameters()).detach()
        self._flat, self.parameters = _allocate(shapes, like)
        self._flat_gradient, self.gradients = _allocate(shapes, like)
        self._first_moments, first = _allocate(shapes, like)
        self._second_moments, second = _allocate(shapes, like)
        self._step_count = torch.zeros((), device=like.device)  # Adam's
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
            "step": self._step_count,
        }

    def matrix_view(self, stacked: Tensor) -> Tensor:
        """View ``[R, ...]`` in the shape for matrix products."""
        return stacked[0] if self.replicas == 1 else stacked

    def buffer_matrix_view(self, buffer: Tensor) -> Tensor:
        """View a buffer ``[batch, R * units]`` in the shape for matrix products."""
        return self.matrix_view(buffer.view(self.batch_size, self.replicas, -1).transpose(0, 1))

    @torch.no_grad()
    def run(self, order: Tensor, progress: Progress = ignore_progress) -> Tensor:
        """Take one step per batch; see `Trainer.run`. The order may be on any device."""
        steps = order.shape[1]
        rows = order.permute(1, 2, 0).reshape(steps, -1).to(self._rows.device)
        losses: Tensor = self._logits.new_empty(steps, self.replicas)
        for start in range(0, steps, CHUNK_STEPS):
            chunk = rows[start : start + CHUNK_STEPS]
            count = len(chunk)
            self._rows[:count].copy_(chunk)
            self._run_chunk(count)
            labels = self._batch_labels[:count].view(count, self.batch_size, self.replicas)
            loss = F.cross_entropy(self._logits[:count], labels, reduction="none")
            losses[start : start + count] = loss.mean(1)
            progress(count)
        for layer in self._layers:
            if layer.norm:
                layer.batches.add_(steps)
        return losses.transpose(0, 1)

    def _run_chunk(self, steps: int) -> None:
        """Take the first `steps` of `_rows`; on a GPU as one graph from the second time on."""
        if steps in self._replays:
            self._replays[steps]()
            return
        self._run_steps(steps)
        if is_capturable(self._rows):
            work = functools.partial(self._run_steps, steps)
            self._replays[steps] = capture_graph(work, self._rows.device)

    def _run_steps(self, steps: int) -> None:
        torch.index_select(
            self._labels, 0, self._rows[:steps].flatten(), out=self._batch_labels[:steps].flatten()
        )
        # the gradient of the mean of -log softmax is (softmax - one-hot) / batch
        labels = self._batch_labels[:steps].view(steps, 1, self.batch_size, self.replicas)
        self._targets[:steps].copy_(labels == self._classes).mul_(-self._inverse_batch_size)
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
        torch.add(target, self._softmax, alpha=self._inverse_batch_size, out=self._output_gradient)
        last.affine_backward()
        for layer in reversed(hidden):
            layer.backward()
        self._step_count.add_(1)
        torch._fused_adam_(
            [self._flat],
            [self._flat_gradient],
            [self._first_moments],
            [self._second_moments],
            [],
            [self._step_count],
            lr=self.lr,
            **ADAM_DEFAULTS,
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
        )
