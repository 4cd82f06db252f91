"""Components that become the workers' own, in the real group: same bits, and all memory returned."""

from __future__ import annotations

import gc

import pytest
import torch

from xditd.client import LeaseLost
from xditd.ipc.status import LeaseState


def test_adopted_state_dict_outlives_its_client_with_the_same_bits(daemon, files, make_inputs, run):
    from xditd.client.demo import checkpoints

    inputs = make_inputs(seed=11)
    with daemon.connect() as lender:
        state = checkpoints.flux1_state_dict(1)
        loan = lender.lend(state)
        expected = run(lender, loan, inputs)
        copied = loan.adopt()
        assert copied.host_to_host == 2 * loan.lent_bytes  # one copy for each of two ranks
        assert loan.is_adopted
        for tensor in state.values():
            tensor.fill_(float("nan"))  # nobody reads it any more
        assert torch.equal(run(lender, loan, inputs), expected)
    del state, loan
    gc.collect()
    with daemon.connect() as other:
        (component,) = other.status().components
        assert (component.state, component.owner_pid) == (LeaseState.ADOPTED, 0)
        assert torch.equal(run(other, component.component_id, inputs), expected)
        # Another checkpoint of the same architecture uses the cached model, which returns to this one after.
        with other.lend(files.tuned) as tuned:
            assert not torch.equal(run(other, tuned, inputs), expected)
            assert torch.equal(run(other, component.component_id, inputs), expected)
        other.revoke(component.component_id)
        assert other.status().components == ()
        assert [worker.loaded for worker in other.status().workers] == [0, 0]
        with pytest.raises(LeaseLost, match="revoked by process"):
            run(other, component.component_id, inputs)


def test_adopted_file_keeps_its_bits(daemon, files, make_inputs, run):
    inputs = make_inputs(seed=12)
    with daemon.connect() as client:
        loan = client.lend(files.transformer)
        expected = run(client, loan, inputs)
        client.adopt(loan.component_id)
        assert torch.equal(run(client, loan, inputs), expected)
        loan.return_()  # nothing of it is mapped; the component stays
        assert torch.equal(run(client, loan.component_id, inputs), expected)
        client.revoke(loan)
