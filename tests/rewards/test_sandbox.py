"""Programs that try to earn, reach, keep or break something: none does; right ones still pass."""

import contextlib
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsft.rewards import code_tests, sandbox_worker
from jaxsft.rewards.code_tests import run_tests, same_value
from jaxsft.rewards.sandbox import Outcome, Sandbox, SandboxJob
from jaxsft.rewards.sandbox_worker import SYSTEM_CALLS, decode_value, encode_value

CANARY = "canary-7d1f"
MARK = "jaxsft_sandbox_mark"
PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/", ".")
SQUARE = code_tests.split_tests(
    ["assert f(2) == 4", "assert f(3) == 9", "assert f(-50) == 2500"], ""
)
RIGHT = "def f(x):\n\treturn x * x\r\n"
# Each gets as far as it can, and gives the right answer to nobody. MARK stands for a file's name.
ATTACKS = {
    # To end, and be taken for done.
    "sys_exit": "import sys\ndef f(x): sys.exit(0)",
    "exit_at_once": "raise SystemExit(0)",
    "os_exit": "import os\ndef f(x): os._exit(0)",
    "abort": "import os\ndef f(x): os.abort()",
    "kill_self": "import os, signal\ndef f(x): os.kill(os.getpid(), 9)",
    "quit": "def f(x): quit()",
    # To be equal to everything.
    "always_equal": "class E:\n def __eq__(s, o): return True\n def __hash__(s): return 4\n"
    " def __repr__(s): return '9'\ndef f(x): return E()",
    "lying_int": "class I(int):\n def __eq__(s, o): return True\n def __repr__(s): return '9'\n"
    " def __add__(s, o): return 9\n def __index__(s): return 9\ndef f(x): return I(1)",
    "lying_list": "class L(list):\n def __eq__(s, o): return True\n def __iter__(s): yield 9\n"
    "def f(x): return L([1])",
    "lying_class": "class M(type):\n __name__ = property(lambda s: 1 / 0)\n"
    " mro = lambda s: [s, int, object]\n"
    "class C(metaclass=M): pass\ndef f(x): return C()",
    "callable": "def f(x): return f",
    "not_a_number": "def f(x): return float('nan')",
    "true": "def f(x): return True",
    "text": "def f(x): return str(x * x)",
    "complex_text": "class S(str):\n def __eq__(s, o): return True\ndef f(x): return S('9')",
    # To hard-code the test that is shown.
    "table": "def f(x): return {2: 4}[x]",
    "constant": "def f(x): return 4",
    # To write the answers.
    "forge": "import os, json\nfor d in range(3, 50):\n for i in range(3):\n  try:\n"
    """   os.write(d, json.dumps([i, "value", 4]).encode() + b"\\n")\n  except OSError: pass\n"""
    "def f(x): raise SystemExit",
    "forge_shift": "import os\ndef f(x):\n for d in range(3, 50):\n  try:\n"
    """   os.write(d, b'[0,"value",4]\\n[2,"value",9]\\n[1,"value",4]\\n')\n"""
    "  except OSError: pass\n return 4",
    "forge_rubbish": "import os\ndef f(x):\n for d in range(3, 50):\n  try:\n"
    "   os.write(d, b'\\xff\\x00[[[[' * 1000 + b'\\n[1e999, {}]\\nnull\\n[]\\n{}\\n')\n"
    "  except OSError: pass\n return 4",
    "forge_deep": "import os\ndef f(x):\n for d in range(3, 50):\n  try:\n"
    """   os.write(d, b'[0,"value",' + b'[' * 50000 + b']' * 50000 + b']\\n')\n"""
    "  except OSError: pass\n return 4",
    "forge_huge_int": "import os\ndef f(x):\n for d in range(3, 50):\n  try:\n"
    """   os.write(d, b'[0,"value",' + b'9' * 60000 + b']\\n')\n"""
    "  except OSError: pass\n return 4",
    "forge_set_of_lists": "import os\ndef f(x):\n for d in range(3, 50):\n  try:\n"
    """   os.write(d, b'[0,"value",{"set":[[1]]}]\\n[0,"value",{"dict":5}]\\n')\n"""
    "  except OSError: pass\n return 4",
    "close_pipe": "import os\ndef f(x):\n os.closerange(0, 99)\n return x * x",
    # To see the answers, the helper or other programs.
    "frames": "import sys\ndef f(x):\n fr, out = sys._getframe(), []\n while fr:\n"
    "  out += [str(v) for v in fr.f_locals.values() if type(v) in (int, dict, tuple, list)]\n"
    "  fr = fr.f_back\n return out",
    "collector": "import gc\ndef f(x):\n"
    " return [o for o in gc.get_objects() if type(o) is dict and 'want' in o]",
    "referrers": "import gc, sys\ndef f(x): return str(gc.get_referrers(f))",
    "subclasses": "def f(x):\n"
    " return [c for c in object.__subclasses__() if 'Check' in c.__name__][0].want",
    "main_module": "import sys\ndef f(x): return str(vars(sys.modules['__main__']))",
    "patched_builtins": "import builtins\nbuiltins.enumerate = lambda x: iter([(0, 9)])\n"
    "builtins.eval = lambda *a: 9\nbuiltins.memoryview = lambda *a: b''\ndef f(x): return 4",
    "patched_json": "import json\njson.dumps = lambda *a: '[0,\"value\",4]'\ndef f(x): return 4",
    "audit_hook": "import sys\nsys.addaudithook(lambda *a: 1 / 0)\ndef f(x): return 4",
    "trace": "import sys\nsys.settrace(lambda fr, e, a: fr.f_locals.clear())\ndef f(x): return 4",
    "last_breath": "class D:\n def __del__(s): s.x = D()\nd = D()\ndef f(x): return 4",
    # To read.
    "environment": "import os\ndef f(x): return dict(os.environ)",
    "c_environment": "import ctypes\ndef f(x):\n"
    " e = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\n"
    " return [e[i] for i in range(1 if e[0] else 0)]",
    "proc_environ": "def f(x): return open('/proc/self/environ').read()",
    "parent_environ": "import os\ndef f(x): return open(f'/proc/{os.getppid()}/environ').read()",
    "password_file": "def f(x): return open('/etc/passwd').read()",
    "list_root": "import os\ndef f(x): return os.listdir('/')",
    "stat": "import os\ndef f(x): return os.stat('/etc').st_size",
    "own_memory": "def f(x): return open('/proc/self/mem', 'rb').read(9)",
    "low_level_open": "import os\ndef f(x): return os.open('/etc/hostname', 0)",
    "loader": "import importlib.machinery as m\n"
    "def f(x): return m.SourceFileLoader('a', '/etc/passwd').get_data('/etc/passwd')",
    "late_import": "def f(x):\n import sqlite3\n return sqlite3",
    "standard_input": "def f(x): return input()",
    # To leave something behind.
    "write_file": "def f(x):\n for d in PLACES:\n  try: open(d + '/MARK', 'w').write('x')\n"
    "  except OSError: pass\n return 4",
    "link": "import os\ndef f(x): os.symlink('/etc', '/tmp/MARK')",
    "mkdir": "import os\ndef f(x): os.mkdir('/tmp/MARK')",
    "memfd": "import os\ndef f(x): return os.memfd_create('MARK')",
    "temp_file": "import tempfile\ndef f(x): return tempfile.mkstemp('MARK')",
    "chmod": "import os\ndef f(x): os.chmod('/tmp', 0)",
    # To reach others.
    "socket": "import socket\ndef f(x): return socket.create_connection(('1.1.1.1', 80), 1)",
    "raw_socket": "import _socket\ndef f(x): return _socket.socket(1, 1)",
    "subprocess": "import subprocess\ndef f(x): return subprocess.check_output(['id'])",
    "shell": "import os\ndef f(x): return os.system('touch /tmp/MARK') or 4",
    "exec": "import os\ndef f(x): os.execv('/bin/sh', ['sh', '-c', 'touch /tmp/MARK'])",
    "fork_bomb": "import os\ndef f(x):\n while True: os.fork()",
    "fork_bomb_caught": "import os\ndef f(x):\n while True:\n  try: os.fork()\n"
    "  except OSError: pass",
    "daemon": "import os, time\ndef f(x):\n if os.fork(): os._exit(0)\n os.setsid()\n"
    " time.sleep(9)",
    "threads": "import threading\ndef f(x):\n"
    " t = threading.Thread(target=lambda: None)\n t.start()\n return 4",
    "kill_parent": "import os\ndef f(x): os.kill(os.getppid(), 9)",
    "kill_all": "import os\ndef f(x): os.kill(-1, 9)",
    "kill_group": "import os\ndef f(x): os.killpg(0, 9)",
    "c_kill": "import ctypes\ndef f(x):\n c = ctypes.CDLL(None)\n c.kill(c.getppid(), 9)\n"
    " c.ptrace(16, c.getppid(), 0, 0)\n return 4",
    "c_system_calls": "import ctypes\ndef f(x):\n c = ctypes.CDLL(None)\n"
    " return [n for n in range(1000) if n not in ALLOWED and c.syscall(n, 0, 0, 0, 0, 0) >= 0]",
    "lift_limits": "import resource\ndef f(x):\n"
    " resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))\n return 4",
    "undo_confinement": "import ctypes\ndef f(x):\n c = ctypes.CDLL(None)\n"
    " return [c.prctl(38, 0, 0, 0, 0), c.prctl(1, 0, 0, 0, 0), c.prctl(22, 0, 0, 0, 0)]",
    # To take for ever, or too much.
    "loop": "def f(x):\n while True: pass",
    "loop_at_once": "while True: pass",
    "deaf_loop": "import signal\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n"
    " except (OSError, ValueError): pass\ndef f(x):\n while True:\n  try:\n   while True: pass\n"
    "  except BaseException: pass",
    "sleep": "import time\ndef f(x): time.sleep(1000)",
    "deadlock": "import threading\ndef f(x):\n k = threading.Lock()\n k.acquire()\n k.acquire()",
    "wait_for_signal": "import signal\ndef f(x): signal.pause()",
    "stop_self": "import os, signal\ndef f(x): signal.raise_signal(signal.SIGSTOP)",
    "memory": "def f(x): return len([0] * 10**10)",
    "slow_memory": "def f(x):\n a = []\n while True: a.append(bytearray(10**7))",
    "huge_value": "def f(x): return 'a' * 10**8",
    "huge_output": "import os\ndef f(x):\n for d in range(50):\n"
    "  try:\n   while True: os.write(d, b'a' * 10**6)\n  except OSError: pass",
    "much_print": "def f(x):\n for i in range(10**9): print('a' * 10**6)",
    "endless_generator": "def f(x):\n while True: yield x",
    "cycle": "def f(x):\n a = []\n a.append(a)\n return a",
    "collisions": "def f(x): return {i * (2**61 - 1) for i in range(5000)}",
    "recursion": "def f(x): return f(x)",
    "stack": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "c_stack": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n a = []\n"
    " for _ in range(10**6): a = [a]\n return repr(a)",
    "brackets": "def f(x): return eval('(' * 10**6)",
    "deep_code": "x = " + "-" * 100_000 + "1",
    "sums": "x = " + "1+" * 100_000 + "1",
    "int_bomb": "def f(x): return 9**9**9",
    "text_of_int": "import sys\nsys.set_int_max_str_digits(0)\ndef f(x): return str(7**10**7)",
    "regex": "import re\ndef f(x): return re.match('(a+)+$', 'a' * 60 + 'b')",
    "bad_pointer": "import ctypes\ndef f(x): return ctypes.string_at(1)",
    "null_byte": "def f(x):\0 return 4",
    "no_python": "Sure! Here is the code.",
    "surrogates": "def f(x): return '\\ud800'",
    "noisy_error": "def f(x): raise type('\u202eE\\n', (Exception,), {})('x' * 10**6)",
    "raising_error": "class E(BaseException):\n def __str__(s): raise s\n"
    " __class__ = property(__str__)\ndef f(x): raise E",
}


