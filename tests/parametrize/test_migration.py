"""Checkpoints and live models of torch's two functions, of plain models and of opnorm."""

import copy
import io

import pytest
import torch
from torch import nn

import opnorm
from parametrize.oracle import matrix_norm

hook, param = nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm


def network(wrap):
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Conv2d(3, 4, 3, padding=1)), nn.Flatten(), wrap(nn.Linear(4 * 16, 5)))


def trained(wrap):
    """With u and v converged, so that torch divides by the norm of the reshaped kernel to rounding."""
    model = network(wrap)
    for _ in range(400):
        model(torch.randn(2, 3, 4, 4))
    return model.eval()


def difference(found, expected):
    """Of two outputs, relative to the size of the second."""
    return float((found - expected).detach().norm() / expected.detach().norm())


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))
REPRODUCED = pytest.mark.parametrize("wrap", [hook, param], ids=["hook", "param"])


@REPRODUCED
def test_checkpoints_of_papers_give_the_same_outputs(wrap):
    theirs = trained(wrap)
    ours = network(lambda layer: opnorm.spectral_norm(layer, norm="reshaped"))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    assert difference(ours.eval()(X), theirs(X)) <= 1e-6


@REPRODUCED
def test_live_models_are_converted(wrap):
    theirs = trained(wrap)
    expected = theirs(X).detach()
    twin = copy.deepcopy(theirs) if wrap is param else None
    raws = {id(p) for p in theirs.parameters()}
    ours = opnorm.convert(theirs)
    assert {id(p) for p in ours.parameters()} == raws  # an optimizer keeps them
    assert difference(ours(X), expected) <= 1e-6
    ours.load_state_dict(ours.state_dict())  # no hook of torch's is left to ask for its keys
    if twin is not None:  # a deep copy shares its class with the original
        torch.testing.assert_close(twin(X), expected)
    assert not any("_u" in key for key in ours.state_dict())


def test_conversion_to_the_true_operator_on_request():
    model = opnorm.convert(trained(param), norm="operator")
    assert opnorm.norm(opnorm.fold(model)[0]).upper <= 1.001 and opnorm.norm(model[0]).lower > 0.99


def test_conversion_to_the_true_operator_learns_the_sizes():
    torch.manual_seed(0)
    model = nn.Sequential(param(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")))
    opnorm.convert(model, X, norm="operator")
    norm = opnorm.norm(opnorm.fold(model)[0], input_shape=X.shape[1:])
    assert norm.lower <= 1.0 and norm.upper > 0.99


def test_conversion_that_matches_nothing_is_an_error():
    with pytest.raises(opnorm.errors.ArgumentError, match="nothing in this Sequential"):
        opnorm.convert(network(lambda layer: layer))


def test_plain_and_own_checkpoints():
    plain = network(lambda layer: layer)
    ours = network(opnorm.spectral_norm)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    again = network(opnorm.spectral_norm)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again.eval()(X), ours.eval()(X))
    ours.load_state_dict(plain.state_dict())
    folded = opnorm.fold(ours)
    plain.load_state_dict(folded.state_dict())
    assert torch.equal(plain(X), ours(X))
    assert list(folded.state_dict()) == list(network(lambda layer: layer).state_dict())


def test_learned_scales_are_saved_and_filled_in():
    ours = opnorm.spectral_norm(nn.Linear(3, 3), learn_scale=True)
    ours.load_state_dict(nn.Linear(3, 3).state_dict())
    state = ours.state_dict()
    state["parametrizations.weight.0.scale"].fill_(0.0)
    ours.load_state_dict(state)
    assert matrix_norm(ours.eval().weight) == pytest.approx(0.5, rel=1e-4)


def scaled(theta):
    model = nn.Sequential(opnorm.spectral_norm(nn.Linear(3, 3), lipschitz=2.0, learn_scale=True))
    nn.init.constant_(model[0].parametrizations.weight[0].scale, theta)
    return model


def test_a_learned_scale_without_a_place_is_named_with_the_way_out():
    state, other = scaled(0.0).state_dict(), nn.Sequential(opnorm.spectral_norm(nn.Linear(3, 3), lipschitz=2.0))
    message = r"0\.weight: .*learned scale, 0\.5 K.*learn_scale=True.*opnorm\.fold"
    with pytest.warns(UserWarning, match=message), pytest.raises(RuntimeError, match=r"Unexpected key.*scale"):
        other.load_state_dict(state)
    with pytest.warns(UserWarning, match=message):
        found = other.load_state_dict(state, strict=False)
    assert found.unexpected_keys == ["0.parametrizations.weight.0.scale"]


def test_a_checkpoint_of_opnorm_without_a_learned_scale_says_so():
    state, other = nn.Sequential(opnorm.spectral_norm(nn.Linear(3, 3), lipschitz=2.0)).state_dict(), scaled(0.0)
    with pytest.warns(UserWarning, match=r"0\.weight: the checkpoint has no learned scale.* 0\.5 K"):
        other.load_state_dict(state)
    assert matrix_norm(other.eval()[0].weight) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("options", [{"lipschitz": 2.0}, {"mode": "clip"}, {"norm": "reshaped"}])
def test_a_checkpoint_of_another_k_says_so(options):
    state = nn.Sequential(opnorm.spectral_norm(nn.Linear(3, 3))).state_dict()
    with pytest.warns(UserWarning, match=rf"^0\.weight: .*{next(iter(options))}"):
        nn.Sequential(opnorm.spectral_norm(nn.Linear(3, 3), **options)).load_state_dict(state)


def test_missing_weights_are_still_missing():
    with pytest.raises(RuntimeError, match="original"):
        opnorm.spectral_norm(nn.Linear(3, 3)).load_state_dict({"bias": torch.zeros(3)})


@pytest.mark.parametrize("wrap", [hook, param, opnorm.spectral_norm], ids=["hook", "param", "opnorm"])
def test_normalising_twice_is_refused_with_the_way_out(wrap):
    layer = wrap(nn.Linear(3, 3))
    with pytest.raises(opnorm.errors.ArgumentError, match=r"convert|remove_spectral_norm"):
        opnorm.spectral_norm(layer)
