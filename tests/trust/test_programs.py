"""Programs that a model wrote: what they compute, and what they do not get at."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from luthier.trust.programs import Outcome, checked, run

SUMS = [
    ("ans = (17 + 25) * 3 - 7 / 2", (17 + 25) * 3 - 7 / 2),
    ("import math\nans = round(math.sqrt(2) * math.pi, 6)", round(math.sqrt(2) * math.pi, 6)),
    ("from fractions import Fraction as F\nans = sum(F(1, n) for n in range(1, 5))", "25/12"),
    ("def f(n):\n    return 1 if n < 2 else n * f(n - 1)\nans = f(12)", math.factorial(12)),
    ("rows = {'a': [1, 2], 'b': [3]}\nans = max(rows, key=lambda k: sum(rows[k]))", "a"),
    (
        "from datetime import datetime\nd = datetime.strptime('2020-02-28', '%Y-%m-%d')\nans = d.strftime('%d/%m/%y')",
        "28/02/20",
    ),
    ("ans = 'x' + chr(0xD800)", "x\\ud800"),  # half a character, which no file takes
    ("n = 0\nwhile n ** 2 < 200:\n    n += 1\nprint(n)\nans = f'{n} apples'", "15 apples"),
]


@pytest.mark.acid("pot", 3)
@pytest.mark.parametrize(("program", "wanted"), SUMS)
def test_a_sum_comes_out_as_it_is_computed_here(program: str, wanted: object) -> None:
    assert run(program).answer == str(wanted)


# What each tries, the program, and a word of what stopped it. None may end in an answer.
HOSTILE = [
    ("a loop without end", "while True:\n    pass", "processor time"),
    ("one number that takes for ever", "ans = 9 ** 9 ** 9", "processor time"),
    ("a fork bomb", "import os\nwhile True:\n    os.fork()", "importing 'os'"),
    ("a fork by a name", "__import__('os').fork()", "'__import__'"),
    ("reading a file", "ans = open('/etc/passwd').read()", "NameError"),
    ("writing a file", "open('/tmp/luthier-was-here', 'w').write('x')", "NameError"),
    ("a socket", "import socket\nsocket.create_connection(('127.0.0.1', 80))", "importing 'socket'"),
    ("all memory", "ans = [0] * 10 ** 10", "Memory"),
    ("memory bit by bit", "s = 'x'\nwhile True:\n    s = s + s", "emory"),
    ("printing a gigabyte", "while True:\n    print('x' * 1000)", "prints too much"),
    ("printing it at once", "print('x' * 10 ** 9)", "emory"),
    ("ctypes", "import ctypes\nctypes.string_at(0)", "importing 'ctypes'"),
    ("signals", "import signal\nsignal.signal(signal.SIGPROF, signal.SIG_IGN)", "importing 'signal'"),
    ("a process", "import subprocess\nsubprocess.run(['ls'])", "importing 'subprocess'"),
    ("the classes of everything", "ans = ().__class__.__base__.__subclasses__()", "'__"),
    ("a frame", "g = (1 for _ in [1])\nans = g.gi_frame.f_builtins", "is not allowed"),
    ("attributes by a format", "ans = '{0.__class__}'.format(1)", "'format'"),
    ("evaluating text", "ans = eval('1 + 1')", "NameError"),
    ("executing text", "exec('import os')", "NameError"),
    ("builtins by their name", "ans = __builtins__['open']", "'__builtins__'"),
    ("a module behind a module", "import statistics\nans = statistics.sys", "AttributeError"),
    ("importing under a name", "from math import pi as __builtins__\nans = 1", "'__builtins__'"),
    ("all of a record", "from math import __dict__ as d\nans = d", "'__dict__'"),
    (
        "any loaded module",  # what is missing in a record is looked for among the modules, by the record's name
        "from math import __dict__ as d\nd['__name__'] = 'os'\nfrom math import path as p\nans = p.os.environ",
        "'__dict__'",
    ),
    ("an attribute by its name", "from math import __getattribute__ as g\nans = g('__class__')", "'__getattribute__'"),
    ("a class by an import", "def f():\n    from math import __class__ as c\n    return c\nans = f()", "'__class__'"),
    ("writing into a record", "math.floor = len\nans = math.floor('ab')", "setting .floor"),
    ("writing into a class", "from fractions import Fraction as F\nF.limit_denominator = 1\nans = 1", "setting .limit"),
    ("the modules behind dates", "from time import sleep\nsleep(9)\nans = 1", "importing 'time'"),
    ("printing nothing for ever", "while True:\n    print(end='')", "prints too much"),
    ("a list without end", "import itertools\nans = list(itertools.count())", "emory"),
    ("a width without end", "ans = f'{1:{10 ** 10}}'", "emory"),
    ("a decimal without end", "from decimal import Decimal\nans = int(Decimal('1e99999999'))", "processor time"),
    ("catching what stops it", "while True:\n    try:\n        pass\n    except BaseException:\n        pass", "try"),
    ("a class with a repr", "class A:\n    pass\nans = A()", "classdef"),
    ("endless recursion", "def f(x):\n    return f(x)\nans = f(1)", "RecursionError"),
    ("brackets that no parser likes", "ans = " + "(" * 5000 + ")" * 5000, ""),
    ("threads", "import threading\nthreading.Thread(target=print).start()", "importing 'threading'"),
    ("waiting", "import time\ntime.sleep(1000)", "importing 'time'"),
    ("a number too long to write", "ans = 7 ** 100000", "digits"),
    ("nothing for an answer", "x = 1", "assigns nothing"),
    ("a text of a megabyte", "ans = 1  # " + "x" * 10**6, "characters"),
]


@pytest.mark.acid("pot", 1, 2)
@pytest.mark.parametrize(("program", "why"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_a_hostile_program_is_contained(program: str, why: str) -> None:
    begun = time.process_time()
    outcome = run(program, seconds=0.3)
    assert outcome.answer is None and outcome.error and why in outcome.error, outcome
    assert len(outcome.printed) <= 10_000 and time.process_time() - begun < 5
    assert not Path("/tmp/luthier-was-here").exists()


@pytest.mark.acid("pot", 1)
def test_a_program_that_fails_says_where() -> None:
    assert run("ans = 1 / 0") == Outcome(answer=None, error="ZeroDivisionError: division by zero")
    assert "line 2: with is not allowed" in run("a = 1\nwith a:\n    pass").error
    assert run("ans = = 1").error == "it is no Python"
    with pytest.raises(SyntaxError, match="import"):
        checked("import os")