def adapted(code: str) -> str:
    allowed = {*SYSTEM_CALLS[platform.machine()].values(), *range(335, 337)}  # uprobes: SIGILL
    code = code.replace("PLACES", repr(PLACES)).replace("ALLOWED", repr(allowed))
    return code.replace("MARK", MARK)


def processes_below(pid: int) -> list[int]:
    found = []
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = each.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(each.parent.name))
    return found


@pytest.fixture(scope="module")
def sandbox():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", CANARY)
        with Sandbox(spare_seconds=1) as made:  # no second time for the endless ones
            yield made


@pytest.fixture(scope="module")
def attacked(sandbox):
    """What each attack earned and said; every second program is a right one."""
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become this process's children
    before = {*processes_below(os.getpid())}
    answers = [each for code in ATTACKS.values() for each in (adapted(code), RIGHT)]
    said = sandbox.run([SandboxJob(code, "", SQUARE.calls) for code in answers])
    rewards = [
        code_tests.score_code(code, SQUARE, each) for code, each in zip(answers, said, strict=True)
    ]
    assert {*processes_below(os.getpid())} == before
    assert processes_below(sandbox._helper.pid) == []
    libc.prctl(36, 0, 0, 0, 0)
    attacks = {name: (rewards[2 * i], said[2 * i]) for i, name in enumerate(ATTACKS)}
    return attacks, rewards[1::2]


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_earns_nothing_and_learns_nothing(name: str, attacked):
    reward, outcomes = attacked[0][name]
    assert reward.value == 0
    assert reward.reason.isprintable() and len(reward.reason) < 120
    assert CANARY not in str(outcomes)
    assert "PATH" not in str(outcomes) and "HOME" not in str(outcomes)
    assert not [place for place in PLACES if Path(place, MARK).exists()]


