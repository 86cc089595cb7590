"""Errors that only the thread meets which reads ahead: a passing one costs time alone, a lost block is told."""

import errno
import os
import threading

import pytest
import torch

from kvpress import PolicyCache
from kvpress.errors import CacheStateError
from kvpress.offload import Offload, TierError, TierLostError
from kvpress.offload import attached as attachment
from kvpress.offload.manager import TierManager
from kvpress.offload.store import FileStore
from kvpress.testing.families import random_tokens, tiny_model


class FailingAhead(FileStore):
    """Steps of other threads than the one that made it fail as `errors` says."""

    def __init__(self, directory):
        super().__init__(directory)
        self.owner = threading.get_ident()
        self.errors = {}
        self.failed = 0

    def step(self, name, function, *arguments, **options):
        if threading.get_ident() != self.owner and name in self.errors:
            self.failed += 1
            raise OSError(self.errors[name], os.strerror(self.errors[name]))
        return super().step(name, function, *arguments, **options)


@pytest.fixture
def stores(monkeypatch):
    made = []

    def open_store(folder):
        made.append(FailingAhead(folder))
        return made[-1]

    monkeypatch.setattr(attachment, "make_manager", lambda options, device: TierManager(options, open_store=open_store))
    return made


def decode(model, cache, ids, after_prompt=lambda: None):
    logits = []
    with torch.no_grad():
        for step, piece in enumerate(ids.split([ids.shape[1] - 8, *[1] * 8], dim=1)):
            logits.append(model(piece, past_key_values=cache).logits)
            if step == 0:
                after_prompt()
    return logits


def test_a_passing_error_costs_time_alone(folder, stores):
    model, ids = tiny_model("llama", num_hidden_layers=4), random_tokens(1, 60)
    expected = decode(model, PolicyCache(model, "full"), ids)
    cache = PolicyCache(model, "full", offload=Offload(disk=folder, block=8))
    found = decode(model, cache, ids, lambda: stores[0].errors.update(read=errno.EIO))
    assert all(map(torch.equal, found, expected))
    assert stores[0].failed >= 8 and cache.report().tiers[0].failures > 0
    cache.close()


def test_a_lost_block_is_told(folder, stores):
    model, ids = tiny_model("llama", num_hidden_layers=4), random_tokens(1, 60)
    cache = PolicyCache(model, "full", offload=Offload(disk=folder, block=8))
    with pytest.raises(TierLostError) as caught:
        decode(model, cache, ids, lambda: stores[0].errors.update(open=errno.ENOENT))
    assert caught.value.lost and stores[0].failed
    stores[0].errors.clear()
    with torch.no_grad(), pytest.raises((CacheStateError, TierError)):
        model(ids[:, :1], past_key_values=cache)
    cache.close()
