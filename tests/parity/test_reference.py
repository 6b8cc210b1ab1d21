import numpy as np
import pytest
import torch
from torch import nn

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.parity.reference import Reference, broken_inputs, probe_inputs
from mnist_batchnorm.parity.report import LARGEST_ERROR
from mnist_batchnorm.parity.runtime import RuntimeFailedError
from tests.support.parity_networks import Shape, cnn, layers_of, mlp

REAL = np.random.default_rng(0).random((20, 12)).astype(np.float32)
BROKEN = np.where(np.arange(20)[:, None] == 7, np.float32(np.nan), REAL)


def reference_of(model: nn.Sequential, shape: Shape = (12,), **given: object) -> Reference:
    return Reference(model, layers_of(model, shape), shape, **given)  # type: ignore[arg-type]


class TestProbeInputs:
    @pytest.mark.parametrize("shape", [(12,), (1, 6, 5), (3, 40, 40)])
    @pytest.mark.parametrize("real", [False, True])
    def test_are_finite_float32_of_the_shape(self, shape: Shape, real: bool) -> None:
        given = np.full((3, *shape), 0.5, np.float32) if real else None
        families = probe_inputs(shape, given)
        assert ("real" in families) == real
        for inputs in families.values():
            assert inputs.dtype == np.float32
            assert inputs.shape[1:] == shape
            assert len(inputs) > 0
            assert np.isfinite(inputs).all()

    def test_one_hot_reaches_each_element_with_both_signs(self) -> None:
        one_hot = probe_inputs((3, 4), None)["one-hot"].reshape(-1, 12)
        np.testing.assert_array_equal(one_hot, np.concatenate([np.eye(12), -np.eye(12)]) * 1e4)

    def test_one_hot_is_a_sample_spread_over_a_large_input(self) -> None:
        one_hot = probe_inputs((10_000,), None)["one-hot"]
        assert 2 * 1000 < len(one_hot) <= 2 * 4096
        places = np.flatnonzero(one_hot.any(axis=0))
        assert len(places) == len(one_hot) / 2
        assert places[[0, -1]].tolist() == [0, 9999]
        assert np.diff(places).max() <= 2 * np.diff(places).min()

    def test_scaled_inputs_are_derived_from_real_ones(self) -> None:
        families = probe_inputs((12,), REAL)
        assert families["real"] is REAL
        raw = families["raw pixels"]
        assert raw.max() == 255
        np.testing.assert_array_equal(raw, np.rint(REAL / REAL.max() * 255.0))
        np.testing.assert_allclose(families["times 1e6"], REAL * 1e6, rtol=1e-6)
        tiny = families["denormal"]
        assert 0 < tiny.max() < np.finfo(np.float32).tiny

    def test_all_zero_real_inputs_are_not_divided_by_zero(self) -> None:
        families = probe_inputs((12,), np.zeros((2, 12), np.float32))
        assert not families["raw pixels"].any()

    def test_are_deterministic(self) -> None:
        again = probe_inputs((12,), None)
        for name, inputs in probe_inputs((12,), None).items():
            np.testing.assert_array_equal(inputs, again[name])


class TestBrokenInputs:
    def test_break_one_element_at_four_places(self) -> None:
        broken = broken_inputs(REAL)
        for name, values in {"NaN": [np.nan], "+Inf": [np.inf], "-Inf": [-np.inf]}.items():
            bad = ~np.isfinite(broken[name])
            assert bad.sum(axis=1).tolist() == [1, 1, 1, 1]
            assert len(set(bad.argmax(axis=1))) == 4
            np.testing.assert_array_equal(broken[name][bad], values * 4)
            np.testing.assert_array_equal(broken[name][~bad], REAL[:4][~bad])
        both = broken["+Inf and -Inf"]
        assert np.isposinf(both).sum(axis=1).tolist() == [1, 1, 1, 1]
        assert np.isneginf(both).sum(axis=1).tolist() == [1, 1, 1, 1]
        assert np.isnan(broken["all NaN"]).all()

    def test_fewer_inputs_are_repeated(self) -> None:
        assert len(broken_inputs(REAL[:1])["NaN"]) == 4


