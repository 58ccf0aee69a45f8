"""Flags as POSIX semaphores in shared memory, and a memory fence made of one.

Two processes that share memory need more than plain stores: on ARM a flag could become visible
before the data it announces. POSIX (XBD 4.15.2, Memory Synchronization) lists ``sem_post``,
``sem_trywait`` and ``sem_clockwait`` among the functions that synchronize memory, so a semaphore
used as a binary flag orders data and flag on every architecture, without compiled code of our
own. It also sleeps in the kernel (a futex) instead of polling, which is what lets more ranks than
cores make progress.

Semaphores are passed by address: the caller keeps their memory mapped.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time

# Keeps two flags out of one cache line, and holds a sem_t (32 bytes on 64-bit Linux).
SEMAPHORE_BYTES = 64

_PROCESS_SHARED = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


# The process itself already has libc's semaphores. Calls that never block keep the GIL: giving it
# up costs more than the call.
_quick = ctypes.PyDLL(None)
_blocking = ctypes.CDLL(None, use_errno=True)

_sem_init = _quick.sem_init
_sem_init.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
_sem_post = _quick.sem_post
_sem_post.argtypes = (ctypes.c_void_p,)
_sem_trywait = _quick.sem_trywait
_sem_trywait.argtypes = (ctypes.c_void_p,)
_sem_getvalue = _quick.sem_getvalue
_sem_getvalue.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))

# glibc before 2.30 knows only the wall clock here. A clock that is set back in the middle of a
# wait then makes that one wait late.
_HAS_CLOCKWAIT = hasattr(_blocking, "sem_clockwait")
if _HAS_CLOCKWAIT:
    _sem_clockwait = _blocking.sem_clockwait
    _sem_clockwait.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Timespec))
else:
    _sem_timedwait = _blocking.sem_timedwait
    _sem_timedwait.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Timespec))


def init(address: int) -> None:
    """Make a semaphore, not set, usable by every process that maps the memory at ``address``."""
    result = _sem_init(address, _PROCESS_SHARED, 0)
    assert result == 0, f"sem_init at {address:#x}"


def is_set(address: int) -> bool:
    """Whether the semaphore is set; orders nothing."""
    value = ctypes.c_int()
    _sem_getvalue(address, ctypes.byref(value))
    return value.value > 0


def set_(address: int) -> None:
    """Set it (release): whoever takes it sees all that this thread wrote, and has read all."""
    _sem_post(address)


def try_take(address: int) -> bool:
    """Clear it and return True if it is set (acquire), else return False at once."""
    return _sem_trywait(address) == 0


def take(address: int, timeout_s: float) -> bool:
    """Sleep until it is set, then clear it and return True (acquire).

    Returns False after ``timeout_s`` seconds, or earlier when a Unix signal came in, so that
    Python can run its handler.
    """
    if _HAS_CLOCKWAIT:
        until = _after(time.monotonic_ns(), timeout_s)
        result = _sem_clockwait(address, time.CLOCK_MONOTONIC, until)
    else:
        result = _sem_timedwait(address, _after(time.time_ns(), timeout_s))
    if result == 0:
        return True
    code = ctypes.get_errno()
    assert code in (errno.ETIMEDOUT, errno.EINTR), f"sem_clockwait: {os.strerror(code)}"
    return False


def _after(now_ns: int, delay_s: float) -> _Timespec:
    return _Timespec(*divmod(now_ns + int(delay_s * 1e9), 1_000_000_000))


_fence_memory = ctypes.create_string_buffer(2 * SEMAPHORE_BYTES)
_fence_address = -(-ctypes.addressof(_fence_memory) // SEMAPHORE_BYTES) * SEMAPHORE_BYTES
init(_fence_address)


def fence() -> None:
    """A full fence: accesses before the call stay before accesses after it, loads and stores.

    Earlier accesses stay before the release of ``sem_post``, later ones after the acquire of
    ``sem_trywait``; and the release stays before the acquire, because both are atomic
    read-modify-writes of one word (on x86 each is a locked instruction and a full fence by
    itself; on ARMv8 a store-release stays before a later load-acquire). Threads that meet here
    only take each other's post.
    """
    _sem_post(_fence_address)
    taken = _sem_trywait(_fence_address)
    assert taken == 0, "a fence takes what it, or another thread's fence, has just posted"
