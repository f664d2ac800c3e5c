"""Runs a command that the kernel kills, SIGSYS, as soon as it asks for a socket of the internet.

    python no_network.py PROGRAM ARGUMENT…

A filter of system calls (seccomp, Linux) kills at socket(AF_INET): it holds for native libraries,
threads and child processes too. The machine seems to have no IPv6, which some libraries ask when
they are imported, without a connection. Sockets of the machine's own stay.
"""

import ctypes
import errno
import os
import platform
import socket
import struct
import sys

# The numbers of <linux/audit.h> and of the system call `socket`.
_ARCH, _SOCKET = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}[platform.machine()]
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_KILL_PROCESS, _FAIL_WITH, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
# Offsets in struct seccomp_data.
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
# (code, jump if true, jump if false, value); jumps are relative.
_PROGRAM = [
    (_LOAD, 0, 0, _ARCHITECTURE),
    (_JUMP_IF_EQUAL, 0, 5, _ARCH),
    (_LOAD, 0, 0, _NUMBER),
    (_JUMP_IF_EQUAL, 0, 3, _SOCKET),
    (_LOAD, 0, 0, _FIRST_ARGUMENT),
    (_JUMP_IF_EQUAL, 2, 0, socket.AF_INET),
    (_JUMP_IF_EQUAL, 2, 0, socket.AF_INET6),
    (_RETURN, 0, 0, _ALLOW),
    (_RETURN, 0, 0, _KILL_PROCESS),
    (_RETURN, 0, 0, _FAIL_WITH | errno.EAFNOSUPPORT),
]


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def forbid_network() -> None:
    """From now on, for this process and its children; cannot be taken back."""
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in _PROGRAM)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    # Without privileges a filter is only accepted from a process that can never gain any.
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(
        _PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(_Filter(len(_PROGRAM), code))
    ):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


if __name__ == "__main__":
    forbid_network()
    os.execv(sys.argv[1], sys.argv[1:])
