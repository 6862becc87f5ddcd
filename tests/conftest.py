"""What several files of tests share: tiny models in folders, and train.py in this process."""

import os
import sys
from unittest.mock import Mock

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch, which pytest's own process need not import


LONGEST = ("runs", "processes", "views", "evaluate", "suites", "bench", "docs", "models")


def pytest_collection_modifyitems(items):
    """The longest files first: a worker takes whole files, and so both end at about the same time."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with what tiny.save_models makes."""
    from tiny import save_models
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def quick(models, monkeypatch):
    """train.main in this process, on the flags of started.tiny, without what is drawn."""
    from started import quick_main, tiny
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return lambda *argv: quick_main(tiny(models, *argv))


@pytest.fixture
def no_network(monkeypatch):
    for name in ("torch.hub.urlopen", "huggingface_hub.hf_hub_download"):
        monkeypatch.setattr(name, Mock(side_effect=OSError("no network")))
