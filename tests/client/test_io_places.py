"""Places of tensors in host memory and in device memory."""

import pytest

torch = pytest.importorskip("torch")

from xditd.client.io_places import FINGERPRINTED_BYTES, DevicePlaces, IoPlaces  # noqa: E402
from xditd.ipc import limits  # noqa: E402
from xditd.ipc.transports.fingerprints import SAMPLE_BYTES  # noqa: E402

LARGE = limits.DEVICE_IO_FROM_BYTES


def test_places_begin_behind_the_fingerprint():
    assert FINGERPRINTED_BYTES == SAMPLE_BYTES
    places = IoPlaces(4096)
    assert places.add_input(torch.zeros(3)).offset_bytes == 4096
    assert places.add_room(100) == 4352
    assert places.size_bytes == 4452


def test_tensors_on_the_cpu_do_not_go_into_device_memory():
    places = DevicePlaces()
    assert not places.takes(torch.zeros(LARGE, dtype=torch.uint8))
    assert not places.reserves_on(torch.device("cpu"))
    assert places.index is None


@pytest.mark.gpu
def test_large_tensors_on_one_gpu_go_into_device_memory():
    places = DevicePlaces()
    assert not places.takes(torch.zeros(LARGE - 1, dtype=torch.uint8, device="cuda"))
    assert places.takes(torch.zeros(LARGE, dtype=torch.uint8, device="cuda:0"))
    assert places.index == 0
    assert places.reserves_on(torch.device("cuda:0"))
    assert not places.reserves_on(torch.device("cuda:1"))


@pytest.mark.multigpu
def test_tensors_on_a_second_gpu_go_through_host_memory():
    places = DevicePlaces()
    assert places.takes(torch.zeros(LARGE, dtype=torch.uint8, device="cuda:1"))
    assert not places.takes(torch.zeros(LARGE, dtype=torch.uint8, device="cuda:0"))
