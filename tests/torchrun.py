"""torchrun, but that its processes are forks of it: they have loaded what they need."""

import multiprocessing

from processes import Forked
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import (
    SubprocessHandler,
)
from torch.distributed.run import main


def forked(handler, command, environment):
    program, *arguments = [part for part in command[1:] if part not in ("-u", "-m")]
    options = {"environment": environment, "output": None}
    return Forked(program, arguments, **options, context=multiprocessing.get_context("fork"))


if __name__ == "__main__":
    SubprocessHandler._popen = forked
    main()
