"""The command line on a pseudo-terminal, where it asks."""

import os
import pty
import subprocess

from .server import CLI, Volume

QUESTION = b"Type yes: "


def on_a_terminal(volume: Volume, arguments: list[str], typed: str, meanwhile=None, output=None) -> tuple[int, str]:
    """Runs the command line; returns the exit status and what was shown. `meanwhile` is called between question and answer.

    `output` is a file for standard output, instead of the terminal.
    """
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [CLI, *arguments, *volume.store.cli_options],
        stdin=terminal,
        stdout=output or terminal,
        stderr=terminal,
        env={**os.environ, **volume.store.env},
    )
    os.close(terminal)
    shown, is_answered = b"", False
    while True:
        if QUESTION in shown and not is_answered:
            is_answered = True
            if meanwhile:
                meanwhile()
            os.write(controller, typed.encode())
        try:
            piece = os.read(controller, 4096)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(controller)
    return process.wait(timeout=60), shown.decode(errors="replace")
