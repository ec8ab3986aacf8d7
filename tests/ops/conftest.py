import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small products: a second thread costs more than it brings, much more on a busy machine."""
    torch.set_num_threads(1)
