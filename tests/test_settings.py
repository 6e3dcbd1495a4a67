"""Settings of the process: overrides of the environment, and a version that changes with them."""

import pytest

from cpgemm import settings
from cpgemm.cost_model import H200
from cpgemm.heuristics import choose
from cpgemm.problem import GemmProblem


@pytest.fixture(autouse=True)
def restored():
    settings.set_pdl(None)
    yield
    settings.set_sms(None)
    settings.set_pdl(None)


def test_pdl_overrides_the_environment(monkeypatch):
    monkeypatch.setenv("CPGEMM_PDL", "1")
    assert settings.pdl() is True
    settings.set_pdl(False)
    assert settings.pdl() is False
    settings.set_pdl(None)
    assert settings.pdl() is True
    monkeypatch.delenv("CPGEMM_PDL")
    assert settings.pdl() is False


class Listener:
    def __init__(self) -> None:
        self.told = 0

    def forget(self) -> None:
        self.told += 1


def test_every_change_is_told_to_who_lives():
    listener, gone = Listener(), Listener()
    settings.on_change(listener.forget)
    settings.on_change(gone.forget)
    settings.set_pdl(True)
    before = len(settings._listeners)
    del gone
    settings.set_sms(64)
    assert listener.told == 2 and settings.sms() == 64
    assert len(settings._listeners) == before - 1


def test_no_pair_of_blocks_on_one_multiprocessor():
    import dataclasses

    one = dataclasses.replace(H200, sms=1)
    config = choose(GemmProblem(4096, 4096, 7168), one)
    assert config.cluster == 1 and config.blocks(100, one.sms) == 1
