"""Weights through the buffers of `Upload`, on a CPU: what arrives is what was sent, whatever its size and type."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.models.upload import Upload


@pytest.fixture(scope="module")
def upload():
    upload = Upload(torch.device("cpu"), 3, buffer_bytes=64)
    yield upload
    upload.close()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 30),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.uint8]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_tensor_arrives_as_it_was(upload, rows, columns, dtype, transposed, seed):
    generator = torch.Generator().manual_seed(seed)
    sent = torch.randint(-100, 100, (rows, columns), generator=generator).float().to(dtype)
    sent = sent.T if transposed else sent
    arrived = upload(sent)
    assert arrived.shape == sent.shape
    assert arrived.dtype == dtype
    assert arrived.is_contiguous()
    assert torch.equal(arrived.reshape(-1).view(torch.uint8), sent.reshape(-1).view(torch.uint8))
    assert arrived.data_ptr() != sent.data_ptr() or not sent.numel()
