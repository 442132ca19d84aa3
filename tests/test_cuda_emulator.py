"""The emulator finds what it is there to find: each fault planted in a kernel of csrc/emulator/faults.cpp."""

from __future__ import annotations

import pytest

from fdistill_ops import _native

emulator = _native.emulator()
pytestmark = pytest.mark.skipif(emulator is None, reason="the emulator is not built (FDISTILL_EMULATOR=1)")

FAULTS = {
    "global_read": "read of global memory that is not the launch's",
    "global_write": "write to global memory that is not the launch's",
    "write_to_input": "only to be read",
    "misaligned": "misaligned access of 16 bytes",
    "shared_index": "element 64 of 64 in shared memory",
    "shared_size": "shared memory outside of the block's: byte 256 of 256",
    "uninitialised": "uninitialised shared memory: byte 0",
    "no_barrier": "race: shared memory read",
    "overwritten": "race: shared memory written",
    "half_a_barrier": "divergent barrier: a thread ends while others wait",
    "early_exit": "divergent barrier: a thread ends while others wait",
    "two_barriers": r"divergent barrier: .* while others wait at",
    "half_a_shuffle": "divergent shuffle",
    "half_a_cluster": "divergent barrier: a thread ends while others wait",
    "no_such_block": "shared memory of block 2 of a cluster of 2",
    "ended_block": "shared memory of a block that has ended",
    "endless": "waits for ever",
    "no_wait": "race: memory that the launch before writes, without a wait",
    "late_wait": "race: memory that the launch before writes, without a wait",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{name} \(emulated\): .*{FAULTS[name]}"):
        emulator.run_fault(name)


def test_code_below_the_device() -> None:
    """Of kernels compiled for a compute capability without clusters each block is one by itself."""
    before = emulator.settings()
    emulator.configure(*before[:-1], 80)
    try:
        with pytest.raises(RuntimeError, match="two_blocks"):
            emulator.run_fault("two_blocks")
    finally:
        emulator.configure(*before)
    assert emulator.run_fault("two_blocks")[:2] == [0.0, 1.0]


def test_a_right_kernel_runs_before_and_after_a_wrong_one() -> None:
    want = [float((i + 1) % 64) for i in range(64)]
    assert emulator.run_fault("right") == want
    with pytest.raises(RuntimeError):
        emulator.run_fault("endless")
    assert emulator.run_fault("right") == want
