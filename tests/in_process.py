"""Runs a script of relatives/ in this process, which is faster than to start a program."""

import gc
import signal
import sys
import warnings
from pathlib import Path

import aib_run


def call(script, *flags):
    """The exit code of the module `script` with the command line `flags`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    before = sys.argv, sys.stdout, sys.stderr, sys.excepthook
    sys.argv = [str(Path(script.__file__)), *map(str, flags)]
    code = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the end of a run closes its files, one of which is its lock
        try:
            aib_run.main(script.Args, script.train, script.make_envs, script.make_agent)
        except SystemExit as stop:
            code = stop.code
        except KeyboardInterrupt:
            code = 130
        finally:
            sys.argv, sys.stdout, sys.stderr, sys.excepthook = before
            for number, handler in handlers.items():
                signal.signal(number, handler)
        gc.collect()
    return code