def test_right_programs_among_attacks_earn_all(attacked):
    assert {reward.value for reward in attacked[1]} == {1.0}


def test_what_an_attack_could_reach_is_nothing(attacked):
    said = {name: [each.value for each in outcomes] for name, (_, outcomes) in attacked[0].items()}
    assert said["environment"] == [{}] * 3
    assert said["c_environment"] == said["c_system_calls"] == [[]] * 3


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(("no_python", "syntax"), ("loop", "timeout"), ("memory", "memory"), ("kill_all", "forb")),
        *(("table", "0 of 2 hidden tests: raised KeyError"), ("true", "wrong value")),
        *(("sys_exit", "raised SystemExit"), ("os_exit", "exited"), ("socket", "forbidden call")),
        *(("always_equal", "not a plain value"), ("deaf_loop", "timeout"), ("sleep", "forbidden")),
        ("recursion", "raised RecursionError"),
    ],
)
def test_the_reason_says_what_went_wrong(name: str, reason: str, attacked):
    assert attacked[0][name][0].reason.startswith(reason)


def test_a_helper_that_dies_fails_what_ran_in_it_and_no_more():
    with Sandbox(workers=2) as sandbox:
        os.kill(sandbox._helper.pid, signal.SIGKILL)
        sandbox._helper.wait()
        found = sandbox.run([SandboxJob("x = 3", "", ("x",))] * 5)
        assert found[:2] == [[Outcome(None, "no answer")]] * 2
        assert found[2:] == [[Outcome(3, "")]] * 3


