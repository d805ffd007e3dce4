"""Telling somebody that a run failed, or that there is a new champion."""

import json
import shlex
import subprocess
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

from flows.experiment import NotifySettings

SECONDS = 30
"""After which a command or an address is given up."""


def notify(settings: NotifySettings, event: dict[str, Any], log: Callable[[str], None]) -> None:
    """Hand an event to the command, on standard input, and to the webhook, as JSON.

    What goes wrong with one is logged, and changes nothing else.

    Args:
        settings: Whom to tell.
        event: What happened.
        log: Told what went wrong.
    """
    content = json.dumps(event).encode()
    for tell, whom in ((_run, settings.command), (_post, settings.webhook)):
        try:
            if whom:
                tell(whom, content)
        except (OSError, ValueError, HTTPException, subprocess.SubprocessError) as error:
            log(f"the notification of {event['event']!r} did not arrive: {error}")


def _run(command: str, content: bytes) -> None:
    stderr = 2  # Our standard output is for results.
    words = shlex.split(command)
    subprocess.run(words, input=content, stdout=stderr, timeout=SECONDS, check=True)


def _post(address: str, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, content, headers)
    with urllib.request.urlopen(request, timeout=SECONDS):
        pass
