from __future__ import annotations

import copy
import functools
import inspect
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
from flux_pipelines import flux_transformer

from xditd.client import Unsupported
from xditd.client.diffusers.replaced_method import ReplacedMethod, check_not_replaced


def replaced(module: Any) -> ReplacedMethod:
    method = ReplacedMethod(module, "forward", lambda method, args, kwargs: method.bind(args, kwargs), None)
    method.install()
    return method


def test_arguments_are_named_as_in_the_class() -> None:
    module = flux_transformer()
    signature = inspect.signature(module.forward)
    replaced(module)
    assert inspect.signature(module.forward) == signature
    assert module.forward(1, None, timestep=3) == {"hidden_states": 1, "encoder_hidden_states": None, "timestep": 3}
    with pytest.raises(TypeError, match="unexpected keyword argument 'sigma'"):
        module.forward(1, sigma=2)


def test_module_gets_back_what_it_had() -> None:
    module = flux_transformer()
    method = replaced(module)
    method.remove()
    assert "forward" not in vars(module)
    # As a library leaves it that has removed its hooks.
    module.forward = own = module.forward
    method = replaced(module)
    method.remove()
    assert vars(module)["forward"] is own


def test_method_of_another_library_stays() -> None:
    module = flux_transformer()
    method = replaced(module)
    module.forward = other = functools.partial(module.forward, 1)
    method.remove()
    assert module.forward is other


def test_deep_copy_has_the_method_of_the_class() -> None:
    module = flux_transformer()
    replaced(module)
    other = copy.deepcopy(module)
    assert other.forward.__self__ is other
    assert other.forward.__func__ is type(module).forward


def test_pickling_is_refused() -> None:
    module = flux_transformer()
    replaced(module)
    with pytest.raises(Unsupported, match="runs in the workers and cannot be pickled"):
        ForkingPickler.dumps(module)


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (lambda module: functools.partial(print, module), "replaced before, by builtins.print"),
        (lambda module: ReplacedMethod(module, "forward", print, None), r"already: .* by unaccelerate\(pipe\)"),
    ],
)
def test_module_that_was_replaced_before_is_refused(forward: Any, text: str) -> None:
    module = flux_transformer()
    check_not_replaced(module, "forward", "transformer")
    module.forward = forward(module)
    with pytest.raises(Unsupported, match=text):
        check_not_replaced(module, "forward", "transformer")