def test_an_interrupt_leaves_no_process_and_the_sandbox_goes_on(monkeypatch):
    with Sandbox(first_seconds=60, workers=1) as sandbox:
        helper = sandbox._helper.pid

        def interrupted(live):
            raise KeyboardInterrupt

        monkeypatch.setattr(sandbox, "_wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sandbox.run([SandboxJob("while True: pass", "", ("1",))])
        monkeypatch.undo()
        assert not Path("/proc", str(helper)).exists()
        assert sandbox.run([SandboxJob("x = 3", "", ("x",))]) == [[Outcome(3, "")]]


PARENT = """
import sys
from jaxsft.rewards.sandbox import SandboxJob, Sandbox
with Sandbox(first_seconds=600, workers=2) as sandbox:
    print(sandbox._helper.pid, flush=True)
    sandbox.run([SandboxJob("while True: pass", "", ("1",))] * 2)
"""


@pytest.mark.parametrize("victim", ["parent", "helper"])
def test_programs_die_with_the_parent_and_with_the_helper(victim: str):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    with parent:
        helper = int(parent.stdout.readline())
        while len(children := processes_below(helper)) < 2:
            time.sleep(0.01)
        os.kill(parent.pid if victim == "parent" else helper, signal.SIGKILL)
        while any(is_running(pid) for pid in (helper, *children)):  # but for the kill: 600 s
            time.sleep(0.01)
        parent.kill()


def test_a_program_that_waits_is_ended_by_the_clock_and_one_that_computes_is_not(
    tmp_path, monkeypatch
):
    """Nothing that a program may call waits, so here another process stops it."""
    source = Path(sandbox_worker.__file__).read_text()
    assert "_WALL_SECONDS = 4.0" in source
    (tmp_path / "worker.py").write_text(
        source.replace("_WALL_SECONDS = 4.0", "_WALL_SECONDS = 2.0")
    )
    monkeypatch.setattr(sandbox_worker, "__file__", str(tmp_path / "worker.py"))
    busy = "import time\nwhile time.process_time() < 2.2: pass"
    with Sandbox(first_seconds=600, workers=1) as sandbox:
        assert sandbox.run([SandboxJob(busy, "", ("1",))]) == [[Outcome(1, "")]]
        wait, stopped = sandbox._wait, []

        def stopping(live):
            while not stopped:
                stopped.extend(processes_below(sandbox._helper.pid))
            with contextlib.suppress(ProcessLookupError):  # it ended: a pause
                os.kill(stopped[0], signal.SIGSTOP)
            return wait(live)

        monkeypatch.setattr(sandbox, "_wait", stopping)
        found = sandbox.run([SandboxJob("while True: pass", "", ("1",))])
    assert found == [[Outcome(None, "timeout")]]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("1, 22, 38, 2", "1, 22, 38, 7", "Invalid argument"),  # another mode of seccomp
        (
            "0x00050000 | 1",
            "0x7FFF0000",
            "the filter does not hold",
        ),  # allows what it should refuse
        ("def _main", "raise SystemExit\ndef _main", "its helper ended at once"),
        ("", "", "no allow list"),
    ],
)
def test_where_programs_cannot_be_confined_none_runs(old, new, why, tmp_path, monkeypatch):
    if old:
        source = Path(sandbox_worker.__file__).read_text()
        assert old in source
        (tmp_path / "worker.py").write_text(source.replace(old, new))
        monkeypatch.setattr(sandbox_worker, "__file__", str(tmp_path / "worker.py"))
    else:
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ValueError, match="can't be run safely on this machine") as error, Sandbox():
        pass
    assert why in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("machine", SYSTEM_CALLS)
