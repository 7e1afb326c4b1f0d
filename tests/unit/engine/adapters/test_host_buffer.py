"""Large buffers are used again, and never while anybody still reads them."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from serve_app.engine.adapters.host_buffer import LARGE_BYTES, HostBuffers, book_page_locked_at_its_size


def test_a_dropped_buffer_is_used_again_by_one_of_about_its_size() -> None:
    buffers = HostBuffers()
    first = buffers.take(LARGE_BYTES + 1000)
    address = first.data_ptr()
    first.fill_(1)
    del first
    gc.collect()
    assert buffers.idle_bytes > 0
    again = buffers.take(LARGE_BYTES + 2000)
    assert again.data_ptr() == address
    assert len(again) == LARGE_BYTES + 2000
    assert buffers.idle_bytes == 0


def test_a_view_keeps_its_buffer_from_being_used_again() -> None:
    buffers = HostBuffers()
    view = buffers.take(LARGE_BYTES).fill_(7)[100:200].view(torch.int32)
    gc.collect()
    other = buffers.take(LARGE_BYTES).fill_(9)
    assert view.view(torch.uint8).eq(7).all()
    assert other.eq(9).all()
    assert buffers.idle_bytes == 0


def test_only_so_much_lies_idle() -> None:
    buffers = HostBuffers(max_idle_bytes=3 * LARGE_BYTES)
    held = [buffers.take(LARGE_BYTES) for _ in range(6)]
    assert buffers.idle_bytes == 0
    held.clear()
    gc.collect()
    assert buffers.idle_bytes == 3 * LARGE_BYTES
    small = buffers.take(10)
    del small
    gc.collect()
    assert buffers.idle_bytes == 3 * LARGE_BYTES


def test_a_size_that_fits_nothing_idle_gets_memory_of_its_own() -> None:
    buffers = HostBuffers()
    buffers.take(LARGE_BYTES)  # dropped at once
    large = buffers.take(4 * LARGE_BYTES + 5)
    assert len(large) == 4 * LARGE_BYTES + 5
    assert buffers.idle_bytes == LARGE_BYTES


def test_threads_never_share_a_buffer() -> None:
    buffers, faults = HostBuffers(), []

    def use(mark: int) -> None:
        for _ in range(30):
            buffer = buffers.take(LARGE_BYTES)
            buffer[:: 64 * 1024] = mark
            if not buffer[:: 64 * 1024].eq(mark).all():
                faults.append(mark)

    threads = [threading.Thread(target=use, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="here memory can be page-locked")
def test_what_cannot_be_page_locked_is_taken_pageable_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    buffer = HostBuffers().take(LARGE_BYTES, pinned=True)
    assert len(buffer.fill_(1)) == LARGE_BYTES
    assert "could not be page-locked" in caplog.text


def test_torch_knows_how_to_take_page_locked_memory_at_its_size() -> None:
    book_page_locked_at_its_size()  # an option that torch does not know raises
