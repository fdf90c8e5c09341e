"""A filter of system calls for the process itself, on Linux: no network, no other process, nothing written.

It needs no privilege, works in containers, and cannot be taken back. A denied call fails with EPERM, so that a library
that tries one for no need of its own goes on. BPF: https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x4000_0000
SET_MODE_FILTER = 1
# All threads; and without the processor's protections that slow every other instruction (they are for programs that
# run several parties' code, and this process runs one).
FLAG_TSYNC, FLAG_SPEC_ALLOW = 1, 4
LD_WORD, JUMP_EQUAL, JUMP_SET, JUMP_GREATER_EQUAL, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
RET_ALLOW, RET_ERRNO, RET_KILL = 0x7FFF_0000, 0x0005_0000, 0x8000_0000
NUMBER_AT, ARCH_AT, ARGUMENTS_AT = 0, 4, 16
CLONE_THREAD = 0x0001_0000
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_TMPFILE: the same on both architectures
WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000
INJECTING_IOCTLS = (0x5412, 0x541C, 0x5423)  # TIOCSTI, TIOCLINUX, TIOCSETD: typing into somebody's terminal

# name → numbers on x86-64 and aarch64; None: the architecture does not have it
Numbers = dict[str, tuple[int, int | None]]
NETWORK: Numbers = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242),
    # io_uring does all that without a call of its own.
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
}  # fmt: skip
PROCESSES: Numbers = {
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "process_madvise": (440, 440), "kcmp": (312, 272), "setns": (308, 268),
    "unshare": (272, 97), "setsid": (112, 157), "setpgid": (109, 154),
}  # fmt: skip
SYSTEM: Numbers = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429),
    "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116), "iopl": (172, None), "ioperm": (173, None),
    "userfaultfd": (323, 282), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "sethostname": (170, 161), "setdomainname": (171, 162), "setuid": (105, 146), "setgid": (106, 144),
    "setreuid": (113, 145), "setregid": (114, 143), "setresuid": (117, 147), "setresgid": (119, 149),
    "setgroups": (116, 159), "setfsuid": (122, 151), "setfsgid": (123, 152), "capset": (126, 91),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "fanotify_init": (300, 262), "lookup_dcookie": (212, 18), "personality": (135, 92),
}  # fmt: skip
# memfd_create: files in memory that no limit counts.
FILES: Numbers = {
    "creat": (85, None), "truncate": (76, 45), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None),
    "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466), "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
}  # fmt: skip
# The C library falls back to the older form of these, whose flags a filter can see.
UNREADABLE = {"clone3": (435, 435), "openat2": (437, 437)}
CLONE, OPENAT, KILL, TGKILL, PRLIMIT, IOCTL = (56, 220), (257, 56), (62, 129), (234, 131), (302, 261), (16, 29)
OPEN = {"x86_64": 2}


def _row(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _deny(error: int) -> bytes:
    return _row(RETURN, RET_ERRNO | error)


def program(machine: str, pid: int, *, writes: bool) -> bytes:
    """The filter for an architecture (x86_64, aarch64); `writes`: files may be written (a GPU's driver must)."""
    column = list(SYS_SECCOMP).index(machine)
    rows = [_row(LD_WORD, ARCH_AT), _row(JUMP_EQUAL, AUDIT_ARCH[machine], 1, 0), _row(RETURN, RET_KILL)]
    rows.append(_row(LD_WORD, NUMBER_AT))
    if machine == "x86_64":
        rows += [_row(JUMP_GREATER_EQUAL, X32_BIT, 0, 1), _deny(errno.EPERM)]
    tables = [NETWORK, PROCESSES, SYSTEM] + ([] if writes else [FILES])
    for table in tables:
        for numbers in table.values():
            number = numbers[column]
            if number is not None:
                rows += [_row(JUMP_EQUAL, number, 0, 1), _deny(errno.EPERM)]
    for numbers in UNREADABLE.values():
        rows += [_row(JUMP_EQUAL, numbers[column], 0, 1), _deny(errno.ENOSYS)]
    rows += _argument(CLONE[column], 0, [(JUMP_SET, CLONE_THREAD, True)], errno.EPERM)
    if not writes:
        rows += _argument(OPENAT[column], 2, [(JUMP_SET, WRITING, False)], errno.EACCES)
        if machine in OPEN:
            rows += _argument(OPEN[machine], 1, [(JUMP_SET, WRITING, False)], errno.EACCES)
    # Signals and limits of this process only: abort() and raise() are such.
    rows += _argument(KILL[column], 0, [(JUMP_EQUAL, pid, True)], errno.EPERM)
    rows += _argument(TGKILL[column], 0, [(JUMP_EQUAL, pid, True)], errno.EPERM)
    rows += _argument(PRLIMIT[column], 0, [(JUMP_EQUAL, pid, True), (JUMP_EQUAL, 0, True)], errno.EPERM)
    rows += _argument(IOCTL[column], 1, [(JUMP_EQUAL, one, False) for one in INJECTING_IOCTLS], errno.EPERM)
    return b"".join([*rows, _row(RETURN, RET_ALLOW)])


def _argument(number: int, which: int, tests: list[tuple[int, int, bool]], error: int) -> list[bytes]:
    """Rows for one call: the lower half of an argument against values that allow it, or that deny it."""
    allowing = tests[0][2]
    rest = len(tests) - 1
    rows = [_row(LD_WORD, ARGUMENTS_AT + 8 * which)]
    for i, (code, value, _) in enumerate(tests):
        # Behind the tests stands what happens where none holds, and behind that what happens where one does.
        rows.append(_row(code, value, rest - i + 1, 0))
    verdicts = [_row(RETURN, RET_ALLOW), _deny(error)]
    rows += verdicts[::-1] if allowing else verdicts
    return [_row(JUMP_EQUAL, number, 0, len(rows)), *rows]


def install(*, writes: bool) -> None:
    """Filter this process's calls from now on, all its threads'. Needs no_new_privs. Raises OSError."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in SYS_SECCOMP or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, f"no filter of system calls on {sys.platform} {machine}")
    code = program(machine, os.getpid(), writes=writes)

    class Program(ctypes.Structure):
        _fields_ = (("rows", ctypes.c_ushort), ("code", ctypes.c_char_p))

    held = Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_long(SYS_SECCOMP[machine])
    for flags in (FLAG_TSYNC | FLAG_SPEC_ALLOW, FLAG_TSYNC):
        if libc.syscall(number, SET_MODE_FILTER, flags, ctypes.byref(held)) == 0:
            return
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