def test_the_filter_allows_its_list_and_nothing_else(machine: str):
    """The BPF program, interpreted."""
    made = sandbox_worker._make_filter(machine)
    program = [made.instructions[i] for i in range(made.length)]

    def result(arch: int, number: int) -> int:
        at, loaded = 0, {4: arch, 0: number}
        while True:
            each = program[at]
            if each.code == 0x20:
                value = loaded[each.operand]
            elif each.code == 0x15:
                at += each.jump_true if value == each.operand else each.jump_false
            else:
                return each.operand
            at += 1

    own, other = sandbox_worker._AUDIT_ARCH[machine], 0x40000003  # 32-bit calls of x86
    allowed = {*SYSTEM_CALLS[machine].values()}
    numbers = [*range(1024), *(0x40000000 | number for number in range(1024))]
    assert {n for n in numbers if result(own, n) == sandbox_worker._ALLOW} == allowed
    assert {result(other, n) for n in numbers} == {sandbox_worker._KILL}


def test_what_honest_solutions_use():
    code = (
        "import collections, dataclasses, typing, sys, math\n"
        "@dataclasses.dataclass\nclass P:\n x: 'int'\n"
        "class T(typing.NamedTuple):\n a: int\n"
        "print('é' * 3, file=sys.stderr)\n"
        "if __name__ == '__main__': input()\n"
    )
    calls = {
        "collections.Counter('aab')": {"a": 2, "b": 1},
        "collections.defaultdict(int, a=1)": {"a": 1},
        **{"T(3)": (3,), "P(2).x": 2, "math.factorial(1000) % 7": 0},
        "__import__('datetime').datetime.strptime('2020', '%Y').year": 2020,
        "__import__('fractions').Fraction(1, 2)": 0.5,
        "(lambda f: f(f, 900))(lambda f, n: n and f(f, n - 1))": 0,
    }
    with Sandbox() as sandbox:
        (found,) = sandbox.run([SandboxJob(code, "", tuple(calls))])
    assert found == [Outcome(value, "") for value in calls.values()]


FORGER = """
import os
for number in range(3, 9):
    try: os.write(number, b'[0,"value",' + VALUE + b']\\n')
    except OSError: pass
os._exit(0)
"""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *(('"' + "a" * 200_000 + '"', "no answer"), ("9" * 4299, "no answer")),
        *((json.dumps([[0] * 6_000] * 2), "no answer"), ("[" * 70 + "]" * 70, "no answer")),
        *(('{"bytes":"' + "00" * 150_000 + '"}', "no answer"), ("NaN", "wrong value")),
        *((json.dumps({"set": [*range(1001)]}), "no answer"), ("9" * 4000, "wrong value")),
        *(('{"complex":["1",2]}', "raised TypeError"), ('{"complex":[[],2]}', "no answer")),
    ],
    ids=range(10),
)
def test_a_forged_value_of_any_size_does_not_stop_the_second_look(value, reason, sandbox):
    """`max(f(2), 0) == 4` is looked at with the value that came, in a process of its own."""
    tests = code_tests.split_tests(["assert max(f(2), 0) == 4"])
    forger = FORGER.replace("VALUE", repr(value.encode()))
    assert run_tests(sandbox, [(forger, tests)]) == [(0, reason)]


