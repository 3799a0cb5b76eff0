"""`import fsdl_devinfra` and the command's start, against bare Python."""
from timing import in_turns, process


def rows():
    yield {"name": "import fsdl_devinfra (peer: bare python)", **in_turns(process("-c", "import fsdl_devinfra"), process("-c", "pass"), runs=7)}
    yield {"name": "fsdl-devinfra --version (peer: bare python)", **in_turns(process("-m", "fsdl_devinfra", "--version"), process("-c", "pass"), runs=7)}