class TestReference:
    def test_has_the_networks_outputs(self) -> None:
        model = mlp()
        reference = reference_of(model, inputs=REAL)
        family = reference.natural
        assert family is reference.families["real"]
        with torch.inference_mode():
            exact = mlp().double()(torch.from_numpy(REAL).double())
        np.testing.assert_allclose(family.exact, exact, rtol=1e-12, atol=1e-12)
        assert (np.abs(family.pytorch - family.exact) < 8 * family.sigma).all()
        assert (8 * family.sigma < family.bound).all()
        assert model[0].weight.dtype == torch.float32

    def test_is_natural_without_real_inputs(self) -> None:
        reference = reference_of(mlp())
        assert reference.natural is reference.families["normal"]
        assert "real" not in reference.families

    def test_covers_every_reachable_unit(self) -> None:
        reference = reference_of(mlp(3), inputs=np.zeros((1, 12), np.float32))
        assert reference.units == 14
        assert reference.uncovered_sides == []

    def test_searches_for_inputs_if_the_families_do_not_suffice(self) -> None:
        """The unit is on only for sums around 40, which no family has."""
        model = nn.Sequential(
            nn.Linear(12, 2), nn.ReLU(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)
        )
        with torch.no_grad():
            for module, weight, bias in (
                (model[0], [[1.0] * 12, [-1.0] * 12], [-40.0, 40.0]),
                (model[2], [[-1.0, -1.0]], [0.5]),
            ):
                assert isinstance(module, nn.Linear)
                module.weight.copy_(torch.tensor(weight))
                module.bias.copy_(torch.tensor(bias))
        reference = reference_of(model.eval())
        assert "directed" in reference.families
        assert reference.uncovered_sides == []
        assert reference.unreachable_sides == []

    def test_names_unreachable_sides(self) -> None:
        model = mlp(0)
        norm = model[1]
        assert isinstance(norm, nn.BatchNorm1d)
        with torch.no_grad():
            norm.weight[2] = 0
            norm.bias[2] = -1
        reference = reference_of(model)
        assert [str(side) for side in reference.unreachable_sides] == ["2[2] above 0"]
        assert reference.uncovered_sides == []

    def test_work_counts_each_place_of_a_convolution(self) -> None:
        model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten()).eval()
        reference = reference_of(model, (2, 8, 8))
        assert reference.work == 3 * 64 * 2 * 9 + 2 * 3 * 64

    def test_removes_its_hooks(self) -> None:
        model = mlp()
        assert reference_of(model).work > 0
        assert not any(module._forward_hooks for module in model.modules())

    @pytest.mark.parametrize(("model", "shape"), [(mlp(), (12,)), (cnn(), (2, 8, 8))])
    def test_expects_nan_where_pytorch_has_it(self, model: nn.Sequential, shape: Shape) -> None:
        broken = reference_of(model, shape).broken
        assert ("+Inf" in broken) == (shape == (12,))  # max pooling may drop NaN
        inputs, pytorch = broken["all NaN"]
        assert np.isnan(pytorch).all()
        assert len(inputs) == len(pytorch)

    def test_without_layers_has_no_error_model(self) -> None:
        model = mlp()
        reference = Reference(model, [], (12,), REAL)
        family = reference.natural
        assert not family.judged.any()
        assert (np.abs(family.pytorch - family.exact) < 1e-5).all()
        assert reference.broken == {}
        assert model[0].weight.dtype == torch.float32

    def test_measures_errors_of_any_output(self) -> None:
        family = reference_of(mlp(), inputs=REAL).natural
        wrong = family.pytorch.copy()
        wrong[0, 0], wrong[1, 1] = np.nan, -np.inf
        wrong[2, 2] += 1
        assert family.errors(wrong)[0, 0] == family.errors(wrong)[1, 1] == LARGEST_ERROR
        assert family.sigmas(wrong)[0, 0] == LARGEST_ERROR
        assert family.errors(wrong)[2, 2] == pytest.approx(1, abs=1e-5)
        assert family.sigmas(wrong)[2, 2] > 1e5

    def test_judges_no_output_that_may_overflow(self) -> None:
        model = mlp()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1e12)
        reference = reference_of(model)
        family = reference.families["times 1e6"]
        assert not family.judged.all()
        assert not family.sigmas(np.full(family.exact.shape, np.nan, np.float32))[
            ~family.judged
        ].any()

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            (np.zeros((3, 4), np.float64), r"gives float64 \[n, 4\], expected float32 \[n, 4\]"),
            (np.zeros((3, 5), np.float32), r"gives float32 \[n, 5\]"),
            (np.zeros((3,), np.float32), r"gives float32 \[n\]"),
            (np.zeros((3, 4, 1), np.float32), r"gives float32 \[n, 4, 1\]"),
        ],
    )
    def test_rejects_outputs_of_another_type_or_shape(
        self, output: np.ndarray, message: str
    ) -> None:
        with pytest.raises(RuntimeFailedError, match=message):
            reference_of(mlp()).flatten(output)

    def test_flattens_outputs_of_several_axes(self) -> None:
        model = nn.Sequential(*list(cnn())[:3]).eval()
        reference = Reference(model, [], (2, 8, 8))  # no error model: 256 outputs
        assert reference.output_shape == (4, 8, 8)
        assert reference.flatten(np.zeros((2, 4, 8, 8), np.float32)).shape == (2, 256)
        assert reference.natural.exact.shape[1] == 256


class TestRefuses:
    @pytest.mark.parametrize(
        ("inputs", "labels", "message"),
        [
            (REAL[:, :5], None, r"shape \[20, 5\], expected \[n, 12\]"),
            (REAL[:0], None, r"shape \[0, 12\]"),
            (REAL.astype(np.float64), None, "are float64, expected float32"),
            (np.where(REAL[7, 3] == REAL, np.nan, REAL), None, "NaN or infinity, first in row 7"),
            (REAL, np.zeros(19, int), r"int64 \[19\], expected integers \[20\]"),
            (REAL, np.zeros(20), r"float64 \[20\]"),
            (None, np.zeros(20, int), "no inputs that they belong to"),
        ],
    )
    def test_unusable_inputs_are_a_user_error(
        self, inputs: np.ndarray | None, labels: np.ndarray | None, message: str
    ) -> None:
        with pytest.raises(UserError, match=message):
            reference_of(mlp(), inputs=inputs, labels=labels)