def test_orders_of_sets_and_random_numbers_are_the_same_in_every_run():
    job = SandboxJob("import random", "", ("list(set('abcdefghij'))", "random.random()"))
    found = []
    for _ in range(2):
        with Sandbox(workers=1) as sandbox:
            found += sandbox.run([job, job])
    assert found == found[:1] * 4 and not found[0][0].error


def test_slow_solutions_have_time_where_few_are_slow_and_a_batch_is_bounded():
    slow = SandboxJob("def f():\n for i in range(10**10): pass", "", ("f()",))
    rates = {"first_seconds": 0.01, "spare_seconds": 0.12, "cpu_seconds": 0.1}
    asked = []
    with Sandbox(**rates) as sandbox:
        run_all = sandbox._run_all
        sandbox._run_all = lambda programs, cpu: (
            asked.append((len(programs), cpu)) or run_all(programs, cpu)
        )
        for count in (1, 4, 8):
            assert sandbox.run([slow] * count) == [[Outcome(None, "timeout")]] * count
    assert asked == [(1, 0.01), (1, 0.1), (4, 0.01), (4, 0.03), (8, 0.01)]


keys = st.integers() | st.text() | st.tuples(st.integers(), st.text()) | st.floats(allow_nan=False)
literals = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary())
    | st.one_of(st.complex_numbers(), st.integers(10**400, 10**400 + 5), st.sets(keys))
    | st.frozensets(keys),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner, max_size=5)
    ),
    max_leaves=10,
)


@settings(deadline=None)
@given(literals)
def test_values_travel_exactly(value):
    came = decode_value(json.loads(json.dumps(encode_value(value))))
    assert canonical(came) == canonical(value)
    assert same_value(came, value) or "nan" in repr(value)


def canonical(value):
    """Equal for equal types and contents, NaN and -0.0 included; sets in any order."""
    if isinstance(value, set | frozenset):
        return type(value), sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return type(value), [canonical(each) for each in value]
    if isinstance(value, dict):
        return [(repr(key), canonical(each)) for key, each in value.items()]
    return repr(value)


small = st.recursive(
    st.integers(0, 2)
    | st.sampled_from([True, False, 0.0, 1.0, 0.5, "a", b"a", None, float("nan")]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(st.integers(0, 1), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(deadline=None)
@given(small, small)
def test_equal_is_pythons_equal(one, other):
    copy = decode_value(encode_value(other))  # no NaN is itself
    assert same_value(one, copy) == (one == copy)
    assert same_value([other], [copy]) == ([other] == [copy])


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        *((0.1 + 0.2, 0.3, True), (1e300, 1e300 * (1 + 1e-12), True), (1.0, 1.0 + 1e-8, False)),
        *((True, 1, True), (1, 1.0, True), ([1], (1,), False), ({1}, frozenset({1}), True)),
        *((10**400, 1.0, False), (float("inf"), 1e308, False), (float("nan"), 1.0, False)),
        *((10**20, 10**20 + 1, False), ([0.1 + 0.2], [0.3], True), ({"a": 1}, {"a": True}, True)),
        *((defaultdict(int, a=1), {"a": 1}, False), (0.0, 1e-300, False), (None, False, False)),
    ],
)
def test_equal_beyond_python(one, other, equal):
    assert same_value(one, other) is equal


def test_bounds_hold_on_both_sides():
    for value in (list(range(10**5)), "a" * 3, iter(int, 1)):
        try:
            assert decode_value(encode_value(value)) == value
        except ValueError as error:
            assert str(error) == "too big"
    for encoded in ({"set": list(range(2000))}, {"eval": 1}, {"set": [], "dict": []}, {"tuple": 1}):
        with pytest.raises((ValueError, TypeError)):
            decode_value(encoded)


def test_run_tests_takes_no_tests_of_nothing():
    with Sandbox() as sandbox:
        assert run_tests(sandbox, []) == []
