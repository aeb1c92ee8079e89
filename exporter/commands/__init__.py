"""The command line: one file per command, and what the commands share."""

import os
import signal
import sys

# Ctrl-C before the command runs ends the process, and prints no traceback of imports; `errors` takes over then.
if os.path.basename(sys.argv[0]) == "lvlm-edge" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
